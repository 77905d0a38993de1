// The loops over one chunk of a row of logits: read it, exponentiate and sum it, write its gradient.
//
// Each loop is compiled for the type it computes in (T), the type it reads or writes (Element), and what a call
// computes (Form, a LossForm). kd_l1_loss.cpp chooses among them once a call.
#pragma once

#include "cpu/simd.h"
#include "row_math.h"

namespace kddp {
namespace {

// The sums that a loop takes with the teacher.
enum class Distillation { none, forward, reverse, mixture };

// How a loop gets the e^s of the cross entropy: not at all, as a power of e^(s/T), or by an exponential of its own.
enum class CrossEntropy { absent, power, separate };

// What a call computes. `standardized`: of standardized logits, so that each side has a temperature of its own and the
// sums with s - r_s are needed.
template <Distillation distillation_, CrossEntropy cross_entropy_, bool standardized_>
struct LossForm {
    static constexpr Distillation distillation = distillation_;
    static constexpr CrossEntropy cross_entropy = cross_entropy_;
    static constexpr bool standardized = standardized_;
    static constexpr bool with_teacher = distillation != Distillation::none;
    static constexpr bool tempered = with_teacher || cross_entropy == CrossEntropy::power;  // whether e^u is computed
};

// Factors that turn logits into exponents.
template <class T>
struct LogitScale {
    T student_to_exponent, teacher_to_exponent;  // log2(e) / T
    T student_to_nats, teacher_to_nats;          // 1 / T
    T untempered_to_exponent;                    // log2(e)
    int squarings;                               // of e^(s/T) to get e^s
};

template <class T>
struct RowBuffers {
    T* student;
    T* teacher;
    T* untempered;  // used with CrossEntropy::separate, and by add_projection and subtract_targets
    T* targets;
};

template <class T>
inline RowBuffers<T> operator+(RowBuffers<T> buffers, int64_t offset) {
    return {buffers.student + offset, buffers.teacher + offset, buffers.untempered + offset, buffers.targets + offset};
}

// Padding for lanes outside the chunk: exp(pad) = 0 and pad - pad = 0.
template <class T>
constexpr T padding = std::numeric_limits<T>::lowest();

template <class T, class Element>
KDDP_ALWAYS_INLINE inline Vector<T> load_logits(const Element* from, int64_t first, int64_t last) {
    return load_lanes<T>(from, first, last, padding<T>);
}

// The logits of a chunk, indexed by place: converted to the buffer, or where they are. `source` is the chunk's first.
template <class T, class Element>
const void* convert_chunk(const void* source, Chunk chunk, T* buffer) {
    const Element* from = static_cast<const Element*>(source) - chunk.head;
    for_each_vector<T>(chunk, [&](int64_t i, int64_t first, int64_t last)
                                  KDDP_ALWAYS_INLINE { store<T>(buffer + i, load_logits<T>(from + i, first, last)); });
    return buffer;
}

template <class T, class Element>
const void* view_chunk(const void* source, Chunk chunk, T*) {
    return static_cast<const Element*>(source) - chunk.head;
}

template <class T>
using ReadChunk = const void* (*)(const void* source, Chunk chunk, T* buffer);

// The highest logit among the first `places` of a chunk.
template <class T, class Element>
T highest_of(const void* logits, Chunk chunk, int64_t places) {
    const Element* from = static_cast<const Element*>(logits);
    Vector<T> even = broadcast<T>(padding<T>), odd = even;  // two, because a maximum has to wait for the one before
    chunk.count = smaller(chunk.end(), places) - chunk.head;
    for_each_vector<T, true>(
        chunk,
        [&](int64_t i, int64_t first, int64_t last)
            KDDP_ALWAYS_INLINE { even = maximum<T>(load_logits<T>(from + i, first, last), even); },
        [&](int64_t i) KDDP_ALWAYS_INLINE {
            even = maximum<T>(load_elements<T>(from + i), even);
            odd = maximum<T>(load_elements<T>(from + i + lanes<T>), odd);
        });
    return maximum_of_lanes<T>(maximum<T>(even, odd));
}

// A sum over many vectors: every few of them in T, then in double, so that rounding does not grow with the count.
template <class T>
struct LongSum {
    static constexpr unsigned vectors_at_once = 8;
    Vector<T> few{};
    DoubleSum<T> all;

    void operator+=(Vector<T> v) { few += v; }
    void flush() { all += few, few = Vector<T>{}; }
    double of_lanes() { return flush(), all.of_lanes(); }
};

// Sum of f(value) over a chunk, where f(fill) = 0. It is long, because the squares of numbers on a coarse grid, such as
// deviations of logits near 10^4, would all be rounded in the same direction.
template <class T, class F>
double sum_of_chunk(const T* values, Chunk chunk, T fill, F f) {
    LongSum<T> sum;
    unsigned vectors = 0;
    for_each_vector<T>(chunk, [&](int64_t i, int64_t first, int64_t last) KDDP_ALWAYS_INLINE {
        sum += f(load_lanes<T>(values + i, first, last, fill));
        if (++vectors % LongSum<T>::vectors_at_once == 0) sum.flush();
    });
    return sum.of_lanes();
}

// The sums of a chunk's targets, and the first class with the highest soft label.
struct ChunkTargets {
    TargetSums sums;
    double highest_label;
    int64_t label;
};

// Writes the targets of a chunk to `targets` and returns their sums. `soft_labels` and `class_weights` are indexed by
// place, and may be null. `next`: the soft labels of the next chunk, `next_bytes` for each vector, to prefetch them.
template <class T>
ChunkTargets sum_targets(const T* logits, const T* soft_labels, const T* class_weights, T share, T constant,
                         Chunk chunk, const char* next, int64_t next_bytes, T* targets) {
    const T lowest = padding<T> / 2, highest = highest_of<T, T>(logits, chunk, chunk.end());
    const T reference = highest > lowest ? highest : lowest;
    // The highest labels of the lanes, and their places. Partial vectors have their own, because the last one comes
    // before others that have lower places.
    struct Highest {
        Vector<T> labels = broadcast<T>(-infinity<T>), places{};
    } of_whole, of_partial;
    LongSum<T> sum, dot;
    unsigned vectors = 0;
    Vector<T> lane_numbers{};
    for (int i = 0; i < lanes<T>; ++i) lane_numbers[i] = T(i);
    for_each_vector<T>(chunk, [&](int64_t i, int64_t first, int64_t last) KDDP_ALWAYS_INLINE {
        const Vector<T> s = load_lanes<T>(logits + i, first, last, reference), places = lane_numbers + T(i);
        Vector<T> target = broadcast<T>(constant);
        if (soft_labels) {
            prefetch(next);
            next += next_bytes;
            const Vector<T> z = load_lanes<T>(soft_labels + i, first, last, -infinity<T>);
            Highest& of = last - first < lanes<T> ? of_partial : of_whole;
            of.places = z > of.labels ? places : of.places;
            of.labels = maximum<T>(z, of.labels);
            target += share * z;
        }
        if (class_weights) target *= load_lanes<T>(class_weights + i, first, last, T(0));
        if (last - first < lanes<T>)
            target = ((places >= T(chunk.head)) & (places < T(chunk.end()))) ? target : Vector<T>{};
        store<T>(targets + i, target);
        sum += target;
        dot += target * (s - reference);
        if (++vectors % LongSum<T>::vectors_at_once == 0) sum.flush(), dot.flush();
    });
    const T highest_label = maximum_of_lanes<T>(maximum<T>(of_whole.labels, of_partial.labels));
    T place = T(chunk.end());
    for (const Highest& of : {of_whole, of_partial})
        for (int i = 0; i < lanes<T>; ++i)
            if (of.labels[i] == highest_label && of.places[i] < place) place = of.places[i];
    return {{double(reference), sum.of_lanes(), dot.of_lanes()},
            double(highest_label),
            chunk.start - chunk.head + int64_t(place)};
}

// Mean and standard deviation, updated chunk by chunk (Chan, Golub, LeVeque 1979). Deviations are taken from the first
// value, then from the running mean, so that equal logits have a deviation of exactly 0.
class RunningMoments {
  public:
    template <class T>
    void add(const T* values, Chunk chunk) {
        if (count_ == 0) mean_ = double(values[chunk.head]);
        const double count = double(chunk.count), total = count_ + count;
        // Deviations are taken from a number of type T, which may be far from a mean in double.
        const double origin = double(T(mean_)), mean = origin + deviations(values, chunk, origin, 1) / count;
        const double center = double(T(mean)), offset = mean - center, delta = mean - mean_;
        const double squares = deviations(values, chunk, center, 2) - (offset != 0 ? offset * offset * count : 0);
        squares_ += (squares < 0 ? 0 : squares) + delta * delta * count_ * count / total;
        mean_ += delta * count / total;
        count_ = total;
    }

    Moments moments() const { return in_own_unit(mean_, count_ > 1 ? std::sqrt(squares_ / (count_ - 1)) : 0); }

  private:
    // Sum of (value - origin)^power.
    template <class T>
    static double deviations(const T* values, Chunk chunk, double origin, int power) {
        const T o = T(origin);
        const double sum = power == 1 ? sum_of_chunk(values, chunk, o, [o](Vector<T> v) { return v - o; })
                                      : sum_of_chunk(values, chunk, o, [o](Vector<T> v) { return (v - o) * (v - o); });
        if (std::isfinite(sum)) return sum;
        double in_double = 0;  // the square of 1e20 overflows float
        for (int64_t i = chunk.head; i < chunk.end(); ++i) in_double += std::pow(double(values[i]) - origin, power);
        return in_double;
    }

    double count_ = 0, mean_ = 0, squares_ = 0;
};

// x * y, but 0 if x is 0, whatever y is: a class that both sides exclude contributes 0 * log(0 / 0) = 0.
template <class T>
KDDP_ALWAYS_INLINE inline Vector<T> product_or_zero(Vector<T> x, Vector<T> y) {
    return x == 0 ? Vector<T>{} : x * y;
}

// The exponentials of a vector of classes.
template <class T>
struct Exponentials {
    Vector<T> student{};     // e^u
    Vector<T> other{};       // e^v; in the weighted form u - v
    Vector<T> untempered{};  // e^(s - r_s)
};

// The gradient of standardized logits is a difference of quotients of these sums, which needs the longer ones.
template <class T, bool standardized>
struct ExponentialSums {
    using Sum = std::conditional_t<standardized, LongSum<T>, Vector<T>>;
    Sum student{}, teacher{}, dot{}, student_moment{}, other_moment{};
    Vector<T> untempered{};
    Vector<T> highest = broadcast<T>(padding<T>), highest_of_teacher = highest;

    void flush() { student.flush(), teacher.flush(), dot.flush(), student_moment.flush(), other_moment.flush(); }
};

// Logits whose exponential is 1: the references of a chunk. On AVX-512 a multiple of 1/32 of the exponent is subtracted
// at no cost (exp2_of_shifted).
template <class T>
struct Origin {
    T student, teacher, delta;  // delta: teacher - student
    T student_shift, teacher_shift;
};

inline double shift_of(double reference, double to_exponent) {
    return std::nearbyint(reference * to_exponent / exp2_shift_unit) * exp2_shift_unit;
}

// Beyond this distance from 0, t - s would lose too many digits.
inline bool may_shift(double reference, double to_exponent) { return std::abs(reference * to_exponent) <= 64; }

template <class T>
inline Origin<T> origin_of(const ChunkSums& references, const LogitScale<T>& scale) {
    const double student = references.student_reference, teacher = references.teacher_reference;
    return {T(student), T(teacher), T(teacher - student), T(shift_of(student, scale.student_to_exponent)),
            T(shift_of(teacher, scale.teacher_to_exponent))};
}

constexpr int squarings_of(ExpReuse reuse) { return reuse == ExpReuse::fourth ? 2 : reuse == ExpReuse::square ? 1 : 0; }

template <class T>
KDDP_ALWAYS_INLINE inline Vector<T> power_of(Vector<T> tempered, int squarings) {
    if (squarings > 0) tempered *= tempered;
    if (squarings > 1) tempered *= tempered;
    return tempered;
}

// The exponentials of a vector of classes, and their sums. `shifted`: the references are shifts of the exponent.
template <class T, class Form, bool shifted>
KDDP_ALWAYS_INLINE inline Exponentials<T> exponentiate(Vector<T> s, Vector<T> t, const Origin<T>& origin,
                                                       const LogitScale<T>& scale,
                                                       ExponentialSums<T, Form::standardized>& sums) {
    const Vector<T> margin = s - origin.student, teacher_margin = t - origin.teacher;
    Exponentials<T> e;
    if constexpr (shifted)
        e.student = exp2_of_shifted(s, scale.student_to_exponent, origin.student_shift);
    else if constexpr (Form::tempered)
        e.student = exp2_of_product<T>(margin, scale.student_to_exponent);
    sums.student += e.student;
    if constexpr (Form::with_teacher) {
        if constexpr (shifted)
            e.other = exp2_of_shifted(t, scale.teacher_to_exponent, origin.teacher_shift);
        else
            e.other = exp2_of_product<T>(teacher_margin, scale.teacher_to_exponent);
        sums.teacher += e.other;
        // In logits; a temperature that both sides share is multiplied in at the end.
        Vector<T> delta = shifted ? (t - s) - origin.delta : teacher_margin - margin;
        if constexpr (Form::standardized)
            delta = teacher_margin * scale.teacher_to_nats - margin * scale.student_to_nats;
        if constexpr (Form::distillation == Distillation::forward) {
            sums.dot += product_or_zero<T>(e.other, delta);
            if constexpr (Form::standardized) sums.other_moment += product_or_zero<T>(e.other, margin);
        }
        if constexpr (Form::distillation == Distillation::reverse) {
            if constexpr (!Form::standardized) delta *= scale.student_to_nats;
            const Vector<T> weight = e.student == 0 ? Vector<T>{} : -delta;
            sums.dot += e.student * weight;
            if constexpr (Form::standardized) sums.other_moment += product_or_zero<T>(e.student, weight * margin);
            // The gradient multiplies an infinite weight by 0, which must give 0.
            e.other = weight > -padding<T> ? broadcast<T>(-padding<T>) : weight;
        }
        if constexpr (Form::standardized) sums.student_moment += product_or_zero<T>(e.student, margin);
    }
    if constexpr (Form::cross_entropy != CrossEntropy::absent) {
        e.untempered = Form::cross_entropy == CrossEntropy::power
                           ? power_of<T>(e.student, scale.squarings)
                           : exp2_of_product<T>(margin, scale.untempered_to_exponent);
        sums.untempered += e.untempered;
    }
    return e;
}

// Where the next chunk starts, to prefetch it while this one is computed.
struct NextLogits {
    const char* student;
    const char* teacher;
    int64_t student_bytes, teacher_bytes;  // of a vector
};

template <class T>
struct Highest {
    T student, teacher;
};

// Sums the exponentials of a chunk around the references in `result`. With `keep`, stores them in the buffers, from
// which write_gradient makes the gradient. Returns the highest logits.
template <class T, class Element, class Form, bool shifted, bool keep>
Highest<T> exponentiate_chunk(const void* student_logits, const void* teacher_logits, const RowBuffers<T>& to,
                              const Chunk& chunk, const LogitScale<T>& factors, const NextLogits& then,
                              ChunkSums& result) {
    // Local copies cannot be aliased by stores. The arguments are references, because a caller that has just stored
    // their fields would stall on copying them whole.
    const RowBuffers<T> buffers = to;
    const LogitScale<T> scale = factors;
    NextLogits next = then;
    constexpr bool pairs = !keep && has_pairs<T, Element>, standardized = Form::standardized;
    const Element* student = static_cast<const Element*>(student_logits);
    const Element* teacher = static_cast<const Element*>(teacher_logits);
    const Origin<T> origin = origin_of<T>(result, scale);
    ExponentialSums<T, standardized> sums;
    [[maybe_unused]] unsigned vectors = 0;
    const auto add = [&](int64_t i, Vector<T> s, Vector<T> t) KDDP_ALWAYS_INLINE {
        sums.highest = maximum<T>(s, sums.highest);
        if constexpr (Form::with_teacher) sums.highest_of_teacher = maximum<T>(t, sums.highest_of_teacher);
        const Exponentials<T> e = exponentiate<T, Form, shifted>(s, t, origin, scale, sums);
        if constexpr (standardized)
            if (++vectors % LongSum<T>::vectors_at_once == 0) sums.flush();
        if constexpr (!keep) return;
        if constexpr (Form::tempered) store<T>(buffers.student + i, e.student);
        if constexpr (Form::with_teacher) store<T>(buffers.teacher + i, e.other);
        if constexpr (Form::cross_entropy == CrossEntropy::separate) store<T>(buffers.untempered + i, e.untempered);
    };
    const auto prefetch_next = [&](int count) KDDP_ALWAYS_INLINE {
        prefetch(next.student);
        next.student += count * next.student_bytes;
        if constexpr (Form::with_teacher) {
            prefetch(next.teacher);
            next.teacher += count * next.teacher_bytes;
        }
    };
    for_each_vector<T, pairs>(
        chunk,
        [&](int64_t i, int64_t first, int64_t last) KDDP_ALWAYS_INLINE {
            prefetch_next(1);
            Vector<T> t{};
            if constexpr (Form::with_teacher) t = load_logits<T>(teacher + i, first, last);
            add(i, load_logits<T>(student + i, first, last), t);
        },
        [&](int64_t i) KDDP_ALWAYS_INLINE {
            prefetch_next(2);
            if constexpr (pairs) {
                VectorPair<T> t{};
                const VectorPair<T> s = load_pair<T>(student + i);
                if constexpr (Form::with_teacher) t = load_pair<T>(teacher + i);
                add(i, s.first, t.first);
                add(i, s.second, t.second);
            }
        });
    const auto total = [](auto& sum) KDDP_ALWAYS_INLINE {
        if constexpr (standardized)
            return sum.of_lanes();
        else if constexpr (Form::distillation == Distillation::reverse)
            // The gradient subtracts dot / student from numbers of its size, so neither may be rounded to T.
            return (DoubleSum<T>{} += sum).of_lanes();
        else
            return double(sum_of_lanes<T>(sum));
    };
    result.student = total(sums.student);
    result.teacher = total(sums.teacher);
    result.untempered = sum_of_lanes<T>(sums.untempered);
    result.dot = total(sums.dot);
    if constexpr (shifted)  // corrects the rounding of origin.delta
        result.dot -= (result.teacher_reference - result.student_reference - double(origin.delta)) * result.teacher;
    if constexpr (Form::distillation == Distillation::forward && !standardized)
        result.dot *= double(scale.student_to_nats);
    if constexpr (standardized) {
        result.student_moment = total(sums.student_moment);
        result.other_moment = total(sums.other_moment);
    }
    return {maximum_of_lanes<T>(sums.highest), maximum_of_lanes<T>(sums.highest_of_teacher)};
}

// Factors that turn the margins and exponentials of a chunk into log(p / q) and probabilities of the row.
template <class T>
struct MixtureScale {
    T student_reference, teacher_reference;      // of the row
    T student_probability, teacher_probability;  // times the exponentials of the chunk
    T log_ratio;                                 // added to log2(p / q)
    T student_share, teacher_share;              // 1 - share, share
    bool has_slopes;
    T student_weight, student_slope, teacher_slope;  // see MixtureSlopes
};

// The second pass of a mixture: replaces the teacher's exponentials by w, and sums. Everything is derived from
// log(p / q): log m cancels catastrophically when p and q are close. The ratio of the smaller to the larger of p and q
// cannot overflow.
template <class T, bool standardized>
void mix_chunk(const void* student_logits, const void* teacher_logits, RowBuffers<T> buffers, Chunk chunk,
               LogitScale<T> scale, MixtureScale<T> mixture, MixtureSums& sums) {
    const T* student = static_cast<const T*>(student_logits);
    const T* teacher = static_cast<const T*>(teacher_logits);
    Vector<T> kl_teacher{}, kl_student{}, mean{}, weighted_moment{};
    const Vector<T> student_share = broadcast<T>(mixture.student_share),
                    teacher_share = broadcast<T>(mixture.teacher_share);
    for_each_vector<T>(chunk, [&](int64_t i, int64_t first, int64_t last) KDDP_ALWAYS_INLINE {
        const Vector<T> margin = load_logits<T>(student + i, first, last) - mixture.student_reference;
        const Vector<T> teacher_margin = load_logits<T>(teacher + i, first, last) - mixture.teacher_reference;
        const Vector<T> q = load<T>(buffers.student + i) * mixture.student_probability;
        const Vector<T> p = load<T>(buffers.teacher + i) * mixture.teacher_probability;
        Vector<T> log_ratio = (teacher_margin - margin) * scale.teacher_to_exponent;  // log2(p / q)
        if constexpr (standardized)
            log_ratio = teacher_margin * scale.teacher_to_exponent - margin * scale.student_to_exponent;
        log_ratio += mixture.log_ratio;
        const auto teacher_larger = p > q;
        const Vector<T> smaller_over_larger = (teacher_larger ? q : p) / (teacher_larger ? p : q);
        const Vector<T> share_of_larger = teacher_larger ? teacher_share : student_share;
        const Vector<T> m_over_larger = share_of_larger + (1 - share_of_larger) * smaller_over_larger;
        const Vector<T> log_mixture = log2_of_positive(m_over_larger);
        const Vector<T> student_ratio = teacher_larger ? log_ratio + log_mixture : log_mixture;
        const Vector<T> teacher_ratio = teacher_larger ? log_mixture : log_mixture - log_ratio;
        Vector<T> weight = q == 0 ? Vector<T>{} : student_ratio * T(-ln_2);
        kl_student += q * weight;
        kl_teacher -= product_or_zero<T>(p, teacher_ratio);
        if (mixture.has_slopes) {
            const Vector<T> of_larger =
                teacher_larger ? broadcast<T>(mixture.teacher_slope) : broadcast<T>(mixture.student_slope);
            const Vector<T> of_smaller = mixture.teacher_slope + mixture.student_slope - of_larger;
            const Vector<T> slopes = (of_larger + of_smaller * smaller_over_larger) / m_over_larger;
            weight = q == 0 ? Vector<T>{} : mixture.student_weight * weight - slopes;
            mean += q * weight;
        }
        store<T>(buffers.teacher + i, weight);
        if constexpr (standardized) weighted_moment += product_or_zero<T>(q, margin) * weight;
    });
    sums.kl_teacher = sum_of_lanes<T>(kl_teacher) * ln_2;
    sums.kl_student = sum_of_lanes<T>(kl_student);
    sums.mean = mixture.has_slopes ? double(sum_of_lanes<T>(mean)) : sums.kl_student;
    sums.weighted_moment = sum_of_lanes<T>(weighted_moment);
}

// The second pass of symmetric_kl: replaces w = u - v by x (see GradientForm), and sums. Probabilities are times the
// sum of the student's exponentials. `log_ratio` is the mean of w. `student_share` is 0 if it is infinite, and
// otherwise 1.
template <class T, bool standardized>
void symmetrize_chunk(const void* student_logits, const void* teacher_logits, RowBuffers<T> buffers, Chunk chunk,
                      LogitScale<T> scale, MixtureScale<T> mixture, MixtureSums& sums) {
    const T* student = static_cast<const T*>(student_logits);
    const T* teacher = static_cast<const T*>(teacher_logits);
    Vector<T> dot{}, moment{};
    for_each_vector<T>(chunk, [&](int64_t i, int64_t first, int64_t last) KDDP_ALWAYS_INLINE {
        const Vector<T> margin = load_logits<T>(student + i, first, last) - mixture.student_reference;
        const Vector<T> teacher_margin = load_logits<T>(teacher + i, first, last) - mixture.teacher_reference;
        const Vector<T> q = load<T>(buffers.student + i) * mixture.student_probability;
        const Vector<T> p = exp2_of_product<T>(teacher_margin, scale.teacher_to_exponent) * mixture.teacher_probability;
        Vector<T> delta = (teacher_margin - margin) * scale.student_to_nats;  // log(p / q), up to a constant
        if constexpr (standardized) delta = teacher_margin * scale.teacher_to_nats - margin * scale.student_to_nats;
        const Vector<T> weight = -delta > -padding<T> ? broadcast<T>(-padding<T>) : -delta;
        const Vector<T> x = p - mixture.student_share * product_or_zero<T>(q, weight - mixture.log_ratio);
        store<T>(buffers.teacher + i, x);
        dot += product_or_zero<T>(p, delta);
        if constexpr (standardized) moment += product_or_zero<T>(q - x, margin);
    });
    sums.kl_teacher = sum_of_lanes<T>(dot);
    sums.weighted_moment = sum_of_lanes<T>(moment);
}

// The coefficients of RowGradient for one chunk, and where its gradient goes.
template <class T>
struct ChunkGradient {
    T first, second, untempered, constant, label, targets;
    int64_t label_place;  // of the label in this chunk; otherwise below 0
    void* target;         // of the chunk's first class
    bool past_caches;

    // A copy that no store can alias, so that the compiler keeps it in registers. Copied field by field: a wide load of
    // fields that were just stored would stall.
    ChunkGradient copy() const {
        return {first, second, untempered, constant, label, targets, label_place, target, past_caches};
    }
};

template <class T, Distillation distillation, bool with_labels>
KDDP_ALWAYS_INLINE inline Vector<T> gradient_vector(const Exponentials<T>& e, const ChunkGradient<T>& chunk) {
    constexpr GradientForm form =
        distillation == Distillation::forward ? GradientForm::difference : GradientForm::weighted;
    Vector<T> gradient{};
    if constexpr (distillation != Distillation::none)
        gradient = divergence_gradient<form>(e.student, e.other, chunk.first, chunk.second);
    if constexpr (with_labels) gradient += chunk.untempered * e.untempered - chunk.constant;
    return gradient;
}

// Writes gradient(i, first, last), minus the label's coefficient at the label. With `pairs`, gradient_pair(i) gives two
// whole vectors.
template <class T, class Element, bool pairs, class Gradient, class GradientPair>
KDDP_ALWAYS_INLINE inline void write_vectors(Chunk chunk, const ChunkGradient<T>& of, Gradient gradient,
                                             GradientPair gradient_pair) {
    Element* to = static_cast<Element*>(of.target) - chunk.head;
    const int64_t begin = chunk.first_whole(lanes<T>), end = chunk.last_whole(lanes<T>);
    const int64_t place = of.label_place / lanes<T> * lanes<T>;
    const int64_t label = of.label_place >= begin && of.label_place < end ? place : end;
    // Whole vectors before the label's, then those behind it. The label's vector and partial vectors follow.
    for (int64_t i = begin; i < end; i = label + lanes<T>) {
        const int64_t until = i <= label ? label : end;
        if constexpr (pairs)
            for (; i + 2 * lanes<T> <= until; i += 2 * lanes<T>)
                write_pair<T>(to + i, gradient_pair(i), of.past_caches);
        for (; i < until; i += lanes<T>) {
            const Vector<T> v = gradient(i, 0, lanes<T>);
            of.past_caches ? stream_elements<T>(to + i, v) : store_elements<T>(to + i, v);
        }
        if (until == end) break;
    }
    const int64_t others[] = {begin > 0 ? 0 : -1, label < end ? label : -1, end < chunk.end() ? end : -1};
    for (const int64_t i : others) {
        if (i < 0) continue;
        const int64_t first = i < chunk.head ? chunk.head - i : 0, last = smaller(lanes<T>, chunk.end() - i);
        Vector<T> v = gradient(i, first, last);
        if (of.label_place >= i && of.label_place < i + lanes<T>) v[of.label_place - i] -= of.label;
        store_partial<T>(to + i, v, first, last);
    }
}

// Standardized logits only: replaces e^(s - r_s) by everything that is added to the divergence's gradient but for the
// constant. That is untempered * e^(s - r_s) - projection * (s - mean); a term with coefficient 0 is left out.
template <class T>
void add_projection(const T* logits, T* exponentials, Chunk chunk, T untempered, T projection, T mean) {
    for_each_vector<T>(chunk, [&](int64_t i, int64_t first, int64_t last) KDDP_ALWAYS_INLINE {
        Vector<T> sum{};
        if (untempered != 0) sum = untempered * load<T>(exponentials + i);
        if (projection != 0) sum -= projection * (load_logits<T>(logits + i, first, last) - mean);
        store<T>(exponentials + i, sum);
    });
}

// Writes to buffers.untempered what the cross entropy with the targets adds to the gradient: untempered * e^(s - r_s) -
// targets * target. Without a weight that is 0, whatever the targets are.
template <class T>
void subtract_targets(const RowBuffers<T>& from, Chunk chunk, ExpReuse reuse, T untempered, T targets) {
    const RowBuffers<T> buffers = from;
    const T* exponentials = reuse == ExpReuse::separate ? buffers.untempered : buffers.student;
    const int squarings = squarings_of(reuse);
    for_each_vector<T>(chunk, [&](int64_t i, int64_t, int64_t) KDDP_ALWAYS_INLINE {
        Vector<T> sum{};
        if (targets != 0)
            sum =
                untempered * power_of<T>(load<T>(exponentials + i), squarings) - targets * load<T>(buffers.targets + i);
        store<T>(buffers.untempered + i, sum);
    });
}

// Writes the gradient of a chunk from the exponentials in the buffers. `reuse` tells where e^(s - r_s) comes from.
template <class T, class Element, Distillation distillation, ExpReuse reuse>
void write_gradient(const RowBuffers<T>& from, const Chunk& chunk, const ChunkGradient<T>& coefficients) {
    const RowBuffers<T> buffers = from;
    const ChunkGradient<T> of = coefficients.copy();
    const auto gradient = [&](int64_t i, int64_t, int64_t) KDDP_ALWAYS_INLINE {
        constexpr bool reuses = reuse != ExpReuse::absent && reuse != ExpReuse::separate;
        Exponentials<T> e;
        if constexpr (distillation != Distillation::none || reuses) e.student = load<T>(buffers.student + i);
        if constexpr (distillation != Distillation::none) e.other = load<T>(buffers.teacher + i);
        if constexpr (reuses) e.untempered = power_of<T>(e.student, squarings_of(reuse));
        if constexpr (reuse == ExpReuse::separate) e.untempered = load<T>(buffers.untempered + i);
        return gradient_vector<T, distillation, reuse != ExpReuse::absent>(e, of);
    };
    write_vectors<T, Element, false>(chunk, of, gradient, [](int64_t) { return VectorPair<T>{}; });
}

// Converts a gradient in double for a student of another type: float64 on the teacher's side alone.
template <class Element>
void convert_gradient(const double* from, int64_t count, void* to) {
    for (int64_t i = 0; i < count; ++i) from_number(from[i], static_cast<Element*>(to)[i]);
}

// Writes the gradient of a chunk from its logits, exponentiated again around `references`.
template <class T, class Element, class Form, bool shifted>
void recompute_gradient(const void* student_logits, const void* teacher_logits, Chunk chunk, LogitScale<T> scale,
                        const ChunkSums& references, const ChunkGradient<T>& coefficients) {
    const ChunkGradient<T> of = coefficients.copy();
    const Element* student = static_cast<const Element*>(student_logits);
    const Element* teacher = static_cast<const Element*>(teacher_logits);
    const Origin<T> origin = origin_of<T>(references, scale);
    const auto gradient_of = [&](Vector<T> s, Vector<T> t) KDDP_ALWAYS_INLINE {
        ExponentialSums<T, false> unused;
        return gradient_vector<T, Form::distillation, Form::cross_entropy != CrossEntropy::absent>(
            exponentiate<T, Form, shifted>(s, t, origin, scale, unused), of);
    };
    const auto gradient = [&](int64_t i, int64_t first, int64_t last) KDDP_ALWAYS_INLINE {
        Vector<T> t{};
        if constexpr (Form::with_teacher) t = load_logits<T>(teacher + i, first, last);
        return gradient_of(load_logits<T>(student + i, first, last), t);
    };
    const auto gradient_pair = [&](int64_t i) KDDP_ALWAYS_INLINE {
        VectorPair<T> s{}, t{};
        if constexpr (has_pairs<T, Element>) s = load_pair<T>(student + i);
        if constexpr (has_pairs<T, Element> && Form::with_teacher) t = load_pair<T>(teacher + i);
        return VectorPair<T>{gradient_of(s.first, t.first), gradient_of(s.second, t.second)};
    };
    write_vectors<T, Element, has_pairs<T, Element>>(chunk, of, gradient, gradient_pair);
}

}  // namespace
}  // namespace kddp
