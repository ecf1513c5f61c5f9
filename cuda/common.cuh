// What all kernel files share. rust/cuda/src/sources.rs puts this file in front of each of them, so that a translation
// unit includes nothing: binaries are kept by the text that the compiler is given, not by that of included files.
//
// Rules of this folder:
// - Matrices are row-major with a row stride (`x_ld`, in elements) of their own, because a plan's operands are views.
//   A plain vector or a contiguous tensor is a matrix of one row. Every tensor has fewer than 2^31 elements.
// - A pointer that the description calls optional is null when absent.
// - A file whose kernels have operands of type `real` is compiled for tensors of each type: float32, bfloat16 where BF16 is
//   defined, float16 where F16 is. There each kernel's name ends in _bf16 or _f16. What is `float` is float32 in all of
//   them. Arithmetic is float32.
// - Results depend on shapes alone: no atomics, no order that depends on timing.
// - Step-dependent scalars (learning rate, step, clip factor, random state) are read from device memory, so that a
//   captured graph stays valid from step to step.
// - A kernel for many tensors takes a table of them, in device memory: a struct of pointers and sizes for each.
// - A kernel that may write a state behind a global norm takes `halt` last, and writes nothing where it is set.
// - Memory that a result may share with an operand is not __restrict__; each element is read before it is written, by
//   the same thread.
// - Compiled with -ftz=true: float32 arithmetic flushes subnormal numbers to zero.

#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
#define WARP 32
#define ALL_LANES 0xffffffffu

// ---- What tensors are stored in ------------------------------------------------------------------------------------

#if defined(BF16) || defined(F16)
#define HALF
typedef unsigned short real;  // its bits
#else
typedef float real;
#endif

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ void put(float* p, float x) { *p = x; }

#ifdef HALF
// The floats in the halves of a word, and two floats as such, `low` in the lower half: ties to even, infinite beyond the
// largest number.
#ifdef F16
__device__ __forceinline__ float widen(real x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
__device__ __forceinline__ float low_of(unsigned word) { return widen((real)word); }
__device__ __forceinline__ float high_of(unsigned word) { return widen((real)(word >> 16)); }

__device__ __forceinline__ unsigned narrow(float low, float high) {
    unsigned both;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
    real a, b;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(a) : "f"(low));
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(b) : "f"(high));
    both = a | (unsigned)b << 16;
#endif
    return both;
}
#else
// A bfloat16 is the upper half of a float32.
__device__ __forceinline__ float low_of(unsigned word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high_of(unsigned word) { return __uint_as_float(word & 0xffff0000u); }
__device__ __forceinline__ float widen(real x) { return low_of(x); }

__device__ __forceinline__ unsigned narrow(float low, float high) {
    unsigned both;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
    unsigned a = __float_as_uint(low), b = __float_as_uint(high);
    a = (a & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : (a + 0x7fffu + (a >> 16 & 1u)) >> 16;
    b = (b & 0x7fffffffu) > 0x7f800000u ? 0x7fff0000u : (b + 0x7fffu + (b >> 16 & 1u)) & 0xffff0000u;
    both = a | b;
#endif
    return both;
}
#endif

__device__ __forceinline__ void put(real* p, float x) { *p = (real)narrow(x, 0.f); }
#endif

// ---- A group of a row: as many elements as 128 bits hold of `real` -------------------------------------------------

#define COLUMNS (16 / (int)sizeof(real))

struct Values {
    float x[COLUMNS];
};

// One 128-bit access (two for float32 beside 16 bits) where the address allows it, single ones at the end of a row or of
// an unaligned view.
__device__ __forceinline__ bool group_fits(const void* p, int n) {
    return n >= COLUMNS && (reinterpret_cast<unsigned long long>(p) & 15) == 0;
}

// p[0..COLUMNS], of which n exist (n may be zero or negative); the others are 0.
template <class T>
__device__ __forceinline__ Values load_singly(const T* p, int n) {
    Values v;
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) v.x[i] = i < n ? widen(p[i]) : 0.f;
    return v;
}

__device__ __forceinline__ Values load(const float* p, int n) {
    if (!group_fits(p, n)) return load_singly(p, n);
    Values v;
#pragma unroll
    for (int i = 0; i < COLUMNS; i += 4) {
        float4 four = *reinterpret_cast<const float4*>(p + i);
        v.x[i] = four.x;
        v.x[i + 1] = four.y;
        v.x[i + 2] = four.z;
        v.x[i + 3] = four.w;
    }
    return v;
}

__device__ __forceinline__ void store(float* p, const Values& v, int n) {
    if (group_fits(p, n)) {
#pragma unroll
        for (int i = 0; i < COLUMNS; i += 4) {
            *reinterpret_cast<float4*>(p + i) = make_float4(v.x[i], v.x[i + 1], v.x[i + 2], v.x[i + 3]);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
        if (i < n) p[i] = v.x[i];
    }
}

// A group as it is stored, which in 16 bits takes half of the registers.
__device__ __forceinline__ Values values_of(uint4 stored) {
    unsigned words[4] = {stored.x, stored.y, stored.z, stored.w};
    Values v;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#ifdef HALF
        v.x[2 * i] = low_of(words[i]);
        v.x[2 * i + 1] = high_of(words[i]);
#else
        v.x[i] = __uint_as_float(words[i]);
#endif
    }
    return v;
}

#ifdef HALF
__device__ __forceinline__ Values load(const real* p, int n) {
    if (!group_fits(p, n)) return load_singly(p, n);
    return values_of(*reinterpret_cast<const uint4*>(p));
}

__device__ __forceinline__ void store(real* p, const Values& v, int n) {
    if (group_fits(p, n)) {
        *reinterpret_cast<uint4*>(p) =
            make_uint4(narrow(v.x[0], v.x[1]), narrow(v.x[2], v.x[3]), narrow(v.x[4], v.x[5]), narrow(v.x[6], v.x[7]));
        return;
    }
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
        if (i < n) put(p + i, v.x[i]);
    }
}
#endif

__device__ __forceinline__ Values all_of(float x) {
    Values v;
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) v.x[i] = x;
    return v;
}

__device__ __forceinline__ float sum_of(const Values& v) {
    float sum = (v.x[0] + v.x[1]) + (v.x[2] + v.x[3]);
#pragma unroll
    for (int i = 4; i < COLUMNS; i += 4) sum += (v.x[i] + v.x[i + 1]) + (v.x[i + 2] + v.x[i + 3]);
    return sum;
}

// ---- Four elements of a row ----------------------------------------------------------------------------------------
// One 128-bit access where the address allows it, single ones at the end of a row or of an unaligned view.

__device__ __forceinline__ bool vector_fits(const void* p, int n) {
    return n >= 4 && (reinterpret_cast<unsigned long long>(p) & 15) == 0;
}

// p[0..4], of which n exist (n may be zero or negative); the others are 0.
__device__ __forceinline__ float4 load4(const float* p, int n) {
    if (vector_fits(p, n)) return *reinterpret_cast<const float4*>(p);
    float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
    if (n > 0) x.x = p[0];
    if (n > 1) x.y = p[1];
    if (n > 2) x.z = p[2];
    if (n > 3) x.w = p[3];
    return x;
}

__device__ __forceinline__ void store4(float* p, float4 x, int n) {
    if (vector_fits(p, n)) {
        *reinterpret_cast<float4*>(p) = x;
        return;
    }
    if (n > 0) p[0] = x.x;
    if (n > 1) p[1] = x.y;
    if (n > 2) p[2] = x.z;
    if (n > 3) p[3] = x.w;
}

#ifdef HALF
// The same in 64 bits.
__device__ __forceinline__ float4 load4(const real* p, int n) {
    if (n >= 4 && (reinterpret_cast<unsigned long long>(p) & 7) == 0) {
        uint2 two = *reinterpret_cast<const uint2*>(p);
        return make_float4(low_of(two.x), high_of(two.x), low_of(two.y), high_of(two.y));
    }
    float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
    if (n > 0) x.x = widen(p[0]);
    if (n > 1) x.y = widen(p[1]);
    if (n > 2) x.z = widen(p[2]);
    if (n > 3) x.w = widen(p[3]);
    return x;
}

__device__ __forceinline__ void store4(real* p, float4 x, int n) {
    if (n >= 4 && (reinterpret_cast<unsigned long long>(p) & 7) == 0) {
        *reinterpret_cast<uint2*>(p) = make_uint2(narrow(x.x, x.y), narrow(x.z, x.w));
        return;
    }
    if (n > 0) put(p, x.x);
    if (n > 1) put(p + 1, x.y);
    if (n > 2) put(p + 2, x.z);
    if (n > 3) put(p + 3, x.w);
}
#endif

// ---- Sums and maxima in fixed order --------------------------------------------------------------------------------

// The sum over a warp, in every lane. A butterfly: each lane adds the same pairs, so all get the same bits.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

// The sum over a block of WARPS warps, in every thread; warp totals are added in order. All threads must call it.
template <int WARPS>
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float totals[WARPS];
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0) totals[threadIdx.x / WARP] = x;
    __syncthreads();
    x = totals[0];
#pragma unroll
    for (int w = 1; w < WARPS; ++w) x += totals[w];
    __syncthreads();  // `totals` may be used again
    return x;
}

template <int WARPS>
__device__ __forceinline__ float block_max(float x) {
    __shared__ float largest[WARPS];
    x = warp_max(x);
    if (threadIdx.x % WARP == 0) largest[threadIdx.x / WARP] = x;
    __syncthreads();
    x = largest[0];
#pragma unroll
    for (int w = 1; w < WARPS; ++w) x = fmaxf(x, largest[w]);
    __syncthreads();  // `largest` may be used again
    return x;
}

// ---- The end of a run ----------------------------------------------------------------------------------------------

// Whether a global norm was not finite: what follows it then leaves all states as they are. halt [], optional.
__device__ __forceinline__ bool halted(const int* halt) {
    return halt && *halt;
}

// ---- Launches for many tensors --------------------------------------------------------------------------------------

// The number of this block's tensor, where tensor i of `tensors` has the blocks first[i] .. first[i + 1]. first
// [tensors + 1]. All threads must call it.
__device__ __forceinline__ int tensor_of_block(const int* first, int tensors) {
    __shared__ int found;
    int block = (int)blockIdx.x;
    for (int i = (int)threadIdx.x; i < tensors; i += (int)blockDim.x) {
        if (first[i] <= block && block < first[i + 1]) found = i;
    }
    __syncthreads();
    return found;
}

// A pointer out of a table: the compiler cannot know by itself that it is one to global memory.
template <class T>
__device__ __forceinline__ T* from_table(T* p) {
    __builtin_assume(__isGlobal(p));
    return p;
}

// ---- Random numbers ------------------------------------------------------------------------------------------------

// Philox 4x32-10, bit for bit rust/random. Source: Salmon et al. 2011, section 3.3 and table 2.
__device__ __forceinline__ uint4 philox(uint2 key, uint4 counter) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        unsigned high0 = __umulhi(0xD2511F53u, counter.x), low0 = 0xD2511F53u * counter.x;
        unsigned high1 = __umulhi(0xCD9E8D57u, counter.z), low1 = 0xCD9E8D57u * counter.z;
        counter = make_uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
        key.x += 0x9E3779B9u;
        key.y += 0xBB67AE85u;
    }
    return counter;
}

// What one site, a stream for a purpose, draws in one step: a word for each element.
struct Draws {
    uint2 key;
    uint2 step;
};

// rng [4]: seed (low, high), step (low, high).
__device__ __forceinline__ Draws draws_of(const int* rng, unsigned stream, unsigned purpose) {
    return {make_uint2(rng[0], rng[1] ^ (stream * 0x9E3779B9u + purpose)), make_uint2(rng[2], rng[3])};
}

// The words of elements 4 * block .. 4 * block + 4.
__device__ __forceinline__ uint4 words_of_block(const Draws& draws, unsigned long long block) {
    return philox(draws.key, make_uint4((unsigned)block, (unsigned)(block >> 32), draws.step.x, draws.step.y));
}

// The words of elements first .. first + 4.
__device__ __forceinline__ uint4 words_from(const Draws& draws, unsigned long long first) {
    uint4 a = words_of_block(draws, first / 4);
    int skip = (int)(first % 4);
    if (skip == 0) return a;
    uint4 b = words_of_block(draws, first / 4 + 1);
    if (skip == 1) return make_uint4(a.y, a.z, a.w, b.x);
    if (skip == 2) return make_uint4(a.z, a.w, b.x, b.y);
    return make_uint4(a.w, b.x, b.y, b.z);
}

// The keep rule of one dropout site in one step: rust/cpu/src/kernels/dropout.rs.
struct Keep {
    Draws draws;
    float p;
    float scale;
};

// scale is 1 / (1 - p).
__device__ __forceinline__ Keep keep_rule(const int* rng, unsigned stream, float p, float scale) {
    return {draws_of(rng, stream, 0xD0D0u), p, scale};
}

// 0 or 1 / (1 - p), from the upper 24 bits of a word.
__device__ __forceinline__ float keep_factor(const Keep& keep, unsigned word) {
    return (float)(word >> 8) * (1.f / 16777216.f) < keep.p ? 0.f : keep.scale;
}

// The factors of elements first .. first + 4.
__device__ __forceinline__ float4 keep4(const Keep& keep, unsigned long long first) {
    uint4 a = words_from(keep.draws, first);
    return make_float4(keep_factor(keep, a.x), keep_factor(keep, a.y), keep_factor(keep, a.z), keep_factor(keep, a.w));
}

// The factors of elements first .. first + COLUMNS.
__device__ __forceinline__ Values keep_factors(const Keep& keep, unsigned long long first) {
    Values v;
#pragma unroll
    for (int i = 0; i < COLUMNS; i += 4) {
        float4 four = keep4(keep, first + i);
        v.x[i] = four.x;
        v.x[i + 1] = four.y;
        v.x[i + 2] = four.z;
        v.x[i + 3] = four.w;
    }
    return v;
}

// The factor of element `at` of a dropout site; 1 without one.
__device__ __forceinline__ float keep1(const Keep& keep, const int* rng, unsigned long long at) {
    if (!rng) return 1.f;
    uint4 words = words_of_block(keep.draws, at / 4);
    unsigned place = (unsigned)(at % 4);
    return keep_factor(keep, place == 0 ? words.x : place == 1 ? words.y : place == 2 ? words.z : words.w);
}
