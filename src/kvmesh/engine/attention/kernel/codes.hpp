// Rows of activations as a product wants them: in bfloat16, or as 8-bit codes with a scale per group of a row, so that
// an outlier costs only its group.

#pragma once

#include "vectors.hpp"

#include <vector>

namespace kvmesh {

struct Codes {
    std::vector<uint16_t> plain;
    std::vector<int8_t> codes;
    std::vector<float> scales, sums, totals;  // by group: of a code, of the whole group; by row: of all groups
    int inputs = 0, group = 0;

    // `group_` is 32 or 64, or 0 for plain rows.
    void shape(int64_t rows, int inputs_, int group_) {
        inputs = inputs_, group = group_;
        if (!group) return plain.resize(rows * inputs);
        codes.resize(rows * inputs), scales.resize(rows * groups()), sums.resize(rows * groups()), totals.resize(rows);
    }
    int groups() const { return inputs / group; }

    // Takes the row that `at` maps indices to, W floats at a time.
    template <class F> void take_row(int64_t row, const F& at) {
        if (!group) {
            for (int i = 0; i < inputs; i += W) BFloat16::put(&plain[row * inputs + i], at(i));
            return;
        }
#ifdef KVMESH_INTEGER_PRODUCTS
        totals[row] = 0;
        for (int g = 0; g < groups(); ++g) {
            const int64_t i = row * groups() + g;
            int8_t* to = &codes[row * inputs + g * group];
            const auto part = [&](int v) { return at(g * group + v); };
            group == 64 ? take_group<4>(to, scales[i], sums[i], part) : take_group<2>(to, scales[i], sums[i], part);
            totals[row] += sums[i];
        }
#endif
    }

#ifdef KVMESH_INTEGER_PRODUCTS
  private:
    template <int VECTORS, class F> static INLINE void take_group(int8_t* to, float& scale, float& sum, const F& at) {
        __m512 x[VECTORS], top = _mm512_setzero_ps();
        UNROLL for (int v = 0; v < VECTORS; ++v) {
            x[v] = (__m512)at(v * W);
            top = _mm512_max_ps(top, _mm512_abs_ps(x[v]));
        }
        const float most = std::max(_mm512_reduce_max_ps(top), 1e-30f);
        const __m512 inverse = _mm512_set1_ps(127.0f / most);
        __m512i total = _mm512_setzero_si512();
        UNROLL for (int v = 0; v < VECTORS; ++v) {
            const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(x[v], inverse));
            total = _mm512_add_epi32(total, code);
            _mm_storeu_si128((__m128i*)(to + v * W), _mm512_cvtepi32_epi8(code));
        }
        scale = most / 127.0f;
        sum = scale * _mm512_reduce_add_epi32(total);
    }
#endif
};

}  // namespace kvmesh
