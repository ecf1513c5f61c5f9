// What the files of attention on tensor cores share: what their kernels are given, copies to shared memory, rows that four
// lanes share.

#define THREADS 128
#define LOG2_E 1.44269504f
#define LN_2 0.693147181f

// From compute capability 8.0 on: products of 16 columns, and copies to shared memory that go on by themselves.
#define AMPERE (__CUDA_ARCH__ >= 800)

// ---- Kernels -------------------------------------------------------------------------------------------------------

// The name of the word that says how many bytes of shared memory a kernel is launched with.
#define WORD(kernel) WORD_OF(kernel)
#define WORD_OF(kernel) kernel##_shared

// The bytes of `own` tiles of `rows` rows, and of two stages of two tiles of `others` rows.
template <int WIDTH>
constexpr unsigned tiles_bytes(int own, int rows, int others) {
    return 2 * WIDTH * (own * rows + 4 * others);
}

#define FORWARD_PARAMETERS                                                                                             \
    const real* __restrict__ q, const real* __restrict__ k, const real* __restrict__ v,                                \
    const int* __restrict__ segments, const float* __restrict__ key_bias, const int* __restrict__ prefix,              \
    const int* __restrict__ rng, real* __restrict__ out, float* __restrict__ lse, int batch, int tokens, int heads,    \
    int kv_heads, int width, int q_ld, int k_ld, int v_ld, int out_ld, int causal, int window, float scale,            \
    unsigned stream, float dropout_p, float dropout_scale
#define FORWARD_ARGUMENTS                                                                                              \
    q, k, v, segments, key_bias, prefix, rng, out, lse, batch, tokens, heads, kv_heads, width, q_ld, k_ld, v_ld,       \
    out_ld, causal, window, scale, stream, dropout_p, dropout_scale

#define DQ_PARAMETERS                                                                                                  \
    const real* __restrict__ dout, const real* __restrict__ q, const real* __restrict__ k,                             \
    const real* __restrict__ v, const float* __restrict__ lse, const float* __restrict__ delta,                        \
    const int* __restrict__ segments, const float* __restrict__ key_bias, const int* __restrict__ prefix,              \
    const int* __restrict__ rng, real* __restrict__ dq, int batch, int tokens, int heads, int kv_heads, int width,     \
    int dout_ld, int q_ld, int k_ld, int v_ld, int dq_ld, int causal, int window, float scale, unsigned stream,        \
    float dropout_p, float dropout_scale
#define DQ_ARGUMENTS                                                                                                   \
    dout, q, k, v, lse, delta, segments, key_bias, prefix, rng, dq, batch, tokens, heads, kv_heads, width, dout_ld,    \
    q_ld, k_ld, v_ld, dq_ld, causal, window, scale, stream, dropout_p, dropout_scale

#define DKV_PARAMETERS                                                                                                 \
    const real* __restrict__ dout, const real* __restrict__ q, const real* __restrict__ k,                             \
    const real* __restrict__ v, const float* __restrict__ lse, const float* __restrict__ delta,                        \
    const int* __restrict__ segments, const float* __restrict__ key_bias, const int* __restrict__ prefix,              \
    const int* __restrict__ rng, real* __restrict__ dk, real* __restrict__ dv, int batch, int tokens, int heads,       \
    int kv_heads, int width, int dout_ld, int q_ld, int k_ld, int v_ld, int dk_ld, int dv_ld, int causal, int window,  \
    float scale, unsigned stream, float dropout_p, float dropout_scale
#define DKV_ARGUMENTS                                                                                                  \
    dout, q, k, v, lse, delta, segments, key_bias, prefix, rng, dk, dv, batch, tokens, heads, kv_heads, width,         \
    dout_ld, q_ld, k_ld, v_ld, dk_ld, dv_ld, causal, window, scale, stream, dropout_p, dropout_scale

// ---- Copies to shared memory, which go on by themselves where that exists -----------------------------------------

// 16 bytes of global memory, or 16 zeros.
__device__ __forceinline__ void copy16(void* to, const void* from, bool inside) {
#if AMPERE
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((unsigned)__cvta_generic_to_shared(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(inside ? 16 : 0) : "memory");
#else
    *reinterpret_cast<uint4*>(to) = inside ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
#endif
}

__device__ __forceinline__ void copy4(void* to, const void* from, bool inside) {
#if AMPERE
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"((unsigned)__cvta_generic_to_shared(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(inside ? 4 : 0) : "memory");
#else
    *reinterpret_cast<float*>(to) = inside ? *reinterpret_cast<const float*>(from) : 0.f;
#endif
}

// Until all copies of this thread have arrived.
__device__ __forceinline__ void arrive() {
#if AMPERE
    asm volatile("cp.async.commit_group;" ::: "memory");
    asm volatile("cp.async.wait_group 0;" ::: "memory");
#endif
}

// ---- Results -------------------------------------------------------------------------------------------------------

// Sums and maxima over the four lanes that share a row.
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

// Element e of result n of a mask.
__device__ __forceinline__ bool bit(unsigned bits, int n, int e) { return bits >> (4 * n + e) & 1; }
