// Decoding: writing keys and values into the cache, and attention over it.
//
// Dimensions: B sequences of T tokens; a cache of R rows of S slots of C elements; H query heads, K key-value heads, D head
// width (at most 256), C = K * D.
// Launch:
//   cache_write_forward_f32         block = 256, grid = ceil(B * T * ceil(C / 4) / 256): a thread has four columns.
//   cached_attention_forward_f32    block = 128, grid = (T, H, B): a block has one query of one head.
// Shared memory: static, 4.1 KB in cached_attention_forward_f32.
//
// Rows and positions are checked by whoever uploads them. Those that are out of range all the same are left out.

#define THREADS 256
#define WARPS 4
#define MAX_WIDTH 256
#define PARTS (MAX_WIDTH / (4 * WARP))

// cache[row[b], start[b] + t] = source[b, t] for t < count[b]. source [B, T, C] with source_ld elements from token to
// token, row, start, count [B], cache [R, S, C] contiguous.
extern "C" __global__ void __launch_bounds__(THREADS)
cache_write_forward_f32(const float* __restrict__ source, const int* __restrict__ row, const int* __restrict__ start,
                        const int* __restrict__ count, float* __restrict__ cache, int sequences, int tokens, int cols,
                        int source_ld, int cache_rows, int slots) {
    unsigned per_token = ((unsigned)cols + 3) / 4;
    unsigned i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= per_token * tokens * sequences) return;
    int c = 4 * (int)(i % per_token), token = (int)(i / per_token);
    int b = token / tokens, t = token % tokens;
    int r = row[b], slot = start[b] + t;
    if (t >= count[b] || r < 0 || r >= cache_rows || slot < 0 || slot >= slots) return;
    float4 value = load4(source + (long long)token * source_ld + c, cols - c);
    store4(cache + ((long long)r * slots + slot) * cols + c, value, cols - c);
}

struct Rescale {
    float largest;
    float keep;  // factor on what was summed with the smaller maximum
    float add;   // exp(score - largest)
};

// One score joins a running softmax. Source: Milakov and Gimelshein 2018, algorithm 3.
__device__ __forceinline__ Rescale join(float largest, float score) {
    float above = fmaxf(largest, score);
    float shift = above == -INFINITY ? 0.f : above;
    return {above, expf(largest - shift), expf(score - shift)};
}

// out[b, t, h] = softmax(scale * q . k) * v over positions up to start[b] + t, of which the last `window` count (pass
// 2^31 - 1 for all); position p is slot p of cache row rows[b, p]. q, out [B, T, H * D], caches [R, S, K * D] contiguous,
// rows [B, S], start, count [B]; queries from count[b] on give zeros. The optional key_bias [H, S] is added to the scaled
// scores.
//
// Each warp takes every fourth position and keeps a running softmax; the four are joined in order.
extern "C" __global__ void __launch_bounds__(WARPS * WARP)
cached_attention_forward_f32(const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,
                             const int* __restrict__ rows, const int* __restrict__ start, const int* __restrict__ count,
                             const float* __restrict__ key_bias, float* __restrict__ out, int tokens, int heads, int kv_heads, int width, int q_ld, int out_ld,
                             int cache_rows, int slots, int window, float scale) {
    __shared__ __align__(16) float sums[WARPS][MAX_WIDTH];
    __shared__ float largests[WARPS], denominators[WARPS];
    int t = blockIdx.x, head = blockIdx.y, b = blockIdx.z;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int cols = kv_heads * width, col = head / (heads / kv_heads) * width;
    long long token = (long long)b * tokens + t;
    q += token * q_ld + (long long)head * width;
    out += token * out_ld + (long long)head * width;

    float4 query[PARTS], sum[PARTS];
    float largest = -INFINITY, denominator = 0.f;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        int c = 4 * (part * WARP + lane);
        query[part] = load4(q + c, width - c);
        sum[part] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
    int end = t < count[b] ? min(start[b] + t + 1, slots) : 0;
    for (int p = max(0, end - window) + warp; p < end; p += WARPS) {
        int row = rows[(long long)b * slots + p];
        if (row < 0 || row >= cache_rows) continue;
        long long at = ((long long)row * slots + p) * cols + col;
        float score = 0.f;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            int c = 4 * (part * WARP + lane);
            float4 key = load4(k + at + c, width - c), x = query[part];
            score += (x.x * key.x + x.y * key.y) + (x.z * key.z + x.w * key.w);
        }
        float bias = key_bias ? key_bias[(long long)head * slots + p] : 0.f;
        Rescale next = join(largest, warp_sum(score) * scale + bias);
        largest = next.largest;
        denominator = denominator * next.keep + next.add;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            int c = 4 * (part * WARP + lane);
            float4 value = load4(v + at + c, width - c), s = sum[part];
            sum[part] = make_float4(s.x * next.keep + value.x * next.add, s.y * next.keep + value.y * next.add,
                                    s.z * next.keep + value.z * next.add, s.w * next.keep + value.w * next.add);
        }
    }
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        *reinterpret_cast<float4*>(&sums[warp][4 * (part * WARP + lane)]) = sum[part];
    }
    if (lane == 0) {
        largests[warp] = largest;
        denominators[warp] = denominator;
    }
    __syncthreads();

    float above = largests[0];
#pragma unroll
    for (int w = 1; w < WARPS; ++w) above = fmaxf(above, largests[w]);
    float shift = above == -INFINITY ? 0.f : above;
    float factors[WARPS], total = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        factors[w] = expf(largests[w] - shift);
        total += denominators[w] * factors[w];
    }
    float inverse = total == 0.f ? 0.f : 1.f / total;
    for (int c = threadIdx.x; c < width; c += WARPS * WARP) {
        float value = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) value += sums[w][c] * factors[w];
        out[c] = value * inverse;
    }
}
