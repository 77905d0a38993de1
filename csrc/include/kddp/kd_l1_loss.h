// The distillation loss, the classification loss and the activation penalty, with their gradients, in one
// pass.
//
//   loss = alpha * kd + (1 - alpha) * ce + sum over layers of l1_weight * l1
//
// with kd = T^2 * divergence(softmax(teacher/T), softmax(student/T)) and ce averaged over the rows whose label is
// not ignore_index, and l1 = sum |a| averaged over the layer's samples. A term of weight 0 is left out.
#pragma once

#include "kddp/activation_l1.h"
#include "kddp/types.h"

namespace kddp {

// Of a row's teacher distribution p and student distribution q, with y its label:
enum class Divergence : int {
    forward_kl = 0,  // KL(p || q)
    reverse_kl = 1,  // KL(q || p)
    jsd = 2,         // beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q
    dkd = 3,         // target_weight KL of (p_y, 1 - p_y) || (q_y, 1 - q_y) + non_target_weight KL over the others
};

struct KdL1Loss {
    int64_t rows;
    int64_t classes;
    Matrix student;         // absent: the activations alone
    Matrix teacher;         // absent: kd is 0
    const int64_t* labels;  // (rows), absent: ce is 0
    ActivationL1 activations;
    double temperature;
    double alpha;
    double label_smoothing;
    int64_t ignore_index;
    Divergence divergence;
    double jsd_beta;
    double dkd_target_weight, dkd_non_target_weight;
    bool standardize_logits;  // kd is that of (x - mean) / (std + 1e-7) of each row, both sides
    // float16 cannot hold gradients divided by the batch size. Where set, those of the logits come multiplied
    // by `rows`, those of the activations as sign(a), for whoever scales them with grad_output to finish.
    bool scaled_gradients;
    void* logits_gradient;    // (rows, classes) contiguous, the student's type; absent: not computed
    ElementType result_type;  // float32 or float64
    void* loss;
    void* terms;      // kd, ce, l1, correct; absent: not wanted
    void* workspace;  // kd_l1_loss_workspace bytes, aligned to 64
    int threads;
};

// Bytes of workspace that `kd_l1_loss` needs for these sizes, types and threads.
int64_t kd_l1_loss_workspace(const KdL1Loss& job);

// The same result, bit for bit, whatever the number of threads.
Status kd_l1_loss(const KdL1Loss& job);

}  // namespace kddp
