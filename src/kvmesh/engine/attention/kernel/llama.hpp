// The layers of a Llama model in one call: norms, products, rotation, attention over paged KV, gate. The residual
// stream stays in float32; between two products rows are read once, and coded for the next one.

#pragma once

#include "attention.hpp"
#include "elementwise.hpp"
#include "product.hpp"

extern "C" {

struct LlamaLayer {
    const float *attention_norm, *mlp_norm;
    Matrix qkv, output, gate_up, down;
    int32_t window;
};

// `frequencies` are radians per position, one for each pair of a head's dimensions.
struct LlamaModel {
    const LlamaLayer* layers;
    const float* frequencies;
    int32_t count, hidden, heads;
    float amplitude, eps;
};
}

#ifdef KVMESH_PRODUCTS

namespace kvmesh {

class Llama {
  public:
    using T = BFloat16;
    using E = uint16_t;

    explicit Llama(const LlamaModel& model) : model_(model), layers_(model.layers, model.layers + model.count) {}

    // Hidden states [tokens, hidden] of the batch, in place. The pool is the one of `attention`.
    void run(Crew& crew, Attention& attention, const Pool& pool, const Batch& batch, E* states) {
        crew_ = &crew, half_ = pool.head_dim / 2, kv_heads_ = pool.kv_heads;
        locate(batch);
        const int64_t hidden = model_.hidden, width = int64_t{model_.heads + 2 * kv_heads_} * 2 * half_;
        hidden_.resize(rows_ * hidden), heads_.resize(rows_ * width);
        attended_.resize(rows_ * model_.heads * 2 * half_);
        wide_.resize(rows_ * std::max(width, int64_t{layers_[0].gate_up.outputs}));
        each_row([&](int row) {
            for (int64_t i = row * hidden; i < (row + 1) * hidden; ++i) hidden_[i] = widen<T>(states[i]);
        });
        for (size_t i = 0; i < layers_.size(); ++i) run_layer(layers_[i], i, attention, pool, batch);
        each_row([&](int row) {
            for (int64_t i = row * hidden; i < (row + 1) * hidden; ++i) states[i] = T::round(hidden_[i]);
        });
    }

  private:
    struct Place { int64_t block; int slot; };

    void run_layer(const LlamaLayer& layer, int64_t index, Attention& attention, const Pool& pool, const Batch& batch) {
        norm(layer.attention_norm, layer.qkv);
        multiply(*crew_, layer.qkv, codes_, rows_, {wide_.data(), false});
        const Layer<T> cache{pool, index};
        const int64_t width = layer.qkv.outputs, values = layer.output.inputs;
        each_row([&](int row) { rotate_and_store(row, width, cache); });
        const Rows rows{heads_.data(),    nullptr, nullptr,      width,       0, 0,
                        attended_.data(), nullptr, model_.heads, layer.window};
        attention.attend<T>(*crew_, batch, index, rows);
        code(layer.output, [&](int row) {
            return [from = &attended_[row * values]](int i) { return take<T>(from + i); };
        });
        multiply(*crew_, layer.output, codes_, rows_, {hidden_.data(), true});
        norm(layer.mlp_norm, layer.gate_up);
        multiply(*crew_, layer.gate_up, codes_, rows_, {wide_.data(), false});
        code(layer.down, [&, inner = layer.down.inputs](int row) {
            const float* gate = &wide_[2 * int64_t{row} * inner];
            return [gate, up = gate + inner](int i) { return silu(load<vfloat>(gate + i)) * load<vfloat>(up + i); };
        });
        multiply(*crew_, layer.down, codes_, rows_, {hidden_.data(), true});
    }

    // Codes of all rows for `matrix`; `reader` maps a row to what maps an index to the floats there.
    template <class F> void code(const Matrix& matrix, const F& reader) {
        codes_.shape(rows_, matrix.inputs, group_of(matrix, rows_));
        each_row([&](int row) { codes_.take_row(row, reader(row)); });
    }

    void norm(const float* weight, const Matrix& matrix) {
        code(matrix, [&](int row) {
            const float* x = &hidden_[int64_t{row} * model_.hidden];
            vfloat squares = {};
            for (int i = 0; i < model_.hidden; i += W) squares += load<vfloat>(x + i) * load<vfloat>(x + i);
            const float scale = 1.0f / std::sqrt(total(squares) / model_.hidden + model_.eps);
            return [=](int i) { return load<vfloat>(x + i) * scale * load<vfloat>(weight + i); };
        });
    }

    // The heads of a row to bfloat16, those of queries and keys rotated, and keys and values to the pool.
    void rotate_and_store(int64_t row, int64_t width, const Layer<T>& cache) {
        const float *x = &wide_[row * width], *cos = &cos_[row * half_], *sin = &sin_[row * half_];
        E* to = &heads_[row * width];
        for (int head = 0; head < model_.heads + kv_heads_; ++head, x += 2 * half_, to += 2 * half_)
            for (int i = 0; i < half_; ++i) {
                to[i] = T::round(x[i] * cos[i] - x[half_ + i] * sin[i]);
                to[half_ + i] = T::round(x[half_ + i] * cos[i] + x[i] * sin[i]);
            }
        const int size = kv_heads_ * 2 * half_;
        for (int i = 0; i < size; ++i) to[i] = T::round(x[i]);
        const E *k = to - size, *v = to;
        const auto [block, slot] = places_[row];
        cache.each(block, slot, [=](E& in, int i) { in = k[i]; }, [=](E& in, int i) { in = v[i]; });
    }

    // Where the tokens lie in the pool, and how far their positions turn a head.
    void locate(const Batch& batch) {
        places_.clear(), positions_.clear();
        each_token(batch, [&](int64_t block, int slot, int64_t) { places_.push_back({block, slot}); });
        for (int s = 0; s < batch.segments; ++s)
            for (int i = 0; i < batch.tokens[s]; ++i) positions_.push_back(batch.starts[s] + i);
        rows_ = static_cast<int>(places_.size());
        cos_.resize(rows_ * half_), sin_.resize(rows_ * half_);
        each_row([&](int64_t row) {
            for (int i = 0; i < half_; ++i) {
                const float angle = positions_[row] * model_.frequencies[i];
                cos_[row * half_ + i] = std::cos(angle) * model_.amplitude;
                sin_[row * half_ + i] = std::sin(angle) * model_.amplitude;
            }
        });
    }

    template <class F> void each_row(const F& f) {
        const int step = std::max(1, rows_ / (4 * crew_->size()));
        crew_->run((rows_ + step - 1) / step, rows_ < 4, [&](int i, int) {
            for (int row = i * step; row < std::min(rows_, (i + 1) * step); ++row) f(row);
        });
    }

    static vfloat silu(vfloat x) {
        const vfloat power = every(126.0f) < x * -LOG2_E ? every(126.0f) : x * -LOG2_E;
        return x / (1.0f + power_of_2(power));
    }

    const LlamaModel model_;
    const std::vector<LlamaLayer> layers_;
    Crew* crew_ = nullptr;
    int rows_ = 0, half_ = 0, kv_heads_ = 0;
    std::vector<Place> places_;
    std::vector<int> positions_;
    std::vector<float> cos_, sin_, hidden_, wide_;
    std::vector<E> heads_, attended_;
    Codes codes_;
};

}  // namespace kvmesh
#endif
