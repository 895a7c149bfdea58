// What Python calls. Nothing here checks its arguments. All else is hidden, for a process may load this library twice,
// compiled for unlike targets.

#include "attention.hpp"
#include "elementwise.hpp"
#include "llama.hpp"

using namespace kvmesh;

#pragma GCC visibility push(default)
extern "C" {

const char* kvmesh_isa() {
#if defined(__AVX512BF16__)
    return "AVX512-BF16";
#elif defined(__AVX512F__)
    return "AVX-512";
#elif defined(KVMESH_PRODUCTS)
    return "AVX2";
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

void kvmesh_add_norm(void* hidden, const void* delta, const void* weight, void* out, int64_t rows, int64_t width,
                     float eps, int32_t bfloat16, int32_t bfloat16_weight) {
    const auto all = [&](auto norm) { for (int64_t row = 0; row < rows; ++row) norm.run(row); };
    using B = uint16_t;
    using F = float;
    if (!bfloat16) all(Norm<Float32, Float32>{(F*)hidden, (F*)delta, (F*)weight, (F*)out, width, eps});
    else if (bfloat16_weight) all(Norm<BFloat16, BFloat16>{(B*)hidden, (B*)delta, (B*)weight, (B*)out, width, eps});
    else all(Norm<BFloat16, Float32>{(B*)hidden, (B*)delta, (F*)weight, (B*)out, width, eps});
}

void kvmesh_gate(const void* from, void* to, int64_t rows, int64_t width, int32_t bfloat16) {
    if (bfloat16) gate<BFloat16>((const uint16_t*)from, (uint16_t*)to, rows, width);
    else gate<Float32>((const float*)from, (float*)to, rows, width);
}

void kvmesh_rotate(void* rows, const void* cos, const void* sin, int64_t count, int64_t stride, int32_t heads,
                   int32_t dim, int32_t bfloat16) {
    using B = uint16_t;
    using F = float;
    if (bfloat16) rotate<BFloat16>((B*)rows, (const B*)cos, (const B*)sin, count, stride, heads, dim);
    else rotate<Float32>((F*)rows, (const F*)cos, (const F*)sin, count, stride, heads, dim);
}

#ifdef KVMESH_PRODUCTS

int32_t kvmesh_integer_products() {
#ifdef KVMESH_INTEGER_PRODUCTS
    return true;
#else
    return false;
#endif
}

void* kvmesh_crew_create(int32_t threads) { return new Crew(threads); }
void kvmesh_crew_destroy(void* crew) { delete static_cast<Crew*>(crew); }

// out [rows, outputs] in float32, of x [rows, inputs] in bfloat16.
void kvmesh_multiply(void* crew, const Matrix* matrix, const uint16_t* x, int32_t rows, float* out) {
    Codes codes;
    codes.shape(rows, matrix->inputs, group_of(*matrix, rows));
    for (int64_t row = 0; row < rows; ++row)
        codes.take_row(row, [from = x + row * matrix->inputs](int i) { return take<BFloat16>(from + i); });
    multiply(*static_cast<Crew*>(crew), *matrix, codes, rows, {out, false});
}

void* kvmesh_llama_create(const LlamaModel* model) { return new Llama(*model); }
void kvmesh_llama_destroy(void* llama) { delete static_cast<Llama*>(llama); }

void kvmesh_llama_run(void* llama, void* crew, void* attention, const Pool* pool, const Batch* batch, uint16_t* x) {
    static_cast<Llama*>(llama)->run(*static_cast<Crew*>(crew), *static_cast<Attention*>(attention), *pool, *batch, x);
}

#endif
}
#pragma GCC visibility pop
