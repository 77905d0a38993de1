// A row of logits: its terms of the loss and its gradient, piece by piece (row_math.h says why).
//
// Up to `longest_kept_row` classes, the exponentials of all pieces are kept until the gradient is written. Of a longer
// row only a piece is kept, and read and exponentiated once more for the gradient.
#pragma once

#include <algorithm>

#include "cpu/row_moments.h"
#include "cpu/row_scratch.h"
#include "kddp/kd_l1_loss.h"

namespace kddp {
namespace {

// Inlined twice, a formula may be contracted to fused multiplications in two ways, and a row worked by one thread would
// differ from one worked by several in a last bit.
#define KDDP_ONE_COPY __attribute__((noinline))

template <class T>
class LogitsRows {
  public:
    // Where threads share a row, none of them keeps it.
    LogitsRows(const KdL1Loss& job, int64_t valid_rows, bool past_caches, bool shared)
        : job_(job),
          kept_(job.classes <= longest_kept_row && !shared),
          steps_(choose_steps<T>(job)),
          piece_classes_(piece_classes(job.classes)),
          rule_(rule_of(job, valid_rows)),
          past_caches_(past_caches) {}

    // Terms of one row, each already divided by the number of valid rows; its gradient is written on the way.
    RowTerms operator()(int64_t row, RowScratch<T> scratch) const {
        if (ignored(row)) {
            write_zeros(row);
            return {};
        }
        RowState state;
        begin(row, scratch, state);
        const int64_t pieces = pieces_of(row);
        for (int64_t k = 0; k < pieces; ++k) exponentiate(row, k, state, buffers_of(k, scratch), scratch.sums[k]);
        merge_sums(scratch.sums, pieces, state);
        if (mixes()) {
            for (int64_t k = 0; k < pieces; ++k) scratch.mixture[k] = mix(row, k, state, scratch);
            merge_mixture(scratch.mixture, pieces, state);
        }
        const RowTerms terms = finish(row, state);
        if (job_.logits_gradient)
            for (int64_t k = 0; k < pieces; ++k) write(row, k, state, scratch);
        return terms;
    }

    // The same by all threads together, each with `scratch_of_thread()`; the pieces' sums are those of `shared`.
    template <class ScratchOfThread>
    RowTerms together(int64_t row, const RowScratch<T>& shared, ScratchOfThread scratch_of_thread) const {
        if (ignored(row)) {
            write_zeros(row);
            return {};
        }
        RowState state;
        begin(row, shared, state);
        const int64_t pieces = pieces_of(row);
        RowTerms terms;
#pragma omp parallel num_threads(job_.threads)
        {
            RowScratch<T> scratch = scratch_of_thread();
            scratch.sums = shared.sums, scratch.mixture = shared.mixture;
#pragma omp for
            for (int64_t k = 0; k < pieces; ++k) exponentiate(row, k, state, scratch.kept, scratch.sums[k]);
#pragma omp single
            merge_sums(scratch.sums, pieces, state);
            if (mixes()) {
#pragma omp for
                for (int64_t k = 0; k < pieces; ++k) scratch.mixture[k] = mix(row, k, state, scratch);
#pragma omp single
                merge_mixture(scratch.mixture, pieces, state);
            }
#pragma omp single
            terms = finish(row, state);
            if (job_.logits_gradient) {
#pragma omp for
                for (int64_t k = 0; k < pieces; ++k) write(row, k, state, scratch);
                finish_streams();
            }
        }
        return terms;
    }

  private:
    static RowParams rule_of(const KdL1Loss& job, int64_t valid_rows) {
        RowParams rule = row_params(job);
        rule.value_scale = 1.0 / double(valid_rows > 0 ? valid_rows : 1);
        rule.gradient_scale = rule.value_scale * (job.scaled_gradients ? double(job.rows) : 1.0);
        return rule;
    }

    bool ignored(int64_t row) const { return job_.labels && job_.labels[row] == job_.ignore_index; }
    bool mixes() const { return rule_.with_teacher && rule_.divergence == Divergence::jsd; }
    bool leaves_label_out() const { return rule_.with_teacher && rule_.divergence == Divergence::dkd; }
    int64_t label_of(int64_t row) const { return job_.labels ? job_.labels[row] : -1; }

    // Places before the row's first class in its buffer.
    int64_t head_of(int64_t row) const {
        return job_.classes < shortest_aligned_row ? 0 : row * job_.classes % lanes<T>;
    }

    int64_t pieces_of(int64_t row) const { return (head_of(row) + job_.classes + piece_classes_ - 1) / piece_classes_; }

    Piece piece_of(int64_t row, int64_t k) const {
        const int64_t head = head_of(row), start = k == 0 ? 0 : k * piece_classes_ - head;
        const int64_t room = piece_classes_ - (k == 0 ? head : 0), left = job_.classes - start;
        return {start, left < room ? left : room, k == 0 ? head : 0};
    }

    RowBuffers<T> buffers_of(int64_t k, const RowScratch<T>& scratch) const {
        return kept_ ? scratch.kept + k * piece_classes_ : scratch.kept;
    }

    const char* element(const Matrix& matrix, int64_t row, int64_t column) const {
        return static_cast<const char*>(matrix.data) + (row * matrix.row_stride + column) * size_of(matrix.type);
    }

    char* gradient(int64_t row, int64_t column) const {
        return static_cast<char*>(job_.logits_gradient) + (row * job_.classes + column) * size_of(job_.student.type);
    }

    void write_zeros(int64_t row) const {
        if (job_.logits_gradient) std::memset(gradient(row, 0), 0, job_.classes * size_of(job_.student.type));
    }

    Tempering<T> tempering(const RowState& state) const {
        return {T(state.student_to_nats * log2_e), T(state.teacher_to_nats * log2_e), T(state.student_to_nats),
                T(state.teacher_to_nats)};
    }

    // Both sides' logits, in the buffers where they have to be converted. What they have of the label where dkd
    // leaves it out is made the least.
    struct Logits {
        const void* student;
        const void* teacher;
    };
    Logits read(int64_t row, Piece piece, RowBuffers<T> buffers, double* sum = nullptr) const {
        Logits logits{steps_.read_student(element(job_.student, row, piece.start), piece, buffers.student), nullptr};
        if (rule_.with_teacher)
            logits.teacher = steps_.read_teacher(element(job_.teacher, row, piece.start), piece, buffers.teacher);
        if (sum) *sum = sum_of_piece(static_cast<const T*>(logits.student), piece);
        const int64_t label = label_of(row) - piece.start;
        if (leaves_label_out() && label >= 0 && label < piece.count)
            buffers.student[piece.head + label] = buffers.teacher[piece.head + label] = filling<T>;
        return logits;
    }

    KDDP_ONE_COPY void begin(int64_t row, const RowScratch<T>& scratch, RowState& state) const {
        state.student_to_nats = state.teacher_to_nats = 1 / job_.temperature;
        if (rule_.standardize) {
            const Moments teacher = moments_of(job_.teacher, steps_.convert_teacher, row, scratch.logits.teacher);
            state.student = moments_of(job_.student, steps_.convert_student, row, scratch.logits.student);
            state.student_to_nats /= divisor_of(state.student);
            state.teacher_to_nats /= divisor_of(teacher);
        }
    }

    Moments moments_of(const Matrix& matrix, ReadPiece<T> convert, int64_t row, T* buffer) const {
        RunningMoments running;
        for (int64_t k = 0; k < pieces_of(row); ++k) {
            const Piece piece = piece_of(row, k);
            const void* values = convert(element(matrix, row, piece.start), piece, buffer);
            running.add(static_cast<const T*>(values), piece);
        }
        return running.moments();
    }

    KDDP_ONE_COPY void exponentiate(int64_t row, int64_t k, const RowState& state, RowBuffers<T> buffers,
                                    ChunkSums& sums) const {
        const Piece piece = piece_of(row, k);
        const Tempering<T> by = tempering(state);
        sums.logits = 0;
        Logits logits = read(row, piece, buffers, rule_.label_smoothing != 0 ? &sums.logits : nullptr);
        // The first few vectors tell where the highest logits are about; where they mislead, the piece is done again.
        // The weighted form takes differences of what a reference away from the highest logit would round.
        const bool weighted = rule_.with_teacher && gradient_form(rule_.divergence) == GradientForm::weighted;
        const int64_t looked_at = weighted ? longest_piece : 4;
        set_references({steps_.highest_of(logits.student, piece, looked_at),
                        rule_.with_teacher ? steps_.highest_of(logits.teacher, piece, looked_at) : T(0)},
                       by, sums);
        const Highest<T> highest =
            loops_for(sums, by).exponentiate(logits.student, logits.teacher, buffers, piece, by, next_of(row, k), sums);
        const bool misled =
            !near(highest.student, sums.student_reference, state.student_to_nats) ||
            (rule_.with_teacher && !near(highest.teacher, sums.teacher_reference, state.teacher_to_nats));
        if (misled || !std::isfinite(sums.dot)) {
            logits = read(row, piece, buffers);
            set_references(highest, by, sums);
            loops_for(sums, by).exponentiate_safely(logits.student, logits.teacher, buffers, piece, by, next_of(row, k),
                                                    sums);
        }
        sums.highest = double(highest.student);
    }

    // Near the highest logits, at a shift of the exponent where there is one. Where every logit is -inf, their
    // differences from a finite reference are so too, and the filling is below it.
    void set_references(Highest<T> highest, const Tempering<T>& by, ChunkSums& sums) const {
        constexpr T lowest = filling<T> / 2;
        sums.student_reference = highest.student > lowest ? highest.student : lowest;
        sums.teacher_reference = highest.teacher > lowest ? highest.teacher : lowest;
        if (!shifts(sums, by)) return;
        sums.student_reference = nearest_shift(sums.student_reference, by.student_to_exponent);
        sums.teacher_reference = nearest_shift(sums.teacher_reference, by.teacher_to_exponent);
    }

    // The exponential of a class alone is to be 1, so that nothing is rounded.
    bool shifts(const ChunkSums& references, const Tempering<T>& by) const {
        return steps_.by_shift.exponentiate && job_.classes > 1 &&
               may_shift(references.student_reference, by.student_to_exponent) &&
               may_shift(references.teacher_reference, by.teacher_to_exponent);
    }

    const LogitsLoops<T>& loops_for(const ChunkSums& references, const Tempering<T>& by) const {
        return shifts(references, by) ? steps_.by_shift : steps_.by_difference;
    }

    // Whether exponentials around this reference neither overflow nor lose what counts: of e^20 the exponent's rounding
    // is still that of the exponential.
    static bool near(T highest, double reference, double to_nats) {
        const double apart = std::abs(double(highest) - reference);
        return apart <= 20 && apart * to_nats <= 20;
    }

    // The next piece of this row, or the first of the next.
    NextLogits next_of(int64_t row, int64_t k) const {
        const bool ends = k + 1 == pieces_of(row);
        const int64_t next_row = ends && row + 1 < job_.rows ? row + 1 : row;
        const int64_t start = ends ? 0 : piece_of(row, k + 1).start;
        return {element(job_.student, next_row, start), element(job_.teacher, next_row, start),
                lanes<T> * size_of(job_.student.type), lanes<T> * size_of(job_.teacher.type)};
    }

    KDDP_ONE_COPY void merge_sums(const ChunkSums* sums, int64_t pieces, RowState& state) const {
        state.sums = sums;
        if (pieces == 1) return;
        ChunkSums& row = state.merged;
        row = {};
        row.student_reference = row.teacher_reference = row.highest = -infinity<double>;
        for (int64_t k = 0; k < pieces; ++k) {
            row.student_reference = std::max(row.student_reference, sums[k].student_reference);
            row.teacher_reference = std::max(row.teacher_reference, sums[k].teacher_reference);
            row.highest = std::max(row.highest, sums[k].highest);
        }
        state.sums = &row;
        const GradientForm form = gradient_form(rule_.divergence);
        for (int64_t k = 0; k < pieces; ++k) merge(sums[k], rebased(sums[k], state), form, row);
    }

    Rebase rebased(const ChunkSums& piece, const RowState& state) const {
        return rebase(piece, *state.sums, state.student_to_nats, state.teacher_to_nats);
    }

    KDDP_ONE_COPY MixtureSums mix(int64_t row, int64_t k, const RowState& state, const RowScratch<T>& scratch) const {
        const Piece piece = piece_of(row, k);
        const RowBuffers<T> buffers = buffers_of(k, scratch);
        ChunkSums again;
        if (!kept_) exponentiate(row, k, state, buffers, again);
        const Logits logits = read(row, piece, scratch.logits);
        const Rebase by = rebased(scratch.sums[k], state);
        const T student_probability = T(by.student_factor / state.sums->student);
        const T teacher_probability = T(by.teacher_factor / state.sums->teacher);
        // Of the probabilities as they are rounded: what is off alike in all classes would not average out.
        const double log_scales_apart = std::log2(double(teacher_probability) / double(student_probability)) +
                                        (by.student_tempered - by.teacher_tempered) * log2_e;
        const MixtureScale<T> scale{T(state.sums->student_reference),
                                    T(state.sums->teacher_reference),
                                    student_probability,
                                    teacher_probability,
                                    T(log_scales_apart),
                                    T(1 - job_.jsd_beta),
                                    T(job_.jsd_beta)};
        MixtureSums sums;
        const auto mix_piece_of = rule_.standardize ? mix_piece<T, true> : mix_piece<T, false>;
        mix_piece_of(logits.student, logits.teacher, buffers, piece, tempering(state), scale, sums);
        return sums;
    }

    KDDP_ONE_COPY static void merge_mixture(const MixtureSums* pieces, int64_t count, RowState& state) {
        MixtureSums& row = state.mixture;
        row = {};
        for (int64_t k = 0; k < count; ++k) {
            row.kl_teacher += pieces[k].kl_teacher, row.kl_student += pieces[k].kl_student;
            row.weighted_moment += pieces[k].weighted_moment;
        }
    }

    KDDP_ONE_COPY RowTerms finish(int64_t row, RowState& state) const {
        T student[lanes<T>], teacher[lanes<T>];
        const int64_t label = label_of(row);
        TargetMargins target{};
        if (label >= 0) {
            steps_.convert_student(element(job_.student, row, label), {0, 1, 0}, student);
            if (leaves_label_out()) {
                steps_.convert_teacher(element(job_.teacher, row, label), {0, 1, 0}, teacher);
                target = {(double(student[0]) - state.sums->student_reference) * state.student_to_nats,
                          (double(teacher[0]) - state.sums->teacher_reference) * state.teacher_to_nats};
            }
        }
        const double label_logit = label >= 0 ? double(student[0]) : 0;
        const RowValues values =
            finish_row(rule_, *state.sums, state.mixture, state.student, target, label_logit, state.gradient);
        const bool highest = label >= 0 && label_logit >= state.sums->highest;
        return {values.kd, values.ce, double(highest && !appears_before(row, label, student[0]))};
    }

    // Of several highest logits the first is the prediction, as in argmax.
    bool appears_before(int64_t row, int64_t end, T value) const {
        T buffer[64];
        static_assert(sizeof buffer >= KDDP_VECTOR_BYTES, "a piece is at least a vector");
        for (int64_t start = 0; start < end; start += 64) {
            const int64_t count = start + 64 < end ? 64 : end - start;
            const Piece piece{start, count, 0};
            if (highest_of<T, T>(steps_.convert_student(element(job_.student, row, start), piece, buffer), piece, 64) ==
                value)
                return true;
        }
        return false;
    }

    KDDP_ONE_COPY void write(int64_t row, int64_t k, const RowState& state, const RowScratch<T>& scratch) const {
        const Piece piece = piece_of(row, k);
        const RowBuffers<T> buffers = buffers_of(k, scratch);
        const void* logits = nullptr;
        if (rule_.standardize)
            logits = steps_.convert_student(element(job_.student, row, piece.start), piece, scratch.logits.student);
        PieceGradient<T> coefficients;
        set_coefficients(row, piece, scratch.sums[k], state, logits, coefficients);
        const Tempering<T> by = tempering(state);
        if (const auto write_again = loops_for(scratch.sums[k], by).write_again) {
            const Logits again = read(row, piece, buffers);
            write_again(again.student, again.teacher, piece, by, scratch.sums[k], coefficients,
                        gradient(row, piece.start));
            return;
        }
        ChunkSums sums;
        if (!kept_ && mixes())
            mix(row, k, state, scratch);
        else if (!kept_)
            exponentiate(row, k, state, buffers, sums);
        steps_.write_gradient(buffers, piece, coefficients, gradient(row, piece.start));
    }

    void set_coefficients(int64_t row, Piece piece, const ChunkSums& sums, const RowState& state, const void* logits,
                          PieceGradient<T>& to) const {
        const RowGradient& of = state.gradient;
        double first = of.first, second = of.second, untempered = of.untempered;
        if (&sums != state.sums) {
            const Rebase by = rebased(sums, state);
            const bool weighted = gradient_form(rule_.divergence) == GradientForm::weighted;
            first *= by.student_factor;
            untempered *= by.untempered_factor;
            if (!weighted) second *= by.teacher_factor;
            if (weighted && !mixes() && first != 0) second += by.student_tempered - by.teacher_tempered;
        }
        to.first = T(first);
        to.second = T(second);
        to.untempered = T(untempered);
        to.constant = T(of.constant);
        to.label = T(of.label);
        to.projection = T(of.projection);
        to.mean = rule_.standardize ? T(state.student.mean) : T(0);
        to.logits = logits;
        const int64_t label = label_of(row) - piece.start;
        to.label_place = label >= 0 && label < piece.count && of.label != 0 ? piece.head + label : -1;
        to.past_caches = past_caches_;
    }

    const KdL1Loss& job_;
    const bool kept_;
    const RowSteps<T> steps_;
    const int64_t piece_classes_;
    const RowParams rule_;
    const bool past_caches_;
};

}  // namespace
}  // namespace kddp
