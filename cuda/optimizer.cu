// AdamW: clipping, decay, moments and update of many tensors in one pass over each.
// Source: Loshchilov and Hutter 2019, algorithm 2, in torch.optim.AdamW's order (decay by lr * weight_decay first).
//
// Dimensions, of each tensor: N rows, C columns.
// Launch: block = 256, grid = sum of ceil(N * ceil(C / 4) / 1024) over the tensors, whose blocks follow each other; a
// thread has four columns of one row, up to four times.
// Shared memory: static, 4 bytes.

#define THREADS 256
#define GROUPS (4 * THREADS)

struct Update {
    float clip, beta1, beta2, one_minus_beta1, one_minus_beta2, eps, size, root, decay;

    __device__ __forceinline__ void operator()(float& p, float g, float& m, float& v) const {
        g *= clip;
        m = beta1 * m + one_minus_beta1 * g;
        v = beta2 * v + one_minus_beta2 * g * g;
        p = p * decay - size * m / (sqrtf(v) * root + eps);
    }
};

// One of the two values of bfloat16 next to x, by the upper half of a random word; infinities and NaN stay.
// rust/cpu/src/kernels/rounding.rs says the same.
__device__ __forceinline__ float by_chance(float x, unsigned word) {
    unsigned bits = __float_as_uint(x);
    bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    return finite ? __uint_as_float((bits + (word >> 16)) & 0xffff0000u) : x;
}

// p, m, v and their successors new_p, new_m, new_v [N, C] contiguous (each may be its predecessor), g [N, C]; copy [N, C],
// optional and contiguous: new_p in 16 bits, absent where tensors are float32. Where new_p is rounded by chance, by the
// random bits of `stream`, p and new_p may be bfloat16, as which tensors are stored then: `narrow`.
struct Tensor {
    const void* p;
    const float *g, *m, *v;
    void* new_p;
    float *new_m, *new_v;
    real* copy;
    int rows, cols, g_ld;
    float weight_decay;
    unsigned stream;
    int narrow;
};

// What all tensors have in common: clip, lr [] and step [], which counts from 1; log_beta1, log_beta2: natural logarithms
// of the betas; one_minus_beta1, one_minus_beta2: 1 - beta, rounded from a wider type.
struct Common {
    const float *clip, *lr;
    const int* step;
    float beta1, beta2, one_minus_beta1, one_minus_beta2, log_beta1, log_beta2, eps;
};

// The block's part of its tensor. ROUNDED: by chance, of bits of rng [4], to values of bfloat16.
template <bool ROUNDED>
__device__ __forceinline__ void update_part(const Tensor* tensors, const int* first, int count, const Common& common,
                                            const int* rng) {
    int number = tensor_of_block(first, count);
    Tensor x = tensors[number];
    unsigned per_row = ((unsigned)x.cols + 3) / 4, groups = per_row * x.rows;
    unsigned from = (blockIdx.x - first[number]) * GROUPS, to = min(from + GROUPS, groups);

    // 1 - beta^t as -expm1(t * log beta): the difference itself would lose its digits for small t.
    float t = (float)*common.step;
    float rate = *common.lr;
    Update update = {*common.clip, common.beta1, common.beta2, common.one_minus_beta1, common.one_minus_beta2,
                     common.eps, rate / -expm1f(t * common.log_beta1),
                     1.f / sqrtf(-expm1f(t * common.log_beta2)), 1.f - rate * x.weight_decay};
    const void* p = from_table(x.p);
    void* new_p = from_table(x.new_p);
    for (unsigned i = from + threadIdx.x; i < to; i += THREADS) {
        int row = (int)(i / per_row), c = 4 * (int)(i % per_row), n = x.cols - c;
        long long at = (long long)row * x.cols + c;
        bool narrow = ROUNDED && x.narrow;
        float4 ps = narrow ? load4((const real*)p + at, n) : load4((const float*)p + at, n);
        float4 gs = load4(from_table(x.g) + (long long)row * x.g_ld + c, n);
        float4 ms = load4(from_table(x.m) + at, n), vs = load4(from_table(x.v) + at, n);
        update(ps.x, gs.x, ms.x, vs.x);
        update(ps.y, gs.y, ms.y, vs.y);
        update(ps.z, gs.z, ms.z, vs.z);
        update(ps.w, gs.w, ms.w, vs.w);
        if (ROUNDED) {
            uint4 words = words_from(draws_of(rng, x.stream, 0xB16Fu), at);
            ps = make_float4(by_chance(ps.x, words.x), by_chance(ps.y, words.y), by_chance(ps.z, words.z),
                             by_chance(ps.w, words.w));
        }
        if (narrow) store4((real*)new_p + at, ps, n);
        else store4((float*)new_p + at, ps, n);
        if (x.copy) store4(from_table(x.copy) + at, ps, n);
        store4(from_table(x.new_m) + at, ms, n);
        store4(from_table(x.new_v) + at, vs, n);
    }
}

// tensors [count]; first [count + 1]: see tensor_of_block; the others: see Common; halt: see common.cuh.
extern "C" __global__ void __launch_bounds__(THREADS)
adamw_forward_f32(const Tensor* tensors, const int* first, int count, const float* clip, const float* lr,
                  const int* step, float beta1, float beta2, float one_minus_beta1, float one_minus_beta2,
                  float log_beta1, float log_beta2, float eps, const int* halt) {
    if (halted(halt)) return;
    Common common = {clip, lr, step, beta1, beta2, one_minus_beta1, one_minus_beta2, log_beta1, log_beta2, eps};
    update_part<false>(tensors, first, count, common, nullptr);
}

// The same, rounded by chance.
extern "C" __global__ void __launch_bounds__(THREADS)
adamw_rounded_forward_f32(const Tensor* tensors, const int* first, int count, const float* clip, const float* lr,
                          const int* step, const int* rng, float beta1, float beta2, float one_minus_beta1,
                          float one_minus_beta2, float log_beta1, float log_beta2, float eps, const int* halt) {
    if (halted(halt)) return;
    Common common = {clip, lr, step, beta1, beta2, one_minus_beta1, one_minus_beta2, log_beta1, log_beta2, eps};
    update_part<true>(tensors, first, count, common, rng);
}
