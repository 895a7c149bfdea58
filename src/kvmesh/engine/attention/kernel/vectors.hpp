// Vectors of floats and of 32-bit words, and the two element types that a word holds. The compiler's target chooses the
// width; AVX512-BF16 is used where the target has it. GCC's vector extensions, which Clang has too.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__AVX512F__)
#define KVMESH_WIDTH 16
#elif defined(__AVX__)
#define KVMESH_WIDTH 8
#else
#define KVMESH_WIDTH 4
#endif
// What there are products for: of bfloat16, and of 8-bit codes too.
#if defined(__AVX2__) && defined(__FMA__)
#define KVMESH_PRODUCTS 1
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define KVMESH_INTEGER_PRODUCTS 1
#endif
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE inline __attribute__((always_inline))

namespace kvmesh {

constexpr int W = KVMESH_WIDTH;

using word = uint32_t;
typedef float vfloat __attribute__((vector_size(W * 4)));
typedef int32_t vint __attribute__((vector_size(W * 4)));
typedef uint16_t vhalf __attribute__((vector_size(W * 2)));

template <class V, class T> INLINE V load(const T* from) { V v; std::memcpy(&v, from, sizeof v); return v; }
template <class V, class T> INLINE void store(T* to, V v) { std::memcpy(to, &v, sizeof v); }
INLINE vint every(word x) { return vint{} + static_cast<int32_t>(x); }
INLINE vfloat every(float x) { return x - vfloat{}; }
INLINE word bits(float x) { word w; std::memcpy(&w, &x, 4); return w; }
INLINE uint16_t to_bfloat16(float x) { const word w = bits(x); return (w + 0x7fff + (w >> 16 & 1)) >> 16; }

// a * b + c with one rounding where the target can. The compiler is told not to contract products and sums by itself:
// it would do so here and not there.
INLINE vfloat fused(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vfloat)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// An element type T: P of its elements make a word; add_product adds the products of the elements of two words.
struct Float32 {
    using element = float;
    static constexpr int P = 1;
    static INLINE vfloat add_product(vfloat sum, vint a, vint b) { return fused((vfloat)a, (vfloat)b, sum); }
    static INLINE void put(float* to, vfloat x) { store(to, x); }
    static INLINE float round(float x) { return x; }
};

struct BFloat16 {
    using element = uint16_t;
    static constexpr int P = 2;
#if defined(__AVX512BF16__)
    static INLINE vfloat add_product(vfloat sum, vint a, vint b) {
        return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
    static INLINE void put(uint16_t* to, vfloat x) { store(to, (vhalf)_mm512_cvtneps_pbh((__m512)x)); }
#else
    static INLINE vfloat add_product(vfloat sum, vint a, vint b) {
        const vint high = every(word{0xffff0000});
        return fused((vfloat)(a & high), (vfloat)(b & high), fused((vfloat)(a << 16), (vfloat)(b << 16), sum));
    }
    static INLINE void put(uint16_t* to, vfloat x) {
        for (int i = 0; i < W; ++i) to[i] = to_bfloat16(x[i]);
    }
#endif
    static INLINE uint16_t round(float x) { return to_bfloat16(x); }
};

// 2^x with a relative error of 2e-7, and exactly 0 below 2^-126.
INLINE vfloat power_of_2(vfloat x) {
    const vfloat shift = every(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const vfloat rounded = x + shift, f = x - (rounded - shift);
    vfloat y = every(0.000154035304f);
    for (float c : {0.00133335581f, 0.00961812911f, 0.0555041087f, 0.240226507f, 0.693147181f, 1.0f}) y = fused(y, f, every(c));
    return x < -126.0f ? vfloat{} : (vfloat)((vint)y + ((vint)rounded << 23));
}

INLINE float greatest(vfloat v) { float m = v[0]; for (int i = 1; i < W; ++i) m = std::max(m, v[i]); return m; }
INLINE float total(vfloat v) { float s = 0; for (int i = 0; i < W; ++i) s += v[i]; return s; }

}  // namespace kvmesh
