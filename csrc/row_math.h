// The mathematics of one row of logits, shared by the CPU and CUDA backends.
//
// A row is processed in chunks. Each chunk subtracts its own references r_s and r_t, which are close to its highest
// logits, so one read of the chunk is enough. With u = (s - r_s) / T and v = (t - r_t) / T, a kernel computes the sums
// of ChunkSums; merge() rescales the sums of all chunks to the references of the row; finish_divergence() and
// finish_cross_entropy() turn the sums of the row into its loss terms and the coefficients of its gradient.
#pragma once

#include <cmath>

#include "kddp/kd_l1_loss.h"

namespace kddp {

#if defined(__CUDACC__)
#define KDDP_INLINE __host__ __device__ inline
#else
#define KDDP_INLINE static inline  // internal linkage: one copy for each instruction set (cpu/simd.h)
#endif

constexpr double log2_e = 1.44269504088896340736, ln_2 = 0.693147180559945309417;

static inline bool computes_in_double(const KdL1Loss& job) {
    return job.student.type == ElementType::float64 || (job.teacher.data && job.teacher.type == ElementType::float64);
}

static inline bool has_labels(const KdL1Loss& job) { return job.labels || job.soft_labels.data; }

// Whether every class has a factor of its own in the cross entropy, see TargetSums.
static inline bool has_targets(const KdL1Loss& job) {
    return job.soft_labels.data || (job.labels && job.class_weights);
}

// How the cross entropy gets e^s: e^(s/T) itself (T = 1), its square (T = 2), its fourth power (T = 4), or a separate
// exponential. `absent`: there are no labels.
enum class ExpReuse : int { absent, same, square, fourth, separate };

static inline ExpReuse choose_exp_reuse(const KdL1Loss& job) {
    if (!has_labels(job)) return ExpReuse::absent;
    if (job.standardize_logits && job.teacher.data) return ExpReuse::separate;
    if (job.temperature == 1) return ExpReuse::same;
    // Squaring costs too many of a double's digits. Without a teacher e^(s/T) has no other use.
    if (!job.teacher.data || computes_in_double(job)) return ExpReuse::separate;
    if (job.temperature == 2) return ExpReuse::square;
    return job.temperature == 4 ? ExpReuse::fourth : ExpReuse::separate;
}

// The two forms of a divergence's gradient, the label's own term excluded, with e_s = e^u and e_t = e^v:
//   difference: first e_s - second e_t        forward_kl, dkd
//   weighted:   first e_s (w + second)        reverse_kl with w = u - v, mixture with w as below
// `second` is minus the mean of w. Both can be huge, so w + second is computed before the product.
//
// symmetric_kl has the sums of the weighted form. Its second pass replaces w by x = p - q (w + second), times the sum
// of e_s, and its gradient is a difference: first e_s - second x.
enum class GradientForm { difference, weighted };

KDDP_INLINE constexpr GradientForm gradient_form(Divergence divergence) {
    return divergence == Divergence::forward_kl || divergence == Divergence::dkd ? GradientForm::difference
                                                                                 : GradientForm::weighted;
}

// Whether a second pass uses p and q of the whole row.
KDDP_INLINE constexpr bool has_second_pass(Divergence divergence) {
    return divergence == Divergence::mixture || divergence == Divergence::symmetric_kl;
}

// The derivative of a mixture with respect to q, up to a constant:
//   w = student_weight log(q / m) - (teacher_slope p + student_slope q) / m
// In the Jensen-Shannon divergence the slopes' term is constant. It is left out, and student_weight is left to `first`.
struct MixtureSlopes {
    bool present;
    double teacher, student;
};

KDDP_INLINE MixtureSlopes mixture_slopes(const Mixture& mixture) {
    const double share = mixture.share, rest = 1 - share;
    return {mixture.teacher_weight * rest != mixture.student_weight * share, mixture.teacher_weight * rest,
            mixture.student_weight * rest};
}

// A call, and what the formulas derive from it.
struct RowParams : KdL1Loss {
    bool with_teacher, with_labels, with_targets, standardize;
    ExpReuse exp_reuse;
    double target_share, target_constant;  // see TargetSums
    double value_scale;                    // what a row's terms are multiplied by
    double gradient_scale;                 // the same for the gradient, see scaled_gradients
};

KDDP_INLINE void set_scales(RowParams& params, double valid_rows) {
    const double divisor = params.normalizer > 0 ? params.normalizer : valid_rows > 0 ? valid_rows : 1;
    const double multiplier = params.normalizer > 0 ? params.normalizer : double(params.rows);
    params.value_scale = 1 / divisor;
    params.gradient_scale = params.scaled_gradients ? multiplier / divisor : params.value_scale;
}

// The caller sets both scales with set_scales, once it has counted the valid rows.
static inline RowParams row_params(const KdL1Loss& job) {
    const bool with_teacher = job.teacher.data;
    return {job,
            with_teacher,
            has_labels(job),
            has_targets(job),
            with_teacher && job.standardize_logits,
            choose_exp_reuse(job),
            job.soft_labels.data ? 1 - job.label_smoothing : 0,
            job.label_smoothing / double(job.classes),
            0,
            0};
}

// Mean and standard deviation of a row (with classes - 1 in the denominator, as torch.std), in multiples of `unit`, a
// power of two. Standardized logits whose deviation is huge are read in such multiples, because float could hold
// neither the coefficients of their gradient nor their sums. Everything of their row that is in logits is then in this
// unit.
struct Moments {
    double mean = 0, deviation = 0, unit = 1;
};

KDDP_INLINE Moments in_own_unit(double mean, double deviation) {
    if (!(deviation > 0x1p40)) return {mean, deviation, 1};
    const int exponent = std::ilogb(deviation);
    const double unit = std::ldexp(1.0, exponent < 124 ? exponent : 124);
    return {mean / unit, deviation / unit, unit};
}

// The divisor of standardized logits, with the epsilon of Sun et al. 2024.
KDDP_INLINE double divisor_of(Moments moments) { return moments.deviation + 1e-7 / moments.unit; }

struct ChunkSums {
    double student_reference, teacher_reference;
    double highest;                       // highest logit of the student; 0 on a GPU
    double student, teacher;              // sum e^u, sum e^v
    double untempered;                    // sum e^(s - r_s)
    double dot;                           // sum e^v (v - u), in the weighted form sum e^u (u - v)
    double logits;                        // sum s
    double student_moment, other_moment;  // sum e^u (s - r_s), sum (e^v or e^u w) (s - r_s)
};

// Sums over the targets of a chunk or a row. The target of class c is v_c = w_c (share z_c + constant), the factor of
// -log softmax(s)_c: `share` is 1 - label_smoothing, `constant` is label_smoothing / classes, and kddp/kd_l1_loss.h has
// w and z. With `labels` z is left out of the chunks, and add_label adds the label's share to the row.
struct TargetSums {
    double reference = 0;     // the highest logit, at least half of the lowest number
    double sum = 0, dot = 0;  // sum v, sum v (s - reference)
    double label = 0;         // of a row: the label's share of its target
};

// Adds the sums of a chunk to those of the chunks before.
KDDP_INLINE void merge_targets(const TargetSums& chunk, TargetSums& row) {
    if (chunk.reference > row.reference) {
        row.dot += (row.reference - chunk.reference) * row.sum;
        row.reference = chunk.reference;
    }
    row.sum += chunk.sum;
    row.dot += chunk.dot + (chunk.reference - row.reference) * chunk.sum;
}

KDDP_INLINE void add_label(const RowParams& params, double logit, double class_weight, TargetSums& row) {
    row.label = (1 - params.label_smoothing) * class_weight;
    row.sum += row.label;
    row.dot += row.label * (logit - row.reference);
}

// The sums of a second pass.
template <class T>
struct MixtureSumsOf {
    T kl_teacher = 0, kl_student = 0;  // KL(p || m), KL(q || m); symmetric_kl: sum p (v - u), unused
    T mean = 0;                        // sum q w; symmetric_kl: unused
    T weighted_moment = 0;             // sum q w (s - r_s); symmetric_kl: sum (q - x) (s - r_s)
};
using MixtureSums = MixtureSumsOf<double>;

// Differences between the references of a chunk and those of its row, and the factors that result from them.
struct Rebase {
    double student, teacher;                            // in logits
    double student_tempered = 0, teacher_tempered = 0;  // divided by the temperature
    double student_factor = 1, teacher_factor = 1, untempered_factor = 1;
};

KDDP_INLINE Rebase rebase(const ChunkSums& chunk, const ChunkSums& row, double inverse_student, double inverse_teacher,
                          double student_unit) {
    Rebase by{chunk.student_reference - row.student_reference, chunk.teacher_reference - row.teacher_reference};
    if (by.student != 0) {
        by.student_tempered = by.student * inverse_student;
        by.student_factor = std::exp(by.student_tempered);
        by.untempered_factor = std::exp(by.student * student_unit);
    }
    if (by.teacher != 0) {
        by.teacher_tempered = by.teacher * inverse_teacher;
        by.teacher_factor = std::exp(by.teacher_tempered);
    }
    return by;
}

// Adds the sums of a chunk to those of its row, whose references are set.
KDDP_INLINE void merge(const ChunkSums& chunk, const Rebase& by, GradientForm form, ChunkSums& row) {
    const double student = by.student_factor, teacher = by.teacher_factor;
    const double delta = by.student_tempered - by.teacher_tempered;
    row.student += student * chunk.student;
    row.teacher += teacher * chunk.teacher;
    row.untempered += by.untempered_factor * chunk.untempered;
    row.logits += chunk.logits;
    const double moment = chunk.student_moment + by.student * chunk.student;
    row.student_moment += student * moment;
    // The sums may be infinite where the factor is 0; the product must be 0 then.
    if (form == GradientForm::difference && teacher != 0) {
        row.dot += teacher * (chunk.dot - delta * chunk.teacher);
        row.other_moment += teacher * (chunk.other_moment + by.student * chunk.teacher);
    } else if (form == GradientForm::weighted && student != 0) {
        row.dot += student * (chunk.dot + delta * chunk.student);
        row.other_moment += student * (chunk.other_moment + by.student * chunk.dot + delta * moment);
    }
}

// Coefficients of the gradient of a row.
template <class T>
struct RowGradientOf {
    T first, second;  // see GradientForm
    T untempered;     // times e^(s - r_s)
    T constant;       // subtracted from every class
    T label;          // subtracted from the label's class
    T projection;     // times s - mean, subtracted: the path through the standard deviation of standardized logits
    T targets;        // times the target of each class, subtracted (see TargetSums)
};
using RowGradient = RowGradientOf<double>;

// The terms of a row, or sums of them. `correct`: whether the label is the prediction.
struct RowTerms {
    double kd, ce, correct;
};

// Converts the coefficients from the references of the row to those of a chunk. After a second pass, `second` has none.
KDDP_INLINE void rebase_gradient(const RowParams& params, const Rebase& by, RowGradient& gradient) {
    gradient.first *= by.student_factor;
    gradient.untempered *= by.untempered_factor;
    if (has_second_pass(params.divergence)) return;
    if (gradient_form(params.divergence) == GradientForm::difference)
        gradient.second *= by.teacher_factor;
    else if (gradient.first != 0)
        gradient.second += by.student_tempered - by.teacher_tempered;
}

// Clamps small negative values caused by rounding.
KDDP_INLINE double not_negative(double divergence) { return divergence < 0 ? 0 : divergence; }

// Quotients and logarithms of a row's sums. T is double, except for usual calls on a GPU (usual_call): in double each
// of them takes 10 to 40 instructions, which are slow there, and sums of floats are no more exact than a float.
template <class T>
KDDP_INLINE T quotient(double x, double y) {
    return T(x) / T(y);
}
template <class T>
KDDP_INLINE T log_of(double x) {
    return std::log(T(x));
}

// KL(p || q) of one row from dot and the normalizers of p and q.
template <class T = double>
KDDP_INLINE double kl_divergence(double dot, double sum_p, double sum_q) {
    return not_negative(quotient<T>(dot, sum_p) + std::log(quotient<T>(sum_q, sum_p)));
}

// Softmax over two classes whose logits differ by x = first - second: probabilities and their logarithms.
struct BinaryChoice {
    double first, second, log_first, log_second;
};

KDDP_INLINE BinaryChoice binary_choice(double x) {
    const double ratio = std::exp(x < 0 ? x : -x), log_total = std::log1p(ratio), likely = 1 / (1 + ratio);
    const bool is_first = x >= 0;
    const double unlikely = ratio * likely, log_unlikely = (is_first ? -x : x) - log_total;
    return {is_first ? likely : unlikely, is_first ? unlikely : likely, is_first ? -log_total : log_unlikely,
            is_first ? log_unlikely : -log_total};
}

// x log(x / y) from x and both logarithms; 0 if x is 0.
KDDP_INLINE double kl_term(double x, double log_x, double log_y) { return x == 0 ? 0 : x * (log_x - log_y); }

// dkd only, whose sums exclude the label: the label's logit minus the reference, divided by the temperature.
struct TargetMargins {
    double student, teacher;
};

// dkd of a row and its coefficients of the gradient. `scale` is alpha T / n.
KDDP_INLINE double decoupled(const RowParams& params, const ChunkSums& row, TargetMargins target, double scale,
                             RowGradient& gradient) {
    if (row.student == 0 && row.teacher == 0) {  // no other class has a probability, on either side
        gradient = {};
        return 0;
    }
    const BinaryChoice student = binary_choice(target.student - std::log(row.student));
    const BinaryChoice teacher = binary_choice(target.teacher - std::log(row.teacher));
    const double binary = kl_term(teacher.first, teacher.log_first, student.log_first) +
                          kl_term(teacher.second, teacher.log_second, student.log_second);
    const double excess = student.first - teacher.first;
    // A single other class has the probability 1 among the others on both sides.
    const bool single = params.classes == 2 && row.student > 0 && row.teacher > 0;
    const double non_target_weight = single ? 0 : params.dkd_non_target_weight;
    gradient.first = scale * (non_target_weight - params.dkd_target_weight * excess) / row.student;
    gradient.second = scale * non_target_weight / row.teacher;
    gradient.label = -scale * params.dkd_target_weight * excess;
    // A part of weight 0 may be infinite, so it is skipped.
    double divergence = 0;
    if (params.dkd_target_weight != 0) divergence += params.dkd_target_weight * not_negative(binary);
    if (non_target_weight != 0) divergence += non_target_weight * kl_divergence(row.dot, row.teacher, row.student);
    return divergence;
}

template <class T>
KDDP_INLINE double divergence_of_row(const RowParams& params, const ChunkSums& row, const MixtureSums& mixture,
                                     TargetMargins target, double scale, RowGradient& gradient) {
    gradient.first = quotient<T>(scale, row.student);
    double divergence;
    switch (params.divergence) {
        case Divergence::reverse_kl:
            divergence = kl_divergence(row.dot, row.student, row.teacher);
            gradient.second = -row.dot / row.student;
            // The gradient is 0 if the teacher alone excludes a class.
            if (divergence == HUGE_VAL) gradient.first = gradient.second = 0;
            break;
        case Divergence::mixture:
            divergence =
                params.mixture.teacher_weight * mixture.kl_teacher + params.mixture.student_weight * mixture.kl_student;
            divergence = not_negative(divergence);
            if (!mixture_slopes(params.mixture).present) gradient.first *= params.mixture.student_weight;
            gradient.second = -mixture.mean;
            break;
        case Divergence::symmetric_kl:
            divergence = (kl_divergence(mixture.kl_teacher, 1, row.student / row.teacher) +
                          kl_divergence(row.dot, row.student, row.teacher)) /
                         2;
            gradient.first = gradient.second = scale / (2 * row.student);
            break;
        case Divergence::dkd:
            return decoupled(params, row, target, scale, gradient);
        default:
            gradient.second = quotient<T>(scale, row.teacher);
            return kl_divergence<T>(row.dot, row.teacher, row.student);
    }
    if (divergence != divergence) gradient.first = divergence;  // NaN of the teacher may not appear in e_s
    return divergence;
}

// Turns the gradient with respect to z = (s - mean) / (std + epsilon) into that with respect to s. No divergence
// depends on a shift of z, so its gradient sums to 0 and the mean contributes nothing.
KDDP_INLINE void through_standardization(const RowParams& params, const ChunkSums& row, const MixtureSums& mixture,
                                         const Moments& student, const double& target_logit, RowGradient& gradient) {
    double along = gradient.first * row.student_moment - gradient.second * row.other_moment;  // sum g (s - r_s)
    if (params.divergence == Divergence::reverse_kl)
        along = gradient.first * (row.other_moment + gradient.second * row.student_moment);
    if (params.divergence == Divergence::mixture)
        along = gradient.first * (row.student * mixture.weighted_moment + gradient.second * row.student_moment);
    if (params.divergence == Divergence::symmetric_kl) along = gradient.first * row.student * mixture.weighted_moment;
    if (params.divergence == Divergence::dkd) along -= gradient.label * (target_logit - row.student_reference);
    const double divisor = divisor_of(student);
    const double in_logits = divisor * student.unit;
    gradient.first /= in_logits, gradient.label /= in_logits;
    if (gradient_form(params.divergence) == GradientForm::difference || params.divergence == Divergence::symmetric_kl)
        gradient.second /= in_logits;
    if (student.deviation > 0)
        gradient.projection = along / (double(params.classes - 1) * student.deviation * divisor * in_logits);
}

// Cross entropy against the targets, and its coefficients of the gradient, from log sum e^(s - r_s) and the label's
// probability where the sums exclude it.
KDDP_INLINE double cross_entropy_of_targets(const ChunkSums& row, const TargetSums& targets, double unit,
                                            double log_sum, double at_label, double scale, RowGradient& gradient) {
    gradient.untempered *= targets.sum;
    gradient.targets = scale;
    gradient.label += scale * (targets.label - targets.sum * at_label);
    return targets.sum * (log_sum - (targets.reference - row.student_reference) * unit) - targets.dot * unit;
}

// Cross entropy against (1 - smoothing) onehot(label) + smoothing / C, or the targets, and its coefficients of the
// gradient. With dkd the sums exclude the label.
template <class T>
KDDP_INLINE double cross_entropy(const RowParams& params, const ChunkSums& row, const TargetSums& targets, double unit,
                                 double label_logit, double scale, RowGradient& gradient) {
    const double margin = (label_logit - row.student_reference) * unit;
    double log_sum = log_of<T>(row.untempered), at_label = 0;
    if (params.divergence == Divergence::dkd && params.with_teacher) {
        const double higher = log_sum > margin ? log_sum : margin, lower = log_sum > margin ? margin : log_sum;
        if (higher == higher) log_sum = higher + std::log1p(std::exp(lower - higher));
        at_label = std::exp(margin - log_sum);
        gradient.untempered = scale * std::exp(-log_sum);
    } else {
        gradient.untempered = quotient<T>(scale, row.untempered);
    }
    if (params.with_targets) return cross_entropy_of_targets(row, targets, unit, log_sum, at_label, scale, gradient);
    gradient.constant = quotient<T>(scale * params.label_smoothing, double(params.classes));
    gradient.label += scale * (1 - params.label_smoothing - at_label);
    const double nll = log_sum - margin;
    if (params.label_smoothing == 0) return nll;
    const double mean_margin = (row.logits / double(params.classes) - row.student_reference) * unit;
    return (1 - params.label_smoothing) * nll + params.label_smoothing * (log_sum - mean_margin);
}

// Terms and gradient of a row from its merged sums: the divergence sets the gradient, then the cross entropy adds to
// it. A term of weight 0 contributes no gradient, even if its own gradient is infinite.
template <class T = double>
KDDP_INLINE double finish_divergence(const RowParams& params, const ChunkSums& row, const MixtureSums& mixture,
                                     const Moments& student, TargetMargins target, const double& label_logit,
                                     double weight, RowGradient& gradient) {
    gradient = {};
    if (!params.with_teacher || weight == 0) return 0;
    const double scale = params.alpha * params.temperature * params.gradient_scale * weight;
    const double divergence = divergence_of_row<T>(params, row, mixture, target, scale, gradient);
    if (params.standardize) {
#if defined(__CUDA_ARCH__)
        asm volatile("" ::: "memory");  // what is loaded earlier would be spilled
#endif
        through_standardization(params, row, mixture, student, label_logit, gradient);
    }
    if (params.alpha == 0) gradient = {};
    return divergence * params.temperature * params.temperature * params.value_scale * weight;
}

template <class T = double>
KDDP_INLINE double finish_cross_entropy(const RowParams& params, const ChunkSums& row, const TargetSums& targets,
                                        double unit, double label_logit, double weight, RowGradient& gradient) {
    if (!params.with_labels || weight == 0) return 0;
    const double scale = (1 - params.alpha) * params.gradient_scale * weight;
    RowGradient of_labels{0, 0, 0, 0, gradient.label, 0, 0};
    const double entropy = cross_entropy<T>(params, row, targets, unit, label_logit, scale, of_labels);
    if (params.alpha != 1) {
        gradient.untempered = of_labels.untempered;
        gradient.constant = of_labels.constant;
        gradient.label = of_labels.label;
        gradient.targets = of_labels.targets;
    }
    return params.value_scale * weight * entropy;
}

// The divergence's part of d loss / d s. Value is a number or a vector; `other` is e^v or w, depending on the form.
template <GradientForm form, class Value, class T>
KDDP_INLINE Value divergence_gradient(Value exp_student, Value other, T first, T second) {
    if constexpr (form == GradientForm::weighted) return first * exp_student * (other + second);
    return first * exp_student - second * other;
}

}  // namespace kddp
