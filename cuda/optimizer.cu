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

// p, m, v and their successors new_p, new_m, new_v [N, C] contiguous (each may be its predecessor), g [N, C]; copy [N, C],
// optional and contiguous: new_p in 16 bits, absent where tensors are float32.
struct Tensor {
    const float *p, *g, *m, *v;
    float *new_p, *new_m, *new_v;
    real* copy;
    int rows, cols, g_ld;
    float weight_decay;
};

// tensors [count]; first [count + 1]: see tensor_of_block; clip, lr [] and step [], which counts from 1. log_beta1,
// log_beta2: natural logarithms of the betas; one_minus_beta1, one_minus_beta2: 1 - beta, rounded from a wider type.
// halt: see common.cuh.
extern "C" __global__ void __launch_bounds__(THREADS)
adamw_forward_f32(const Tensor* tensors, const int* first, int count, const float* clip, const float* lr,
                  const int* step, float beta1, float beta2, float one_minus_beta1, float one_minus_beta2,
                  float log_beta1, float log_beta2, float eps, const int* halt) {
    if (halted(halt)) return;
    int number = tensor_of_block(first, count);
    Tensor x = tensors[number];
    unsigned per_row = ((unsigned)x.cols + 3) / 4, groups = per_row * x.rows;
    unsigned from = (blockIdx.x - first[number]) * GROUPS, to = min(from + GROUPS, groups);

    // 1 - beta^t as -expm1(t * log beta): the difference itself would lose its digits for small t.
    float t = (float)*step;
    float rate = *lr;
    Update update = {*clip, beta1, beta2, one_minus_beta1, one_minus_beta2, eps, rate / -expm1f(t * log_beta1),
                     1.f / sqrtf(-expm1f(t * log_beta2)), 1.f - rate * x.weight_decay};
    for (unsigned i = from + threadIdx.x; i < to; i += THREADS) {
        int row = (int)(i / per_row), c = 4 * (int)(i % per_row), n = x.cols - c;
        long long at = (long long)row * x.cols + c;
        float4 ps = load4(from_table(x.p) + at, n), gs = load4(from_table(x.g) + (long long)row * x.g_ld + c, n);
        float4 ms = load4(from_table(x.m) + at, n), vs = load4(from_table(x.v) + at, n);
        update(ps.x, gs.x, ms.x, vs.x);
        update(ps.y, gs.y, ms.y, vs.y);
        update(ps.z, gs.z, ms.z, vs.z);
        update(ps.w, gs.w, ms.w, vs.w);
        store4(from_table(x.new_p) + at, ps, n);
        if (x.copy) store4(from_table(x.copy) + at, ps, n);
        store4(from_table(x.new_m) + at, ms, n);
        store4(from_table(x.new_v) + at, vs, n);
    }
}
