// Which loops of row_steps.h and gradient_steps.h serve a call.
#pragma once

#include "cpu/gradient_steps.h"

namespace kddp {
namespace {

// Rows of more classes are read twice instead of being kept as exponentials: the second-level cache holds no more.
constexpr int64_t longest_kept_row = 32768;

template <class T>
using ReadPiece = const void* (*)(const void*, Piece, T*);
template <class T>
using HighestOf = T (*)(const void*, Piece, int64_t);
template <class T>
using ExponentiatePiece = Highest<T> (*)(const void*, const void*, RowBuffers<T>, Piece, Tempering<T>, NextLogits,
                                         ChunkSums&);
template <class T>
using WriteGradientPiece = void (*)(RowBuffers<T>, Piece, const PieceGradient<T>&, void*);
template <class T>
using WriteGradientAgain = void (*)(const void*, const void*, Piece, Tempering<T>, const ChunkSums&,
                                    const PieceGradient<T>&, void*);

// Loops over logits less the references of their piece.
template <class T>
struct LogitsLoops {
    ExponentiatePiece<T> exponentiate;         // fast, but its dot is no number where a class is excluded
    ExponentiatePiece<T> exponentiate_safely;  // the same numbers where both give numbers
    WriteGradientAgain<T> write_again;         // the gradient; absent: it is made from what `exponentiate` keeps
};

template <class T>
struct RowSteps {
    ReadPiece<T> read_student, read_teacher;        // for the loops below, as they want it
    ReadPiece<T> convert_student, convert_teacher;  // to the type computed in
    HighestOf<T> highest_of;
    LogitsLoops<T> by_difference;          // of any references
    LogitsLoops<T> by_shift;               // of such as are shifts of the exponent; may be absent
    WriteGradientPiece<T> write_gradient;  // of what `exponentiate` kept
};

template <class T>
ReadPiece<T> choose_convert(ElementType type) {
    switch (type) {
        case ElementType::float64:
            return read_piece<T, double>;
        case ElementType::bfloat16:
            return read_piece<T, BFloat16>;
        case ElementType::float16:
            return read_piece<T, Float16>;
        default:
            return read_piece<T, float>;
    }
}

template <class T, Distillation distillation, ExpReuse untempered, bool moments>
WriteGradientPiece<T> choose_write(ElementType type) {
    switch (type) {
        case ElementType::float64:
            return write_gradient_piece<T, double, distillation, untempered, moments>;
        case ElementType::bfloat16:
            return write_gradient_piece<T, BFloat16, distillation, untempered, moments>;
        case ElementType::float16:
            return write_gradient_piece<T, Float16, distillation, untempered, moments>;
        default:
            return write_gradient_piece<T, float, distillation, untempered, moments>;
    }
}

inline Distillation choose_distillation(const KdL1Loss& job) {
    if (!job.teacher.data) return Distillation::none;
    if (job.divergence == Divergence::reverse_kl) return Distillation::reverse;
    return job.divergence == Divergence::jsd ? Distillation::mixture : Distillation::forward;
}

// The loops that read elements of one type where they are.
template <class T, class Element, Distillation distillation, ExpReuse untempered, bool moments, bool keep>
void choose_loops(RowSteps<T>& steps) {
    constexpr Exclusions safe = Exclusions::counted_as_zero;
    constexpr bool plain = distillation == Distillation::forward && !moments;
    constexpr bool shifts = plain && has_exp2_of_shifted<T> && untempered != ExpReuse::separate;
    constexpr Exclusions fast = plain && !shifts ? Exclusions::ignored : safe;
    steps.highest_of = highest_of<T, Element>;
    steps.by_difference = {exponentiate_piece<T, Element, distillation, untempered, moments, fast, false, keep>,
                           exponentiate_piece<T, Element, distillation, untempered, moments, safe, false, keep>,
                           nullptr};
    if constexpr (!keep)
        steps.by_difference.write_again = write_gradient_again<T, Element, distillation, untempered, false>;
    if constexpr (shifts) {
        steps.by_shift = {
            exponentiate_piece<T, Element, distillation, untempered, moments, Exclusions::ignored, true, keep>,
            exponentiate_piece<T, Element, distillation, untempered, moments, safe, true, keep>, nullptr};
        if constexpr (!keep)
            steps.by_shift.write_again = write_gradient_again<T, Element, distillation, untempered, true>;
    }
}

template <class T, class Element, Distillation distillation, ExpReuse untempered, bool moments>
void choose_loops(const KdL1Loss& job, bool where_they_are, RowSteps<T>& steps) {
    if constexpr (!moments && distillation == Distillation::forward && sizeof(T) == 4) {
        // A term of weight 0 has no gradient, which the loops over kept exponentials see to.
        const bool weightless = (job.teacher.data && job.alpha == 0) || (job.labels && job.alpha == 1);
        if (where_they_are && !weightless && job.classes > longest_kept_row)
            return choose_loops<T, Element, distillation, untempered, moments, false>(steps);
    }
    choose_loops<T, Element, distillation, untempered, moments, true>(steps);
}

template <class T, Distillation distillation, ExpReuse untempered, bool moments>
RowSteps<T> steps_of(const KdL1Loss& job) {
    const ElementType type = job.student.type;
    RowSteps<T> steps{};
    steps.convert_student = steps.read_student = choose_convert<T>(type);
    steps.convert_teacher = steps.read_teacher = choose_convert<T>(job.teacher.type);
    steps.write_gradient = choose_write<T, distillation, untempered, moments>(type);
    // A term of weight 0 has no gradient, not 0 times one that may be infinite.
    if (job.alpha == 0) steps.write_gradient = choose_write<T, Distillation::none, untempered, false>(type);
    if (job.alpha == 1) steps.write_gradient = choose_write<T, distillation, ExpReuse::absent, moments>(type);
    // dkd changes what it has read, so it needs a copy.
    const bool dkd = job.teacher.data && job.divergence == Divergence::dkd;
    const bool alike = !job.teacher.data || job.teacher.type == type;
    if constexpr (distillation == Distillation::forward && !moments && sizeof(T) == 4) {
        if (alike && !dkd && type == ElementType::bfloat16 && job.label_smoothing == 0) {
            steps.read_student = steps.read_teacher = find_piece<T, BFloat16>;
            choose_loops<T, BFloat16, distillation, untempered, moments>(job, true, steps);
            return steps;
        }
        if (alike && !dkd && type == ElementType::float16 && job.label_smoothing == 0) {
            steps.read_student = steps.read_teacher = find_piece<T, Float16>;
            choose_loops<T, Float16, distillation, untempered, moments>(job, true, steps);
            return steps;
        }
    }
    const bool where_they_are = alike && !dkd && type == type_of_element<T>;
    if (!dkd && type == type_of_element<T>) steps.read_student = find_piece<T, T>;
    if (!dkd && job.teacher.type == type_of_element<T>) steps.read_teacher = find_piece<T, T>;
    choose_loops<T, T, distillation, untempered, moments>(job, where_they_are, steps);
    return steps;
}

template <class T, Distillation distillation>
RowSteps<T> choose_steps(const KdL1Loss& job) {
    const ExpReuse untempered = choose_exp_reuse(job);
    if constexpr (distillation != Distillation::none) {
        if (job.standardize_logits)
            return untempered == ExpReuse::absent ? steps_of<T, distillation, ExpReuse::absent, true>(job)
                                                  : steps_of<T, distillation, ExpReuse::separate, true>(job);
        if constexpr (sizeof(T) == 4) {
            if (untempered == ExpReuse::square) return steps_of<T, distillation, ExpReuse::square, false>(job);
            if (untempered == ExpReuse::fourth) return steps_of<T, distillation, ExpReuse::fourth, false>(job);
        }
    }
    if (untempered == ExpReuse::absent) return steps_of<T, distillation, ExpReuse::absent, false>(job);
    if (untempered == ExpReuse::same) return steps_of<T, distillation, ExpReuse::same, false>(job);
    return steps_of<T, distillation, ExpReuse::separate, false>(job);
}

template <class T>
RowSteps<T> choose_steps(const KdL1Loss& job) {
    switch (choose_distillation(job)) {
        case Distillation::forward:
            return choose_steps<T, Distillation::forward>(job);
        case Distillation::reverse:
            return choose_steps<T, Distillation::reverse>(job);
        case Distillation::mixture:
            return choose_steps<T, Distillation::mixture>(job);
        default:
            return choose_steps<T, Distillation::none>(job);
    }
}

}  // namespace
}  // namespace kddp
