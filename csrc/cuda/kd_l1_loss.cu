// The fused loss on a GPU: which kernel serves a call, how its work is cut, and its one launch.
#include "cuda/kd_l1_loss.h"
#include "cuda/kernels_by_rows.cuh"
#include "cuda/occupancy.h"

namespace kddp {
namespace {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

LossKernels kernels_for(const KdL1Loss& job) {
    const GradientForm form = job.teacher.data ? gradient_form(job.divergence) : GradientForm::difference;
    if (computes_in_double(job)) return float64_kernels(form);
    if (job.student.type == ElementType::bfloat16) return bfloat16_kernels(form);
    if (job.student.type == ElementType::float16) return float16_kernels(form);
    return float32_kernels(form);
}

// A row's classes that a thread keeps: more would leave too few warps to hide the memory's latency.
constexpr int64_t kept_by_thread = 16, longest_kept_row = 16384;
// The most classes that 8 lanes, or a warp, keep: with these, half of the threads that any of the architectures can run
// at once find room in its shared memory.
constexpr int64_t longest_small_row = 64, longest_row_of_warp = 432;
// Rows are cut into slices of at least so many classes.
constexpr int64_t shortest_slice = 8192;
constexpr int most_slices = 64;

// Which kernel, with what threads and shared memory.
struct Plan {
    LossKernel kernel;
    int threads, shared_bytes = 0, rows_of_block = 1, resident = 1;
    int vectors_of_side = 0, vectors_of_team = 0;
    bool kept = true;
};

Plan plan_of(const KdL1Loss& job) {
    const LossKernels kernels = kernels_for(job);
    const int64_t bytes = computes_in_double(job) ? 8 : 4,
                  n = computes_in_double(job) ? 2 : 16 / size_of(job.student.type);
    const int64_t of_side = divide_up(job.classes + vectors_of_sector * n - 1, n);
    const int64_t vectors = of_side * (n * bytes / 16), kept = kept_by_thread * 4 / bytes;
    Plan plan{kernels.small_teams, threads_of_warps};
    plan.vectors_of_side = static_cast<int>(of_side);
    int teams = threads_of_warps / 8;
    if (!plan.kernel || job.classes > longest_small_row) plan.kernel = kernels.warps, teams = threads_of_warps / 32;
    if (job.classes > longest_row_of_warp * 4 / bytes) {
        plan.kernel = kernels.blocks, teams = 1;
        plan.threads =
            static_cast<int>(smaller(divide_up(divide_up(job.classes, kept), 32) * 32, bytes == 8 ? 512 : 1024));
    }
    const int64_t vectors_of_team = 2 * vectors;
    plan.rows_of_block = teams;
    if (job.classes > longest_kept_row * 4 / bytes || teams * vectors_of_team * 16 > most_dynamic_shared_bytes()) {
        plan.kernel = kernels.long_rows, plan.threads = threads_of_long_rows(bytes), plan.kept = false;
        plan.vectors_of_side = 0;
    } else if (job.student.data) {
        plan.vectors_of_team = static_cast<int>(vectors_of_team);
        plan.shared_bytes = static_cast<int>(teams * vectors_of_team * 16);
    }
    plan.resident = resident_blocks(reinterpret_cast<const void*>(plan.kernel), plan.threads, plan.shared_bytes);
    return plan;
}

// Elements from the first of a matrix to behind its last.
int64_t extent(const Matrix& matrix, int64_t rows, int64_t columns) {
    return matrix.data && rows > 0 ? (rows - 1) * matrix.row_stride + columns : 0;
}

// How the units of a layer are cut; they depend on its sizes alone.
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
    const int64_t at_once = cut.statistics ? statistics_columns * bytes : 16;
    const auto may_be_read = [&](const void* first) { return reinterpret_cast<uintptr_t>(first) % at_once == 0; };
    const bool rows_too =
        cut.rows <= 1 || (cut.row_stride * bytes % at_once == 0 && cut.columns * bytes % at_once == 0);
    cut.aligned = may_be_read(cut.data) && may_be_read(cut.gradient) && rows_too;
    if (cut.statistics) {
        cut.unit_columns = 32 * statistics_columns;
        cut.row_parts = static_cast<int>(smaller(at_least(cut.rows / 64, 1), 16));
    } else {
        constexpr int64_t most_units = 2048;
        cut.unit_columns = at_least(divide_up(divide_up(cut.columns, 32 * n), most_units), 8) * 32 * n;
        const int64_t wide = at_least(divide_up(cut.columns, cut.unit_columns), 1);
        const int64_t parts = smaller(at_least(most_units / wide, 1), divide_up(cut.rows * cut.columns, 4096));
        cut.row_parts = static_cast<int>(at_least(smaller(parts, cut.rows), 1));
    }
    cut.unit_rows = at_least(divide_up(cut.rows, cut.row_parts), 1);
    cut.column_parts = static_cast<int>(divide_up(cut.columns, cut.unit_columns));
    return cut;
}

// Where in the workspace the parts of the call leave what they have summed.
class Workspace {
  public:
    explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}
    template <class T>
    T* take(int64_t count) {
        char* at = memory_ ? memory_ + bytes_ : nullptr;
        bytes_ += divide_up(count * int64_t(sizeof(T)), 64) * 64;
        return reinterpret_cast<T*>(at);
    }
    int64_t bytes() const { return bytes_; }

  private:
    char* memory_;
    int64_t bytes_ = 0;
};

// Layers that go with the rows' launch; more than fit go before, by themselves.
int64_t first_layer_of_last_launch(const KdL1Loss& job) {
    const int64_t count = job.activations.layer_count;
    return count > 0 ? (count - 1) / layers_of_launch * layers_of_launch : 0;
}

class Launches {
  public:
    Launches(const KdL1Loss& job, const CudaPlace* place)
        : job_(job), place_(place), plan_(plan_of(job)), workspace_(job.workspace) {
        launch_ = {};
        launch_.carried = workspace_.take<double>(2);
        launch_.slices = slices();
        slice_groups_ = static_cast<int>(smaller(job.rows, at_least(plan_.resident / launch_.slices, 1)));
        launch_.slices_workspace = reinterpret_cast<char*>(
            workspace_.take<SliceRecord>(launch_.slices > 1 ? int64_t(slice_groups_) * 2 * launch_.slices : 0));
        launch_.block_terms = workspace_.take<RowTerms>(plan_.resident);
        fixed_bytes_ = workspace_.bytes();
    }

    // The bytes that the largest launch needs. With a place, launches too.
    int64_t run() {
        int64_t most = fixed_bytes_;
        const int64_t last = first_layer_of_last_launch(job_);
        for (int64_t first = 0; first <= last; first += layers_of_launch) {
            Workspace workspace = workspace_;
            set_layers(first, workspace);
            most = at_least(most, workspace.bytes());
            if (!place_) continue;
            launch_.carries = first > 0, launch_.finishes = first == last;
            set_rows(first == last);
            start();
        }
        return most;
    }

  private:
    // Blocks that share a row, where there are too few rows to employ all.
    int slices() const {
        if (plan_.kept || !job_.student.data || job_.rows == 0) return 1;
        const int64_t blocks = at_least(plan_.resident / job_.rows, 1);
        return static_cast<int>(smaller(smaller(blocks, at_least(job_.classes / shortest_slice, 1)), most_slices));
    }

    void set_layers(int64_t first, Workspace& workspace) {
        launch_.layer_count = static_cast<int>(smaller(job_.activations.layer_count - first, layers_of_launch));
        launch_.units = 0;
        int counter = 0;
        for (int i = 0; i < launch_.layer_count; ++i) {
            LayerLaunch& layer = launch_.layers[i];
            layer = layer_of(job_, job_.activations.layers[first + i]);
            if (layer.statistics && counter + layer.column_parts > part_counter_count) {
                layer.row_parts = 1, layer.unit_rows = at_least(layer.rows, 1);
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
        launch_.rows = job_.rows, launch_.row_count = double(job_.rows);
        launch_.classes = job_.classes;
        launch_.classes_of_slice = static_cast<int>(divide_up(divide_up(job_.classes, launch_.slices), 64) * 64);
        launch_.vectors_of_side = plan_.vectors_of_side, launch_.vectors_of_team = plan_.vectors_of_team;
        launch_.student = with_rows ? job_.student : Matrix{nullptr, ElementType::float32, 0};
        launch_.teacher = job_.teacher;
        const auto adjoins = [&](const Matrix& matrix) { return !matrix.data || matrix.row_stride == job_.classes; };
        launch_.rows_adjoin = adjoins(job_.student) && adjoins(job_.teacher) &&
                              job_.classes * size_of(job_.student.type) % bytes_of_sector != 0;
        launch_.student_elements = extent(job_.student, job_.rows, job_.classes);
        launch_.teacher_elements = extent(job_.teacher, job_.rows, job_.classes);
        launch_.labels = job_.labels, launch_.ignore_index = job_.ignore_index;
        launch_.count_labels = with_rows && job_.labels && job_.student.data;
        launch_.rule = row_params(job_);
        launch_.scaled_gradients = job_.scaled_gradients;
        launch_.exp_reuse = choose_exp_reuse(job_);
        launch_.gradient = static_cast<char*>(job_.logits_gradient);
        launch_.alpha = job_.alpha, launch_.inverse_temperature = 1 / job_.temperature;
        launch_.result_type = job_.result_type, launch_.loss = job_.loss, launch_.terms = job_.terms;
        launch_.statistics_stride = job_.activations.statistics_stride;
        launch_.label_counter = reinterpret_cast<unsigned long long*>(place_->counters);
        launch_.done_counter = place_->counters + 2;
        launch_.slice_counters = place_->counters + counters_at_front;
        launch_.counters = launch_.slice_counters + slice_counter_count;
    }

    // As many blocks as run at once, or fewer.
    void start() {
        const int64_t of_rows = launch_.student.data ? divide_up(job_.rows, plan_.rows_of_block) * launch_.slices : 0;
        const int64_t of_units = divide_up(launch_.units, plan_.threads / 32);
        int64_t blocks = smaller(at_least(at_least(of_rows, of_units), 1), plan_.resident);
        if (launch_.slices > 1) blocks = slice_groups_ * launch_.slices;
        launch_.row_groups = static_cast<unsigned>(blocks / launch_.slices);
        const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(plan_.threads));
        if (launch_.count_labels || launch_.slices > 1)
            KDDP_LAUNCH_COOPERATIVE(plan_.kernel, grid, block, plan_.shared_bytes, place_->stream, launch_);
        else
            KDDP_LAUNCH(plan_.kernel, grid, block, plan_.shared_bytes, place_->stream, launch_);
    }

    const KdL1Loss& job_;
    const CudaPlace* place_;
    Plan plan_;
    Workspace workspace_;
    LossLaunch launch_;
    int slice_groups_;
    int64_t fixed_bytes_;
};

}  // namespace

int64_t cuda_kd_l1_loss_workspace(const KdL1Loss& job) { return Launches(job, nullptr).run(); }

void cuda_kd_l1_loss(const KdL1Loss& job, const CudaPlace& place) { Launches(job, &place).run(); }

}  // namespace kddp
