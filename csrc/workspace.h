// The workspace of a call, handed out piece by piece.
#pragma once

#include <cstdint>

namespace kddp {
namespace {

constexpr int64_t line_bytes = 64;  // a cache line

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Each piece begins at a cache line. Without memory it only counts the bytes.
class Workspace {
  public:
    explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}

    template <class T>
    T* take(int64_t count) {
        char* const address = memory_ ? memory_ + bytes_ : nullptr;
        bytes_ += divide_up(count * int64_t(sizeof(T)), line_bytes) * line_bytes;
        return reinterpret_cast<T*>(address);
    }
    int64_t bytes() const { return bytes_; }

  private:
    char* memory_;
    int64_t bytes_ = 0;
};

}  // namespace
}  // namespace kddp
