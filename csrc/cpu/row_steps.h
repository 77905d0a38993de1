// The loops over one piece of a row of logits: read it, turn it into exponentials with their sums, write the
// gradient. Each kind of element, divergence and temperature has loops of its own, chosen once a call.
#pragma once

#include "cpu/pieces.h"
#include "row_math.h"

namespace kddp {
namespace {

// What a side's exponentials take of its logits.
template <class T>
struct Tempering {
    T student_to_exponent, teacher_to_exponent;  // log2(e) / T
    T student_to_nats, teacher_to_nats;          // 1 / T
};

// What is computed with the teacher.
enum class Distillation { none, forward, reverse, mixture };

// Where both sides exclude a class, 0 * log(0 / 0) counts 0. Looking for it takes time, and leaving it out shows in the
// sum, which is then no number.
enum class Exclusions { ignored, counted_as_zero };

template <class T>
struct RowBuffers {
    T* student;
    T* teacher;
    T* untempered;  // used where ExpReuse::separate
};

template <class T>
inline RowBuffers<T> operator+(RowBuffers<T> buffers, int64_t offset) {
    return {buffers.student + offset, buffers.teacher + offset, buffers.untempered + offset};
}

// What stands around a piece: its exponential is 0, and of two their difference as well.
template <class T>
constexpr T filling = std::numeric_limits<T>::lowest();

// Logits of a piece, counted in places, for the loops to read: converted into the buffer, or where they are. `source`
// is where the piece starts.
template <class T, class Element>
const void* read_piece(const void* source, Piece piece, T* buffer) {
    const Element* from = static_cast<const Element*>(source) - piece.head;
    over_vectors<T>(
        piece, [&](int64_t i) { store<T>(buffer + i, load_elements<T>(from + i)); },
        [&](int64_t i, int64_t first, int64_t last) {
            store<T>(buffer + i, load_partial<T>(from + i, first, last, filling<T>));
        });
    return buffer;
}

template <class T, class Element>
const void* find_piece(const void* source, Piece piece, T*) {
    return static_cast<const Element*>(source) - piece.head;
}

// Lanes of a vector of logits that belong to its piece.
template <class T, class Element>
inline Vector<T> load_logits(const Element* from, int64_t first, int64_t last) {
    return load_partial<T>(from, first, last, filling<T>);
}

// The highest logit of the first vectors of a piece, or of all.
template <class T, class Element>
T highest_of(const void* values, Piece piece, int64_t vectors) {
    const Element* from = static_cast<const Element*>(values);
    Vector<T> highest = broadcast<T>(filling<T>);
    const int64_t places = vectors * lanes<T>;
    const Piece looked_at{0, (piece.end() < places ? piece.end() : places) - piece.head, piece.head};
    over_vectors<T>(
        looked_at, [&](int64_t i) { highest = maximum<T>(load_elements<T>(from + i), highest); },
        [&](int64_t i, int64_t first, int64_t last) {
            highest = maximum<T>(load_logits<T>(from + i, first, last), highest);
        });
    return maximum_of_lanes<T>(highest);
}

// e^s from e^(s/T); `margin` is s - r_s.
template <class T, ExpReuse untempered>
inline Vector<T> untempered_exponential(Vector<T> tempered, Vector<T> margin) {
    if constexpr (untempered == ExpReuse::same) return tempered;
    if constexpr (untempered == ExpReuse::square) return tempered * tempered;
    if constexpr (untempered == ExpReuse::fourth) return (tempered * tempered) * (tempered * tempered);
    return exp2_of_product<T>(margin, T(log2_e));
}

// x * y where x is not 0, and 0 where it is, whatever y is: 0 * log(0 / q) is 0.
template <class T>
inline Vector<T> product_or_zero(Vector<T> x, Vector<T> y) {
    return x == 0 ? Vector<T>{} : x * y;
}

// Of a vector of classes: e^u, what stands beside it in the gradient's form (e^v; reverse: u - v), e^(s - r_s).
template <class T>
struct Exponentials {
    Vector<T> student{}, other{}, untempered{};
};

// A sum of many vectors, whose roundings do not grow with it: of every few, floats; of those sums, doubles.
template <class T>
struct LongSum {
    static constexpr unsigned vectors_at_once = 8;
    Vector<T> few{};
    DoubleSum<T> all;

    void operator+=(Vector<T> v) { few += v; }
    void settle() { all += few, few = Vector<T>{}; }
    double of_lanes() { return settle(), all.of_lanes(); }
};

// With moments, differences of quotients of the sums become gradients.
template <class T, bool moments>
struct ExponentialSums {
    using Sum = std::conditional_t<moments, LongSum<T>, Vector<T>>;
    Sum student{}, teacher{}, dot{}, student_moment{}, other_moment{};
    Vector<T> untempered{};
    Vector<T> highest = broadcast<T>(filling<T>), highest_of_teacher = highest;

    void settle() { student.settle(), teacher.settle(), dot.settle(), student_moment.settle(), other_moment.settle(); }
};

// Where the exponentials of a piece are 1: in logits, and as a shift of the exponent (see exp2_of_shifted).
template <class T>
struct Origin {
    T student, teacher, apart;  // apart: teacher less student
    T student_shift, teacher_shift;
};

// How far a reference moves the exponent, to the next multiple of what exp2_of_shifted can.
inline double shift_of(double reference, double to_exponent) {
    return std::nearbyint(reference * to_exponent / exp2_shift_unit) * exp2_shift_unit;
}

// Logits further from 0 lose too much in t - s.
inline bool may_shift(double reference, double to_exponent) { return std::abs(reference * to_exponent) <= 64; }

inline double nearest_shift(double reference, double to_exponent) {
    return shift_of(reference, to_exponent) / to_exponent;
}

template <class T>
inline Origin<T> origin_of(const ChunkSums& references, const Tempering<T>& by) {
    const double student = references.student_reference, teacher = references.teacher_reference;
    return {T(student), T(teacher), T(teacher - student), T(shift_of(student, by.student_to_exponent)),
            T(shift_of(teacher, by.teacher_to_exponent))};
}

// The exponentials of a vector of classes. `shifted`: both references are shifts of the exponent.
template <class T, Distillation distillation, ExpReuse untempered, bool moments, Exclusions exclusions, bool shifted>
KDDP_ALWAYS_INLINE inline Exponentials<T> exponentiate(Vector<T> s, Vector<T> t, const Origin<T>& origin,
                                                       const Tempering<T>& by, ExponentialSums<T, moments>& sums) {
    constexpr bool with_teacher = distillation != Distillation::none;
    const Vector<T> margin = s - origin.student, teacher_margin = t - origin.teacher;
    Exponentials<T> e;
    if constexpr (shifted)
        e.student = exp2_of_shifted(s, by.student_to_exponent, origin.student_shift);
    else if constexpr (with_teacher || (untempered != ExpReuse::separate && untempered != ExpReuse::absent))
        e.student = exp2_of_product<T>(margin, by.student_to_exponent);
    sums.student += e.student;
    if constexpr (with_teacher) {
        if constexpr (shifted)
            e.other = exp2_of_shifted(t, by.teacher_to_exponent, origin.teacher_shift);
        else
            e.other = exp2_of_product<T>(teacher_margin, by.teacher_to_exponent);
        sums.teacher += e.other;
        // Where both temperatures are one, it is multiplied in at the end.
        Vector<T> apart = shifted ? (t - s) - origin.apart : teacher_margin - margin;
        if constexpr (moments) apart = teacher_margin * by.teacher_to_nats - margin * by.student_to_nats;
        if constexpr (distillation == Distillation::forward) {
            if constexpr (exclusions == Exclusions::ignored)
                sums.dot += e.other * apart;
            else
                sums.dot += product_or_zero<T>(e.other, apart);
            if constexpr (moments) sums.other_moment += product_or_zero<T>(e.other, margin);
        }
        if constexpr (distillation == Distillation::reverse) {
            if constexpr (!moments) apart *= by.student_to_nats;
            const Vector<T> weight = e.student == 0 ? Vector<T>{} : -apart;
            sums.dot += e.student * weight;
            if constexpr (moments) sums.other_moment += product_or_zero<T>(e.student, weight * margin);
            // An infinite one leaves its row without a gradient: times 0 it has to be 0.
            e.other = weight > -filling<T> ? broadcast<T>(-filling<T>) : weight;
        }
        if constexpr (moments) sums.student_moment += product_or_zero<T>(e.student, margin);
    }
    if constexpr (untempered != ExpReuse::absent) {
        e.untempered = untempered_exponential<T, untempered>(e.student, margin);
        sums.untempered += e.untempered;
    }
    return e;
}

// What is read after this piece, asked for while the processor computes.
struct NextLogits {
    const char* student;
    const char* teacher;
    int64_t student_bytes, teacher_bytes;  // of a vector
};

template <class T>
struct Highest {
    T student, teacher;
};

// Sums a piece's exponentials, and keeps them in the buffers where the gradient is to be made from those. The sums'
// references are set. Returns the highest logits.
template <class T, class Element, Distillation distillation, ExpReuse untempered, bool moments, Exclusions exclusions,
          bool shifted, bool keep>
Highest<T> exponentiate_piece(const void* student_logits, const void* teacher_logits, RowBuffers<T> buffers,
                              Piece piece, Tempering<T> by, NextLogits next, ChunkSums& result) {
    constexpr bool with_teacher = distillation != Distillation::none, pairs = !keep && has_pairs<T, Element>;
    const Element* student = static_cast<const Element*>(student_logits);
    const Element* teacher = static_cast<const Element*>(teacher_logits);
    const Origin<T> origin = origin_of<T>(result, by);
    ExponentialSums<T, moments> sums;
    [[maybe_unused]] unsigned count = 0;  // of vectors
    const auto add = [&](int64_t i, Vector<T> s, Vector<T> t) KDDP_ALWAYS_INLINE {
        sums.highest = maximum<T>(s, sums.highest);
        if constexpr (with_teacher) sums.highest_of_teacher = maximum<T>(t, sums.highest_of_teacher);
        const Exponentials<T> e =
            exponentiate<T, distillation, untempered, moments, exclusions, shifted>(s, t, origin, by, sums);
        if constexpr (moments)
            if (++count % LongSum<T>::vectors_at_once == 0) sums.settle();
        if constexpr (!keep) return;
        if constexpr (with_teacher || untempered != ExpReuse::separate) store<T>(buffers.student + i, e.student);
        if constexpr (with_teacher) store<T>(buffers.teacher + i, e.other);
        if constexpr (untempered == ExpReuse::separate) store<T>(buffers.untempered + i, e.untempered);
    };
    const auto ask_for_next = [&](int vectors) KDDP_ALWAYS_INLINE {
        prefetch(next.student);
        next.student += vectors * next.student_bytes;
        if constexpr (with_teacher) {
            prefetch(next.teacher);
            next.teacher += vectors * next.teacher_bytes;
        }
    };
    over_vectors<T, pairs>(
        piece,
        [&](int64_t i) {
            ask_for_next(2);
            if constexpr (pairs) {
                VectorPair<T> t{};
                const VectorPair<T> s = load_pair<T>(student + i);
                if constexpr (with_teacher) t = load_pair<T>(teacher + i);
                add(i, s.first, t.first);
                add(i, s.second, t.second);
            }
        },
        [&](int64_t i) {
            ask_for_next(1);
            Vector<T> t{};
            if constexpr (with_teacher) t = load_elements<T>(teacher + i);
            add(i, load_elements<T>(student + i), t);
        },
        [&](int64_t i, int64_t first, int64_t last) {
            Vector<T> t{};
            if constexpr (with_teacher) t = load_logits<T>(teacher + i, first, last);
            add(i, load_logits<T>(student + i, first, last), t);
        });
    const auto total = [](auto& sum) KDDP_ALWAYS_INLINE {
        if constexpr (moments)
            return sum.of_lanes();
        else if constexpr (distillation == Distillation::reverse)
            // The gradient subtracts dot / student from numbers like it: neither may be rounded before.
            return (DoubleSum<T>{} += sum).of_lanes();
        else
            return double(sum_of_lanes<T>(sum));
    };
    result.student = total(sums.student);
    result.teacher = total(sums.teacher);
    result.untempered = sum_of_lanes<T>(sums.untempered);
    result.dot = total(sums.dot);
    if constexpr (shifted)  // less what `apart` was rounded by
        result.dot -= (result.teacher_reference - result.student_reference - double(origin.apart)) * result.teacher;
    if constexpr (distillation == Distillation::forward && !moments) result.dot *= double(by.student_to_nats);
    if constexpr (moments) {
        result.student_moment = total(sums.student_moment);
        result.other_moment = total(sums.other_moment);
    }
    return {maximum_of_lanes<T>(sums.highest), maximum_of_lanes<T>(sums.highest_of_teacher)};
}

// What turns a piece's margins and exponentials into logarithms and probabilities of the whole row.
template <class T>
struct MixtureScale {
    T student_reference, teacher_reference;      // the row's
    T student_probability, teacher_probability;  // what the piece's exponentials are multiplied by
    T log_scales_apart;                          // what log2(p / q) has of these and the references
    T student_share, teacher_share;              // 1 - beta, beta
};

// jsd's second round: replaces the teacher's exponentials by log(q / m), and sums. All comes of log(p / q): where p and
// q nearly agree, a logarithm of m would leave but its rounding. With the smaller over the larger nothing overflows.
// With moments, each side has a temperature of its own.
template <class T, bool moments>
void mix_piece(const void* student_logits, const void* teacher_logits, RowBuffers<T> buffers, Piece piece,
               Tempering<T> by, MixtureScale<T> scale, MixtureSums& sums) {
    const T* student = static_cast<const T*>(student_logits);
    const T* teacher = static_cast<const T*>(teacher_logits);
    Vector<T> kl_teacher{}, kl_student{}, weighted_moment{};
    const Vector<T> student_share = broadcast<T>(scale.student_share),
                    teacher_share = broadcast<T>(scale.teacher_share);
    const auto add = [&](int64_t i, Vector<T> s, Vector<T> t) {
        const Vector<T> margin = s - scale.student_reference, teacher_margin = t - scale.teacher_reference;
        const Vector<T> q = load<T>(buffers.student + i) * scale.student_probability;
        const Vector<T> p = load<T>(buffers.teacher + i) * scale.teacher_probability;
        Vector<T> log_ratio = (teacher_margin - margin) * by.teacher_to_exponent;  // log2(p / q)
        if constexpr (moments) log_ratio = teacher_margin * by.teacher_to_exponent - margin * by.student_to_exponent;
        log_ratio += scale.log_scales_apart;
        const auto teacher_larger = p > q;
        const Vector<T> smaller_over_larger = (teacher_larger ? q : p) / (teacher_larger ? p : q);
        const Vector<T> of_larger = teacher_larger ? teacher_share : student_share;
        const Vector<T> log_mixture =
            log2_of_positive(of_larger + (1 - of_larger) * smaller_over_larger);  // over the larger
        const Vector<T> student_ratio = teacher_larger ? log_ratio + log_mixture : log_mixture;
        const Vector<T> teacher_ratio = teacher_larger ? log_mixture : log_mixture - log_ratio;
        const Vector<T> weight = q == 0 ? Vector<T>{} : student_ratio * T(-ln_2);
        store<T>(buffers.teacher + i, weight);
        kl_student += q * weight;
        kl_teacher -= product_or_zero<T>(p, teacher_ratio);
        if constexpr (moments) weighted_moment += product_or_zero<T>(q, margin) * weight;
    };
    over_vectors<T>(
        piece, [&](int64_t i) { add(i, load<T>(student + i), load<T>(teacher + i)); },
        [&](int64_t i, int64_t first, int64_t last) {
            add(i, load_logits<T>(student + i, first, last), load_logits<T>(teacher + i, first, last));
        });
    sums.kl_teacher = sum_of_lanes<T>(kl_teacher) * ln_2;
    sums.kl_student = sum_of_lanes<T>(kl_student);
    sums.weighted_moment = sum_of_lanes<T>(weighted_moment);
}

}  // namespace
}  // namespace kddp
