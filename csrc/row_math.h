// The mathematics of one row of logits, for every backend: plain formulas over numbers or vectors of numbers.
//
// With u = (s - max s) / T and v = (t - max t) / T, the kernels sum over the classes
//   Z_q = sum e^u      Z_p = sum e^v      Z_1 = sum e^(s - max s)      dot = sum e^v (v - u)
#pragma once

namespace kddp {

#if defined(__CUDACC__)
#define KDDP_INLINE __host__ __device__ inline
#else
#define KDDP_INLINE inline
#endif

// What the gradient of one row multiplies its exponentials by.
template <class T>
struct GradientScale {
    T student;     // alpha T / (n Z_q)
    T teacher;     // alpha T / (n Z_p)
    T untempered;  // (1 - alpha) / (n Z_1)
    T smoothing;   // (1 - alpha) label_smoothing / (n C)
    T label;       // (1 - alpha) (1 - label_smoothing) / n, at the label alone
};

// KL(p || q) of one row, from dot, Z_p and log(Z_q / Z_p). Rounding may leave a little less than nothing of what cannot
// be negative.
template <class T>
KDDP_INLINE T kl_divergence(T dot, T sum_p, T log_q_over_p) {
    const T divergence = dot / sum_p + log_q_over_p;
    return divergence < 0 ? T(0) : divergence;
}

// Cross entropy against (1 - smoothing) onehot(label) + smoothing / C, from margins s - max s.
template <class T>
KDDP_INLINE T cross_entropy(T log_sum, T label_margin, T mean_margin, T smoothing) {
    const T nll = log_sum - label_margin;
    return smoothing == 0 ? nll : (1 - smoothing) * nll + smoothing * (log_sum - mean_margin);
}

// d loss / d s away from the label. Value may be a number or a vector.
template <class Value, class T>
KDDP_INLINE Value gradient_away_from_label(Value exp_student, Value exp_teacher, Value exp_untempered,
                                           const GradientScale<T>& scale) {
    return scale.student * exp_student - scale.teacher * exp_teacher + scale.untempered * exp_untempered -
           scale.smoothing;
}

}  // namespace kddp
