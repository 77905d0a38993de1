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

// Sum of (v - origin)^power.
template <int power, class T>
double sum_around(double origin, const T* values, Piece piece) {
    Vector<T> sum{};
    const auto add = [&](Vector<T> v) { sum += power == 1 ? v - T(origin) : (v - T(origin)) * (v - T(origin)); };
    over_vectors<T>(
        piece, [&](int64_t i) { add(load<T>(values + i)); },
        [&](int64_t i, int64_t first, int64_t last) { add(load_partial<T>(values + i, first, last, T(origin))); });
    const double result = sum_of_lanes<T>(sum);
    if (std::isfinite(result)) return result;
    double again = 0;  // float does not hold the square of 1e20
    for (int64_t i = piece.head; i < piece.end(); ++i) again += std::pow(double(values[i]) - origin, power);
    return again;
}

// The squares are around the mean of what has been seen (Chan, Golub, LeVeque 1979), the mean is above the first value:
// equal logits have a deviation of 0, not of a rounding.
class RunningMoments {
  public:
    template <class T>
    void add(const T* values, Piece piece) {
        if (count_ == 0) mean_ = double(values[piece.head]);
        const double number = double(piece.count), total = count_ + number;
        const double mean = mean_ + sum_around<1>(mean_, values, piece) / number, apart = mean - mean_;
        squares_ += sum_around<2>(mean, values, piece) + apart * apart * count_ * number / total;
        mean_ += apart * number / total;
        count_ = total;
    }

    Moments moments() const { return {mean_, count_ > 1 ? std::sqrt(squares_ / (count_ - 1)) : 0}; }

  private:
    double count_ = 0, mean_ = 0, squares_ = 0;
};

}  // namespace
}  // namespace kddp
