// Attention with relative positions and kinds of tokens, in tiles. Source: Yang et al. 2019, "XLNet", sections 2.3 and 2.5,
// with the scores of Dai et al. 2019, equation 5. Which place is which: Op::RelativeAttention in rust/graph/src/op.rs.
//
// Dimensions: B sequences, T queries, S keys of which the last U are the sequence's own tokens, H heads, D head width (any).
//   q_k, q_r, q_s, out, dout, dq_k, dq_r, dq_s [B, T, H * D]; k, v, dk, dv [B, S, H * D]; r, dr [S + U, H * D];
//   kinds, dkinds [2, H * D]; at [B, T]; q_kinds [B, U]; k_kinds [B, S]; hidden [B, U, U] or null; rng [4] or null;
//   largest, inverse, delta [B, H, T]; by_kind [2, B, H, T]. A stride (`k_ld`) is from row to row.
// Launch, with tiles(n) = ceil(n / 64) and slices = ceil(D / 128):
//   relative_attention_forward_f32, relative_attention_dq_backward_f32    block = 256, grid = (tiles(T) * slices, H, B).
//   relative_attention_dkv_backward_f32                                   block = 256, grid = (tiles(S) * slices, H, B).
//   relative_attention_dr_backward_f32                                    block = 256, grid = (tiles(S + U) * slices, H).
//   relative_attention_dkinds_backward_f32                                block = (32, 8), grid = (ceil(D / 32), 2, H).
// The gradient begins with dq, which leaves what the others read: largest, inverse, delta, by_kind.
// Shared memory: static, 44.6 KB.
//
// A query at p = at[b, i] meets key j with the score scale * (q_k . k[j] + q_r . r[U - p + j] + q_s . kinds[other kind]).
// Queries that stand nowhere (-1) give zeros. Probability (b, h, i, j) draws number ((b * H + h) * T + i) * S + j of the
// dropout site.
//
// The position's part has another row of r for each pair, but few rows for a tile: queries that stand from `low` to `high`
// meet 64 keys at 64 + high - low distances. Products of queries and distances, 64 at a time, are put where their pairs
// are; queries in the order of their places make that two products a tile.

// The score of a hidden key: 0 beside any other, all alike where all are hidden.
#define HIDDEN -1e30f

struct __align__(16) Shared : Factors<16> {
    float scores[TILE][PITCH];  // the position's part: of a query and a key, or a query and a distance
    float by_kind[2][TILE];     // the kind's part of each query's scores
    int places[TILE];           // where the queries stand; negative: nowhere
    int kinds[TILE];            // of the tokens there
    int low, high;              // the least and the greatest of them that is somewhere
};

struct Four {
    int x[4];
};

// p[0..4], of which n exist; the others are 0.
__device__ __forceinline__ Four load_four(const int* p, int n) {
    float4 bits = load4(reinterpret_cast<const float*>(p), n);
    return {__float_as_int(bits.x), __float_as_int(bits.y), __float_as_int(bits.z), __float_as_int(bits.w)};
}

struct Relative {
    Rows<float> q_k, q_r, q_s, k, r, kinds;
    const int *at, *q_kinds, *k_kinds, *hidden;  // of this sequence
    int places, sees_itself;
    float scale;

    __device__ __forceinline__ int tokens() const { return q_k.rows; }
    __device__ __forceinline__ int keys() const { return k.rows; }

    // Which of keys j .. j + 4 are hidden from a query that stands at p.
    __device__ __forceinline__ Four hides(int p, int j) const {
        Four found = {0, 0, 0, 0};
        int own = j - (keys() - places);  // negative: remembered
        if (!hidden || p < 0 || own <= -4) return found;
        const int* row = hidden + (long long)p * places;
        if (own >= 0) found = load_four(row + own, places - own);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            if (own < 0 && own + n >= 0 && own + n < places) found.x[n] = row[own + n];
            if (sees_itself && own + n == p) found.x[n] = 0;
        }
        return found;
    }

    // The kinds of keys j .. j + 4.
    __device__ __forceinline__ Four kinds_of(int j) const { return load_four(k_kinds + j, keys() - j); }

    // The score of query i of the tile and a key of a kind, from the two products.
    __device__ __forceinline__ float score(const Shared& shared, int i, int hides, int kind, float content, float position) const {
        return hides ? HIDDEN : scale * (content + position + shared.by_kind[shared.kinds[i] != kind][i]);
    }
};

__device__ __forceinline__ Relative relative_of(
    const float* q_k, const float* q_r, const float* q_s, const float* k, const float* r, const float* kinds, const int* at,
    const int* q_kinds, const int* k_kinds, const int* hidden, int b, int head, int tokens, int keys, int places, int width,
    int q_k_ld, int q_r_ld, int q_s_ld, int k_ld, int r_ld, int kinds_ld, int sees_itself, float scale) {
    return {head_rows(q_k, q_k_ld, b, head, tokens, width), head_rows(q_r, q_r_ld, b, head, tokens, width),
            head_rows(q_s, q_s_ld, b, head, tokens, width), head_rows(k, k_ld, b, head, keys, width),
            head_rows(r, r_ld, 0, head, keys + places, width), head_rows(kinds, kinds_ld, 0, head, 2, width),
            at + (long long)b * tokens, q_kinds + (long long)b * places, k_kinds + (long long)b * keys,
            hidden ? hidden + (long long)b * places * places : nullptr, places, sees_itself, scale};
}

// Looks where the tile's queries stand, and what the kinds add to their scores; behind a barrier since the last look.
__device__ __forceinline__ void meet(Shared& shared, const Relative& x, int query0) {
    int i = threadIdx.x % TILE, kind = threadIdx.x / TILE, query = query0 + i;
    if (kind < 2) {
        int p = query < x.tokens() ? x.at[query] : -1;
        if (p >= x.places) p = -1;
        if (kind == 0) shared.places[i] = p, shared.kinds[i] = p < 0 ? 0 : x.q_kinds[p];
        float sum = 0.f;
        for (int c = 0; query < x.tokens() && c < x.q_s.width; c += 4) {
            float4 a = load4(x.q_s.x + (long long)query * x.q_s.ld + c, x.q_s.width - c);
            float4 b = load4(x.kinds.x + (long long)kind * x.kinds.ld + c, x.q_s.width - c);
            sum += (a.x * b.x + a.y * b.y) + (a.z * b.z + a.w * b.w);
        }
        shared.by_kind[kind][i] = sum;
    }
    __syncthreads();
    if (threadIdx.x < WARP) {
        int first = shared.places[threadIdx.x], second = shared.places[threadIdx.x + WARP];
        int least = x.places, greatest = max(first, second);
        if (first >= 0) least = first;
        if (second >= 0) least = min(least, second);
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) {
            least = min(least, (int)__shfl_xor_sync(ALL_LANES, least, step));
            greatest = max(greatest, (int)__shfl_xor_sync(ALL_LANES, greatest, step));
        }
        if (threadIdx.x == 0) shared.low = least, shared.high = greatest;
    }
    __syncthreads();
}

// The first of the distances at which the tile's queries meet the keys from `key0` on, and the end of them.
__device__ __forceinline__ int first_distance(const Shared& shared, const Relative& x, int key0) {
    return x.places - shared.high + key0;
}
__device__ __forceinline__ int end_distance(const Shared& shared, const Relative& x, int key0) {
    return min(x.places - shared.low + key0 + TILE, x.r.rows);
}

// scores[i][j] = q_r[i] . r[U - p + key0 + j], for queries that stand somewhere. They are there behind the next barrier.
__device__ __forceinline__ void position_scores(Shared& shared, const Relative& x, int query0, int key0, int ty, int tx) {
    int end = end_distance(shared, x, key0);
    for (int from = first_distance(shared, x, key0); from < end; from += TILE) {
        float product[4][4];
        dot_tiles(product, shared, x.q_r, query0, x.r, from, ty, tx);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int p = shared.places[4 * ty + i];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                int key = from + 4 * tx + j - x.places + p - key0;
                if (p >= 0 && key >= 0 && key < TILE) shared.scores[4 * ty + i][key] = product[i][j];
            }
        }
    }
}

__device__ __forceinline__ void clear_weights(Shared& shared) {
    __syncthreads();  // the last weights are used up
    for (int n = threadIdx.x; n < TILE * TILE; n += THREADS) shared.weights[n / TILE][n % TILE] = 0.f;
    __syncthreads();
}

// ---- Forward -------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS)
relative_attention_forward_f32(const float* __restrict__ q_k, const float* __restrict__ q_r, const float* __restrict__ q_s,
                               const float* __restrict__ k, const float* __restrict__ v, const float* __restrict__ r,
                               const float* __restrict__ kinds, const int* __restrict__ at, const int* __restrict__ q_kinds,
                               const int* __restrict__ k_kinds, const int* __restrict__ hidden, const int* __restrict__ rng,
                               float* __restrict__ out, int tokens, int keys, int places, int width, int q_k_ld, int q_r_ld,
                               int q_s_ld, int k_ld, int v_ld, int r_ld, int kinds_ld, int out_ld, int sees_itself,
                               float scale, unsigned stream, float dropout_p, float dropout_scale) {
    __shared__ Shared shared;
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16, tiles = (tokens + TILE - 1) / TILE;
    int query0 = blockIdx.x % tiles * TILE, column = blockIdx.x / tiles * SLICE, head = blockIdx.y, b = blockIdx.z;
    Relative x = relative_of(q_k, q_r, q_s, k, r, kinds, at, q_kinds, k_kinds, hidden, b, head, tokens, keys, places, width,
                             q_k_ld, q_r_ld, q_s_ld, k_ld, r_ld, kinds_ld, sees_itself, scale);
    Rows<float> vs = head_rows(v, v_ld, b, head, keys, width);
    Keep keep;
    if (rng) keep = keep_rule(rng, stream, dropout_p, dropout_scale);
    unsigned long long row0 = ((unsigned long long)b * gridDim.y + head) * tokens + query0 + 4 * ty;

    float sum[PARTS][4][4], largest[4], denominator[4];
    clear(sum);
#pragma unroll
    for (int i = 0; i < 4; ++i) largest[i] = -INFINITY, denominator[i] = 0.f;
    meet(shared, x, query0);
    int end = shared.high < 0 ? 0 : keys;
    for (int key0 = 0; key0 < end; key0 += TILE) {
        float p[4][4];
        position_scores(shared, x, query0, key0, ty, tx);
        dot_tiles(p, shared, x.q_k, query0, x.k, key0, ty, tx);
        Four kind = x.kinds_of(key0 + 4 * tx);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int query = 4 * ty + i, place = shared.places[query];
            Four hides = x.hides(place, key0 + 4 * tx);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                bool meets = place >= 0 && key0 + 4 * tx + j < keys;
                p[i][j] = meets ? x.score(shared, query, hides.x[j], kind.x[j], p[i][j], shared.scores[query][4 * tx + j]) : -INFINITY;
            }
            take_scores(p, sum, largest, denominator, i);
            if (rng) {
                float4 factor = keep4(keep, (row0 + i) * keys + key0 + 4 * tx);
                p[i][0] *= factor.x, p[i][1] *= factor.y, p[i][2] *= factor.z, p[i][3] *= factor.w;
            }
        }
        store_weights(shared, p, ty, tx);
        add_weighted(sum, shared, vs, key0, column, ty, tx);
    }
    float factor[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) factor[i] = largest[i] == -INFINITY ? 0.f : 1.f / denominator[i];
    float* to = out + (long long)b * tokens * out_ld + (long long)head * width;
    store_sum(to, out_ld, tokens, width, query0, column, sum, factor, ty, tx);
}

// ---- Backward ------------------------------------------------------------------------------------------------------

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
    __shared__ Shared shared;
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16, tiles = (tokens + TILE - 1) / TILE;
    int query0 = blockIdx.x % tiles * TILE, column = blockIdx.x / tiles * SLICE, head = blockIdx.y, b = blockIdx.z;
    Relative x = relative_of(q_k, q_r, q_s, k, r, kinds, at, q_kinds, k_kinds, hidden, b, head, tokens, keys, places, width,
                             q_k_ld, q_r_ld, q_s_ld, k_ld, r_ld, kinds_ld, sees_itself, scale);
    Rows<float> vs = head_rows(v, v_ld, b, head, keys, width), douts = head_rows(dout, dout_ld, b, head, tokens, width);
    Keep keep;
    if (rng) keep = keep_rule(rng, stream, dropout_p, dropout_scale);
    unsigned long long row0 = ((unsigned long long)b * gridDim.y + head) * tokens + query0 + 4 * ty;
    meet(shared, x, query0);
    int end = shared.high < 0 ? 0 : keys;

    // The first time the softmax and delta, the second time what follows from them.
    float above[4], total[4], along[4], same[4], other[4], to_k[PARTS][4][4], to_r[PARTS][4][4];
    clear(to_k);
    clear(to_r);
#pragma unroll
    for (int i = 0; i < 4; ++i) above[i] = -INFINITY, total[i] = along[i] = same[i] = other[i] = 0.f;
#pragma unroll 1
    for (int time = 0; time < 2; ++time) {
#pragma unroll 1
        for (int key0 = 0; key0 < end; key0 += TILE) {
            float p[4][4], dp[4][4];
            position_scores(shared, x, query0, key0, ty, tx);
            dot_tiles(p, shared, x.q_k, query0, x.k, key0, ty, tx);
            dot_tiles(dp, shared, douts, query0, vs, key0, ty, tx);
            Four kind = x.kinds_of(key0 + 4 * tx);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int query = 4 * ty + i, place = shared.places[query];
                Four hides = x.hides(place, key0 + 4 * tx);
                float4 factor = make_float4(1.f, 1.f, 1.f, 1.f);
                if (rng) factor = keep4(keep, (row0 + i) * keys + key0 + 4 * tx);
                float factors[4] = {factor.x, factor.y, factor.z, factor.w};
                float most = above[i];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    bool meets = place >= 0 && key0 + 4 * tx + j < keys;
                    p[i][j] = meets ? x.score(shared, query, hides.x[j], kind.x[j], p[i][j], shared.scores[query][4 * tx + j]) : -INFINITY;
                    dp[i][j] *= factors[j];
                    most = fmaxf(most, p[i][j]);
                }
                if (time == 0) {
                    most = row_max(most);
                    float shift = most == -INFINITY ? 0.f : most, correction = expf(above[i] - shift), some = 0.f, slope = 0.f;
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        float weight = expf(p[i][j] - shift);
                        some += weight;
                        slope += weight * dp[i][j];
                    }
                    total[i] = total[i] * correction + row_sum(some);
                    along[i] = along[i] * correction + row_sum(slope);
                    above[i] = most;
                } else {
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        bool meets = place >= 0 && key0 + 4 * tx + j < keys;
                        p[i][j] = meets ? scale * expf(p[i][j] - above[i]) * total[i] * (dp[i][j] - along[i]) : 0.f;
                        if (shared.kinds[query] != kind.x[j]) other[i] += p[i][j];
                        else same[i] += p[i][j];
                    }
                }
            }
            if (time == 0) continue;
            __syncthreads();  // the last weights are used up
            store_weights(shared, p, ty, tx);
            add_weighted(to_k, shared, x.k, key0, column, ty, tx);
            int last = end_distance(shared, x, key0);
            for (int from = first_distance(shared, x, key0); from < last; from += TILE) {
                clear_weights(shared);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    int place = shared.places[4 * ty + i];
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        int distance = places - place + key0 + 4 * tx + j - from;
                        if (place >= 0 && distance >= 0 && distance < TILE) shared.weights[distance][4 * ty + i] = p[i][j];
                    }
                }
                add_weighted(to_r, shared, x.r, from, column, ty, tx);
            }
        }
        // From sums to their shares.
#pragma unroll
        for (int i = 0; i < 4 && time == 0; ++i) {
            total[i] = above[i] == -INFINITY ? 0.f : 1.f / total[i];
            along[i] *= total[i];
        }
    }
    float ones[4] = {1.f, 1.f, 1.f, 1.f};
    long long base = (long long)b * tokens;
    store_sum(dq_k + base * dq_k_ld + (long long)head * width, dq_k_ld, tokens, width, query0, column, to_k, ones, ty, tx);
    store_sum(dq_r + base * dq_r_ld + (long long)head * width, dq_r_ld, tokens, width, query0, column, to_r, ones, ty, tx);
#pragma unroll
    for (int i = 0; i < 4; ++i) same[i] = row_sum(same[i]), other[i] = row_sum(other[i]);
    // dq_s = same * kinds[0] + other * kinds[1].
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        int c = column + part * TILE + 4 * tx;
        float4 one = load4(x.kinds.x + c, width - c), two = load4(x.kinds.x + x.kinds.ld + c, width - c);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            to_k[part][i][0] = same[i] * one.x + other[i] * two.x, to_k[part][i][1] = same[i] * one.y + other[i] * two.y;
            to_k[part][i][2] = same[i] * one.z + other[i] * two.z, to_k[part][i][3] = same[i] * one.w + other[i] * two.w;
        }
    }
    store_sum(dq_s + base * dq_s_ld + (long long)head * width, dq_s_ld, tokens, width, query0, column, to_k, ones, ty, tx);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (tx != 0 || column != 0 || query0 + 4 * ty + i >= tokens) continue;
        unsigned long long row = row0 + i;
        largest[row] = above[i] == -INFINITY ? 0.f : above[i];
        inverse[row] = total[i];
        delta[row] = along[i];
        by_kind[row] = same[i];
        by_kind[(unsigned long long)gridDim.z * gridDim.y * tokens + row] = other[i];
    }
}

// dk, dv. Rows of a tile are keys here, columns queries.
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
    __shared__ Shared shared;
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16, tiles = (keys + TILE - 1) / TILE;
    int key0 = blockIdx.x % tiles * TILE, column = blockIdx.x / tiles * SLICE, head = blockIdx.y, b = blockIdx.z;
    Relative x = relative_of(q_k, q_r, q_s, k, r, kinds, at, q_kinds, k_kinds, hidden, b, head, tokens, keys, places, width,
                             q_k_ld, q_r_ld, q_s_ld, k_ld, r_ld, kinds_ld, sees_itself, scale);
    Rows<float> vs = head_rows(v, v_ld, b, head, keys, width), douts = head_rows(dout, dout_ld, b, head, tokens, width);
    Keep keep;
    if (rng) keep = keep_rule(rng, stream, dropout_p, dropout_scale);
    unsigned long long head0 = ((unsigned long long)b * gridDim.y + head) * tokens;

    float dks[PARTS][4][4], dvs[PARTS][4][4];
    clear(dks);
    clear(dvs);
    for (int query0 = 0; query0 < tokens; query0 += TILE) {
        meet(shared, x, query0);
        if (shared.high < 0) continue;
        float p[4][4], ds[4][4];
        position_scores(shared, x, query0, key0, ty, tx);
        dot_tiles(p, shared, x.k, key0, x.q_k, query0, ty, tx);
        dot_tiles(ds, shared, vs, key0, douts, query0, ty, tx);
        Four kind = x.kinds_of(key0 + 4 * ty);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            int query = 4 * tx + j, place = shared.places[query];
            bool stands = place >= 0;
            Four hides = x.hides(place, key0 + 4 * ty);
            unsigned long long row = head0 + query0 + 4 * tx + j;
            float most = stands ? largest[row] : 0.f, share = stands ? inverse[row] : 0.f, along = stands ? delta[row] : 0.f;
            float4 factor = make_float4(1.f, 1.f, 1.f, 1.f);
            if (rng) factor = keep4(keep, row * keys + key0 + 4 * ty);
            float factors[4] = {factor.x, factor.y, factor.z, factor.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int key = key0 + 4 * ty + i;
                float weight = 0.f;
                if (stands && key < keys) {
                    float s = x.score(shared, query, hides.x[i], kind.x[i], p[i][j], shared.scores[query][4 * ty + i]);
                    weight = expf(s - most) * share;
                }
                ds[i][j] = scale * weight * (ds[i][j] * factors[i] - along);
                p[i][j] = weight * factors[i];
            }
        }
        __syncthreads();  // the last weights are used up
        store_weights(shared, p, ty, tx);
        add_weighted(dvs, shared, douts, query0, column, ty, tx);
        __syncthreads();  // the probabilities are used up
        store_weights(shared, ds, ty, tx);
        add_weighted(dks, shared, x.q_k, query0, column, ty, tx);
    }
    float ones[4] = {1.f, 1.f, 1.f, 1.f};
    long long base = (long long)b * keys;
    store_sum(dk + base * dk_ld + (long long)head * width, dk_ld, keys, width, key0, column, dks, ones, ty, tx);
    store_sum(dv + base * dv_ld + (long long)head * width, dv_ld, keys, width, key0, column, dvs, ones, ty, tx);
}

// dr: row U - p + j is met by each query at most once. Rows of the result are distances; keys are visited where the tile's
// queries meet them at these distances.
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
    __shared__ Shared shared;
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16, tiles = (keys + places + TILE - 1) / TILE;
    int from = blockIdx.x % tiles * TILE, column = blockIdx.x / tiles * SLICE, head = blockIdx.y;
    Keep keep;
    if (rng) keep = keep_rule(rng, stream, dropout_p, dropout_scale);
    float drs[PARTS][4][4];
    clear(drs);
    for (int b = 0; b < batch; ++b) {
        Relative x = relative_of(q_k, q_r, q_s, k, r, kinds, at, q_kinds, k_kinds, hidden, b, head, tokens, keys, places, width,
                                 q_k_ld, q_r_ld, q_s_ld, k_ld, r_ld, kinds_ld, sees_itself, scale);
        Rows<float> vs = head_rows(v, v_ld, b, head, keys, width), douts = head_rows(dout, dout_ld, b, head, tokens, width);
        unsigned long long head0 = ((unsigned long long)b * gridDim.y + head) * tokens;
        for (int query0 = 0; query0 < tokens; query0 += TILE) {
            meet(shared, x, query0);
            int first = max(from - places + shared.low, 0), end = min(from + TILE - places + shared.high, keys);
            if (shared.high < 0 || first >= end) continue;
            float p[4][4], dp[4][4];
            dot_tiles(p, shared, x.q_r, query0, x.r, from, ty, tx);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) shared.scores[4 * ty + i][4 * tx + j] = p[i][j];
            }
            clear_weights(shared);
            for (int key0 = first; key0 < end; key0 += TILE) {
                dot_tiles(p, shared, x.q_k, query0, x.k, key0, ty, tx);
                dot_tiles(dp, shared, douts, query0, vs, key0, ty, tx);
                Four kind = x.kinds_of(key0 + 4 * tx);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    int query = 4 * ty + i, place = shared.places[query];
                    Four hides = x.hides(place, key0 + 4 * tx);
                    unsigned long long row = head0 + query0 + 4 * ty + i;
                    float most = place >= 0 ? largest[row] : 0.f, share = place >= 0 ? inverse[row] : 0.f;
                    float along = place >= 0 ? delta[row] : 0.f;
                    float4 factor = make_float4(1.f, 1.f, 1.f, 1.f);
                    if (rng) factor = keep4(keep, row * keys + key0 + 4 * tx);
                    float factors[4] = {factor.x, factor.y, factor.z, factor.w};
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        int key = key0 + 4 * tx + j, distance = places - place + key - from;
                        if (place < 0 || key >= keys || distance < 0 || distance >= TILE) continue;
                        float s = x.score(shared, query, hides.x[j], kind.x[j], p[i][j], shared.scores[query][distance]);
                        float weight = expf(s - most) * share;
                        shared.weights[query][distance] = scale * weight * (dp[i][j] * factors[j] - along);
                    }
                }
            }
            add_weighted(drs, shared, x.q_r, query0, column, ty, tx);
        }
    }
    float ones[4] = {1.f, 1.f, 1.f, 1.f};
    store_sum(dr + (long long)head * width, dr_ld, keys + places, width, from, column, drs, ones, ty, tx);
}

// dkinds, from dq's sums: eight threads take every eighth query.
extern "C" __global__ void __launch_bounds__(THREADS)
relative_attention_dkinds_backward_f32(const float* __restrict__ by_kind, const float* __restrict__ q_s,
                                       float* __restrict__ dkinds, int batch, int tokens, int heads, int width, int q_s_ld,
                                       int dkinds_ld) {
    __shared__ float parts[8][WARP];
    int c = blockIdx.x * WARP + threadIdx.x, kind = blockIdx.y, head = blockIdx.z;
    by_kind += (long long)kind * batch * heads * tokens;
    float sum = 0.f;
    for (int query = threadIdx.y; c < width && query < batch * tokens; query += 8) {
        int b = query / tokens, i = query % tokens;
        sum += by_kind[((long long)b * heads + head) * tokens + i] * q_s[(long long)query * q_s_ld + head * width + c];
    }
    parts[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || c >= width) return;
    for (int n = 1; n < 8; ++n) sum += parts[n][threadIdx.x];
    dkinds[(long long)kind * dkinds_ld + head * width + c] = sum;
}
