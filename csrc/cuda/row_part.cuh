// A row of logits, or the part of it that a team works at: its passes.
//
// A part is read once and kept in shared memory, where each thread finds again what itself has put there; or it is too
// long for that and read again in each pass, of which there are two: the first takes its references from the first
// vectors, and is done again where they mislead.
#pragma once

#include "cuda/kept_row.cuh"
#include "cuda/row_elements.cuh"
#include "cuda/row_vectors.cuh"
#include "cuda/team.cuh"

namespace kddp {

template <class Kinds, int lanes, bool keeps, GradientForm form>
class RowPart {
  public:
    using T = typename Kinds::T;
    static constexpr int n = Kinds::n;
    // Classes that a pass takes at once: a plane of what is kept, or a vector of what is read.
    static constexpr int planes = keeps ? KeptRow<T, n>::plane_count : 1, m = n / planes;

    __device__ __forceinline__ RowPart(const LossLaunch& launch, const TeamScratch<T>& scratch,
                                       SharedArray<uint4> memory, int vectors_at_most)
        : launch_(launch),
          scratch_(scratch),
          a_{memory, vectors_at_most},
          b_{{memory.data + KeptRow<T, n>::plane_count * vectors_at_most}, vectors_at_most} {}

    // Classes start to start + count of a row; none: what follows is of no row. `label` is the row's.
    __device__ __forceinline__ void locate(int64_t row, int64_t start, int count, int64_t label) {
        head_ = head_of<n>(address_of(launch_.student, row, start), launch_.student.type,
                           keeps_gradient() ? 1 : vectors_of_sector);
        count_ = count;
        vectors_ = count > 0 ? (head_ + count + n - 1) / n : 0;
        student_ = source_of<n>(launch_.student, launch_.student_elements, row, start, head_, vectors_);
        if (launch_.rule.with_teacher)
            teacher_ = source_of<n>(launch_.teacher, launch_.teacher_elements, row, start, head_, vectors_);
        left_out_ = false;
        label_ = label >= start && label < start + count ? static_cast<int>(label - start) : -1;
        before_label_ = label < start ? 0 : label - start < count ? static_cast<int>(label - start) : count;
    }

    // Reads what is kept.
    __device__ __forceinline__ void begin() {
        if constexpr (!keeps) return;
        constexpr int at_once = Team<lanes>::is_block || n != 4 ? 1 : 2;  // as registers allow
#pragma unroll at_once
        for (int v = rank(); v < vectors_; v += Team<lanes>::size()) {
            T s[n], t[n];
            read(v, s, t);
#pragma unroll
            for (int p = 0; p < planes; ++p) {
                a_.store(p, v, s + p * m);
                if (launch_.rule.with_teacher) b_.store(p, v, t + p * m);
            }
        }
    }

    __device__ __forceinline__ bool leaves_label_out() const {
        return form == GradientForm::difference && launch_.rule.with_teacher &&
               launch_.rule.divergence == Divergence::dkd;
    }
    __device__ __forceinline__ bool mixes() const {
        return form == GradientForm::weighted && launch_.rule.with_teacher &&
               launch_.rule.divergence == Divergence::jsd;
    }

    // Of one side's logits, less an origin, over the part's classes: the first, their sum, or that of their squares. In
    // double, for every thread.
    enum class Total { first, sum, squares };
    __device__ __forceinline__ double total(bool of_student, Total which, double origin) {
        double values[1] = {0}, sums[1];
        const KeptRow<T, n> side{{of_student ? a_.planes.data : b_.planes.data}, a_.vectors};
        each_chunk(vectors_, [&](int p, int v, int first) {
            T x[m];
            if constexpr (keeps)
                side.load(p, v, x);
            else if (of_student)
                read_vector<Kinds, true>(student_, v, head_, count_, x);
            else
                read_vector<Kinds, false>(teacher_, v, head_, count_, x);
#pragma unroll
            for (int i = 0; i < m; ++i) {
                const double apart = double(x[i]) - origin;
                const bool counts = which == Total::first ? first + i == 0 : has(first + i);
                if (counts) values[0] += which == Total::squares ? apart * apart : apart;
            }
        });
        Team<lanes>::wait();
        sums_of_team<lanes>(values, sums, true, scratch_);
        return sums[0];
    }

    // Both sides' logits of the row's label. What is kept has to have been waited for.
    __device__ __forceinline__ T student_at_label(int64_t row, int64_t label) const {
        if constexpr (keeps) return kept(a_);
        return load_element_of<T>(launch_.student.type, address_of(launch_.student, row, label));
    }
    __device__ __forceinline__ T teacher_at_label(int64_t row, int64_t label) const {
        if constexpr (keeps) return kept(b_);
        return load_element_of<T>(launch_.teacher.type, address_of(launch_.teacher, row, label));
    }

    // Where the label is left out, it is made the least, which of what is kept takes a store.
    __device__ __forceinline__ void leave_label_out() {
        left_out_ = true;
        if (!keeps || label_ < 0) return;
        if ((head_ + label_) / n % Team<lanes>::size() != rank()) return;
        numbers(a_).store(label_place(), lowest_number<T>), numbers(b_).store(label_place(), lowest_number<T>);
    }

    // The highest logits, or the highest of the first vectors, for every thread.
    __device__ __forceinline__ void find_references(Tempering<T>& by) {
        T student = lowest_number<T>, teacher = lowest_number<T>;
        const int end = keeps ? vectors_ : Team<lanes>::size();
        each_until(end < vectors_ ? end : vectors_, [&](int, int, int, const T(&s)[m], const T(&t)[m]) {
#pragma unroll
            for (int i = 0; i < m; ++i) student = larger(student, s[i]), teacher = larger(teacher, t[i]);
        });
        maxima_of_team<lanes>(student, teacher, scratch_);
        set_references(student, teacher, by);
    }

    // The sums of a part around the references, for the team's first warp. The last of them counts the threads that
    // hold a class which stands before the label among the highest.
    __device__ __forceinline__ void sum_up(Tempering<T>& by, T label_logit, double (&sums)[7], T& highest) {
        T student = by.student_reference, teacher = by.teacher_reference;
#pragma unroll 1
        while (add_up(by, label_logit, sums, student, teacher)) {
            Team<lanes>::wait();
            set_references(student, teacher, by);
        }
        highest = student;
    }

    // jsd's second round, for the team's first warp: its sums times the student's.
    __device__ __forceinline__ MixtureSums mix(const Tempering<T>& by, const MixtureScale<T>& scale) {
        MixtureElementSums<T> of;
        each([&](int p, int v, int, T(&s)[m], T(&t)[m]) {
#pragma unroll
            for (int i = 0; i < m; ++i) {
                const T margin = keeps ? s[i] : s[i] - by.student_reference;
                const T teacher_margin = keeps ? t[i] : t[i] - by.teacher_reference;
                const Element<T> e = mix_element(scale, by, margin, teacher_margin, of);
                s[i] = keeps_exponentials() ? e.student : margin, t[i] = e.other;
            }
            if constexpr (keeps) a_.store(p, v, s), b_.store(p, v, t);
        });
        const T values[] = {of.kl_teacher, of.kl_student, of.weighted_moment};
        double sums[3];
        Team<lanes>::wait();
        sums_of_team<lanes>(values, sums, false, scratch_);
        return {sums[0] * ln_2, sums[1], sums[2]};
    }

    // Writes the gradient; the part starts at `to`. `label_margin`: of a label that has been left out. All lanes of a
    // warp come here, and go on together, so that what they store in a step goes together: at a row's ends some of them
    // store in pieces.
    __device__ __forceinline__ void write(const Tempering<T>& by, const GradientScale<T>& scale,
                                          const MixtureScale<T>& mixture, T label_margin, char* to) {
        if constexpr (lanes < 32)
            if (keeps_gradient()) return keep_gradient(by, scale, label_margin);
        const bool aligned = is_aligned<n>(to, launch_.student.type, head_);
        const int steps_end = rank() + (lanes < 32 ? a_.vectors : vectors_);
#pragma unroll 1
        for (int v = rank(); v < steps_end; v += Team<lanes>::size()) {
            if (v < vectors_) write_vector_at(v, by, scale, mixture, label_margin, to, aligned);
            __syncwarp();
        }
    }

    // Writes one value everywhere.
    __device__ __forceinline__ void write_constant(T value, char* to, int count) {
        T values[n];
#pragma unroll
        for (int i = 0; i < n; ++i) values[i] = value;
        const auto address = reinterpret_cast<uintptr_t>(to) / static_cast<unsigned>(size_of(launch_.student.type));
        head_ = static_cast<int>(address % n);
#pragma unroll 1
        for (int v = rank(); first_of(v) < count; v += Team<lanes>::size())
            write_gradient<Kinds>(to, launch_.student.type, true, first_of(v), count, values);
    }

    // Whether the gradient is not written but put in the place of the logits: rows_together.cuh writes it.
    __device__ __forceinline__ bool keeps_gradient() const { return lanes < 32 && launch_.rows_adjoin; }

    __device__ __forceinline__ static int rank() { return Team<lanes>::rank(); }
    __device__ __forceinline__ int count() const { return count_; }

  private:
    // Puts the gradient in the place of the student's logits.
    __device__ __forceinline__ void keep_gradient(const Tempering<T>& by, const GradientScale<T>& scale,
                                                  T label_margin) const {
        each([&](int p, int v, int first, T(&s)[m], T(&t)[m]) {
#pragma unroll
            for (int i = 0; i < m; ++i) {
                T margin;
                const Element<T> e = once_more(by, MixtureScale<T>{}, s[i], t[i], margin);
                s[i] = gradient_of<form>(launch_, scale, e, margin);
                if (first + i == label_) s[i] = at_label(s[i], scale, label_margin);
            }
            a_.store(p, v, s);
        });
    }

    __device__ __forceinline__ void write_vector_at(int v, const Tempering<T>& by, const GradientScale<T>& scale,
                                                    const MixtureScale<T>& mixture, T label_margin, char* to,
                                                    bool aligned) const {
        T values[n];
#pragma unroll
        for (int p = 0; p < planes; ++p) {
            T s[m], t[m];
            take(p, v, s, t);
#pragma unroll
            for (int i = 0; i < m; ++i) {
                T margin;
                const Element<T> e = once_more(by, mixture, s[i], t[i], margin);
                values[p * m + i] = gradient_of<form>(launch_, scale, e, margin);
            }
        }
        if (label_ >= 0 && first_of(v) <= label_ && label_ < first_of(v) + n) {
#pragma unroll
            for (int i = 0; i < n; ++i)
                if (first_of(v) + i == label_) values[i] = at_label(values[i], scale, label_margin);
        }
        write_gradient<Kinds>(to, launch_.student.type, aligned, first_of(v), count_, values);
    }

    // Where the part's label is kept, and what of it.
    __device__ __forceinline__ int label_place() const {
        const int place = head_ + label_;
        return (place % n / m * a_.vectors + place / n) * m + place % m;
    }
    static __device__ __forceinline__ SharedArray<T> numbers(const KeptRow<T, n>& values) {
        return {reinterpret_cast<T*>(values.planes.data)};
    }
    __device__ __forceinline__ T kept(const KeptRow<T, n>& values) const {
        return label_ < 0 ? T(0) : numbers(values).load(label_place());
    }

    __device__ __forceinline__ int first_of(int vector) const { return vector * n - head_; }
    __device__ __forceinline__ bool has(int c) const { return c >= 0 && c < count_; }
    __device__ __forceinline__ bool keeps_exponentials() const {
        return !launch_.rule.standardize && launch_.exp_reuse != ExpReuse::separate;
    }

    __device__ __forceinline__ void read(int v, T (&s)[n], T (&t)[n]) const {
        read_vector<Kinds, true>(student_, v, head_, count_, s);
        if (launch_.rule.with_teacher) {
            read_vector<Kinds, false>(teacher_, v, head_, count_, t);
        } else {
#pragma unroll
            for (int i = 0; i < n; ++i) t[i] = 0;
        }
        if (keeps || !left_out_) return;
#pragma unroll
        for (int i = 0; i < n; ++i)
            if (first_of(v) + i == label_) s[i] = t[i] = lowest_number<T>;
    }

    // A chunk of a vector, from what is kept or from the matrices.
    __device__ __forceinline__ void take(int p, int v, T (&s)[m], T (&t)[m]) const {
        if constexpr (keeps) {
            a_.load(p, v, s);
            if (launch_.rule.with_teacher) {
                b_.load(p, v, t);
            } else {
#pragma unroll
                for (int i = 0; i < m; ++i) t[i] = 0;
            }
        } else {
            read(v, s, t);
        }
    }

    // Calls function(plane, vector, first class) for this thread's chunks. The lanes of a warp begin a plane together:
    // two of different planes could meet in a bank.
    template <class Function>
    __device__ __forceinline__ void each_chunk(int end, Function function) const {
#pragma unroll 1
        for (int p = 0; p < planes; ++p) {
            if (p > 0) __syncwarp();
#pragma unroll 1
            for (int v = rank(); v < end; v += Team<lanes>::size()) function(p, v, first_of(v) + p * m);
        }
    }
    // Calls function(plane, vector, first class, student, teacher) with their values.
    template <class Function>
    __device__ __forceinline__ void each_until(int end, Function function) const {
        each_chunk(end, [&](int p, int v, int first) {
            T s[m], t[m];
            take(p, v, s, t);
            function(p, v, first, s, t);
        });
    }
    template <class Function>
    __device__ __forceinline__ void each(Function function) const {
        each_until(vectors_, function);
    }

    __device__ __forceinline__ void set_references(T student, T teacher, Tempering<T>& by) const {
        by.student_reference = reference_of(student);
        by.teacher_reference = launch_.rule.with_teacher ? reference_of(teacher) : T(0);
    }

    // Returns whether the references mislead: those that do not are within reach of the highest logits.
    __device__ __forceinline__ bool add_up(const Tempering<T>& by, T label_logit, double (&sums)[7], T& student,
                                           T& teacher) {
        ElementSums<T> of;
        bool beaten = false;
        const bool mixture = mixes();
        if (!keeps) student = teacher = lowest_number<T>;
        each([&](int p, int v, int first, T(&s)[m], T(&t)[m]) {
            const int before = before_label_ - first;
#pragma unroll
            for (int i = 0; i < m; ++i) {
                if (!keeps) student = larger(student, s[i]), teacher = larger(teacher, t[i]);
                beaten |= s[i] > label_logit || (s[i] == label_logit && i < before);
                const T margin = s[i] - by.student_reference;
                const T teacher_margin = launch_.rule.with_teacher ? t[i] - by.teacher_reference : T(0);
                const Element<T> e = add_element<form>(launch_, by, margin, teacher_margin, of);
                s[i] = keeps_exponentials() && !mixture ? e.student : margin;
                t[i] = mixture ? teacher_margin : e.other;
            }
            if constexpr (keeps) {
                a_.store(p, v, s);
                if (launch_.rule.with_teacher) b_.store(p, v, t);
            }
        });
        const T values[] = {of.student, of.teacher,    of.student_moment, of.other_moment,
                            of.dot,     of.untempered, T(beaten ? 1 : 0)};
        if (!keeps) {
            Team<lanes>::wait();
            maxima_of_team<lanes>(student, teacher, scratch_);
            if (misled(student, by.student_reference, by.student_to_nats) ||
                (launch_.rule.with_teacher && misled(teacher, by.teacher_reference, by.teacher_to_nats)))
                return true;
        }
        // Of these quotients are subtracted from one another, or from numbers like them.
        const int about_to_cancel = form == GradientForm::weighted ? 5 : launch_.rule.standardize ? 4 : 0;
        sums_of_team<lanes>(values, sums, false, scratch_, about_to_cancel);
        return false;
    }

    // Whether exponentials around this reference overflow or lose what counts. The weighted form takes differences of
    // what a reference away from the highest logit rounds.
    static __device__ __forceinline__ bool misled(T highest, T reference, T to_nats) {
        const T apart = magnitude_of(reference_of(highest) - reference), reach = form == GradientForm::weighted ? 1 : 8;
        return apart > reach || apart * to_nats > reach;
    }
    static __device__ __forceinline__ T magnitude_of(T x) { return x < 0 ? -x : x; }

    // What the gradient of a class is made of, from what is kept or from its logits.
    __device__ __forceinline__ Element<T> once_more(const Tempering<T>& by, const MixtureScale<T>& mixture, T s, T t,
                                                    T& margin) const {
        if constexpr (keeps) {
            margin = s;
            return {keeps_exponentials() ? s : exp2_of(s * by.student_to_exponent), t};
        } else {
            margin = s - by.student_reference;
            const T teacher_margin = launch_.rule.with_teacher ? t - by.teacher_reference : T(0);
            if (mixes()) {
                MixtureElementSums<T> unused;
                return mix_element(mixture, by, margin, teacher_margin, unused);
            }
            ElementSums<T> unused;
            return add_element<form>(launch_, by, margin, teacher_margin, unused);
        }
    }

    // What is subtracted at the label; where it has been left out, its gradient is made of that alone.
    __device__ __forceinline__ T at_label(T gradient, const GradientScale<T>& scale, T label_margin) const {
        if (!leaves_label_out()) return gradient - scale.label;
        T own = 0;
        if (launch_.rule.standardize && launch_.alpha != 0)
            own = -scale.projection * (label_margin + scale.reference_less_mean);
        if (launch_.alpha != 1) own -= scale.constant;
        return own - scale.label;
    }

    const LossLaunch& launch_;
    const TeamScratch<T>& scratch_;
    const KeptRow<T, n> a_, b_;  // logits, then what the gradient is made of
    RowSource student_, teacher_;
    int head_, count_, vectors_, label_, before_label_;
    bool left_out_;
};

}  // namespace kddp
