// Which columns of a row are taken, as the loops of gather_row.h want to know it.
#pragma once

#include <cstring>

#include "cpu/sizes.h"

namespace kddp {
namespace {

constexpr int64_t group = 16;  // units that the words of bits stand for

// A column is one or more units of 1, 2, 4 or 8 bytes. Where they are given, `bits` say which units of a row are taken:
// word i those from 16 i on.
struct ColumnChoice {
    const int64_t* columns;  // absent: the first `count`
    int64_t count;
    int64_t columns_of_row;
    int64_t column_bytes;
    int64_t unit_bytes;
    const uint16_t* bits;  // absent: go by `columns`

    int64_t units_of_row() const { return columns_of_row * (column_bytes / unit_bytes); }
};

// The widest unit that a column consists of.
inline int64_t unit_of(int64_t column_bytes) {
    int64_t unit = 8;
    while (column_bytes % unit) unit /= 2;
    return unit;
}

// Wider columns are copied one by one, by functions made for that.
constexpr int64_t widest_column_by_bits = 128;

inline int64_t bits_bytes([[maybe_unused]] int64_t columns, [[maybe_unused]] int64_t column_bytes) {
#if defined(__AVX512F__)
    if (column_bytes > widest_column_by_bits) return 0;
    return round_up_to_line(divide_up(columns * (column_bytes / unit_of(column_bytes)), group) *
                            int64_t(sizeof(uint16_t)));
#else
    return 0;
#endif
}

// Bits serve ascending columns, and are worth it where enough of a row is taken.
inline bool worth_bits(const ColumnChoice& choice) {
    if (!choice.columns || choice.count * 8 < choice.columns_of_row) return false;
    for (int64_t i = 1; i < choice.count; ++i)
        if (choice.columns[i - 1] >= choice.columns[i]) return false;
    return true;
}

inline void set_bits(const ColumnChoice& choice, uint16_t* bits) {
    const int64_t units = choice.column_bytes / choice.unit_bytes;
    for (int64_t i = 0; i < choice.count; ++i)
        for (int64_t k = choice.columns[i] * units; k < (choice.columns[i] + 1) * units; ++k)
            bits[k / group] |= uint16_t(1u << (k % group));
}

// `memory` holds bits_bytes of these sizes.
inline ColumnChoice choose_columns(const int64_t* columns, int64_t count, int64_t columns_of_row, int64_t column_bytes,
                                   void* memory) {
    ColumnChoice choice{columns, count, columns_of_row, column_bytes, unit_of(column_bytes), nullptr};
    const int64_t bytes = bits_bytes(columns_of_row, column_bytes);
    if (bytes > 0 && worth_bits(choice)) {
        std::memset(memory, 0, bytes);
        set_bits(choice, static_cast<uint16_t*>(memory));
        choice.bits = static_cast<const uint16_t*>(memory);
    }
    return choice;
}

}  // namespace
}  // namespace kddp
