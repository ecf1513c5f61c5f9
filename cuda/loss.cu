// Cross-entropy of rows of logits, on one chunk of rows at a time; the matrix products around it are cuBLAS's.
//
// Dimensions: N rows in the chunk, V classes.
// Launch: block = 256, grid = N; a block has a row.
// Shared memory: static, 64 bytes.
//
// loss[n] = lse - (1 - smoothing) * z[label[n]] - smoothing * mean(z) + z_loss * lse^2 with z = logits[n] + bias and
// lse = log(sum_v exp(z[v])); 0 where the label is negative, NaN where it is V or more. The losses of all chunks are summed
// by sum_forward_f32 (reduce.cu). Sources: Szegedy et al. 2016, section 7 (smoothing); Chowdhery et al. 2022, section 5
// (z-loss).

#define THREADS 256

// How far the next logits of a thread are.
#define STEP (COLUMNS * THREADS)

// The logits of a row as read by this thread: neighbours, -inf beyond the end.
__device__ __forceinline__ Values logits_at(const real* row, const float* bias, int v, int classes) {
    int n = classes - v;
    Values z = load(row + v, n);
    if (bias) {
        Values b = load(bias + v, n);
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) z.x[i] += b.x[i];
    }
#pragma unroll
    for (int i = 1; i < COLUMNS; ++i) z.x[i] = i < n ? z.x[i] : -INFINITY;
    return z;
}

struct Softmax {
    float largest;
    float sum;  // of exp(z - largest)
};

// One pass over the row: the sum is rescaled when a larger logit appears.
// Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3.
__device__ __forceinline__ Softmax softmax_of(const real* row, const float* bias, int classes) {
    float largest = -INFINITY, sum = 0.f;
    for (int v = COLUMNS * threadIdx.x; v < classes; v += STEP) {
        Values z = logits_at(row, bias, v, classes);
        float above = largest;
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) above = fmaxf(above, z.x[i]);
        // Until a finite logit appears there is nothing to rescale, and -inf - -inf would be NaN.
        float shift = above == -INFINITY ? 0.f : above;
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) z.x[i] = expf(z.x[i] - shift);
        sum = sum * expf(largest - shift) + sum_of(z);
        largest = above;
    }
    Softmax all;
    all.largest = block_max<THREADS / WARP>(largest);
    float shift = all.largest == -INFINITY ? 0.f : all.largest;
    all.sum = block_sum<THREADS / WARP>(sum * expf(largest - shift));
    return all;
}

// The mean of a row of logits, in every thread; 0 where nobody asks. All threads must call it.
__device__ __forceinline__ float mean_of(const real* row, const float* bias, int classes, float smoothing) {
    if (smoothing == 0.f) return 0.f;
    float sum = 0.f;
    for (int v = threadIdx.x; v < classes; v += THREADS) sum += widen(row[v]) + (bias ? bias[v] : 0.f);
    return block_sum<THREADS / WARP>(sum) / classes;
}

// The loss of a row. Differences from the largest logit first: they are small where logits are huge.
__device__ __forceinline__ float loss_of(Softmax softmax, float target, float mean, float smoothing, float z_loss) {
    float log_sum = logf(softmax.sum), loss = log_sum + (softmax.largest - target);
    if (smoothing != 0.f) loss += smoothing * (target - mean);
    float lse = log_sum + softmax.largest;
    return z_loss == 0.f ? loss : loss + z_loss * lse * lse;
}

// loss [N]; logits [N, V], optional bias [V], labels [N].
extern "C" __global__ void __launch_bounds__(THREADS)
cross_entropy_forward_f32(const real* __restrict__ logits, const float* __restrict__ bias,
                          const int* __restrict__ labels, float* __restrict__ loss, int classes, int logits_ld,
                          float smoothing, float z_loss) {
    const real* row = logits + (long long)blockIdx.x * logits_ld;
    int label = labels[blockIdx.x];
    if (label < 0 || label >= classes) {
        if (threadIdx.x == 0) loss[blockIdx.x] = label < 0 ? 0.f : NAN;
        return;
    }
    Softmax softmax = softmax_of(row, bias, classes);
    float target = widen(row[label]) + (bias ? bias[label] : 0.f);
    float mean = mean_of(row, bias, classes, smoothing);
    if (threadIdx.x == 0) loss[blockIdx.x] = loss_of(softmax, target, mean, smoothing, z_loss);
}

// The same, and the gradient in place: logits = (softmax(z) * (1 + 2 * z_loss * lse) - (1 - smoothing) * onehot(label)
// - smoothing / V) * dloss, or zeros in a row without a label. dloss [].
extern "C" __global__ void __launch_bounds__(THREADS)
cross_entropy_backward_f32(real* logits, const float* __restrict__ bias, const int* __restrict__ labels,
                           const float* __restrict__ dloss, float* __restrict__ loss, int classes, int logits_ld,
                           float smoothing, float z_loss) {
    real* row = logits + (long long)blockIdx.x * logits_ld;
    int label = labels[blockIdx.x];
    if (label < 0 || label >= classes) {
        for (int v = COLUMNS * threadIdx.x; v < classes; v += STEP) store(row + v, all_of(0.f), classes - v);
        if (threadIdx.x == 0) loss[blockIdx.x] = label < 0 ? 0.f : NAN;
        return;
    }
    // Read before softmax_of's barriers, so before anyone overwrites it.
    float target = widen(row[label]) + (bias ? bias[label] : 0.f);
    Softmax softmax = softmax_of(row, bias, classes);
    float mean = mean_of(row, bias, classes, smoothing);
    float scale = *dloss, factor = scale / softmax.sum, even = scale * smoothing / classes;
    if (z_loss != 0.f) factor *= 1.f + 2.f * z_loss * (logf(softmax.sum) + softmax.largest);
    scale *= 1.f - smoothing;
    for (int v = COLUMNS * threadIdx.x; v < classes; v += STEP) {
        Values z = logits_at(row, bias, v, classes);
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) {
            z.x[i] = expf(z.x[i] - softmax.largest) * factor - even;
            z.x[i] -= v + i == label ? scale : 0.f;
        }
        store(row + v, z, classes - v);
    }
    if (threadIdx.x == 0) loss[blockIdx.x] = loss_of(softmax, target, mean, smoothing, z_loss);
}
