// Attention on the tensor cores of compute capability 9.0 (Hopper), in bfloat16: kernels of the names, arguments and grids of
// attention_mma.cu, which take their place there. Masks, dropout, optional operands and what is rounded are the same.
//
// Compiled for sm_90a. D a multiple of 8; rows of every bfloat16 operand at multiples of 16 bytes. The number in a kernel's
// name is the widest head it takes.
//
// Launch: block = 128, with tiles(n) = ceil(T / n):
//   attention64_forward_bf16, attention64_dq_backward_bf16, and those of 128    grid = (tiles(128), H, B).
//   attention256_forward_bf16, attention256_dq_backward_bf16                    grid = (tiles(64), H, B).
//   attention64_dkv_backward_bf16                                               grid = (tiles(128), K, B).
//   attention128_dkv_backward_bf16                                              grid = (tiles(64), K, B).
//   attention256_dkv_backward_bf16                                              grid = (tiles(64), K, 2 B).
// Shared memory: dynamic; a word <kernel>_shared beside each kernel says how many bytes. At most 193 KB.
//
// A block is a warpgroup, and has M times 64 rows of the result. Its products are wgmma.m64nNk16, which go on by themselves:
// scores of 64 rows and a whole tile of the other side, then their sums with the tile's rows, 64 columns at a time. Both
// factors of scores lie in shared memory; probabilities go from one product to the next in registers: lane (g, t) of warp w
// holds columns 2 t and 2 t + 1 of rows 16 w + g and 16 w + g + 8 of each eight columns of a result, and two neighbouring
// results are the first factor of the next product as they lie. What of a product's registers is touched before it is waited
// for, the compiler finds: it then runs one product after the other and says so, which the tests refuse.
// Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions", and Dao 2023, "FlashAttention-2",
// section 3.3.

// ---- Products of a warpgroup ---------------------------------------------------------------------------------------

#define QUAD(x) "+f"((x)[0]), "+f"((x)[1]), "+f"((x)[2]), "+f"((x)[3])
#define QUADS(x) QUAD((x)[0]), QUAD((x)[1]), QUAD((x)[2]), QUAD((x)[3])
#define FOUR_QUADS "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define EIGHT_QUADS FOUR_QUADS ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

// sum [64, 8 N] = a [64, 16] . b [8 N, 16] turned, or += where it ADDs to what is there; descriptors of tiles.
template <bool ADD>
__device__ __forceinline__ void multiply(float (&sum)[4][4], unsigned long long a, unsigned long long b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" FOUR_QUADS "}, %16, %17, %18, 1, 1, 0, 0;"
                 : QUADS(sum) : "l"(a), "l"(b), "n"(ADD));
#endif
}

template <bool ADD>
__device__ __forceinline__ void multiply(float (&sum)[8][4], unsigned long long a, unsigned long long b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" EIGHT_QUADS "}, %32, %33, %34, 1, 1, 0, 0;"
                 : QUADS(sum), QUADS(sum + 4) : "l"(a), "l"(b), "n"(ADD));
#endif
}

// sum [64, 64] += a [64, 16], in registers, . b [16, 64].
__device__ __forceinline__ void multiply(float (&sum)[8][4], const unsigned (&a)[4], unsigned long long b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" EIGHT_QUADS "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : QUADS(sum), QUADS(sum + 4) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#endif
}

// Keeps the compiler from moving what it does with registers past a place: past the begin of products, or their end.
template <int N>
__device__ __forceinline__ void hold(float (&x)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) asm volatile("" : QUAD(x[n])::"memory");
}

template <int C>
__device__ __forceinline__ void hold(float (&x)[C][8][4]) {
#pragma unroll
    for (int c = 0; c < C; ++c) hold(x[c]);
}

__device__ __forceinline__ void begin() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void commit() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Until no more than the last LEFT groups are under way.
template <int LEFT>
__device__ __forceinline__ void wait() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
#endif
}

// Shows products what this thread has written to shared memory; a barrier must follow.
__device__ __forceinline__ void show() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- Tiles ---------------------------------------------------------------------------------------------------------

// ROWS rows of a head in shared memory, in panels of 64 columns: rows of 128 bytes, in which chunk c of eight columns lies at
// place c ^ r % 8, the pattern of wgmma's 128-byte swizzle. A panel begins at a multiple of 1024 bytes.
template <int WIDTH, int ROWS>
struct Tile {
    static constexpr int CHUNKS = WIDTH / 8;
    uint4* at;

    __device__ __forceinline__ uint4* chunk(int row, int c) const { return at + (c / 8 * ROWS + row) * 8 + (c % 8 ^ row % 8); }

    // Begins to copy rows from .. of x, 0 outside.
    __device__ __forceinline__ void fetch(const Rows<real>& x, int from) const {
#pragma unroll 1  // addresses of more copies would take the registers of the sums
        for (int n = threadIdx.x; n < ROWS * CHUNKS; n += THREADS) {
            int r = n / CHUNKS, c = n % CHUNKS;
            bool inside = from + r < x.rows && 8 * c < x.width;
            copy16(chunk(r, c), inside ? x.x + (long long)(from + r) * x.ld + 8 * c : x.x, inside);
        }
    }

    // A factor that begins at (row, col): 16 columns of rows, or turned, 16 rows of 64 columns. Groups of eight rows are 1024
    // bytes apart; the field of what lies a panel further is not read.
    __device__ __forceinline__ unsigned long long factor(int row, int col) const {
        unsigned start = (unsigned)__cvta_generic_to_shared(at) + (col / 64 * ROWS + row) * 128 + col % 64 * 2;
        return 1ull << 62 | 64ull << 32 | start >> 4;
    }
};

// Begins product [64, 8 N] = 64 rows of x from `row` on . rows of y, over the head's columns.
template <int N, int WIDTH, int ROWS>
__device__ __forceinline__ void dot_rows(float (&product)[N][4], const Tile<WIDTH, ROWS>& x, int row, const Tile<WIDTH, 8 * N>& y) {
    multiply<false>(product, x.factor(row, 0), y.factor(0, 0));
#pragma unroll
    for (int k = 16; k < WIDTH; k += 16) multiply<true>(product, x.factor(row, k), y.factor(0, k));
    commit();
}

// A result [64, 8 N] as bfloat16, two columns to a word, as first factors of 16 columns.
template <int N>
struct Weights {
    unsigned words[N / 2][4];

    __device__ __forceinline__ Weights() {}
    __device__ __forceinline__ explicit Weights(const float (&x)[N][4]) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            words[n / 2][n % 2 * 2] = narrow(x[n][0], x[n][1]);
            words[n / 2][n % 2 * 2 + 1] = narrow(x[n][2], x[n][3]);
        }
    }

    __device__ __forceinline__ float at(int n, int e) const {
        unsigned word = words[n / 2][n % 2 * 2 + e / 2];
        return e % 2 ? high_of(word) : low_of(word);
    }

    __device__ __forceinline__ void hold() {
#pragma unroll
        for (int n = 0; n < N / 2; ++n) {
            asm volatile("" : "+r"(words[n][0]), "+r"(words[n][1]), "+r"(words[n][2]), "+r"(words[n][3])::"memory");
        }
    }
};

// Begins sum [64, 64 C] += weights [64, 8 N] . columns `col` .. of x.
template <int N, int C, int WIDTH>
__device__ __forceinline__ void add_weighted(float (&sum)[C][8][4], const Weights<N>& weights, const Tile<WIDTH, 8 * N>& x, int col = 0) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
        for (int k = 0; k < N / 2; ++k) multiply(sum[c], weights.words[k], x.factor(16 * k, col + 64 * c));
    }
}

// The same, until the sum is there.
template <int N, int C, int WIDTH>
__device__ __forceinline__ void add_now(float (&sum)[C][8][4], Weights<N>& weights, const Tile<WIDTH, 8 * N>& x, int col = 0) {
    weights.hold();
    hold(sum);
    begin();
    add_weighted(sum, weights, x, col);
    commit();
    wait<0>();
    hold(sum);
}

template <int C>
__device__ __forceinline__ void clear(float (&sum)[C][8][4]) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
        for (int n = 0; n < 8; ++n) sum[c][n][0] = sum[c][n][1] = sum[c][n][2] = sum[c][n][3] = 0.f;
    }
}

// to[from + r][col + c] = sum[r][c] * factor[r] for 64 rows, inside the head. They pass through the rows of `tile` from `row`
// on, which no other warp may use any more.
template <int C, int WIDTH, int ROWS>
__device__ __forceinline__ void store_sum(real* to, int ld, int rows, int width, int from, int col, const float (&sum)[C][8][4],
                                          float factor0, float factor8, const Tile<WIDTH, ROWS>& tile, int row) {
    int lane = threadIdx.x % WARP, own = threadIdx.x / WARP * 16, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float factor = r ? factor8 : factor0;
#pragma unroll
        for (int n = 0; n < 8 * C; ++n) {
            unsigned* p = reinterpret_cast<unsigned*>(tile.chunk(row + own + 8 * r + g, n));
            p[t] = narrow(sum[n / 8][n % 8][2 * r] * factor, sum[n / 8][n % 8][2 * r + 1] * factor);
        }
    }
    __syncwarp();
#pragma unroll 4
    for (int n = lane; n < 128 * C; n += WARP) {
        int r = own + n / (8 * C), c = n % (8 * C);
        if (from + r < rows && col + 8 * c < width) {
            *reinterpret_cast<uint4*>(to + (long long)(from + r) * ld + col + 8 * c) = *tile.chunk(row + r, c);
        }
    }
}

// Bit 4 n + e: whether element e of result n is `chosen`. In a loop that is not unrolled, since masks and dropout would
// otherwise take the registers of the sums.
template <int N, class F>
__device__ __forceinline__ unsigned choose(F chosen) {
    unsigned bits = 0;
#pragma unroll 1
    for (int i = 0; i < 4 * N; ++i) bits |= (unsigned)chosen(i / 2 % 2 * 8, i / 4 * 8 + i % 2) << i;
    return bits;
}

// Zeros where a bit is not set.
template <int N>
__device__ __forceinline__ Weights<N> only(const Weights<N>& x, unsigned bits) {
    Weights<N> y;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            unsigned low = bit(bits, n, 2 * r) ? 0xffffu : 0u, high = bit(bits, n, 2 * r + 1) ? 0xffff0000u : 0u;
            y.words[n / 2][n % 2 * 2 + r] = x.words[n / 2][n % 2 * 2 + r] & (low | high);
        }
    }
    return y;
}

// ---- Forward -------------------------------------------------------------------------------------------------------

template <int WIDTH, int M, int KEYS>
__device__ __forceinline__ void forward(FORWARD_PARAMETERS) {
    extern __shared__ __align__(1024) uint4 shared[];
    constexpr int ROWS = 64 * M, N = KEYS / 8, C = WIDTH / 64, SIDE = KEYS * WIDTH / 8;
    Tile<WIDTH, ROWS> queries = {shared};
    uint4* stages = shared + ROWS * WIDTH / 8;
    int own = threadIdx.x / WARP * 16 + threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    // The last queries see the most keys: begin with them.
    int query0 = (gridDim.x - 1 - blockIdx.x) * ROWS;
    int head = blockIdx.y, kv_head = head / (heads / kv_heads), b = blockIdx.z;
    Rows<real> ks = head_rows(k, k_ld, b, kv_head, tokens, width), vs = head_rows(v, v_ld, b, kv_head, tokens, width);
    Mask mask = {segments ? segments + (long long)b * tokens : nullptr, tokens, causal, window, prefix ? prefix[b] : 0};
    long long head0 = ((long long)b * heads + head) * tokens;
    scale *= LOG2_E;

    float sum[M][C][8][4], largest[M][2], denominator[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m) {
        clear(sum[m]);
        largest[m][0] = largest[m][1] = -INFINITY;
        denominator[m][0] = denominator[m][1] = 0.f;
    }
    int first = mask.first_key(query0), end = mask.end_key(query0 + ROWS);
    auto fetch = [&](int key0, int stage) {
        uint4* at = stages + 2 * stage * SIDE;
        Tile<WIDTH, KEYS>{at}.fetch(ks, key0);
        Tile<WIDTH, KEYS>{at + SIDE}.fetch(vs, key0);
    };
    queries.fetch(head_rows(q, q_ld, b, head, tokens, width), query0);
    fetch(first, 0);
#pragma unroll 1
    for (int key0 = first, stage = 0; key0 < end; key0 += KEYS, stage ^= 1) {
        Tile<WIDTH, KEYS> keys = {stages + 2 * stage * SIDE}, values = {keys.at + SIDE};
        arrive();
        show();
        __syncthreads();  // these keys and values are there, the last ones used up
        if (key0 + KEYS < end) fetch(key0 + KEYS, stage ^ 1);
#pragma unroll
        for (int m = 0; m < M; ++m) {
            int row0 = query0 + 64 * m, row = row0 + own, col = key0 + 2 * t;
            if (!mask.some(row0, 64, key0, KEYS)) continue;
            bool all = mask.all(row0, 64, key0, KEYS);
            unsigned seen = 0, kept = 0;
            if (!all) seen = choose<N>([&](int r, int c) { return mask.sees(row + r, col + c); });
            if (rng) {
                Keep keep = keep_rule(rng, stream, dropout_p, 1.f);
                kept = choose<N>([&](int r, int c) { return keep1(keep, rng, (head0 + row + r) * tokens + col + c) != 0.f; });
            }
            float p[N][4];
            hold(p);
            begin();
            dot_rows(p, queries, 64 * m, keys);
            wait<0>();
            hold(p);
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
                for (int e = 0; e < 4; ++e) {
                    p[n][e] = p[n][e] * scale;
                    if (key_bias) p[n][e] += bias[e % 2];
                    if (!all && !bit(seen, n, e)) p[n][e] = -INFINITY;
                }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float above = largest[m][r];
#pragma unroll
                for (int n = 0; n < N; ++n) above = fmaxf(above, fmaxf(p[n][2 * r], p[n][2 * r + 1]));
                above = row_max(above);
                // A row that has seen nothing yet: exp(-inf - 0) = 0 throughout.
                float shift = above == -INFINITY ? 0.f : above, correction = exp2f(largest[m][r] - shift), total = 0.f;
#pragma unroll
                for (int n = 0; n < N; ++n) {
#pragma unroll
                    for (int e = 2 * r; e < 2 * r + 2; ++e) {
                        p[n][e] = exp2f(p[n][e] - shift);
                        total += p[n][e];
                    }
                }
                denominator[m][r] = denominator[m][r] * correction + total;
                largest[m][r] = above;
#pragma unroll
                for (int n = 0; n < 8 * C; ++n) {
                    sum[m][n / 8][n % 8][2 * r] *= correction;
                    sum[m][n / 8][n % 8][2 * r + 1] *= correction;
                }
            }
            Weights<N> weights(p);
            if (rng) weights = only(weights, kept);
            add_now(sum[m], weights, values);
        }
    }
    arrive();

    bool blind = false;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) blind |= query0 + 64 * m + own + 8 * r < tokens && largest[m][r] == -INFINITY;
    }
    if (segments && __syncthreads_or(blind)) {
        Tile<WIDTH, 16> values = {stages};
        Keep keep;
        if (rng) keep = keep_rule(rng, stream, dropout_p, 1.f);
#pragma unroll 1
        for (int key0 = 0; key0 < tokens; key0 += 16) {
            __syncthreads();  // the last values are used up
            values.fetch(vs, key0);
            arrive();
            show();
            __syncthreads();
#pragma unroll
            for (int m = 0; m < M; ++m) {
                float p[2][4];
#pragma unroll
                for (int n = 0; n < 2; ++n) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        int key = key0 + 8 * n + 2 * t + e % 2;
                        long long query = head0 + query0 + 64 * m + own + e / 2 * 8;
                        p[n][e] = mask.blind_weight(largest[m][e / 2] == -INFINITY, key);
                        p[n][e] *= keep1(keep, rng, query * tokens + key);
                    }
                }
                Weights<2> weights(p);
                add_now(sum[m], weights, values);
            }
        }
    }

    real* to = out + (long long)b * tokens * out_ld + (long long)head * width;
    __syncthreads();  // the queries are used up
#pragma unroll
    for (int m = 0; m < M; ++m) {
        float factor[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int row = query0 + 64 * m + own + 8 * r;
            bool empty = largest[m][r] == -INFINITY;
            float whole = row_sum(denominator[m][r]);
            factor[r] = empty ? 1.f : 1.f / whole;
            if (rng) factor[r] *= dropout_scale;
            if (t == 0 && row < tokens) lse[head0 + row] = empty ? -INFINITY : largest[m][r] * LN_2 + logf(whole);
        }
        store_sum(to, out_ld, tokens, width, query0 + 64 * m, 0, sum[m], factor[0], factor[1], queries, 64 * m);
    }
}

// out = softmax(scale * q . k) * v, lse = log of the softmax's denominator.
extern "C" __device__ unsigned WORD(attention64_forward_f32) = tiles_bytes<64>(1, 128, 64);
extern "C" __global__ void __launch_bounds__(THREADS, 3)
attention64_forward_f32(FORWARD_PARAMETERS) {
    forward<64, 2, 64>(FORWARD_ARGUMENTS);
}

extern "C" __device__ unsigned WORD(attention128_forward_f32) = tiles_bytes<128>(1, 128, 64);
extern "C" __global__ void __launch_bounds__(THREADS, 2)
attention128_forward_f32(FORWARD_PARAMETERS) {
    forward<128, 2, 64>(FORWARD_ARGUMENTS);
}

extern "C" __device__ unsigned WORD(attention256_forward_f32) = tiles_bytes<256>(1, 64, 32);
extern "C" __global__ void __launch_bounds__(THREADS, 2)
attention256_forward_f32(FORWARD_PARAMETERS) {
    forward<256, 1, 32>(FORWARD_ARGUMENTS);
}

// ---- Backward ------------------------------------------------------------------------------------------------------

// dq = scale * sum over j of p * (dp * keep - delta) * k[j]. A query that sees nothing is in no tile that all see, and its
// probabilities, which depend on no score, are hidden there.
template <int WIDTH, int M, int KEYS>
__device__ __forceinline__ void dq_backward(DQ_PARAMETERS) {
    extern __shared__ __align__(1024) uint4 shared[];
    constexpr int ROWS = 64 * M, N = KEYS / 8, C = WIDTH / 64, SIDE = KEYS * WIDTH / 8;
    Tile<WIDTH, ROWS> queries = {shared}, douts = {shared + ROWS * WIDTH / 8};
    uint4* stages = shared + 2 * ROWS * WIDTH / 8;
    int own = threadIdx.x / WARP * 16 + threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    int query0 = (gridDim.x - 1 - blockIdx.x) * ROWS;
    int head = blockIdx.y, kv_head = head / (heads / kv_heads), b = blockIdx.z;
    Rows<real> ks = head_rows(k, k_ld, b, kv_head, tokens, width), vs = head_rows(v, v_ld, b, kv_head, tokens, width);
    Mask mask = {segments ? segments + (long long)b * tokens : nullptr, tokens, causal, window, prefix ? prefix[b] : 0};
    long long head0 = ((long long)b * heads + head) * tokens;

    float sum[M][C][8][4], row_lse[M][2], row_delta[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m) {
        clear(sum[m]);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int row = query0 + 64 * m + own + 8 * r;
            row_lse[m][r] = row < tokens ? LOG2_E * lse[head0 + row] : 0.f;
            row_delta[m][r] = row < tokens ? delta[head0 + row] : 0.f;
        }
    }
    int first = mask.first_key(query0), end = mask.end_key(query0 + ROWS);
    auto fetch = [&](int key0, int stage) {
        uint4* at = stages + 2 * stage * SIDE;
        Tile<WIDTH, KEYS>{at}.fetch(ks, key0);
        Tile<WIDTH, KEYS>{at + SIDE}.fetch(vs, key0);
    };
    queries.fetch(head_rows(q, q_ld, b, head, tokens, width), query0);
    douts.fetch(head_rows(dout, dout_ld, b, head, tokens, width), query0);
    fetch(first, 0);
#pragma unroll 1
    for (int key0 = first, stage = 0; key0 < end; key0 += KEYS, stage ^= 1) {
        Tile<WIDTH, KEYS> keys = {stages + 2 * stage * SIDE}, values = {keys.at + SIDE};
        arrive();
        show();
        __syncthreads();  // these keys and values are there, the last ones used up
        if (key0 + KEYS < end) fetch(key0 + KEYS, stage ^ 1);
#pragma unroll
        for (int m = 0; m < M; ++m) {
            int row0 = query0 + 64 * m, row = row0 + own, col = key0 + 2 * t;
            if (!mask.some(row0, 64, key0, KEYS)) continue;
            bool all = mask.all(row0, 64, key0, KEYS);
            unsigned seen = 0, kept = 0;
            if (!all) seen = choose<N>([&](int r, int c) { return mask.sees(row + r, col + c); });
            if (rng) {
                Keep keep = keep_rule(rng, stream, dropout_p, 1.f);
                kept = choose<N>([&](int r, int c) { return keep1(keep, rng, (head0 + row + r) * tokens + col + c) != 0.f; });
            }
            float x[N][4], y[N][4];
            hold(x);
            hold(y);
            begin();
            dot_rows(x, queries, 64 * m, keys);
            dot_rows(y, douts, 64 * m, values);
            wait<1>();
            hold(x);
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
                for (int e = 0; e < 4; ++e) {
                    float above = row_lse[m][e / 2];
                    if (key_bias) above -= bias[e % 2];
                    x[n][e] = exp2f(x[n][e] * (scale * LOG2_E) - above);
                    if (!all && !bit(seen, n, e)) x[n][e] = 0.f;
                }
            }
            Weights<N> p(x);
            wait<0>();
            hold(y);
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    if (rng) y[n][e] = bit(kept, n, e) ? y[n][e] * dropout_scale : 0.f;
                    y[n][e] = p.at(n, e) * (y[n][e] - row_delta[m][e / 2]);
                }
            }
            Weights<N> weights(y);
            add_now(sum[m], weights, keys);
        }
    }
    arrive();
    real* to = dq + (long long)b * tokens * dq_ld + (long long)head * width;
    __syncthreads();  // the queries are used up
#pragma unroll
    for (int m = 0; m < M; ++m) {
        store_sum(to, dq_ld, tokens, width, query0 + 64 * m, 0, sum[m], scale, scale, queries, 64 * m);
    }
}

extern "C" __device__ unsigned WORD(attention64_dq_backward_f32) = tiles_bytes<64>(2, 128, 64);
extern "C" __global__ void __launch_bounds__(THREADS, 3)
attention64_dq_backward_f32(DQ_PARAMETERS) {
    dq_backward<64, 2, 64>(DQ_ARGUMENTS);
}

extern "C" __device__ unsigned WORD(attention128_dq_backward_f32) = tiles_bytes<128>(2, 128, 32);
extern "C" __global__ void __launch_bounds__(THREADS, 2)
attention128_dq_backward_f32(DQ_PARAMETERS) {
    dq_backward<128, 2, 32>(DQ_ARGUMENTS);
}

extern "C" __device__ unsigned WORD(attention256_dq_backward_f32) = tiles_bytes<256>(2, 64, 64);
extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention256_dq_backward_f32(DQ_PARAMETERS) {
    dq_backward<256, 1, 64>(DQ_ARGUMENTS);
}

// dk = scale * sum over i of p * (dp * keep - delta) * q[i], dv = sum over i of p * keep * dout[i], over all query heads of a
// key-value head. Rows of a tile are keys here, columns queries. A block has COLS columns of the result, and scores anew for
// each such part of a head.
template <int WIDTH, int COLS, int M, int QUERIES>
__device__ __forceinline__ void dkv_backward(DKV_PARAMETERS) {
    extern __shared__ __align__(1024) uint4 shared[];
    constexpr int ROWS = 64 * M, N = QUERIES / 8, C = COLS / 64, SIDE = QUERIES * WIDTH / 8;
    Tile<WIDTH, ROWS> keys = {shared}, values = {shared + ROWS * WIDTH / 8};
    uint4* stages = shared + 2 * ROWS * WIDTH / 8;
    float* sides = reinterpret_cast<float*>(stages + 4 * SIDE);  // lse and delta of a stage's queries
    int own = threadIdx.x / WARP * 16 + threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    int key0 = blockIdx.x * ROWS, kv_head = blockIdx.y, group = heads / kv_heads;
    int b = blockIdx.z % batch, col0 = blockIdx.z / batch * COLS;
    Mask mask = {segments ? segments + (long long)b * tokens : nullptr, tokens, causal, window, prefix ? prefix[b] : 0};

    float dks[M][C][8][4], dvs[M][C][8][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
        clear(dks[m]);
        clear(dvs[m]);
    }

    int first = mask.first_query(key0), end = mask.end_query(min(key0 + ROWS, tokens));
    int per_head = (end - first + QUERIES - 1) / QUERIES, visits = group * per_head;
    auto fetch = [&](int visit, int stage) {
        int head = kv_head * group + visit / per_head, query0 = first + visit % per_head * QUERIES;
        uint4* at = stages + 2 * stage * SIDE;
        Tile<WIDTH, QUERIES>{at}.fetch(head_rows(q, q_ld, b, head, tokens, width), query0);
        Tile<WIDTH, QUERIES>{at + SIDE}.fetch(head_rows(dout, dout_ld, b, head, tokens, width), query0);
        if (threadIdx.x < 2 * QUERIES) {
            int query = query0 + threadIdx.x % QUERIES;
            const float* from = threadIdx.x < QUERIES ? lse : delta;
            bool inside = query < tokens;
            copy4(sides + 2 * stage * QUERIES + threadIdx.x, inside ? from + ((long long)b * heads + head) * tokens + query : from, inside);
        }
    };
    keys.fetch(head_rows(k, k_ld, b, kv_head, tokens, width), key0);
    values.fetch(head_rows(v, v_ld, b, kv_head, tokens, width), key0);
    fetch(0, 0);
#pragma unroll 1
    for (int visit = 0; visit < visits; ++visit) {
        int stage = visit % 2, query0 = first + visit % per_head * QUERIES;
        long long head0 = ((long long)b * heads + kv_head * group + visit / per_head) * tokens;
        Tile<WIDTH, QUERIES> queries = {stages + 2 * stage * SIDE}, douts = {queries.at + SIDE};
        const float* row_lse = sides + 2 * stage * QUERIES;
        arrive();
        show();
        __syncthreads();  // these queries are there, the last ones used up
        if (visit + 1 < visits) fetch(visit + 1, stage ^ 1);
#pragma unroll
        for (int m = 0; m < M; ++m) {
            int row0 = key0 + 64 * m, row = row0 + own, col = query0 + 2 * t;
            if (!mask.some(query0, QUERIES, row0, 64)) continue;
            bool all = mask.all(query0, QUERIES, row0, 64);
            unsigned seen = 0, kept = 0;
            if (!all) seen = choose<N>([&](int r, int c) { return mask.sees(col + c, row + r); });
            if (rng) {
                Keep keep = keep_rule(rng, stream, dropout_p, 1.f);
                kept = choose<N>([&](int r, int c) { return keep1(keep, rng, (head0 + col + c) * tokens + row + r) != 0.f; });
            }
            float x[N][4], y[N][4], bias[2] = {0.f, 0.f};
            if (key_bias) {
#pragma unroll
                for (int r = 0; r < 2; ++r) bias[r] = row + 8 * r < tokens ? LOG2_E * key_bias[head0 + row + 8 * r] : 0.f;
            }
            hold(x);
            hold(y);
            begin();
            dot_rows(x, keys, 64 * m, queries);
            dot_rows(y, values, 64 * m, douts);
            wait<1>();
            hold(x);
#pragma unroll
            for (int n = 0; n < N; ++n) {
                float2 lses = *reinterpret_cast<const float2*>(row_lse + 8 * n + 2 * t);
                float above[2] = {LOG2_E * lses.x, LOG2_E * lses.y};
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float shift = above[e % 2];
                    if (key_bias) shift -= bias[e / 2];
                    x[n][e] = exp2f(x[n][e] * (scale * LOG2_E) - shift);
                    if (!all && !bit(seen, n, e)) x[n][e] = 0.f;
                }
            }
            Weights<N> p(x);
            wait<0>();
            hold(y);
#pragma unroll
            for (int n = 0; n < N; ++n) {
                float2 deltas = *reinterpret_cast<const float2*>(row_lse + QUERIES + 8 * n + 2 * t);
                float along[2] = {deltas.x, deltas.y};
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    if (rng) y[n][e] = bit(kept, n, e) ? y[n][e] * dropout_scale : 0.f;
                    y[n][e] = p.at(n, e) * (y[n][e] - along[e % 2]);
                }
            }
            Weights<N> weights(y);
            if (rng) p = only(p, kept);
            p.hold();
            weights.hold();
            hold(dvs[m]);
            hold(dks[m]);
            begin();
            add_weighted(dvs[m], p, douts, col0);
            add_weighted(dks[m], weights, queries, col0);
            commit();
            wait<0>();
            hold(dvs[m]);
            hold(dks[m]);
        }
    }
    arrive();
    // Queries that see nothing: every key has a share of them, wherever it lies.
    for (int head = kv_head * group; segments && head < (kv_head + 1) * group; ++head) {
        Rows<real> dos = head_rows(dout, dout_ld, b, head, tokens, width);
        long long head0 = ((long long)b * heads + head) * tokens;
        Tile<WIDTH, 16> douts = {stages};
        Keep keep;
        if (rng) keep = keep_rule(rng, stream, dropout_p, 1.f);
#pragma unroll 1
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
                        int key = key0 + 64 * m + own + e / 2 * 8;
                        p[m][n][e] = mask.blind_weight(blind, key) * keep1(keep, rng, (head0 + query) * tokens + key);
                    }
                }
            }
            if (!__syncthreads_or(some)) continue;
            douts.fetch(dos, query0);
            arrive();
            show();
            __syncthreads();
#pragma unroll
            for (int m = 0; m < M; ++m) {
                Weights<2> weights(p[m]);
                add_now(dvs[m], weights, douts, col0);
            }
        }
    }
    real* dk_head = dk + (long long)b * tokens * dk_ld + (long long)kv_head * width;
    real* dv_head = dv + (long long)b * tokens * dv_ld + (long long)kv_head * width;
    float kept_scale = rng ? dropout_scale : 1.f;
    __syncthreads();  // the keys and values are used up
#pragma unroll
    for (int m = 0; m < M; ++m) {
        store_sum(dk_head, dk_ld, tokens, width, key0 + 64 * m, col0, dks[m], scale, scale, keys, 64 * m);
        store_sum(dv_head, dv_ld, tokens, width, key0 + 64 * m, col0, dvs[m], kept_scale, kept_scale, values, 64 * m);
    }
}

extern "C" __device__ unsigned WORD(attention64_dkv_backward_f32) = tiles_bytes<64>(2, 128, 64) + 16 * 64;
extern "C" __global__ void __launch_bounds__(THREADS, 2)
attention64_dkv_backward_f32(DKV_PARAMETERS) {
    dkv_backward<64, 64, 2, 64>(DKV_ARGUMENTS);
}

extern "C" __device__ unsigned WORD(attention128_dkv_backward_f32) = tiles_bytes<128>(2, 64, 64) + 16 * 64;
extern "C" __global__ void __launch_bounds__(THREADS, 2)
attention128_dkv_backward_f32(DKV_PARAMETERS) {
    dkv_backward<128, 128, 1, 64>(DKV_ARGUMENTS);
}

extern "C" __device__ unsigned WORD(attention256_dkv_backward_f32) = tiles_bytes<256>(2, 64, 64) + 16 * 64;
extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention256_dkv_backward_f32(DKV_PARAMETERS) {
    dkv_backward<256, 128, 1, 64>(DKV_ARGUMENTS);
}
