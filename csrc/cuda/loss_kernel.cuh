// The kernel of the loss: its rows, its activations, its end. Teams of 8 lanes, a warp or a block cache their row in
// shared memory; rows that are too long for that are read twice by a block.
#pragma once

#include "cuda/activation_l1.cuh"
#include "cuda/row_team.cuh"

namespace kddp {

constexpr int warp_team_threads = 256;

// Of blocks whose rows are read twice. Two of them fit on a multiprocessor, so that one computes while the other waits:
// 80 registers for a thread of a usual call, 128 of another, 168 in double.
template <class Types>
constexpr int long_row_threads = Types::is_usual ? 384
                                 : Types::any    ? 192
                                                 : 256;

template <class Types, int lanes, bool cached>
constexpr int max_threads = lanes != whole_block ? warp_team_threads
                            : !cached            ? long_row_threads<Types>
                            : Types::any         ? 512
                                                 : 1024;

// 65536 registers are 64 for each of 1024 threads, half of what an A100 or H100 runs at once. Double arithmetic needs
// 128 registers for each of 512 threads.
template <class Types, int lanes, bool cached>
constexpr int min_blocks = !cached ? 2 : (Types::any ? 512 : 1024) / max_threads<Types, lanes, cached>;

template <class Types, int lanes, bool cached, GradientForm form>
__global__ void __launch_bounds__(max_threads<Types, lanes, cached>, min_blocks<Types, lanes, cached>)
    kd_l1_loss_by_rows(const __grid_constant__ LossLaunch launch) {
    using T = typename Types::T;
    constexpr int teams = lanes == whole_block ? 1 : warp_team_threads / lanes;
    constexpr int teams_per_warp = lanes < 32 ? 32 / lanes : 1;
    KDDP_SHARED(T, maxima, lanes == whole_block ? 2 * max_warps : 1);
    KDDP_SHARED(double, sums, lanes == whole_block ? max_sums * max_warps : 1);
    KDDP_SHARED(TeamRecord<T>, records, teams);
    static_assert(max_cached_labels % teams == 0, "the labels of whole batches are cached");
    KDDP_SHARED(int64_t, labels, max_cached_labels);
    KDDP_SHARED(double, valid, 1);
    if (launch.student.data) load_labels<teams>(launch, valid, labels);
    if (Team<lanes>::rank() == 0) {
        TeamRecord<T>& record = records.data[Team<lanes>::number()];
        record.terms = {0, 0, 0}, record.value_scale = 0;
    }
    if (launch.student.data) {
        const TeamScratch<T> scratch{maxima, sums, valid, records.data};
        Slices slices(launch);
        // All teams of a warp continue as long as one of them has a row.
#pragma unroll 1
        for (int turn = 0;; ++turn) {
            const LossLaunch& now = opaque(launch);
            const int team = Team<lanes>::number(), local_row = turn * teams + team;
            const int64_t batch = (cached ? opaque_block() : slices.group()) + int64_t(turn) * now.row_groups;
            const int64_t first = batch * teams + team / teams_per_warp * teams_per_warp;
            if (first >= now.rows) break;
            const bool label_is_cached = local_row < now.cached_labels;
            TeamRows<Types, lanes, cached, form>(now, scratch, slices)
                .run(first + team % teams_per_warp, label_is_cached ? labels.data + local_row : nullptr);
        }
    }
    run_activations(opaque(launch));
    const bool leads = Team<lanes>::rank() == 0;
    finish_launch(opaque(launch), leads ? records.data[Team<lanes>::number()].terms : RowTerms{0, 0, 0});
}

using LossKernel = void (*)(LossLaunch);

// The kernels for one type of the student's logits, by the rows that they serve. float64 has no small_teams.
struct LossKernels {
    LossKernel small_teams, warps, blocks, long_rows;
    int long_row_threads;
};

template <class Types, GradientForm form>
LossKernels kernels_of() {
    LossKernel small_teams = nullptr;
    if constexpr (!Types::any) small_teams = kd_l1_loss_by_rows<Types, 8, true, form>;
    return {small_teams, kd_l1_loss_by_rows<Types, 32, true, form>, kd_l1_loss_by_rows<Types, whole_block, true, form>,
            kd_l1_loss_by_rows<Types, whole_block, false, form>, long_row_threads<Types>};
}

// Defined by loss_kernels.cu for each type. That of float64 takes logits of any type and computes in double; it has no
// kernels of its own for usual calls.
template <ElementType type>
LossKernels loss_kernels(GradientForm form, bool is_usual);

}  // namespace kddp
