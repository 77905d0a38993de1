// The rows of a warp's teams as one, where they lie side by side in every matrix and do not begin with a sector: the
// warp reads and writes them as one long row, so that what two of them share is touched once. In between each team has
// its row in shared memory, as where it reads it itself.
#pragma once

#include "cuda/row_part.cuh"

namespace kddp {

template <class Kinds, int lanes>
class RowsTogether {
    using T = typename Kinds::T;
    static constexpr int n = Kinds::n, planes = KeptRow<T, n>::plane_count, m = n / planes;
    static constexpr int teams = lanes < 32 ? 32 / lanes : 1;

  public:
    static __device__ __forceinline__ bool serves(const LossLaunch& launch) { return lanes < 32 && launch.rows_adjoin; }

    // `row` and `memory` are those of the thread's team.
    __device__ __forceinline__ RowsTogether(const LossLaunch& launch, SharedArray<uint4> memory, int64_t row)
        : launch_(launch), classes_(static_cast<int>(launch.classes)) {
        const int team = Team<lanes>::number() % teams;
        first_row_ = row - team, memory_ = memory.data - team * launch.vectors_of_team;
        rows_ = launch.rows - first_row_ < teams ? static_cast<int>(launch.rows - first_row_) : teams;
        head_ = head_of<n>(address_of(launch.student, first_row_, 0), launch.student.type);
    }

    // Reads the rows of those teams that compute theirs: `computed` has their lanes.
    __device__ __forceinline__ void read(unsigned computed) const {
        const int vectors = vectors_of_all();
        RowSource student, teacher{};
        student = source_of<n>(launch_.student, launch_.student_elements, first_row_, 0, head_, vectors);
        if (launch_.rule.with_teacher)
            teacher = source_of<n>(launch_.teacher, launch_.teacher_elements, first_row_, 0, head_, vectors);
#pragma unroll 1
        for (int v = static_cast<int>(threadIdx.x % 32); v < vectors; v += 32) {
            T values[n];
            read_vector<Kinds, true>(student, v, head_, rows_ * classes_, values);
            store(v, computed, 0, values);
            if (!launch_.rule.with_teacher) continue;
            read_vector<Kinds, false>(teacher, v, head_, rows_ * classes_, values);
            store(v, computed, planes * launch_.vectors_of_side, values);
        }
    }

    // Writes what each team has put in the place of its student's logits.
    __device__ __forceinline__ void write() const {
#pragma unroll 1
        for (int v = static_cast<int>(threadIdx.x % 32); v < vectors_of_all(); v += 32) {
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
            const LossLaunch& launch = again(launch_);
            char* const to = launch.gradient + first_row_ * launch.classes * size_of(launch.student.type);
            write_gradient<Kinds>(to, launch.student.type, is_aligned<n>(to, launch.student.type, head_), first_of(v),
                                  rows_ * classes_, values);
        }
    }

    // Puts one value in the place of all of the team's logits.
    __device__ __forceinline__ void fill(T value) const {
        T values[m];
#pragma unroll
        for (int i = 0; i < m; ++i) values[i] = value;
#pragma unroll 1
        for (int v = Team<lanes>::rank(); v < launch_.vectors_of_side; v += lanes)
#pragma unroll
            for (int p = 0; p < planes; ++p) row_at(Team<lanes>::number() % teams, 0).store(p, v, values);
    }

  private:
    __device__ __forceinline__ int vectors_of_all() const { return (head_ + rows_ * classes_ + n - 1) / n; }
    __device__ __forceinline__ int first_of(int vector) const { return vector * n - head_; }
    __device__ __forceinline__ bool is_class(int c) const { return c >= 0 && c < classes_; }
    // Of all rows' vector, the number in one of them: both begin at multiples of a vector's bytes.
    __device__ __forceinline__ int vector_of(int vector, int row) const {
        return vector - (head_ + row * classes_) / n;
    }
    __device__ __forceinline__ KeptRow<T, n> row_at(int row, int offset) const {
        return {{memory_ + row * launch_.vectors_of_team + offset}, launch_.vectors_of_side};
    }

    // Keeps a vector in each of the rows that it has classes of; to the others' classes the lowest number.
    __device__ __forceinline__ void store(int v, unsigned computed, int offset, const T (&values)[n]) const {
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
