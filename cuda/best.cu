// Decoding: the best of a row of logits and what all of them weigh, so that the host need not read the row.
//
// Dimensions: R rows of V logits in pieces of `piece`, at most 4096; the K = `count` best are wanted, at most 256.
// Launch:
//   best_forward_f32    block = 512, grid = (ceil(V / piece), R): a thread has eight neighbours. Each launch leaves K of a
//                       piece, from which the next one chooses; the launch with one piece a row puts them in order.
// Shared memory: static, 2.4 KB.
//
// A float's bits are turned into a word that orders as the floats do. The K-th largest word is found bit by bit, by counting;
// what equals it is taken by place, so that of equal logits the one of the lower token is better. Sums are in float64.

#define THREADS 512
#define WARPS (THREADS / WARP)
#define EACH 8
#define MOST 256

// Orders as the floats do; 0 is no float's but that of a NaN. Zeros of both signs are one.
__device__ __forceinline__ unsigned ordered(float x) {
    unsigned bits = __float_as_uint(x == 0.f ? 0.f : x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// exp(x) for x <= 0, by reduction to |r| <= ln 2 / 2 and its series up to r^13 / 13!, whose rest is below 2^-56; 0 below
// -700, NaN of NaN.
__device__ double exp_below(double x) {
    if (!(x >= -700.0)) return x == x ? 0.0 : x;
    double n = rint(x * 1.4426950408889634);
    double r = fma(n, -1.9082149292705877e-10, fma(n, -0.6931471803691238, x));
    double y = 1.0 / 6227020800.0;
    const double terms[13] = {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0,
                              1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0};
#pragma unroll
    for (int i = 0; i < 13; ++i) y = fma(y, r, terms[i]);
    return y * __hiloint2double((1023 + (int)n) << 20, 0);
}

// The sum over the block in every thread, in fixed order.
__device__ double block_sum64(double x) {
    __shared__ double totals[WARPS];
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    if (threadIdx.x % WARP == 0) totals[threadIdx.x / WARP] = x;
    __syncthreads();
    x = totals[0];
    for (int w = 1; w < WARPS; ++w) x += totals[w];
    __syncthreads();  // `totals` may be used again
    return x;
}

// How many values come before this thread's, and in `all` how many there are.
__device__ int block_before(int mine, int* all) {
    __shared__ int totals[WARPS];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, before = 0;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        int other = __shfl_xor_sync(ALL_LANES, mine, step);
        if (lane & step) before += other;
        mine += other;
    }
    if (lane == 0) totals[warp] = mine;
    __syncthreads();
    int sum = 0;
    for (int w = 0; w < WARPS; ++w) {
        if (w < warp) before += totals[w];
        sum += totals[w];
    }
    __syncthreads();  // `totals` may be used again
    *all = sum;
    return before;
}

// A sum in two floats.
__device__ __forceinline__ void put(float* to, double x) {
    float high = (float)x;
    to[0] = high;
    to[1] = (float)(x - high);
}

// x [R, V] with x_ld elements from row to row. In the first launch tokens and parts are null, and a value's token is its
// column; later, tokens [R, V] are those of the values of x, -1 where there is none, and parts [R, P, 5] say of each K values
// what they come from: its largest logit, and its two sums. temperature [R]. With one piece: best, best_tokens [R, K] in order
// and masses [R, 4]; with more, best, best_tokens [R, pieces, K] and masses [R, pieces, 5], which are the next launch's parts.
extern "C" __global__ void __launch_bounds__(THREADS)
best_forward_f32(const float* __restrict__ x, const int* __restrict__ tokens, const float* __restrict__ parts,
                 const float* __restrict__ temperature, float* __restrict__ best, int* __restrict__ best_tokens,
                 float* __restrict__ masses, int cols, int x_ld, int piece, int count) {
    __shared__ float values[MOST];
    __shared__ int places[MOST];
    int row = blockIdx.y, pieces = gridDim.x, thread = threadIdx.x;
    int first = blockIdx.x * piece, end = min(cols, first + piece);
    x += (long long)row * x_ld;
    tokens = tokens ? tokens + (long long)row * cols : tokens;
    long long out = (long long)row * pieces + blockIdx.x;
    best += out * count;
    best_tokens += out * count;

    float value[EACH];
    int token[EACH];
    unsigned key[EACH];
    float largest = -INFINITY;
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
        int at = first + thread * EACH + e;
        bool there = at < end;
        value[e] = there ? x[at] : -INFINITY;
        token[e] = !there ? -1 : tokens ? tokens[at] : at;
        key[e] = token[e] < 0 ? 0 : ordered(value[e]);
        largest = fmaxf(largest, value[e]);
    }

    // What the piece weighs beside its largest, as it is and at the temperature.
    float t = temperature[row];
    double mass = 0.0, heated = 0.0;
    if (parts) {
        int from = first / count, to = (end + count - 1) / count;
        parts += 5 * (long long)row * (cols / count);
        largest = -INFINITY;
        for (int p = from + thread; p < to; p += THREADS) largest = fmaxf(largest, parts[5 * p]);
        largest = block_max<WARPS>(largest);
        float shift = largest == -INFINITY ? 0.f : largest;
        for (int p = from + thread; p < to; p += THREADS) {
            const float* part = parts + 5 * p;
            mass += ((double)part[1] + part[2]) * exp_below((double)part[0] - shift);
            heated += ((double)part[3] + part[4]) * exp_below((double)(part[0] / t) - shift / t);
        }
    } else {
        largest = block_max<WARPS>(largest);
        float shift = largest == -INFINITY ? 0.f : largest;
#pragma unroll 1
        for (int e = 0; e < EACH; ++e) {
            int at = first + thread * EACH + e;
            if (at >= end) break;
            float logit = x[at];
            mass += exp_below((double)logit - shift);
            heated += exp_below((double)(logit / t) - shift / t);
        }
    }
    mass = block_sum64(mass);
    heated = block_sum64(heated);
    if (thread == 0) {
        float* to = masses + (pieces == 1 ? 4 : 5) * out;
        if (pieces > 1) *to++ = largest;
        put(to, mass);
        put(to + 2, heated);
    }

    // The largest word that at least `count` reach.
    unsigned least = 0;
    int all;
#pragma unroll 1
    for (unsigned bit = 0x80000000u; bit != 0; bit >>= 1) {
        int reach = 0;
#pragma unroll
        for (int e = 0; e < EACH; ++e) reach += key[e] >= (least | bit);
        block_before(reach, &all);
        if (all >= count) least |= bit;
    }
    int above = 0, equal = 0;
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
        above += key[e] > least;
        equal += key[e] == least && least != 0;
    }
    // Both counts in one word: neither is more than 4096.
    int before = block_before(above | equal << 16, &all);
    int above_before = before & 0xffff, equal_before = before >> 16, taken = count - (all & 0xffff);
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
        bool is_above = key[e] > least, is_equal = key[e] == least && least != 0;
        if (is_above || (is_equal && equal_before < taken)) {
            int to = above_before + min(equal_before, taken);
            values[to] = value[e];
            places[to] = token[e];
        }
        above_before += is_above;
        equal_before += is_equal;
    }
    int found = min((all & 0xffff) + (all >> 16), count);
    __syncthreads();

    for (int i = thread; i < count; i += THREADS) {
        float mine = i < found ? values[i] : -INFINITY;
        int to = i;
        if (pieces == 1 && i < found) {
            to = 0;
            unsigned order = ordered(mine);
            for (int other = 0; other < found; ++other) {
                unsigned theirs = ordered(values[other]);
                to += theirs > order || (theirs == order && other < i);
            }
        }
        best[to] = mine;
        best_tokens[to] = i < found ? places[i] : -1;
    }
}
