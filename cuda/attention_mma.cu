// Attention on tensor cores, with 16-bit floats in memory: q, k, v, out and their gradients are bfloat16 or float16, lse and
// delta float32. Products are of such factors, to which probabilities and their gradients are rounded too, and add up in
// float32. Masks, dropout and what optional operands mean are those of attention.cu.
//
// bfloat16 needs compute capability 8.0, float16 7.5; D a multiple of 8; rows of every 16-bit operand at multiples of 16
// bytes. The number in a kernel's name is the widest head it takes; float16 has no kernels for heads of more than 128
// columns, whose tiles do not fit into what Turing gives a block.
//
// Launch: block = 128, with tiles(n) = ceil(T / n):
//   attention64_forward, attention64_dq_backward, and those of 128    grid = (tiles(128), H, B).
//   attention128_dq_backward in float16                               grid = (tiles(64), H, B).
//   attention256_forward, attention256_dq_backward                    grid = (tiles(64), H, B).
//   attention64_dkv_backward                                          grid = (tiles(128), K, B).
//   attention128_dkv_backward                                         grid = (tiles(64), K, B).
//   attention256_dkv_backward                                         grid = (tiles(64), K, 2 B).
//   attention_delta_backward                                          grid = ceil(B * T * H / 16).
// Shared memory: dynamic; a word <kernel>_shared beside each kernel says how many bytes. At most 99 KB, in float16 64 KB.
//
// A warp has M times 16 rows of the result. Products are mma.m16n8k16, before compute capability 8.0 two of mma.m16n8k8,
// which have its halves: a lane (g, t) = (lane / 4, lane % 4) holds columns 2 t and 2 t + 1 of rows g and g + 8 of each
// 16 x 8 result, so that a row belongs to four lanes, and two neighbouring results are the first factor of the next product
// as they lie. A second factor is read once for all M pieces. The block's own rows stay in shared memory; the others pass
// through two stages, of which one fills while the other is used.
// Source: PTX ISA, "Matrix Fragments for mma.m16n8k16" and "mma.m16n8k8", and Dao 2023, "FlashAttention-2", section 3.3.

#define WARPS (THREADS / WARP)

#ifdef F16
#define FACTORS ".f32.f16.f16.f32 "
#else
#define FACTORS ".f32.bf16.bf16.f32 "
#endif

// Rows of tiles, by the widest head. What a block of float16 has fits into Turing's 64 KB, twice where that costs nothing:
// one block computes while the other waits for copies. Those pass through registers there, which more scores would need.
#define FORWARD128_KEYS (AMPERE ? 32 : 16)
#ifdef F16
#define FORWARD64_KEYS 32
#define DQ128_PIECES 1
#define DKV128_QUERIES 16
#else
#define FORWARD64_KEYS 64
#define DQ128_PIECES 2
#define DKV128_QUERIES 32
#endif

// ---- Tensor cores --------------------------------------------------------------------------------------------------

// Four 8 x 8 tiles of 16-bit floats; lane l gives the address of row l % 8 of tile l / 8. Turned, a lane gets columns.
template <bool TURNED>
__device__ __forceinline__ void load_tiles(unsigned (&to)[4], unsigned at) {
    if (TURNED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
    }
}

#if defined(F16) && !AMPERE
// sum [16, 8] += a [16, 8] . b [8, 8].
__device__ __forceinline__ void multiply(float (&sum)[4], unsigned a0, unsigned a1, unsigned b) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col" FACTORS "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a0), "r"(a1), "r"(b));
}
#endif

// sum [16, 8] += a [16, 16] . b [16, 8].
__device__ __forceinline__ void multiply(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if AMPERE
    asm volatile("mma.sync.aligned.m16n8k16.row.col" FACTORS "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif defined(F16)
    multiply(sum, a[0], a[1], b0);
    multiply(sum, a[2], a[3], b1);
#endif
}

// ---- Tiles ---------------------------------------------------------------------------------------------------------

// Rows of a head in shared memory, in chunks of eight columns. Chunk c of row r lies at place c ^ r % 8: eight rows of one
// chunk meet in no bank, and neither do eight chunks of one row.
template <int WIDTH>
struct Tile {
    static constexpr int CHUNKS = WIDTH / 8;
    uint4* at;

    __device__ __forceinline__ uint4* chunk(int row, int c) const { return at + row * CHUNKS + (c ^ (row & 7)); }

    // Begins to copy rows from .. of x, 0 outside.
    template <int ROWS>
    __device__ __forceinline__ void fetch(const Rows<real>& x, int from) const {
        constexpr int AT_ONCE = AMPERE ? 1 : 2;  // addresses of more copies would take the registers of the sums
#pragma unroll AT_ONCE
        for (int n = threadIdx.x; n < ROWS * CHUNKS; n += THREADS) {
            int r = n / CHUNKS, c = n % CHUNKS;
            bool inside = from + r < x.rows && 8 * c < x.width;
            copy16(chunk(r, c), inside ? x.x + (long long)(from + r) * x.ld + 8 * c : x.x, inside);
        }
    }

    // Where in shared memory this lane finds its row of a pair of chunks, the first for `half` 0; the tile begins at a
    // multiple of 128 bytes. Other even chunks are found by turning bits, other rows, eight apart, by adding.
    __device__ __forceinline__ unsigned lane(int row, int half) const {
        return (unsigned)__cvta_generic_to_shared(at) + 16 * (row * CHUNKS + (half ^ (row & 7)));
    }
    __device__ __forceinline__ static unsigned moved(unsigned lane, int rows, int c) {
        return (lane ^ 16 * (c & 7)) + 16 * (rows * CHUNKS + (c & ~7));
    }

    // The first factor [16, 16] at (row, col).
    __device__ __forceinline__ void first(unsigned (&a)[4], int row, int col) const {
        int n = threadIdx.x % WARP;
        load_tiles<false>(a, moved(lane(n % 16, n / 16), row, col / 8));
    }

    // Second factors [16, 8] for results of columns n and n + 8: element (k, n) is this tile's (n, k), at column `k`.
    __device__ __forceinline__ void second(unsigned (&b)[4], int n, int k) const {
        int i = threadIdx.x % WARP;
        load_tiles<false>(b, moved(lane(i / 16 * 8 + i % 8, i / 8 % 2), n, k / 8));
    }

    // The same where element (k, n) is this tile's (k, n).
    __device__ __forceinline__ void second_turned(unsigned (&b)[4], int k, int n) const {
        int i = threadIdx.x % WARP;
        load_tiles<true>(b, moved(lane(i % 16, i / 16), k, n / 8));
    }
};

// product [16 M, 8 N] = rows `row` .. of x . rows of y, over the head's columns.
template <int M, int N, int WIDTH>
__device__ __forceinline__ void dot_rows(float (&product)[M][N][4], const Tile<WIDTH>& x, int row, const Tile<WIDTH>& y) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < N; ++n) product[m][n][0] = product[m][n][1] = product[m][n][2] = product[m][n][3] = 0.f;
    }
#pragma unroll 1  // loads further ahead would take the registers of the sums
    for (int k = 0; k < WIDTH; k += 16) {
        unsigned a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) x.first(a[m], row + 16 * m, k);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            unsigned b[4];
            y.second(b, 8 * n, k);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                multiply(product[m][n], a[m], b[0], b[1]);
                multiply(product[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// A result [16 M, 8 N] in 16 bits, two columns to a word.
template <int M, int N>
struct Weights {
    unsigned words[M][N][2];

    __device__ __forceinline__ Weights() {}
    __device__ __forceinline__ explicit Weights(const float (&x)[M][N][4]) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
                words[m][n][0] = narrow(x[m][n][0], x[m][n][1]);
                words[m][n][1] = narrow(x[m][n][2], x[m][n][3]);
            }
        }
    }

    __device__ __forceinline__ float at(int m, int n, int e) const {
        unsigned word = words[m][n][e / 2];
        return e % 2 ? high_of(word) : low_of(word);
    }
};

// sum [16 M, 8 C] += weights [16 M, 8 N] . columns `col` .. of the first 8 N rows of x.
template <int M, int N, int C, int WIDTH>
__device__ __forceinline__ void add_weighted(float (&sum)[M][C][4], const Weights<M, N>& weights, const Tile<WIDTH>& x, int col = 0) {
#pragma unroll
    for (int k = 0; k < N; k += 2) {
        unsigned a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) {
            const unsigned(&w)[N][2] = weights.words[m];
            a[m][0] = w[k][0], a[m][1] = w[k][1], a[m][2] = w[k + 1][0], a[m][3] = w[k + 1][1];
        }
#pragma unroll
        for (int n = 0; n < C; n += 2) {
            unsigned b[4];
            x.second_turned(b, 8 * k, col + 8 * n);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                multiply(sum[m][n], a[m], b[0], b[1]);
                multiply(sum[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

template <int M, int C>
__device__ __forceinline__ void clear(float (&sum)[M][C][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < C; ++n) sum[m][n][0] = sum[m][n][1] = sum[m][n][2] = sum[m][n][3] = 0.f;
    }
}

// to[from + r][col + c] = sum[r][c] * factor[r] for the warp's 16 M rows, inside the head. They pass through the warp's rows
// of `tile`, from `row` on, which no other warp may use any more.
template <int M, int C, int WIDTH>
__device__ __forceinline__ void store_sum(real* to, int ld, int rows, int width, int from, int col, const float (&sum)[M][C][4],
                                          const float (&factor)[M][2], const Tile<WIDTH>& tile, int row) {
    int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
            for (int n = 0; n < C; ++n) {
                unsigned* p = reinterpret_cast<unsigned*>(tile.chunk(row + 16 * m + 8 * r + g, n));
                p[t] = narrow(sum[m][n][2 * r] * factor[m][r], sum[m][n][2 * r + 1] * factor[m][r]);
            }
        }
    }
    __syncwarp();
#pragma unroll 4
    for (int n = lane; n < 16 * M * C; n += WARP) {
        int r = n / C, c = n % C;
        if (from + r < rows && col + 8 * c < width) {
            *reinterpret_cast<uint4*>(to + (long long)(from + r) * ld + col + 8 * c) = *tile.chunk(row + r, c);
        }
    }
}

// Bit 4 n + e of word m: whether element e of result (m, n) is `chosen`. In a loop that is not unrolled, since masks and
// dropout would otherwise take the registers of the sums.
template <int M, int N, class F>
__device__ __forceinline__ void choose(unsigned (&bits)[M], F chosen) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
        bits[m] = 0;
#pragma unroll 1
        for (int i = 0; i < 4 * N; ++i) bits[m] |= (unsigned)chosen(16 * m + i / 2 % 2 * 8, i / 4 * 8 + i % 2) << i;
    }
}

// Zeros where a bit is not set.
template <int M, int N>
__device__ __forceinline__ Weights<M, N> only(const Weights<M, N>& x, const unsigned (&bits)[M]) {
    Weights<M, N> y;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                unsigned low = bit(bits[m], n, 2 * r) ? 0xffffu : 0u, high = bit(bits[m], n, 2 * r + 1) ? 0xffff0000u : 0u;
                y.words[m][n][r] = x.words[m][n][r] & (low | high);
            }
        }
    }
    return y;
}

// ---- Forward -------------------------------------------------------------------------------------------------------

template <int WIDTH, int M, int KEYS>
__device__ __forceinline__ void forward(FORWARD_PARAMETERS) {
    extern __shared__ __align__(128) uint4 shared[];
    constexpr int ROWS = 16 * M * WARPS, N = KEYS / 8, SIDE = KEYS * WIDTH / 8;
    Tile<WIDTH> queries = {shared};
    uint4* stages = shared + ROWS * WIDTH / 8;
    int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    // The last queries see the most keys: begin with them.
    int query0 = (gridDim.x - 1 - blockIdx.x) * ROWS;
    int head = blockIdx.y, kv_head = head / (heads / kv_heads), b = blockIdx.z;
    Rows<real> ks = head_rows(k, k_ld, b, kv_head, tokens, width), vs = head_rows(v, v_ld, b, kv_head, tokens, width);
    Mask mask = {segments ? segments + (long long)b * tokens : nullptr, tokens, causal, window, prefix ? prefix[b] : 0};
    int own = 16 * M * warp, row0 = query0 + own;
    long long head0 = ((long long)b * heads + head) * tokens;
    scale *= LOG2_E;

    float sum[M][WIDTH / 8][4], largest[M][2], denominator[M][2];
    clear(sum);
#pragma unroll
    for (int m = 0; m < M; ++m) {
        largest[m][0] = largest[m][1] = -INFINITY;
        denominator[m][0] = denominator[m][1] = 0.f;
    }
    int first = mask.first_key(query0), end = mask.end_key(query0 + ROWS);
    queries.template fetch<ROWS>(head_rows(q, q_ld, b, head, tokens, width), query0);
    Tile<WIDTH>{stages}.template fetch<KEYS>(ks, first);
    Tile<WIDTH>{stages + SIDE}.template fetch<KEYS>(vs, first);
    for (int key0 = first, stage = 0; key0 < end; key0 += KEYS, stage ^= 1) {
        Tile<WIDTH> keys = {stages + 2 * stage * SIDE}, values = {keys.at + SIDE};
        arrive();
        __syncthreads();  // these keys and values are there, the last ones used up
        if (key0 + KEYS < end) {
            uint4* next = stages + 2 * (stage ^ 1) * SIDE;
            Tile<WIDTH>{next}.template fetch<KEYS>(ks, key0 + KEYS);
            Tile<WIDTH>{next + SIDE}.template fetch<KEYS>(vs, key0 + KEYS);
        }
        if (!mask.some(row0, 16 * M, key0, KEYS)) continue;
        float p[M][N][4];
        dot_rows(p, queries, own, keys);
        int row = row0 + g, col = key0 + 2 * t;
        bool all = mask.all(row0, 16 * M, key0, KEYS);
        unsigned seen[M], kept[M];
        if (!all) choose<M, N>(seen, [&](int r, int c) { return mask.sees(row + r, col + c); });
        if (rng) {
            Keep keep = keep_rule(rng, stream, dropout_p, 1.f);
            choose<M, N>(kept, [&](int r, int c) { return keep1(keep, rng, (head0 + row + r) * tokens + col + c) != 0.f; });
        }
#pragma unroll
        for (int n = 0; n < N; ++n) {
            float bias[2] = {0.f, 0.f};
            if (key_bias) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    if (col + 8 * n + e < tokens) bias[e] = LOG2_E * key_bias[head0 + col + 8 * n + e];
                }
            }
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    p[m][n][e] = p[m][n][e] * scale;
                    if (key_bias) p[m][n][e] += bias[e % 2];
                    if (!all && !bit(seen[m], n, e)) p[m][n][e] = -INFINITY;
                }
            }
        }
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float above = largest[m][r];
#pragma unroll
                for (int n = 0; n < N; ++n) above = fmaxf(above, fmaxf(p[m][n][2 * r], p[m][n][2 * r + 1]));
                above = row_max(above);
                // A row that has seen nothing yet: exp(-inf - 0) = 0 throughout.
                float shift = above == -INFINITY ? 0.f : above, correction = exp2f(largest[m][r] - shift), total = 0.f;
#pragma unroll
                for (int n = 0; n < N; ++n) {
#pragma unroll
                    for (int e = 2 * r; e < 2 * r + 2; ++e) {
                        p[m][n][e] = exp2f(p[m][n][e] - shift);
                        total += p[m][n][e];
                    }
                }
                denominator[m][r] = denominator[m][r] * correction + total;
                largest[m][r] = above;
#pragma unroll
                for (int n = 0; n < WIDTH / 8; ++n) sum[m][n][2 * r] *= correction, sum[m][n][2 * r + 1] *= correction;
            }
        }
        Weights<M, N> weights(p);
        add_weighted(sum, rng ? only(weights, kept) : weights, values);
    }
    arrive();

    bool blind = false;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) blind |= row0 + 16 * m + g + 8 * r < tokens && largest[m][r] == -INFINITY;
    }
    if (segments && __syncthreads_or(blind)) {
        Tile<WIDTH> values = {stages};
        Keep keep;
        if (rng) keep = keep_rule(rng, stream, dropout_p, 1.f);
        for (int key0 = 0; key0 < tokens; key0 += 16) {
            __syncthreads();  // the last values are used up
            values.template fetch<16>(vs, key0);
            arrive();
            __syncthreads();
            float p[M][2][4];
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int n = 0; n < 2; ++n) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        int key = key0 + 8 * n + 2 * t + e % 2;
                        long long query = head0 + row0 + 16 * m + g + e / 2 * 8;
                        p[m][n][e] = mask.blind_weight(largest[m][e / 2] == -INFINITY, key);
                        p[m][n][e] *= keep1(keep, rng, query * tokens + key);
                    }
                }
            }
            add_weighted(sum, Weights<M, 2>(p), values);
        }
    }

    float factor[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int row = row0 + 16 * m + g + 8 * r;
            bool empty = largest[m][r] == -INFINITY;
            float whole = row_sum(denominator[m][r]);
            factor[m][r] = empty ? 1.f : 1.f / whole;
            if (rng) factor[m][r] *= dropout_scale;
            if (t == 0 && row < tokens) lse[head0 + row] = empty ? -INFINITY : largest[m][r] * LN_2 + logf(whole);
        }
    }
    real* to = out + (long long)b * tokens * out_ld + (long long)head * width;
    store_sum(to, out_ld, tokens, width, row0, 0, sum, factor, queries, own);
}

// out = softmax(scale * q . k) * v, lse = log of the softmax's denominator.
extern "C" __device__ unsigned WORD(attention64_forward_f32) = tiles_bytes<64>(1, 16 * 2 * WARPS, FORWARD64_KEYS);
extern "C" __global__ void __launch_bounds__(THREADS, 2)
attention64_forward_f32(FORWARD_PARAMETERS) {
    forward<64, 2, FORWARD64_KEYS>(FORWARD_ARGUMENTS);
}

extern "C" __device__ unsigned WORD(attention128_forward_f32) = tiles_bytes<128>(1, 16 * 2 * WARPS, 32);
extern "C" __global__ void __launch_bounds__(THREADS, 2)
attention128_forward_f32(FORWARD_PARAMETERS) {
    forward<128, 2, FORWARD128_KEYS>(FORWARD_ARGUMENTS);
}

#ifndef F16
extern "C" __device__ unsigned WORD(attention256_forward_f32) = tiles_bytes<256>(1, 16 * 1 * WARPS, 32);
extern "C" __global__ void __launch_bounds__(THREADS, 2)
attention256_forward_f32(FORWARD_PARAMETERS) {
    forward<256, 1, 32>(FORWARD_ARGUMENTS);
}
#endif

// ---- Backward ------------------------------------------------------------------------------------------------------

// The sum of the products of eight columns.
__device__ __forceinline__ float dot8(uint4 a, uint4 b) {
    unsigned x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        sum += low_of(x[n]) * low_of(y[n]);
        sum += high_of(x[n]) * high_of(y[n]);
    }
    return sum;
}

// delta[b, h, i] = dout[b, i, h] . out[b, i, h], which is the sum over j of p[i, j] * dp[i, j]. Eight lanes have a row.
extern "C" __global__ void __launch_bounds__(THREADS)
attention_delta_backward_f32(const real* __restrict__ dout, const real* __restrict__ out, float* __restrict__ delta, int batch,
                              int tokens, int heads, int width, int dout_ld, int out_ld) {
    int n = blockIdx.x * (THREADS / 8) + threadIdx.x / 8, b = n / tokens / heads, head = n / tokens % heads;
    long long row = (long long)b * tokens + n % tokens;
    float sum = 0.f;
    for (int c = 8 * (threadIdx.x % 8); b < batch && c < width; c += 64) {
        uint4 x = *reinterpret_cast<const uint4*>(dout + row * dout_ld + (long long)head * width + c);
        uint4 y = *reinterpret_cast<const uint4*>(out + row * out_ld + (long long)head * width + c);
        sum += dot8(x, y);
    }
#pragma unroll
    for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
    if (b < batch && threadIdx.x % 8 == 0) delta[n] = sum;
}

// dq = scale * sum over j of p * (dp * keep - delta) * k[j]. A query that sees nothing is in no tile that all see, and its
// probabilities, which depend on no score, are hidden there.
template <int WIDTH, int M, int KEYS>
__device__ __forceinline__ void dq_backward(DQ_PARAMETERS) {
    extern __shared__ __align__(128) uint4 shared[];
    constexpr int ROWS = 16 * M * WARPS, N = KEYS / 8, SIDE = KEYS * WIDTH / 8;
    Tile<WIDTH> queries = {shared}, douts = {shared + ROWS * WIDTH / 8};
    uint4* stages = shared + 2 * ROWS * WIDTH / 8;
    int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    int query0 = (gridDim.x - 1 - blockIdx.x) * ROWS;
    int head = blockIdx.y, kv_head = head / (heads / kv_heads), b = blockIdx.z;
    Rows<real> ks = head_rows(k, k_ld, b, kv_head, tokens, width), vs = head_rows(v, v_ld, b, kv_head, tokens, width);
    Mask mask = {segments ? segments + (long long)b * tokens : nullptr, tokens, causal, window, prefix ? prefix[b] : 0};
    int own = 16 * M * warp, row0 = query0 + own;
    long long head0 = ((long long)b * heads + head) * tokens;

    float sum[M][WIDTH / 8][4], row_lse[M][2], row_delta[M][2], factor[M][2];
    clear(sum);
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int row = row0 + 16 * m + g + 8 * r;
            row_lse[m][r] = row < tokens ? LOG2_E * lse[head0 + row] : 0.f;
            row_delta[m][r] = row < tokens ? delta[head0 + row] : 0.f;
            factor[m][r] = scale;
        }
    }
    int first = mask.first_key(query0), end = mask.end_key(query0 + ROWS);
    queries.template fetch<ROWS>(head_rows(q, q_ld, b, head, tokens, width), query0);
    douts.template fetch<ROWS>(head_rows(dout, dout_ld, b, head, tokens, width), query0);
    Tile<WIDTH>{stages}.template fetch<KEYS>(ks, first);
    Tile<WIDTH>{stages + SIDE}.template fetch<KEYS>(vs, first);
    for (int key0 = first, stage = 0; key0 < end; key0 += KEYS, stage ^= 1) {
        Tile<WIDTH> keys = {stages + 2 * stage * SIDE}, values = {keys.at + SIDE};
        arrive();
        __syncthreads();  // these keys and values are there, the last ones used up
        if (key0 + KEYS < end) {
            uint4* next = stages + 2 * (stage ^ 1) * SIDE;
            Tile<WIDTH>{next}.template fetch<KEYS>(ks, key0 + KEYS);
            Tile<WIDTH>{next + SIDE}.template fetch<KEYS>(vs, key0 + KEYS);
        }
        if (!mask.some(row0, 16 * M, key0, KEYS)) continue;
        int row = row0 + g, col = key0 + 2 * t;
        bool all = mask.all(row0, 16 * M, key0, KEYS);
        unsigned seen[M], kept[M];
        if (!all) choose<M, N>(seen, [&](int r, int c) { return mask.sees(row + r, col + c); });
        if (rng) {
            Keep keep = keep_rule(rng, stream, dropout_p, 1.f);
            choose<M, N>(kept, [&](int r, int c) { return keep1(keep, rng, (head0 + row + r) * tokens + col + c) != 0.f; });
        }
        float x[M][N][4];
        dot_rows(x, queries, own, keys);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            float bias[2] = {0.f, 0.f};
            if (key_bias) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    if (col + 8 * n + e < tokens) bias[e] = LOG2_E * key_bias[head0 + col + 8 * n + e];
                }
            }
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float above = row_lse[m][e / 2];
                    if (key_bias) above -= bias[e % 2];
                    x[m][n][e] = exp2f(x[m][n][e] * (scale * LOG2_E) - above);
                    if (!all && !bit(seen[m], n, e)) x[m][n][e] = 0.f;
                }
            }
        }
        Weights<M, N> p(x);
        dot_rows(x, douts, own, values);
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    if (rng) x[m][n][e] = bit(kept[m], n, e) ? x[m][n][e] * dropout_scale : 0.f;
                    x[m][n][e] = p.at(m, n, e) * (x[m][n][e] - row_delta[m][e / 2]);
                }
            }
        }
        add_weighted(sum, Weights<M, N>(x), keys);
    }
    arrive();
    real* to = dq + (long long)b * tokens * dq_ld + (long long)head * width;
    store_sum(to, dq_ld, tokens, width, row0, 0, sum, factor, queries, own);
}

extern "C" __device__ unsigned WORD(attention64_dq_backward_f32) = tiles_bytes<64>(2, 16 * 2 * WARPS, 32);
extern "C" __global__ void __launch_bounds__(THREADS, 2)
attention64_dq_backward_f32(DQ_PARAMETERS) {
    dq_backward<64, 2, 32>(DQ_ARGUMENTS);
}

extern "C" __device__ unsigned WORD(attention128_dq_backward_f32) = tiles_bytes<128>(2, 16 * DQ128_PIECES * WARPS, 32);
extern "C" __global__ void __launch_bounds__(THREADS, 2)
attention128_dq_backward_f32(DQ_PARAMETERS) {
    dq_backward<128, DQ128_PIECES, 32>(DQ_ARGUMENTS);
}

#ifndef F16
extern "C" __device__ unsigned WORD(attention256_dq_backward_f32) = tiles_bytes<256>(2, 16 * 1 * WARPS, 16);
extern "C" __global__ void __launch_bounds__(THREADS, 2)
attention256_dq_backward_f32(DQ_PARAMETERS) {
    dq_backward<256, 1, 16>(DQ_ARGUMENTS);
}
#endif

// dk = scale * sum over i of p * (dp * keep - delta) * q[i], dv = sum over i of p * keep * dout[i], over all query heads of a
// key-value head. Rows of a tile are keys here, columns queries. A block has COLS columns of the result, and scores anew for
// each such part of a head.
template <int WIDTH, int COLS, int M, int QUERIES>
__device__ __forceinline__ void dkv_backward(DKV_PARAMETERS) {
    extern __shared__ __align__(128) uint4 shared[];
    constexpr int ROWS = 16 * M * WARPS, N = QUERIES / 8, SIDE = QUERIES * WIDTH / 8;
    Tile<WIDTH> keys = {shared}, values = {shared + ROWS * WIDTH / 8};
    uint4* stages = shared + 2 * ROWS * WIDTH / 8;
    float* sides = reinterpret_cast<float*>(stages + 4 * SIDE);  // lse and delta of a stage's queries
    int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    int key0 = blockIdx.x * ROWS, kv_head = blockIdx.y, group = heads / kv_heads;
    int b = blockIdx.z % batch, col0 = blockIdx.z / batch * COLS;
    Mask mask = {segments ? segments + (long long)b * tokens : nullptr, tokens, causal, window, prefix ? prefix[b] : 0};
    int own = 16 * M * warp, row0 = key0 + own;

    float dks[M][COLS / 8][4], dvs[M][COLS / 8][4], scales[M][2], kept_scales[M][2];
    clear(dks);
    clear(dvs);
#pragma unroll
    for (int m = 0; m < M; ++m) scales[m][0] = scales[m][1] = scale, kept_scales[m][0] = kept_scales[m][1] = rng ? dropout_scale : 1.f;

    int first = mask.first_query(key0), end = mask.end_query(min(key0 + ROWS, tokens));
    int per_head = (end - first + QUERIES - 1) / QUERIES, visits = group * per_head;
    auto fetch = [&](int visit, int stage) {
        int head = kv_head * group + visit / per_head, query0 = first + visit % per_head * QUERIES;
        uint4* at = stages + 2 * stage * SIDE;
        Tile<WIDTH>{at}.template fetch<QUERIES>(head_rows(q, q_ld, b, head, tokens, width), query0);
        Tile<WIDTH>{at + SIDE}.template fetch<QUERIES>(head_rows(dout, dout_ld, b, head, tokens, width), query0);
        if (threadIdx.x < 2 * QUERIES) {
            int query = query0 + threadIdx.x % QUERIES;
            const float* from = threadIdx.x < QUERIES ? lse : delta;
            bool inside = query < tokens;
            copy4(sides + 2 * stage * QUERIES + threadIdx.x, inside ? from + ((long long)b * heads + head) * tokens + query : from, inside);
        }
    };
    keys.template fetch<ROWS>(head_rows(k, k_ld, b, kv_head, tokens, width), key0);
    values.template fetch<ROWS>(head_rows(v, v_ld, b, kv_head, tokens, width), key0);
    fetch(0, 0);
    for (int visit = 0; visit < visits; ++visit) {
        int stage = visit % 2, query0 = first + visit % per_head * QUERIES;
        long long head0 = ((long long)b * heads + kv_head * group + visit / per_head) * tokens;
        Tile<WIDTH> queries = {stages + 2 * stage * SIDE}, douts = {queries.at + SIDE};
        const float* row_lse = sides + 2 * stage * QUERIES;
        arrive();
        __syncthreads();  // these queries are there, the last ones used up
        if (visit + 1 < visits) fetch(visit + 1, stage ^ 1);
        if (!mask.some(query0, QUERIES, row0, 16 * M)) continue;
        int row = row0 + g, col = query0 + 2 * t;
        bool all = mask.all(query0, QUERIES, row0, 16 * M);
        unsigned seen[M], kept[M];
        if (!all) choose<M, N>(seen, [&](int r, int c) { return mask.sees(col + c, row + r); });
        if (rng) {
            Keep keep = keep_rule(rng, stream, dropout_p, 1.f);
            choose<M, N>(kept, [&](int r, int c) { return keep1(keep, rng, (head0 + col + c) * tokens + row + r) != 0.f; });
        }
        float x[M][N][4];
        dot_rows(x, keys, own, queries);
        float unit = scale * LOG2_E;
        if (key_bias) {
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    int key = row + 16 * m + 8 * r;
                    float bias = key < tokens ? LOG2_E * key_bias[head0 + key] : 0.f;
#pragma unroll
                    for (int n = 0; n < N; ++n) {
                        x[m][n][2 * r] = x[m][n][2 * r] * unit + bias;
                        x[m][n][2 * r + 1] = x[m][n][2 * r + 1] * unit + bias;
                    }
                }
            }
            unit = 1.f;
        }
#pragma unroll
        for (int n = 0; n < N; ++n) {
            float2 lses = *reinterpret_cast<const float2*>(row_lse + 8 * n + 2 * t);
            float above[2] = {LOG2_E * lses.x, LOG2_E * lses.y};
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    x[m][n][e] = exp2f(x[m][n][e] * unit - above[e % 2]);
                    if (!all && !bit(seen[m], n, e)) x[m][n][e] = 0.f;
                }
            }
        }
        Weights<M, N> p(x);
        add_weighted(dvs, rng ? only(p, kept) : p, douts, col0);
        dot_rows(x, values, own, douts);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            float2 deltas = *reinterpret_cast<const float2*>(row_lse + QUERIES + 8 * n + 2 * t);
            float along[2] = {deltas.x, deltas.y};
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    if (rng) x[m][n][e] = bit(kept[m], n, e) ? x[m][n][e] * dropout_scale : 0.f;
                    x[m][n][e] = p.at(m, n, e) * (x[m][n][e] - along[e % 2]);
                }
            }
        }
        add_weighted(dks, Weights<M, N>(x), queries, col0);
    }
    arrive();
    // Queries that see nothing: every key has a share of them, wherever it lies.
    for (int head = kv_head * group; segments && head < (kv_head + 1) * group; ++head) {
        Rows<real> dos = head_rows(dout, dout_ld, b, head, tokens, width);
        long long head0 = ((long long)b * heads + head) * tokens;
        Tile<WIDTH> douts = {stages};
        Keep keep;
        if (rng) keep = keep_rule(rng, stream, dropout_p, 1.f);
        for (int query0 = 0; query0 < tokens; query0 += 16) {
            float p[M][2][4];
            bool some = false;
#pragma unroll
            for (int n = 0; n < 2; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    int query = query0 + 8 * n + 2 * t + e % 2;
                    bool blind = query < tokens && lse[head0 + query] == -INFINITY;
                    some |= blind;
#pragma unroll
                    for (int m = 0; m < M; ++m) {
                        int key = row0 + 16 * m + g + e / 2 * 8;
                        p[m][n][e] = mask.blind_weight(blind, key) * keep1(keep, rng, (head0 + query) * tokens + key);
                    }
                }
            }
            if (!__syncthreads_or(some)) continue;
            douts.template fetch<16>(dos, query0);
            arrive();
            __syncthreads();
            add_weighted(dvs, Weights<M, 2>(p), douts, col0);
        }
    }
    store_sum(dk + (long long)b * tokens * dk_ld + (long long)kv_head * width, dk_ld, tokens, width, row0, col0, dks, scales, keys, own);
    store_sum(dv + (long long)b * tokens * dv_ld + (long long)kv_head * width, dv_ld, tokens, width, row0, col0, dvs, kept_scales, values, own);
}

extern "C" __device__ unsigned WORD(attention64_dkv_backward_f32) = tiles_bytes<64>(2, 16 * 2 * WARPS, 32) + 16 * 32;
extern "C" __global__ void __launch_bounds__(THREADS, 2)
attention64_dkv_backward_f32(DKV_PARAMETERS) {
    dkv_backward<64, 64, 2, 32>(DKV_ARGUMENTS);
}

extern "C" __device__ unsigned WORD(attention128_dkv_backward_f32) = tiles_bytes<128>(2, 16 * 1 * WARPS, DKV128_QUERIES) + 16 * DKV128_QUERIES;
extern "C" __global__ void __launch_bounds__(THREADS, 2)
attention128_dkv_backward_f32(DKV_PARAMETERS) {
    dkv_backward<128, 128, 1, DKV128_QUERIES>(DKV_ARGUMENTS);
}

#ifndef F16
extern "C" __device__ unsigned WORD(attention256_dkv_backward_f32) = tiles_bytes<256>(2, 16 * 1 * WARPS, 16) + 16 * 16;
extern "C" __global__ void __launch_bounds__(THREADS, 2)
attention256_dkv_backward_f32(DKV_PARAMETERS) {
    dkv_backward<256, 128, 1, 16>(DKV_ARGUMENTS);
}
#endif
