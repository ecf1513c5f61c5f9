// Attention with relative positions and kinds of tokens. Source: Yang et al. 2019, "XLNet", sections 2.3 and 2.5, with the
// scores of Dai et al. 2019, equation 5. Which place is which: Op::RelativeAttention in rust/graph/src/op.rs.
//
// Dimensions: B sequences, T queries, S keys of which the last U are the sequence's own tokens, H heads, D head width (at
// most 256).
//   q_k, q_r, q_s, out, dout, dq_k, dq_r, dq_s [B, T, H * D]; k, v, dk, dv [B, S, H * D]; r, dr [S + U, H * D];
//   kinds, dkinds [2, H * D]; at [B, T]; q_kinds [B, U]; k_kinds [B, S]; hidden [B, U, U] or null; rng [4] or null;
//   largest, inverse, delta [B, H, T]; by_kind [2, B, H, T]. A stride (`k_ld`) is from row to row.
// Launch, block = 128 throughout:
//   relative_attention_forward_f32, relative_attention_dq_backward_f32    grid = (T, H, B): a block has a query.
//   relative_attention_dkv_backward_f32                                   grid = (S, H, B): a block has a key.
//   relative_attention_dr_backward_f32                                    grid = (S + U, H): a block has a distance.
//   relative_attention_dkinds_backward_f32                                grid = (2, H): a block has a kind.
// The gradient begins with dq, which leaves what the others read: largest, inverse, delta, by_kind.
// Shared memory: static, up to 1 KB.
//
// A query at p = at[b, i] meets key j with the score scale * (q_k . k[j] + q_r . r[U - p + j] + q_s . kinds[other kind]).
// Queries that stand nowhere (-1) give zeros. Probability (b, h, i, j) draws number ((b * H + h) * T + i) * S + j of the
// dropout site.
//
// A thread computes the score of one pair, because the position's part has another row for each pair; then the threads
// share the columns of the head and add up the tile's rows in order.

#define THREADS 128
#define WARPS (THREADS / WARP)
#define MAX_WIDTH 256
#define PARTS (MAX_WIDTH / THREADS)
// The score of a hidden key: 0 beside any other, all alike where all are hidden.
#define HIDDEN -1e30f

// a . b over `width` columns.
__device__ __forceinline__ float dot(const float* a, const float* b, int width) {
    float sum = 0.f;
    for (int c = 0; c < width; c += 4) {
        float4 x = load4(a + c, width - c), y = load4(b + c, width - c);
        sum += (x.x * y.x + x.y * y.y) + (x.z * y.z + x.w * y.w);
    }
    return sum;
}

// The columns of one head.
struct Part {
    const float* x;
    int ld;

    __device__ __forceinline__ const float* row(long long r) const { return x + r * ld; }
};

struct Relative {
    Part q_k, q_r, q_s, k, r, kinds;
    const int *at, *q_kinds, *k_kinds, *hidden;
    int tokens, keys, places, width, sees_itself;
    float scale;

    // Where query i of sequence b stands; negative: nowhere.
    __device__ __forceinline__ int place(int b, int i) const {
        int p = at[b * tokens + i];
        return p < places ? p : -1;
    }

    __device__ __forceinline__ int kind(int b, int p, int j) const {
        return q_kinds[b * places + p] != k_kinds[b * keys + j];
    }

    __device__ __forceinline__ float score(int b, int i, int p, int j) const {
        int own = j - (keys - places);  // negative: remembered
        bool itself = sees_itself && own == p;
        if (hidden && own >= 0 && !itself && hidden[((long long)b * places + p) * places + own]) return HIDDEN;
        long long query = (long long)b * tokens + i;
        float content = dot(q_k.row(query), k.row((long long)b * keys + j), width);
        float position = dot(q_r.row(query), r.row(places - p + j), width);
        return scale * (content + position + dot(q_s.row(query), kinds.row(kind(b, p, j)), width));
    }
};

// Columns threadIdx.x, threadIdx.x + THREADS, .. of a row that the block adds up.
struct Columns {
    float sum[PARTS];

    __device__ __forceinline__ void scale(float factor) {
#pragma unroll
        for (int part = 0; part < PARTS; ++part) sum[part] *= factor;
    }

    __device__ __forceinline__ void add(float factor, const float* row, int width) {
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            int c = part * THREADS + threadIdx.x;
            if (c < width) sum[part] += factor * row[c];
        }
    }

    __device__ __forceinline__ void store(float* row, int width) const {
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            int c = part * THREADS + threadIdx.x;
            if (c < width) row[c] = sum[part];
        }
    }
};

// ---- Forward -------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS)
relative_attention_forward_f32(const float* __restrict__ q_k, const float* __restrict__ q_r, const float* __restrict__ q_s,
                               const float* __restrict__ k, const float* __restrict__ v, const float* __restrict__ r,
                               const float* __restrict__ kinds, const int* __restrict__ at, const int* __restrict__ q_kinds,
                               const int* __restrict__ k_kinds, const int* __restrict__ hidden, const int* __restrict__ rng,
                               float* __restrict__ out, int tokens, int keys, int places, int width, int q_k_ld, int q_r_ld,
                               int q_s_ld, int k_ld, int v_ld, int r_ld, int kinds_ld, int out_ld, int sees_itself,
                               float scale, unsigned stream, float dropout_p, float dropout_scale) {
    __shared__ float weights[THREADS];
    int i = blockIdx.x, head = blockIdx.y, b = blockIdx.z, col = head * width;
    Relative x = {{q_k + col, q_k_ld}, {q_r + col, q_r_ld}, {q_s + col, q_s_ld}, {k + col, k_ld}, {r + col, r_ld},
                  {kinds + col, kinds_ld}, at, q_kinds, k_kinds, hidden, tokens, keys, places, width, sees_itself, scale};
    Keep keep;
    if (rng) keep = keep_rule(rng, stream, dropout_p, dropout_scale);
    unsigned long long first = (((unsigned long long)b * gridDim.y + head) * tokens + i) * keys;
    int p = x.place(b, i);
    Columns sum = {};
    float largest = -INFINITY, total = 0.f;
    for (int key0 = 0; p >= 0 && key0 < keys; key0 += THREADS) {
        int j = key0 + threadIdx.x;
        float s = j < keys ? x.score(b, i, p, j) : -INFINITY;
        float above = fmaxf(largest, block_max<WARPS>(s)), correction = expf(largest - above);
        float weight = expf(s - above);
        total = total * correction + block_sum<WARPS>(weight);
        largest = above;
        weights[threadIdx.x] = j < keys ? weight * keep1(keep, rng, first + j) : 0.f;
        sum.scale(correction);
        __syncthreads();
        int count = min(THREADS, keys - key0);
        for (int n = 0; n < count; ++n) {
            sum.add(weights[n], v + ((long long)b * keys + key0 + n) * v_ld + col, width);
        }
        // The next round's maximum waits for all before anyone writes the weights again.
    }
    sum.scale(p < 0 ? 0.f : 1.f / total);
    sum.store(out + ((long long)b * tokens + i) * out_ld + col, width);
}

// ---- Backward ------------------------------------------------------------------------------------------------------

// What the softmax of each query came to, and the gradient of its row of scores.
struct Rows {
    const float *largest, *inverse, *delta;  // [B, H, T]

    // The probability of a score in row n.
    __device__ __forceinline__ float p(long long n, float score) const { return expf(score - largest[n]) * inverse[n]; }
};

// dq_k, dq_r, dq_s; largest, inverse (1 / sum of exp(score - largest)), delta (sum of p * dp), and by_kind: the sums of the
// scores' gradients over the keys of the query's kind and of the other.
extern "C" __global__ void __launch_bounds__(THREADS)
relative_attention_dq_backward_f32(const float* __restrict__ dout, const float* __restrict__ q_k, const float* __restrict__ q_r,
                                   const float* __restrict__ q_s, const float* __restrict__ k, const float* __restrict__ v,
                                   const float* __restrict__ r, const float* __restrict__ kinds, const int* __restrict__ at,
                                   const int* __restrict__ q_kinds, const int* __restrict__ k_kinds,
                                   const int* __restrict__ hidden, const int* __restrict__ rng, float* __restrict__ dq_k,
                                   float* __restrict__ dq_r, float* __restrict__ dq_s, float* __restrict__ largest,
                                   float* __restrict__ inverse, float* __restrict__ delta, float* __restrict__ by_kind,
                                   int tokens, int keys, int places, int width, int dout_ld, int q_k_ld, int q_r_ld,
                                   int q_s_ld, int k_ld, int v_ld, int r_ld, int kinds_ld, int dq_k_ld, int dq_r_ld,
                                   int dq_s_ld, int sees_itself, float scale, unsigned stream, float dropout_p,
                                   float dropout_scale) {
    __shared__ float weights[THREADS];
    int i = blockIdx.x, head = blockIdx.y, b = blockIdx.z, col = head * width;
    Relative x = {{q_k + col, q_k_ld}, {q_r + col, q_r_ld}, {q_s + col, q_s_ld}, {k + col, k_ld}, {r + col, r_ld},
                  {kinds + col, kinds_ld}, at, q_kinds, k_kinds, hidden, tokens, keys, places, width, sees_itself, scale};
    Keep keep;
    if (rng) keep = keep_rule(rng, stream, dropout_p, dropout_scale);
    long long query = (long long)b * tokens + i, row = ((long long)b * gridDim.y + head) * tokens + i;
    const float* dto = dout + query * dout_ld + col;
    int p = x.place(b, i);

    // p * dp is summed along with the softmax's denominator.
    float above = -INFINITY, total = 0.f, along = 0.f;
    for (int key0 = 0; p >= 0 && key0 < keys; key0 += THREADS) {
        int j = key0 + threadIdx.x;
        bool inside = j < keys;
        float s = inside ? x.score(b, i, p, j) : -INFINITY;
        float dp = inside ? dot(dto, v + ((long long)b * keys + j) * v_ld + col, width) * keep1(keep, rng, row * keys + j) : 0.f;
        float next = fmaxf(above, block_max<WARPS>(s)), correction = expf(above - next), weight = expf(s - next);
        total = total * correction + block_sum<WARPS>(weight);
        along = along * correction + block_sum<WARPS>(weight * dp);
        above = next;
    }
    float share = p < 0 ? 0.f : 1.f / total;
    along *= share;

    Columns to_k = {}, to_r = {};
    float same = 0.f, other = 0.f;
    for (int key0 = 0; p >= 0 && key0 < keys; key0 += THREADS) {
        int j = key0 + threadIdx.x;
        float ds = 0.f;
        if (j < keys) {
            float dp = dot(dto, v + ((long long)b * keys + j) * v_ld + col, width) * keep1(keep, rng, row * keys + j);
            ds = scale * expf(x.score(b, i, p, j) - above) * share * (dp - along);
            if (x.kind(b, p, j)) other += ds;
            else same += ds;
        }
        weights[threadIdx.x] = ds;
        __syncthreads();
        int count = min(THREADS, keys - key0);
        for (int n = 0; n < count; ++n) {
            to_k.add(weights[n], x.k.row((long long)b * keys + key0 + n), width);
            to_r.add(weights[n], x.r.row(places - p + key0 + n), width);
        }
        __syncthreads();  // the weights are used up
    }
    same = block_sum<WARPS>(same);
    other = block_sum<WARPS>(other);
    Columns to_s = {};
    to_s.add(same, x.kinds.row(0), width);
    to_s.add(other, x.kinds.row(1), width);
    to_k.store(dq_k + query * dq_k_ld + col, width);
    to_r.store(dq_r + query * dq_r_ld + col, width);
    to_s.store(dq_s + query * dq_s_ld + col, width);
    if (threadIdx.x == 0) {
        largest[row] = p < 0 ? 0.f : above;
        inverse[row] = share;
        delta[row] = along;
        by_kind[row] = same;
        by_kind[(long long)gridDim.z * gridDim.y * tokens + row] = other;
    }
}

// dk, dv.
extern "C" __global__ void __launch_bounds__(THREADS)
relative_attention_dkv_backward_f32(const float* __restrict__ dout, const float* __restrict__ q_k, const float* __restrict__ q_r,
                                    const float* __restrict__ q_s, const float* __restrict__ k, const float* __restrict__ v,
                                    const float* __restrict__ r, const float* __restrict__ kinds, const int* __restrict__ at,
                                    const int* __restrict__ q_kinds, const int* __restrict__ k_kinds,
                                    const int* __restrict__ hidden, const int* __restrict__ rng,
                                    const float* __restrict__ largest, const float* __restrict__ inverse,
                                    const float* __restrict__ delta, float* __restrict__ dk, float* __restrict__ dv,
                                    int tokens, int keys, int places, int width, int dout_ld, int q_k_ld, int q_r_ld,
                                    int q_s_ld, int k_ld, int v_ld, int r_ld, int kinds_ld, int dk_ld, int dv_ld,
                                    int sees_itself, float scale, unsigned stream, float dropout_p, float dropout_scale) {
    __shared__ float probabilities[THREADS], slopes[THREADS];
    int j = blockIdx.x, head = blockIdx.y, b = blockIdx.z, col = head * width;
    Relative x = {{q_k + col, q_k_ld}, {q_r + col, q_r_ld}, {q_s + col, q_s_ld}, {k + col, k_ld}, {r + col, r_ld},
                  {kinds + col, kinds_ld}, at, q_kinds, k_kinds, hidden, tokens, keys, places, width, sees_itself, scale};
    Rows rows = {largest, inverse, delta};
    Keep keep;
    if (rng) keep = keep_rule(rng, stream, dropout_p, dropout_scale);
    long long key = (long long)b * keys + j;
    Columns to_k = {}, to_v = {};
    for (int query0 = 0; query0 < tokens; query0 += THREADS) {
        int i = query0 + threadIdx.x, p = i < tokens ? x.place(b, i) : -1;
        float weight = 0.f, ds = 0.f;
        if (p >= 0) {
            long long row = ((long long)b * gridDim.y + head) * tokens + i;
            float factor = keep1(keep, rng, row * keys + j);
            weight = rows.p(row, x.score(b, i, p, j));
            float dp = dot(dout + ((long long)b * tokens + i) * dout_ld + col, v + key * v_ld + col, width) * factor;
            ds = scale * weight * (dp - rows.delta[row]);
            weight *= factor;
        }
        probabilities[threadIdx.x] = weight;
        slopes[threadIdx.x] = ds;
        __syncthreads();
        int count = min(THREADS, tokens - query0);
        for (int n = 0; n < count; ++n) {
            long long query = (long long)b * tokens + query0 + n;
            to_k.add(slopes[n], x.q_k.row(query), width);
            to_v.add(probabilities[n], dout + query * dout_ld + col, width);
        }
        __syncthreads();  // both are used up
    }
    to_k.store(dk + key * dk_ld + col, width);
    to_v.store(dv + key * dv_ld + col, width);
}

// dr: row U - p + j is met by each query at most once.
extern "C" __global__ void __launch_bounds__(THREADS)
relative_attention_dr_backward_f32(const float* __restrict__ dout, const float* __restrict__ q_k, const float* __restrict__ q_r,
                                   const float* __restrict__ q_s, const float* __restrict__ k, const float* __restrict__ v,
                                   const float* __restrict__ r, const float* __restrict__ kinds, const int* __restrict__ at,
                                   const int* __restrict__ q_kinds, const int* __restrict__ k_kinds,
                                   const int* __restrict__ hidden, const int* __restrict__ rng,
                                   const float* __restrict__ largest, const float* __restrict__ inverse,
                                   const float* __restrict__ delta, float* __restrict__ dr, int batch, int tokens, int keys,
                                   int places, int width, int dout_ld, int q_k_ld, int q_r_ld, int q_s_ld, int k_ld, int v_ld,
                                   int r_ld, int kinds_ld, int dr_ld, int sees_itself, float scale, unsigned stream,
                                   float dropout_p, float dropout_scale) {
    __shared__ float slopes[THREADS];
    int distance = blockIdx.x, head = blockIdx.y, col = head * width;
    Relative x = {{q_k + col, q_k_ld}, {q_r + col, q_r_ld}, {q_s + col, q_s_ld}, {k + col, k_ld}, {r + col, r_ld},
                  {kinds + col, kinds_ld}, at, q_kinds, k_kinds, hidden, tokens, keys, places, width, sees_itself, scale};
    Rows rows = {largest, inverse, delta};
    Keep keep;
    if (rng) keep = keep_rule(rng, stream, dropout_p, dropout_scale);
    Columns to_r = {};
    for (int query0 = 0; query0 < batch * tokens; query0 += THREADS) {
        int query = query0 + threadIdx.x, b = query / tokens, i = query % tokens;
        int p = b < batch ? x.place(b, i) : -1, j = distance - places + p;
        float ds = 0.f;
        if (p >= 0 && j >= 0 && j < keys) {
            long long row = ((long long)b * gridDim.y + head) * tokens + i;
            const float* value = v + ((long long)b * keys + j) * v_ld + col;
            float dp = dot(dout + (long long)query * dout_ld + col, value, width) * keep1(keep, rng, row * keys + j);
            ds = scale * rows.p(row, x.score(b, i, p, j)) * (dp - rows.delta[row]);
        }
        slopes[threadIdx.x] = ds;
        __syncthreads();
        int count = min(THREADS, batch * tokens - query0);
        for (int n = 0; n < count; ++n) to_r.add(slopes[n], x.q_r.row(query0 + n), width);
        __syncthreads();  // the slopes are used up
    }
    to_r.store(dr + (long long)distance * dr_ld + col, width);
}

// dkinds, from dq's sums.
extern "C" __global__ void __launch_bounds__(THREADS)
relative_attention_dkinds_backward_f32(const float* __restrict__ by_kind, const float* __restrict__ q_s,
                                       float* __restrict__ dkinds, int batch, int tokens, int width, int q_s_ld,
                                       int dkinds_ld) {
    int kind = blockIdx.x, head = blockIdx.y, heads = gridDim.y, col = head * width;
    by_kind += (long long)kind * batch * heads * tokens;
    Columns to = {};
    for (int query = 0; query < batch * tokens; ++query) {
        int b = query / tokens, i = query % tokens;
        to.add(by_kind[((long long)b * heads + head) * tokens + i], q_s + (long long)query * q_s_ld + col, width);
    }
    to.store(dkinds + (long long)kind * dkinds_ld + col, width);
}
