// A row of logits and the team that works on it, from the label to the terms and the gradient. Where there are few rows
// of many classes, several blocks share a row and each takes a slice (row_slices.cuh).
#pragma once

#include "cuda/row_part.cuh"
#include "cuda/row_slices.cuh"

namespace kddp {

// Stores a row's kd (term 0) or ce (term 1).
KDDP_DEVICE void store_term(const LossLaunch& launch, int64_t row, int term, double value) {
    if (!launch.row_terms) return;
    const int64_t place = term * launch.rows + row;
    if (launch.result_type == ElementType::float64)
        store_global(static_cast<double*>(launch.row_terms) + place, value);
    else
        store_global(static_cast<float*>(launch.row_terms) + place, float(value));
}

template <class T>
KDDP_DEVICE void set_scales(const LossLaunch& launch, double valid_rows, TeamRecord<T>& record) {
    RowParams params = static_cast<const RowParams&>(launch);
    set_scales(params, valid_rows);
    record.value_scale = params.value_scale, record.gradient_scale = params.gradient_scale;
}

template <class Types, GradientForm form>
KDDP_DEVICE RowParams params_of_row(const LossLaunch& launch, const TeamRecord<typename Types::T>& record) {
    RowParams params = static_cast<const RowParams&>(launch);
    const CallTraits traits = traits_for<Types>(launch);
    params.with_teacher = traits.with_teacher, params.with_labels = traits.with_labels;
    params.with_targets = traits.with_targets, params.standardize = traits.standardize;
    const Divergence given = traits.divergence;
    if (form == GradientForm::weighted)
        params.divergence = has_second_pass(given) ? given : Divergence::reverse_kl;
    else
        params.divergence = given == Divergence::dkd ? given : Divergence::forward_kl;
    params.value_scale = 1;  // finish_record multiplies by it, because registers are scarce before
    params.gradient_scale = record.gradient_scale;
    return params;
}

// Computes a row's terms and the coefficients of its gradient. One thread of the team calls it, and keeps nothing in
// registers between the steps.
template <class Types, GradientForm form>
KDDP_DEVICE void finish_record(const LossLaunch& launch, SharedArray<double> valid_rows,
                               TeamRecord<typename Types::T>& record) {
    using F = std::conditional_t<Types::is_usual, typename Types::T, double>;
    // Before the first row is finished.
    if (record.value_scale == 0) set_scales(launch, valid_rows.load(0), record);
    compiler_barrier();
    const double kd = finish_divergence<F>(params_of_row<Types, form>(opaque(launch), record), record.sums,
                                           record.mixture, record.student, record.target, record.label_logit,
                                           weight_of(launch, record.row, 0), record.gradient) *
                      record.value_scale;
    if (record.counts) record.terms.kd += kd, store_term(opaque(launch), record.row, 0, kd);
    compiler_barrier();
    const double ce = finish_cross_entropy<F>(params_of_row<Types, form>(opaque(launch), record), record.sums,
                                              record.targets, record.student.unit, record.label_logit,
                                              weight_of(launch, record.row, 1), record.gradient) *
                      record.value_scale;
    if (record.counts) {
        record.terms.ce += ce, record.terms.correct += record.outranked ? 0 : 1;
        store_term(opaque(launch), record.row, 1, ce);
    }
    compiler_barrier();
    if (record.sliced) {
        ChunkSums slice{};
        slice.student_reference = record.scale.student_reference;
        slice.teacher_reference = record.scale.teacher_reference;
        const Rebase by = rebase(slice, record.sums, record.scale.student_to_nats, record.scale.teacher_to_nats, 1);
        rebase_gradient(params_of_row<Types, form>(opaque(launch), record), by, record.gradient);
    }
    compiler_barrier();
    record.of_threads =
        gradient_scale<typename Types::T>(record.gradient, record.scale.student_reference, record.student);
}

template <class Types, int lanes, bool cached, GradientForm form>
class TeamRows {
    using Part = RowPart<Types, lanes, cached, form>;
    using T = typename Types::T;

  public:
    KDDP_DEVICE TeamRows(const LossLaunch& launch, const TeamScratch<T>& scratch, Slices& slices)
        : launch_(launch), scratch_(scratch), slices_(slices) {}

    // Adds the terms of one row to the team's record and writes its gradient. All threads of a warp call this together.
    // `cached_label`: the row's label in shared memory, or null.
    KDDP_DEVICE void run(int64_t row, const int64_t* cached_label) {
        int64_t label;
        const RowKind kind = kind_of(launch_, row, cached_label, label);
        const bool computed = kind == RowKind::computed;
        if (!computed) write_constant(row, kind);
        if (lanes >= 32 ? computed : __any_sync(all_lanes, computed)) {
            compute(read(row, computed, computed ? label : -1));
            if (launch_.logits_gradient) write();
        }
    }

  private:
    KDDP_DEVICE int slice() const { return cached ? 0 : slices_.slice(); }
    KDDP_DEVICE bool is_sliced() const { return !cached && launch_.slices > 1; }
    KDDP_DEVICE int64_t start() const { return slice() * int64_t(launch_.slice_classes); }

    KDDP_DEVICE TeamRecord<T>& own_record() const { return scratch_.records[Team<lanes>::number()]; }

    // The team's row cache.
    KDDP_DEVICE SharedArray<uint4> own_memory(const LossLaunch& launch) const {
        if constexpr (!cached) return {nullptr};
        KDDP_DYNAMIC_SHARED(uint4, memory);
        return {memory.data + Team<lanes>::number() * launch.team_vectors};
    }

    // Every step starts from the record: values kept from one step to the next would take registers that double
    // arithmetic needs.
    KDDP_DEVICE Part part_of_record() const {
        const LossLaunch& launch = opaque(launch_);
        const TeamRecord<T>& record = own_record();
        Part part(launch, scratch_, own_memory(launch), launch.side_vectors);
        part.locate(record.row, start(), record.count, record.label);
        if (traits_for<Types>(launch).standardize) part.set_units(record.student.unit, record.teacher.unit);
        return part;
    }

    KDDP_DEVICE Highest<T> read(int64_t row, bool computed, int64_t label) {
        const int64_t left = launch_.classes - start();
        const int count = left > launch_.slice_classes ? launch_.slice_classes : static_cast<int>(left);
        Team<lanes>::sync();
        if (Part::rank() == 0) {
            TeamRecord<T>& record = own_record();
            record.row = computed ? row : 0, record.label = label, record.count = computed ? count : 0;
            record.computed = computed, record.student = record.teacher = Moments{};
        }
        Highest<T> highest;
        if constexpr (cached) {
            Part part(launch_, scratch_, own_memory(launch_), launch_.side_vectors);
            part.locate(computed ? row : 0, 0, computed ? count : 0, label);
            highest = part.load();
        }
        Team<lanes>::sync();
        return highest;
    }

    KDDP_DEVICE CallTraits traits() const { return traits_for<Types>(launch_); }

    KDDP_DEVICE void compute(const Highest<T>& highest) {
        TeamRecord<T>& record = own_record();
        const bool leads = Part::rank() == 0;
        Part part = part_of_record();
        LogitScale<T> scale;
        scale.set_nats(launch_.inverse_temperature, launch_.inverse_temperature);
        const double logits = compute_totals(part, scale);
        T student_logit = 0;
        if (record.label >= 0) student_logit = part.student_at_label(record.row, record.label);
        if (leads) record.label_logit = double(student_logit), record.target = {0, 0};
        if (part.excludes_label()) {
            if (leads && record.label >= 0)
                record.target.teacher = double(part.teacher_at_label(record.row, record.label));
            Team<lanes>::sync();
            part.exclude_label();
        }
        part.find_references(highest, scale);
        if (cached && traits().with_targets) compute_targets(part, scale.student_reference, student_logit);
        compute_sums(part, scale, student_logit, logits);
        if (leads) record.scale = scale;
        if (part.mixes()) compute_mixture(part, scale);
        if (leads) {
            const double student_to_nats = record.scale.student_to_nats, teacher_to_nats = record.scale.teacher_to_nats;
            record.target = {(record.label_logit - record.sums.student_reference) * student_to_nats,
                             (record.target.teacher - record.sums.teacher_reference) * teacher_to_nats};
            record.sliced = is_sliced() && !part.mixes(), record.counts = record.computed && slice() == 0;
            finish_record<Types, form>(opaque(launch_), scratch_.valid_rows, record);
        }
    }

    // Leaves the sums over the targets in the record, and whether the highest soft label is the prediction.
    KDDP_DEVICE void compute_targets(Part& part, T reference, T label_logit) {
        TeamRecord<T>& record = own_record();
        if (record.label >= 0) reference = larger(reference, label_logit);
        Predictions predictions;
        TargetSums sums = part.sum_targets(record.row, start(), reference, label_logit, predictions);
        predictions.logit_class += double(start()), predictions.label_class += double(start());
        if constexpr (!cached)
            if (is_sliced()) slices_.merge_targets(sums, predictions);
        if (Part::rank() != 0) return;
        if (record.label >= 0)
            add_label(launch_, double(label_logit),
                      double(load_global(static_cast<const T*>(launch_.class_weights) + record.label)), sums);
        record.targets = sums;
        if (launch_.soft_labels.data) record.outranked = predictions.logit_class != predictions.label_class;
    }

    // Leaves the sums of the row in the record.
    KDDP_DEVICE void compute_sums(Part& part, LogitScale<T>& scale, T student_logit, double logits) {
        TeamRecord<T>& record = own_record();
        double sums[7];
        part.sum(scale, student_logit, sums);
        if (!cached && traits().with_targets) {
            Team<lanes>::sync();
            compute_targets(part, scale.student_reference, student_logit);
        }
        const auto& [student, teacher, student_moment, other_moment, dot, untempered, outranked] = sums;
        if (Part::rank() == 0) {
            const double student_reference = scale.student_reference, teacher_reference = scale.teacher_reference;
            record.sums = {student_reference, teacher_reference, 0, student, teacher, untempered, dot, logits,
                           student_moment,    other_moment};
            // A label whose logit is NaN is not the top class.
            if (Types::is_usual || !launch_.soft_labels.data)  // NOLINTNEXTLINE(misc-redundant-expression)
                record.outranked = outranked != 0 || student_logit != student_logit || record.label < 0;
        }
        if constexpr (!cached)
            if (is_sliced())
                slices_.merge_sums(record.sums, record.outranked, scale.student_to_nats, scale.teacher_to_nats, form);
    }

    KDDP_DEVICE void write() {
        Team<lanes>::sync();
        const TeamRecord<T>& record = own_record();
        if (lanes >= 32 && !record.computed) return;  // in smaller teams such a row has no classes
        Part part = part_of_record();
        if (!cached && part.excludes_label()) part.exclude_label();
        const LogitScale<T> scale = record.scale;
        MixtureScale<T> mixture{};
        if (!cached && part.mixes()) mixture = mixture_scale<T>(launch_, record.sums);
        const GradientScale<T> gradient = record.of_threads;
        part.write(scale, gradient, mixture, T(record.label_logit) - scale.student_reference,
                   gradient_row(record.row, start()));
    }

    // Returns the sum of the student's logits if label smoothing needs it, and sets the scale of standardized logits.
    KDDP_DEVICE double compute_totals(Part& part, LogitScale<T>& scale) {
        TeamRecord<T>& record = own_record();
        double student_unit = 1, teacher_unit = 1;
#pragma unroll 1
        for (int side = 0; traits().standardize && side < 2; ++side) {
            const Moments moments = moments_of(part, side == 0);
            if (Part::rank() == 0) (side == 0 ? record.student : record.teacher) = moments;
        }
        if (traits().standardize) {
            Team<lanes>::sync();
            scale.set_nats(launch_.inverse_temperature / divisor_of(record.student),
                           launch_.inverse_temperature / divisor_of(record.teacher));
            student_unit = record.student.unit, teacher_unit = record.teacher.unit;
        }
        const double logits = launch_.label_smoothing != 0 ? part.total(true, Part::Total::sum, 0) / student_unit : 0;
        scale.unit = T(student_unit);
        part.set_units(student_unit, teacher_unit);
        part.rescale();
        if (traits().standardize) Team<lanes>::sync();  // every thread reads the label's logit
        return logits;
    }

    // Of one side's logits, in double: float cannot hold the square of 1e20. The mean is computed relative to a logit,
    // so that equal logits have a deviation of exactly 0.
    KDDP_DEVICE Moments moments_of(Part& part, bool of_student) {
        using Total = typename Part::Total;
        const double first = part.total(of_student, Total::first, 0), classes = double(launch_.classes);
        const double mean = first + part.total(of_student, Total::sum, first) / (part.count() > 0 ? classes : 1);
        const double squares = part.total(of_student, Total::squares, mean);
        return in_own_unit(mean, classes > 1 ? sqrt(squares / (classes - 1)) : 0);
    }

    // The second pass, relative to the references of the row.
    KDDP_DEVICE void compute_mixture(Part& part, LogitScale<T>& scale) {
        TeamRecord<T>& record = own_record();
        Team<lanes>::sync();
        scale.student_reference = T(record.sums.student_reference);
        scale.teacher_reference = T(record.sums.teacher_reference);
        const MixtureScale<T> mixture = mixture_scale<T>(launch_, record.sums);
        const MixtureSums sums = part.sum_mixture(scale, mixture);
        if (Part::rank() == 0) {
            record.scale = scale;
            const double inverse = 1 / record.sums.student;
            record.mixture = {sums.kl_teacher * inverse * ln_2, sums.kl_student * inverse, sums.mean * inverse,
                              sums.weighted_moment * inverse};
            // Without the rounding of the factor.
            if (mixture.symmetric)
                record.mixture.kl_teacher = sums.kl_teacher / (double(mixture.teacher_factor) * record.sums.teacher);
        }
        if constexpr (!cached)
            if (is_sliced()) slices_.merge_mixture(record.mixture);
    }

    KDDP_DEVICE char* gradient_row(int64_t row, int64_t start) const {
        return static_cast<char*>(launch_.logits_gradient) +
               (row * launch_.classes + start) * size_of(launch_.student.type);
    }

    // An ignored row has a gradient of 0; a row whose label is invalid has NaN.
    KDDP_DEVICE void write_constant(int64_t row, RowKind kind) {
        if (kind == RowKind::absent || slice() != 0) return;
        const T value = kind == RowKind::ignored ? T(0) : T(NAN);
        if (launch_.logits_gradient)
            Part(launch_, scratch_, {nullptr}, 0)
                .write_constant(value, gradient_row(row, 0), static_cast<int>(launch_.classes));
        if (Part::rank() != 0) return;
        own_record().terms.kd += double(value), own_record().terms.ce += double(value);
        if (kind == RowKind::invalid_label)
            store_term(launch_, row, 0, double(value)), store_term(launch_, row, 1, double(value));
    }

    const LossLaunch& launch_;
    const TeamScratch<T>& scratch_;
    Slices& slices_;
};

}  // namespace kddp
