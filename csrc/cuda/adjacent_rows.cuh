// The rows of a warp's teams as one long row, where they are contiguous in every matrix but do not begin at a sector:
// the warp then touches a sector that two rows share only once. Between reading and writing, each team finds its row in
// shared memory as if it had read the row itself.
#pragma once

#include "cuda/row_part.cuh"

namespace kddp {

template <class Types, int lanes>
class AdjacentRows {
    using T = typename Types::T;
    static constexpr int n = Types::n, planes = CachedRow<T, n>::plane_count, m = n / planes;
    static constexpr int teams = lanes < 32 ? 32 / lanes : 1;

  public:
    static KDDP_DEVICE bool apply_to(const LossLaunch& launch) { return lanes < 32 && launch.rows_contiguous; }

    // `row` and `memory` are those of the thread's team.
    KDDP_DEVICE AdjacentRows(const LossLaunch& launch, SharedArray<uint4> memory, int64_t row)
        : launch_(launch), classes_(static_cast<int>(launch.classes)) {
        const int team = Team<lanes>::number() % teams;
        first_row_ = row - team, memory_ = memory.data - team * launch.team_vectors;
        rows_ = launch.rows - first_row_ < teams ? static_cast<int>(launch.rows - first_row_) : teams;
        head_ = head_of<n>(address_of(launch.student, first_row_, 0), launch.student.type);
    }

    // Reads the rows of the teams whose lanes are in `computed`.
    KDDP_DEVICE void read(unsigned computed) const {
        const int vectors = vector_count();
        RowSource student, teacher{};
        student = source_of<n>(launch_.student, launch_.student_elements, first_row_, 0, head_, vectors);
        if (launch_.with_teacher)
            teacher = source_of<n>(launch_.teacher, launch_.teacher_elements, first_row_, 0, head_, vectors);
#pragma unroll 1
        for (int v = static_cast<int>(threadIdx.x % 32); v < vectors; v += 32) {
            T values[n];
            read_vector<Types, true>(student, v, head_, rows_ * classes_, values);
            store(v, computed, 0, values);
            if (!launch_.with_teacher) continue;
            read_vector<Types, false>(teacher, v, head_, rows_ * classes_, values);
            store(v, computed, planes * launch_.side_vectors, values);
        }
    }

    // Writes the gradients, with which each team has replaced its student's logits.
    KDDP_DEVICE void write() const {
#pragma unroll 1
        for (int v = static_cast<int>(threadIdx.x % 32); v < vector_count(); v += 32) {
            T values[n];
#pragma unroll 1
            for (int row = 0; row < rows_; ++row) {
                const int first = first_of(v) - row * classes_;
                if (first >= classes_ || first + n <= 0) continue;
#pragma unroll
                for (int p = 0; p < planes; ++p) {
                    T chunk[m];
                    row_at(row, 0).load(p, vector_of(v, row), chunk);
#pragma unroll
                    for (int i = 0; i < m; ++i)
                        if (is_class(first + p * m + i)) values[p * m + i] = chunk[i];
                }
            }
            const LossLaunch& launch = opaque(launch_);
            char* const to =
                static_cast<char*>(launch.logits_gradient) + first_row_ * launch.classes * size_of(launch.student.type);
            write_gradient<Types>(to, launch.student.type, is_aligned<n>(to, launch.student.type, head_), first_of(v),
                                  rows_ * classes_, values);
        }
    }

    // Replaces all logits of the team's student by one value.
    KDDP_DEVICE void fill(T value) const {
        T values[m];
#pragma unroll
        for (int i = 0; i < m; ++i) values[i] = value;
#pragma unroll 1
        for (int v = Team<lanes>::rank(); v < launch_.side_vectors; v += lanes)
#pragma unroll
            for (int p = 0; p < planes; ++p) row_at(Team<lanes>::number() % teams, 0).store(p, v, values);
    }

  private:
    KDDP_DEVICE int vector_count() const { return (head_ + rows_ * classes_ + n - 1) / n; }
    KDDP_DEVICE int first_of(int vector) const { return vector * n - head_; }
    KDDP_DEVICE bool is_class(int c) const { return c >= 0 && c < classes_; }
    // The number within one row of a vector of the long row: both begin at multiples of a vector's bytes.
    KDDP_DEVICE int vector_of(int vector, int row) const { return vector - (head_ + row * classes_) / n; }
    KDDP_DEVICE CachedRow<T, n> row_at(int row, int offset) const {
        return {{memory_ + row * launch_.team_vectors + offset}, launch_.side_vectors};
    }

    // Stores a vector in each row that it has classes of. Classes of other rows become the lowest number.
    KDDP_DEVICE void store(int v, unsigned computed, int offset, const T (&values)[n]) const {
#pragma unroll 1
        for (int row = 0; row < rows_; ++row) {
            const int first = first_of(v) - row * classes_;
            if (first >= classes_ || first + n <= 0 || !(computed >> (row * lanes) & 1)) continue;
#pragma unroll
            for (int p = 0; p < planes; ++p) {
                T chunk[m];
#pragma unroll
                for (int i = 0; i < m; ++i)
                    chunk[i] = is_class(first + p * m + i) ? values[p * m + i] : lowest_number<T>;
                row_at(row, offset).store(p, vector_of(v, row), chunk);
            }
        }
    }

    const LossLaunch& launch_;
    uint4* memory_;
    int64_t first_row_;
    int classes_, rows_, head_;
};

}  // namespace kddp
