// What is computed of each class of a row: its exponentials, their sums, its gradient.
//
// The references are the same for all threads that share a row, so that their sums can simply be added.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/loss_launch.cuh"

namespace kddp {

// What a row's exponentials take of its logits.
template <class T>
struct Tempering {
    T student_reference, teacher_reference;
    T student_to_exponent, teacher_to_exponent;  // log2(e) / T
    T student_to_nats, teacher_to_nats;          // 1 / T
};

template <class T>
__device__ __forceinline__ void set_nats(Tempering<T>& by, double student, double teacher) {
    by.student_to_nats = T(student), by.teacher_to_nats = T(teacher);
    by.student_to_exponent = T(student * log2_e), by.teacher_to_exponent = T(teacher * log2_e);
}

// Where every logit is -inf, their differences from a finite reference are so too, and the filling is below it.
template <class T>
__device__ __forceinline__ T reference_of(T highest) {
    return highest > lowest_number<T> / 2 ? highest : lowest_number<T> / 2;
}

template <class T>
struct ElementSums {
    T student = 0, teacher = 0, untempered = 0, dot = 0, student_moment = 0, other_moment = 0;
};

template <class T>
struct Element {
    T student, other;  // e^u, and e^v or the weight of the gradient's form
};

// x * y where x is not 0, and 0 where it is, whatever y is: 0 * log(0 / q) is 0.
template <class T>
__device__ __forceinline__ T product_or_zero(T x, T y) {
    return x == 0 ? T(0) : x * y;
}

// e^s from e^(s/T); `margin` is s less its reference.
template <class T>
__device__ __forceinline__ T untempered_of(ExpReuse exp_reuse, T tempered, T margin) {
    if (exp_reuse == ExpReuse::separate) return exp2_of(margin * T(log2_e));
    T power = tempered;
    if (exp_reuse >= ExpReuse::square) power *= power;
    if (exp_reuse >= ExpReuse::fourth) power *= power;
    return power;
}

// The exponentials of a class, added to the sums.
template <GradientForm form, class T>
__device__ __forceinline__ Element<T> add_element(const LossLaunch& launch, const Tempering<T>& by, T margin,
                                                  T teacher_margin, ElementSums<T>& sums) {
    Element<T> e{exp2_of(margin * by.student_to_exponent), T(0)};
    sums.student += e.student;
    if (launch.rule.with_teacher) {
        const T exp_teacher = exp2_of(teacher_margin * by.teacher_to_exponent);
        sums.teacher += exp_teacher;
        e.other = exp_teacher;
        const bool moments = launch.rule.standardize;
        const T apart = moments ? teacher_margin * by.teacher_to_nats - margin * by.student_to_nats
                                : (teacher_margin - margin) * by.student_to_nats;
        if constexpr (form == GradientForm::difference) {
            sums.dot += product_or_zero(exp_teacher, apart);
            if (moments) sums.other_moment += product_or_zero(exp_teacher, margin);
        } else if (launch.rule.divergence == Divergence::reverse_kl) {
            const T weight = e.student == 0 ? T(0) : -apart;
            sums.dot += e.student * weight;
            if (moments) sums.other_moment += product_or_zero(e.student, weight * margin);
            // An infinite one leaves its row without a gradient: times 0 it has to be 0.
            e.other = weight > -lowest_number<T> ? -lowest_number<T> : weight;
        }
        if (moments) sums.student_moment += product_or_zero(e.student, margin);
    }
    if (launch.exp_reuse != ExpReuse::absent) sums.untempered += untempered_of(launch.exp_reuse, e.student, margin);
    return e;
}

// What jsd's second round needs of the whole row. Its probabilities are those of the row times the student's sum: one
// factor less to be kept.
template <class T>
struct MixtureScale {
    T teacher_factor;      // the student's sum over the teacher's
    T log_teacher_factor;  // log2
    T teacher_share;       // beta
};

template <class T>
__device__ __forceinline__ MixtureScale<T> mixture_scale(const LossLaunch& launch, double student, double teacher) {
    const T factor = T(student / teacher);
    // Of the factor as it is rounded: what is off alike in all classes would not average out.
    return {factor, T(log2(double(factor))), T(launch.rule.jsd_beta)};
}

template <class T>
struct MixtureElementSums {
    T kl_teacher = 0, kl_student = 0, weighted_moment = 0;
};

// Of a class in jsd's second round. All comes of log(p / q): where p and q nearly agree, a logarithm of m would leave
// but its rounding. With the smaller over the larger nothing overflows.
template <class T>
__device__ __forceinline__ Element<T> mix_element(const MixtureScale<T>& scale, const Tempering<T>& by, T margin,
                                                  T teacher_margin, MixtureElementSums<T>& sums) {
    const T log_ratio = difference_of_products(teacher_margin, by.teacher_to_exponent, margin, by.student_to_exponent) +
                        scale.log_teacher_factor;  // log2(p / q)
    const T p = exp2_of(teacher_margin * by.teacher_to_exponent) * scale.teacher_factor;
    const T q = exp2_of(margin * by.student_to_exponent);
    const bool teacher_larger = p > q;
    const T of_larger = teacher_larger ? scale.teacher_share : 1 - scale.teacher_share;
    const T smaller_over_larger = quotient_of(teacher_larger ? q : p, teacher_larger ? p : q);
    const T log_mixture = log2_of(of_larger + (1 - of_larger) * smaller_over_larger);  // over the larger
    const T weight = q == 0 ? T(0) : (teacher_larger ? log_ratio + log_mixture : log_mixture) * T(-ln_2);
    const T teacher_ratio = teacher_larger ? -log_mixture : log_ratio - log_mixture;
    sums.kl_student += q * weight;
    sums.kl_teacher += product_or_zero(p, teacher_ratio);
    sums.weighted_moment += product_or_zero(q, margin) * weight;
    return {q, weight};
}

// The coefficients of RowGradient in the type computed in, and which of its parts there are.
template <class T>
struct GradientScale {
    T first, second, untempered, constant, label, projection;
    T reference_less_mean;  // of the student's logits
};

template <class T>
__device__ __forceinline__ GradientScale<T> gradient_scale(const RowGradient& of, double reference, double mean) {
    return {T(of.first), T(of.second),     T(of.untempered),   T(of.constant),
            T(of.label), T(of.projection), T(reference - mean)};
}

// d loss / d s. A term of weight 0 has no gradient, not 0 times one that may be infinite.
template <GradientForm form, class T>
__device__ __forceinline__ T gradient_of(const LossLaunch& launch, const GradientScale<T>& scale, Element<T> e,
                                         T margin) {
    T gradient = 0;
    if (launch.rule.with_teacher && launch.alpha != 0) {
        gradient = divergence_gradient<form>(e.student, e.other, scale.first, scale.second);
        if (launch.rule.standardize) gradient -= scale.projection * (margin + scale.reference_less_mean);
    }
    if (launch.rule.with_labels && launch.alpha != 1)
        gradient += scale.untempered * untempered_of(launch.exp_reuse, e.student, margin) - scale.constant;
    return gradient;
}

// What a label tells to do with its row.
enum class RowKind : int { absent, computed, ignored, mislabelled };

// `kept`: the label in shared memory, or none.
__device__ __forceinline__ RowKind kind_of(const LossLaunch& launch, int64_t row, const int64_t* kept, int64_t& label) {
    label = -1;
    if (row >= launch.rows) return RowKind::absent;
    if (!launch.labels) return RowKind::computed;
    label = kept ? SharedArray<const int64_t>{kept}.load(0) : load_global(launch.labels + row);
    if (label == launch.ignore_index) return RowKind::ignored;
    return label < 0 || label >= launch.classes ? RowKind::mislabelled : RowKind::computed;
}

}  // namespace kddp
