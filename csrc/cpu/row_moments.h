// Sum, mean and standard deviation of a row of logits, piece by piece.
#pragma once

#include "cpu/pieces.h"
#include "row_math.h"

namespace kddp {
namespace {

template <class T>
double sum_of_piece(const T* values, Piece piece) {
    Vector<T> sum{};
    over_vectors<T>(
        piece, [&](int64_t i) { sum += load<T>(values + i); },
        [&](int64_t i, int64_t first, int64_t last) { sum += load_partial<T>(values + i, first, last, T(0)); });
    return sum_of_lanes<T>(sum);
}

template <class T>
double squares_around(double mean, const T* values, Piece piece) {
    Vector<T> sum{};
    const auto add = [&](Vector<T> v) { sum += (v - T(mean)) * (v - T(mean)); };
    over_vectors<T>(
        piece, [&](int64_t i) { add(load<T>(values + i)); },
        [&](int64_t i, int64_t first, int64_t last) { add(load_partial<T>(values + i, first, last, T(mean))); });
    return sum_of_lanes<T>(sum);
}

// The squares are around the mean of what has been seen (Chan, Golub, LeVeque 1979).
class RunningMoments {
  public:
    template <class T>
    void add(const T* values, Piece piece) {
        const double number = double(piece.count), mean = sum_of_piece(values, piece) / number;
        const double apart = mean - mean_, total = count_ + number;
        squares_ += squares_around(mean, values, piece) + apart * apart * count_ * number / total;
        mean_ += apart * number / total;
        count_ = total;
    }

    Moments moments() const { return {mean_, count_ > 1 ? std::sqrt(squares_ / (count_ - 1)) : 0}; }

  private:
    double count_ = 0, mean_ = 0, squares_ = 0;
};

}  // namespace
}  // namespace kddp
