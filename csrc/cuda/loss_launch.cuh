// One launch of the fused loss: its argument, what all blocks do together, and how it ends.
//
// A block lives for the whole launch. It takes rows of logits in turn, then units of activations, and leaves its sums
// in the workspace. The last block to finish adds up all sums in a fixed order.
#pragma once

#include "cuda/backend.h"
#include "cuda/reductions.cuh"
#include "row_math.h"

namespace kddp {

// A layer of activations, cut into units of work: rectangles of rows and columns, one warp each.
struct LayerLaunch {
    const char* data;
    char* gradient;
    double* statistics;
    double* partial;  // statistics of each row part, if there are several
    int64_t row_stride, columns;
    int64_t rows, unit_rows, unit_columns;
    int64_t first_unit;  // of the launch
    double l1_weight, samples, scale;
    ElementType type;
    int row_parts, column_parts;
    int first_counter;
    int aligned;  // a thread may load in one access: 16 bytes, or with statistics the columns that it sums
};

// The highest logit and the highest soft label, each with the first class that has it.
struct Predictions {
    double logit, logit_class, label, label_class;
};

constexpr int layers_per_launch = 20;

// What decides the arithmetic of a class.
struct CallTraits {
    bool with_teacher, with_labels, with_targets, standardize;
    bool weighs_kd, weighs_ce;  // alpha is not 0, or not 1
    bool same_type;             // the logits of both sides have one type
    bool reuses_exponentials;   // e^s is a power of e^(s/T), see ExpReuse
    Divergence divergence;

    bool operator==(const CallTraits& other) const {
        return with_teacher == other.with_teacher && with_labels == other.with_labels &&
               with_targets == other.with_targets && standardize == other.standardize && weighs_kd == other.weighs_kd &&
               weighs_ce == other.weighs_ce && same_type == other.same_type &&
               reuses_exponentials == other.reuses_exponentials && divergence == other.divergence;
    }
};

KDDP_INLINE CallTraits traits_of(const RowParams& call) {
    return {call.with_teacher,
            call.with_labels,
            call.with_targets,
            call.standardize,
            call.alpha != 0,
            call.alpha != 1,
            call.teacher.type == call.student.type,
            call.exp_reuse != ExpReuse::absent && call.exp_reuse != ExpReuse::separate,
            call.divergence};
}

// The calls of most training steps. They have kernels for which these are constants.
constexpr CallTraits usual_call{true, true, false, false, true, true, true, true, Divergence::forward_kl};

// A call, and what the host has planned for one of its launches. Without rows, the student is absent.
struct LossLaunch : RowParams {
    int slice_classes, slices;       // blocks that share a row take a slice each
    unsigned row_groups;             // blocks, or groups of blocks that share a row, that take rows in turn
    int side_vectors, team_vectors;  // of 16 bytes, in shared memory
    int64_t student_elements, teacher_elements, soft_label_elements;  // from the first of the matrix to behind its last
    double inverse_temperature;
    LayerLaunch layers[layers_per_launch];
    int layer_count;
    int64_t units;
    RowTerms* block_terms;
    double* unit_sums;
    double* carried;        // l1 and its weighted sum, from earlier launches of the call
    bool carries, is_last;  // whether there were any, and whether this launch is the call's last
    char* slices_workspace;
    const double* label_counts;  // of labels that are not ignored, in parts
    int label_count_parts;       // 0: the rows are not counted by their labels
    int cached_labels;           // of a block's first rows, in shared memory
    unsigned* done_counter;
    unsigned* counters;  // of the statistics' row parts
    unsigned* slice_counters;
};

// What a kernel knows when it is compiled, or what the launch says.
template <class Types>
KDDP_DEVICE CallTraits traits_for(const LossLaunch& launch) {
    if constexpr (Types::is_usual) return usual_call;
    return traits_of(launch);
}

// Reloads `launch` through an opaque index so the compiler cannot keep derived values in registers.
KDDP_DEVICE const LossLaunch& opaque(const LossLaunch& launch) { return (&launch)[opaque_zero()]; }

constexpr int max_cached_labels = 64;

constexpr int front_counters = 8;  // done_counter, and what aligns the others
constexpr int slice_counter_count = 1024;
constexpr int part_counter_count = 3064;
constexpr int counter_count = front_counters + slice_counter_count + part_counter_count;  // all 0 before a call

// Rows whose label is not ignored.
KDDP_DEVICE double valid_rows(const LossLaunch& launch) {
    if (launch.label_count_parts == 0) return double(launch.rows);
    double count = 0;
    for (int i = 0; i < launch.label_count_parts; ++i) count += load_workspace(launch.label_counts + i);
    return count;
}

// Stores the number of valid rows and the labels of the block's first rows. Every thread may read them afterwards.
template <int teams>
KDDP_DEVICE void load_labels(const LossLaunch& launch, SharedArray<double> valid, SharedArray<int64_t> cache) {
    if (threadIdx.x == 0) valid.store(0, valid_rows(launch));
    for (int i = static_cast<int>(threadIdx.x); i < launch.cached_labels; i += static_cast<int>(blockDim.x)) {
        const int64_t row = (int64_t(blockIdx.x) + int64_t(i / teams) * gridDim.x) * teams + i % teams;
        if (row < launch.rows) cache.store(i, load_global(launch.labels + row));
    }
    __syncthreads();
}

// Whether this block is the last one of the launch to come here. All threads call it.
KDDP_DEVICE bool is_last_block(unsigned* counter) {
    KDDP_SHARED(unsigned, ticket, 1);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) ticket.store(0, atomicInc(counter, gridDim.x - 1));
    __syncthreads();
    const bool is_last = ticket.load(0) == gridDim.x - 1;
    if (is_last) __threadfence();
    return is_last;
}

template <class T>
KDDP_DEVICE void store_results(const LossLaunch& launch, double loss, const double* terms) {
    store_global(static_cast<T*>(launch.loss), T(loss));
    if (!launch.terms) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) store_global(static_cast<T*>(launch.terms) + i, T(terms[i]));
}

// Run by the last block: adds up the sums of all blocks and units. A term of weight 0 is left out.
KDDP_DEVICE void write_results(const LossLaunch& launch, SharedArray<double> scratch) {
    // Neighbouring threads read neighbouring numbers; a thread always reads the same of a block's three terms.
    const unsigned readers = blockDim.x / 3 * 3, which = threadIdx.x % 3;
    double term = 0;
    for (unsigned i = threadIdx.x; i < gridDim.x * 3 && threadIdx.x < readers; i += readers)
        term += load_workspace(&launch.block_terms[0].kd + i);
    const double kd = sum_of_block(which == 0 ? term : 0, scratch), ce = sum_of_block(which == 1 ? term : 0, scratch);
    const double correct = sum_of_block(which == 2 ? term : 0, scratch);
    double l1 = 0, weighted = 0;
    if (launch.carries) l1 = load_workspace(launch.carried), weighted = load_workspace(launch.carried + 1);
    for (int layer = 0; layer < launch.layer_count; ++layer) {
        const int64_t first = launch.layers[layer].first_unit;
        const int64_t end = layer + 1 < launch.layer_count ? launch.layers[layer + 1].first_unit : launch.units;
        double sum = 0;
        for (int64_t unit = first + threadIdx.x; unit < end; unit += blockDim.x)
            sum += load_workspace(launch.unit_sums + unit);
        sum = sum_of_block(sum, scratch) / launch.layers[layer].samples;
        l1 += sum;
        if (launch.layers[layer].l1_weight != 0) weighted += launch.layers[layer].l1_weight * sum;
    }
    if (threadIdx.x != 0) return;
    if (!launch.is_last) {
        store_global(launch.carried, l1), store_global(launch.carried + 1, weighted);
        return;
    }
    double loss = weighted;
    if (launch.alpha != 0) loss += launch.alpha * kd;
    if (launch.alpha != 1) loss += (1 - launch.alpha) * ce;
    const double terms[] = {kd, ce, l1, correct};
    if (launch.result_type == ElementType::float64)
        store_results<double>(launch, loss, terms);
    else
        store_results<float>(launch, loss, terms);
}

// Every block ends here. `terms` are the thread's own.
KDDP_DEVICE void finish_launch(const LossLaunch& launch, const RowTerms& terms) {
    KDDP_SHARED(double, scratch, 32);
    const double kd = sum_of_block(terms.kd, scratch), ce = sum_of_block(terms.ce, scratch);
    const double correct = sum_of_block(terms.correct, scratch);
    if (threadIdx.x < 3)
        store_global(&launch.block_terms[blockIdx.x].kd + threadIdx.x, threadIdx.x == 0   ? kd
                                                                       : threadIdx.x == 1 ? ce
                                                                                          : correct);
    if (is_last_block(launch.done_counter)) write_results(launch, scratch);
}

}  // namespace kddp
