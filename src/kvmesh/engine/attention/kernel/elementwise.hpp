// What lies between the matrix products of a layer: residual and norm, gate, rotation. Each in one pass over a row, in
// float32, rounded once.

#pragma once

#include "vectors.hpp"

namespace kvmesh {

template <class T> INLINE float widen(typename T::element x);
template <> INLINE float widen<Float32>(float x) { return x; }
template <> INLINE float widen<BFloat16>(uint16_t x) { const word w = word{x} << 16; float f; std::memcpy(&f, &w, 4); return f; }

// W elements as floats.
template <class T> INLINE vfloat take(const typename T::element* from) {
    vfloat v;
    for (int i = 0; i < W; ++i) v[i] = widen<T>(from[i]);
    return v;
}
template <> INLINE vfloat take<Float32>(const float* from) { return load<vfloat>(from); }
#if defined(__AVX512BF16__)
template <> INLINE vfloat take<BFloat16>(const uint16_t* from) {
    return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)load<vhalf>(from)), 16);
}
#endif

// Sums of residuals are rounded as they would be stored, so that it does not matter that they stay in registers.
template <class T, class Weight> struct Norm {
    using E = typename T::element;
    E* hidden;
    const E* delta;  // or null
    const typename Weight::element* weight;
    E* out;
    int64_t width;
    float eps;

    void run(int64_t row) const {
        E* h = hidden + row * width;
        E* to = out + row * width;
        float squares = 0;
        vfloat sum = {};
        int64_t i = 0;
        for (; i + W <= width; i += W) {
            if (delta) T::put(h + i, take<T>(h + i) + take<T>(delta + row * width + i));
            const vfloat x = take<T>(h + i);
            sum += x * x;
        }
        for (; i < width; ++i) {
            if (delta) h[i] = T::round(widen<T>(h[i]) + widen<T>(delta[row * width + i]));
            squares += widen<T>(h[i]) * widen<T>(h[i]);
        }
        const float scale = 1.0f / std::sqrt((squares + total(sum)) / width + eps);
        for (i = 0; i + W <= width; i += W) T::put(to + i, take<T>(h + i) * scale * take<Weight>(weight + i));
        for (; i < width; ++i) to[i] = T::round(widen<T>(h[i]) * scale * widen<Weight>(weight[i]));
    }
};

// silu(gate) * up of rows that hold the gate and then the up part.
template <class T>
void gate(const typename T::element* from, typename T::element* to, int64_t rows, int64_t width) {
    constexpr float LOG2E = 1.44269504088896341f;
    for (int64_t row = 0; row < rows; ++row, from += 2 * width, to += width) {
        int64_t i = 0;
        for (; i + W <= width; i += W) {
            const vfloat x = take<T>(from + i), power = every(126.0f) < x * -LOG2E ? every(126.0f) : x * -LOG2E;
            T::put(to + i, x / (1.0f + power_of_2(power)) * take<T>(from + width + i));
        }
        for (; i < width; ++i) {
            const float x = widen<T>(from[i]);
            to[i] = T::round(x / (1.0f + std::exp(-x)) * widen<T>(from[width + i]));
        }
    }
}

// Rotates, in place, the first `heads` heads of rows of `stride` elements; cos and signed sin are [rows, dim].
template <class T>
void rotate(typename T::element* rows, const typename T::element* cos, const typename T::element* sin, int64_t count,
            int64_t stride, int heads, int dim) {
    const int half = dim / 2;
    for (int64_t row = 0; row < count; ++row, cos += dim, sin += dim)
        for (int head = 0; head < heads; ++head) {
            auto* x = rows + row * stride + head * dim;
            int i = 0;
            for (; i + W <= half; i += W) {
                const vfloat a = take<T>(x + i), b = take<T>(x + half + i);
                T::put(x + i, a * take<T>(cos + i) + b * take<T>(sin + i));
                T::put(x + half + i, b * take<T>(cos + half + i) + a * take<T>(sin + half + i));
            }
            for (; i < half; ++i) {
                const float a = widen<T>(x[i]), b = widen<T>(x[half + i]);
                x[i] = T::round(a * widen<T>(cos[i]) + b * widen<T>(sin[i]));
                x[half + i] = T::round(b * widen<T>(cos[half + i]) + a * widen<T>(sin[half + i]));
            }
        }
}

}  // namespace kvmesh
