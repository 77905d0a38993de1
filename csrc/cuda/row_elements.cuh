// What is computed for each class of a row: exponentials, their sums, and the gradient.
//
// All threads that share a row use the same references in the end, so their sums can be added.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/loss_launch.cuh"

namespace kddp {

// How a row's logits become exponents.
template <class T>
struct LogitScale {
    T student_reference, teacher_reference;
    T student_to_exponent, teacher_to_exponent;  // log2(e) / T
    T student_to_nats, teacher_to_nats;          // 1 / T
    T unit;                                      // of the student's logits, see Moments

    KDDP_DEVICE void set_nats(double student, double teacher) {
        student_to_nats = T(student), teacher_to_nats = T(teacher);
        student_to_exponent = T(student * log2_e), teacher_to_exponent = T(teacher * log2_e);
    }
};

// A finite reference: where every logit is -inf, their margins stay -inf. Padding is below it too.
template <class T>
KDDP_DEVICE T reference_of(T highest) {
    return highest > lowest_number<T> / 2 ? highest : lowest_number<T> / 2;
}

template <class T>
struct ElementSums {
    T student = 0, teacher = 0, untempered = 0, dot = 0, student_moment = 0, other_moment = 0;
};

template <class T>
struct Element {
    T student, other;  // e^u, and e^v or the weight of the weighted gradient form
};

// x * y, but 0 if x is 0, even if y is infinite: 0 * log(0 / q) is 0.
template <class T>
KDDP_DEVICE T product_or_zero(T x, T y) {
    return x == 0 ? T(0) : x * y;
}

// e^s from e^(s/T). `margin` is s minus its reference.
template <class Types, class T>
KDDP_DEVICE T untempered_of(const LossLaunch& launch, T tempered, T margin, T unit) {
    if (!Types::is_usual && launch.exp_reuse == ExpReuse::separate) return fast_exp2(margin * (unit * T(log2_e)));
    T power = tempered;
    if (launch.exp_reuse >= ExpReuse::square) power *= power;
    if (launch.exp_reuse >= ExpReuse::fourth) power *= power;
    return power;
}

// Computes the exponentials of a class and adds them to the sums.
template <class Types, GradientForm form, class T>
KDDP_DEVICE Element<T> add_element(const LossLaunch& launch, const LogitScale<T>& scale, T margin, T teacher_margin,
                                   ElementSums<T>& sums) {
    const CallTraits traits = traits_for<Types>(launch);
    Element<T> e{fast_exp2(margin * scale.student_to_exponent), T(0)};
    sums.student += e.student;
    if (traits.with_teacher) {
        const T exp_teacher = fast_exp2(teacher_margin * scale.teacher_to_exponent);
        sums.teacher += exp_teacher;
        e.other = exp_teacher;
        const bool moments = traits.standardize;
        const T delta = moments ? teacher_margin * scale.teacher_to_nats - margin * scale.student_to_nats
                                : (teacher_margin - margin) * scale.student_to_nats;
        if constexpr (form == GradientForm::difference) {
            sums.dot += product_or_zero(exp_teacher, delta);
            if (moments) sums.other_moment += product_or_zero(exp_teacher, margin);
        } else if (traits.divergence != Divergence::mixture) {
            const T weight = e.student == 0 ? T(0) : -delta;
            sums.dot += e.student * weight;
            if (moments) sums.other_moment += product_or_zero(e.student, weight * margin);
            // An infinite weight leaves its row without a gradient: made finite, it gives 0 when multiplied by 0.
            e.other = weight > -lowest_number<T> ? -lowest_number<T> : weight;
        }
        if (moments) sums.student_moment += product_or_zero(e.student, margin);
    }
    if (Types::is_usual || launch.exp_reuse != ExpReuse::absent)
        sums.untempered += untempered_of<Types>(launch, e.student, margin, scale.unit);
    return e;
}

// Converts a thread's sums to other references, as merge() in row_math.h does. A factor of 0 leaves out what may be
// infinite.
template <class Types, GradientForm form, class T>
KDDP_DEVICE void rebase_sums(const LossLaunch& launch, const LogitScale<T>& from, const LogitScale<T>& to,
                             ElementSums<T>& sums) {
    const CallTraits traits = traits_for<Types>(launch);
    const T shift = from.student_reference - to.student_reference, factor = fast_exp2(shift * to.student_to_exponent);
    const T moment = sums.student_moment + shift * sums.student;
    if (traits.with_teacher) {
        const T teacher_shift = from.teacher_reference - to.teacher_reference;
        const T teacher_factor = fast_exp2(teacher_shift * to.teacher_to_exponent);
        const T delta = shift * to.student_to_nats - teacher_shift * to.teacher_to_nats;
        if constexpr (form == GradientForm::difference) {
            sums.dot = product_or_zero(teacher_factor, sums.dot - delta * sums.teacher);
            sums.other_moment = product_or_zero(teacher_factor, sums.other_moment + shift * sums.teacher);
        } else {
            sums.other_moment = product_or_zero(factor, sums.other_moment + shift * sums.dot + delta * moment);
            sums.dot = product_or_zero(factor, sums.dot + delta * sums.student);
        }
        sums.teacher *= teacher_factor;
    }
    sums.student_moment = product_or_zero(factor, moment);
    sums.student *= factor;
    sums.untempered *= untempered_of<Types>(launch, factor, shift, to.unit);
}

// What a second pass needs of the whole row. Probabilities are multiplied by the student's sum, which saves keeping one
// factor.
template <class T>
struct MixtureScale {
    T teacher_factor;                                // the student's sum over the teacher's
    T log_teacher_factor;                            // log2
    T teacher_share;                                 // of the mixture
    T student_weight, student_slope, teacher_slope;  // see MixtureSlopes
    bool has_slopes, symmetric;
    T mean;            // symmetric_kl: of u - v
    bool has_reverse;  // symmetric_kl: whether that is finite
};

template <class T>
KDDP_DEVICE MixtureScale<T> mixture_scale(const LossLaunch& launch, const ChunkSums& row) {
    const T factor = T(row.student / row.teacher);
    const MixtureSlopes slopes = mixture_slopes(launch.mixture);
    const double mean = row.dot / row.student;
    const bool is_finite = mean - mean == 0;  // NOLINT(misc-redundant-expression)
    // The logarithm of the rounded factor: an error that is the same in all classes would not average out.
    return {factor,
            T(log2(double(factor))),
            T(launch.mixture.share),
            T(launch.mixture.student_weight),
            T(slopes.student),
            T(slopes.teacher),
            slopes.present,
            launch.divergence == Divergence::symmetric_kl,
            is_finite ? T(mean) : T(0),
            is_finite};
}

// A class in the second pass of symmetric_kl: `other` is x (see GradientForm).
template <class T>
KDDP_DEVICE Element<T> symmetrize_element(const MixtureScale<T>& mixture, const LogitScale<T>& scale, T margin,
                                          T teacher_margin, T p, T q, MixtureSumsOf<T>& sums) {
    const T delta = teacher_margin * scale.teacher_to_nats - margin * scale.student_to_nats;
    const T weight = -delta > -lowest_number<T> ? -lowest_number<T> : -delta;
    const T x = mixture.has_reverse ? p - product_or_zero(q, weight - mixture.mean) : p;
    sums.kl_teacher += product_or_zero(p, delta);
    sums.weighted_moment += product_or_zero(q - x, margin);
    return {q, x};
}

// A class in the second pass of a mixture: `other` is w. Everything is derived from log(p / q): log m cancels
// catastrophically when p ≈ q. Dividing the smaller by the larger cannot overflow.
template <class T>
KDDP_DEVICE Element<T> mix_element(const MixtureScale<T>& mixture, const LogitScale<T>& scale, T margin,
                                   T teacher_margin, MixtureSumsOf<T>& sums) {
    const T p = fast_exp2(teacher_margin * scale.teacher_to_exponent) * mixture.teacher_factor;
    const T q = fast_exp2(margin * scale.student_to_exponent);
    if (mixture.symmetric) return symmetrize_element(mixture, scale, margin, teacher_margin, p, q, sums);
    const T log_ratio =
        difference_of_products(teacher_margin, scale.teacher_to_exponent, margin, scale.student_to_exponent) +
        mixture.log_teacher_factor;  // log2(p / q)
    const bool teacher_larger = p > q;
    const T larger_share = teacher_larger ? mixture.teacher_share : 1 - mixture.teacher_share;
    const T smaller_over_larger = fast_divide(teacher_larger ? q : p, teacher_larger ? p : q);
    const T m_over_larger = larger_share + (1 - larger_share) * smaller_over_larger;
    const T log_mixture = log2_of(m_over_larger);
    T weight = q == 0 ? T(0) : (teacher_larger ? log_ratio + log_mixture : log_mixture) * T(-ln_2);
    const T teacher_ratio = teacher_larger ? -log_mixture : log_ratio - log_mixture;
    sums.kl_student += q * weight;
    sums.kl_teacher += product_or_zero(p, teacher_ratio);
    if (mixture.has_slopes && q != 0) {
        const T of_larger = teacher_larger ? mixture.teacher_slope : mixture.student_slope;
        const T of_smaller = teacher_larger ? mixture.student_slope : mixture.teacher_slope;
        weight =
            mixture.student_weight * weight - fast_divide(of_larger + of_smaller * smaller_over_larger, m_over_larger);
    }
    sums.mean += q * weight;
    sums.weighted_moment += product_or_zero(q, margin) * weight;
    return {q, weight};
}

template <class T>
struct GradientScale : RowGradientOf<T> {
    T reference_less_mean, unit;  // of the student's logits
};

template <class T>
KDDP_DEVICE GradientScale<T> gradient_scale(const RowGradient& row, double reference, const Moments& student) {
    return {{T(row.first), T(row.second), T(row.untempered), T(row.constant), T(row.label), T(row.projection),
             T(row.targets)},
            T(reference - student.mean),
            T(student.unit)};
}

// d loss / d s. A term of weight 0 has no gradient, rather than 0 times one that may be infinite.
template <class Types, GradientForm form, class T>
KDDP_DEVICE T gradient_of(const LossLaunch& launch, const GradientScale<T>& scale, Element<T> e, T margin) {
    const CallTraits traits = traits_for<Types>(launch);
    T gradient = 0;
    if (traits.with_teacher && traits.weighs_kd) {
        gradient = form == GradientForm::weighted && traits.divergence == Divergence::symmetric_kl
                       ? divergence_gradient<GradientForm::difference>(e.student, e.other, scale.first, scale.second)
                       : divergence_gradient<form>(e.student, e.other, scale.first, scale.second);
        if (traits.standardize) gradient -= scale.projection * (margin + scale.reference_less_mean);
    }
    if (traits.with_labels && traits.weighs_ce)
        gradient += scale.untempered * untempered_of<Types>(launch, e.student, margin, scale.unit) - scale.constant;
    return gradient;
}

// What the label says about its row. `absent`: there is no such row.
enum class RowKind : int { absent, computed, ignored, invalid_label };

// The weight of a row's kd (term 0) or ce (term 1).
KDDP_DEVICE double weight_of(const LossLaunch& launch, int64_t row, int term) {
    return launch.row_weights ? load_global(launch.row_weights + term * launch.rows + row) : 1;
}

// `cached`: the label in shared memory, or null.
KDDP_DEVICE RowKind kind_of(const LossLaunch& launch, int64_t row, const int64_t* cached, int64_t& label) {
    label = -1;
    if (row >= launch.rows) return RowKind::absent;
    if (launch.row_weights && weight_of(launch, row, 0) == 0 && weight_of(launch, row, 1) == 0) return RowKind::ignored;
    if (!launch.labels) return RowKind::computed;
    label = cached ? SharedArray<const int64_t>{cached}.load(0) : load_global(launch.labels + row);
    if (label == launch.ignore_index) return RowKind::ignored;
    return label < 0 || label >= launch.classes ? RowKind::invalid_label : RowKind::computed;
}

}  // namespace kddp
