// The loops that write a piece's gradient: from exponentials that were kept, or from the logits once more.
#pragma once

#include "cpu/row_steps.h"

namespace kddp {
namespace {

// The coefficients of RowGradient for one piece.
template <class T>
struct PieceGradient {
    T first, second, untempered, constant, label, projection;
    T mean;               // of the row, used with a projection
    const void* logits;   // the piece as read, used with a projection
    int64_t label_place;  // in the buffers; none: below 0
    bool past_caches;

    // One that no store can change, so that it stays in registers.
    PieceGradient copy() const {
        return {first, second, untempered, constant, label, projection, mean, logits, label_place, past_caches};
    }
};

template <class T, Distillation distillation, ExpReuse untempered>
KDDP_ALWAYS_INLINE inline Vector<T> gradient_vector(const Exponentials<T>& e, const PieceGradient<T>& scale) {
    constexpr GradientForm form =
        distillation == Distillation::forward ? GradientForm::difference : GradientForm::weighted;
    Vector<T> gradient{};
    if constexpr (distillation != Distillation::none)
        gradient = divergence_gradient<form>(e.student, e.other, scale.first, scale.second);
    if constexpr (untempered != ExpReuse::absent) gradient += scale.untempered * e.untempered - scale.constant;
    return gradient;
}

// Writes `gradient(i, first, last)`, the vectors of a piece's gradient less what is subtracted at the label, and with
// `pairs`, `gradient_pair(i)` where there are two. The piece starts at `target`.
template <class T, class Element, bool pairs, class Gradient, class GradientPair>
KDDP_ALWAYS_INLINE inline void write_vectors(Piece piece, const PieceGradient<T>& scale, void* target,
                                             Gradient gradient, GradientPair gradient_pair) {
    Element* to = static_cast<Element*>(target) - piece.head;
    const int64_t begin = piece.first_whole(lanes<T>), end = piece.last_whole(lanes<T>);
    const int64_t place = scale.label_place / lanes<T> * lanes<T>;
    const int64_t label = scale.label_place >= begin && scale.label_place < end ? place : end;
    // Whole vectors up to the label's and from there on; then the others one by one.
    for (int64_t i = begin; i < end; i = label + lanes<T>) {
        const int64_t until = i <= label ? label : end;
        if constexpr (pairs)
            for (; i + 2 * lanes<T> <= until; i += 2 * lanes<T>)
                write_pair<T>(to + i, gradient_pair(i), scale.past_caches);
        for (; i < until; i += lanes<T>) {
            const Vector<T> v = gradient(i, 0, lanes<T>);
            scale.past_caches ? stream_elements<T>(to + i, v) : store_elements<T>(to + i, v);
        }
        if (until == end) break;
    }
    const int64_t others[] = {begin > 0 ? 0 : -1, label < end ? label : -1, end < piece.end() ? end : -1};
    for (const int64_t i : others) {
        if (i < 0) continue;
        const int64_t first = i < piece.head ? piece.head - i : 0;
        const int64_t last = i + lanes<T> < piece.end() ? lanes<T> : piece.end() - i;
        Vector<T> v = gradient(i, first, last);
        if (scale.label_place >= i && scale.label_place < i + lanes<T>) v[scale.label_place - i] -= scale.label;
        store_partial<T>(to + i, v, first, last);
    }
}

// From exponentials that were kept.
template <class T, class Element, Distillation distillation, ExpReuse untempered, bool moments>
void write_gradient_piece(RowBuffers<T> buffers, Piece piece, const PieceGradient<T>& of_piece, void* target) {
    constexpr bool with_teacher = distillation != Distillation::none;
    const PieceGradient<T> scale = of_piece.copy();
    const T* logits = static_cast<const T*>(scale.logits);
    const auto gradient = [&](int64_t i, int64_t first, int64_t last) KDDP_ALWAYS_INLINE {
        Exponentials<T> e;
        if constexpr (with_teacher || (untempered != ExpReuse::separate && untempered != ExpReuse::absent))
            e.student = load<T>(buffers.student + i);
        if constexpr (with_teacher) e.other = load<T>(buffers.teacher + i);
        if constexpr (untempered == ExpReuse::separate)
            e.untempered = load<T>(buffers.untempered + i);
        else if constexpr (untempered != ExpReuse::absent)
            e.untempered = untempered_exponential<T, untempered>(e.student, e.student);
        Vector<T> v = gradient_vector<T, distillation, untempered>(e, scale);
        if constexpr (moments) {
            const bool whole = first == 0 && last == lanes<T>;
            v -= scale.projection *
                 ((whole ? load<T>(logits + i) : load_logits<T>(logits + i, first, last)) - scale.mean);
        }
        return v;
    };
    write_vectors<T, Element, false>(piece, scale, target, gradient, [](int64_t) { return VectorPair<T>{}; });
}

// From the logits, exponentiated once more. `references` are those of the piece's sums.
template <class T, class Element, Distillation distillation, ExpReuse untempered, bool shifted>
void write_gradient_again(const void* student_logits, const void* teacher_logits, Piece piece, Tempering<T> by,
                          const ChunkSums& references, const PieceGradient<T>& of_piece, void* target) {
    constexpr bool with_teacher = distillation != Distillation::none;
    const Element* student = static_cast<const Element*>(student_logits);
    const Element* teacher = static_cast<const Element*>(teacher_logits);
    const Origin<T> origin = origin_of<T>(references, by);
    const PieceGradient<T> scale = of_piece.copy();
    const auto gradient_of = [&](Vector<T> s, Vector<T> t) KDDP_ALWAYS_INLINE {
        ExponentialSums<T, false> unused;
        const Exponentials<T> e =
            exponentiate<T, distillation, untempered, false, Exclusions::ignored, shifted>(s, t, origin, by, unused);
        return gradient_vector<T, distillation, untempered>(e, scale);
    };
    const auto gradient = [&](int64_t i, int64_t first, int64_t last) KDDP_ALWAYS_INLINE {
        const bool whole = first == 0 && last == lanes<T>;
        Vector<T> t{};
        if constexpr (with_teacher)
            t = whole ? load_elements<T>(teacher + i) : load_logits<T>(teacher + i, first, last);
        return gradient_of(whole ? load_elements<T>(student + i) : load_logits<T>(student + i, first, last), t);
    };
    const auto gradient_pair = [&](int64_t i) KDDP_ALWAYS_INLINE {
        VectorPair<T> s{}, t{};
        if constexpr (has_pairs<T, Element>) s = load_pair<T>(student + i);
        if constexpr (has_pairs<T, Element> && with_teacher) t = load_pair<T>(teacher + i);
        return VectorPair<T>{gradient_of(s.first, t.first), gradient_of(s.second, t.second)};
    };
    write_vectors<T, Element, has_pairs<T, Element>>(piece, scale, target, gradient, gradient_pair);
}

}  // namespace
}  // namespace kddp
