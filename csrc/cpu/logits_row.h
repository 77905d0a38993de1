// One row of logits: its loss terms and its gradient, chunk by chunk (row_math.h explains the mathematics).
//
// Up to `longest_kept_row` classes, the exponentials of all chunks are kept until the gradient is written. Longer rows
// keep those of one chunk only, and exponentiate every chunk again for the gradient.
#pragma once

#include <algorithm>

#include "cpu/softmax_chunk.h"
#include "kddp/kd_l1_loss.h"

namespace kddp {
namespace {

// Longer rows do not fit the second-level cache as exponentials.
constexpr int64_t longest_kept_row = 32768;

// Classes in a chunk. A chunk of a kept row fits the first-level cache; longer rows have larger ones, to merge fewer.
constexpr int64_t longest_chunk = 4096;
constexpr int64_t chunk_classes(int64_t classes) { return classes <= longest_kept_row ? 1024 : longest_chunk; }

// From this many classes on, the places of a row are aligned with the addresses of its gradient.
constexpr int64_t shortest_aligned_row = 256;

// The loops that serve a call. Loops with two versions: [0] subtracts the references from the logits, [1] shifts the
// exponent instead, which only some references and calls allow.
template <class T>
struct RowKernels {
    ReadChunk<T> read_student, read_teacher;        // as `exponentiate` wants its logits
    ReadChunk<T> convert_student, convert_teacher;  // to T
    ReadChunk<T> read_soft_labels;                  // to T, or where they are
    T (*highest_of)(const void* logits, Chunk, int64_t places);
    Highest<T> (*exponentiate[2])(const void* student, const void* teacher, const RowBuffers<T>&, const Chunk&,
                                  const LogitScale<T>&, const NextLogits&, ChunkSums&);
    void (*mix)(const void* student, const void* teacher, RowBuffers<T>, Chunk, LogitScale<T>, MixtureScale<T>,
                MixtureSums&);
    void (*write_gradient)(const RowBuffers<T>&, const Chunk&, const ChunkGradient<T>&);
    // Converts what `write_gradient` wrote, if it is of another type than the student's; otherwise absent.
    void (*convert_gradient)(const T* from, int64_t count, void* to);
    // Replaces `write_gradient` if `exponentiate` does not keep what it computes; otherwise absent.
    void (*recompute_gradient[2])(const void* student, const void* teacher, Chunk, LogitScale<T>, const ChunkSums&,
                                  const ChunkGradient<T>&);
};

// Places of a thread's buffer of exponentials.
template <class T>
constexpr int64_t kept_places(int64_t classes) {
    return classes <= longest_kept_row ? round_up_to_lanes<T>(classes + lanes<T>) : longest_chunk;
}

inline RowTerms operator+(const RowTerms& a, const RowTerms& b) {
    return {a.kd + b.kd, a.ce + b.ce, a.correct + b.correct};
}

// What the chunks of a row share.
struct RowState {
    double student_to_nats, teacher_to_nats;  // 1 / T, for standardized logits also divided by the row's deviation
    Moments student, teacher;
    const ChunkSums* sums;  // of the row
    ChunkTargets targets;   // of the row
    ChunkSums merged;       // if it has several chunks
    MixtureSums mixture;
    RowGradient gradient;
};

// Working memory of a thread.
template <class T>
struct RowScratch {
    RowBuffers<T> kept;    // exponentials: of a row, or of one chunk
    RowBuffers<T> logits;  // the logits of a chunk, for passes that read it again; the first two buffers
    ChunkSums* sums;       // of each chunk
    MixtureSums* mixture;  // of each chunk
};

template <class T>
class LogitsRows {
  public:
    LogitsRows(const KdL1Loss& job, const RowKernels<T>& kernels, int64_t valid_rows, bool past_caches)
        : kernels_(kernels),
          params_(params_of(job, valid_rows)),
          chunk_classes_(chunk_classes(job.classes)),
          kept_(job.classes <= longest_kept_row),
          past_caches_(past_caches) {}

    // Writes the gradient of a row and returns its terms, weighted and divided.
    RowTerms operator()(int64_t row, const RowScratch<T>& scratch) const {
        if (is_ignored(row)) {
            if (params_.logits_gradient)
                std::memset(gradient(row, 0), 0, params_.classes * size_of(params_.student.type));
            return {};
        }
        RowState state;
        begin(row, scratch, state);
        const int64_t chunks = chunks_of(row);
        for (int64_t k = 0; k < chunks; ++k) {
            ChunkTargets targets;
            exponentiate(row, k, state, buffers_of(k, scratch), scratch.sums[k], targets);
            if (params_.with_targets) add_targets(targets, k == 0, state.targets);
        }
        merge_sums(scratch.sums, chunks, state);
        if (mixes()) {
            for (int64_t k = 0; k < chunks; ++k) scratch.mixture[k] = mix(row, k, state, scratch.sums[k], scratch);
            merge_mixture(scratch.mixture, chunks, state);
        }
        const RowTerms terms = finish(row, state);
        if (params_.row_terms) store_terms(row, terms);
        for (int64_t k = 0; k < chunks && params_.logits_gradient; ++k) write(row, k, state, scratch.sums[k], scratch);
        return terms;
    }

  private:
    static RowParams params_of(const KdL1Loss& job, int64_t valid_rows) {
        RowParams params = row_params(job);
        set_scales(params, double(valid_rows));
        return params;
    }

    bool is_ignored(int64_t row) const {
        return (params_.labels && params_.labels[row] == params_.ignore_index) ||
               (weight_of(row, 0) == 0 && weight_of(row, 1) == 0);
    }

    // The weight of a row's kd (term 0) or ce (term 1).
    double weight_of(int64_t row, int term) const {
        return params_.row_weights ? params_.row_weights[term * params_.rows + row] : 1;
    }

    void store_terms(int64_t row, const RowTerms& terms) const {
        for (int term = 0; term < 2; ++term) {
            const double value = term == 0 ? terms.kd : terms.ce;
            const int64_t place = term * params_.rows + row;
            if (params_.result_type == ElementType::float64)
                static_cast<double*>(params_.row_terms)[place] = value;
            else
                static_cast<float*>(params_.row_terms)[place] = float(value);
        }
    }

    bool mixes() const { return params_.with_teacher && has_second_pass(params_.divergence); }
    bool excludes_label() const { return params_.with_teacher && params_.divergence == Divergence::dkd; }
    bool weighted() const {
        return params_.with_teacher && gradient_form(params_.divergence) == GradientForm::weighted;
    }
    int64_t label_of(int64_t row) const { return params_.labels ? params_.labels[row] : -1; }

    // The place of the row's first class.
    int64_t head_of(int64_t row) const {
        return params_.classes < shortest_aligned_row ? 0 : row * params_.classes % lanes<T>;
    }

    int64_t chunks_of(int64_t row) const { return divide_up(head_of(row) + params_.classes, chunk_classes_); }

    Chunk chunk_of(int64_t row, int64_t k) const {
        const int64_t head = k == 0 ? head_of(row) : 0, start = k == 0 ? 0 : k * chunk_classes_ - head_of(row);
        return {start, smaller(chunk_classes_ - head, params_.classes - start), head};
    }

    RowBuffers<T> buffers_of(int64_t k, const RowScratch<T>& scratch) const {
        return kept_ ? scratch.kept + k * chunk_classes_ : scratch.kept;
    }

    const char* element(const Matrix& matrix, int64_t row, int64_t column) const {
        return static_cast<const char*>(matrix.data) + (row * matrix.row_stride + column) * size_of(matrix.type);
    }

    char* gradient(int64_t row, int64_t column) const {
        return static_cast<char*>(params_.logits_gradient) +
               (row * params_.classes + column) * size_of(params_.student.type);
    }

    LogitScale<T> scale_of(const RowState& state) const {
        return {T(state.student_to_nats * log2_e), T(state.teacher_to_nats * log2_e), T(state.student_to_nats),
                T(state.teacher_to_nats),          T(log2_e * state.student.unit),    squarings_of(params_.exp_reuse)};
    }

    struct Logits {
        const void* student;
        const void* teacher;
    };

    // The logits of a chunk; those that must be converted go to the buffers.
    Logits read(int64_t row, Chunk chunk, const RowState& state, RowBuffers<T> buffers) const {
        Logits logits{in_unit(kernels_.read_student, kernels_.convert_student, params_.student, row, chunk,
                              state.student.unit, buffers.student),
                      nullptr};
        if (params_.with_teacher)
            logits.teacher = in_unit(kernels_.read_teacher, kernels_.convert_teacher, params_.teacher, row, chunk,
                                     state.teacher.unit, buffers.teacher);
        return logits;
    }

    // The logits of a chunk in multiples of `unit`.
    const void* in_unit(ReadChunk<T> read, ReadChunk<T> convert, const Matrix& matrix, int64_t row, Chunk chunk,
                        double unit, T* buffer) const {
        const char* from = element(matrix, row, chunk.start);
        if (unit == 1) return read(from, chunk, buffer);
        convert(from, chunk, buffer);
        for (int64_t i = chunk.head; i < chunk.end(); ++i) buffer[i] *= T(1 / unit);
        return buffer;
    }

    void pad_label(int64_t row, Chunk chunk, RowBuffers<T> buffers) const {
        const int64_t label = label_of(row) - chunk.start;
        if (excludes_label() && label >= 0 && label < chunk.count)
            buffers.student[chunk.head + label] = buffers.teacher[chunk.head + label] = padding<T>;
    }

    KDDP_NOINLINE void begin(int64_t row, const RowScratch<T>& scratch, RowState& state) const {
        state.student_to_nats = state.teacher_to_nats = 1 / params_.temperature;
        state.student = state.teacher = {};
        if (!params_.standardize) return;
        state.student = moments_of(params_.student, kernels_.convert_student, row, scratch.logits.student);
        state.teacher = moments_of(params_.teacher, kernels_.convert_teacher, row, scratch.logits.teacher);
        state.student_to_nats /= divisor_of(state.student);
        state.teacher_to_nats /= divisor_of(state.teacher);
    }

    Moments moments_of(const Matrix& matrix, ReadChunk<T> convert, int64_t row, T* buffer) const {
        RunningMoments running;
        for (int64_t k = 0; k < chunks_of(row); ++k) {
            const Chunk chunk = chunk_of(row, k);
            const void* values = convert(element(matrix, row, chunk.start), chunk, buffer);
            running.add(static_cast<const T*>(values), chunk);
        }
        return running.moments();
    }

    // The sums of a chunk, and its exponentials and targets in the buffers.
    KDDP_NOINLINE void exponentiate(int64_t row, int64_t k, const RowState& state, RowBuffers<T> buffers,
                                    ChunkSums& sums, ChunkTargets& targets) const {
        const Chunk chunk = chunk_of(row, k);
        const LogitScale<T> scale = scale_of(state);
        Logits logits = read(row, chunk, state, buffers);
        // kd_l1_loss.cpp has the student's logits read as T for these sums.
        sums.logits = 0;
        if (params_.with_targets)
            targets = targets_of(row, k, static_cast<const T*>(logits.student), buffers.targets);
        else if (params_.label_smoothing != 0)
            sums.logits = sum_of_chunk(static_cast<const T*>(logits.student), chunk, T(0), [](auto v) { return v; });
        pad_label(row, chunk, buffers);
        // The first vectors show where the highest logits are; if not, the chunk is done again. The weighted form takes
        // differences that a reference away from the highest logit would round.
        const int64_t places = weighted() ? longest_chunk : 4 * lanes<T>;
        set_references({kernels_.highest_of(logits.student, chunk, places),
                        params_.with_teacher ? kernels_.highest_of(logits.teacher, chunk, places) : T(0)},
                       scale, sums);
        const Highest<T> highest = kernels_.exponentiate[shifts(sums, scale)](logits.student, logits.teacher, buffers,
                                                                              chunk, scale, next_logits(row, k), sums);
        if (!reference_ok(highest.student, sums.student_reference, state.student_to_nats, state.student.unit) ||
            (params_.with_teacher &&
             !reference_ok(highest.teacher, sums.teacher_reference, state.teacher_to_nats, 1))) {
            logits = read(row, chunk, state, buffers);
            pad_label(row, chunk, buffers);
            set_references(highest, scale, sums);
            kernels_.exponentiate[shifts(sums, scale)](logits.student, logits.teacher, buffers, chunk, scale,
                                                       next_logits(row, k), sums);
        }
        sums.highest = double(highest.student);
    }

    KDDP_NOINLINE ChunkTargets targets_of(int64_t row, int64_t k, const T* logits, T* buffer) const {
        const Chunk chunk = chunk_of(row, k);
        const T* soft_labels = nullptr;
        const T* weights = static_cast<const T*>(params_.class_weights);
        if (params_.soft_labels.data)
            soft_labels = static_cast<const T*>(
                kernels_.read_soft_labels(element(params_.soft_labels, row, chunk.start), chunk, buffer));
        if (weights) weights += chunk.start - chunk.head;
        const auto [next_row, next_start] = next_of(row, k);
        return sum_targets(logits, soft_labels, weights, T(params_.target_share), T(params_.target_constant), chunk,
                           element(params_.soft_labels, next_row, next_start),
                           lanes<T> * size_of(params_.soft_labels.type), buffer);
    }

    static void add_targets(const ChunkTargets& chunk, bool is_first, ChunkTargets& row) {
        if (is_first) {
            row = chunk;
            return;
        }
        merge_targets(chunk.sums, row.sums);
        if (chunk.highest_label > row.highest_label) row.highest_label = chunk.highest_label, row.label = chunk.label;
    }

    // References must be finite: a row of -inf then has differences of -inf, and padding stays below it.
    void set_references(Highest<T> highest, const LogitScale<T>& scale, ChunkSums& sums) const {
        constexpr T lowest = padding<T> / 2;
        sums.student_reference = highest.student > lowest ? highest.student : lowest;
        sums.teacher_reference = highest.teacher > lowest ? highest.teacher : lowest;
        if (!shifts(sums, scale)) return;
        sums.student_reference =
            shift_of(sums.student_reference, scale.student_to_exponent) / scale.student_to_exponent;
        sums.teacher_reference =
            shift_of(sums.teacher_reference, scale.teacher_to_exponent) / scale.teacher_to_exponent;
    }

    // Whether the references are shifts of the exponent. A single class is not shifted, so that its exponential is 1.
    bool shifts(const ChunkSums& references, const LogitScale<T>& scale) const {
        return kernels_.exponentiate[1] && params_.classes > 1 &&
               may_shift(references.student_reference, scale.student_to_exponent) &&
               may_shift(references.teacher_reference, scale.teacher_to_exponent);
    }

    // Whether exponentials around this reference neither overflow nor lose digits.
    static bool reference_ok(T highest, double reference, double to_nats, double unit) {
        const double delta = std::abs(double(highest) - reference);
        return delta * unit <= 20 && delta * to_nats <= 20;
    }

    struct Position {
        int64_t row, column;
    };

    // The next chunk of this row, or the first chunk of the next row.
    Position next_of(int64_t row, int64_t k) const {
        const bool ends = k + 1 == chunks_of(row);
        return {ends && row + 1 < params_.rows ? row + 1 : row, ends ? 0 : chunk_of(row, k + 1).start};
    }

    NextLogits next_logits(int64_t row, int64_t k) const {
        const auto [next_row, start] = next_of(row, k);
        return {element(params_.student, next_row, start), element(params_.teacher, next_row, start),
                lanes<T> * size_of(params_.student.type), lanes<T> * size_of(params_.teacher.type)};
    }

    KDDP_NOINLINE void merge_sums(const ChunkSums* sums, int64_t chunks, RowState& state) const {
        state.sums = sums;
        if (chunks == 1) return;
        ChunkSums& row = state.merged;
        row = {};
        row.student_reference = row.teacher_reference = row.highest = -infinity<double>;
        for (int64_t k = 0; k < chunks; ++k) {
            row.student_reference = std::max(row.student_reference, sums[k].student_reference);
            row.teacher_reference = std::max(row.teacher_reference, sums[k].teacher_reference);
            row.highest = std::max(row.highest, sums[k].highest);
        }
        state.sums = &row;
        const GradientForm form = gradient_form(params_.divergence);
        for (int64_t k = 0; k < chunks; ++k) merge(sums[k], rebased(sums[k], state), form, row);
    }

    Rebase rebased(const ChunkSums& chunk, const RowState& state) const {
        return rebase(chunk, *state.sums, state.student_to_nats, state.teacher_to_nats, state.student.unit);
    }

    KDDP_NOINLINE MixtureSums mix(int64_t row, int64_t k, const RowState& state, const ChunkSums& of_chunk,
                                  const RowScratch<T>& scratch) const {
        const Chunk chunk = chunk_of(row, k);
        const RowBuffers<T> buffers = buffers_of(k, scratch);
        ChunkSums unused;
        ChunkTargets unused_targets;
        if (!kept_) exponentiate(row, k, state, buffers, unused, unused_targets);
        const Logits logits = read(row, chunk, state, scratch.logits);
        const Rebase by = rebased(of_chunk, state);
        MixtureScale<T> scale{};
        scale.student_reference = T(state.sums->student_reference);
        scale.teacher_reference = T(state.sums->teacher_reference);
        const bool symmetric = params_.divergence == Divergence::symmetric_kl;
        if (symmetric)
            set_symmetric(*state.sums, by, scale);
        else
            set_mixture(*state.sums, by, scale);
        MixtureSums sums;
        kernels_.mix(logits.student, logits.teacher, buffers, chunk, scale_of(state), scale, sums);
        if (symmetric) {
            sums.kl_teacher /=
                double(scale.teacher_probability) * state.sums->teacher;  // without the factor's rounding
            sums.weighted_moment /= state.sums->student;
        }
        return sums;
    }

    void set_mixture(const ChunkSums& row, const Rebase& by, MixtureScale<T>& scale) const {
        scale.student_probability = T(by.student_factor / row.student);
        scale.teacher_probability = T(by.teacher_factor / row.teacher);
        // From the rounded probabilities: a rounding shared by all classes would not average out.
        scale.log_ratio = T(std::log2(double(scale.teacher_probability) / double(scale.student_probability)) +
                            (by.student_tempered - by.teacher_tempered) * log2_e);
        scale.student_share = T(1 - params_.mixture.share), scale.teacher_share = T(params_.mixture.share);
        const MixtureSlopes slopes = mixture_slopes(params_.mixture);
        scale.has_slopes = slopes.present, scale.student_weight = T(params_.mixture.student_weight);
        scale.student_slope = T(slopes.student), scale.teacher_slope = T(slopes.teacher);
    }

    static void set_symmetric(const ChunkSums& row, const Rebase& by, MixtureScale<T>& scale) {
        scale.student_probability = T(by.student_factor);
        scale.teacher_probability = T(row.student / row.teacher);
        const double mean = row.dot / row.student;
        scale.student_share = std::isfinite(mean) ? 1 : 0;
        scale.log_ratio = std::isfinite(mean) ? T(mean) : 0;
    }

    KDDP_NOINLINE static void merge_mixture(const MixtureSums* chunks, int64_t count, RowState& state) {
        state.mixture = {};
        for (int64_t k = 0; k < count; ++k) {
            state.mixture.kl_teacher += chunks[k].kl_teacher, state.mixture.kl_student += chunks[k].kl_student;
            state.mixture.mean += chunks[k].mean, state.mixture.weighted_moment += chunks[k].weighted_moment;
        }
    }

    KDDP_NOINLINE RowTerms finish(int64_t row, RowState& state) const {
        const int64_t label = params_.soft_labels.data ? state.targets.label : label_of(row);
        TargetMargins target{};
        double label_logit = 0;
        if (label >= 0) {
            label_logit = logit(params_.student, kernels_.convert_student, row, label, state.student.unit);
            if (excludes_label())
                target = {(label_logit - state.sums->student_reference) * state.student_to_nats,
                          (logit(params_.teacher, kernels_.convert_teacher, row, label, state.teacher.unit) -
                           state.sums->teacher_reference) *
                              state.teacher_to_nats};
        }
        const double kd = finish_divergence(params_, *state.sums, state.mixture, state.student, target, label_logit,
                                            weight_of(row, 0), state.gradient);
        if (params_.with_targets && params_.labels)
            add_label(params_, label_logit, class_weight_of(label), state.targets.sums);
        const double ce = finish_cross_entropy(params_, *state.sums, state.targets.sums, state.student.unit,
                                               label_logit, weight_of(row, 1), state.gradient);
        const bool highest = label >= 0 && label_logit >= state.sums->highest;
        return {kd, ce, double(highest && !appears_before(row, label, T(label_logit * state.student.unit)))};
    }

    double class_weight_of(int64_t label) const { return double(static_cast<const T*>(params_.class_weights)[label]); }

    double logit(const Matrix& matrix, ReadChunk<T> convert, int64_t row, int64_t column, double unit) const {
        T vector[lanes<T>];
        in_unit(convert, convert, matrix, row, {column, 1, 0}, unit, vector);
        return double(vector[0]);
    }

    // Among several highest logits the first is the prediction, as in argmax.
    bool appears_before(int64_t row, int64_t end, T value) const {
        T buffer[64];
        for (int64_t start = 0; start < end; start += 64) {
            const Chunk chunk{start, smaller(64, end - start), 0};
            kernels_.convert_student(element(params_.student, row, start), chunk, buffer);
            for (int64_t i = 0; i < chunk.count; ++i)
                if (buffer[i] == value) return true;
        }
        return false;
    }

    KDDP_NOINLINE void write(int64_t row, int64_t k, const RowState& state, const ChunkSums& sums,
                             const RowScratch<T>& scratch) const {
        const Chunk chunk = chunk_of(row, k);
        const RowBuffers<T> buffers = buffers_of(k, scratch);
        const LogitScale<T> scale = scale_of(state);
        ChunkGradient<T> of;
        set_coefficients(row, chunk, sums, state, of);
        if (const auto recompute = kernels_.recompute_gradient[shifts(sums, scale)]) {
            const Logits logits = read(row, chunk, state, buffers);
            recompute(logits.student, logits.teacher, chunk, scale, sums, of);
            return;
        }
        ChunkSums unused;
        ChunkTargets unused_targets;
        if (!kept_ && mixes())
            mix(row, k, state, sums, scratch);
        else if (!kept_)
            exponentiate(row, k, state, buffers, unused, unused_targets);
        if (params_.with_targets && params_.alpha != 1) {
            subtract_targets(buffers, chunk, params_.exp_reuse, of.untempered, of.targets);
            of.untempered = 1;
        }
        if (params_.standardize && params_.alpha != 0) {
            const void* logits = in_unit(kernels_.convert_student, kernels_.convert_student, params_.student, row,
                                         chunk, state.student.unit, scratch.logits.student);
            add_projection(static_cast<const T*>(logits), buffers.untempered, chunk, of.untempered,
                           T(state.gradient.projection), T(state.student.mean));
            of.untempered = 1;
        }
        if (!kernels_.convert_gradient) return kernels_.write_gradient(buffers, chunk, of);
        T* in_place = buffers.student + chunk.head;
        of.target = in_place;
        of.past_caches = false;
        kernels_.write_gradient(buffers, chunk, of);
        kernels_.convert_gradient(in_place, chunk.count, gradient(row, chunk.start));
    }

    // The coefficients of the row's gradient, rescaled to the references of a chunk.
    void set_coefficients(int64_t row, Chunk chunk, const ChunkSums& sums, const RowState& state,
                          ChunkGradient<T>& to) const {
        RowGradient of = state.gradient;
        if (&sums != state.sums) rebase_gradient(params_, rebased(sums, state), of);
        const int64_t label = label_of(row) - chunk.start;
        to.first = T(of.first), to.second = T(of.second), to.targets = T(of.targets);
        const double mean = state.student.mean;  // add_projection uses it rounded
        to.untempered = T(of.untempered), to.label = T(of.label);
        to.constant = T(of.constant + of.projection * (double(T(mean)) - mean));
        to.label_place = label >= 0 && label < chunk.count && of.label != 0 ? chunk.head + label : -1;
        to.target = gradient(row, chunk.start);
        to.past_caches = past_caches_;
    }

    const RowKernels<T> kernels_;
    const RowParams params_;
    const int64_t chunk_classes_;
    const bool kept_;
    const bool past_caches_;
};

}  // namespace
}  // namespace kddp
