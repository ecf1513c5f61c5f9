// AdamW: clipping, decay, moments and update in one pass over a tensor.
// Source: Loshchilov and Hutter 2019, algorithm 2, in torch.optim.AdamW's order (decay by lr * weight_decay first).
//
// Dimensions: N rows, C columns.
// Launch: block = 256, grid = ceil(N * ceil(C / 4) / 256); a thread has four columns of one row.
// Shared memory: none.

#define THREADS 256

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
// optional and contiguous: new_p in 16 bits, absent where tensors are float32; clip, lr []
// and step [], which counts from 1. log_beta1, log_beta2: natural logarithms of the betas; one_minus_beta1,
// one_minus_beta2: 1 - beta, rounded from a wider type. halt: see common.cuh.
extern "C" __global__ void __launch_bounds__(THREADS)
adamw_forward_f32(const float* p, const float* g, const float* m, const float* v, const float* clip, const float* lr,
                  const int* step, float* new_p, float* new_m, float* new_v, real* copy, int rows, int cols, int g_ld,
                  float beta1, float beta2, float one_minus_beta1, float one_minus_beta2, float log_beta1, float log_beta2,
                  float eps, float weight_decay, const int* halt) {
    unsigned per_row = ((unsigned)cols + 3) / 4;
    unsigned i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= per_row * rows || halted(halt)) return;
    int row = (int)(i / per_row), c = 4 * (int)(i % per_row), n = cols - c;
    long long at = (long long)row * cols + c;

    // 1 - beta^t as -expm1(t * log beta): the difference itself would lose its digits for small t.
    float t = (float)*step;
    float rate = *lr;
    Update update = {*clip, beta1, beta2, one_minus_beta1, one_minus_beta2, eps, rate / -expm1f(t * log_beta1),
                     1.f / sqrtf(-expm1f(t * log_beta2)), 1.f - rate * weight_decay};
    float4 ps = load4(p + at, n), gs = load4(g + (long long)row * g_ld + c, n), ms = load4(m + at, n), vs = load4(v + at, n);
    update(ps.x, gs.x, ms.x, vs.x);
    update(ps.y, gs.y, ms.y, vs.y);
    update(ps.z, gs.z, ms.z, vs.z);
    update(ps.w, gs.w, ms.w, vs.w);
    store4(new_p + at, ps, n);
    if (copy) store4(copy + at, ps, n);
    store4(new_m + at, ms, n);
    store4(new_v + at, vs, n);
}
