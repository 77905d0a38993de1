// The distillation loss, the cross entropy and the activation penalty, with their gradients, in one pass.
//
//   loss = alpha * kd + (1 - alpha) * ce + sum over layers of l1_weight * l1
//
// kd = T^2 * divergence(softmax(teacher/T), softmax(student/T)) and ce are sums over the rows whose label is not
// ignore_index, divided by their number or by `normalizer`; l1 is sum |a| divided by the layer's samples. A term of
// weight 0 is left out.
//
// The ce of a row is -sum over c of w_c y_c log softmax(student)_c with the class weights w (absent: 1) and y =
// (1 - label_smoothing) z + label_smoothing / classes, where z is the row of `soft_labels`, or 1 at the label.
#pragma once

#include "kddp/types.h"

namespace kddp {

// Divergences of a row with teacher distribution p, student distribution q and label y:
enum class Divergence : int {
    forward_kl = 0,    // KL(p || q)
    reverse_kl = 1,    // KL(q || p)
    mixture = 2,       // teacher_weight KL(p || m) + student_weight KL(q || m) with m = share p + (1 - share) q
    dkd = 3,           // target_weight KL of (p_y, 1 - p_y) || (q_y, 1 - q_y) + non_target_weight KL over the others
    symmetric_kl = 4,  // (KL(p || q) + KL(q || p)) / 2
};

// The parameters of Divergence::mixture; `share` is between 0 and 1, both excluded.
struct Mixture {
    double share, teacher_weight, student_weight;
};

// Rows of a statistics block: sum |a|, sum a, sum a^2, count of nonzeros, max |a|.
constexpr int64_t statistics_rows = 5;

// The activations (rows, neurons) of one layer and its optional outputs.
struct ActivationLayer {
    Matrix activation;
    int64_t rows, neurons;
    double samples;  // the divisor of sum |a|: the rows, or more if a neuron has several positions
    double l1_weight;
    void* gradient;      // (rows, neurons) contiguous, the activation's type: d loss / d a
    double* statistics;  // row k of the block starts at statistics + k * statistics_stride
};

struct ActivationL1 {
    const ActivationLayer* layers;
    int64_t layer_count;
    int64_t statistics_stride;
};

struct KdL1Loss {
    int64_t rows;
    int64_t classes;
    Matrix student;         // absent: activations only
    Matrix teacher;         // absent: kd is 0
    const int64_t* labels;  // (rows)
    Matrix soft_labels;  // instead of `labels`; without both ce is 0. float64 only if the loss is computed in double.
    // (classes), of the type that the loss is computed in: float64 if the student's or the teacher's logits are,
    // otherwise float32. Absent: all are 1.
    const void* class_weights;
    // (2, rows): factors of each row's kd and ce. A row with two factors of 0 is ignored. Absent: all are 1.
    const double* row_weights;
    ActivationL1 activations;
    double temperature;
    double alpha;
    double normalizer;  // what kd and ce are divided by; 0: the number of rows whose label is not ignore_index
    double label_smoothing;
    int64_t ignore_index;
    Divergence divergence;
    Mixture mixture;
    double dkd_target_weight, dkd_non_target_weight;
    bool standardize_logits;  // kd is computed on (x - mean) / (std + 1e-7) of each row, for both sides
    // float16 cannot represent gradients divided by the batch size. If set, the logits' gradient is multiplied by
    // `normalizer`, or by `rows` without one, and the activations' gradient is sign(a); the backward divides when it
    // multiplies by grad_output.
    bool scaled_gradients;
    void* logits_gradient;    // (rows, classes) contiguous, the student's type; absent: not computed
    ElementType result_type;  // float32 or float64
    void* loss;
    void* terms;      // kd, ce, l1, correct; absent: not computed
    void* row_terms;  // (2, rows): each row's part of kd and ce, not written for ignored rows; absent: not computed
    void* workspace;  // kd_l1_loss_workspace bytes, aligned to 64
    int threads;
};

// Bytes of workspace that `kd_l1_loss` needs for this job.
int64_t kd_l1_loss_workspace(const KdL1Loss& job);

// The result is the same, bit for bit, for any number of threads.
Status kd_l1_loss(const KdL1Loss& job);

}  // namespace kddp
