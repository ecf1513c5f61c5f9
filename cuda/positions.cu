// Positions that enter attention: rotations of queries and keys, a bias on keys, and counting.
//
// Dimensions: N rows, H heads, D head width, R rotated columns of a head, T tokens.
// Launch of every kernel here: block = 256, grid = ceil(threads / 256), a thread for
//   iota_forward_f32          an element of y [N].
//   rope_table_forward_f32    a pair of columns of the table: N * R / 2.
//   rope_forward_f32          a pair of columns of a head, or one column that stays: N * H * (D - R / 2).
//   alibi_bias_forward_f32    an element of the bias: N * H * T.
// Shared memory: none.

#define THREADS 256

#ifndef HALF
// y[n] = start + step * n.
extern "C" __global__ void __launch_bounds__(THREADS)
iota_forward_f32(int* __restrict__ y, int rows, int start, int step) {
    int n = blockIdx.x * THREADS + threadIdx.x;
    if (n < rows) y[n] = start + step * n;
}

// table[n, i] = scale * cos(2 pi * positions[n] * turns[i]), table[n, R / 2 + i] = scale * sin(the same) for i < R / 2.
// positions [N]; turns [R / 2]: fractions of a turn a position, times 2^64, as (low, high) words.
//
// The product keeps what is left of whole turns, exactly: a float32 angle would be off by 0.004 at position 10^5.
extern "C" __global__ void __launch_bounds__(THREADS)
rope_table_forward_f32(const int* __restrict__ positions, const uint2* __restrict__ turns, float* __restrict__ table,
                       int rows, int half, int table_ld, float scale) {
    unsigned i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= (unsigned)rows * half) return;
    int n = i / half, c = i % half;
    unsigned position = positions[n] < 0 ? 0u - (unsigned)positions[n] : (unsigned)positions[n];
    uint2 turn = turns[c];
    // The upper word of the product modulo 2^64, as a signed part of a turn, in half turns.
    int part = (int)(__umulhi(position, turn.x) + position * turn.y);
    float angle = (float)part * (1.f / 2147483648.f);
    float* row = table + (long long)n * table_ld;
    row[c] = scale * cospif(angle);
    row[half + c] = (positions[n] < 0 ? -scale : scale) * sinpif(angle);
}

#endif

// Turns the pairs (i, i + R / 2), i < R / 2, of each head by the table's angles, backwards if sign is -1; the other columns
// stay. x, y [N, H * D], table [N, R], half = R / 2. y may be x. Source: Su et al. 2021, equation 34.
extern "C" __global__ void __launch_bounds__(THREADS)
rope_forward_f32(const real* x, const float* __restrict__ table, real* y, int rows, int heads, int width, int half, int x_ld,
                 int table_ld, int y_ld, float sign) {
    unsigned per_head = width - half;
    unsigned i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= per_head * heads * rows) return;
    int c = i % per_head, head = i / per_head % heads, n = i / per_head / heads;
    x += (long long)n * x_ld + head * width;
    y += (long long)n * y_ld + head * width;
    if (c >= half) {
        y[half + c] = x[half + c];
        return;
    }
    const float* angles = table + (long long)n * table_ld;
    float cosine = angles[c], sine = sign * angles[half + c], a = widen(x[c]), b = widen(x[half + c]);
    put(y + c, a * cosine - b * sine);
    put(y + half + c, b * cosine + a * sine);
}

#ifndef HALF
// To the nearest bfloat16, ties to even.
__device__ __forceinline__ float round_bf16(float x) {
    unsigned bits = __float_as_uint(x);
    return __uint_as_float((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

// bias[n, h, t] = slopes[h] * positions[n, t] * scale; with `rounded`, slope, position and their product are rounded to
// bfloat16. positions [N, T], slopes [H], bias [N * H, T]. Source: Press et al. 2022, section 3.
extern "C" __global__ void __launch_bounds__(THREADS)
alibi_bias_forward_f32(const int* __restrict__ positions, const float* __restrict__ slopes, float* __restrict__ bias,
                       int rows, int heads, int tokens, int bias_ld, float scale, int rounded) {
    unsigned i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= (unsigned)rows * heads * tokens) return;
    int t = i % tokens, r = i / tokens;
    float slope = slopes[r % heads], position = positions[(long long)(r / heads) * tokens + t];
    float product = rounded ? round_bf16(round_bf16(slope) * round_bf16(position)) : slope * position;
    bias[(long long)r * bias_ld + t] = scale * product;
}
#endif
