// The mathematics of one row of logits, for every backend: plain formulas over numbers or vectors of numbers.
//
// A row is worked in pieces. Each has references of its own near its highest logits, r_s and r_t, so that it is read
// once: with u = (s - r_s) / T and v = (t - r_t) / T, a kernel sums what PieceSums lists, merge() brings the pieces to
// the references of the row, and finish_row() turns the sums into the row's terms and into the coefficients of its
// gradient.
#pragma once

#include <cmath>

#include "kddp/kd_l1_loss.h"

namespace kddp {

#if defined(__CUDACC__)
#define KDDP_INLINE __host__ __device__ inline
#else
#define KDDP_INLINE static inline  // each instruction set has its own, which the linker cannot mix (cpu/vector.h)
#endif

constexpr double log2_e = 1.44269504088896340736, ln_2 = 0.693147180559945309417;

static inline bool computes_in_double(const KdL1Loss& job) {
    return job.student.type == ElementType::float64 || (job.teacher.data && job.teacher.type == ElementType::float64);
}

// How e^s comes from e^(s/T): where T is 2 or 4 by squaring, else by an exponential of its own.
enum class Untempered : int { absent, same, square, fourth, separate };

static inline Untempered choose_untempered(const KdL1Loss& job) {
    if (!job.labels) return Untempered::absent;
    if (job.standardize_logits && job.teacher.data) return Untempered::separate;
    if (job.temperature == 1) return Untempered::same;
    // Doubles lose too much in squares; and without a teacher nothing else wants e^(s/T).
    if (!job.teacher.data || computes_in_double(job)) return Untempered::separate;
    if (job.temperature == 2) return Untempered::square;
    return job.temperature == 4 ? Untempered::fourth : Untempered::separate;
}

// The two shapes that the gradient of a divergence takes away from the label, with e_s = e^u and e_t = e^v:
//   difference: first e_s - second e_t        forward_kl, dkd
//   weighted:   first e_s (w + second)        reverse_kl with w = u - v, jsd with w = log(q / m)
// w may be huge where its mean, -second, is as huge: their difference is taken first.
enum class GradientForm { difference, weighted };

KDDP_INLINE constexpr GradientForm gradient_form(Divergence divergence) {
    return divergence == Divergence::reverse_kl || divergence == Divergence::jsd ? GradientForm::weighted
                                                                                 : GradientForm::difference;
}

// What the formulas need of a call.
struct RowRule {
    Divergence divergence;
    bool with_teacher, with_labels, standardize;
    double classes, temperature, alpha, label_smoothing, jsd_beta, target_weight, non_target_weight;
    double value_scale;     // 1 / valid rows
    double gradient_scale;  // the same, or what of it the forward applies
};

// The rule of a call, for the host: what its rows are scaled by is known later.
static inline RowRule row_rule(const KdL1Loss& job) {
    return {job.divergence,
            job.teacher.data != nullptr,
            job.labels != nullptr,
            job.standardize_logits && job.teacher.data,
            double(job.classes),
            job.temperature,
            job.alpha,
            job.label_smoothing,
            job.jsd_beta,
            job.dkd_target_weight,
            job.dkd_non_target_weight,
            0,
            0};
}

// Mean and standard deviation of a row (divided by classes - 1, as torch.std has it).
struct Moments {
    double mean = 0, deviation = 0;
};

// What standardised logits are divided by: the epsilon is that of Sun et al. 2024.
KDDP_INLINE double divisor_of(Moments moments) { return moments.deviation + 1e-7; }

struct PieceSums {
    double student_reference, teacher_reference;
    double highest;                       // of the student's logits
    double student, teacher;              // sum e^u, sum e^v
    double untempered;                    // sum e^(s - r_s)
    double dot;                           // sum e^v (v - u), where the form is weighted sum e^u (u - v)
    double logits;                        // sum s
    double student_moment, other_moment;  // sum e^u (s - r_s), sum (e^v or e^u w) (s - r_s)
};

// What jsd sums in its second round, over the whole row's p, q and m.
struct MixtureSums {
    double kl_teacher = 0, kl_student = 0;  // KL(p || m), KL(q || m)
    double weighted_moment = 0;             // sum q w (s - r_s)
};

// By how much the references of a piece lie below those of the row, and the factors that follow.
struct Rebase {
    double student, teacher;                    // in logits
    double student_tempered, teacher_tempered;  // in nats of the tempered distributions
    double student_factor, teacher_factor, untempered_factor;
};

KDDP_INLINE Rebase rebase(const PieceSums& piece, const PieceSums& row, double inverse_student,
                          double inverse_teacher) {
    Rebase by{piece.student_reference - row.student_reference,
              piece.teacher_reference - row.teacher_reference,
              0,
              0,
              1,
              1,
              1};
    if (by.student != 0) {
        by.student_tempered = by.student * inverse_student;
        by.student_factor = std::exp(by.student_tempered);
        by.untempered_factor = std::exp(by.student);
    }
    if (by.teacher != 0) {
        by.teacher_tempered = by.teacher * inverse_teacher;
        by.teacher_factor = std::exp(by.teacher_tempered);
    }
    return by;
}

// Adds a piece to its row, whose references are set.
KDDP_INLINE void merge(const PieceSums& piece, const Rebase& by, GradientForm form, PieceSums& row) {
    const double student = by.student_factor, teacher = by.teacher_factor;
    const double apart = by.student_tempered - by.teacher_tempered;
    row.student += student * piece.student;
    row.teacher += teacher * piece.teacher;
    row.untempered += by.untempered_factor * piece.untempered;
    row.logits += piece.logits;
    const double moment = piece.student_moment + by.student * piece.student;
    row.student_moment += student * moment;
    // A factor of 0 takes with it whatever may be infinite behind it.
    if (form == GradientForm::difference && teacher != 0) {
        row.dot += teacher * (piece.dot - apart * piece.teacher);
        row.other_moment += teacher * (piece.other_moment + by.student * piece.teacher);
    } else if (form == GradientForm::weighted && student != 0) {
        row.dot += student * (piece.dot + apart * piece.student);
        row.other_moment += student * (piece.other_moment + by.student * piece.dot + apart * moment);
    }
}

// Coefficients of the gradient of a row: GradientForm's, and those of what is added to it.
struct RowGradient {
    double first, second;
    double untempered;  // times e^(s - r_s)
    double constant;    // subtracted everywhere
    double label;       // subtracted at the label
    double projection;  // times s - mean, subtracted: through the standard deviation of standardised logits
};

struct RowValues {
    double kd, ce;
};

// Rounding may leave a little less than nothing of what cannot be negative.
KDDP_INLINE double not_negative(double divergence) { return divergence < 0 ? 0 : divergence; }

// KL(p || q) of one row, from dot, Z_p and Z_q.
KDDP_INLINE double kl_divergence(double dot, double sum_p, double sum_q) {
    return not_negative(dot / sum_p + std::log(sum_q / sum_p));
}

// A choice between two, of which the first is x nats above the other: both probabilities and their logarithms.
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

// x log(x / y) from x and logarithms, 0 where x is 0.
KDDP_INLINE double kl_term(double x, double log_x, double log_y) { return x == 0 ? 0 : x * (log_x - log_y); }

// Of the label in a row whose sums leave it out (dkd): logits above the highest of the others, tempered.
struct TargetMargins {
    double student, teacher;
};

// kd of a row and its part of the gradient. `scale` is alpha T / n: the derivative of the tempered logits.
KDDP_INLINE double decoupled(const RowRule& rule, const PieceSums& row, TargetMargins target, double scale,
                             RowGradient& gradient) {
    if (row.student == 0 && row.teacher == 0) {  // the label has the row for itself, on both sides
        gradient = {};
        return 0;
    }
    const BinaryChoice student = binary_choice(target.student - std::log(row.student));
    const BinaryChoice teacher = binary_choice(target.teacher - std::log(row.teacher));
    const double binary = kl_term(teacher.first, teacher.log_first, student.log_first) +
                          kl_term(teacher.second, teacher.log_second, student.log_second);
    const double excess = student.first - teacher.first;
    gradient.first = scale * (rule.non_target_weight - rule.target_weight * excess) / row.student;
    gradient.second = scale * rule.non_target_weight / row.teacher;
    gradient.label = -scale * rule.target_weight * excess;
    // A part of weight 0 may be infinite.
    double divergence = 0;
    if (rule.target_weight != 0) divergence += rule.target_weight * not_negative(binary);
    if (rule.non_target_weight != 0)
        divergence += rule.non_target_weight * kl_divergence(row.dot, row.teacher, row.student);
    return divergence;
}

KDDP_INLINE double divergence_of_row(const RowRule& rule, const PieceSums& row, const MixtureSums& mixture,
                                     TargetMargins target, double scale, RowGradient& gradient) {
    gradient.first = scale / row.student;
    double divergence;
    switch (rule.divergence) {
        case Divergence::reverse_kl:
            divergence = kl_divergence(row.dot, row.student, row.teacher);
            gradient.second = -row.dot / row.student;
            // Where the teacher alone excludes a class there is no gradient.
            if (divergence == HUGE_VAL) gradient.first = gradient.second = 0;
            return divergence;
        case Divergence::jsd:
            divergence = rule.jsd_beta * mixture.kl_teacher + (1 - rule.jsd_beta) * mixture.kl_student;
            gradient.first *= 1 - rule.jsd_beta;
            gradient.second = -mixture.kl_student;
            if (divergence != divergence) gradient.first = divergence;  // the teacher's side may not show in q
            return not_negative(divergence);
        case Divergence::dkd:
            return decoupled(rule, row, target, scale, gradient);
        default:
            gradient.second = scale / row.teacher;
            return kl_divergence(row.dot, row.teacher, row.student);
    }
}

// Takes the gradient with respect to z = (s - mean) / (std + epsilon) to the logits s. Every divergence is blind to
// a shift of z, so its gradient sums to 0 and the mean passes nothing on.
KDDP_INLINE void through_standardization(const RowRule& rule, const PieceSums& row, const MixtureSums& mixture,
                                         Moments student, double target_logit, RowGradient& gradient) {
    double along = gradient.first * row.student_moment - gradient.second * row.other_moment;  // sum g (s - r_s)
    if (rule.divergence == Divergence::reverse_kl)
        along = gradient.first * (row.other_moment + gradient.second * row.student_moment);
    if (rule.divergence == Divergence::jsd)
        along = gradient.first * (row.student * mixture.weighted_moment + gradient.second * row.student_moment);
    if (rule.divergence == Divergence::dkd) along -= gradient.label * (target_logit - row.student_reference);
    const double divisor = divisor_of(student);
    gradient.first /= divisor, gradient.label /= divisor;
    if (gradient_form(rule.divergence) == GradientForm::difference) gradient.second /= divisor;
    if (student.deviation > 0)
        gradient.projection = along / ((rule.classes - 1) * student.deviation * divisor * divisor);
}

// Cross entropy against (1 - smoothing) onehot(label) + smoothing / C, and its part of the gradient. Of dkd the sums
// leave the label out.
KDDP_INLINE double cross_entropy(const RowRule& rule, const PieceSums& row, double label_logit, double scale,
                                 RowGradient& gradient) {
    const double margin = label_logit - row.student_reference;
    double log_sum = std::log(row.untempered), at_label = 0;
    if (rule.divergence == Divergence::dkd && rule.with_teacher) {
        const double higher = log_sum > margin ? log_sum : margin, lower = log_sum > margin ? margin : log_sum;
        if (higher == higher) log_sum = higher + std::log1p(std::exp(lower - higher));
        at_label = std::exp(margin - log_sum);
        gradient.untempered = scale * std::exp(-log_sum);
    } else {
        gradient.untempered = scale / row.untempered;
    }
    gradient.constant = scale * rule.label_smoothing / rule.classes;
    gradient.label += scale * (1 - rule.label_smoothing - at_label);
    const double nll = log_sum - margin;
    if (rule.label_smoothing == 0) return nll;
    const double mean_margin = row.logits / rule.classes - row.student_reference;
    return (1 - rule.label_smoothing) * nll + rule.label_smoothing * (log_sum - mean_margin);
}

// Terms and gradient of a row from its merged sums, in two parts: what the teacher says, which sets the gradient, then
// what the label adds to it. A term of weight 0 has no gradient, not 0 times one that may be infinite.
KDDP_INLINE double finish_divergence(const RowRule& rule, const PieceSums& row, const MixtureSums& mixture,
                                     Moments student, TargetMargins target, double label_logit, RowGradient& gradient) {
    gradient = {};
    if (!rule.with_teacher) return 0;
    const double scale = rule.alpha * rule.temperature * rule.gradient_scale;
    const double divergence = divergence_of_row(rule, row, mixture, target, scale, gradient);
    if (rule.standardize) through_standardization(rule, row, mixture, student, label_logit, gradient);
    if (rule.alpha == 0) gradient = {};
    return divergence * rule.temperature * rule.temperature * rule.value_scale;
}

KDDP_INLINE double finish_cross_entropy(const RowRule& rule, const PieceSums& row, double label_logit,
                                        RowGradient& gradient) {
    if (!rule.with_labels) return 0;
    const double scale = (1 - rule.alpha) * rule.gradient_scale;
    RowGradient of_labels{0, 0, 0, 0, gradient.label, 0};
    const double entropy = cross_entropy(rule, row, label_logit, scale, of_labels);
    if (rule.alpha != 1) {
        gradient.untempered = of_labels.untempered;
        gradient.constant = of_labels.constant;
        gradient.label = of_labels.label;
    }
    return rule.value_scale * entropy;
}

KDDP_INLINE RowValues finish_row(const RowRule& rule, const PieceSums& row, const MixtureSums& mixture, Moments student,
                                 TargetMargins target, double label_logit, RowGradient& gradient) {
    const double kd = finish_divergence(rule, row, mixture, student, target, label_logit, gradient);
    return {kd, finish_cross_entropy(rule, row, label_logit, gradient)};
}

// d loss / d s away from the label. Value may be a number or a vector; `other` is e^v or w, as the form has it.
template <GradientForm form, class Value, class T>
KDDP_INLINE Value divergence_gradient(Value exp_student, Value other, T first, T second) {
    if constexpr (form == GradientForm::weighted) return first * exp_student * (other + second);
    return first * exp_student - second * other;
}

}  // namespace kddp
