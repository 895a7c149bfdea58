// Products of activations with weights of 4, 8 or 16 bits, for any number of rows. Those of 4 and 8 want AVX512-VNNI.
//
// Int4 holds GGUF's Q4_0 and Q4_1 exactly: for 16 outputs and 32 inputs a block of 256 bytes of codes, then 16 steps
// and 16 minima in half precision; [outputs / 16, inputs / 32] blocks. Int8 is [outputs / 16, inputs / 4] vectors of 16
// outputs by 4 inputs, each code + 128, with a scale per output; Bf16 [outputs / 16, inputs / 2] vectors of 16 by 2.
// Few rows wait for memory: the weights of the next tile are asked for while those of this one are used. A row's result
// does not depend, not in one bit, on how many rows there are, unless that chooses the packing.

#pragma once

#include "codes.hpp"
#include "crew.hpp"

extern "C" {

// Weights [outputs, inputs] in bfloat16, or in one or both of the other packings, `int4` for up to `few` rows. Outputs
// are a multiple of 16, inputs of 64. `bias` may be null.
struct Matrix {
    const uint8_t *int4, *int8, *bf16;
    const float *scales, *bias;
    int32_t inputs, outputs, few;
};
}

#ifdef KVMESH_PRODUCTS

namespace kvmesh {

template <int R, int N> using Sums = vfloat[R][N];

constexpr int LANES = 16;            // outputs that lie together
constexpr int WIDE = W == 16 ? 3 : 2;  // vectors of outputs of a tile

#ifdef KVMESH_INTEGER_PRODUCTS

INLINE __m512i four(const int8_t* codes) { int32_t x; std::memcpy(&x, codes, 4); return _mm512_set1_epi32(x); }
INLINE vfloat halves(const uint8_t* from) { return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }
INLINE vfloat floats(__m512i x) { return (vfloat)_mm512_cvtepi32_ps(x); }

struct Int4 {
    static constexpr int GROUP = 32, BYTES = 320;  // of a block

    static vfloat scale(const Matrix&, int) { return every(1.0f); }
    static const uint8_t* weights(const Matrix& m, int64_t vector) {
        return m.int4 + vector * (m.inputs / GROUP) * BYTES;
    }

    template <int R, int N>
    static INLINE void tile(const Matrix& m, const Codes& x, int row, int vector, int64_t ahead, Sums<R, N>& out) {
        const int groups = m.inputs / GROUP;
        const uint8_t* from = weights(m, vector);
        const int64_t column = int64_t{groups} * BYTES;
        const int8_t* codes = &x.codes[int64_t{row} * x.inputs];
        const float *scales = &x.scales[int64_t{row} * groups], *sums = &x.sums[int64_t{row} * groups];
        const __m512i low = _mm512_set1_epi8(15);
        UNROLL for (int r = 0; r < R; ++r) UNROLL for (int n = 0; n < N; ++n) out[r][n] = vfloat{};
        for (int g = 0; g < groups; ++g, from += BYTES, codes += GROUP) {
            __m512i sum[R][N] = {};
            UNROLL for (int j = 0; j < 4; ++j)
                UNROLL for (int n = 0; n < N; ++n) {
                    const uint8_t* at = from + n * column + j * 64;
                    if (ahead) __builtin_prefetch(at + ahead, 0, 2);
                    const __m512i pair = _mm512_loadu_si512(at), first = _mm512_and_si512(pair, low);
                    const __m512i second = _mm512_and_si512(_mm512_srli_epi16(pair, 4), low);
                    UNROLL for (int r = 0; r < R; ++r) {
                        const int8_t* code = codes + int64_t{r} * x.inputs + j * 4;
                        sum[r][n] = _mm512_dpbusd_epi32(sum[r][n], first, four(code));
                        sum[r][n] = _mm512_dpbusd_epi32(sum[r][n], second, four(code + 16));
                    }
                }
            UNROLL for (int n = 0; n < N; ++n) {
                const uint8_t* at = from + n * column + 256;
                if (ahead) __builtin_prefetch(at + ahead, 0, 2);
                const vfloat step = halves(at), least = halves(at + 32);
                UNROLL for (int r = 0; r < R; ++r) {
                    const int i = r * groups + g;
                    out[r][n] = fused(floats(sum[r][n]), step * every(scales[i]), out[r][n]);
                    out[r][n] = fused(least, every(sums[i]), out[r][n]);
                }
            }
        }
    }
};

struct Int8 {
    static constexpr int GROUP = 64;

    static vfloat scale(const Matrix& m, int column) { return load<vfloat>(m.scales + column); }
    static const uint8_t* weights(const Matrix& m, int64_t vector) { return m.int8 + vector * m.inputs * W; }

    template <int R, int N>
    static INLINE void tile(const Matrix& m, const Codes& x, int row, int vector, int64_t ahead, Sums<R, N>& out) {
        const int groups = m.inputs / GROUP;
        const uint8_t* from = weights(m, vector);
        const int64_t column = int64_t{m.inputs} * W;
        const int8_t* codes = &x.codes[int64_t{row} * x.inputs];
        const float* scales = &x.scales[int64_t{row} * groups];
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int n = 0; n < N; ++n) out[r][n] = every(-128.0f * x.totals[row + r]);
        for (int g = 0; g < groups; ++g) {
            __m512i sum[R][N] = {};
            UNROLL for (int k = 0; k < GROUP / 4; ++k, from += 4 * W, codes += 4) {
                __m512i weight[N];
                UNROLL for (int n = 0; n < N; ++n) {
                    weight[n] = _mm512_loadu_si512(from + n * column);
                    if (ahead) __builtin_prefetch(from + n * column + ahead, 0, 2);
                }
                UNROLL for (int r = 0; r < R; ++r) {
                    const __m512i code = four(codes + int64_t{r} * x.inputs);
                    UNROLL for (int n = 0; n < N; ++n) sum[r][n] = _mm512_dpbusd_epi32(sum[r][n], weight[n], code);
                }
            }
            UNROLL for (int r = 0; r < R; ++r)
                UNROLL for (int n = 0; n < N; ++n)
                    out[r][n] = fused(floats(sum[r][n]), every(scales[r * groups + g]), out[r][n]);
        }
    }
};

#endif

struct Bf16 {
    static vfloat scale(const Matrix&, int) { return every(1.0f); }
    static const uint8_t* weights(const Matrix& m, int64_t vector) {
        const int64_t output = vector * W;
        return m.bf16 + output / LANES * LANES * m.inputs * 2 + output % LANES * 4;
    }

    template <int R, int N>
    static INLINE void tile(const Matrix& m, const Codes& x, int row, int vector, int64_t ahead, Sums<R, N>& out) {
        const uint8_t* from = weights(m, vector);
        const int64_t column = W == LANES ? int64_t{m.inputs} * 2 * W : W * 4;
        const uint16_t* rows = &x.plain[int64_t{row} * x.inputs];
        UNROLL for (int r = 0; r < R; ++r) UNROLL for (int n = 0; n < N; ++n) out[r][n] = vfloat{};
        for (int k = 0; k < m.inputs / 2; ++k, from += 4 * LANES, rows += 2) {
            vint weight[N];
            UNROLL for (int n = 0; n < N; ++n) {
                weight[n] = load<vint>(from + n * column);
                if (ahead) __builtin_prefetch(from + n * column + ahead, 0, 2);
            }
            UNROLL for (int r = 0; r < R; ++r) {
                word two;
                std::memcpy(&two, rows + int64_t{r} * x.inputs, sizeof two);
                const vint pair = every(two);
                UNROLL for (int n = 0; n < N; ++n) out[r][n] = BFloat16::add_product(out[r][n], weight[n], pair);
            }
        }
    }
};

// Where a product goes: float32 rows of m.outputs, which it may be added to.
struct Target {
    float* rows;
    bool add;
};

template <class P, int R, int N>
void multiply_tile(const Matrix& m, const Codes& x, int row, int vector, int64_t ahead, const Target& target) {
    Sums<R, N> sum;
    P::template tile<R, N>(m, x, row, vector, ahead, sum);
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int n = 0; n < N; ++n) {
            const int column = (vector + n) * W;
            float* to = target.rows + int64_t{row + r} * m.outputs + column;
            vfloat more = target.add ? load<vfloat>(to) : vfloat{};
            if (m.bias) more += load<vfloat>(m.bias + column);
            store(to, fused(sum[r][n], P::scale(m, column), more));
        }
}

template <class P> struct Tiles {
    static constexpr int R = 4, N = WIDE;
    using Tile = void (*)(const Matrix&, const Codes&, int, int, int64_t, const Target&);
    template <int n> static constexpr Tile of[R] = {
        multiply_tile<P, 1, n>, multiply_tile<P, 2, n>, multiply_tile<P, 3, n>, multiply_tile<P, 4, n>};
};

// Rows [row, end) by vectors [first, last) of outputs.
template <class P>
void multiply(const Matrix& m, const Codes& x, int row, int end, int first, int last, const Target& target) {
    using T = Tiles<P>;
    for (int v = first, wide; v < last; v += wide) {
        wide = v + T::N <= last ? T::N : 1;
        const auto* tiles = wide > 1 ? T::template of<T::N> : T::template of<1>;
        const int64_t ahead = v + 2 * T::N <= last ? P::weights(m, v + T::N) - P::weights(m, v) : 0;
        for (int r = row; r < end; r += T::R)
            tiles[std::min(T::R, end - r) - 1](m, x, r, v, r > row ? 0 : ahead, target);
    }
}

using Multiply = void (*)(const Matrix&, const Codes&, int, int, int, int, const Target&);

#ifdef KVMESH_INTEGER_PRODUCTS
inline bool narrow(const Matrix& m, int rows) { return m.int4 && (rows <= m.few || !m.int8); }
inline int group_of(const Matrix& m, int rows) {
    return m.bf16 ? 0 : narrow(m, rows) ? Int4::GROUP : Int8::GROUP;
}
inline Multiply product_of(const Matrix& m, int rows) {
    return m.bf16 ? multiply<Bf16> : narrow(m, rows) ? multiply<Int4> : multiply<Int8>;
}
#else
inline int group_of(const Matrix&, int) { return 0; }
inline Multiply product_of(const Matrix&, int) { return multiply<Bf16>; }
#endif

// All of `rows` rows, by all threads: in pieces of outputs, and of rows where those have to stay in the cache.
inline void multiply(Crew& crew, const Matrix& m, const Codes& x, int rows, const Target& target) {
    constexpr int ROWS = 128, N = WIDE;
    const int vectors = m.outputs / W, tiles = (vectors + N - 1) / N, down = (rows + ROWS - 1) / ROWS;
    const int wanted = std::max(1, 4 * crew.size() / down), wide = std::min(8, (tiles + wanted - 1) / wanted) * N;
    const int across = (vectors + wide - 1) / wide;
    const Multiply part = product_of(m, rows);
    crew.run(across * down, false, [&](int i, int) {
        const int row = i / across * ROWS, first = i % across * wide;
        part(m, x, row, std::min(rows, row + ROWS), first, std::min(vectors, first + wide), target);
    });
}

}  // namespace kvmesh
#endif
