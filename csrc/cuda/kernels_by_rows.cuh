// The kernels of the loss: rows of logits by teams that keep them, or that read them again.
#pragma once

#include "cuda/activation_l1.cuh"
#include "cuda/row_team.cuh"

namespace kddp {

constexpr int threads_of_warps = 256;

// Of rows that are read again, by the bytes of what is computed in.
constexpr int threads_of_long_rows(int64_t bytes) { return bytes == 4 ? 512 : 256; }

template <class T, int lanes, bool keeps>
constexpr int threads_at_most = lanes != whole_block ? threads_of_warps
                                : !keeps             ? threads_of_long_rows(sizeof(T))
                                : sizeof(T) == 4     ? 1024
                                                     : 512;

// Of 65536 registers, 64 go to each of 1024 threads: half of what an A100 or H100 can run at once. Rows that are read
// again have two reads to wait for and much to do in between, and doubles take two: 128 for each of 512, and where both
// come together whatever they need.
template <class T, int lanes, bool keeps>
constexpr int blocks_at_least = !keeps ? 1 : (sizeof(T) == 4 ? 1024 : 512) / threads_at_most<T, lanes, keeps>;

template <class Kinds, int lanes, bool keeps, GradientForm form>
__global__ void __launch_bounds__(threads_at_most<typename Kinds::T, lanes, keeps>,
                                  blocks_at_least<typename Kinds::T, lanes, keeps>)
    kd_l1_loss_by_rows(const __grid_constant__ LossLaunch launch) {
    using T = typename Kinds::T;
    constexpr int teams = lanes == whole_block ? 1 : threads_of_warps / lanes, of_warp = lanes < 32 ? 32 / lanes : 1;
    KDDP_SHARED(T, highest, lanes == whole_block ? 2 * most_warps : 1);
    KDDP_SHARED(double, sums, lanes == whole_block ? most_sums * most_warps : 1);
    KDDP_SHARED(TeamRecord, records, teams);
    static_assert(kept_labels % teams == 0, "labels are kept of whole batches");
    KDDP_SHARED(int64_t, labels, kept_labels);
    count_labels<teams>(launch, labels);
    if (Team<lanes>::rank() == 0) {
        TeamRecord& record = records.data[Team<lanes>::number()];
        record.terms = {0, 0, 0}, record.inverse_rows = 0;
    }
    if (launch.student.data) {
        const TeamScratch<T> scratch{highest, sums, records.data};
        Slices slices(launch);
        // All teams of a warp go on as long as one of them has a row.
#pragma unroll 1
        for (int turn = 0;; ++turn) {
            const LossLaunch& now = again(launch);
            const int team = Team<lanes>::number(), kept = turn * teams + team;
            const int64_t batch = (keeps ? block_of_grid() : slices.group()) + int64_t(turn) * now.row_groups;
            const int64_t first = batch * teams + team / of_warp * of_warp;
            if (first >= now.rows) break;
            if (lanes < 32 && Team<lanes>::rank() == 0) records.data[team].turn = turn;
            TeamRows<Kinds, lanes, keeps, form> rows(now, scratch, slices);
            rows(first + team % of_warp, now.slices == 1 && kept < kept_labels ? labels.data + kept : nullptr);
            if constexpr (lanes < 32) {  // where not one register is left for it
                __syncwarp();
                turn = records.data[Team<lanes>::number()].turn;
                __syncwarp();
            }
        }
    }
    run_activations(again(launch));
    const bool leads = Team<lanes>::rank() == 0;
    finish_launch(again(launch), leads ? records.data[Team<lanes>::number()].terms : RowTerms{0, 0, 0});
}

using LossKernel = void (*)(LossLaunch);

// The kernels of one type of the student's logits. What computes in double has no small_teams.
struct LossKernels {
    LossKernel small_teams, warps, blocks, long_rows;
};

template <class Kinds, GradientForm form>
LossKernels kernels_of() {
    LossKernel small_teams = nullptr;
    if constexpr (!Kinds::any) small_teams = kd_l1_loss_by_rows<Kinds, 8, true, form>;
    return {small_teams, kd_l1_loss_by_rows<Kinds, 32, true, form>, kd_l1_loss_by_rows<Kinds, whole_block, true, form>,
            kd_l1_loss_by_rows<Kinds, whole_block, false, form>};
}

template <class Kinds>
LossKernels kernels_of(GradientForm form) {
    return form == GradientForm::weighted ? kernels_of<Kinds, GradientForm::weighted>()
                                          : kernels_of<Kinds, GradientForm::difference>();
}

LossKernels float32_kernels(GradientForm form);
LossKernels bfloat16_kernels(GradientForm form);
LossKernels float16_kernels(GradientForm form);
LossKernels float64_kernels(GradientForm form);  // of any types, computed in double

}  // namespace kddp
