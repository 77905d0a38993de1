// A row of logits by the team that works at it: from its label to its terms and gradient. Where a row has few
// companions and many classes, several blocks share it, each with a slice (row_slices.cuh).
#pragma once

#include "cuda/row_part.cuh"
#include "cuda/row_slices.cuh"
#include "cuda/rows_together.cuh"

namespace kddp {

// From the references of the row to those of a slice.
__device__ __forceinline__ void rebase_gradient(GradientForm form, TeamRecord& record) {
    ChunkSums slice{};
    slice.student_reference = record.by.student_reference, slice.teacher_reference = record.by.teacher_reference;
    const Rebase by = rebase(slice, record.sums, record.by.student_to_nats, record.by.teacher_to_nats);
    record.gradient.first *= by.student_factor;
    record.gradient.untempered *= by.untempered_factor;
    if (form == GradientForm::difference) record.gradient.second *= by.teacher_factor;
    if (form == GradientForm::weighted && record.gradient.first != 0)
        record.gradient.second += by.student_tempered - by.teacher_tempered;
}

// What a row's terms are made by.
template <GradientForm form>
__device__ __forceinline__ RowParams rule_of_row(const LossLaunch& launch, const TeamRecord& record) {
    RowParams rule = launch.rule;
    const bool mixes = rule.divergence == Divergence::jsd, leaves_out = rule.divergence == Divergence::dkd;
    rule.divergence = form == GradientForm::weighted ? (mixes ? Divergence::jsd : Divergence::reverse_kl)
                                                     : (leaves_out ? Divergence::dkd : Divergence::forward_kl);
    rule.value_scale = record.inverse_rows;
    rule.gradient_scale = launch.scaled_gradients ? record.inverse_rows * launch.row_count : record.inverse_rows;
    return rule;
}

// A row's terms and the coefficients of its gradient, by one thread of the team, which keeps nothing in registers from
// one part to the next.
template <GradientForm form>
__device__ __forceinline__ void finish_record(const LossLaunch& launch, TeamRecord& record) {
    if (record.inverse_rows == 0) record.inverse_rows = 1 / valid_rows(launch);
    const double kd = finish_divergence(rule_of_row<form>(again(launch), record), record.sums, record.mixture,
                                        record.student, record.target, record.label_logit, record.gradient);
    if (record.counts) record.terms.kd += kd;
    forget_memory();
    const double ce = finish_cross_entropy(rule_of_row<form>(again(launch), record), record.sums, record.label_logit,
                                           record.gradient);
    if (record.counts) record.terms.ce += ce, record.terms.correct += record.beaten ? 0 : 1;
    forget_memory();
    if (record.sliced) rebase_gradient(form, record);
}

template <class Kinds, int lanes, bool keeps, GradientForm form>
class TeamRows {
    using Part = RowPart<Kinds, lanes, keeps, form>;
    using Together = RowsTogether<Kinds, lanes>;
    using T = typename Kinds::T;

  public:
    __device__ __forceinline__ TeamRows(const LossLaunch& launch, const TeamScratch<T>& scratch, Slices& slices)
        : launch_(launch), scratch_(scratch), slices_(slices) {}

    // Adds the terms of one row to the team's record; its gradient is written on the way. All threads of a warp come
    // here together. `kept_label`: the row's, in shared memory, or none.
    __device__ __forceinline__ void operator()(int64_t row, const int64_t* kept_label) {
        int64_t label;
        const RowKind kind = kind_of(launch_, row, kept_label, label);
        const bool computed = kind == RowKind::computed;
        if (lanes < 32 && Part::rank() == 0) own_record().place = row;
        if (!computed) write_constant(row, kind);
        if (lanes >= 32 ? computed : __any_sync(all_lanes, computed)) {
            read(row, computed, computed ? label : -1);
            compute();
            if (launch_.gradient) write();
        }
        if constexpr (lanes < 32)
            if (Together::serves(launch_) && launch_.gradient) write_together();
        if constexpr (!keeps) slices_.next_row();
    }

  private:
    __device__ __forceinline__ int slice() const { return keeps ? 0 : slices_.slice(); }
    __device__ __forceinline__ bool is_sliced() const { return !keeps && launch_.slices > 1; }
    __device__ __forceinline__ int64_t start() const { return slice() * int64_t(launch_.classes_of_slice); }

    __device__ __forceinline__ TeamRecord& own_record() const { return scratch_.records[Team<lanes>::number()]; }

    // Where the team keeps its row.
    __device__ __forceinline__ SharedArray<uint4> own_memory(const LossLaunch& launch) const {
        if constexpr (!keeps) return {nullptr};
        KDDP_DYNAMIC_SHARED(uint4, memory);
        return {memory.data + Team<lanes>::number() * launch.vectors_of_team};
    }

    // What the record says. Each step begins with it: what a thread would keep from one to the next takes registers
    // that doubles need.
    __device__ __forceinline__ Part part_of_record() const {
        const LossLaunch& launch = again(launch_);
        const TeamRecord& record = own_record();
        Part part(launch, scratch_, own_memory(launch), launch.vectors_of_side);
        part.locate(record.row, start(), record.count, record.label);
        return part;
    }

    __device__ __forceinline__ void read(int64_t row, bool computed, int64_t label) {
        const int64_t left = launch_.classes - start();
        const int count = left > launch_.classes_of_slice ? launch_.classes_of_slice : static_cast<int>(left);
        Team<lanes>::wait();
        if (Part::rank() == 0) {
            TeamRecord& record = own_record();
            record.row = computed ? row : 0, record.label = label, record.count = computed ? count : 0;
            record.computed = computed, record.student = Moments{};
        }
        if constexpr (keeps) {
            if (Together::serves(launch_)) {
                Together(launch_, own_memory(launch_), row).read(__ballot_sync(all_lanes, computed));
            } else {
                Part part(launch_, scratch_, own_memory(launch_), launch_.vectors_of_side);
                part.locate(computed ? row : 0, 0, computed ? count : 0, label);
                part.begin();
            }
        }
        Team<lanes>::wait();
    }

    __device__ __forceinline__ void compute() {
        TeamRecord& record = own_record();
        const bool leads = Part::rank() == 0;
        Part part = part_of_record();
        Tempering<T> by;
        set_nats(by, launch_.inverse_temperature, launch_.inverse_temperature);
        const double logits = take_totals(part, by);
        T student_logit = 0;
        if (record.label >= 0) student_logit = part.student_at_label(record.row, record.label);
        if (leads) record.label_logit = double(student_logit), record.target = {0, 0};
        if (part.leaves_label_out()) {
            if (leads && record.label >= 0)
                record.target.teacher = double(part.teacher_at_label(record.row, record.label));
            Team<lanes>::wait();
            part.leave_label_out();
        }
        part.find_references(by);
        sum_up(part, by, student_logit, logits);
        if (leads)
            record.by = {double(by.student_reference),   double(by.teacher_reference), double(by.student_to_exponent),
                         double(by.teacher_to_exponent), double(by.student_to_nats),   double(by.teacher_to_nats)};
        if (part.mixes()) mix(part, by);
        if (leads) {
            record.target = {(record.label_logit - record.sums.student_reference) * record.by.student_to_nats,
                             (record.target.teacher - record.sums.teacher_reference) * record.by.teacher_to_nats};
            record.sliced = is_sliced() && !part.mixes(), record.counts = record.computed && slice() == 0;
            finish_record<form>(again(launch_), record);
        }
    }

    // The sums of the row, in the record.
    __device__ __forceinline__ void sum_up(Part& part, Tempering<T>& by, T student_logit, double logits) {
        TeamRecord& record = own_record();
        double sums[7];
        T highest;
        part.sum_up(by, student_logit, sums, highest);
        const auto& [student, teacher, student_moment, other_moment, dot, untempered, beaten] = sums;
        if (Part::rank() == 0) {
            record.sums = {double(by.student_reference),
                           double(by.teacher_reference),
                           double(highest),
                           student,
                           teacher,
                           untempered,
                           dot,
                           logits,
                           student_moment,
                           other_moment};
            // Not a number is not the highest.
            record.beaten = beaten != 0 || student_logit != student_logit || record.label < 0;
        }
        if constexpr (!keeps)
            if (is_sliced())
                slices_.merge_sums(record.sums, record.beaten, by.student_to_nats, by.teacher_to_nats, form);
    }

    __device__ __forceinline__ void write() {
        Team<lanes>::wait();
        const TeamRecord& record = own_record();
        if (lanes >= 32 && !record.computed) return;  // in smaller teams it has no classes
        Part part = part_of_record();
        if (!keeps && part.leaves_label_out()) part.leave_label_out();
        const Tempering<T> by{T(record.by.student_reference),   T(record.by.teacher_reference),
                              T(record.by.student_to_exponent), T(record.by.teacher_to_exponent),
                              T(record.by.student_to_nats),     T(record.by.teacher_to_nats)};
        MixtureScale<T> mixture{};
        if (!keeps && part.mixes()) mixture = mixture_scale<T>(launch_, record.sums.student, record.sums.teacher);
        const GradientScale<T> scale =
            gradient_scale<T>(record.gradient, record.by.student_reference, record.student.mean);
        part.write(by, scale, mixture, T(record.label_logit) - by.student_reference, gradient_row(record.row, start()));
    }

    // The sum of the student's logits, where it is wanted, and both sides' moments, which standardised logits are
    // tempered by. In double: float does not hold the square of 1e20. The mean is taken around a logit, so that equal
    // ones have a deviation of 0, not of a rounding.
    __device__ __forceinline__ double take_totals(Part& part, Tempering<T>& by) {
        using Total = typename Part::Total;
        const bool standardizes = launch_.rule.with_teacher && launch_.rule.standardize;
        const bool smooths = launch_.rule.label_smoothing != 0;
        if (!standardizes && !smooths) return 0;
        double logits = 0, first = 0, mean = 0, student_divisor = 1, count = part.count() > 0 ? part.count() : 1;
        // Once over the student's sum, then thrice over each side.
#pragma unroll 1
        for (int pass = smooths ? 0 : 1; pass < (standardizes ? 7 : 1); ++pass) {
            const int stage = pass == 0 ? 1 : (pass - 1) % 3;
            const double total = part.total(pass <= 3,
                                            stage == 0   ? Total::first
                                            : stage == 1 ? Total::sum
                                                         : Total::squares,
                                            pass == 0 || stage == 0 ? 0.0
                                            : stage == 1            ? first
                                                                    : mean);
            if (pass == 0) logits = total;
            if (pass == 0) continue;
            if (stage == 0) first = total;
            if (stage == 1) mean = first + total / count;
            if (stage != 2) continue;
            double of_row = count, mean_of_row = mean, squares = total;
            if constexpr (!keeps)
                if (is_sliced()) slices_.merge_moments(of_row, mean_of_row, squares);
            const double classes = launch_.rule.classes;
            const Moments moments{mean_of_row, classes > 1 ? sqrt(squares / (classes - 1)) : 0};
            if (pass == 3) student_divisor = divisor_of(moments);
            if (pass == 3 && Part::rank() == 0) own_record().student = moments;
            if (pass != 6) continue;
            const double inverse = launch_.inverse_temperature;
            set_nats(by, inverse / student_divisor, inverse / divisor_of(moments));
        }
        return logits;
    }

    // jsd's second round, around the references of the row.
    __device__ __forceinline__ void mix(Part& part, Tempering<T>& by) {
        TeamRecord& record = own_record();
        Team<lanes>::wait();
        by.student_reference = T(record.sums.student_reference),
        by.teacher_reference = T(record.sums.teacher_reference);
        const MixtureScale<T> scale = mixture_scale<T>(launch_, record.sums.student, record.sums.teacher);
        const MixtureSums of_part = part.mix(by, scale);
        if (Part::rank() == 0) {
            record.by.student_reference = record.sums.student_reference;
            record.by.teacher_reference = record.sums.teacher_reference;
            const double of_row = 1 / record.sums.student;
            record.mixture = {of_part.kl_teacher * of_row, of_part.kl_student * of_row,
                              of_part.weighted_moment * of_row};
        }
        if constexpr (!keeps)
            if (is_sliced()) slices_.merge_mixture(record.mixture);
    }

    __device__ __forceinline__ void write_together() const {
        const LossLaunch& launch = again(launch_);
        __syncwarp();
        Together(launch, own_memory(launch), own_record().place).write();
        __syncwarp();
    }

    __device__ __forceinline__ char* gradient_row(int64_t row, int64_t start) const {
        return launch_.gradient + (row * launch_.classes + start) * size_of(launch_.student.type);
    }

    // An ignored row has a gradient of 0; one whose label is none of its classes is not a number.
    __device__ __forceinline__ void write_constant(int64_t row, RowKind kind) {
        if (kind == RowKind::absent || slice() != 0) return;
        const T value = kind == RowKind::ignored ? T(0) : T(NAN);
        if (Together::serves(launch_))
            Together(launch_, own_memory(launch_), row).fill(value);
        else if (launch_.gradient)
            Part(launch_, scratch_, {nullptr}, 0)
                .write_constant(value, gradient_row(row, 0), static_cast<int>(launch_.classes));
        if (Part::rank() == 0) own_record().terms.kd += double(value), own_record().terms.ce += double(value);
    }

    const LossLaunch& launch_;
    const TeamScratch<T>& scratch_;
    Slices& slices_;
};

}  // namespace kddp
