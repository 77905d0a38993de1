// One row of logits: the terms of the loss and the gradient with respect to the student's logits.
//
// Each row goes through three steps, over buffers of the type computed in: read it (converted, with its
// maximum), turn it into exponentials (with their sums), combine those into the gradient; each step piece by
// piece. A row of at most `longest_buffered_row` stays in the buffers between the steps. Of a longer one the
// buffers hold a piece, and what was read and exponentiated for the sums is so once more for the gradient.
#pragma once

#include <cmath>

#include "cpu/elements.h"
#include "kddp/kd_l1_loss.h"
#include "row_math.h"

namespace kddp {
namespace {

// Exponentials are taken to the base 2, so u, v and dot of row_math.h come in units of ln(2).
constexpr double log2_e = 1.44269504088896340736, ln_2 = 0.693147180559945309417;

constexpr int64_t longest_buffered_row = 32768, piece_classes = 4096;

template <class T>
constexpr int64_t buffer_classes(int64_t classes) {
    return classes <= longest_buffered_row ? round_up_to_lanes<T>(classes) : piece_classes;
}

// How e^s comes from e^(s/T): where T is 2 or 4 by squaring, else by an exponential of its own.
enum class Untempered { absent, same, square, fourth, separate };

template <class T>
struct RowBuffers {
    T* student;
    T* teacher;
    T* untempered;  // used where Untempered::separate
};

template <class T>
inline RowBuffers<T> operator+(RowBuffers<T> buffers, int64_t offset) {
    return {buffers.student + offset, buffers.teacher + offset, buffers.untempered + offset};
}

template <class T>
struct RowMaxima {
    T student, teacher;
};

// A piece is summed in vectors, the pieces in double: long rows lose nothing.
struct RowSums {
    double student = 0, teacher = 0, untempered = 0, dot = 0, margin = 0;
};

struct RowTerms {
    double kd = 0, ce = 0, correct = 0;
};

// Reads `count` elements, pads with -inf (whose exponential is 0) to a whole vector, and returns their
// maximum.
template <class T, class Element>
T read_piece(const void* source, int64_t count, T* buffer) {
    const Element* from = static_cast<const Element*>(source);
    Vector<T> highest = broadcast<T>(-infinity<T>);
    int64_t i = 0;
    for (; i + lanes<T> <= count; i += lanes<T>) {
        const Vector<T> v = load_elements<T>(from + i);
        highest = maximum<T>(v, highest);
        store<T>(buffer + i, v);
    }
    if (i < count) {
        const Vector<T> v = load_partial<T>(from + i, count - i, -infinity<T>);
        highest = maximum<T>(v, highest);
        store<T>(buffer + i, v);
    }
    return maximum_of_lanes<T>(highest);
}

// e^s from e^(s/T); `margin` is s - max s.
template <class T, Untempered untempered>
inline Vector<T> untempered_exponential(Vector<T> tempered, Vector<T> margin) {
    if constexpr (untempered == Untempered::same) return tempered;
    if constexpr (untempered == Untempered::square) return tempered * tempered;
    if constexpr (untempered == Untempered::fourth) return (tempered * tempered) * (tempered * tempered);
    return exp2_of_nonpositive<T>(margin * T(log2_e));
}

// Replaces the logits in the buffers by their exponentials and adds those up.
template <class T, bool with_teacher, Untempered untempered>
void exponentiate_piece(RowBuffers<T> buffers, int64_t count, RowMaxima<T> maxima, T to_exponent, RowSums& sums) {
    Vector<T> sum_student{}, sum_teacher{}, sum_untempered{}, dot{};
    for (int64_t i = 0; i < count; i += lanes<T>) {
        const Vector<T> margin = load<T>(buffers.student + i) - maxima.student;
        const Vector<T> u = margin * to_exponent;
        Vector<T> exp_student{};
        if constexpr (with_teacher || untempered != Untempered::separate) {
            exp_student = exp2_of_nonpositive<T>(u);
            sum_student += exp_student;
            store<T>(buffers.student + i, exp_student);
        }
        if constexpr (with_teacher) {
            const Vector<T> v = (load<T>(buffers.teacher + i) - maxima.teacher) * to_exponent;
            const Vector<T> exp_teacher = exp2_of_nonpositive<T>(v);
            sum_teacher += exp_teacher;
            store<T>(buffers.teacher + i, exp_teacher);
            // 0 * log(0 / q) is 0, also where q is 0 and the difference of logarithms is not a number.
            dot += exp_teacher == 0 ? Vector<T>{} : exp_teacher * (v - u);
        }
        if constexpr (untempered != Untempered::absent) {
            const Vector<T> e = untempered_exponential<T, untempered>(exp_student, margin);
            sum_untempered += e;
            if constexpr (untempered == Untempered::separate) store<T>(buffers.untempered + i, e);
        }
    }
    sums.student += sum_of_lanes<T>(sum_student);
    sums.teacher += sum_of_lanes<T>(sum_teacher);
    sums.untempered += sum_of_lanes<T>(sum_untempered);
    sums.dot += sum_of_lanes<T>(dot);
}

template <class T, bool with_teacher, Untempered untempered>
inline Vector<T> gradient_vector(RowBuffers<T> buffers, int64_t i, const GradientScale<T>& scale) {
    Vector<T> exp_student{}, exp_teacher{}, exp_untempered{};
    if constexpr (with_teacher || untempered != Untempered::separate) exp_student = load<T>(buffers.student + i);
    if constexpr (with_teacher) exp_teacher = load<T>(buffers.teacher + i);
    if constexpr (untempered == Untempered::separate) {
        exp_untempered = load<T>(buffers.untempered + i);
    } else if constexpr (untempered != Untempered::absent) {
        exp_untempered = untempered_exponential<T, untempered>(exp_student, exp_student);
    }
    return gradient_away_from_label(exp_student, exp_teacher, exp_untempered, scale);
}

// Writes the gradient of `count` classes. `label` counts from the piece's start; outside of it, it has no
// effect.
template <class T, class Element, bool with_teacher, Untempered untempered>
void write_gradient_piece(RowBuffers<T> buffers, int64_t count, const GradientScale<T>& scale, int64_t label,
                          void* target) {
    Element* to = static_cast<Element*>(target);
    int64_t i = 0;
    for (; i + lanes<T> <= count; i += lanes<T>)
        store_elements<T>(to + i, gradient_vector<T, with_teacher, untempered>(buffers, i, scale));
    if (i < count) store_partial<T>(to + i, gradient_vector<T, with_teacher, untempered>(buffers, i, scale), count - i);
    if (label >= 0 && label < count) {
        const int64_t start = label / lanes<T> * lanes<T>;
        const Vector<T> around = gradient_vector<T, with_teacher, untempered>(buffers, start, scale);
        from_number(around[label - start] - scale.label, to[label]);
    }
}

template <class T>
using ReadPiece = T (*)(const void*, int64_t, T*);
template <class T>
using ExponentiatePiece = void (*)(RowBuffers<T>, int64_t, RowMaxima<T>, T, RowSums&);
template <class T>
using WriteGradientPiece = void (*)(RowBuffers<T>, int64_t, const GradientScale<T>&, int64_t, void*);

template <class T>
ReadPiece<T> choose_read(ElementType type) {
    switch (type) {
        case ElementType::float64:
            return read_piece<T, double>;
        case ElementType::bfloat16:
            return read_piece<T, BFloat16>;
        case ElementType::float16:
            return read_piece<T, Float16>;
        default:
            return read_piece<T, float>;
    }
}

template <class T, bool with_teacher, Untempered untempered>
WriteGradientPiece<T> choose_write(ElementType type) {
    switch (type) {
        case ElementType::float64:
            return write_gradient_piece<T, double, with_teacher, untempered>;
        case ElementType::bfloat16:
            return write_gradient_piece<T, BFloat16, with_teacher, untempered>;
        case ElementType::float16:
            return write_gradient_piece<T, Float16, with_teacher, untempered>;
        default:
            return write_gradient_piece<T, float, with_teacher, untempered>;
    }
}

inline Untempered choose_untempered(const KdL1Loss& job) {
    if (!job.labels) return Untempered::absent;
    if (job.temperature == 1) return Untempered::same;
    if (job.teacher.data && job.temperature == 2) return Untempered::square;
    if (job.teacher.data && job.temperature == 4) return Untempered::fourth;
    return Untempered::separate;
}

// The functions of the three steps, chosen once a call.
template <class T>
struct RowSteps {
    ReadPiece<T> read_student, read_teacher;
    ExponentiatePiece<T> exponentiate;
    WriteGradientPiece<T> write_gradient;
};

template <class T, bool with_teacher, Untempered untempered>
RowSteps<T> steps_of(const KdL1Loss& job) {
    RowSteps<T> steps{choose_read<T>(job.student.type), choose_read<T>(job.teacher.type),
                      exponentiate_piece<T, with_teacher, untempered>,
                      choose_write<T, with_teacher, untempered>(job.student.type)};
    // A term of weight 0 has no gradient, not 0 times one that may be infinite.
    if (with_teacher && job.alpha == 0) steps.write_gradient = choose_write<T, false, untempered>(job.student.type);
    if (job.alpha == 1) steps.write_gradient = choose_write<T, with_teacher, Untempered::absent>(job.student.type);
    return steps;
}

template <class T, bool with_teacher>
RowSteps<T> choose_steps(const KdL1Loss& job) {
    switch (choose_untempered(job)) {
        case Untempered::absent:
            return steps_of<T, with_teacher, Untempered::absent>(job);
        case Untempered::same:
            return steps_of<T, with_teacher, Untempered::same>(job);
        case Untempered::square:
            return steps_of<T, with_teacher, Untempered::square>(job);
        case Untempered::fourth:
            return steps_of<T, with_teacher, Untempered::fourth>(job);
        default:
            return steps_of<T, with_teacher, Untempered::separate>(job);
    }
}

template <class T>
class LogitsRows {
  public:
    LogitsRows(const KdL1Loss& job, int64_t valid_rows)
        : job_(job),
          steps_(job.teacher.data ? choose_steps<T, true>(job) : choose_steps<T, false>(job)),
          in_buffers_(job.classes <= longest_buffered_row),
          inverse_rows_(1.0 / double(valid_rows > 0 ? valid_rows : 1)),
          to_exponent_(T(log2_e / job.temperature)) {}

    // Terms of one row, each already divided by the number of valid rows; its gradient is written on the way.
    RowTerms operator()(int64_t row, RowBuffers<T> buffers) const {
        if (job_.labels && job_.labels[row] == job_.ignore_index) {
            if (job_.logits_gradient) std::memset(gradient(row, 0), 0, job_.classes * size_of(job_.student.type));
            return {};
        }
        RowMaxima<T> maxima{-infinity<T>, -infinity<T>};
        RowSums sums;
        for_each_piece(buffers, [&](int64_t start, int64_t count, RowBuffers<T> piece) {
            const RowMaxima<T> highest = read(row, start, count, piece);
            maxima.student = highest.student > maxima.student ? highest.student : maxima.student;
            maxima.teacher = highest.teacher > maxima.teacher ? highest.teacher : maxima.teacher;
            if (job_.label_smoothing != 0) sums.margin += sum_of(piece.student, count);
        });
        sums.margin -= double(maxima.student) * double(job_.classes);
        for_each_piece(buffers, [&](int64_t start, int64_t count, RowBuffers<T> piece) {
            if (!in_buffers_) read(row, start, count, piece);
            steps_.exponentiate(piece, count, maxima, to_exponent_, sums);
        });
        if (job_.logits_gradient) write_gradient(row, buffers, maxima, sums);
        return terms(row, maxima, sums);
    }

  private:
    template <class Function>
    void for_each_piece(RowBuffers<T> buffers, Function function) const {
        for (int64_t start = 0; start < job_.classes; start += piece_classes) {
            const int64_t left = job_.classes - start;
            function(start, left < piece_classes ? left : piece_classes, buffers + (in_buffers_ ? start : 0));
        }
    }

    const char* element(const Matrix& matrix, int64_t row, int64_t column) const {
        return static_cast<const char*>(matrix.data) + (row * matrix.row_stride + column) * size_of(matrix.type);
    }

    char* gradient(int64_t row, int64_t column) const {
        return static_cast<char*>(job_.logits_gradient) + (row * job_.classes + column) * size_of(job_.student.type);
    }

    RowMaxima<T> read(int64_t row, int64_t start, int64_t count, RowBuffers<T> buffers) const {
        RowMaxima<T> maxima{steps_.read_student(element(job_.student, row, start), count, buffers.student),
                            -infinity<T>};
        if (job_.teacher.data)
            maxima.teacher = steps_.read_teacher(element(job_.teacher, row, start), count, buffers.teacher);
        return maxima;
    }

    static double sum_of(const T* values, int64_t count) {
        Vector<T> sums{};
        int64_t i = 0;
        for (; i + lanes<T> <= count; i += lanes<T>) sums += load<T>(values + i);
        double sum = sum_of_lanes<T>(sums);
        for (; i < count; ++i) sum += double(values[i]);
        return sum;
    }

    void write_gradient(int64_t row, RowBuffers<T> buffers, RowMaxima<T> maxima, const RowSums& sums) const {
        const double each_row = inverse_rows_ * (job_.scaled_gradients ? double(job_.rows) : 1.0);
        const double kd = job_.teacher.data ? job_.alpha * job_.temperature * each_row : 0;
        const double ce = job_.labels ? (1 - job_.alpha) * each_row : 0;
        GradientScale<T> scale{};
        if (kd != 0) scale.student = T(kd / sums.student), scale.teacher = T(kd / sums.teacher);
        if (ce != 0) {
            scale.untempered = T(ce / sums.untempered);
            scale.smoothing = T(ce * job_.label_smoothing / double(job_.classes));
            scale.label = T(ce * (1 - job_.label_smoothing));
        }
        const int64_t label = ce != 0 ? job_.labels[row] : -1;
        RowSums again;  // what has been summed already
        for_each_piece(buffers, [&](int64_t start, int64_t count, RowBuffers<T> piece) {
            if (!in_buffers_) {
                read(row, start, count, piece);
                steps_.exponentiate(piece, count, maxima, to_exponent_, again);
            }
            steps_.write_gradient(piece, count, scale, label - start, gradient(row, start));
        });
    }

    RowTerms terms(int64_t row, RowMaxima<T> maxima, const RowSums& sums) const {
        RowTerms terms;
        if (job_.teacher.data) {
            const double divergence =
                kl_divergence(sums.dot * ln_2, sums.teacher, std::log(sums.student / sums.teacher));
            terms.kd = divergence * job_.temperature * job_.temperature * inverse_rows_;
        }
        if (job_.labels) {
            const int64_t label = job_.labels[row];
            T scratch[lanes<T>];
            const T at_label = steps_.read_student(element(job_.student, row, label), 1, scratch);
            terms.ce = inverse_rows_ * cross_entropy(std::log(sums.untempered), double(at_label - maxima.student),
                                                     sums.margin / double(job_.classes), job_.label_smoothing);
            terms.correct = at_label == maxima.student && !appears_before(row, label, maxima.student);
        }
        return terms;
    }

    // Of several highest logits the first is the prediction, as in argmax.
    bool appears_before(int64_t row, int64_t end, T value) const {
        T scratch[64];
        static_assert(sizeof scratch >= KDDP_VECTOR_BYTES, "a piece is at least a vector");
        for (int64_t start = 0; start < end; start += 64) {
            const int64_t count = start + 64 < end ? 64 : end - start;
            if (steps_.read_student(element(job_.student, row, start), count, scratch) == value) return true;
        }
        return false;
    }

    const KdL1Loss& job_;
    const RowSteps<T> steps_;
    const bool in_buffers_;
    const double inverse_rows_;
    const T to_exponent_;
};

}  // namespace
}  // namespace kddp
