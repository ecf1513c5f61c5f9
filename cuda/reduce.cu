// Sums whose order is a function of the shape: each launch sums chunks, a second launch of the same kernel (or of
// global_norm_forward_f32) sums the chunks' results.
//
// Launch:
//   sum_to_forward_f32                                    block = (32, 8), grid = (ceil(M * C / 32), chunks, sums).
//   sum_forward_f32                                       block = 256, grid = chunks.
//   global_norm_parts_forward_f32                         block = 256, grid = chunks of all tensors.
//   global_norm_forward_f32                               block = 256, grid = 1.
//   clip_factor_forward_f32                               block = 1, grid = 1.
// Shared memory: static, at most 1.1 KB.

#define THREADS 256

// y[chunk, m, c] = sum over the chunk's i of x[i * M + m, c]. x [copies * M, C], y [chunks, M, C] contiguous; a chunk has
// `per` values of i, chunks = ceil(copies / per) = gridDim.y. With gridDim.z = 2 the same of as many rows behind those, into
// `other` (optional without).
extern "C" __global__ void __launch_bounds__(256)
sum_to_forward_f32(const real* __restrict__ x, float* __restrict__ y, float* __restrict__ other, int copies,
                   int result_rows, int cols, int x_ld, int per) {
    __shared__ float sums[8][33];
    if (blockIdx.z == 1) {
        x += (long long)copies * result_rows * x_ld;
        y = other;
    }
    int place = blockIdx.x * 32 + threadIdx.x;
    int m = place / cols, c = place % cols;
    bool inside = m < result_rows;
    int from = blockIdx.y * per, to = min(from + per, copies);
    float sum = 0.f;
    if (inside) {
        for (int i = from + threadIdx.y; i < to; i += 8) sum += widen(x[((long long)i * result_rows + m) * x_ld + c]);
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && inside) {
        sum = 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += sums[i][threadIdx.x];
        y[((long long)blockIdx.y * result_rows + m) * cols + c] = sum;
    }
}

// The sum of f(x) over the elements of a chunk, in every thread.
template <bool SQUARES, class T>
__device__ __forceinline__ float chunk_sum(const T* x, int chunk, int elements, int cols, int x_ld, int per) {
    int from = chunk * per, to = from + min(per, elements - from);
    float sum = 0.f;
    for (int i = from + threadIdx.x; i < to; i += THREADS) {
        float value = widen(x[(long long)(i / cols) * x_ld + i % cols]);
        sum += SQUARES ? value * value : value;
    }
    return block_sum<THREADS / WARP>(sum);
}

// y[chunk] = sum of the chunk's elements. x [N, C], elements = N * C; a chunk has `per` elements, y [chunks].
extern "C" __global__ void __launch_bounds__(THREADS)
sum_forward_f32(const real* __restrict__ x, float* __restrict__ y, int elements, int cols, int x_ld, int per) {
    float sum = chunk_sum<false>(x, blockIdx.x, elements, cols, x_ld, per);
    if (threadIdx.x == 0) y[blockIdx.x] = sum;
}

#ifndef HALF
// x [N, C], elements = N * C; a chunk has `per` of them.
struct Gradient {
    const float* x;
    int elements, cols, x_ld, per;
};

// The same of the squares of many tensors, each chunk into its place among the chunks of all. gradients [count]; first
// [count + 1]: see tensor_of_block; parts [chunks].
extern "C" __global__ void __launch_bounds__(THREADS)
global_norm_parts_forward_f32(const Gradient* gradients, const int* first, int count, float* __restrict__ parts) {
    int number = tensor_of_block(first, count);
    Gradient g = gradients[number];
    float sum = chunk_sum<true>(from_table(g.x), blockIdx.x - first[number], g.elements, g.cols, g.x_ld, g.per);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// y = sqrt of the sum of parts. parts [count], y []. Where that is not finite, halt [] (optional) is set, and as long as
// it is, every norm is NaN: so are those of runs that were begun before the host has seen the first.
extern "C" __global__ void __launch_bounds__(THREADS)
global_norm_forward_f32(const float* __restrict__ parts, float* __restrict__ y, int count, int* __restrict__ halt) {
    float sum = chunk_sum<false>(parts, 0, count, count, count, count);
    if (threadIdx.x != 0) return;
    float norm = halted(halt) ? NAN : sqrtf(sum);
    *y = norm;
    if (halt && !(norm < INFINITY)) *halt = 1;
}

// y = min(1, max_norm / (norm + 1e-6)), and NaN for a norm of NaN. norm, y []. Source: torch.nn.utils.clip_grad_norm_.
extern "C" __global__ void __launch_bounds__(1)
clip_factor_forward_f32(const float* norm, float* y, float max_norm) {
    float factor = max_norm / (*norm + 1e-6f);
    *y = factor > 1.f ? 1.f : factor;
}
#endif
