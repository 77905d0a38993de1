// A row that several blocks share: what each has summed of its slice goes through the workspace, and each adds up all
// of them in order. The blocks of a row are neighbours, all of the launch run at once, and they wait for one another.
#pragma once

#include "cuda/loss_launch.cuh"

namespace kddp {

struct SliceRecord {
    ChunkSums sums;
    double beaten;
    MixtureSums mixture;
    double moments[2][3];  // count, mean, squares
};

class Slices {
  public:
    __device__ __forceinline__ explicit Slices(const LossLaunch& launch) : launch_(launch) {}

    // Worked out each time: to keep it would take registers that doubles need.
    __device__ __forceinline__ int slice() const { return block_of_grid() % launch_.slices; }
    __device__ __forceinline__ int group() const { return block_of_grid() / launch_.slices; }

    // By every thread, in the order of the slices (Chan, Golub, LeVeque 1979).
    __device__ __forceinline__ void merge_moments(double& count, double& mean, double& squares) {
        if (threadIdx.x == 0) {
            double* own = record(slice())->moments[side_];
            store_global(own, count), store_global(own + 1, mean), store_global(own + 2, squares);
        }
        wait();
        count = mean = squares = 0;
#pragma unroll 1
        for (int i = 0; i < launch_.slices; ++i) {
            const double* other = record(i)->moments[side_];
            const double number = load_workspace(other), total = count + number;
            const double apart = load_workspace(other + 1) - mean;
            mean = count == 0 ? load_workspace(other + 1) : mean + apart * number / total;
            squares += load_workspace(other + 2) + (count == 0 ? 0 : apart * apart * count * number / total);
            count = total;
        }
        side_ ^= 1;
    }

    // `sums` are the block's own, of a slice before and of the row after; `beaten` is thread 0's.
    __device__ __forceinline__ void merge_sums(ChunkSums& sums, bool& beaten, double student_to_nats,
                                               double teacher_to_nats, GradientForm form) {
        constexpr int numbers = sizeof(ChunkSums) / sizeof(double), references = 2;
        if (threadIdx.x == 0) {
            const double* from = &sums.student_reference;
            double* to = &record(slice())->sums.student_reference;
            for (int i = 0; i < numbers; ++i) store_global(to + i, from[i]);
            store_global(&record(slice())->beaten, beaten ? 1.0 : 0.0);
        }
        wait();
        if (threadIdx.x != 0) return;
        sums = {-HUGE_VAL, -HUGE_VAL, -HUGE_VAL, 0, 0, 0, 0, 0, 0, 0};
        double all_beaten = 0;
#pragma unroll 1
        for (int i = 0; i < launch_.slices; ++i) {
            const ChunkSums* other = &record(i)->sums;
            sums.student_reference = larger(sums.student_reference, load_workspace(&other->student_reference));
            sums.teacher_reference = larger(sums.teacher_reference, load_workspace(&other->teacher_reference));
            sums.highest = larger(sums.highest, load_workspace(&other->highest));
            all_beaten += load_workspace(&record(i)->beaten);
        }
#pragma unroll 1
        for (int i = 0; i < launch_.slices; ++i) {
            const double* from = &record(i)->sums.student_reference;
            ChunkSums other{};
            double* to = &other.student_reference;
            for (int k = 0; k < references; ++k) to[k] = load_workspace(from + k);
            const Rebase by = rebase(other, sums, student_to_nats, teacher_to_nats);
            for (int k = references; k < numbers; ++k) to[k] = load_workspace(from + k);
            merge(other, by, form, sums);
        }
        beaten = all_beaten != 0;
    }

    __device__ __forceinline__ void merge_mixture(MixtureSums& sums) {
        if (threadIdx.x == 0) {
            MixtureSums* own = &record(slice())->mixture;
            store_global(&own->kl_teacher, sums.kl_teacher), store_global(&own->kl_student, sums.kl_student);
            store_global(&own->weighted_moment, sums.weighted_moment);
        }
        wait();
        if (threadIdx.x != 0) return;
        sums = {};
#pragma unroll 1
        for (int i = 0; i < launch_.slices; ++i) {
            const MixtureSums* other = &record(i)->mixture;
            sums.kl_teacher += load_workspace(&other->kl_teacher),
                sums.kl_student += load_workspace(&other->kl_student);
            sums.weighted_moment += load_workspace(&other->weighted_moment);
        }
    }

    // A row's records are read while the next row's are written: there are two sets.
    __device__ __forceinline__ void next_row() { parity_ ^= 1; }

  private:
    __device__ __forceinline__ SliceRecord* record(int slice) const {
        SliceRecord* records = reinterpret_cast<SliceRecord*>(launch_.slices_workspace);
        return records + (group() * 2 + parity_) * launch_.slices + slice;
    }

    __device__ __forceinline__ void wait() {
        target_ += launch_.slices;
        __syncthreads();
        if (threadIdx.x == 0) {
            unsigned* counter = launch_.slice_counters + group();
            __threadfence();
            atomicAdd(counter, 1u);
            while (read_counter(counter) < target_) wait_a_little();
            __threadfence();
        }
        __syncthreads();
    }

    const LossLaunch& launch_;
    int parity_ = 0, side_ = 0;
    unsigned target_ = 0;
};

}  // namespace kddp
