// Cross-entropy of rows of logits, on one chunk of rows at a time; the matrix products around it are cuBLAS's.
//
// Dimensions: N rows in the chunk, V classes.
// Launch: block = 256, grid = N; a block has a row.
// Shared memory: static, 64 bytes.
//
// loss[n] = log(sum_v exp(z[n, v])) - z[n, label[n]] with z = logits + bias; 0 where the label is negative, NaN where it
// is V or more. The losses of all chunks are summed by sum_forward_f32 (reduce.cu).

#define THREADS 256

// The logits of a row as read by this thread: four neighbours at a time, -inf beyond the end.
__device__ __forceinline__ float4 logits4(const float* row, const float* bias, int v, int classes) {
    int n = classes - v;
    float4 z = load4(row + v, n);
    if (bias) {
        float4 b = load4(bias + v, n);
        z = make_float4(z.x + b.x, z.y + b.y, z.z + b.z, z.w + b.w);
    }
    return make_float4(z.x, n > 1 ? z.y : -INFINITY, n > 2 ? z.z : -INFINITY, n > 3 ? z.w : -INFINITY);
}

struct Softmax {
    float largest;
    float sum;  // of exp(z - largest)
};

// One pass over the row: the sum is rescaled when a larger logit appears.
// Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3.
__device__ __forceinline__ Softmax softmax_of(const float* row, const float* bias, int classes) {
    float largest = -INFINITY, sum = 0.f;
    for (int v = 4 * threadIdx.x; v < classes; v += 4 * THREADS) {
        float4 z = logits4(row, bias, v, classes);
        float above = fmaxf(largest, fmaxf(fmaxf(z.x, z.y), fmaxf(z.z, z.w)));
        // Until a finite logit appears there is nothing to rescale, and -inf - -inf would be NaN.
        float shift = above == -INFINITY ? 0.f : above;
        sum = sum * expf(largest - shift) + ((expf(z.x - shift) + expf(z.y - shift)) + (expf(z.z - shift) + expf(z.w - shift)));
        largest = above;
    }
    Softmax all;
    all.largest = block_max<THREADS / WARP>(largest);
    float shift = all.largest == -INFINITY ? 0.f : all.largest;
    all.sum = block_sum<THREADS / WARP>(sum * expf(largest - shift));
    return all;
}

// loss [N]; logits [N, V], optional bias [V], labels [N].
extern "C" __global__ void __launch_bounds__(THREADS)
cross_entropy_forward_f32(const float* __restrict__ logits, const float* __restrict__ bias,
                          const int* __restrict__ labels, float* __restrict__ loss, int classes, int logits_ld) {
    const float* row = logits + (long long)blockIdx.x * logits_ld;
    int label = labels[blockIdx.x];
    if (label < 0 || label >= classes) {
        if (threadIdx.x == 0) loss[blockIdx.x] = label < 0 ? 0.f : NAN;
        return;
    }
    Softmax softmax = softmax_of(row, bias, classes);
    float target = row[label] + (bias ? bias[label] : 0.f);
    if (threadIdx.x == 0) loss[blockIdx.x] = logf(softmax.sum) + (softmax.largest - target);
}

// The same, and the gradient in place: logits = (softmax(z) - onehot(label)) * dloss, or zeros in a row without a label.
// dloss [].
extern "C" __global__ void __launch_bounds__(THREADS)
cross_entropy_backward_f32(float* logits, const float* __restrict__ bias, const int* __restrict__ labels,
                           const float* __restrict__ dloss, float* __restrict__ loss, int classes, int logits_ld) {
    float* row = logits + (long long)blockIdx.x * logits_ld;
    int label = labels[blockIdx.x];
    if (label < 0 || label >= classes) {
        for (int v = 4 * threadIdx.x; v < classes; v += 4 * THREADS) {
            store4(row + v, make_float4(0.f, 0.f, 0.f, 0.f), classes - v);
        }
        if (threadIdx.x == 0) loss[blockIdx.x] = label < 0 ? 0.f : NAN;
        return;
    }
    // Read before softmax_of's barriers, so before anyone overwrites it.
    float target = row[label] + (bias ? bias[label] : 0.f);
    Softmax softmax = softmax_of(row, bias, classes);
    float scale = *dloss, factor = scale / softmax.sum;
    for (int v = 4 * threadIdx.x; v < classes; v += 4 * THREADS) {
        float4 z = logits4(row, bias, v, classes);
        float4 d = make_float4(expf(z.x - softmax.largest) * factor, expf(z.y - softmax.largest) * factor,
                               expf(z.z - softmax.largest) * factor, expf(z.w - softmax.largest) * factor);
        d.x -= v == label ? scale : 0.f;
        d.y -= v + 1 == label ? scale : 0.f;
        d.z -= v + 2 == label ? scale : 0.f;
        d.w -= v + 3 == label ? scale : 0.f;
        store4(row + v, d, classes - v);
    }
    if (threadIdx.x == 0) loss[blockIdx.x] = logf(softmax.sum) + (softmax.largest - target);
}
