// Attention in tiles: scores exist for 64 queries against 64 keys at a time, in registers and shared memory.
// Source: Dao et al. 2022, "FlashAttention", algorithm 1 (forward, online softmax) and algorithm 4 with appendix B.2
// (backward, probabilities recomputed from lse). Differs: the backward pass is one launch for dq and one for dk and dv,
// so that no sum crosses blocks and nothing is atomic.
//
// Dimensions: B sequences, T tokens, H query heads, K key-value heads (H a multiple), D head width (any).
//   q, out, dout, dq [B, T, H * D]; k, v, dk, dv [B, T, K * D]; lse, delta [B, H, T]; segments [B, T]; rng [4].
//   A stride (`q_ld`) is from token to token.
// Launch, with tiles = ceil(T / 64) and slices = ceil(D / 128):
//   attention_forward_f32, attention_dq_backward_f32      block = 256, grid = (tiles, H, B * slices).
//   attention_dkv_backward_f32                            block = 256, grid = (tiles, K, B * slices).
//   attention_delta_backward_f32                          block = 128, grid = ceil(B * T * H / 4).
// The gradient takes three launches: delta, then dq and dkv in any order.
// Shared memory: static, 34.8 KB.
//
// Which keys a query sees: key j of query i if j <= i (causal only) or j < prefix[b], |i - j| < window (pass 2^31 - 1 for
// none), and, with segments, if segments[j] is not 0 (padding) and is segments[i], or segments[i] is 0. A query that sees
// nothing, which only padding can be, averages all T values: its probabilities are 1 / T, its lse is -inf.
// The optional key_bias [B, H, T] is added to the scaled scores of each key; segments, prefix [B] are optional too.
// Probability (b, h, i, j) draws number ((b * H + h) * T + i) * T + j of the dropout site; rng is null without dropout.
//
//
// How a block computes: tiles.cuh.

typedef Factors<32> Shared;

// ---- Forward -------------------------------------------------------------------------------------------------------

// out = softmax(scale * q . k) * v, lse = log of the softmax's denominator.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
attention_forward_f32(const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,
                      const int* __restrict__ segments, const float* __restrict__ key_bias,
                      const int* __restrict__ prefix, const int* __restrict__ rng, float* __restrict__ out,
                      float* __restrict__ lse, int batch, int tokens, int heads, int kv_heads, int width, int q_ld, int k_ld,
                      int v_ld, int out_ld, int causal, int window, float scale, unsigned stream, float dropout_p,
                      float dropout_scale) {
    __shared__ Shared shared;
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    // The last queries see the most keys: begin with them.
    int query0 = (gridDim.x - 1 - blockIdx.x) * TILE;
    int head = blockIdx.y, kv_head = head / (heads / kv_heads);
    int b = blockIdx.z % batch, column = blockIdx.z / batch * SLICE;
    Rows<float> qs = head_rows(q, q_ld, b, head, tokens, width);
    Rows<float> ks = head_rows(k, k_ld, b, kv_head, tokens, width);
    Rows<float> vs = head_rows(v, v_ld, b, kv_head, tokens, width);
    Mask mask = {segments ? segments + (long long)b * tokens : nullptr, tokens, causal, window, prefix ? prefix[b] : 0};
    long long row0 = ((long long)b * heads + head) * tokens + query0 + 4 * ty;
    Keep keep;
    if (rng) keep = keep_rule(rng, stream, dropout_p, dropout_scale);

    float sum[PARTS][4][4], largest[4], denominator[4];
    clear(sum);
#pragma unroll
    for (int i = 0; i < 4; ++i) largest[i] = -INFINITY, denominator[i] = 0.f;

    int end = mask.end_key(query0 + TILE);
    for (int key0 = mask.first_key(query0); key0 < end; key0 += TILE) {
        float p[4][4];
        dot_tiles(p, shared, qs, query0, ks, key0, ty, tx);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                int key = key0 + 4 * tx + j;
                bool seen = mask.sees(query0 + 4 * ty + i, key);
                float bias = seen && key_bias ? key_bias[((long long)b * heads + head) * tokens + key] : 0.f;
                p[i][j] = seen ? p[i][j] * scale + bias : -INFINITY;
            }
            take_scores(p, sum, largest, denominator, i);
            if (rng) {
                float4 factor = keep4(keep, (row0 + i) * tokens + key0 + 4 * tx);
                p[i][0] *= factor.x, p[i][1] *= factor.y, p[i][2] *= factor.z, p[i][3] *= factor.w;
            }
        }
        store_weights(shared, p, ty, tx);
        add_weighted(sum, shared, vs, key0, column, ty, tx);
    }

    bool blind = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) blind |= query0 + 4 * ty + i < tokens && largest[i] == -INFINITY;
    if (segments && __syncthreads_or(blind)) {
        for (int key0 = 0; key0 < tokens; key0 += TILE) {
            float p[4][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float4 factor = make_float4(1.f, 1.f, 1.f, 1.f);
                if (rng) factor = keep4(keep, (row0 + i) * tokens + key0 + 4 * tx);
                float factors[4] = {factor.x, factor.y, factor.z, factor.w};
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    p[i][j] = factors[j] * mask.blind_weight(largest[i] == -INFINITY, key0 + 4 * tx + j);
                }
            }
            __syncthreads();  // the last weights are used up
            store_weights(shared, p, ty, tx);
            add_weighted(sum, shared, vs, key0, column, ty, tx);
        }
    }

    float factor[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        bool empty = largest[i] == -INFINITY;
        factor[i] = empty ? 1.f : 1.f / denominator[i];
        if (tx == 0 && column == 0 && query0 + 4 * ty + i < tokens) {
            lse[row0 + i] = empty ? -INFINITY : largest[i] + logf(denominator[i]);
        }
    }
    float* to = out + (long long)b * tokens * out_ld + (long long)head * width;
    store_sum(to, out_ld, tokens, width, query0, column, sum, factor, ty, tx);
}

// ---- Backward ------------------------------------------------------------------------------------------------------

// p and dp of a tile -> (p * keep) and the score gradient p * (dp * keep - delta) * scale, in place; zeros for a query that
// sees nothing, whose probabilities depend on no score.
__device__ __forceinline__ void score_gradient(float& p, float& dp, bool seen, float bias, float lse, float delta,
                                               float factor, float scale) {
    p = seen && lse != -INFINITY ? expf(p * scale + bias - lse) : 0.f;
    dp = p * (dp * factor - delta) * scale;
    p *= factor;
}

// delta[b, h, i] = dout[b, i, h] . out[b, i, h], which is the sum over j of p[i, j] * dp[i, j].
extern "C" __global__ void __launch_bounds__(4 * WARP)
attention_delta_backward_f32(const float* __restrict__ dout, const float* __restrict__ out, float* __restrict__ delta,
                             int batch, int tokens, int heads, int width, int dout_ld, int out_ld) {
    int i = blockIdx.x * 4 + threadIdx.x / WARP;
    int lane = threadIdx.x % WARP;
    if (i >= batch * tokens * heads) return;
    int row = i / heads, head = i % heads;
    const float* x = dout + (long long)row * dout_ld + (long long)head * width;
    const float* y = out + (long long)row * out_ld + (long long)head * width;
    float sum = 0.f;
    for (int c = lane; c < width; c += WARP) sum += x[c] * y[c];
    sum = warp_sum(sum);
    if (lane == 0) delta[((long long)(row / tokens) * heads + head) * tokens + row % tokens] = sum;
}

// dq = sum over j of ds[i, j] * k[j].
extern "C" __global__ void __launch_bounds__(THREADS, 2)
attention_dq_backward_f32(const float* __restrict__ dout, const float* __restrict__ q, const float* __restrict__ k,
                          const float* __restrict__ v, const float* __restrict__ lse, const float* __restrict__ delta,
                          const int* __restrict__ segments, const float* __restrict__ key_bias,
                      const int* __restrict__ prefix, const int* __restrict__ rng, float* __restrict__ dq, int batch,
                          int tokens, int heads, int kv_heads, int width, int dout_ld, int q_ld, int k_ld, int v_ld,
                          int dq_ld, int causal, int window, float scale, unsigned stream, float dropout_p,
                          float dropout_scale) {
    __shared__ Shared shared;
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    int query0 = (gridDim.x - 1 - blockIdx.x) * TILE;
    int head = blockIdx.y, kv_head = head / (heads / kv_heads);
    int b = blockIdx.z % batch, column = blockIdx.z / batch * SLICE;
    Rows<float> qs = head_rows(q, q_ld, b, head, tokens, width);
    Rows<float> douts = head_rows(dout, dout_ld, b, head, tokens, width);
    Rows<float> ks = head_rows(k, k_ld, b, kv_head, tokens, width);
    Rows<float> vs = head_rows(v, v_ld, b, kv_head, tokens, width);
    Mask mask = {segments ? segments + (long long)b * tokens : nullptr, tokens, causal, window, prefix ? prefix[b] : 0};
    long long row0 = ((long long)b * heads + head) * tokens + query0 + 4 * ty;
    Keep keep;
    if (rng) keep = keep_rule(rng, stream, dropout_p, dropout_scale);

    float sum[PARTS][4][4];
    clear(sum);

    int end = mask.end_key(query0 + TILE);
    for (int key0 = mask.first_key(query0); key0 < end; key0 += TILE) {
        float p[4][4], ds[4][4];
        dot_tiles(p, shared, qs, query0, ks, key0, ty, tx);
        dot_tiles(ds, shared, douts, query0, vs, key0, ty, tx);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // Read in every tile: kept in registers they would make others spill.
            bool inside = query0 + 4 * ty + i < tokens;
            float row_lse = inside ? lse[row0 + i] : 0.f, row_delta = inside ? delta[row0 + i] : 0.f;
            float4 factor = make_float4(1.f, 1.f, 1.f, 1.f);
            if (rng) factor = keep4(keep, (row0 + i) * tokens + key0 + 4 * tx);
            float factors[4] = {factor.x, factor.y, factor.z, factor.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                int key = key0 + 4 * tx + j;
                bool seen = mask.sees(query0 + 4 * ty + i, key);
                float bias = seen && key_bias ? key_bias[((long long)b * heads + head) * tokens + key] : 0.f;
                score_gradient(p[i][j], ds[i][j], seen, bias, row_lse, row_delta, factors[j], scale);
            }
        }
        store_weights(shared, ds, ty, tx);
        add_weighted(sum, shared, ks, key0, column, ty, tx);
    }
    float ones[4] = {1.f, 1.f, 1.f, 1.f};
    float* to = dq + (long long)b * tokens * dq_ld + (long long)head * width;
    store_sum(to, dq_ld, tokens, width, query0, column, sum, ones, ty, tx);
}

// dk = sum over i of ds[i, j] * q[i], dv = sum over i of p[i, j] * keep[i, j] * dout[i], over all query heads of a
// key-value head. Rows of a tile are keys here, columns queries.
extern "C" __global__ void __launch_bounds__(THREADS)
attention_dkv_backward_f32(const float* __restrict__ dout, const float* __restrict__ q, const float* __restrict__ k,
                           const float* __restrict__ v, const float* __restrict__ lse, const float* __restrict__ delta,
                           const int* __restrict__ segments, const float* __restrict__ key_bias,
                      const int* __restrict__ prefix, const int* __restrict__ rng, float* __restrict__ dk,
                           float* __restrict__ dv, int batch, int tokens, int heads, int kv_heads, int width, int dout_ld,
                           int q_ld, int k_ld, int v_ld, int dk_ld, int dv_ld, int causal, int window, float scale,
                           unsigned stream, float dropout_p, float dropout_scale) {
    __shared__ Shared shared;
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    int key0 = blockIdx.x * TILE;
    int kv_head = blockIdx.y, group = heads / kv_heads;
    int b = blockIdx.z % batch, column = blockIdx.z / batch * SLICE;
    Rows<float> ks = head_rows(k, k_ld, b, kv_head, tokens, width);
    Rows<float> vs = head_rows(v, v_ld, b, kv_head, tokens, width);
    Mask mask = {segments ? segments + (long long)b * tokens : nullptr, tokens, causal, window, prefix ? prefix[b] : 0};
    Keep keep;
    if (rng) keep = keep_rule(rng, stream, dropout_p, dropout_scale);

    float dks[PARTS][4][4], dvs[PARTS][4][4];
    clear(dks);
    clear(dvs);
    int end = mask.end_query(min(key0 + TILE, tokens));
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        Rows<float> qs = head_rows(q, q_ld, b, head, tokens, width);
        Rows<float> douts = head_rows(dout, dout_ld, b, head, tokens, width);
        long long head0 = ((long long)b * heads + head) * tokens;
        for (int query0 = mask.first_query(key0); query0 < end; query0 += TILE) {
            float p[4][4], ds[4][4];
            dot_tiles(p, shared, ks, key0, qs, query0, ty, tx);
            dot_tiles(ds, shared, vs, key0, douts, query0, ty, tx);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                int query = query0 + 4 * tx + j;
                bool inside = query < tokens;
                float row_lse = inside ? lse[head0 + query] : 0.f, row_delta = inside ? delta[head0 + query] : 0.f;
                float4 factor = make_float4(1.f, 1.f, 1.f, 1.f);
                if (rng) factor = keep4(keep, (head0 + query) * tokens + key0 + 4 * ty);
                float factors[4] = {factor.x, factor.y, factor.z, factor.w};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    int key = key0 + 4 * ty + i;
                    bool seen = mask.sees(query, key);
                    float bias = seen && key_bias ? key_bias[head0 + key] : 0.f;
                    score_gradient(p[i][j], ds[i][j], seen, bias, row_lse, row_delta, factors[i], scale);
                }
            }
            store_weights(shared, p, ty, tx);
            add_weighted(dvs, shared, douts, query0, column, ty, tx);
            __syncthreads();  // the probabilities are used up
            store_weights(shared, ds, ty, tx);
            add_weighted(dks, shared, qs, query0, column, ty, tx);
        }
    }
    // Queries that see nothing: every key has a share of them, wherever it lies.
    for (int head = kv_head * group; segments && head < (kv_head + 1) * group; ++head) {
        Rows<float> douts = head_rows(dout, dout_ld, b, head, tokens, width);
        long long head0 = ((long long)b * heads + head) * tokens;
        for (int query0 = 0; query0 < tokens; query0 += TILE) {
            bool blind[4], some = false;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                int query = query0 + 4 * tx + j;
                blind[j] = query < tokens && lse[head0 + query] == -INFINITY;
                some |= blind[j];
            }
            if (!__syncthreads_or(some)) continue;
            float p[4][4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float4 factor = make_float4(1.f, 1.f, 1.f, 1.f);
                if (rng) factor = keep4(keep, (head0 + query0 + 4 * tx + j) * tokens + key0 + 4 * ty);
                float factors[4] = {factor.x, factor.y, factor.z, factor.w};
#pragma unroll
                for (int i = 0; i < 4; ++i) p[i][j] = factors[i] * mask.blind_weight(blind[j], key0 + 4 * ty + i);
            }
            store_weights(shared, p, ty, tx);
            add_weighted(dvs, shared, douts, query0, column, ty, tx);
        }
    }
    float ones[4] = {1.f, 1.f, 1.f, 1.f};
    store_sum(dk + (long long)b * tokens * dk_ld + (long long)kv_head * width, dk_ld, tokens, width, key0, column, dks, ones, ty, tx);
    store_sum(dv + (long long)b * tokens * dv_ld + (long long)kv_head * width, dv_ld, tokens, width, key0, column, dvs, ones, ty, tx);
}

