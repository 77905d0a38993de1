// Arithmetic of sizes and offsets.
#pragma once

#include <cstdint>

namespace kddp {
namespace {

// What the caches read and write at once.
constexpr int64_t line_bytes = 64;

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up_to_line(int64_t bytes) { return divide_up(bytes, line_bytes) * line_bytes; }

}  // namespace
}  // namespace kddp
