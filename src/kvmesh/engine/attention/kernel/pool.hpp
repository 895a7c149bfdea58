// The packed layout of paged KV, and the moves of tokens into and out of it.
//
// With P elements to a 32-bit word, one layer's keys are [blocks, kv_heads, head_dim / P, 16] words: P dimensions of
// one token per word, tokens side by side, so that the scores of 16 tokens need no sum across lanes. Its values are
// [blocks, kv_heads, 16 / P, padded] words: P tokens of one dimension per word.

#pragma once

#include "tile.hpp"

extern "C" {

struct Pool {
    uint32_t *keys, *values;
    int64_t blocks;
    int32_t kv_heads, head_dim, bfloat16;
};

// Segment i has tokens[i] new tokens from position starts[i]; its block table begins at tables[first_block[i]]. The keys
// before own[i] it shares: prefix j, the whole blocks of keys [first[j], end[j]), is one of the segments members[k] for k
// in [first_member[j], first_member[j + 1]), which have one new token each.
struct Batch {
    const int32_t *starts, *tokens, *first_block, *own, *tables;
    const int32_t *first, *end, *first_member, *members;
    int32_t segments, prefixes;
};

// Rows are [tokens, heads, head_dim], contiguous within a token; strides are elements between tokens.
struct Rows {
    const void *q, *k, *v;
    int64_t q_stride, k_stride, v_stride;
    void* out;
    float* lse;
    int32_t heads, window;
};
}

namespace kvmesh {

// One layer of the pool.
template <class T> struct Layer {
    const Pool& pool;
    int64_t index;
    int words = pool.head_dim / T::P, padded = (pool.head_dim + 15) / 16 * 16;

    word* keys(int64_t block, int head) const {
        return pool.keys + ((index * pool.blocks + block) * pool.kv_heads + head) * words * BLOCK;
    }
    word* values(int64_t block, int head) const {
        return pool.values + ((index * pool.blocks + block) * pool.kv_heads + head) * (BLOCK / T::P) * padded;
    }
    // Calls move(key or value in the pool, its index in a token) for each element of a token, keys then values.
    template <class K, class V> void each(int64_t block, int slot, K key, V value) const {
        using E = typename T::element;
        for (int head = 0; head < pool.kv_heads; ++head) {
            E* k = reinterpret_cast<E*>(keys(block, head) + slot);
            E* v = reinterpret_cast<E*>(values(block, head) + slot / T::P * padded) + slot % T::P;
            const int first = head * pool.head_dim;
            for (int w = 0; w < words; ++w)
                for (int p = 0; p < T::P; ++p) key(k[w * BLOCK * T::P + p], first + w * T::P + p);
            for (int d = 0; d < pool.head_dim; ++d) value(v[d * T::P], first + d);
        }
    }
};

template <class F> void each_token(const Batch& batch, F f) {
    int64_t row = 0;
    for (int s = 0; s < batch.segments; ++s) {
        const int32_t* table = batch.tables + batch.first_block[s];
        for (int p = batch.starts[s]; p < batch.starts[s] + batch.tokens[s]; ++p) f(table[p / BLOCK], p % BLOCK, row++);
    }
}

template <class T> void put(const Pool& pool, const Batch& batch, int64_t layer, const Rows& rows) {
    using E = typename T::element;
    const Layer<T> at{pool, layer};
    each_token(batch, [&](int64_t block, int slot, int64_t row) {
        const E* k = static_cast<const E*>(rows.k) + row * rows.k_stride;
        const E* v = static_cast<const E*>(rows.v) + row * rows.v_stride;
        at.each(block, slot, [=](E& to, int i) { to = k[i]; }, [=](E& to, int i) { to = v[i]; });
    });
}

template <class T> void get(const Pool& pool, const Batch& batch, int64_t layer, void* keys, void* values) {
    using E = typename T::element;
    const Layer<T> at{pool, layer};
    const int64_t stride = int64_t{pool.kv_heads} * pool.head_dim;
    each_token(batch, [&](int64_t block, int slot, int64_t row) {
        E *k = static_cast<E*>(keys) + row * stride, *v = static_cast<E*>(values) + row * stride;
        at.each(block, slot, [=](E& from, int i) { k[i] = from; }, [=](E& from, int i) { v[i] = from; });
    });
}

}  // namespace kvmesh
