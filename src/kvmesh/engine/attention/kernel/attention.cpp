// Causal attention over paged KV that is read in place: decode rows, prefill chunks and mixed batches in one call.
//
// Rows of a query group share every load of K and V. Knows no model, no Python and no allocation of blocks.

#include "crew.hpp"
#include "pool.hpp"

namespace kvmesh {
namespace {

constexpr int TILE = 64;  // rows of a work item
constexpr int MAX_HEAD_DIM = 256;
constexpr double ALONE = 4e6;  // multiplications below which waking a thread does not pay
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

// Rows [row, row + rows) of one KV head of a segment against keys [from, to). `part` < 0: these are all its keys.
struct Item {
    int32_t segment, token0, head, row, rows, from, to, part;
};

class Attention {
  public:
    Attention(const Pool& pool, int threads) : pool_(pool), crew_(threads), scratch_(crew_.size()) {}

    template <class T> void run(const Batch& batch, int64_t layer, const Rows& rows) {
        put<T>(pool_, batch, layer, rows);
        group_ = rows.heads / pool_.kv_heads;
        const bool alone = divide(batch, rows.window);
        crew_.run(static_cast<int>(items_.size()), alone, [&](int i, int thread) {
            attend<T>(batch, Layer<T>{pool_, layer}, rows, items_[i], scratch_[thread]);
        });
        for (size_t i = 0; i < items_.size(); ++i)
            if (items_[i].part == 0) merge<T>(i, rows);
    }

  private:
    // Lists the work; long lists of keys are split where threads would otherwise idle. True if one thread does it all.
    bool divide(const Batch& batch, int window) {
        items_.clear();
        double work = 0;
        int token0 = 0;
        for (int s = 0; s < batch.segments; token0 += batch.tokens[s++]) {
            const int count = batch.tokens[s] * group_;
            for (int row = 0; row < count; row += TILE) {
                const int rows = std::min(TILE, count - row);
                const int from = oldest(batch.starts[s] + row / group_, window);
                const int to = batch.starts[s] + (row + rows - 1) / group_ + 1;
                work += 2.0 * rows * (to - from) * pool_.head_dim * pool_.kv_heads;
                for (int head = 0; head < pool_.kv_heads; ++head)
                    items_.push_back({s, token0, head, row, rows, from, to, -1});
            }
        }
        const bool alone = crew_.size() == 1 || work < ALONE;
        if (!alone && static_cast<int>(items_.size()) < 4 * crew_.size()) split();
        return alone;
    }

    void split() {
        std::vector<Item> whole;
        whole.swap(items_);
        const int wanted = (4 * crew_.size() + static_cast<int>(whole.size()) - 1) / static_cast<int>(whole.size());
        for (Item item : whole) {
            const int last = item.to, step = std::max(CHUNK, ((last - item.from) / wanted + CHUNK - 1) / CHUNK * CHUNK);
            const int first = item.from / BLOCK * BLOCK;
            if (last - first > step) item.part = 0;
            for (int at = first; at < last; at += step, ++item.part) {
                item.from = at, item.to = std::min(at + step, last);
                items_.push_back(item);
                if (item.part < 0) break;
            }
        }
        parts_.resize(items_.size() * TILE * (padded() + 2));
    }

    static int oldest(int position, int window) { return window > 0 ? std::max(0, position - window + 1) : 0; }
    int padded() const { return (pool_.head_dim + 15) / 16 * 16; }
    float* part(size_t item) { return parts_.data() + item * TILE * (padded() + 2); }

    template <class T>
    void attend(const Batch& batch, const Layer<T>& layer, const Rows& rows, const Item& item, Scratch& s) {
        pack<T>(rows, layer, item, s);
        std::fill_n(s.m, item.rows, LOWEST);
        std::fill_n(s.l, item.rows, 0.0f);
        std::fill_n(s.out, item.rows * layer.padded, 0.0f);
        const int32_t* table = batch.tables + batch.first_block[item.segment];
        const int start = batch.starts[item.segment];
        for (int first = item.from / BLOCK * BLOCK; first < item.to; first += CHUNK) {
            const int last = std::min(first + CHUNK, item.to);
            for (int b = 0; b * BLOCK < last - first; ++b) {
                s.keys[b] = layer.keys(table[first / BLOCK + b], item.head);
                s.values[b] = layer.values(table[first / BLOCK + b], item.head);
            }
            seek(batch, layer, item, first + CHUNK, s.next);
            for (int row = 0; row < item.rows; row += MAX_ROWS)
                step<T>(layer, rows.window, start, item, row, first, last, s);
        }
        if (item.part < 0) return emit<T>(rows, item, s.out, s.m, s.l);
        keep(part(&item - items_.data()), item, s);
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
        float correction[MAX_ROWS];
        const float scale = LOG2_E / std::sqrt(static_cast<float>(pool_.head_dim));
        for (int r = 0; r < count; ++r) {
            const int from = std::max(0, oldest(position(r), window) - first);
            const int to = std::min(keys, position(r) + 1 - first);
            word* weights = s.weights + r * (CHUNK / T::P);
            float *m = s.m + row + r, *l = s.l + row + r;
            correction[r] = soften<T>(s.scores + r * CHUNK, weights, keys, from, to, scale, *m, *l);
        }
        const int wide = vectors_at_once(count) * W;
        float* out = s.out + row * layer.padded;
        int d = 0;
        const auto weigh = [&](auto kernel) {
            const word *values[CHUNK / BLOCK], *next[CHUNK / BLOCK];
            for (int i = 0; i < blocks; ++i) values[i] = s.values[i] + d, next[i] = s.next[i] + d;
            kernel(s.weights, values, next, keys, layer.padded, correction, out + d);
        };
        for (; d + wide <= layer.padded; d += wide) weigh(kernels.weigh_many[count]);
        for (; d < layer.padded; d += W) weigh(kernels.weigh_one[count]);
    }

    template <class T>
    static const typename T::element* query(const Rows& rows, int64_t token, int head, int head_dim) {
        return static_cast<const typename T::element*>(rows.q) + token * rows.q_stride + head * head_dim;
    }

    // Queries to [words, rows] within each group of up to MAX_ROWS rows.
    template <class T> void pack(const Rows& rows, const Layer<T>& layer, const Item& item, Scratch& s) const {
        for (int row = 0; row < item.rows; row += MAX_ROWS) {
            const int count = std::min(MAX_ROWS, item.rows - row);
            for (int r = 0; r < count; ++r) {
                const int at = item.row + row + r, head = item.head * group_ + at % group_;
                const auto* q = query<T>(rows, item.token0 + at / group_, head, pool_.head_dim);
                word* to = s.q + row * layer.words + r;
                for (int w = 0; w < layer.words; ++w) std::memcpy(to + w * count, q + w * T::P, sizeof(word));
            }
        }
    }

    void keep(float* part, const Item& item, const Scratch& s) const {
        std::copy_n(s.m, item.rows, part);
        std::copy_n(s.l, item.rows, part + TILE);
        std::copy_n(s.out, item.rows * padded(), part + 2 * TILE);
    }

    // Joins the parts that begin at item i in its first one and emits them.
    template <class T> void merge(size_t i, const Rows& rows) {
        const Item item = items_[i];
        float *m = part(i), *l = m + TILE, *out = l + TILE;
        for (size_t j = i + 1; j < items_.size() && items_[j].part > 0; ++j) {
            const float *m2 = part(j), *l2 = m2 + TILE, *out2 = l2 + TILE;
            for (int r = 0; r < item.rows; ++r) {
                const float top = std::max(m[r], m2[r]), a = std::exp2(m[r] - top), b = std::exp2(m2[r] - top);
                for (int d = r * padded(); d < (r + 1) * padded(); ++d) out[d] = out[d] * a + out2[d] * b;
                m[r] = top, l[r] = l[r] * a + l2[r] * b;
            }
        }
        emit<T>(rows, item, out, m, l);
    }

    template <class T>
    void emit(const Rows& rows, const Item& item, const float* out, const float* m, const float* l) const {
        for (int r = 0; r < item.rows; ++r, out += padded()) {
            const int at = item.row + r;
            const int64_t index = int64_t{item.token0 + at / group_} * rows.heads + item.head * group_ + at % group_;
            auto* to = static_cast<typename T::element*>(rows.out) + index * pool_.head_dim;
            const float inverse = 1.0f / l[r];
            for (int d = 0; d < pool_.head_dim; ++d) to[d] = T::round(out[d] * inverse);
            if (rows.lse) rows.lse[index] = (m[r] + std::log2(l[r])) * LN_2;
        }
    }

    const Pool pool_;
    Crew crew_;
    int group_ = 1;
    std::vector<Scratch> scratch_;
    std::vector<Item> items_;
    std::vector<float> parts_;
};

}  // namespace
}  // namespace kvmesh

using namespace kvmesh;

extern "C" {

const char* kvmesh_isa() {
#if defined(__AVX512BF16__)
    return "AVX512-BF16";
#elif defined(__AVX512F__)
    return "AVX-512";
#elif defined(__AVX__)
    return "AVX";
#else
    return "128-bit vectors";
#endif
}

void* kvmesh_create(const Pool* pool, int32_t threads) { return new Attention(*pool, threads); }
void kvmesh_destroy(void* attention) { delete static_cast<Attention*>(attention); }

void kvmesh_run(void* attention, const Pool* pool, const Batch* batch, int64_t layer, const Rows* rows) {
    auto* self = static_cast<Attention*>(attention);
    pool->bfloat16 ? self->run<BFloat16>(*batch, layer, *rows) : self->run<Float32>(*batch, layer, *rows);
}

void kvmesh_put(const Pool* pool, const Batch* batch, int64_t layer, const Rows* rows) {
    auto* move = pool->bfloat16 ? put<BFloat16> : put<Float32>;
    move(*pool, *batch, layer, *rows);
}

void kvmesh_get(const Pool* pool, const Batch* batch, int64_t layer, void* keys, void* values) {
    auto* move = pool->bfloat16 ? get<BFloat16> : get<Float32>;
    move(*pool, *batch, layer, keys, values);
}
}
