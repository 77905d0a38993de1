// The fused loss on the CPU: one parallel loop over blocks of rows of logits and tiles of activations.
//
// Compiled once for each instruction set. Blocks, tiles and chunks depend on the sizes alone and their sums are added
// in order, so the result does not depend on the number of threads.
#include "kddp/kd_l1_loss.h"

#include "cpu/activation_tile.h"
#include "cpu/isa.h"
#include "cpu/logits_row.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace kddp {
namespace {

// Larger gradients do not stay in the caches until they are read, and are written past them.
bool worth_past_caches(int64_t bytes) { return bytes >= 4 << 20; }

int thread_number() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// How the work is divided, and where in the workspace its parts store their sums.
struct Schedule {
    explicit Schedule(const KdL1Loss& job) : job(job) {
        block_rows = clamp(65536 / (job.classes > 0 ? job.classes : 1), 1, 64);
        logits_blocks = job.student.data ? divide_up(job.rows, block_rows) : 0;
        int64_t most_rows = 0;
        for (int64_t i = 0; i < job.activations.layer_count; ++i)
            most_rows = std::max(most_rows, job.activations.layers[i].rows);
        statistics_parts = clamp(most_rows / 64, 1, 8);
        for (int64_t i = 0; i < job.activations.layer_count; ++i) tiles += tiles_of(job.activations.layers[i]);

        Workspace whole(job.workspace), of_thread(nullptr);
        computes_in_double(job) ? (void)take_scratch<double>(of_thread) : (void)take_scratch<float>(of_thread);
        scratch_bytes = of_thread.bytes();
        whole.take<char>(scratch_bytes * job.threads);
        terms = whole.take<RowTerms>(logits_blocks);
        tile_sums = whole.take<double>(tiles);
        partial_statistics = whole.take<double>(
            statistics_parts > 1 ? statistics_parts * statistics_rows * job.activations.statistics_stride : 0);
        bytes = whole.bytes();
    }

    // Whole rows if there are no statistics by column, because memory is read fastest sequentially.
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
    RowScratch<T> take_scratch(Workspace& from) const {
        const bool mixes = has_second_pass(job.divergence), rereads = job.standardize_logits || mixes;
        const bool targets = has_targets(job);
        const bool separate = choose_exp_reuse(job) == ExpReuse::separate || job.standardize_logits || targets;
        const int64_t kept = kept_places<T>(job.classes), of_chunk = chunk_classes(job.classes);
        const int64_t reread = rereads ? of_chunk : 0, chunks = divide_up(job.classes + lanes<T>, of_chunk);
        // Evaluated in this order.
        return {{from.take<T>(kept), from.take<T>(kept), from.take<T>(separate ? kept : 0),
                 from.take<T>(targets ? kept : 0)},
                {from.take<T>(reread), from.take<T>(reread), nullptr, nullptr},
                from.take<ChunkSums>(chunks),
                from.take<MixtureSums>(mixes ? chunks : 0)};
    }

    // The working memory of this thread.
    template <class T>
    RowScratch<T> scratch() const {
        Workspace own(static_cast<char*>(job.workspace) + scratch_bytes * thread_number());
        return take_scratch<T>(own);
    }

    const KdL1Loss& job;
    int64_t block_rows, logits_blocks, statistics_parts, tiles = 0, scratch_bytes, bytes;
    RowTerms* terms;  // of each block of rows
    double* tile_sums;
    double* partial_statistics;
};

// Tile `index`; the tiles of all layers are numbered layer by layer.
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
    schedule.tile_sums[index] = activation_tile(*layer, tile, gradient, worth_past_caches(bytes), sums);
    if (!layer->statistics) return;
    double* target = layer->statistics;
    if (parts > 1) {
        const int64_t offset = layer->statistics - job.activations.layers[0].statistics;
        target = schedule.partial_statistics + part * statistics_rows * job.activations.statistics_stride + offset;
    }
    for (int64_t k = 0; k < statistics_rows; ++k)
        std::memcpy(target + k * job.activations.statistics_stride + column, sums.of[k],
                    (tile.last_column - column) * sizeof(double));
}

// Adds the partial sums of one column of the statistics block, in order.
void combine_statistics(const Schedule& schedule, int64_t column) {
    const int64_t stride = schedule.job.activations.statistics_stride;
    const double* partial = schedule.partial_statistics;
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
    RowTerms sum{};
    for (int64_t block = 0; block < schedule.logits_blocks; ++block) sum = sum + schedule.terms[block];
    double loss = 0, l1 = 0;
    if (job.alpha != 0) loss += job.alpha * sum.kd;
    if (job.alpha != 1) loss += (1 - job.alpha) * sum.ce;
    const double* tile_sums = schedule.tile_sums;
    for (int64_t i = 0; i < job.activations.layer_count; ++i) {
        const ActivationLayer& layer = job.activations.layers[i];
        double l1_of_layer = 0;
        for (int64_t tile = 0; tile < schedule.tiles_of(layer); ++tile) l1_of_layer += *tile_sums++;
        l1_of_layer /= layer.samples;
        l1 += l1_of_layer;
        if (layer.l1_weight != 0) loss += layer.l1_weight * l1_of_layer;
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

// Checks all labels, before anything is written.
Status count_valid_rows(const KdL1Loss& job, int64_t& valid) {
    valid = job.rows;
    if (!job.labels) return {};
    for (int64_t row = 0; row < job.rows; ++row) {
        const int64_t label = job.labels[row];
        if (label == job.ignore_index)
            --valid;
        else if (label < 0 || label >= job.classes)
            return {Status::label_out_of_range, row, label};
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

// The loops for each call

// Calls body(form) with the LossForm of a call with a teacher.
template <Distillation distillation, class Body>
void dispatch_cross_entropy(const KdL1Loss& job, Body body) {
    if (job.standardize_logits)
        return has_labels(job) ? body(LossForm<distillation, CrossEntropy::separate, true>{})
                               : body(LossForm<distillation, CrossEntropy::absent, true>{});
    if (!has_labels(job)) return body(LossForm<distillation, CrossEntropy::absent, false>{});
    if (choose_exp_reuse(job) == ExpReuse::separate)
        return body(LossForm<distillation, CrossEntropy::separate, false>{});
    body(LossForm<distillation, CrossEntropy::power, false>{});
}

template <class Body>
void dispatch_form(const KdL1Loss& job, Body body) {
    if (!job.teacher.data) return body(LossForm<Distillation::none, CrossEntropy::power, false>{});
    switch (job.divergence) {
        case Divergence::reverse_kl:
        case Divergence::symmetric_kl:
            return dispatch_cross_entropy<Distillation::reverse>(job, body);
        case Divergence::mixture:
            return dispatch_cross_entropy<Distillation::mixture>(job, body);
        default:
            return dispatch_cross_entropy<Distillation::forward>(job, body);
    }
}

// Calls body(element, form), with an element of the gradient that the loops write.
template <class Body>
void dispatch(const KdL1Loss& job, Body body) {
    dispatch_form(job, [&](auto form) {
#if defined(KDDP_BFLOAT16_ONLY)
        body(BFloat16(), form);
#else
        if (computes_in_double(job)) return body(double(), form);
        with_element(job.student.type, [&](auto element) {
            if constexpr (!std::is_same_v<decltype(element), double>) body(element, form);
        });
#endif
    });
}

template <class T>
ReadChunk<T> convert_chunk_of(ElementType type) {
    return with_element(type, [](auto element) -> ReadChunk<T> { return convert_chunk<T, decltype(element)>; });
}

// The loops that read logits of type Element.
template <class T, class Element, class Form, bool keep>
void set_reading_kernels(RowKernels<T>& kernels) {
    constexpr bool shifts = Form::distillation == Distillation::forward && !Form::standardized &&
                            Form::cross_entropy != CrossEntropy::separate && has_exp2_of_shifted<T>;
    kernels.highest_of = highest_of<T, Element>;
    kernels.exponentiate[0] = exponentiate_chunk<T, Element, Form, false, keep>;
    if constexpr (!keep) kernels.recompute_gradient[0] = recompute_gradient<T, Element, Form, false>;
    if constexpr (shifts) {
        kernels.exponentiate[1] = exponentiate_chunk<T, Element, Form, true, keep>;
        if constexpr (!keep) kernels.recompute_gradient[1] = recompute_gradient<T, Element, Form, true>;
    }
}

// A term of weight 0 has no gradient, rather than 0 times a gradient that may be infinite.
template <class T, class Element, Distillation distillation>
auto write_gradient_of(const KdL1Loss& job) {
    // add_projection and subtract_targets write their terms where the untempered exponentials were.
    const bool standardized = distillation != Distillation::none && job.standardize_logits;
    if (standardized) return write_gradient<T, Element, distillation, ExpReuse::separate>;
    if (!has_labels(job) || job.alpha == 1) return write_gradient<T, Element, distillation, ExpReuse::absent>;
    if (has_targets(job)) return write_gradient<T, Element, distillation, ExpReuse::separate>;
    const ExpReuse reuse = choose_exp_reuse(job);
    if (reuse == ExpReuse::same) return write_gradient<T, Element, distillation, ExpReuse::same>;
    if constexpr (sizeof(T) == 4) {
        if (reuse == ExpReuse::square) return write_gradient<T, Element, distillation, ExpReuse::square>;
        if (reuse == ExpReuse::fourth) return write_gradient<T, Element, distillation, ExpReuse::fourth>;
    }
    return write_gradient<T, Element, distillation, ExpReuse::separate>;
}

template <class Element, class Form>
RowKernels<ComputedIn<Element>> row_kernels(const KdL1Loss& job, Element, Form) {
    using T = ComputedIn<Element>;
    const ElementType student = job.student.type, teacher = job.teacher.type;
    RowKernels<T> kernels{};
    kernels.convert_student = kernels.read_student = convert_chunk_of<T>(student);
    kernels.convert_teacher = kernels.read_teacher = convert_chunk_of<T>(teacher);
    const bool labels_in_place = job.soft_labels.type == type_of_element<T>;
    kernels.read_soft_labels = labels_in_place ? view_chunk<T, T> : convert_chunk_of<T>(job.soft_labels.type);

    // Logits are read where they are if both sides have one type and nothing modifies them, as dkd does, or sums them.
    const bool dkd = job.teacher.data && job.divergence == Divergence::dkd;
    const bool same_types = !job.teacher.data || teacher == student;
    constexpr bool reads_16_bits =
        sizeof(Element) == 2 && Form::distillation == Distillation::forward && !Form::standardized;
    // Long rows are exponentiated twice instead of being stored, unless a term has the weight 0 (see below).
    const bool weightless = (job.teacher.data && job.alpha == 0) || (has_labels(job) && job.alpha == 1);
    const bool targets = has_targets(job);
    const bool keep = job.classes <= longest_kept_row || weightless || !same_types || dkd || targets;
    const auto read_in_place = [&](auto element) {
        using Read = decltype(element);
        if (!dkd && student == type_of_element<Read>) kernels.read_student = view_chunk<T, Read>;
        if (!dkd && teacher == type_of_element<Read>) kernels.read_teacher = view_chunk<T, Read>;
        constexpr bool twice = Form::distillation == Distillation::forward && !Form::standardized && sizeof(T) == 4;
        if constexpr (twice && std::is_same_v<Read, Element>)
            if (!keep) return set_reading_kernels<T, Read, Form, false>(kernels);
        set_reading_kernels<T, Read, Form, true>(kernels);
    };
    if (same_types && !dkd && job.label_smoothing == 0 && !targets)
        read_in_place(std::conditional_t<reads_16_bits, Element, T>{});
    else
        read_in_place(T{});
    if constexpr (Form::distillation == Distillation::mixture) kernels.mix = mix_chunk<T, Form::standardized>;
    if constexpr (Form::distillation == Distillation::reverse) kernels.mix = symmetrize_chunk<T, Form::standardized>;

    // A mixture has replaced the teacher's exponentials by weights like those of reverse_kl.
    constexpr Distillation side =
        Form::distillation == Distillation::mixture ? Distillation::reverse : Form::distillation;
    if (job.alpha == 0)
        kernels.write_gradient = write_gradient_of<T, Element, Distillation::none>(job);
    else if (job.divergence == Divergence::symmetric_kl)
        kernels.write_gradient = write_gradient_of<T, Element, Distillation::forward>(job);
    else
        kernels.write_gradient = write_gradient_of<T, Element, side>(job);
    if constexpr (sizeof(T) == 8)
        with_element(student, [&](auto element) {
            using Read = decltype(element);
            if constexpr (!std::is_same_v<Read, T>) kernels.convert_gradient = convert_gradient<Read>;
        });
    return kernels;
}

template <class T>
void logits_block(const Schedule& schedule, const LogitsRows<T>& rows, int64_t block) {
    const RowScratch<T> scratch = schedule.scratch<T>();
    const int64_t first = block * schedule.block_rows, last = smaller(first + schedule.block_rows, schedule.job.rows);
    RowTerms sum{};
    for (int64_t row = first; row < last; ++row) sum = sum + rows(row, scratch);
    schedule.terms[block] = sum;
}

template <class T>
void run(const KdL1Loss& job, const RowKernels<T>& kernels, int64_t valid_rows) {
    advise_outputs(job);
    const Schedule schedule(job);
    const LogitsRows<T> rows(job, kernels, valid_rows, writes_past_caches(job));
    const int64_t parts = schedule.logits_blocks + schedule.tiles;
    const bool combine =
        schedule.statistics_parts > 1 && job.activations.layer_count && job.activations.layers[0].statistics;
    const int64_t columns = combine ? job.activations.statistics_stride : 0;
#pragma omp parallel num_threads(job.threads) if (job.threads > 1 && parts > 1)
    {
#pragma omp for schedule(dynamic)
        for (int64_t part = 0; part < parts; ++part) {
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

// Without a teacher the temperature has no effect; 1 then serves all of them with one loop.
KdL1Loss simplified(KdL1Loss job) {
    if (!job.teacher.data) job.temperature = 1;
    return job;
}

int64_t workspace(const KdL1Loss& job) { return Schedule(simplified(job)).bytes; }

Status forward(const KdL1Loss& given) {
    const KdL1Loss job = simplified(given);
    int64_t valid_rows;
    const Status status = count_valid_rows(job, valid_rows);
    if (status.code == Status::ok)
        dispatch(job, [&](auto element, auto form) { run(job, row_kernels(job, element, form), valid_rows); });
    return status;
}

}  // namespace

// The build names these after the instruction set.
const Kernels KDDP_ISA_KERNELS = {KDDP_ISA_NAME, workspace, forward};

}  // namespace kddp
