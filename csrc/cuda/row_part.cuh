// The passes over a row of logits, or over the part of it that a team works on.
//
// A cached part is read once and kept in shared memory. A part that is too long for that is read again in each of two
// passes. In the first one the references are not known yet: each thread has its own, which follow the logits that it
// reads (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
#pragma once

#include <algorithm>

#include "cuda/row_elements.cuh"
#include "cuda/row_vectors.cuh"

namespace kddp {

// The sums of a team's row, from which one thread computes its terms and the coefficients of its gradient. In shared
// memory, because so many doubles do not fit in registers. What every thread of the team reads is in the type that the
// row is computed in: to convert a double takes as long as eight other instructions and more.
template <class T>
struct alignas(16) TeamRecord {  // two doubles per access
    ChunkSums sums;
    MixtureSums mixture;
    TargetSums targets;
    Moments student, teacher;
    TargetMargins target;
    double label_logit, value_scale, gradient_scale;
    RowGradient gradient;
    RowTerms terms;  // of all rows so far
    LogitScale<T> scale;
    GradientScale<T> of_threads;  // `gradient`, as the threads use it
    int64_t row, label;
    int count;
    bool computed, outranked;
    bool sliced, counts;  // its references differ from the row's; it adds to the terms
};

// The highest logits that a thread has read.
template <class T>
struct Highest {
    T student = lowest_number<T>, teacher = lowest_number<T>;
};

template <class Types, int lanes, bool cached, GradientForm form>
class RowPart {
  public:
    using T = typename Types::T;
    static constexpr int n = Types::n;
    // A chunk is what a pass handles at once: m classes, a plane of a cached vector or a whole vector that is read.
    static constexpr int planes = cached ? CachedRow<T, n>::plane_count : 1, m = n / planes;
    // Whether load() finds the references: nothing changes the logits afterwards.
    static constexpr bool loads_references = cached && Types::is_usual;

    KDDP_DEVICE RowPart(const LossLaunch& launch, const TeamScratch<T>& scratch, SharedArray<uint4> memory,
                        int max_vectors)
        : launch_(launch),
          scratch_(scratch),
          student_cache_{memory, max_vectors},
          teacher_cache_{{memory.data + CachedRow<T, n>::plane_count * max_vectors}, max_vectors} {}

    // Selects the classes start to start + count of a row; a count of 0 selects nothing. `label` is the row's.
    KDDP_DEVICE void locate(int64_t row, int64_t start, int count, int64_t label) {
        head_ = head_of<n>(address_of(launch_.student, row, start), launch_.student.type);
        count_ = count;
        vectors_ = count > 0 ? (head_ + count + n - 1) / n : 0;
        student_ = source_of<n>(launch_.student, launch_.student_elements, row, start, head_, vectors_);
        int last_inner = std::min((head_ + count) / n, student_.last_whole);
        if (traits().with_teacher) {
            teacher_ = source_of<n>(launch_.teacher, launch_.teacher_elements, row, start, head_, vectors_);
            last_inner = std::min(last_inner, teacher_.last_whole);
        }
        set_inner(last_inner);
        label_excluded_ = false;
        label_ = label >= start && label < start + count ? static_cast<int>(label - start) : -1;
        before_label_ = label < start ? 0 : label - start < count ? static_cast<int>(label - start) : count;
    }

    // Reads the part into the cache.
    KDDP_DEVICE Highest<T> load() {
        Highest<T> highest;
        if constexpr (!cached) return highest;
        constexpr int unrolled = Team<lanes>::is_block || n != 4 ? 1 : 2;  // as registers allow
#pragma unroll unrolled
        for (int v = rank(); v < vectors_; v += Team<lanes>::size()) {
            T s[n], t[n];
            read_vectors(v, s, t);
#pragma unroll
            for (int p = 0; p < planes; ++p) {
                student_cache_.store(p, v, s + p * m);
                if (traits().with_teacher) teacher_cache_.store(p, v, t + p * m);
            }
            if (loads_references) raise(highest, s, t);
        }
        return highest;
    }

    // Reads the logits in these units from now on (see Moments).
    KDDP_DEVICE void set_units(double student, double teacher) {
        student_factor_ = T(1 / student), teacher_factor_ = T(1 / teacher);
    }

    // Converts the cached logits to the units.
    KDDP_DEVICE void rescale() {
        if (!cached || (student_factor_ == 1 && teacher_factor_ == 1)) return;
#pragma unroll 1
        for (int p = 0; p < planes; ++p) {
#pragma unroll 1
            for (int v = rank(); v < vectors_; v += Team<lanes>::size()) {
                T s[m], t[m];
                load_chunk(p, v, s, t);
#pragma unroll
                for (int i = 0; i < m; ++i)
                    if (is_class(first_of(v) + p * m + i)) s[i] *= student_factor_, t[i] *= teacher_factor_;
                student_cache_.store(p, v, s), teacher_cache_.store(p, v, t);
            }
        }
    }

    KDDP_DEVICE bool excludes_label() const {
        return form == GradientForm::difference && traits().with_teacher && traits().divergence == Divergence::dkd;
    }
    KDDP_DEVICE bool mixes() const {
        return form == GradientForm::weighted && traits().with_teacher && has_second_pass(traits().divergence);
    }

    // Of one side's logits, minus an origin, over the part's classes: the first, the sum, or the sum of squares. In
    // double, for every thread.
    enum class Total { first, sum, squares };
    KDDP_DEVICE double total(bool of_student, Total which, double origin) {
        double values[1] = {0}, sums[1];
        const CachedRow<T, n> cache{{of_student ? student_cache_.memory.data : teacher_cache_.memory.data},
                                    student_cache_.vectors};
        for_each_position([&](int p, int v, int first) {
            T x[m];
            if constexpr (cached)
                cache.load(p, v, x);
            else if (of_student)
                read_vector<Types, true>(student_, v, head_, count_, x);
            else
                read_vector<Types, false>(teacher_, v, head_, count_, x);
#pragma unroll
            for (int i = 0; i < m; ++i) {
                const double delta = double(x[i]) - origin;
                const bool counts = which == Total::first ? first + i == 0 : is_class(first + i);
                if (counts) values[0] += which == Total::squares ? delta * delta : delta;
            }
        });
        Team<lanes>::sync();
        sums_of_team<lanes>(values, sums, true, scratch_);
        return sums[0];
    }

    // The logits of the row's label. A barrier must separate this from load().
    KDDP_DEVICE T student_at_label(int64_t row, int64_t label) const {
        if constexpr (cached) return label_in_cache(student_cache_);
        return load_element_of<T>(launch_.student.type, address_of(launch_.student, row, label)) * student_factor_;
    }
    KDDP_DEVICE T teacher_at_label(int64_t row, int64_t label) const {
        if constexpr (cached) return label_in_cache(teacher_cache_);
        return load_element_of<T>(launch_.teacher.type, address_of(launch_.teacher, row, label)) * teacher_factor_;
    }

    // Excludes the label from the sums: its logit becomes the lowest number.
    KDDP_DEVICE void exclude_label() {
        label_excluded_ = true;
        if (!cached || label_ < 0) return;
        if ((head_ + label_) / n % Team<lanes>::size() != rank()) return;
        numbers(student_cache_).store(label_index(), lowest_number<T>);
        numbers(teacher_cache_).store(label_index(), lowest_number<T>);
    }

    // Sets the references of a cached part to its highest logits. `highest`: what load() has returned.
    KDDP_DEVICE void find_references(Highest<T> highest, LogitScale<T>& scale) {
        if constexpr (!cached) return;
        if (!loads_references)
            for_each_chunk([&](int, int, int, const T(&s)[m], const T(&t)[m]) { raise(highest, s, t); });
        maxima_of_team<lanes>(highest.student, highest.teacher, scratch_);
        set_references(highest, scale);
    }

    // The sums of the part relative to the references, for the team's first warp. The last sum counts the threads that
    // hold a class which ranks above the label. Sets the references of a part that is not cached.
    KDDP_DEVICE void sum(LogitScale<T>& scale, T label_logit, double (&sums)[7]) {
        ElementSums<T> thread;
        bool outranked = false;
        const bool mixture = mixes();
        if (!cached) set_references({}, scale);
        LogitScale<T> own = scale;
        for_each_chunk([&](int p, int v, int first, T(&s)[m], T(&t)[m]) {
            const int before = before_label_ - first;
            if (!cached) raise_references(s, t, own, thread);
#pragma unroll
            for (int i = 0; i < m; ++i) {
                outranked |= s[i] > label_logit || (s[i] == label_logit && i < before);
                const T margin = s[i] - own.student_reference;
                const T teacher_margin = traits().with_teacher ? t[i] - own.teacher_reference : T(0);
                const Element<T> e = add_element<Types, form>(launch_, own, margin, teacher_margin, thread);
                s[i] = caches_exponentials() && !mixture ? e.student : margin;
                t[i] = mixture ? teacher_margin : e.other;
            }
            if constexpr (cached) {
                student_cache_.store(p, v, s);
                if (traits().with_teacher) teacher_cache_.store(p, v, t);
            }
        });
        if (!cached) {
            Highest<T> highest{own.student_reference, own.teacher_reference};
            Team<lanes>::sync();
            maxima_of_team<lanes>(highest.student, highest.teacher, scratch_);
            set_references(highest, scale);
            rebase_sums<Types, form>(launch_, own, scale, thread);
        }
        const T values[] = {thread.student, thread.teacher,    thread.student_moment, thread.other_moment,
                            thread.dot,     thread.untempered, T(outranked ? 1 : 0)};
        // Quotients of the first sums are later subtracted from one another, or from similar numbers.
        const int cancelling = form == GradientForm::weighted ? 5 : traits().standardize ? 4 : 0;
        sums_of_team<lanes>(values, sums, false, scratch_, cancelling);
    }

    // The sums over the targets, for the team's first warp, and the predictions with classes counted from the part's
    // first. The logits must be in the cache. `label_logit`: of the row's label, which may be excluded.
    KDDP_DEVICE TargetSums sum_targets(int64_t row, int64_t start, T reference, T label_logit,
                                       Predictions& predictions) {
        const RowSource soft_labels = soft_labels_of(launch_, row, start);
        T values[2] = {0, 0}, logit = -HUGE_VAL, label = -HUGE_VAL;
        int logit_class = 0, label_class = 0;
#pragma unroll 1
        for (int v = rank(); v < vectors_; v += Team<lanes>::size()) {
            T z[n];
            read_soft_labels(launch_, soft_labels, v, z);
#pragma unroll
            for (int p = 0; p < planes; ++p) {
                T s[m];
                if constexpr (cached)
                    student_cache_.load(p, v, s);
                else
                    read_vector<Types, true>(student_, v, head_, count_, s);
#pragma unroll
                for (int i = 0; i < m; ++i) {
                    const int c = first_of(v) + p * m + i;
                    if (!is_class(c)) continue;
                    if (!cached) s[i] *= student_factor_;
                    if (c == label_) s[i] = label_logit;
                    const T target = target_of(launch_, start, c, z[p * m + i]);
                    values[0] += target, values[1] += target * (s[i] - reference);
                    if (s[i] > logit) logit = s[i], logit_class = c;
                    if (z[p * m + i] > label) label = z[p * m + i], label_class = c;
                }
            }
        }
        T highest_logit = logit, highest_label = label;
        Team<lanes>::sync();
        maxima_of_team<lanes>(highest_logit, highest_label, scratch_);
        T first_logit = logit == highest_logit ? T(-logit_class) : lowest_number<T>;
        T first_label = label == highest_label ? T(-label_class) : lowest_number<T>;
        Team<lanes>::sync();
        maxima_of_team<lanes>(first_logit, first_label, scratch_);
        predictions = {double(highest_logit), -double(first_logit), double(highest_label), -double(first_label)};
        double sums[2];
        sums_of_team<lanes>(values, sums, false, scratch_, 2);
        Team<lanes>::sync();
        return {double(reference), sums[0], sums[1]};
    }

    // The second pass, for the team's first warp: its sums times the student's sum. KL(p || m) is in bits.
    KDDP_DEVICE MixtureSums sum_mixture(const LogitScale<T>& scale, const MixtureScale<T>& mixture) {
        MixtureSumsOf<T> thread;
        for_each_chunk([&](int p, int v, int, T(&s)[m], T(&t)[m]) {
#pragma unroll
            for (int i = 0; i < m; ++i) {
                const T margin = cached ? s[i] : s[i] - scale.student_reference;
                const T teacher_margin = cached ? t[i] : t[i] - scale.teacher_reference;
                const Element<T> e = mix_element(mixture, scale, margin, teacher_margin, thread);
                s[i] = caches_exponentials() ? e.student : margin, t[i] = e.other;
            }
            if constexpr (cached) student_cache_.store(p, v, s), teacher_cache_.store(p, v, t);
        });
        const T values[] = {thread.kl_teacher, thread.kl_student, thread.mean, thread.weighted_moment};
        double sums[4];
        Team<lanes>::sync();
        sums_of_team<lanes>(values, sums, false, scratch_);
        return {sums[0], sums[1], sums[2], sums[3]};
    }

    // Writes the gradient of the part, which starts at `to`. `label_margin`: of an excluded label. All lanes of a warp
    // call this and stay in step, so that the stores of one step are issued together: at the ends of a row some lanes
    // need several stores.
    KDDP_DEVICE void write(const LogitScale<T>& scale, const GradientScale<T>& gradient, const MixtureScale<T>& mixture,
                           T label_margin, char* to) {
        const bool aligned = is_aligned<n>(to, launch_.student.type, head_);
        set_inner(aligned ? (head_ + count_) / n : 0);
        const int end = rank() + (lanes < 32 ? student_cache_.vectors : vectors_);
#pragma unroll 1
        for (int v = rank(); v < end; v += Team<lanes>::size()) {
            if (v < vectors_) write_vector_at(v, scale, gradient, mixture, label_margin, to, aligned);
            __syncwarp();
        }
    }

    // Writes one value as the gradient of every class.
    KDDP_DEVICE void write_constant(T value, char* to, int count) {
        T values[n];
#pragma unroll
        for (int i = 0; i < n; ++i) values[i] = value;
        const auto element = reinterpret_cast<uintptr_t>(to) / static_cast<unsigned>(size_of(launch_.student.type));
        head_ = static_cast<int>(element % n);
#pragma unroll 1
        for (int v = rank(); first_of(v) < count; v += Team<lanes>::size())
            write_gradient<Types>(to, launch_.student.type, false, true, first_of(v), count, values);
    }

    static KDDP_DEVICE int rank() { return Team<lanes>::rank(); }
    KDDP_DEVICE int count() const { return count_; }

  private:
    KDDP_DEVICE void write_vector_at(int v, const LogitScale<T>& scale, const GradientScale<T>& gradient,
                                     const MixtureScale<T>& mixture, T label_margin, char* to, bool aligned) const {
        T values[n];
#pragma unroll
        for (int p = 0; p < planes; ++p) {
            T s[m], t[m];
            load_chunk(p, v, s, t);
#pragma unroll
            for (int i = 0; i < m; ++i) {
                T margin;
                const Element<T> e = recompute(scale, mixture, s[i], t[i], margin);
                values[p * m + i] = gradient_of<Types, form>(launch_, gradient, e, margin);
            }
        }
        if (static_cast<unsigned>(label_ - first_of(v)) < n) {
#pragma unroll
            for (int i = 0; i < n; ++i)
                if (first_of(v) + i == label_) values[i] = label_gradient(values[i], gradient, label_margin);
        }
        if (traits().with_targets) subtract_targets(v, values);
        write_gradient<Types>(to, launch_.student.type, is_inner(v), aligned, first_of(v), count_, values);
    }

    // Subtracts the targets, times their coefficient. What that takes is worked out for each vector, because the
    // registers that would keep it are needed.
    KDDP_DEVICE void subtract_targets(int v, T (&values)[n]) const {
        const LossLaunch& launch = opaque(launch_);
        const TeamRecord<T>& record = scratch_.records[Team<lanes>::number() + opaque_zero()];
        const T coefficient = record.of_threads.targets;
        if (coefficient == 0) return;  // whatever the targets are
        const int64_t start = cached ? 0 : opaque_block() % launch.slices * int64_t(launch.slice_classes);
        T z[n];
        read_soft_labels(launch, soft_labels_of(launch, record.row, start), v, z);
#pragma unroll
        for (int i = 0; i < n; ++i)
            if (is_class(first_of(v) + i)) values[i] -= coefficient * target_of(launch, start, first_of(v) + i, z[i]);
    }

    KDDP_DEVICE RowSource soft_labels_of(const LossLaunch& launch, int64_t row, int64_t start) const {
        if (!launch.soft_labels.data) return {};
        return source_of<n>(launch.soft_labels, launch.soft_label_elements, row, start, head_, vectors_);
    }
    KDDP_DEVICE void read_soft_labels(const LossLaunch& launch, const RowSource& source, int v, T (&z)[n]) const {
        if (launch.soft_labels.data) return read_vector<Types, false>(source, v, head_, count_, z);
#pragma unroll
        for (int i = 0; i < n; ++i) z[i] = 0;
    }

    // The target of class c of the part, see TargetSums. `z`: its soft label.
    static KDDP_DEVICE T target_of(const LossLaunch& launch, int64_t start, int c, T z) {
        const T target = T(launch.target_share) * z + T(launch.target_constant);
        if (!launch.class_weights) return target;
        return target * load_global(static_cast<const T*>(launch.class_weights) + start + c);
    }

    // The index of the label in a cached row, seen as an array of numbers.
    KDDP_DEVICE int label_index() const {
        const int position = head_ + label_;
        return (position % n / m * student_cache_.vectors + position / n) * m + position % m;
    }
    static KDDP_DEVICE SharedArray<T> numbers(const CachedRow<T, n>& row) {
        return {reinterpret_cast<T*>(row.memory.data)};
    }
    KDDP_DEVICE T label_in_cache(const CachedRow<T, n>& row) const {
        return label_ < 0 ? T(0) : numbers(row).load(label_index());
    }

    KDDP_DEVICE CallTraits traits() const { return traits_for<Types>(launch_); }

    KDDP_DEVICE int first_of(int vector) const { return vector * n - head_; }
    // Inner vectors are aligned and lie entirely in the row; `end` is behind the last of them, if there are any. Only
    // the kernels of usual calls treat them in a way of their own: the others have no registers left for that.
    KDDP_DEVICE void set_inner(int end) {
        first_inner_ = (head_ + n - 1) / n;
        inner_count_ = static_cast<unsigned>(std::max(end - first_inner_, 0));
    }
    KDDP_DEVICE bool is_inner(int vector) const {
        return Types::is_usual && static_cast<unsigned>(vector - first_inner_) < inner_count_;
    }
    static KDDP_DEVICE void read_inner_vector(const RowSource& source, int vector, T (&to)[n]) {
        load_run<T, Types::type, n>(source.data + static_cast<int64_t>(vector) * 16, to);
    }
    KDDP_DEVICE bool is_class(int c) const { return c >= 0 && c < count_; }
    KDDP_DEVICE bool caches_exponentials() const {
        return Types::is_usual || (!launch_.standardize && launch_.exp_reuse != ExpReuse::separate);
    }

    KDDP_DEVICE void read_vectors(int v, T (&s)[n], T (&t)[n]) const {
        if constexpr (Types::is_usual)
            if (is_inner(v)) return read_inner_vector(student_, v, s), read_inner_vector(teacher_, v, t);
        read_vector<Types, true>(student_, v, head_, count_, s);
        if (traits().with_teacher) {
            read_vector<Types, false>(teacher_, v, head_, count_, t);
        } else {
#pragma unroll
            for (int i = 0; i < n; ++i) t[i] = 0;
        }
        if constexpr (cached) return;
        if (traits().standardize) {
#pragma unroll
            for (int i = 0; i < n; ++i) {
                if (!is_class(first_of(v) + i)) continue;  // padding stays the lowest number
                s[i] *= student_factor_, t[i] *= teacher_factor_;
            }
        }
        if (!excludes_label() || !label_excluded_) return;
#pragma unroll
        for (int i = 0; i < n; ++i)
            if (first_of(v) + i == label_) s[i] = t[i] = lowest_number<T>;
    }

    KDDP_DEVICE void load_chunk(int p, int v, T (&s)[m], T (&t)[m]) const {
        if constexpr (cached) {
            student_cache_.load(p, v, s);
            if (traits().with_teacher) {
                teacher_cache_.load(p, v, t);
            } else {
#pragma unroll
                for (int i = 0; i < m; ++i) t[i] = 0;
            }
        } else {
            read_vectors(v, s, t);
        }
    }

    // Calls function(plane, vector, first class) for this thread's chunks. The lanes of a warp start each plane
    // together: lanes in different planes could meet in a bank.
    template <class Function>
    KDDP_DEVICE void for_each_position(Function function) const {
#pragma unroll 1
        for (int p = 0; p < planes; ++p) {
            if (p > 0) __syncwarp();
#pragma unroll 1
            for (int v = rank(); v < vectors_; v += Team<lanes>::size()) function(p, v, first_of(v) + p * m);
        }
    }
    // Calls function(plane, vector, first class, student, teacher) with the values of each chunk.
    template <class Function>
    KDDP_DEVICE void for_each_chunk(Function function) const {
        for_each_position([&](int p, int v, int first) {
            T s[m], t[m];
            load_chunk(p, v, s, t);
            function(p, v, first, s, t);
        });
    }

    template <int count>
    static KDDP_DEVICE void raise(Highest<T>& highest, const T (&student)[count], const T (&teacher)[count]) {
#pragma unroll
        for (int i = 0; i < count; ++i) {
            highest.student = larger(highest.student, student[i]);
            highest.teacher = larger(highest.teacher, teacher[i]);
        }
    }

    KDDP_DEVICE void set_references(const Highest<T>& highest, LogitScale<T>& scale) const {
        scale.student_reference = reference_of(highest.student);
        scale.teacher_reference = traits().with_teacher ? reference_of(highest.teacher) : T(0);
    }

    // Raises a thread's references to the highest logits of a chunk that is too far above them, and converts its sums.
    KDDP_DEVICE void raise_references(const T (&s)[m], const T (&t)[m], LogitScale<T>& own,
                                      ElementSums<T>& sums) const {
        Highest<T> highest;
        raise(highest, s, t);
        const bool is_far =
            highest.student - own.student_reference > reach(own.student_to_nats, own.unit) ||
            (traits().with_teacher && highest.teacher - own.teacher_reference > reach(own.teacher_to_nats, T(1)));
        if (__builtin_expect(!is_far, 1)) return;
        LogitScale<T> raised = own;
        raised.student_reference = larger(highest.student, own.student_reference);
        raised.teacher_reference = larger(highest.teacher, own.teacher_reference);
        rebase_sums<Types, form>(launch_, own, raised, sums);
        own = raised;
    }

    // How far logits may be above their reference: exponentials must not overflow, and what a distant reference rounds
    // away is amplified by the differences of the weighted form.
    static KDDP_DEVICE T reach(T to_nats, T unit) {
        if constexpr (Types::is_usual) return 8;  // their temperatures are at least 1
        constexpr T nats = form == GradientForm::weighted ? 1 : 8;
        return std::min(8 / unit, nats / to_nats);
    }

    // The element of a class for the gradient, from the cached values or from the logits.
    KDDP_DEVICE Element<T> recompute(const LogitScale<T>& scale, const MixtureScale<T>& mixture, T s, T t,
                                     T& margin) const {
        if constexpr (cached) {
            margin = s;
            return {caches_exponentials() ? s : fast_exp2(s * scale.student_to_exponent), t};
        } else {
            margin = s - scale.student_reference;
            const T teacher_margin = traits().with_teacher ? t - scale.teacher_reference : T(0);
            if (mixes()) {
                MixtureSumsOf<T> unused;
                return mix_element(mixture, scale, margin, teacher_margin, unused);
            }
            ElementSums<T> unused;
            return add_element<Types, form>(launch_, scale, margin, teacher_margin, unused);
        }
    }

    // The gradient at the label. An excluded label has only its own terms.
    KDDP_DEVICE T label_gradient(T gradient, const GradientScale<T>& scale, T label_margin) const {
        if (!excludes_label()) return gradient - scale.label;
        T own = 0;
        if (traits().standardize && traits().weighs_kd)
            own = -scale.projection * (label_margin + scale.reference_less_mean);
        if (traits().weighs_ce) own -= scale.constant;
        return own - scale.label;
    }

    const LossLaunch& launch_;
    const TeamScratch<T>& scratch_;
    const CachedRow<T, n> student_cache_, teacher_cache_;  // logits, later what the gradient is computed from
    RowSource student_, teacher_;
    int head_, count_, vectors_, label_, before_label_;
    int first_inner_;
    unsigned inner_count_;
    bool label_excluded_;
    T student_factor_ = 1, teacher_factor_ = 1;  // 1 / unit
};

}  // namespace kddp
