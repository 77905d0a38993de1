// The host side of the loss: which kernel serves a call, how its work is cut, and its launches. The first is a small
// kernel that counts the valid labels.
#include "cuda/backend.h"
#include "cuda/loss_kernel.cuh"
#include "workspace.h"

namespace kddp {
namespace {

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

LossKernels kernels_for(const KdL1Loss& job) {
    const GradientForm form = job.teacher.data ? gradient_form(job.divergence) : GradientForm::difference;
    const bool is_usual = traits_of(row_params(job)) == usual_call;
    if (computes_in_double(job)) return loss_kernels<ElementType::float64>(form, is_usual);
    if (job.student.type == ElementType::bfloat16) return loss_kernels<ElementType::bfloat16>(form, is_usual);
    if (job.student.type == ElementType::float16) return loss_kernels<ElementType::float16>(form, is_usual);
    return loss_kernels<ElementType::float32>(form, is_usual);
}

// Classes that a thread caches: with more there would be too few warps to hide the latency of memory.
constexpr int64_t classes_per_thread = 16, longest_cached_row = 16384;
// The longest rows for teams of 8 lanes and of a warp: up to these, shared memory has room for half of the threads that
// a multiprocessor of any supported architecture runs at once.
constexpr int64_t longest_small_row = 64, longest_small_row_16_bit = 56, longest_warp_row = 432;
constexpr int64_t shortest_slice = 8192;  // classes
constexpr int max_slices = 64;

// The kernel of a call, with its threads and shared memory.
struct Plan {
    LossKernel kernel;
    int threads, shared_bytes = 0, rows_per_block = 1, resident = 1;
    int side_vectors = 0, team_vectors = 0;
    bool cached = true;
};

Plan plan_of(const KdL1Loss& job) {
    const LossKernels kernels = kernels_for(job);
    const int64_t bytes = computes_in_double(job) ? 8 : 4,
                  n = computes_in_double(job) ? 2 : 16 / size_of(job.student.type);
    const int64_t side_vectors = divide_up(job.classes + vectors_per_sector * n - 1, n);
    const int64_t team_vectors = 2 * side_vectors * (n * bytes / 16);
    Plan plan{kernels.small_teams, warp_team_threads};
    plan.side_vectors = static_cast<int>(side_vectors);
    int teams = warp_team_threads / 8;
    const int64_t longest_of_8_lanes = n == 8 ? longest_small_row_16_bit : longest_small_row;
    if (!plan.kernel || job.classes > longest_of_8_lanes) plan.kernel = kernels.warps, teams = warp_team_threads / 32;
    if (job.classes > longest_warp_row * 4 / bytes) {
        plan.kernel = kernels.blocks, teams = 1;
        const int64_t threads = divide_up(divide_up(job.classes, classes_per_thread * 4 / bytes), 32) * 32;
        plan.threads = static_cast<int>(min(threads, bytes == 8 ? 512 : 1024));
    }
    plan.rows_per_block = teams;
    if (job.classes > longest_cached_row * 4 / bytes || teams * team_vectors * 16 > max_dynamic_shared_bytes()) {
        plan.kernel = kernels.long_rows, plan.threads = kernels.long_row_threads, plan.cached = false;
        plan.side_vectors = 0;
    } else if (job.student.data) {
        plan.team_vectors = static_cast<int>(team_vectors);
        plan.shared_bytes = static_cast<int>(teams * team_vectors * 16);
    }
    plan.resident = resident_blocks(reinterpret_cast<const void*>(plan.kernel), plan.threads, plan.shared_bytes);
    return plan;
}

// Elements from the first of a matrix to behind its last.
int64_t extent(const Matrix& matrix, int64_t rows, int64_t columns) {
    return matrix.data && rows > 0 ? (rows - 1) * matrix.row_stride + columns : 0;
}

// Cuts a layer into units, depending on nothing but its sizes.
LayerLaunch layer_of(const KdL1Loss& job, const ActivationLayer& layer) {
    LayerLaunch cut{};
    const int64_t bytes = size_of(layer.activation.type), n = 16 / bytes;
    cut.data = static_cast<const char*>(layer.activation.data);
    cut.gradient = static_cast<char*>(layer.gradient);
    cut.statistics = layer.statistics;
    cut.row_stride = layer.activation.row_stride, cut.columns = layer.neurons, cut.rows = layer.rows;
    cut.type = layer.activation.type, cut.l1_weight = layer.l1_weight, cut.samples = layer.samples;
    cut.scale = job.scaled_gradients ? 1 : layer.l1_weight / layer.samples;
    if (!cut.statistics && (cut.row_stride == cut.columns || cut.rows <= 1)) {
        cut.columns *= cut.rows > 0 ? cut.rows : 0;  // one long row
        cut.rows = cut.columns > 0, cut.row_stride = cut.columns;
    }
    const int64_t access_bytes = cut.statistics ? statistics_columns * bytes : 16;
    const auto is_aligned = [&](const void* first) { return reinterpret_cast<uintptr_t>(first) % access_bytes == 0; };
    const bool rows_aligned =
        cut.rows <= 1 || (cut.row_stride * bytes % access_bytes == 0 && cut.columns * bytes % access_bytes == 0);
    cut.aligned = is_aligned(cut.data) && is_aligned(cut.gradient) && rows_aligned;
    if (cut.statistics) {
        cut.unit_columns = 32 * statistics_columns;
        cut.row_parts = static_cast<int>(min(max(cut.rows / 64, 1), 16));
    } else {
        constexpr int64_t max_units = 2048;
        cut.unit_columns = max(divide_up(divide_up(cut.columns, 32 * n), max_units), 8) * 32 * n;
        const int64_t column_parts = max(divide_up(cut.columns, cut.unit_columns), 1);
        const int64_t parts = min(max(max_units / column_parts, 1), divide_up(cut.rows * cut.columns, 4096));
        cut.row_parts = static_cast<int>(max(min(parts, cut.rows), 1));
    }
    cut.unit_rows = max(divide_up(cut.rows, cut.row_parts), 1);
    cut.column_parts = static_cast<int>(divide_up(cut.columns, cut.unit_columns));
    return cut;
}

// What precedes the launches of a call.
struct Preparation {
    unsigned* counters;     // become 0
    const int64_t* labels;  // are counted unless they have the ignored index; or null
    int64_t rows, ignore_index;
    double* counts;  // one for each block
};

constexpr int preparing_threads = 512, labels_per_block = 8 * preparing_threads, max_label_parts = 16;

__global__ void __launch_bounds__(preparing_threads) prepare_loss(const __grid_constant__ Preparation call) {
    KDDP_SHARED(double, scratch, 32);
    const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, step = int64_t(gridDim.x) * blockDim.x;
    for (int64_t i = first; i < counter_count; i += step) store_global(call.counters + i, 0u);
    if (!call.labels) return;
    double count = 0;
    for (int64_t row = first; row < call.rows; row += step)
        count += load_global(call.labels + row) != call.ignore_index;
    count = sum_of_block(count, scratch);
    if (threadIdx.x == 0) store_global(call.counts + blockIdx.x, count);
}

class Launches {
  public:
    Launches(const KdL1Loss& job, const LaunchContext* context)
        : job_(job), context_(context), plan_(plan_of(job)), workspace_(job.workspace) {
        launch_ = {};
        launch_.carried = workspace_.take<double>(2);
        counters_ = workspace_.take<unsigned>(counter_count);
        label_counts_ = workspace_.take<double>(max_label_parts);
        set_slices();
        launch_.slices_workspace =
            reinterpret_cast<char*>(workspace_.take<SliceRecord>(launch_.slices > 1 ? job.rows * launch_.slices : 0));
        launch_.block_terms = workspace_.take<RowTerms>(plan_.resident);
        fixed_bytes_ = workspace_.bytes();
    }

    // Returns the bytes that the largest launch needs. Launches only if there is a context. The rows and the last
    // layers share a launch; more layers than fit into it have launches of their own before.
    int64_t run() {
        int64_t bytes = fixed_bytes_;
        if (context_) prepare();
        const int64_t layers = job_.activations.layer_count;
        const int64_t last = layers > 0 ? (layers - 1) / layers_per_launch * layers_per_launch : 0;
        for (int64_t first = 0; first <= last; first += layers_per_launch) {
            Workspace workspace = workspace_;
            set_layers(first, workspace);
            bytes = max(bytes, workspace.bytes());
            if (!context_) continue;
            launch_.carries = first > 0, launch_.is_last = first == last;
            set_rows(first == last);
            start();
        }
        return bytes;
    }

  private:
    // Blocks that count labels, or 0 if another number than theirs divides the loss.
    int label_parts() const {
        if (!job_.labels || !job_.student.data || job_.normalizer != 0) return 0;
        return static_cast<int>(max(min(divide_up(job_.rows, labels_per_block), max_label_parts), 1));
    }

    void prepare() {
        const int parts = label_parts();
        const Preparation call{counters_, parts > 0 ? job_.labels : nullptr, job_.rows, job_.ignore_index,
                               label_counts_};
        const dim3 grid(static_cast<unsigned>(max(parts, 1)));
        KDDP_LAUNCH(prepare_loss, grid, dim3(preparing_threads), 0, context_->stream, call);
    }

    // Blocks that share a row, where there are too few rows for all blocks: each of them has one row. The moments of
    // standardized logits would need one more exchange between blocks.
    int slices() const {
        if (plan_.cached || !job_.student.data || job_.rows == 0 || job_.standardize_logits) return 1;
        const int64_t blocks = max(plan_.resident / job_.rows, 1);
        return static_cast<int>(min(min(blocks, max(job_.classes / shortest_slice, 1)), max_slices));
    }

    void set_slices() {
        launch_.slices = slices();
        launch_.slice_classes = static_cast<int>(divide_up(divide_up(job_.classes, launch_.slices), 64) * 64);
    }

    void set_layers(int64_t first, Workspace& workspace) {
        launch_.layer_count = static_cast<int>(min(job_.activations.layer_count - first, layers_per_launch));
        launch_.units = 0;
        int counter = 0;
        for (int i = 0; i < launch_.layer_count; ++i) {
            LayerLaunch& layer = launch_.layers[i];
            layer = layer_of(job_, job_.activations.layers[first + i]);
            if (layer.statistics && counter + layer.column_parts > part_counter_count) {
                layer.row_parts = 1, layer.unit_rows = max(layer.rows, 1);
            }
            layer.first_counter = counter;
            layer.first_unit = launch_.units;
            if (layer.statistics && layer.row_parts > 1) {
                counter += layer.column_parts;
                layer.partial = workspace.take<double>(layer.row_parts * statistics_rows * layer.columns);
            }
            launch_.units += int64_t(layer.row_parts) * layer.column_parts;
        }
        launch_.unit_sums = workspace.take<double>(launch_.units);
    }

    void set_rows(bool with_rows) {
        static_cast<RowParams&>(launch_) = row_params(job_);
        if (!with_rows) launch_.student.data = nullptr;
        launch_.inverse_temperature = 1 / job_.temperature;
        launch_.side_vectors = plan_.side_vectors, launch_.team_vectors = plan_.team_vectors;
        launch_.student_elements = extent(job_.student, job_.rows, job_.classes);
        launch_.teacher_elements = extent(job_.teacher, job_.rows, job_.classes);
        launch_.soft_label_elements = extent(job_.soft_labels, job_.rows, job_.classes);
        launch_.label_counts = label_counts_, launch_.label_count_parts = label_parts();
        launch_.cached_labels = job_.labels && launch_.slices == 1 ? max_cached_labels : 0;
        launch_.done_counter = counters_;
        launch_.slice_counters = counters_ + front_counters;
        launch_.counters = launch_.slice_counters + slice_counter_count;
    }

    // Launches as many blocks as run at once, or fewer if there is less work. A context may have only some of the
    // device's multiprocessors (MPS, green contexts). Their number is not known: a launch that is too large for them is
    // repeated with half of its blocks.
    void start() {
        while (true) {
            const int64_t blocks = blocks_to_launch();
            launch_.row_groups = static_cast<unsigned>(blocks / launch_.slices);
            const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(plan_.threads));
            if (launch_.slices == 1) {
                KDDP_LAUNCH(plan_.kernel, grid, block, plan_.shared_bytes, context_->stream, launch_);
                return;
            }
            const cudaError_t error =
                KDDP_LAUNCH_COOPERATIVE(plan_.kernel, grid, block, plan_.shared_bytes, context_->stream, launch_);
            if (error != cudaErrorCooperativeLaunchTooLarge) return;
            cudaGetLastError();  // clears it
            plan_.resident = static_cast<int>(blocks / 2);
            set_slices();
        }
    }

    int64_t blocks_to_launch() const {
        if (launch_.slices > 1) return job_.rows * launch_.slices;
        const int64_t row_blocks = launch_.student.data ? divide_up(job_.rows, plan_.rows_per_block) : 0;
        const int64_t unit_blocks = divide_up(launch_.units, plan_.threads / 32);
        return min(max(max(row_blocks, unit_blocks), 1), plan_.resident);
    }

    const KdL1Loss& job_;
    const LaunchContext* context_;
    Plan plan_;
    Workspace workspace_;
    LossLaunch launch_;
    unsigned* counters_;
    double* label_counts_;
    int64_t fixed_bytes_;
};

}  // namespace

int64_t cuda_kd_l1_loss_workspace(const KdL1Loss& job) { return Launches(job, nullptr).run(); }

void cuda_kd_l1_loss(const KdL1Loss& job, const LaunchContext& context) { Launches(job, &context).run(); }

}  // namespace kddp
