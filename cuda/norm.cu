// Layer normalisation, with or without centring. Source: Ba et al. 2016, equation 4; RMSNorm: Zhang and Sennrich 2019,
// equation 4; their gradients by hand from the same. `center` 0: the mean is taken to be 0.
//
// Dimensions: N rows, C columns.
// Launch:
//   layer_norm_forward_f32, layer_norm_backward_f32     block = 128, grid = ceil(N / 4): a warp has a row.
//   layer_norm_weight_backward_f32                      block = (32, 8), grid = (ceil(C / 32), chunks).
// The gradient takes four launches in this order, because dx may be the memory of dy:
//   layer_norm_weight_backward_f32, then sum_to_forward_f32 (reduce.cu) of each half of `parts` [chunks, C] into dweight
//   and dbias, then layer_norm_backward_f32.
// Shared memory: static, 2.1 KB in layer_norm_weight_backward_f32.

#define ROWS_PER_BLOCK 4

// The columns that a lane has at a time, and how far its next ones are.
#define STEP (COLUMNS * WARP)

// x - shift where the column exists, 0 beyond the row's end.
__device__ __forceinline__ Values centred(Values v, float shift, int n) {
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) v.x[i] = i < n ? v.x[i] - shift : 0.f;
    return v;
}

// The sum of a * b.
__device__ __forceinline__ float sum_of_products(Values a, const Values& b) {
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) a.x[i] *= b.x[i];
    return sum_of(a);
}

// y = (x - mean) * rstd * weight (+ bias). x, y [N, C], weight [C], optional bias [C], mean, rstd [N].
extern "C" __global__ void __launch_bounds__(WARP * ROWS_PER_BLOCK)
layer_norm_forward_f32(const real* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias,
                       real* __restrict__ y, float* __restrict__ mean, float* __restrict__ rstd, int rows, int cols,
                       int x_ld, int y_ld, float eps, int center) {
    int row = blockIdx.x * ROWS_PER_BLOCK + threadIdx.x / WARP;
    int lane = threadIdx.x % WARP;
    if (row >= rows) return;
    x += (long long)row * x_ld;
    y += (long long)row * y_ld;

    float sum = 0.f;
    for (int c = COLUMNS * lane; c < cols; c += STEP) sum += sum_of(load(x + c, cols - c));
    float average = center ? warp_sum(sum) / cols : 0.f;
    // Two passes: the variance of centred values keeps its digits where the mean is large.
    float squares = 0.f;
    for (int c = COLUMNS * lane; c < cols; c += STEP) {
        Values d = centred(load(x + c, cols - c), average, cols - c);
        squares += sum_of_products(d, d);
    }
    float inverse = 1.f / sqrtf(warp_sum(squares) / cols + eps);

    for (int c = COLUMNS * lane; c < cols; c += STEP) {
        Values d = centred(load(x + c, cols - c), average, cols - c);
        Values w = load(weight + c, cols - c), b = bias ? load(bias + c, cols - c) : all_of(0.f);
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) d.x[i] = d.x[i] * inverse * w.x[i] + b.x[i];
        store(y + c, d, cols - c);
    }
    if (lane == 0) {
        mean[row] = average;
        rstd[row] = inverse;
    }
}

// With h = (x - mean) * rstd and dh = dy * weight: dx = rstd * (dh - avg(dh) - h * avg(dh * h)) (+ residual).
// dy, x, dx and the optional residual [N, C], weight [C], mean, rstd [N]. dx may be dy or the residual.
extern "C" __global__ void __launch_bounds__(WARP * ROWS_PER_BLOCK)
layer_norm_backward_f32(const real* dy, const real* __restrict__ x, const float* __restrict__ weight,
                        const float* __restrict__ mean, const float* __restrict__ rstd, const real* residual, real* dx,
                        int rows, int cols, int dy_ld, int x_ld, int residual_ld, int dx_ld, int center) {
    int row = blockIdx.x * ROWS_PER_BLOCK + threadIdx.x / WARP;
    int lane = threadIdx.x % WARP;
    if (row >= rows) return;
    dy += (long long)row * dy_ld;
    x += (long long)row * x_ld;
    dx += (long long)row * dx_ld;
    if (residual) residual += (long long)row * residual_ld;
    float centre = mean[row], inverse = rstd[row];

    float sum = 0.f, product = 0.f;
    for (int c = COLUMNS * lane; c < cols; c += STEP) {
        Values h = centred(load(x + c, cols - c), centre, cols - c);
        Values dh = load(dy + c, cols - c), w = load(weight + c, cols - c);
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) dh.x[i] *= w.x[i];
        sum += sum_of(dh);
        product += sum_of_products(dh, h);
    }
    float average = center ? warp_sum(sum) / cols : 0.f;
    float along = warp_sum(product) * inverse / cols;

    for (int c = COLUMNS * lane; c < cols; c += STEP) {
        Values h = centred(load(x + c, cols - c), centre, cols - c);
        Values g = load(dy + c, cols - c), w = load(weight + c, cols - c);
        Values r = residual ? load(residual + c, cols - c) : all_of(0.f);
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) r.x[i] += inverse * (g.x[i] * w.x[i] - average - h.x[i] * inverse * along);
        store(dx + c, r, cols - c);
    }
}

// Each chunk of `per` rows: parts[0, chunk, c] = sum of dy * (x - mean) * rstd, parts[1, chunk, c] = sum of dy.
// dy, x [N, C], mean, rstd [N], parts [2, chunks, C] with chunks = ceil(N / per) = gridDim.y.
extern "C" __global__ void __launch_bounds__(256)
layer_norm_weight_backward_f32(const real* __restrict__ dy, const real* __restrict__ x, const float* __restrict__ mean,
                               const float* __restrict__ rstd, float* __restrict__ parts, int rows, int cols, int dy_ld,
                               int x_ld, int per) {
    __shared__ float sums[2][8][33];
    int c = blockIdx.x * 32 + threadIdx.x;
    int from = blockIdx.y * per, to = min(from + per, rows);
    float dw = 0.f, db = 0.f;
    if (c < cols) {
        for (int r = from + threadIdx.y; r < to; r += 8) {
            float g = widen(dy[(long long)r * dy_ld + c]);
            dw += g * (widen(x[(long long)r * x_ld + c]) - mean[r]) * rstd[r];
            db += g;
        }
    }
    sums[0][threadIdx.y][threadIdx.x] = dw;
    sums[1][threadIdx.y][threadIdx.x] = db;
    __syncthreads();
    if (threadIdx.y < 2 && c < cols) {
        float total = 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) total += sums[threadIdx.y][i][threadIdx.x];
        parts[((long long)threadIdx.y * gridDim.y + blockIdx.y) * cols + c] = total;
    }
}
