// Causal attention over paged KV that is read in place: decode rows, prefill chunks and mixed batches in one call.
//
// Rows of a query group share every load of K and V, and so do sequences with a prefix in common, whose part of the
// attention is computed once for all and merged by log-sum-exp (Hydragen, arXiv 2402.05099). Knows no model, no Python
// and no allocation of blocks.

#pragma once

#include "crew.hpp"
#include "pool.hpp"

namespace kvmesh {

constexpr int TILE = 64;  // rows of a work item
constexpr int MAX_HEAD_DIM = 256;
constexpr double ALONE = 4e5;  // multiplications below which sharing them out does not pay
constexpr int64_t MOST_PARTS = 1 << 24;  // floats
constexpr float LOWEST = -1e30f;
constexpr float LOG2_E = 1.44269504088896341f, LN_2 = 0.693147180559945309f;

struct Scratch {
    alignas(64) word q[TILE * MAX_HEAD_DIM];
    alignas(64) float out[TILE * MAX_HEAD_DIM];
    alignas(64) float scores[MAX_ROWS * CHUNK];
    alignas(64) word weights[MAX_ROWS * CHUNK + W];
    float m[TILE], l[TILE];
    const word *keys[CHUNK / BLOCK], *values[CHUNK / BLOCK], *next[CHUNK / BLOCK];
};

// Rows [row, row + rows) of one KV head of a segment, or of all members of a prefix, against keys [from, to). `partial`:
// other items have more keys of these rows. `later`: some have keys before these, and the sums of each chunk are kept
// apart, to be added in the order of the keys; at `part` in the floats of all parts.
struct Item {
    int32_t segment, prefix, head, row, rows, from, to;
    bool partial, later;
    int64_t part;

    int parts() const { return later ? (to - 1) / CHUNK - from / CHUNK + 1 : 1; }
};

class Attention {
  public:
    Attention(const Pool& pool, int threads) : pool_(pool), crew_(threads) {}

    template <class T> void run(const Batch& batch, int64_t layer, const Rows& rows) {
        put<T>(pool_, batch, layer, rows);
        attend<T>(crew_, batch, layer, rows);
    }

    // As `run`, to keys and values that are there.
    template <class T> void attend(Crew& crew, const Batch& batch, int64_t layer, const Rows& rows) {
        scratch_.resize(crew.size());
        group_ = rows.heads / pool_.kv_heads;
        const bool alone = divide(batch, rows.window, crew.size());
        crew.run(static_cast<int>(items_.size()), alone, [&](int i, int thread) {
            attend<T>(batch, Layer<T>{pool_, layer}, rows, items_[i], scratch_[thread]);
        });
        if (!parts_.empty()) merge<T>(crew, alone, batch, rows);
    }

  private:
    // Lists the work; long lists of keys are split where threads would otherwise idle. True if one thread does it all.
    // A sliding window has moved past what is shared, or soon will: each segment then reads its own keys.
    bool divide(const Batch& batch, int window, int threads) {
        items_.clear(), first_token_.clear(), work_ = 0, tokens_ = 0;
        for (int s = 0; s < batch.segments; tokens_ += batch.tokens[s++]) {
            first_token_.push_back(tokens_);
            const int own = window > 0 ? 0 : batch.own[s], count = batch.tokens[s] * group_;
            for (int row = 0; row < count; row += TILE) {
                const int rows = std::min(TILE, count - row);
                const int from = std::max(own, oldest(batch.starts[s] + row / group_, window));
                add({s, -1, 0, row, rows, from, batch.starts[s] + (row + rows - 1) / group_ + 1, own > 0, own > 0, 0});
            }
        }
        for (int p = 0; window <= 0 && p < batch.prefixes; ++p) {
            const int first = batch.first_member[p], count = (batch.first_member[p + 1] - first) * group_;
            for (int row = 0; row < count; row += TILE) {
                const int rows = std::min(TILE, count - row);
                add({batch.members[first], p, 0, row, rows, batch.first[p], batch.end[p], true, batch.first[p] > 0, 0});
            }
        }
        const bool alone = threads == 1 || work_ < ALONE;
        if (!alone && static_cast<int>(items_.size()) < 4 * threads) split(threads);
        if (!whole_.empty() && place_parts() > MOST_PARTS) items_.swap(whole_);
        whole_.clear();
        parts_.resize(place_parts());
        return alone;
    }

    // Their number of floats.
    int64_t place_parts() {
        int64_t size = 0;
        for (Item& item : items_)
            if (item.partial) item.part = size, size += int64_t{item.parts()} * item.rows * stride();
        return size;
    }

    // The same for each head.
    void add(Item item) {
        work_ += 2.0 * item.rows * (item.to - item.from) * pool_.head_dim * pool_.kv_heads;
        for (; item.head < pool_.kv_heads; ++item.head) items_.push_back(item);
    }

    void split(int threads) {
        whole_.swap(items_);
        const int wanted = (4 * threads + static_cast<int>(whole_.size()) - 1) / static_cast<int>(whole_.size());
        for (Item item : whole_) {
            const int last = item.to, step = std::max(CHUNK, ((last - item.from) / wanted + CHUNK - 1) / CHUNK * CHUNK);
            const int first = item.from / CHUNK * CHUNK;
            item.partial |= last - first > step;
            for (int at = first; at < last; at += step, item.later = true) {
                item.from = std::max(at, item.from), item.to = std::min(at + step, last);
                items_.push_back(item);
            }
        }
    }

    // The row of queries, and of the output, that is row `at` of an item's segment or prefix: [tokens, heads].
    int64_t index(const Batch& batch, const Item& item, int at, int heads) const {
        const int member = at / group_, head = item.head * group_ + at % group_;
        const int token = item.prefix < 0 ? first_token_[item.segment] + member
                                          : first_token_[batch.members[batch.first_member[item.prefix] + member]];
        return int64_t{token} * heads + head;
    }

    static int oldest(int position, int window) { return window > 0 ? std::max(0, position - window + 1) : 0; }
    int padded() const { return (pool_.head_dim + 15) / 16 * 16; }
    // A row's sums in a part: the weighted values, the greatest score, the sum of weights.
    int stride() const { return padded() + 2; }

    template <class T>
    void attend(const Batch& batch, const Layer<T>& layer, const Rows& rows, const Item& item, Scratch& s) {
        pack<T>(batch, rows, layer, item, s);
        float* part = parts_.data() + item.part;
        const auto keep = [&] {
            for (int r = 0; r < item.rows; ++r, part += stride()) {
                std::copy_n(s.out + r * layer.padded, layer.padded, part);
                part[layer.padded] = s.m[r], part[layer.padded + 1] = s.l[r];
            }
        };
        const int begin = item.from / BLOCK * BLOCK;
        const int32_t* table = batch.tables + batch.first_block[item.segment];
        const int start = item.prefix < 0 ? batch.starts[item.segment] : item.to;
        for (int first = begin, last; first < item.to; first = last) {
            last = std::min(first / CHUNK * CHUNK + CHUNK, item.to);
            if (first == begin || item.later) {
                std::fill_n(s.m, item.rows, LOWEST);
                std::fill_n(s.l, item.rows, 0.0f);
                std::fill_n(s.out, item.rows * layer.padded, 0.0f);
            }
            for (int b = 0; b * BLOCK < last - first; ++b) {
                s.keys[b] = layer.keys(table[first / BLOCK + b], item.head);
                s.values[b] = layer.values(table[first / BLOCK + b], item.head);
            }
            seek(batch, layer, item, last, s.next);
            for (int row = 0; row < item.rows; row += MAX_ROWS)
                step<T>(layer, rows.window, start, item, row, first, last, s);
            if (item.later) keep();
        }
        if (item.partial && !item.later) keep();
        for (int r = 0; !item.partial && r < item.rows; ++r)
            emit<T>(rows, index(batch, item, item.row + r, rows.heads), s.out + r * layer.padded, s.m[r], s.l[r]);
    }

    // The keys of the chunk at `first`, or of the first chunk of the next item if this one ends before.
    template <class T>
    void seek(const Batch& batch, const Layer<T>& layer, const Item& item, int first, const word** next) const {
        const Item* at = &item;
        if (first >= item.to && at + 1 < items_.data() + items_.size()) ++at, first = at->from / BLOCK * BLOCK;
        const int32_t* table = batch.tables + batch.first_block[at->segment];
        const int last = (at->to - 1) / BLOCK;
        for (int b = 0; b < CHUNK / BLOCK; ++b)
            next[b] = layer.keys(table[std::min(first / BLOCK + b, last)], at->head);
    }

    // Adds keys [first, last) to up to MAX_ROWS rows from `row`.
    template <class T>
    void step(const Layer<T>& layer, int window, int start, const Item& item, int row, int first, int last,
              Scratch& s) const {
        static constexpr Kernels<T> kernels;
        const int count = std::min(MAX_ROWS, item.rows - row);
        const auto position = [&](int r) { return start + (item.row + row + r) / group_; };
        const int keys = std::min(last, position(count - 1) + 1) - first;
        if (keys <= 0 || oldest(position(0), window) >= last) return;
        const int many = blocks_at_once(count), blocks = (keys + BLOCK - 1) / BLOCK;
        const word* q = s.q + row * layer.words;
        int b = 0;
        const auto dot = [&](auto kernel) { kernel(q, s.keys + b, s.values + b, layer.words, s.scores + b * BLOCK); };
        for (; b + many <= blocks; b += many) dot(kernels.dot_many[count]);
        for (; b < blocks; ++b) dot(kernels.dot_one[count]);
        Rescale by[MAX_ROWS];
        const float scale = LOG2_E / std::sqrt(static_cast<float>(pool_.head_dim));
        for (int r = 0; r < count; ++r) {
            const int from = std::max(0, oldest(position(r), window) - first);
            const int to = std::min(keys, position(r) + 1 - first);
            word* weights = s.weights + r * (CHUNK / T::P);
            float *m = s.m + row + r, *l = s.l + row + r;
            by[r] = soften<T>(s.scores + r * CHUNK, weights, keys, from, to, scale, *m, *l);
        }
        const int wide = vectors_at_once(count) * W;
        float* out = s.out + row * layer.padded;
        int d = 0;
        const auto weigh = [&](auto kernel) {
            const word *values[CHUNK / BLOCK], *next[CHUNK / BLOCK];
            for (int i = 0; i < blocks; ++i) values[i] = s.values[i] + d, next[i] = s.next[i] + d;
            kernel(s.weights, values, next, keys, layer.padded, by, out + d);
        };
        for (; d + wide <= layer.padded; d += wide) weigh(kernels.weigh_many[count]);
        for (; d < layer.padded; d += W) weigh(kernels.weigh_one[count]);
    }

    // Queries to [words, rows] within each group of up to MAX_ROWS rows.
    template <class T>
    void pack(const Batch& batch, const Rows& rows, const Layer<T>& layer, const Item& item, Scratch& s) const {
        const auto* queries = static_cast<const typename T::element*>(rows.q);
        for (int row = 0; row < item.rows; row += MAX_ROWS) {
            const int count = std::min(MAX_ROWS, item.rows - row);
            for (int r = 0; r < count; ++r) {
                const int64_t at = index(batch, item, item.row + row + r, rows.heads);
                const auto* q = queries + at / rows.heads * rows.q_stride + at % rows.heads * pool_.head_dim;
                word* to = s.q + row * layer.words + r;
                for (int w = 0; w < layer.words; ++w) std::memcpy(to + w * count, q + w * T::P, sizeof(word));
            }
        }
    }

    // Adds the sums of a row over later keys: softmax over a union of keys from those over its parts.
    void join(float* sums, const float* more) const {
        const Rescale by = rescale(sums[padded()], more[padded()]);
        for (int d = 0; d < padded(); d += W)
            store(sums + d, rescaled(load<vfloat>(sums + d), load<vfloat>(more + d), by));
        sums[padded() + 1] = rescaled(sums[padded() + 1], more[padded() + 1], by);
    }

    // Joins all parts of each row in the first of them, and emits it. Prefixes, outer ones first, have the earlier keys.
    template <class T> void merge(Crew& crew, bool alone, const Batch& batch, const Rows& rows) {
        const int64_t count = int64_t{tokens_} * rows.heads;
        sums_.assign(count, nullptr);
        const int shares = alone ? 1 : crew.size();
        crew.run(shares, alone, [&](int share, int) {
            for (const bool prefixes : {true, false})
                for (const Item& item : items_)
                    for (int r = 0; item.partial && prefixes == (item.prefix >= 0) && r < item.rows; ++r) {
                        const int64_t row = index(batch, item, item.row + r, rows.heads);
                        if (row % shares != share) continue;
                        for (int i = 0; i < item.parts(); ++i) {
                            float* sums = &parts_[item.part + (int64_t{i} * item.rows + r) * stride()];
                            sums_[row] ? join(sums_[row], sums) : void(sums_[row] = sums);
                        }
                    }
            for (int64_t row = share; row < count; row += shares)
                if (float* sums = sums_[row]) emit<T>(rows, row, sums, sums[padded()], sums[padded() + 1]);
        });
    }

    template <class T> void emit(const Rows& rows, int64_t row, const float* out, float m, float l) const {
        auto* to = static_cast<typename T::element*>(rows.out) + row * pool_.head_dim;
        const float inverse = 1.0f / l;
        for (int d = 0; d < pool_.head_dim; ++d) to[d] = T::round(out[d] * inverse);
        if (rows.lse) rows.lse[row] = (m + std::log2(l)) * LN_2;
    }

    const Pool pool_;
    Crew crew_;
    int group_ = 1;
    std::vector<Scratch> scratch_;
    std::vector<Item> items_, whole_;  // whole_: before they were split
    std::vector<int> first_token_;
    std::vector<float> parts_;
    std::vector<float*> sums_;
    double work_ = 0;
    int tokens_ = 0;
};

}  // namespace kvmesh
