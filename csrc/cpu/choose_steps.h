// Which loops of row_steps.h serve a call.
#pragma once

#include "cpu/row_steps.h"

namespace kddp {
namespace {

template <class T>
using ReadPiece = const T* (*)(const void*, Piece, T*);
template <class T>
using ExponentiatePiece = Highest<T> (*)(const T*, const T*, RowBuffers<T>, Piece, Tempering<T>, NextLogits,
                                         PieceSums&);
template <class T>
using WriteGradientPiece = void (*)(RowBuffers<T>, Piece, const PieceGradient<T>&, void*);

template <class T>
struct RowSteps {
    ReadPiece<T> read_student, read_teacher;
    ExponentiatePiece<T> exponentiate;         // fast, but its dot is no number where a class is excluded
    ExponentiatePiece<T> exponentiate_safely;  // the same numbers where both give numbers
    WriteGradientPiece<T> write_gradient;
};

template <class T>
constexpr ElementType type_of = sizeof(T) == 8 ? ElementType::float64 : ElementType::float32;

// dkd changes what it has read, so it needs a copy.
template <class T>
ReadPiece<T> choose_read(ElementType type, bool copy) {
    if (type == type_of<T> && !copy) return find_piece<T>;
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

template <class T, Distillation distillation, Untempered untempered, bool moments>
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

inline Untempered choose_untempered(const KdL1Loss& job) {
    if (!job.labels) return Untempered::absent;
    if (job.standardize_logits && job.teacher.data) return Untempered::separate;
    if (job.temperature == 1) return Untempered::same;
    if (job.teacher.data && job.temperature == 2) return Untempered::square;
    if (job.teacher.data && job.temperature == 4) return Untempered::fourth;
    return Untempered::separate;
}

template <class T, Distillation distillation, Untempered untempered, bool moments>
RowSteps<T> steps_of(const KdL1Loss& job) {
    const ElementType type = job.student.type;
    constexpr Exclusions fast =
        distillation == Distillation::forward && !moments ? Exclusions::ignored : Exclusions::counted_as_zero;
    const bool copy = job.teacher.data && job.divergence == Divergence::dkd;
    RowSteps<T> steps{choose_read<T>(type, copy), choose_read<T>(job.teacher.type, copy),
                      exponentiate_piece<T, distillation, untempered, moments, fast>,
                      exponentiate_piece<T, distillation, untempered, moments, Exclusions::counted_as_zero>,
                      choose_write<T, distillation, untempered, moments>(type)};
    // A term of weight 0 has no gradient, not 0 times one that may be infinite.
    if (job.alpha == 0) steps.write_gradient = choose_write<T, Distillation::none, untempered, false>(type);
    if (job.alpha == 1) steps.write_gradient = choose_write<T, distillation, Untempered::absent, moments>(type);
    return steps;
}

template <class T, Distillation distillation>
RowSteps<T> choose_steps(const KdL1Loss& job) {
    const Untempered untempered = choose_untempered(job);
    if constexpr (distillation != Distillation::none) {
        if (job.standardize_logits)
            return untempered == Untempered::absent ? steps_of<T, distillation, Untempered::absent, true>(job)
                                                    : steps_of<T, distillation, Untempered::separate, true>(job);
        if (untempered == Untempered::square) return steps_of<T, distillation, Untempered::square, false>(job);
        if (untempered == Untempered::fourth) return steps_of<T, distillation, Untempered::fourth, false>(job);
    }
    if (untempered == Untempered::absent) return steps_of<T, distillation, Untempered::absent, false>(job);
    if (untempered == Untempered::same) return steps_of<T, distillation, Untempered::same, false>(job);
    return steps_of<T, distillation, Untempered::separate, false>(job);
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
