// A row that several blocks share. Each block leaves the sums of its slice in the workspace and then adds up all slices
// in order. The blocks of a row are neighbours, all blocks of the launch run at once, and they wait for one another.
// Each block has one row of the call, so no block writes a record that another one may still read.
#pragma once

#include "cuda/loss_launch.cuh"

namespace kddp {

struct SliceRecord {
    ChunkSums sums;
    double outranked;
    MixtureSums mixture;
    TargetSums targets;
    Predictions predictions;
};

class Slices {
  public:
    KDDP_DEVICE explicit Slices(const LossLaunch& launch) : launch_(launch) {}

    // Computed on every call: storing them would take registers that double arithmetic needs.
    KDDP_DEVICE int slice() const { return opaque_block() % launch_.slices; }
    KDDP_DEVICE int group() const { return opaque_block() / launch_.slices; }

    // `sums` are the slice's before and the row's after the call. Thread 0 gets `outranked`.
    KDDP_DEVICE void merge_sums(ChunkSums& sums, bool& outranked, double student_to_nats, double teacher_to_nats,
                                GradientForm form) {
        constexpr int numbers = sizeof(ChunkSums) / sizeof(double), references = 2;
        if (threadIdx.x == 0) {
            const double* from = &sums.student_reference;
            double* to = &record(slice())->sums.student_reference;
            for (int i = 0; i < numbers; ++i) store_global(to + i, from[i]);
            store_global(&record(slice())->outranked, outranked ? 1.0 : 0.0);
        }
        wait();
        if (threadIdx.x != 0) return;
        sums = {-HUGE_VAL, -HUGE_VAL, 0, 0, 0, 0, 0, 0, 0, 0};
        double outranked_slices = 0;
#pragma unroll 1
        for (int i = 0; i < launch_.slices; ++i) {
            const ChunkSums* other = &record(i)->sums;
            sums.student_reference = larger(sums.student_reference, load_workspace(&other->student_reference));
            sums.teacher_reference = larger(sums.teacher_reference, load_workspace(&other->teacher_reference));
            outranked_slices += load_workspace(&record(i)->outranked);
        }
#pragma unroll 1
        for (int i = 0; i < launch_.slices; ++i) {
            const double* from = &record(i)->sums.student_reference;
            ChunkSums other{};
            double* to = &other.student_reference;
            for (int k = 0; k < references; ++k) to[k] = load_workspace(from + k);
            const Rebase shift = rebase(other, sums, student_to_nats, teacher_to_nats, 1);
            for (int k = references; k < numbers; ++k) to[k] = load_workspace(from + k);
            merge(other, shift, form, sums);
        }
        outranked = outranked_slices != 0;
    }

    KDDP_DEVICE void merge_mixture(MixtureSums& sums) {
        if (threadIdx.x == 0) {
            MixtureSums* own = &record(slice())->mixture;
            store_global(&own->kl_teacher, sums.kl_teacher), store_global(&own->kl_student, sums.kl_student);
            store_global(&own->mean, sums.mean), store_global(&own->weighted_moment, sums.weighted_moment);
        }
        wait();
        if (threadIdx.x != 0) return;
        sums = {};
#pragma unroll 1
        for (int i = 0; i < launch_.slices; ++i) {
            const MixtureSums* other = &record(i)->mixture;
            sums.kl_teacher += load_workspace(&other->kl_teacher);
            sums.kl_student += load_workspace(&other->kl_student);
            sums.mean += load_workspace(&other->mean);
            sums.weighted_moment += load_workspace(&other->weighted_moment);
        }
    }

    KDDP_DEVICE void merge_targets(TargetSums& sums, Predictions& predictions) {
        if (threadIdx.x == 0) store(sums, &record(slice())->targets), store(predictions, &record(slice())->predictions);
        wait();
        if (threadIdx.x != 0) return;
#pragma unroll 1
        for (int i = 0; i < launch_.slices; ++i) {
            TargetSums of_slice;
            Predictions other;
            load(&record(i)->targets, of_slice), load(&record(i)->predictions, other);
            if (i == 0) sums = of_slice, predictions = other;
            if (i == 0) continue;
            kddp::merge_targets(of_slice, sums);
            if (other.logit > predictions.logit)
                predictions.logit = other.logit, predictions.logit_class = other.logit_class;
            if (other.label > predictions.label)
                predictions.label = other.label, predictions.label_class = other.label_class;
        }
    }

  private:
    // Structs of doubles.
    template <class Doubles>
    static KDDP_DEVICE void store(const Doubles& from, Doubles* to) {
        const double* numbers = reinterpret_cast<const double*>(&from);
        for (int i = 0; i < static_cast<int>(sizeof from / sizeof(double)); ++i)
            store_global(reinterpret_cast<double*>(to) + i, numbers[i]);
    }
    template <class Doubles>
    static KDDP_DEVICE void load(const Doubles* from, Doubles& to) {
        double* numbers = reinterpret_cast<double*>(&to);
        for (int i = 0; i < static_cast<int>(sizeof to / sizeof(double)); ++i)
            numbers[i] = load_workspace(reinterpret_cast<const double*>(from) + i);
    }

    KDDP_DEVICE SliceRecord* record(int slice) const {
        SliceRecord* records = reinterpret_cast<SliceRecord*>(launch_.slices_workspace);
        return records + group() * launch_.slices + slice;
    }

    KDDP_DEVICE void wait() {
        target_ += launch_.slices;
        __syncthreads();
        if (threadIdx.x == 0) {
            unsigned* counter = launch_.slice_counters + group();
            __threadfence();
            atomicAdd(counter, 1u);
            while (load_acquire(counter) < target_) back_off();
            __threadfence();
        }
        __syncthreads();
    }

    const LossLaunch& launch_;
    unsigned target_ = 0;
};

}  // namespace kddp
