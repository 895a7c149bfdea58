// The inner loops: a few rows of queries, held in registers, against blocks of keys and values. A row is one query of
// one head. Online softmax in base 2 (arXiv 2205.14135).
//
// Keys are taken in chunks whose ends are multiples of CHUNK; a chunk's sums begin at zero and are added to those of the
// chunks before. So a row's result does not depend, not in one bit, on the rows beside it nor on who computes which
// chunk.

#pragma once

#include "vectors.hpp"

namespace kvmesh {

constexpr int BLOCK = 16;                  // tokens of a block
constexpr int PARTS = BLOCK / W;           // vectors that hold one word of each token of a block
constexpr int MAX_ROWS = W == 16 ? 8 : 4;  // rows of a register tile
constexpr int CHUNK = 256;                 // keys between two rescalings

constexpr int blocks_at_once(int rows) { return W < 16 ? 1 : rows <= 4 ? 4 : 2; }
constexpr int vectors_at_once(int rows) { return W < 16 ? 2 : rows <= 4 ? 4 : 2; }

// scores[r][token] of R rows and N blocks; `q` is [words, R]. Asks for the blocks `next`, line by line.
template <class T, int R, int N>
void dot(const word* q, const word* const* keys, const word* const* next, int words, float* scores) {
    constexpr int C = N * PARTS;
    vfloat sum[R][C] = {};
    for (int w = 0; w < words; ++w, q += R) {
        vint key[C];
        UNROLL for (int c = 0; c < C; ++c) key[c] = load<vint>(keys[c / PARTS] + w * BLOCK + c % PARTS * W);
        UNROLL for (int n = 0; n < N; ++n) __builtin_prefetch(next[n] + w * BLOCK, 0, 2);
        UNROLL for (int r = 0; r < R; ++r) {
            const vint query = every(q[r]);
            UNROLL for (int c = 0; c < C; ++c) sum[r][c] = T::add_product(sum[r][c], key[c], query);
        }
    }
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int c = 0; c < C; ++c) store(scores + r * CHUNK + c * W, sum[r][c]);
}

// What sums over some keys, and those over more of them, are multiplied by before they are added.
struct Rescale { float before, more; };

// For sums relative to 2^m and 2^top; m becomes the greater of both.
INLINE Rescale rescale(float& m, float top) {
    const float next = std::max(m, top);
    const vfloat factors = power_of_2(vfloat{m - next, top - next});
    m = next;
    return {factors[0], factors[1]};
}

INLINE vfloat rescaled(vfloat before, vfloat more, Rescale by) {
    return fused(more, every(by.more), before * every(by.before));
}
INLINE float rescaled(float before, float more, Rescale by) { return rescaled(every(before), every(more), by)[0]; }

// Adds the values weighted by weights[r] to out[r], rescaled by by[r], for R rows and N vectors of dimensions. Asks for
// the blocks `next`, line by line.
template <class T, int R, int N>
void weigh(const word* weights, const word* const* values, const word* const* next, int tokens, int padded,
           const Rescale* by, float* out) {
    constexpr int STRIDE = CHUNK / T::P;
    vfloat sum[R][N] = {};
    const auto add = [&](const word* value, const word* weight, word mask) __attribute__((always_inline)) {
        vint v[N];
        UNROLL for (int n = 0; n < N; ++n) v[n] = load<vint>(value + n * W) & every(mask);
        UNROLL for (int r = 0; r < R; ++r) {
            const vint w = every(weight[r * STRIDE]);
            UNROLL for (int n = 0; n < N; ++n) sum[r][n] = T::add_product(sum[r][n], v[n], w);
        }
    };
    for (; tokens > 0; tokens -= BLOCK, ++values, ++next, weights += BLOCK / T::P) {
        const int words = std::min(tokens, BLOCK) / T::P;
        const word* value = *values;
        for (int w = 0; w < words; ++w, value += padded) {
            UNROLL for (int n = 0; n < N; ++n) __builtin_prefetch(*next + w * padded + n * W, 0, 2);
            add(value, weights + w, ~word{0});
        }
        // The second half of the last word of an odd run was never written.
        if (T::P == 2 && tokens < BLOCK && tokens % 2) add(value, weights + words, 0xffff);
    }
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int n = 0; n < N; ++n) {
            float* to = out + r * padded + n * W;
            store(to, rescaled(load<vfloat>(to), sum[r][n], by[r]));
        }
}

// Scores of one row to weights 2^(score * scale - the greatest); keys outside [first, last) weigh nothing. Returns how
// the weighted values are added to sums so far.
template <class T>
Rescale soften(float* scores, word* weights, int keys, int first, int last, float scale, float& m, float& l) {
    auto* out = reinterpret_cast<typename T::element*>(weights);
    if (first >= last) {
        std::memset(out, 0, (keys + 1) * sizeof *out);
        return {1.0f, 0.0f};
    }
    vint lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    const int from = first / W * W;
    vfloat best = every(-INFINITY);
    for (int i = from; i < last; i += W) {
        vfloat x = load<vfloat>(scores + i);
        if (i < first || i + W > last) {
            x = (lane + i >= first) & (lane + i < last) ? x : every(-INFINITY);
            store(scores + i, x);
        }
        best = x > best ? x : best;
    }
    const float top = greatest(best) * scale;
    const Rescale by = rescale(m, top);
    vfloat sum = {};
    for (int i = 0; i < from; i += W) T::put(out + i, vfloat{});
    for (int i = from; i < last; i += W) {
        const vfloat weight = power_of_2(fused(load<vfloat>(scores + i), every(scale), every(-top)));
        sum += weight;
        T::put(out + i, weight);
    }
    for (int i = (last + W - 1) / W * W; i < keys; i += W) T::put(out + i, vfloat{});
    l = rescaled(l, total(sum), by);
    return by;
}

template <class T> struct Kernels {
    using Dot = void (*)(const word*, const word* const*, const word* const*, int, float*);
    using Weigh = void (*)(const word*, const word* const*, const word* const*, int, int, const Rescale*, float*);
    Dot dot_many[MAX_ROWS + 1], dot_one[MAX_ROWS + 1];
    Weigh weigh_many[MAX_ROWS + 1], weigh_one[MAX_ROWS + 1];

    template <int R = MAX_ROWS> constexpr void fill() {
        dot_many[R] = dot<T, R, blocks_at_once(R)>, dot_one[R] = dot<T, R, 1>;
        weigh_many[R] = weigh<T, R, vectors_at_once(R)>, weigh_one[R] = weigh<T, R, 1>;
        if constexpr (R > 1) fill<R - 1>();
    }
    constexpr Kernels() : dot_many{}, dot_one{}, weigh_many{}, weigh_one{} { fill(); }
};

}  // namespace kvmesh
