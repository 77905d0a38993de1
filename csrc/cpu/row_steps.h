// The loops over one piece of a row of logits: read it, turn it into exponentials with their sums, write the
// gradient. Each kind of element, divergence and temperature has loops of its own, chosen once a call.
#pragma once

#include "cpu/pieces.h"
#include "row_math.h"

namespace kddp {
namespace {

constexpr double log2_e = 1.44269504088896340736, ln_2 = 0.693147180559945309417;

// What a side's exponentials take of its logits.
template <class T>
struct Tempering {
    T student_to_exponent, teacher_to_exponent;  // log2(e) / T
    T student_to_nats, teacher_to_nats;          // 1 / T
};

// How e^s comes from e^(s/T): where T is 2 or 4 by squaring, else by an exponential of its own.
enum class Untempered { absent, same, square, fourth, separate };

// What is computed with the teacher.
enum class Distillation { none, forward, reverse, mixture };

// Where both sides exclude a class, 0 * log(0 / 0) counts 0. Looking for it takes time, and leaving it out shows in the
// sum, which is then no number.
enum class Exclusions { ignored, counted_as_zero };

template <class T>
struct RowBuffers {
    T* student;
    T* teacher;
    T* untempered;  // used where Untempered::separate
};

template <class T>
inline RowBuffers<T> operator+(RowBuffers<T> buffers, int64_t offset) {
    return {buffers.student + offset, buffers.teacher + offset, buffers.untempered + offset};
}

// What stands around a piece: its exponential is 0, and of two their difference as well.
template <class T>
constexpr T filling = std::numeric_limits<T>::lowest();

// Logits of a piece in the type computed in. One that they have already stays where it is (`source` is where the piece
// starts), others are converted into the buffer.
template <class T, class Element>
const T* read_piece(const void* source, Piece piece, T* buffer) {
    const Element* from = static_cast<const Element*>(source) - piece.head;
    over_vectors<T>(
        piece, [&](int64_t i) { store<T>(buffer + i, load_elements<T>(from + i)); },
        [&](int64_t i, int64_t first, int64_t last) {
            store<T>(buffer + i, load_partial<T>(from + i, first, last, filling<T>));
        });
    return buffer;
}

template <class T>
const T* find_piece(const void* source, Piece piece, T*) {
    return static_cast<const T*>(source) - piece.head;
}

// The highest logit of the first vectors of a piece, or of all.
template <class T>
T highest_of(const T* values, Piece piece, int64_t vectors) {
    Vector<T> highest = broadcast<T>(filling<T>);
    const int64_t places = vectors * lanes<T>;
    const Piece looked_at{0, (piece.end() < places ? piece.end() : places) - piece.head, piece.head};
    over_vectors<T>(
        looked_at, [&](int64_t i) { highest = maximum<T>(load<T>(values + i), highest); },
        [&](int64_t i, int64_t first, int64_t last) {
            highest = maximum<T>(load_partial<T>(values + i, first, last, filling<T>), highest);
        });
    return maximum_of_lanes<T>(highest);
}

// e^s from e^(s/T); `margin` is s - r_s.
template <class T, Untempered untempered>
inline Vector<T> untempered_exponential(Vector<T> tempered, Vector<T> margin) {
    if constexpr (untempered == Untempered::same) return tempered;
    if constexpr (untempered == Untempered::square) return tempered * tempered;
    if constexpr (untempered == Untempered::fourth) return (tempered * tempered) * (tempered * tempered);
    return exp2_of_product<T>(margin, T(log2_e));
}

// x * y where x is not 0, and 0 where it is, whatever y is: 0 * log(0 / q) is 0.
template <class T>
inline Vector<T> product_or_zero(Vector<T> x, Vector<T> y) {
    return x == 0 ? Vector<T>{} : x * y;
}

template <class T>
struct ExponentialSums {
    Vector<T> student{}, teacher{}, untempered{}, dot{}, student_moment{}, other_moment{};
    Vector<T> highest = broadcast<T>(filling<T>), highest_of_teacher = highest;
};

// One vector of exponentiate_piece.
template <class T, Distillation distillation, Untempered untempered, bool moments, Exclusions exclusions>
inline void exponentiate_vector(Vector<T> margin, Vector<T> teacher_margin, RowBuffers<T> to, Tempering<T> by,
                                ExponentialSums<T>& sums) {
    constexpr bool with_teacher = distillation != Distillation::none;
    Vector<T> exp_student{};
    if constexpr (with_teacher || (untempered != Untempered::separate && untempered != Untempered::absent)) {
        exp_student = exp2_of_product<T>(margin, by.student_to_exponent);
        sums.student += exp_student;
        store<T>(to.student, exp_student);
    }
    if constexpr (with_teacher) {
        const Vector<T> exp_teacher = exp2_of_product<T>(teacher_margin, by.teacher_to_exponent);
        sums.teacher += exp_teacher;
        // Where both temperatures are one, it is multiplied in at the end.
        Vector<T> apart = teacher_margin - margin;
        if constexpr (moments) apart = teacher_margin * by.teacher_to_nats - margin * by.student_to_nats;
        if constexpr (distillation == Distillation::forward) {
            if constexpr (exclusions == Exclusions::ignored)
                sums.dot += exp_teacher * apart;
            else
                sums.dot += product_or_zero<T>(exp_teacher, apart);
            if constexpr (moments) sums.other_moment += product_or_zero<T>(exp_teacher, margin);
        }
        if constexpr (distillation == Distillation::reverse) {
            if constexpr (!moments) apart *= by.student_to_nats;
            const Vector<T> weight = exp_student == 0 ? Vector<T>{} : -apart;
            sums.dot += exp_student * weight;
            if constexpr (moments) sums.other_moment += product_or_zero<T>(exp_student, weight * margin);
            store<T>(to.teacher, weight);
        } else {
            store<T>(to.teacher, exp_teacher);
        }
        if constexpr (moments) sums.student_moment += product_or_zero<T>(exp_student, margin);
    }
    if constexpr (untempered != Untempered::absent) {
        const Vector<T> e = untempered_exponential<T, untempered>(exp_student, margin);
        sums.untempered += e;
        if constexpr (untempered == Untempered::separate) store<T>(to.untempered, e);
    }
}

// What is read after this piece, asked for while the processor computes.
struct NextLogits {
    const char* student;
    const char* teacher;
    int student_bytes, teacher_bytes;  // of a vector
};

template <class T>
struct Highest {
    T student, teacher;
};

// Puts the exponentials of a piece's logits into the buffers (reverse: u - v in the teacher's place) and sums them.
// The sums' references are set. Returns the highest logits.
template <class T, Distillation distillation, Untempered untempered, bool moments, Exclusions exclusions>
Highest<T> exponentiate_piece(const T* student, const T* teacher, RowBuffers<T> buffers, Piece piece, Tempering<T> by,
                              NextLogits next, PieceSums& result) {
    const T of_student = T(result.student_reference), of_teacher = T(result.teacher_reference);
    ExponentialSums<T> sums;
    const auto add = [&](int64_t i, Vector<T> s, Vector<T> t) {
        sums.highest = maximum<T>(s, sums.highest);
        if constexpr (distillation != Distillation::none)
            sums.highest_of_teacher = maximum<T>(t, sums.highest_of_teacher);
        exponentiate_vector<T, distillation, untempered, moments, exclusions>(s - of_student, t - of_teacher,
                                                                              buffers + i, by, sums);
    };
    const auto part = [&](const T* from, int64_t i, int64_t first, int64_t last) {
        return from ? load_partial<T>(from + i, first, last, filling<T>) : Vector<T>{};
    };
    over_vectors<T>(
        piece,
        [&](int64_t i) {
            Vector<T> t{};
            if constexpr (distillation != Distillation::none) {
                t = load<T>(teacher + i);
                prefetch(next.teacher);
                next.teacher += next.teacher_bytes;
            }
            prefetch(next.student);
            next.student += next.student_bytes;
            add(i, load<T>(student + i), t);
        },
        [&](int64_t i, int64_t first, int64_t last) {
            add(i, part(student, i, first, last), part(teacher, i, first, last));
        });
    result.student = sum_of_lanes<T>(sums.student);
    result.teacher = sum_of_lanes<T>(sums.teacher);
    result.untempered = sum_of_lanes<T>(sums.untempered);
    result.dot = sum_of_lanes<T>(sums.dot);
    if constexpr (distillation == Distillation::forward && !moments) result.dot *= double(by.student_to_nats);
    result.student_moment = sum_of_lanes<T>(sums.student_moment);
    result.other_moment = sum_of_lanes<T>(sums.other_moment);
    return {maximum_of_lanes<T>(sums.highest), maximum_of_lanes<T>(sums.highest_of_teacher)};
}

// What turns a piece's margins and exponentials into logarithms and probabilities of the whole row.
template <class T>
struct MixtureScale {
    T student_reference, teacher_reference;      // the row's
    T student_log_sum, teacher_log_sum;          // log2 of the row's sums
    T student_probability, teacher_probability;  // what the piece's exponentials are multiplied by
    T student_share, teacher_share;              // 1 - beta, beta
};

// jsd's second round: replaces the teacher's exponentials by log(q / m), and sums.
template <class T>
void mix_piece(const T* student, const T* teacher, RowBuffers<T> buffers, Piece piece, Tempering<T> by,
               MixtureScale<T> scale, MixtureSums& sums) {
    Vector<T> kl_teacher{}, kl_student{}, student_moment{}, weighted_moment{};
    const auto add = [&](int64_t i, Vector<T> s, Vector<T> t) {
        const Vector<T> margin = s - scale.student_reference, teacher_margin = t - scale.teacher_reference;
        const Vector<T> q = load<T>(buffers.student + i) * scale.student_probability;
        const Vector<T> p = load<T>(buffers.teacher + i) * scale.teacher_probability;
        const Vector<T> log_mixture = log2_of_positive(scale.student_share * q + scale.teacher_share * p);
        const Vector<T> student_ratio = margin * by.student_to_exponent - scale.student_log_sum - log_mixture;
        const Vector<T> teacher_ratio = teacher_margin * by.teacher_to_exponent - scale.teacher_log_sum - log_mixture;
        const Vector<T> weight = q == 0 ? Vector<T>{} : student_ratio * T(ln_2);
        store<T>(buffers.teacher + i, weight);
        kl_student += q * weight;
        kl_teacher += product_or_zero<T>(p, teacher_ratio);
        const Vector<T> moment = product_or_zero<T>(q, margin);
        student_moment += moment;
        weighted_moment += moment * weight;
    };
    over_vectors<T>(
        piece, [&](int64_t i) { add(i, load<T>(student + i), load<T>(teacher + i)); },
        [&](int64_t i, int64_t first, int64_t last) {
            add(i, load_partial<T>(student + i, first, last, filling<T>),
                load_partial<T>(teacher + i, first, last, filling<T>));
        });
    sums.kl_teacher = sum_of_lanes<T>(kl_teacher) * ln_2;
    sums.kl_student = sum_of_lanes<T>(kl_student);
    sums.student_moment = sum_of_lanes<T>(student_moment);
    sums.weighted_moment = sum_of_lanes<T>(weighted_moment);
}

// The coefficients of RowGradient for one piece.
template <class T>
struct PieceGradient {
    T first, second, untempered, constant, label, projection;
    T mean;               // of the row, used with a projection
    const T* logits;      // the piece as read, used with a projection
    int64_t label_place;  // in the buffers; none: below 0
    bool past_caches;
};

template <class T, Distillation distillation, Untempered untempered, bool moments>
inline Vector<T> gradient_vector(RowBuffers<T> buffers, const PieceGradient<T>& scale, Vector<T> logits) {
    constexpr bool with_teacher = distillation != Distillation::none;
    constexpr GradientForm form =
        distillation == Distillation::forward ? GradientForm::difference : GradientForm::weighted;
    Vector<T> exp_student{}, exp_untempered{}, gradient{};
    if constexpr (with_teacher || (untempered != Untempered::separate && untempered != Untempered::absent))
        exp_student = load<T>(buffers.student);
    if constexpr (with_teacher)
        gradient = divergence_gradient<form>(exp_student, load<T>(buffers.teacher), scale.first, scale.second);
    if constexpr (moments) gradient -= scale.projection * (logits - scale.mean);
    if constexpr (untempered == Untempered::separate) {
        exp_untempered = load<T>(buffers.untempered);
    } else if constexpr (untempered != Untempered::absent) {
        exp_untempered = untempered_exponential<T, untempered>(exp_student, exp_student);
    }
    if constexpr (untempered != Untempered::absent) gradient += scale.untempered * exp_untempered - scale.constant;
    return gradient;
}

// Writes the gradient of a piece, which starts at `target`.
template <class T, class Element, Distillation distillation, Untempered untempered, bool moments>
void write_gradient_piece(RowBuffers<T> buffers, Piece piece, const PieceGradient<T>& of_piece, void* target) {
    // Copies that no store can change, so that they stay in registers.
    const PieceGradient<T> scale{of_piece.first,       of_piece.second,     of_piece.untempered, of_piece.constant,
                                 of_piece.label,       of_piece.projection, of_piece.mean,       of_piece.logits,
                                 of_piece.label_place, of_piece.past_caches};
    Element* to = static_cast<Element*>(target) - piece.head;
    const auto gradient = [&](int64_t i, int64_t first, int64_t last) {
        Vector<T> logits{};
        if constexpr (moments) logits = load_partial<T>(scale.logits + i, first, last, T(0));
        Vector<T> v = gradient_vector<T, distillation, untempered, moments>(buffers + i, scale, logits);
        if (scale.label_place >= i && scale.label_place < i + lanes<T>) v[scale.label_place - i] -= scale.label;
        return v;
    };
    const auto whole_vectors = [&](int64_t i, int64_t end, auto put) {
        for (; i < end; i += lanes<T>) {
            Vector<T> logits{};
            if constexpr (moments) logits = load<T>(scale.logits + i);
            put(to + i, gradient_vector<T, distillation, untempered, moments>(buffers + i, scale, logits));
        }
    };
    const auto kept = [](Element* at, Vector<T> v) { store_elements<T>(at, v); };
    const auto past_caches = [](Element* at, Vector<T> v) { stream_elements<T>(at, v); };
    // The vector with the label apart from those before and after it.
    const int64_t begin = piece.first_whole(lanes<T>), end = piece.last_whole(lanes<T>);
    const int64_t place = scale.label_place / lanes<T> * lanes<T>;
    const int64_t label = scale.label_place >= begin && scale.label_place < end ? place : end;
    const auto range = [&](int64_t from, int64_t until) {
        scale.past_caches ? whole_vectors(from, until, past_caches) : whole_vectors(from, until, kept);
    };
    if (begin > 0) {
        const int64_t last = piece.end() < begin ? piece.end() : begin;
        store_partial<T>(to, gradient(0, piece.head, last), piece.head, last);
    }
    range(begin, label);
    if (label < end) {
        const Vector<T> v = gradient(label, 0, lanes<T>);
        scale.past_caches ? past_caches(to + label, v) : kept(to + label, v);
        range(label + lanes<T>, end);
    }
    if (end < piece.end()) store_partial<T>(to + end, gradient(end, 0, piece.end() - end), 0, piece.end() - end);
}

}  // namespace
}  // namespace kddp
