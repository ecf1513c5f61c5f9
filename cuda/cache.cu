// Decoding: writing keys and values into the cache, and attention over it.
//
// Dimensions: B sequences of T tokens; a cache of R rows of S slots of C elements; H query heads, K key-value heads, D head
// width (at most 256), C = K * D.
// Launch:
//   cache_write_forward_f32         block = 256, grid = ceil(B * T * ceil(C / COLUMNS) / 256): a thread has a group of columns.
//   cached_attention_forward_f32    block = 128, grid = (N * T, H, B): a block has a span of the positions of one query of
//                                   one head; with N = 1, all of them.
//   cached_attention_join_forward_f32   block = 128, grid = (T, H, B), where N > 1: a block has one query of one head.
// Shared memory: static, 5.6 KB in cached_attention_forward_f32, 0.3 KB in cached_attention_join_forward_f32.
//
// Rows and positions are checked by whoever uploads them. Those that are out of range all the same are left out.

#define THREADS 256
#define BLOCK 128
#define MAX_WIDTH 256
#define PARTS (MAX_WIDTH / (COLUMNS * WARP))
#define MAX_SPANS 64

// cache[row[b], start[b] + t] = source[b, t] for t < count[b]. source [B, T, C] with source_ld elements from token to
// token, row, start, count [B], cache [R, S, C] contiguous.
extern "C" __global__ void __launch_bounds__(THREADS)
cache_write_forward_f32(const real* __restrict__ source, const int* __restrict__ row, const int* __restrict__ start,
                        const int* __restrict__ count, real* __restrict__ cache, int sequences, int tokens, int cols,
                        int source_ld, int cache_rows, int slots) {
    unsigned per_token = ((unsigned)cols + COLUMNS - 1) / COLUMNS;
    unsigned i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= per_token * tokens * sequences) return;
    int c = COLUMNS * (int)(i % per_token), token = (int)(i / per_token);
    int b = token / tokens, t = token % tokens;
    int r = row[b], slot = start[b] + t;
    if (t >= count[b] || r < 0 || r >= cache_rows || slot < 0 || slot >= slots) return;
    Values value = load(source + (long long)token * source_ld + c, cols - c);
    store(cache + ((long long)r * slots + slot) * cols + c, value, cols - c);
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
// A team of as many lanes as a row of a head has groups, a power of two, takes every n-th position of n teams and keeps a
// running softmax; the teams are joined in their order.
//
// Where the positions are cut into N spans of `span`, out is null. A block then writes what it summed with its own maximum,
// sums [B, T, H, N, D], and that maximum with its denominator, bounds [B, T, H, N, 2], for the launch that joins them. A span
// without positions writes bounds only, whose denominator is 0. Spans begin at multiples of `span`, so that the order of
// additions depends on the cache's size alone.
extern "C" __global__ void __launch_bounds__(BLOCK)
cached_attention_forward_f32(const real* __restrict__ q, const real* __restrict__ k, const real* __restrict__ v,
                             const int* __restrict__ rows, const int* __restrict__ start, const int* __restrict__ count,
                             const float* __restrict__ key_bias, real* __restrict__ out, float* __restrict__ sums,
                             float* __restrict__ bounds, int tokens, int heads, int kv_heads, int width, int q_ld,
                             int out_ld, int cache_rows, int slots, int window, float scale, int spans, int span) {
    __shared__ float thread_sums[BLOCK][PARTS * COLUMNS];
    __shared__ float largests[BLOCK], denominators[BLOCK], factors[BLOCK];
    int t = blockIdx.x % tokens, part_of = blockIdx.x / tokens, head = blockIdx.y, b = blockIdx.z;
    int cols = kv_heads * width, col = head / (heads / kv_heads) * width;
    long long token = (long long)b * tokens + t;
    long long place = (token * heads + head) * spans + part_of;
    int end = t < count[b] ? min(start[b] + t + 1, slots) : 0;
    int first = max(max(0, end - window), part_of * span), last = min(end, (part_of + 1) * span);
    if (!out && first >= last) {
        if (threadIdx.x < 2) bounds[2 * place + threadIdx.x] = threadIdx.x == 0 ? -INFINITY : 0.f;
        return;
    }
    q += token * q_ld + (long long)head * width;

    int lanes = 1;
    while (lanes < WARP && lanes * COLUMNS < width) lanes *= 2;
    int teams = BLOCK / lanes, team = threadIdx.x / lanes, lane = threadIdx.x % lanes;
    Values query[PARTS], sum[PARTS];
    float largest = -INFINITY, denominator = 0.f;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        int c = COLUMNS * (part * WARP + lane);
        query[part] = load(q + c, width - c);
        sum[part] = all_of(0.f);
    }
    // All teams of a warp make as many rounds: their lanes meet in shuffles.
    for (int from = first; from < last; from += teams) {
        int p = from + team;
        int row = p < last ? rows[(long long)b * slots + p] : -1;
        bool there = row >= 0 && row < cache_rows;
        long long at = there ? ((long long)row * slots + p) * cols + col : 0;
        float score = 0.f;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            int c = COLUMNS * (part * WARP + lane);
            Values key = load(k + at + c, there ? width - c : 0), x = query[part];
#pragma unroll
            for (int i = 0; i < COLUMNS; ++i) x.x[i] *= key.x[i];
            score += sum_of(x);
        }
        for (int step = lanes / 2; step > 0; step /= 2) score += __shfl_xor_sync(ALL_LANES, score, step);
        float bias = there && key_bias ? key_bias[(long long)head * slots + p] : 0.f;
        Rescale next = join(largest, there ? score * scale + bias : -INFINITY);
        largest = next.largest;
        denominator = denominator * next.keep + next.add;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            int c = COLUMNS * (part * WARP + lane);
            Values value = load(v + at + c, there ? width - c : 0);
#pragma unroll
            for (int i = 0; i < COLUMNS; ++i) {
                sum[part].x[i] = sum[part].x[i] * next.keep + value.x[i] * next.add;
            }
        }
    }
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) thread_sums[threadIdx.x][part * COLUMNS + i] = sum[part].x[i];
    }
    if (lane == 0) {
        largests[team] = largest;
        denominators[team] = denominator;
    }
    __syncthreads();

    float above = -INFINITY;
    for (int w = 0; w < teams; ++w) above = fmaxf(above, largests[w]);
    float shift = above == -INFINITY ? 0.f : above;
    if (threadIdx.x < teams) factors[threadIdx.x] = expf(largests[threadIdx.x] - shift);
    __syncthreads();

    float total = 0.f;
    for (int w = 0; w < teams; ++w) total += denominators[w] * factors[w];
    float factor = total == 0.f ? 0.f : 1.f / total;
    for (int c = threadIdx.x; c < width; c += BLOCK) {
        int of = c / COLUMNS % WARP, place_of = c / (COLUMNS * WARP) * COLUMNS + c % COLUMNS;
        float value = 0.f;
        for (int w = 0; w < teams; ++w) value += thread_sums[w * lanes + of][place_of] * factors[w];
        if (out) put(out + token * out_ld + (long long)head * width + c, value * factor);
        else sums[place * width + c] = value;
    }
    if (!out && threadIdx.x == 0) {
        bounds[2 * place] = above;
        bounds[2 * place + 1] = total;
    }
}

// out [B, T, H * D] of what N spans wrote: sums [B, T, H, N, D] and bounds [B, T, H, N, 2], added in their order; N is at most
// 64. Spans whose denominator is 0 have nothing in sums.
extern "C" __global__ void __launch_bounds__(BLOCK)
cached_attention_join_forward_f32(const float* __restrict__ sums, const float* __restrict__ bounds, real* __restrict__ out,
                                  int tokens, int heads, int width, int out_ld, int spans) {
    __shared__ float factors[MAX_SPANS];
    int t = blockIdx.x, head = blockIdx.y, b = blockIdx.z;
    long long token = (long long)b * tokens + t, place = (token * heads + head) * spans;
    sums += place * width;
    bounds += 2 * place;
    float above = -INFINITY;
    for (int s = 0; s < spans; ++s) above = fmaxf(above, bounds[2 * s]);
    float shift = above == -INFINITY ? 0.f : above;
    if (threadIdx.x < spans) factors[threadIdx.x] = expf(bounds[2 * threadIdx.x] - shift);
    __syncthreads();

    float total = 0.f;
    for (int s = 0; s < spans; ++s) total += bounds[2 * s + 1] * factors[s];
    float inverse = total == 0.f ? 0.f : 1.f / total;
    out += token * out_ld + (long long)head * width;
    for (int c = threadIdx.x; c < width; c += BLOCK) {
        float value = 0.f;
        for (int s = 0; s < spans; ++s) {
            if (bounds[2 * s + 1] != 0.f) value += sums[s * width + c] * factors[s];
        }
        put(out + c, value * inverse);
    }
}
