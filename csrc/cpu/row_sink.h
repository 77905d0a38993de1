// Where the chosen columns of a row go: to the target, or into the sum of what they contributed.
//
// A sink takes staged bytes and leaves those that fill no whole vector at the beginning of the stage, for next time.
#pragma once

#include "cpu/elements.h"
#include "cpu/sizes.h"

namespace kddp {
namespace {

inline void stream_line(char* to, const char* from) {
    for (int64_t i = 0; i < line_bytes; i += KDDP_VECTOR_BYTES) stream<KDDP_VECTOR_BYTES>(to + i, from + i);
}

// A stage can be read one line past its end.
inline int64_t move_rest_to_front(char* staged, int64_t used, int64_t bytes) {
    char line[line_bytes];
    std::memcpy(line, staged + used, line_bytes);
    std::memcpy(staged, line, line_bytes);
    return bytes - used;
}

// A row of the target. Past the caches, memory is written in whole lines without being read first.
class TargetRow {
  public:
    TargetRow(void* to, bool past_caches) : to_(static_cast<char*>(to)), past_caches_(past_caches) {}

    int64_t write(char* staged, int64_t bytes) {
        const int64_t used = write_lines(staged, nullptr, bytes);
        return move_rest_to_front(staged, used, bytes);
    }

    // Bytes that lie side by side in the source. `next` is what is read after them.
    void copy(const char* from, const char* next, int64_t bytes) {
        const int64_t used = past_caches_ ? write_lines(from, next, bytes) : 0;
        finish(from + used, bytes - used);
    }

    void finish(const char* from, int64_t bytes) {
        std::memcpy(to_, from, bytes);
        to_ += bytes;
    }

  private:
    int64_t write_lines(const char* from, const char* next, int64_t bytes) {
        int64_t i = smaller(bytes, int64_t(-reinterpret_cast<uintptr_t>(to_) % line_bytes));
        std::memcpy(to_, from, i);
        if (past_caches_ && next) {
            for (; i + line_bytes <= bytes; i += line_bytes) {
                prefetch(next + i);
                stream_line(to_ + i, from + i);
            }
        } else if (past_caches_) {
            for (; i + line_bytes <= bytes; i += line_bytes) stream_line(to_ + i, from + i);
        } else {
            for (; i + line_bytes <= bytes; i += line_bytes) std::memcpy(to_ + i, from + i, line_bytes);
        }
        to_ += i;
        return i;
    }

    char* to_;
    bool past_caches_;
};

// The sum of elements times means, in double.
template <class Element>
class Contribution {
    using T = std::conditional_t<sizeof(Element) == sizeof(double), double, float>;

  public:
    // `means` holds one for every element that comes.
    explicit Contribution(const double* means) : means_(means) {}

    int64_t write(char* staged, int64_t bytes) { return move_rest_to_front(staged, add_vectors(staged, bytes), bytes); }

    void copy(const char* from, const char*, int64_t bytes) {
        const int64_t used = add_vectors(from, bytes);
        finish(from + used, bytes - used);
    }

    void finish(const char* from, int64_t bytes) {
        for (int64_t i = 0; i < bytes; i += sizeof(Element)) {
            Element element;
            std::memcpy(&element, from + i, sizeof element);
            rest_ += double(to_number(element)) * *means_++;
        }
    }

    double sum() const { return sum_of_lanes<double>(low_ + high_) + rest_; }

  private:
    int64_t add_vectors(const char* from, int64_t bytes) {
        constexpr int64_t step = lanes<T> * sizeof(Element);
        int64_t i = 0;
        for (; i + step <= bytes; i += step) {
            Vector<double> low, high;
            widen(load_elements<T>(reinterpret_cast<const Element*>(from + i)), low, high);
            low_ += low * load<double>(means_);
            if constexpr (sizeof(T) < sizeof(double)) high_ += high * load<double>(means_ + lanes<double>);
            means_ += lanes<T>;
        }
        return i;
    }

    const double* means_;
    Vector<double> low_{}, high_{};
    double rest_ = 0;
};

}  // namespace
}  // namespace kddp
