// What attention.cu and relative.cu share: products of tiles in float32.
//
// A block computes 64 rows of the result, `slice` telling which 128 columns of the head. A thread (ty, tx) of 16 x 16 has
// rows 4 ty .. and columns 4 tx .. of every 64 x 64 product. Products run over the inner dimension in steps of DEPTH: both
// factors lie in shared memory with the inner dimension first, so that a step reads two float4 for 16 multiply-adds, and
// the shared memory needed does not grow with D.

#define PITCH (TILE + 4)  // a multiple of 4 that is not one of 32: neighbouring rows start in different banks
#define THREADS 256
#define SLICE 128
#define PARTS (SLICE / TILE)

template <int STEP>
struct __align__(16) Factors {
    static constexpr int DEPTH = STEP;
    float a[DEPTH][PITCH];
    float b[DEPTH][PITCH];
    float weights[TILE][PITCH];  // probabilities or score gradients, the inner dimension of the second product first
};

// to[d][r] = x[from + r][d0 + d]: a tile turned so that the inner dimension is first; 0 outside.
template <int DEPTH>
__device__ __forceinline__ void load_turned(float (*to)[PITCH], const Rows<float>& x, int from, int d0) {
    int r = threadIdx.x % TILE;
    const float* row = x.x + (long long)(from + r) * x.ld + d0;
#pragma unroll
    for (int d = 4 * (threadIdx.x / TILE); d < DEPTH; d += 4 * THREADS / TILE) {
        float4 value = load4(row + d, from + r < x.rows ? x.width - d0 - d : 0);
        to[d][r] = value.x;
        to[d + 1][r] = value.y;
        to[d + 2][r] = value.z;
        to[d + 3][r] = value.w;
    }
}

// to[r][c] = x[from + r][c0 + c] for DEPTH rows and TILE columns; 0 outside.
template <int DEPTH>
__device__ __forceinline__ void load_rows(float (*to)[PITCH], const Rows<float>& x, int from, int c0) {
    int c = 4 * (threadIdx.x % (TILE / 4));
#pragma unroll
    for (int r = threadIdx.x / (TILE / 4); r < DEPTH; r += THREADS / (TILE / 4)) {
        const float* row = x.x + (long long)(from + r) * x.ld + c0;
        float4 value = load4(row + c, from + r < x.rows ? x.width - c0 - c : 0);
        *reinterpret_cast<float4*>(&to[r][c]) = value;
    }
}

// sum[i][j] += sum over k < DEPTH of a[k][4 ty + i] * b[k][4 tx + j].
template <int DEPTH>
__device__ __forceinline__ void multiply(float (&sum)[4][4], const float (*a)[PITCH], const float (*b)[PITCH], int ty, int tx) {
#pragma unroll 4
    for (int k = 0; k < DEPTH; ++k) {
        float4 x = *reinterpret_cast<const float4*>(&a[k][4 * ty]);
        float4 y = *reinterpret_cast<const float4*>(&b[k][4 * tx]);
        float xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[i][j] += xs[i] * ys[j];
        }
    }
}

// product[i][j] = x[x_from + 4 ty + i] . y[y_from + 4 tx + j].
template <class S>
__device__ __forceinline__ void dot_tiles(float (&product)[4][4], S& shared, const Rows<float>& x, int x_from, const Rows<float>& y,
                                          int y_from, int ty, int tx) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) product[i][j] = 0.f;
    }
    for (int d = 0; d < x.width; d += S::DEPTH) {
        __syncthreads();  // the last users of a and b are done
        load_turned<S::DEPTH>(shared.a, x, x_from, d);
        load_turned<S::DEPTH>(shared.b, y, y_from, d);
        __syncthreads();
        multiply<S::DEPTH>(product, shared.a, shared.b, ty, tx);
    }
}

// weights[4 tx + j][4 ty + i] = w[i][j].
template <class S>
__device__ __forceinline__ void store_weights(S& shared, const float (&w)[4][4], int ty, int tx) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        *reinterpret_cast<float4*>(&shared.weights[4 * tx + j][4 * ty]) = make_float4(w[0][j], w[1][j], w[2][j], w[3][j]);
    }
}

// sum[part][i][j] += sum over r < TILE of weights[r][4 ty + i] * x[from + r][column + TILE part + 4 tx + j].
template <class S>
__device__ __forceinline__ void add_weighted(float (&sum)[PARTS][4][4], S& shared, const Rows<float>& x, int from, int column,
                                             int ty, int tx) {
#pragma unroll 1
    for (int half = 0; half < TILE; half += S::DEPTH) {
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            if (column + part * TILE < x.width) {
                __syncthreads();  // the weights are written, the last users of b are done
                load_rows<S::DEPTH>(shared.b, x, from + half, column + part * TILE);
                __syncthreads();
                multiply<S::DEPTH>(sum[part], shared.weights + half, shared.b, ty, tx);
            }
        }
    }
}

__device__ __forceinline__ void clear(float (&sum)[PARTS][4][4]) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[part][i][j] = 0.f;
        }
    }
}

// to[row0 + 4 ty + i][column + TILE part + 4 tx + j] = sum[part][i][j] * factor[i], inside the head.
__device__ __forceinline__ void store_sum(float* to, int ld, int rows, int width, int row0, int column,
                                          const float (&sum)[PARTS][4][4], const float (&factor)[4], int ty, int tx) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int row = row0 + 4 * ty + i;
        if (row >= rows) continue;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            int c = column + part * TILE + 4 * tx;
            const float* s = sum[part][i];
            float4 value = make_float4(s[0] * factor[i], s[1] * factor[i], s[2] * factor[i], s[3] * factor[i]);
            store4(to + (long long)row * ld + c, value, width - c);
        }
    }
}

// Sums and maxima over the 16 threads that share a row of a tile.
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
    for (int step = 8; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

__device__ __forceinline__ float row_max(float x) {
#pragma unroll
    for (int step = 8; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

// Takes row i of a tile of scores, -INFINITY where nothing is seen, into the online softmax: scores become exponentials
// beside the largest so far, and what was summed up before is made comparable. All threads of a row take part.
__device__ __forceinline__ void take_scores(float (&p)[4][4], float (&sum)[PARTS][4][4], float (&largest)[4],
                                            float (&denominator)[4], int i) {
    float above = largest[i];
#pragma unroll
    for (int j = 0; j < 4; ++j) above = fmaxf(above, p[i][j]);
    above = row_max(above);
    // A row that has seen nothing yet: exp(-inf - 0) = 0 throughout.
    float shift = above == -INFINITY ? 0.f : above;
    float correction = expf(largest[i] - shift), total = 0.f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        p[i][j] = expf(p[i][j] - shift);
        total += p[i][j];
    }
    denominator[i] = denominator[i] * correction + row_sum(total);
    largest[i] = above;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[part][i][j] *= correction;
    }
}
