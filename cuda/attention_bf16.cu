// attention.cu's products on tensor cores: queries, keys, values and probabilities are rounded to bfloat16 on their way to
// shared memory or registers; sums, softmax and all of memory stay float32. Arguments, masks and dropout are those of
// attention.cu's kernels. Needs compute capability 8.0; heads of up to 64 or 128 columns, the number in a kernel's name.
//
// Launch: block = 128, with tiles = ceil(T / 64):
//   attention<w>_forward_bf16, attention<w>_dq_backward_bf16    grid = (tiles, H, B).
//   attention<w>_dkv_backward_bf16                              grid = (tiles, K, B).
// Shared memory: static, up to 43.5 KB.
//
// A warp has 16 rows of the result. Products are mma.m16n8k16: a lane (g, t) = (lane / 4, lane % 4) holds columns 2 t and
// 2 t + 1 of rows g and g + 8 of each 16 x 8 result, so that a row belongs to four lanes, and two neighbouring results are
// the first factor of the next product as they lie. Source: PTX ISA, "Matrix Fragments for mma.m16n8k16", and Dao 2023,
// "FlashAttention-2", section 3.3.

#define THREADS 128
#define WARPS (THREADS / WARP)

// ---- Tensor cores --------------------------------------------------------------------------------------------------

// Two floats as bfloat16, the first in the lower half.
__device__ __forceinline__ unsigned pack(float low, float high) {
    unsigned both = 0;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
    return both;
}

// Four 8 x 8 tiles of bfloat16; lane l gives the address of row l % 8 of tile l / 8. Turned, a lane gets columns.
template <bool TURNED>
__device__ __forceinline__ void load_tiles(unsigned (&to)[4], const unsigned* row) {
#if __CUDA_ARCH__ >= 800
    unsigned at = (unsigned)__cvta_generic_to_shared(row);
    if (TURNED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
    }
#endif
}

// sum [16, 8] += a [16, 16] . b [16, 8].
__device__ __forceinline__ void multiply(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Rows of a head as bfloat16, two to a word. The pitch is 16 bytes past a multiple of 128: eight rows meet in no bank.
template <int ROWS, int WIDTH>
struct __align__(16) Tile {
    unsigned words[ROWS][(WIDTH + 8) / 2];

    // Rows from .. of x, 0 outside.
    __device__ __forceinline__ void load(const Rows& x, int from) {
#pragma unroll 4
        for (int n = threadIdx.x; n < ROWS * WIDTH / 4; n += THREADS) {
            int r = n / (WIDTH / 4), c = 4 * (n % (WIDTH / 4));
            float4 value = load4(x.x + (long long)(from + r) * x.ld + c, from + r < x.rows ? x.width - c : 0);
            *reinterpret_cast<uint2*>(&words[r][c / 2]) = make_uint2(pack(value.x, value.y), pack(value.z, value.w));
        }
    }

    // The first factor [16, 16] at (row, col).
    __device__ __forceinline__ void first(unsigned (&a)[4], int row, int col) const {
        int lane = threadIdx.x % WARP;
        load_tiles<false>(a, &words[row + lane % 16][(col + lane / 16 * 8) / 2]);
    }

    // Second factors [16, 8] for results of columns n and n + 8: element (k, n) is this tile's (n, k), at column `k`.
    __device__ __forceinline__ void second(unsigned (&b)[4], int n, int k) const {
        int lane = threadIdx.x % WARP;
        load_tiles<false>(b, &words[n + lane / 16 * 8 + lane % 8][(k + lane / 8 % 2 * 8) / 2]);
    }

    // The same where element (k, n) is this tile's (k, n).
    __device__ __forceinline__ void second_turned(unsigned (&b)[4], int k, int n) const {
        int lane = threadIdx.x % WARP;
        load_tiles<true>(b, &words[k + lane % 16][(n + lane / 16 * 8) / 2]);
    }
};

// product [16, 8 N] = rows `row` .. of x . rows of y, over the head's columns.
template <int N, int WIDTH, class X, class Y>
__device__ __forceinline__ void dot_rows(float (&product)[N][4], const X& x, int row, const Y& y) {
#pragma unroll
    for (int n = 0; n < N; ++n) product[n][0] = product[n][1] = product[n][2] = product[n][3] = 0.f;
#pragma unroll
    for (int k = 0; k < WIDTH; k += 16) {
        unsigned a[4];
        x.first(a, row, k);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            unsigned b[4];
            y.second(b, 8 * n, k);
            multiply(product[n], a, b[0], b[1]);
            multiply(product[n + 1], a, b[2], b[3]);
        }
    }
}

// sum [16, WIDTH] += weights [16, 8 N] . the first 8 N rows of x.
template <int N, int WIDTH, class X>
__device__ __forceinline__ void add_weighted(float (&sum)[WIDTH / 8][4], const float (&weights)[N][4], const X& x) {
#pragma unroll
    for (int k = 0; k < N; k += 2) {
        unsigned a[4] = {pack(weights[k][0], weights[k][1]), pack(weights[k][2], weights[k][3]),
                         pack(weights[k + 1][0], weights[k + 1][1]), pack(weights[k + 1][2], weights[k + 1][3])};
#pragma unroll
        for (int n = 0; n < WIDTH / 8; n += 2) {
            unsigned b[4];
            x.second_turned(b, 8 * k, 8 * n);
            multiply(sum[n], a, b[0], b[1]);
            multiply(sum[n + 1], a, b[2], b[3]);
        }
    }
}

template <int WIDTH>
__device__ __forceinline__ void clear(float (&sum)[WIDTH / 8][4]) {
#pragma unroll
    for (int n = 0; n < WIDTH / 8; ++n) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0.f;
}

// to[row + 8 r][8 n + 2 t ..] = sum[n][2 r ..] * factor[r], inside the head.
template <int WIDTH>
__device__ __forceinline__ void store_sum(float* to, int ld, int rows, int width, int row, const float (&sum)[WIDTH / 8][4],
                                          float factor0, float factor1) {
    int t = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (row + 8 * r >= rows) continue;
        float factor = r ? factor1 : factor0;
#pragma unroll
        for (int n = 0; n < WIDTH / 8; ++n) {
            int c = 8 * n + 2 * t;
            float* p = to + (long long)(row + 8 * r) * ld + c;
            float2 value = make_float2(sum[n][2 * r] * factor, sum[n][2 * r + 1] * factor);
            if (c + 1 < width && (reinterpret_cast<unsigned long long>(p) & 7) == 0) {
                *reinterpret_cast<float2*>(p) = value;
            } else {
                if (c < width) p[0] = value.x;
                if (c + 1 < width) p[1] = value.y;
            }
        }
    }
}

// Sums and maxima over the four lanes that share a row.
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

// ---- Forward -------------------------------------------------------------------------------------------------------

template <int WIDTH>
__device__ __forceinline__ void forward(
    const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,
    const int* __restrict__ segments, const float* __restrict__ key_bias, const int* __restrict__ prefix,
    const int* __restrict__ rng, float* __restrict__ out, float* __restrict__ lse, int batch, int tokens, int heads,
    int kv_heads, int width, int q_ld, int k_ld, int v_ld, int out_ld, int causal, int window, float scale,
    unsigned stream, float dropout_p, float dropout_scale) {
    constexpr int KEYS = WIDTH == 64 ? 64 : 32;
    __shared__ Tile<TILE, WIDTH> queries;
    __shared__ Tile<KEYS, WIDTH> keys, values;
    int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    int query0 = (gridDim.x - 1 - blockIdx.x) * TILE;
    int head = blockIdx.y, kv_head = head / (heads / kv_heads), b = blockIdx.z;
    Rows ks = head_rows(k, k_ld, b, kv_head, tokens, width), vs = head_rows(v, v_ld, b, kv_head, tokens, width);
    Mask mask = {segments ? segments + (long long)b * tokens : nullptr, tokens, causal, window, prefix ? prefix[b] : 0};
    int row = query0 + 16 * warp + g;  // and row + 8
    long long head0 = ((long long)b * heads + head) * tokens;
    Keep keep;
    if (rng) keep = keep_rule(rng, stream, dropout_p, dropout_scale);
    queries.load(head_rows(q, q_ld, b, head, tokens, width), query0);

    float sum[WIDTH / 8][4], largest[2] = {-INFINITY, -INFINITY}, denominator[2] = {0.f, 0.f};
    clear<WIDTH>(sum);
    int end = mask.end_key(query0 + TILE);
    for (int key0 = mask.first_key(query0); key0 < end; key0 += KEYS) {
        __syncthreads();  // the last keys and values are used up
        keys.load(ks, key0);
        values.load(vs, key0);
        __syncthreads();
        float p[KEYS / 8][4];
        dot_rows<KEYS / 8, WIDTH>(p, queries, 16 * warp, keys);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float above = largest[r];
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                for (int e = 2 * r; e < 2 * r + 2; ++e) {
                    int key = key0 + 8 * n + 2 * t + e % 2;
                    bool seen = mask.sees(row + 8 * r, key);
                    float bias = seen && key_bias ? key_bias[head0 + key] : 0.f;
                    p[n][e] = seen ? p[n][e] * scale + bias : -INFINITY;
                    above = fmaxf(above, p[n][e]);
                }
            }
            above = row_max(above);
            // A row that has seen nothing yet: exp(-inf - 0) = 0 throughout.
            float shift = above == -INFINITY ? 0.f : above;
            float correction = expf(largest[r] - shift), total = 0.f;
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                for (int e = 2 * r; e < 2 * r + 2; ++e) {
                    p[n][e] = expf(p[n][e] - shift);
                    total += p[n][e];
                    if (rng) p[n][e] *= keep1(keep, rng, (head0 + row + 8 * r) * tokens + key0 + 8 * n + 2 * t + e % 2);
                }
            }
            denominator[r] = denominator[r] * correction + row_sum(total);
            largest[r] = above;
#pragma unroll
            for (int n = 0; n < WIDTH / 8; ++n) sum[n][2 * r] *= correction, sum[n][2 * r + 1] *= correction;
        }
        add_weighted<KEYS / 8, WIDTH>(sum, p, values);
    }

    bool blind = (row < tokens && largest[0] == -INFINITY) || (row + 8 < tokens && largest[1] == -INFINITY);
    if (segments && __syncthreads_or(blind)) {
        for (int key0 = 0; key0 < tokens; key0 += KEYS) {
            __syncthreads();  // the last values are used up
            values.load(vs, key0);
            __syncthreads();
            float p[KEYS / 8][4];
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    int key = key0 + 8 * n + 2 * t + e % 2;
                    p[n][e] = mask.blind_weight(largest[e / 2] == -INFINITY, key);
                    if (rng) p[n][e] *= keep1(keep, rng, (head0 + row + e / 2 * 8) * tokens + key);
                }
            }
            add_weighted<KEYS / 8, WIDTH>(sum, p, values);
        }
    }

    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        bool empty = largest[r] == -INFINITY;
        factor[r] = empty ? 1.f : 1.f / denominator[r];
        if (t == 0 && row + 8 * r < tokens) {
            lse[head0 + row + 8 * r] = empty ? -INFINITY : largest[r] + logf(denominator[r]);
        }
    }
    float* to = out + (long long)b * tokens * out_ld + (long long)head * width;
    store_sum<WIDTH>(to, out_ld, tokens, width, row, sum, factor[0], factor[1]);
}

extern "C" __global__ void __launch_bounds__(THREADS)
attention64_forward_bf16(
    const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,
    const int* __restrict__ segments, const float* __restrict__ key_bias, const int* __restrict__ prefix,
    const int* __restrict__ rng, float* __restrict__ out, float* __restrict__ lse, int batch, int tokens, int heads,
    int kv_heads, int width, int q_ld, int k_ld, int v_ld, int out_ld, int causal, int window, float scale,
    unsigned stream, float dropout_p, float dropout_scale) {
    forward<64>(q, k, v, segments, key_bias, prefix, rng, out, lse, batch, tokens, heads, kv_heads, width, q_ld, k_ld,
    v_ld, out_ld, causal, window, scale, stream, dropout_p, dropout_scale);
}

extern "C" __global__ void __launch_bounds__(THREADS)
attention128_forward_bf16(
    const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,
    const int* __restrict__ segments, const float* __restrict__ key_bias, const int* __restrict__ prefix,
    const int* __restrict__ rng, float* __restrict__ out, float* __restrict__ lse, int batch, int tokens, int heads,
    int kv_heads, int width, int q_ld, int k_ld, int v_ld, int out_ld, int causal, int window, float scale,
    unsigned stream, float dropout_p, float dropout_scale) {
    forward<128>(q, k, v, segments, key_bias, prefix, rng, out, lse, batch, tokens, heads, kv_heads, width, q_ld, k_ld,
    v_ld, out_ld, causal, window, scale, stream, dropout_p, dropout_scale);
}

// ---- Backward ------------------------------------------------------------------------------------------------------

// dq = sum over j of ds[i, j] * k[j].
template <int WIDTH>
__device__ __forceinline__ void dq_backward(
    const float* __restrict__ dout, const float* __restrict__ q, const float* __restrict__ k,
    const float* __restrict__ v, const float* __restrict__ lse, const float* __restrict__ delta,
    const int* __restrict__ segments, const float* __restrict__ key_bias, const int* __restrict__ prefix,
    const int* __restrict__ rng, float* __restrict__ dq, int batch, int tokens, int heads, int kv_heads, int width,
    int dout_ld, int q_ld, int k_ld, int v_ld, int dq_ld, int causal, int window, float scale, unsigned stream,
    float dropout_p, float dropout_scale) {
    constexpr int KEYS = WIDTH == 64 ? 32 : 16;
    __shared__ Tile<TILE, WIDTH> queries, douts;
    __shared__ Tile<KEYS, WIDTH> keys, values;
    int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    int query0 = (gridDim.x - 1 - blockIdx.x) * TILE;
    int head = blockIdx.y, kv_head = head / (heads / kv_heads), b = blockIdx.z;
    Rows ks = head_rows(k, k_ld, b, kv_head, tokens, width), vs = head_rows(v, v_ld, b, kv_head, tokens, width);
    Mask mask = {segments ? segments + (long long)b * tokens : nullptr, tokens, causal, window, prefix ? prefix[b] : 0};
    int row = query0 + 16 * warp + g;  // and row + 8
    long long head0 = ((long long)b * heads + head) * tokens;
    Keep keep;
    if (rng) keep = keep_rule(rng, stream, dropout_p, dropout_scale);
    queries.load(head_rows(q, q_ld, b, head, tokens, width), query0);
    douts.load(head_rows(dout, dout_ld, b, head, tokens, width), query0);
    float row_lse[2], row_delta[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        bool inside = row + 8 * r < tokens;
        row_lse[r] = inside ? lse[head0 + row + 8 * r] : 0.f;
        row_delta[r] = inside ? delta[head0 + row + 8 * r] : 0.f;
    }

    float sum[WIDTH / 8][4];
    clear<WIDTH>(sum);
    int end = mask.end_key(query0 + TILE);
    for (int key0 = mask.first_key(query0); key0 < end; key0 += KEYS) {
        __syncthreads();  // the last keys and values are used up
        keys.load(ks, key0);
        values.load(vs, key0);
        __syncthreads();
        float p[KEYS / 8][4], ds[KEYS / 8][4];
        dot_rows<KEYS / 8, WIDTH>(p, queries, 16 * warp, keys);
        dot_rows<KEYS / 8, WIDTH>(ds, douts, 16 * warp, values);
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                int query = row + e / 2 * 8, key = key0 + 8 * n + 2 * t + e % 2;
                bool seen = mask.sees(query, key);
                float bias = seen && key_bias ? key_bias[head0 + key] : 0.f;
                float factor = keep1(keep, rng, (head0 + query) * tokens + key);
                score_gradient(p[n][e], ds[n][e], seen, bias, row_lse[e / 2], row_delta[e / 2], factor, scale);
            }
        }
        add_weighted<KEYS / 8, WIDTH>(sum, ds, keys);
    }
    float* to = dq + (long long)b * tokens * dq_ld + (long long)head * width;
    store_sum<WIDTH>(to, dq_ld, tokens, width, row, sum, 1.f, 1.f);
}

extern "C" __global__ void __launch_bounds__(THREADS)
attention64_dq_backward_bf16(
    const float* __restrict__ dout, const float* __restrict__ q, const float* __restrict__ k,
    const float* __restrict__ v, const float* __restrict__ lse, const float* __restrict__ delta,
    const int* __restrict__ segments, const float* __restrict__ key_bias, const int* __restrict__ prefix,
    const int* __restrict__ rng, float* __restrict__ dq, int batch, int tokens, int heads, int kv_heads, int width,
    int dout_ld, int q_ld, int k_ld, int v_ld, int dq_ld, int causal, int window, float scale, unsigned stream,
    float dropout_p, float dropout_scale) {
    dq_backward<64>(dout, q, k, v, lse, delta, segments, key_bias, prefix, rng, dq, batch, tokens, heads, kv_heads,
    width, dout_ld, q_ld, k_ld, v_ld, dq_ld, causal, window, scale, stream, dropout_p, dropout_scale);
}

extern "C" __global__ void __launch_bounds__(THREADS)
attention128_dq_backward_bf16(
    const float* __restrict__ dout, const float* __restrict__ q, const float* __restrict__ k,
    const float* __restrict__ v, const float* __restrict__ lse, const float* __restrict__ delta,
    const int* __restrict__ segments, const float* __restrict__ key_bias, const int* __restrict__ prefix,
    const int* __restrict__ rng, float* __restrict__ dq, int batch, int tokens, int heads, int kv_heads, int width,
    int dout_ld, int q_ld, int k_ld, int v_ld, int dq_ld, int causal, int window, float scale, unsigned stream,
    float dropout_p, float dropout_scale) {
    dq_backward<128>(dout, q, k, v, lse, delta, segments, key_bias, prefix, rng, dq, batch, tokens, heads, kv_heads,
    width, dout_ld, q_ld, k_ld, v_ld, dq_ld, causal, window, scale, stream, dropout_p, dropout_scale);
}

// dk = sum over i of ds[i, j] * q[i], dv = sum over i of p[i, j] * keep[i, j] * dout[i], over all query heads of a key-value
// head. Rows of a tile are keys here, columns queries.
template <int WIDTH>
__device__ __forceinline__ void dkv_backward(
    const float* __restrict__ dout, const float* __restrict__ q, const float* __restrict__ k,
    const float* __restrict__ v, const float* __restrict__ lse, const float* __restrict__ delta,
    const int* __restrict__ segments, const float* __restrict__ key_bias, const int* __restrict__ prefix,
    const int* __restrict__ rng, float* __restrict__ dk, float* __restrict__ dv, int batch, int tokens, int heads,
    int kv_heads, int width, int dout_ld, int q_ld, int k_ld, int v_ld, int dk_ld, int dv_ld, int causal, int window,
    float scale, unsigned stream, float dropout_p, float dropout_scale) {
    constexpr int QUERIES = WIDTH == 64 ? 32 : 16;
    __shared__ Tile<TILE, WIDTH> keys, values;
    __shared__ Tile<QUERIES, WIDTH> queries, douts;
    int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    int key0 = blockIdx.x * TILE, kv_head = blockIdx.y, group = heads / kv_heads, b = blockIdx.z;
    Mask mask = {segments ? segments + (long long)b * tokens : nullptr, tokens, causal, window, prefix ? prefix[b] : 0};
    int row = key0 + 16 * warp + g;  // and row + 8
    Keep keep;
    if (rng) keep = keep_rule(rng, stream, dropout_p, dropout_scale);
    keys.load(head_rows(k, k_ld, b, kv_head, tokens, width), key0);
    values.load(head_rows(v, v_ld, b, kv_head, tokens, width), key0);

    float dks[WIDTH / 8][4], dvs[WIDTH / 8][4];
    clear<WIDTH>(dks);
    clear<WIDTH>(dvs);
    int end = mask.end_query(min(key0 + TILE, tokens));
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        Rows qs = head_rows(q, q_ld, b, head, tokens, width), dos = head_rows(dout, dout_ld, b, head, tokens, width);
        long long head0 = ((long long)b * heads + head) * tokens;
        for (int query0 = mask.first_query(key0); query0 < end; query0 += QUERIES) {
            __syncthreads();  // the last queries are used up
            queries.load(qs, query0);
            douts.load(dos, query0);
            __syncthreads();
            float p[QUERIES / 8][4], ds[QUERIES / 8][4];
            dot_rows<QUERIES / 8, WIDTH>(p, keys, 16 * warp, queries);
            dot_rows<QUERIES / 8, WIDTH>(ds, values, 16 * warp, douts);
#pragma unroll
            for (int n = 0; n < QUERIES / 8; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    int key = row + e / 2 * 8, query = query0 + 8 * n + 2 * t + e % 2;
                    bool inside = query < tokens, seen = mask.sees(query, key);
                    float row_lse = inside ? lse[head0 + query] : 0.f, row_delta = inside ? delta[head0 + query] : 0.f;
                    float bias = seen && key_bias ? key_bias[head0 + key] : 0.f;
                    float factor = keep1(keep, rng, (head0 + query) * tokens + key);
                    score_gradient(p[n][e], ds[n][e], seen, bias, row_lse, row_delta, factor, scale);
                }
            }
            add_weighted<QUERIES / 8, WIDTH>(dvs, p, douts);
            add_weighted<QUERIES / 8, WIDTH>(dks, ds, queries);
        }
    }
    // Queries that see nothing: every key has a share of them, wherever it lies.
    for (int head = kv_head * group; segments && head < (kv_head + 1) * group; ++head) {
        Rows dos = head_rows(dout, dout_ld, b, head, tokens, width);
        long long head0 = ((long long)b * heads + head) * tokens;
        for (int query0 = 0; query0 < tokens; query0 += QUERIES) {
            float p[QUERIES / 8][4];
            bool some = false;
#pragma unroll
            for (int n = 0; n < QUERIES / 8; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    int key = row + e / 2 * 8, query = query0 + 8 * n + 2 * t + e % 2;
                    bool blind = query < tokens && lse[head0 + query] == -INFINITY;
                    p[n][e] = mask.blind_weight(blind, key) * keep1(keep, rng, (head0 + query) * tokens + key);
                    some |= blind;
                }
            }
            if (!__syncthreads_or(some)) continue;
            douts.load(dos, query0);
            __syncthreads();
            add_weighted<QUERIES / 8, WIDTH>(dvs, p, douts);
        }
    }
    store_sum<WIDTH>(dk + (long long)b * tokens * dk_ld + (long long)kv_head * width, dk_ld, tokens, width, row, dks, 1.f, 1.f);
    store_sum<WIDTH>(dv + (long long)b * tokens * dv_ld + (long long)kv_head * width, dv_ld, tokens, width, row, dvs, 1.f, 1.f);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
attention64_dkv_backward_bf16(
    const float* __restrict__ dout, const float* __restrict__ q, const float* __restrict__ k,
    const float* __restrict__ v, const float* __restrict__ lse, const float* __restrict__ delta,
    const int* __restrict__ segments, const float* __restrict__ key_bias, const int* __restrict__ prefix,
    const int* __restrict__ rng, float* __restrict__ dk, float* __restrict__ dv, int batch, int tokens, int heads,
    int kv_heads, int width, int dout_ld, int q_ld, int k_ld, int v_ld, int dk_ld, int dv_ld, int causal, int window,
    float scale, unsigned stream, float dropout_p, float dropout_scale) {
    dkv_backward<64>(dout, q, k, v, lse, delta, segments, key_bias, prefix, rng, dk, dv, batch, tokens, heads,
    kv_heads, width, dout_ld, q_ld, k_ld, v_ld, dk_ld, dv_ld, causal, window, scale, stream, dropout_p, dropout_scale);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
attention128_dkv_backward_bf16(
    const float* __restrict__ dout, const float* __restrict__ q, const float* __restrict__ k,
    const float* __restrict__ v, const float* __restrict__ lse, const float* __restrict__ delta,
    const int* __restrict__ segments, const float* __restrict__ key_bias, const int* __restrict__ prefix,
    const int* __restrict__ rng, float* __restrict__ dk, float* __restrict__ dv, int batch, int tokens, int heads,
    int kv_heads, int width, int dout_ld, int q_ld, int k_ld, int v_ld, int dk_ld, int dv_ld, int causal, int window,
    float scale, unsigned stream, float dropout_p, float dropout_scale) {
    dkv_backward<128>(dout, q, k, v, lse, delta, segments, key_bias, prefix, rng, dk, dv, batch, tokens, heads,
    kv_heads, width, dout_ld, q_ld, k_ld, v_ld, dk_ld, dv_ld, causal, window, scale, stream, dropout_p, dropout_scale);
}
