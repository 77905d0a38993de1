// The fused loss on the CPU: one parallel loop over blocks of logits rows and tiles of activations together.
//
// Compiled once for each instruction set. Blocks and tiles depend on the sizes alone and their sums are
// combined in order, so the result does not depend on the number of threads.
#include "kddp/kd_l1_loss.h"

#include "cpu/activation_tile.h"
#include "cpu/huge_pages.h"
#include "cpu/kernels.h"
#include "cpu/logits_row.h"
#include "cpu/sizes.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace kddp {
namespace {

// A gradient that the caches cannot hold until it is read is written past them.
inline bool worth_past_caches(int64_t bytes) { return bytes >= 4 << 20; }

inline int thread_number() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// How the work is cut, and where in the workspace its parts leave their sums.
struct Schedule {
    explicit Schedule(const KdL1Loss& job) : job(job) {
        block_rows = clamp(65536 / (job.classes > 0 ? job.classes : 1), 1, 64);
        shares_rows = job.threads > 1 && job.student.data && job.rows < job.threads &&
                      job.classes >= 2 * piece_classes(job.classes);
        if (shares_rows) block_rows = 1;
        logits_blocks = job.student.data ? divide_up(job.rows, block_rows) : 0;
        int64_t most_rows = 0;
        for (int64_t i = 0; i < job.activations.layer_count; ++i)
            if (job.activations.layers[i].rows > most_rows) most_rows = job.activations.layers[i].rows;
        statistics_parts = clamp(most_rows / 64, 1, 8);
        for (int64_t i = 0; i < job.activations.layer_count; ++i) tiles += tiles_of(job.activations.layers[i]);

        computes_in_double(job) ? size_scratch<double>() : size_scratch<float>();
        terms_offset = scratch_bytes * job.threads;
        tiles_offset = terms_offset + round_up_to_line(logits_blocks * int64_t(sizeof(RowTerms)));
        statistics_offset = tiles_offset + round_up_to_line(tiles * int64_t(sizeof(double)));
        const int64_t partial =
            statistics_parts > 1 ? statistics_parts * statistics_rows * job.activations.statistics_stride : 0;
        bytes = statistics_offset + round_up_to_line(partial * int64_t(sizeof(double)));
    }

    // Whole rows where nothing is summed by column, for memory is read fastest from end to end.
    static int64_t columns_of_tile(const ActivationLayer& layer) {
        return layer.statistics ? tile_columns : (layer.neurons > 0 ? layer.neurons : 1);
    }
    static int64_t column_parts(const ActivationLayer& layer) {
        return divide_up(layer.neurons, columns_of_tile(layer));
    }
    int64_t row_parts(const ActivationLayer& layer) const {
        return layer.statistics ? statistics_parts
                                : divide_up(layer.rows, clamp(65536 / columns_of_tile(layer), 1, 256));
    }
    int64_t tiles_of(const ActivationLayer& layer) const { return row_parts(layer) * column_parts(layer); }

    template <class T>
    void size_scratch() {
        kept_bytes = round_up_to_line(buffer_places<T>(job.classes) * int64_t(sizeof(T)));
        kept_streams = choose_exp_reuse(job) == ExpReuse::separate ? 3 : 2;
        const bool mixes = job.divergence == Divergence::jsd, reads_again = job.standardize_logits || mixes;
        const int64_t of_piece = piece_classes(job.classes);
        logits_bytes = reads_again ? of_piece * int64_t(sizeof(T)) : 0;
        const int64_t pieces = divide_up(job.classes + lanes<T>, of_piece);
        sums_bytes = round_up_to_line(pieces * int64_t(sizeof(ChunkSums)));
        mixture_bytes = mixes ? round_up_to_line(pieces * int64_t(sizeof(MixtureSums))) : 0;
        scratch_bytes = kept_streams * kept_bytes + 2 * logits_bytes + sums_bytes + mixture_bytes;
    }

    // What a thread works its rows in.
    template <class T>
    RowScratch<T> scratch() const {
        const int64_t kept = scratch_bytes * thread_number(), logits = kept + kept_streams * kept_bytes;
        const int64_t sums = logits + 2 * logits_bytes;
        return {{at<T>(kept), at<T>(kept + kept_bytes), at<T>(kept + 2 * kept_bytes)},
                {at<T>(logits), at<T>(logits + logits_bytes), nullptr},
                at<ChunkSums>(sums),
                at<MixtureSums>(sums + sums_bytes)};
    }

    template <class T>
    T* at(int64_t offset) const {
        return reinterpret_cast<T*>(static_cast<char*>(job.workspace) + offset);
    }

    const KdL1Loss& job;
    int64_t block_rows, logits_blocks, statistics_parts, tiles = 0;
    int64_t kept_bytes, kept_streams, logits_bytes, sums_bytes, mixture_bytes, scratch_bytes;
    bool shares_rows;  // all threads work at one row, for there are fewer rows than threads
    int64_t terms_offset, tiles_offset, statistics_offset, bytes;
};

template <class T>
void logits_block(const Schedule& schedule, const LogitsRows<T>& rows, int64_t block) {
    const RowScratch<T> scratch = schedule.scratch<T>();
    const int64_t first = block * schedule.block_rows;
    RowTerms sum;
    for (int64_t row = first; row < first + schedule.block_rows && row < schedule.job.rows; ++row) {
        const RowTerms terms = rows(row, scratch);
        sum.kd += terms.kd, sum.ce += terms.ce, sum.correct += terms.correct;
    }
    schedule.at<RowTerms>(schedule.terms_offset)[block] = sum;
}

// Tile `index` of all layers' tiles, which are numbered layer by layer.
void activation_part(const Schedule& schedule, int64_t index) {
    const KdL1Loss& job = schedule.job;
    const ActivationLayer* layer = job.activations.layers;
    int64_t within = index;
    for (; within >= schedule.tiles_of(*layer); ++layer) within -= schedule.tiles_of(*layer);
    const int64_t parts = schedule.row_parts(*layer), width = Schedule::columns_of_tile(*layer);
    const int64_t part = within / Schedule::column_parts(*layer);
    const int64_t column = within % Schedule::column_parts(*layer) * width;
    const Tile tile{layer->rows * part / parts, layer->rows * (part + 1) / parts, column,
                    column + width < layer->neurons ? column + width : layer->neurons};
    TileSums sums;
    if (layer->statistics) std::memset(&sums, 0, sizeof sums);
    const int64_t bytes = layer->rows * layer->neurons * size_of(layer->activation.type);
    const double gradient = job.scaled_gradients ? 1 : layer->l1_weight / layer->samples;
    schedule.at<double>(schedule.tiles_offset)[index] =
        activation_tile(*layer, tile, gradient, worth_past_caches(bytes), sums);
    if (!layer->statistics) return;
    double* target = layer->statistics;
    if (parts > 1) {
        const int64_t offset = layer->statistics - job.activations.layers[0].statistics;
        target = schedule.at<double>(schedule.statistics_offset) +
                 part * statistics_rows * job.activations.statistics_stride + offset;
    }
    for (int64_t k = 0; k < statistics_rows; ++k)
        std::memcpy(target + k * job.activations.statistics_stride + column, sums.of[k],
                    (tile.last_column - column) * sizeof(double));
}

// Adds up, in their order, what the parts of the rows left for one column of the statistics block.
void combine_statistics(const Schedule& schedule, int64_t column) {
    const int64_t stride = schedule.job.activations.statistics_stride;
    const double* partial = schedule.at<double>(schedule.statistics_offset);
    double* result = schedule.job.activations.layers[0].statistics;
    for (int64_t k = 0; k < statistics_rows; ++k) {
        double value = 0;
        for (int64_t part = 0; part < schedule.statistics_parts; ++part) {
            const double other = partial[(part * statistics_rows + k) * stride + column];
            value = k == statistics_rows - 1 ? (other > value ? other : value) : value + other;
        }
        result[k * stride + column] = value;
    }
}

void write_results(const Schedule& schedule) {
    const KdL1Loss& job = schedule.job;
    RowTerms sum;
    for (int64_t block = 0; block < schedule.logits_blocks; ++block) {
        const RowTerms& terms = schedule.at<RowTerms>(schedule.terms_offset)[block];
        sum.kd += terms.kd, sum.ce += terms.ce, sum.correct += terms.correct;
    }
    double loss = 0, l1 = 0;
    if (job.alpha != 0) loss += job.alpha * sum.kd;
    if (job.alpha != 1) loss += (1 - job.alpha) * sum.ce;
    const double* of_tile = schedule.at<double>(schedule.tiles_offset);
    for (int64_t i = 0; i < job.activations.layer_count; ++i) {
        const ActivationLayer& layer = job.activations.layers[i];
        double of_layer = 0;
        for (int64_t tile = 0; tile < schedule.tiles_of(layer); ++tile) of_layer += *of_tile++;
        of_layer /= layer.samples;
        l1 += of_layer;
        if (layer.l1_weight != 0) loss += layer.l1_weight * of_layer;
    }
    const double terms[] = {sum.kd, sum.ce, l1, sum.correct};
    if (job.result_type == ElementType::float64) {
        *static_cast<double*>(job.loss) = loss;
        if (job.terms) std::memcpy(job.terms, terms, sizeof terms);
    } else {
        *static_cast<float*>(job.loss) = float(loss);
        for (int i = 0; job.terms && i < 4; ++i) static_cast<float*>(job.terms)[i] = float(terms[i]);
    }
}

// Labels are checked before anything is written.
Status count_valid_rows(const KdL1Loss& job, int64_t& valid) {
    valid = job.rows;
    if (!job.labels) return {};
    for (int64_t row = 0; row < job.rows; ++row) {
        const int64_t label = job.labels[row];
        if (label == job.ignore_index) {
            --valid;
        } else if (label < 0 || label >= job.classes) {
            return {Status::label_out_of_range, row, label};
        }
    }
    return {};
}

bool writes_past_caches(const KdL1Loss& job) {
    return worth_past_caches(job.rows * job.classes * size_of(job.student.type)) &&
           reinterpret_cast<uintptr_t>(job.logits_gradient) % line_bytes == 0 && job.classes >= shortest_aligned_row;
}

void advise_outputs(const KdL1Loss& job) {
    advise_huge_pages(job.logits_gradient, job.rows * job.classes * size_of(job.student.type));
    for (int64_t i = 0; i < job.activations.layer_count; ++i) {
        const ActivationLayer& layer = job.activations.layers[i];
        advise_huge_pages(layer.gradient, layer.rows * layer.neurons * size_of(layer.activation.type));
    }
}

template <class T>
void run(const KdL1Loss& job, int64_t valid_rows) {
    advise_outputs(job);
    const Schedule schedule(job);
    const LogitsRows<T> rows(job, valid_rows, writes_past_caches(job), schedule.shares_rows);
    int64_t first_part = 0;
    if (schedule.shares_rows) {
        for (; first_part < job.rows; ++first_part)
            schedule.at<RowTerms>(schedule.terms_offset)[first_part] =
                rows.together(first_part, schedule.scratch<T>(), [&] { return schedule.scratch<T>(); });
    }
    const int64_t parts = schedule.logits_blocks + schedule.tiles;
    const bool combine =
        schedule.statistics_parts > 1 && job.activations.layer_count && job.activations.layers[0].statistics;
    const int64_t columns = combine ? job.activations.statistics_stride : 0;
#pragma omp parallel num_threads(job.threads) if (job.threads > 1 && parts > 1)
    {
#pragma omp for schedule(dynamic)
        for (int64_t part = first_part; part < parts; ++part) {
            if (part < schedule.logits_blocks)
                logits_block<T>(schedule, rows, part);
            else
                activation_part(schedule, part - schedule.logits_blocks);
        }
        finish_streams();
#pragma omp for
        for (int64_t column = 0; column < columns; ++column) combine_statistics(schedule, column);
    }
    write_results(schedule);
}

int64_t workspace(const KdL1Loss& job) { return Schedule(job).bytes; }

Status forward(const KdL1Loss& job) {
    int64_t valid_rows;
    const Status status = count_valid_rows(job, valid_rows);
    if (status.code != Status::ok) return status;
    computes_in_double(job) ? run<double>(job, valid_rows) : run<float>(job, valid_rows);
    return {};
}

}  // namespace

// The names of this translation unit's instruction set come from the build.
const Kernels KDDP_ISA_KERNELS = {KDDP_ISA_NAME, workspace, forward, &KDDP_ISA_COMPACTION};

}  // namespace kddp
