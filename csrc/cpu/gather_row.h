// Taking the chosen columns out of one row.
//
// They are gathered on a small stage in the first-level cache, and from there go to a sink in whole vectors.
#pragma once

#include "cpu/column_choice.h"
#include "cpu/row_sink.h"

namespace kddp {
namespace {

constexpr int64_t stage_units = 256;
constexpr int64_t widest_staged_column = 256;
// The last line of a stage takes what a vector store writes too much.
constexpr int64_t stage_bytes = 4096 + 3 * line_bytes;

#if defined(__AVX512F__)
// Takes the units of a group that `bits` name and stores them side by side, with garbage behind them up to a line. Only
// those in `present` are read. The forms with a mask throughout: in the others GCC 12 sees an uninitialised value.
template <int unit>
inline int64_t take_group(const char* from, uint16_t bits, uint16_t present, char* to) {
    if constexpr (unit == 8) {
        const __mmask8 low = __mmask8(bits), high = __mmask8(bits >> 8);
        const __m512i first = _mm512_maskz_loadu_epi64(__mmask8(present), from);
        const __m512i second = _mm512_maskz_loadu_epi64(__mmask8(present >> 8), from + 64);
        _mm512_storeu_si512(to, _mm512_maskz_compress_epi64(low, first));
        to += int64_t(unit) * __builtin_popcount(low);
        _mm512_storeu_si512(to, _mm512_maskz_compress_epi64(high, second));
    } else if constexpr (unit == 4) {
        _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(bits, _mm512_maskz_loadu_epi32(present, from)));
    } else if constexpr (unit == 2) {
        const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(present, from));
        _mm256_storeu_si256((__m256i*)to, _mm512_maskz_cvtepi32_epi16(0xffff, _mm512_maskz_compress_epi32(bits, wide)));
    } else {
        const __m512i wide = _mm512_maskz_cvtepu8_epi32(0xffff, _mm_maskz_loadu_epi8(present, from));
        _mm_storeu_si128((__m128i*)to, _mm512_maskz_cvtepi32_epi8(0xffff, _mm512_maskz_compress_epi32(bits, wide)));
    }
    return int64_t(unit) * __builtin_popcount(bits);
}

template <int unit, class Sink>
void gather_by_bits(const char* from, const char* next, const ColumnChoice& choice, Sink& sink) {
    alignas(line_bytes) char stage[stage_bytes];
    const int64_t units = choice.units_of_row(), whole_groups = units / group;
    int64_t staged = 0;
    for (int64_t i = 0; i < whole_groups;) {
        const int64_t end = smaller(i + stage_units / group, whole_groups);
        for (; i < end; ++i) {
            const int64_t offset = i * group * unit;
            prefetch(next + offset);
            if (unit == 8) prefetch(next + offset + line_bytes);
            staged += take_group<unit>(from + offset, choice.bits[i], 0xffff, stage + staged);
        }
        staged = sink.write(stage, staged);
    }
    if (units % group) {
        const uint16_t present = uint16_t((1u << (units % group)) - 1);
        const int64_t offset = whole_groups * group * unit;
        staged += take_group<unit>(from + offset, choice.bits[whole_groups], present, stage + staged);
    }
    sink.finish(stage, staged);
}
#endif

// `fixed_bytes` is the width of a column where the compiler is to know it.
template <int64_t fixed_bytes, class Sink>
void gather_by_index(const char* from, const char* next, const ColumnChoice& choice, Sink& sink) {
    alignas(line_bytes) char stage[stage_bytes];
    const int64_t width = fixed_bytes ? fixed_bytes : choice.column_bytes;
    const int64_t row_bytes = choice.columns_of_row * width;
    const int64_t columns_at_once = (stage_bytes - 3 * line_bytes) / (width < 16 ? 16 : width);
    const bool dense = choice.count * 8 >= choice.columns_of_row;
    int64_t staged = 0;
    for (int64_t i = 0; i < choice.count;) {
        const int64_t end = smaller(i + columns_at_once, choice.count);
        // As far into the next row as this one has been taken.
        if (dense)
            for (int64_t at = row_bytes * i / choice.count; at < row_bytes * end / choice.count; at += line_bytes)
                prefetch(next + at);
        for (; i < end; ++i, staged += width) std::memcpy(stage + staged, from + choice.columns[i] * width, width);
        staged = sink.write(stage, staged);
    }
    sink.finish(stage, staged);
}

template <class Sink>
void gather_wide_columns(const char* from, const ColumnChoice& choice, Sink& sink) {
    for (int64_t i = 0; i < choice.count; ++i) {
        const int64_t column = choice.columns[i];
        sink.copy(from + column * choice.column_bytes, nullptr, choice.column_bytes);
    }
}

// `next` is the row that is gathered after this one, asked for meanwhile.
template <class Sink>
void gather_row(const char* from, const char* next, const ColumnChoice& choice, Sink& sink) {
    if (!choice.columns) return sink.copy(from, next, choice.count * choice.column_bytes);
    if (choice.column_bytes > widest_staged_column) return gather_wide_columns(from, choice, sink);
#if defined(__AVX512F__)
    if (choice.bits) {
        switch (choice.unit_bytes) {
            case 8:
                return gather_by_bits<8>(from, next, choice, sink);
            case 4:
                return gather_by_bits<4>(from, next, choice, sink);
            case 2:
                return gather_by_bits<2>(from, next, choice, sink);
            default:
                return gather_by_bits<1>(from, next, choice, sink);
        }
    }
#endif
    switch (choice.column_bytes) {
        case 2:
            return gather_by_index<2>(from, next, choice, sink);
        case 4:
            return gather_by_index<4>(from, next, choice, sink);
        case 8:
            return gather_by_index<8>(from, next, choice, sink);
        default:
            return gather_by_index<0>(from, next, choice, sink);
    }
}

}  // namespace
}  // namespace kddp
