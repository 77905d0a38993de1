// How rows of logits are cut into pieces, and the memory that they are worked in.
#pragma once

#include "cpu/choose_steps.h"

namespace kddp {
namespace {

// Classes of a piece. A kept piece fits the first-level cache; of long rows larger ones cost fewer merges.
constexpr int64_t longest_piece = 4096;
constexpr int64_t piece_classes(int64_t classes) { return classes <= longest_kept_row ? 1024 : longest_piece; }

// From so many classes on, a row's places in the buffers follow the address of its gradient.
constexpr int64_t shortest_aligned_row = 256;

template <class T>
constexpr int64_t buffer_places(int64_t classes) {
    return classes <= longest_kept_row ? round_up_to_lanes<T>(classes + lanes<T>) : longest_piece;
}

struct RowTerms {
    double kd = 0, ce = 0, correct = 0;
};

// What a row's pieces leave for one another.
struct RowState {
    double student_to_nats, teacher_to_nats;  // 1 / T, of standardised logits also by the row's deviation
    Moments student;
    const ChunkSums* sums;  // of the row
    ChunkSums merged;       // where it has several pieces
    MixtureSums mixture;
    RowGradient gradient;
};

// Memory that a row is worked in.
template <class T>
struct RowScratch {
    RowBuffers<T> kept;    // buffer_places each
    RowBuffers<T> logits;  // a piece as read, where a step needs it again; has no `untempered`
    ChunkSums* sums;       // of each piece
    MixtureSums* mixture;  // likewise
};

}  // namespace
}  // namespace kddp
