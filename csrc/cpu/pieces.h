// Walking over a run of elements by vectors that are aligned where it matters.
#pragma once

#include "cpu/elements.h"

namespace kddp {
namespace {

// Elements start to start + count of a row. They are counted in places, `head` of which come before them, so that a
// place that is a multiple of the lanes is an aligned address of the gradient.
struct Piece {
    int64_t start, count;
    int64_t head;
    int64_t end() const { return head + count; }
    int64_t first_whole(int64_t lanes) const { return head > 0 ? lanes : 0; }
    int64_t last_whole(int64_t lanes) const {
        const int64_t first = first_whole(lanes);
        return end() < first ? end() : first + (end() - first) / lanes * lanes;
    }
};

// whole(i) for every whole vector of a piece, part(i, first, last) for those of which it has some lanes only: at most
// the first and the last. With `pairs`, pair(i) for two whole vectors side by side, as far as there are two.
template <class T, bool pairs, class Pair, class Whole, class Part>
KDDP_ALWAYS_INLINE inline void over_vectors(Piece piece, Pair pair, Whole whole, Part part) {
    const int64_t begin = piece.first_whole(lanes<T>), end = piece.last_whole(lanes<T>);
    for (int64_t i = begin > 0 ? 0 : end; i < piece.end(); i = i < end ? end : piece.end()) {
        const bool last = i == end;
        part(i, last ? int64_t(0) : piece.head, (last || piece.end() < begin ? piece.end() : begin) - i);
    }
    int64_t i = begin;
    if constexpr (pairs)
        for (; i + 2 * lanes<T> <= end; i += 2 * lanes<T>) pair(i);
    for (; i < end; i += lanes<T>) whole(i);
}

template <class T, class Whole, class Part>
KDDP_ALWAYS_INLINE inline void over_vectors(Piece piece, Whole whole, Part part) {
    over_vectors<T, false>(piece, [](int64_t) {}, whole, part);
}

}  // namespace
}  // namespace kddp
