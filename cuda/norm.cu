// Layer normalisation, with or without centring. Source: Ba et al. 2016, equation 4; RMSNorm: Zhang and Sennrich 2019,
// equation 4; their gradients by hand from the same. `center` 0: the mean is taken to be 0.
//
// Dimensions: N rows, C columns; W warps to a row (`warps`): 1, 2, 4 or 8, the fewest that hold one, at 1024 columns each.
// What 8 warps do not hold of a row they read again; so are all rows where some do not begin, or do not end, on 128 bits.
// The order of sums follows from C, `per` and that.
// Launch:
//   layer_norm_forward_f32      block = 256, grid = ceil(N * W / 8).
//   layer_norm_backward_f32     block = 256, grid = chunks.
// The gradient takes one launch more, sum_to_forward_f32 (reduce.cu) of both halves of `parts` [2, chunks, C] into dweight
// and dbias.
// Shared memory: static, 17 KB at most.

#define WARPS 8
#define THREADS (WARP * WARPS)
// The groups of a row that a thread holds in registers: 32 columns.
#define PIECES (32 / COLUMNS)

// The warps of a block that have a row together; each thread has a group of columns out of every `step`.
struct Team {
    int number;
    int count;  // of a block
    int first;
    int step;
    bool holds;  // its row's groups in registers, as far as they go
};

__device__ __forceinline__ Team my_team(int warps, bool holds) {
    int threads = WARP * warps, me = threadIdx.x;
    return {me / threads, THREADS / threads, COLUMNS * (me % threads), COLUMNS * threads, holds};
}

// Whether rows begin on 128 bits.
__device__ __forceinline__ bool rows_fit(const void* p, int ld) {
    return (reinterpret_cast<unsigned long long>(p) & 15) == 0 && ld % COLUMNS == 0;
}

// f(p, c, n) for each group of columns that this thread has: from column c on, n of them inside the row. What it holds has
// p < PIECES, and is whole.
template <class F>
__device__ __forceinline__ void for_groups(const Team& team, int cols, F f) {
    int c = team.first;
    if (team.holds) {
#pragma unroll
        for (int p = 0; p < PIECES; ++p, c += team.step) {
            if (c < cols) f(p, c, COLUMNS);
        }
    }
    for (; c < cols; c += team.step) f(PIECES, c, cols - c);
}

// A group of a row whose groups are held: on 128 bits.
template <class T>
__device__ __forceinline__ T* whole(T* p, int piece) {
    return piece < PIECES ? static_cast<T*>(__builtin_assume_aligned(p, 16)) : p;
}

// A row, held as it is stored.
struct Row {
    const real* x;
    uint4 held[PIECES];

    __device__ __forceinline__ Row(const real* x, int cols, const Team& team) : x(x) {
        if (!team.holds) return;
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
            int c = team.first + p * team.step;
            if (c < cols) held[p] = *reinterpret_cast<const uint4*>(x + c);
        }
    }

    __device__ __forceinline__ Values group(int p, int c, int n) const {
        return p < PIECES ? values_of(held[p]) : load(x + c, n);
    }

    // The group less `shift` where its columns exist, 0 beyond the row's end.
    __device__ __forceinline__ Values centred(int p, int c, int n, float shift) const {
        Values v = group(p, c, n);
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) v.x[i] = i < n ? v.x[i] - shift : 0.f;
        return v;
    }
};

// The sum of a * b.
__device__ __forceinline__ float sum_of_products(Values a, const Values& b) {
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) a.x[i] *= b.x[i];
    return sum_of(a);
}

// Each of N sums over a team, in all of its threads; its warps' totals are added in order. All threads of a block must
// call it.
template <int N>
__device__ __forceinline__ void team_sums(float (&x)[N], int warps) {
    __shared__ float totals[N][WARPS];
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = warp_sum(x[i]);
    if (warps == 1) return;
    int warp = threadIdx.x / WARP, first = warp / warps * warps;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (threadIdx.x % WARP == 0) totals[i][warp] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) {
        x[i] = totals[i][first];
#pragma unroll 1
        for (int w = 1; w < warps; ++w) x[i] += totals[i][first + w];
    }
    __syncthreads();  // `totals` may be used again
}

// y = (x - mean) * rstd * weight (+ bias). x, y [N, C], weight [C], optional bias [C], mean, rstd [N].
extern "C" __global__ void __launch_bounds__(THREADS)
layer_norm_forward_f32(const real* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias,
                       real* __restrict__ y, float* __restrict__ mean, float* __restrict__ rstd, int rows, int cols,
                       int x_ld, int y_ld, float eps, int center, int warps) {
    bool holds = cols % COLUMNS == 0 && rows_fit(x, x_ld) && rows_fit(y, y_ld) && rows_fit(weight, 0) && rows_fit(bias, 0);
    Team team = my_team(warps, holds);
    int row = blockIdx.x * team.count + team.number;
    // A team without a row sums up nothing beside the others.
    int mine = row < rows ? cols : 0;
    Row xs(x + (long long)row * x_ld, mine, team);
    y += (long long)row * y_ld;

    float sum[1] = {0.f};
    if (center) {
        for_groups(team, mine, [&](int p, int c, int n) { sum[0] += sum_of(xs.group(p, c, n)); });
        team_sums(sum, warps);
    }
    float average = sum[0] / cols;
    // Two passes: the variance of centred values keeps its digits where the mean is large.
    float squares[1] = {0.f};
    for_groups(team, mine, [&](int p, int c, int n) {
        Values d = xs.centred(p, c, n, average);
        squares[0] += sum_of_products(d, d);
    });
    team_sums(squares, warps);
    float inverse = 1.f / sqrtf(squares[0] / cols + eps);

    for_groups(team, mine, [&](int p, int c, int n) {
        Values d = xs.centred(p, c, n, average);
        Values w = load(whole(weight + c, p), n), b = bias ? load(whole(bias + c, p), n) : all_of(0.f);
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) d.x[i] = d.x[i] * inverse * w.x[i] + b.x[i];
        store(whole(y + c, p), d, n);
    });
    if (mine > 0 && team.first == 0) {
        mean[row] = average;
        rstd[row] = inverse;
    }
}

// With h = (x - mean) * rstd and dh = dy * weight: dx = rstd * (dh - avg(dh) - h * avg(dh * h)) (+ residual). And of each
// chunk of `per` rows: parts[0, chunk, c] = sum of dy * h, parts[1, chunk, c] = sum of dy.
// dy, x, dx and the optional residual [N, C], weight [C], mean, rstd [N], parts [2, chunks, C] with chunks =
// ceil(N / per) = gridDim.x. dx may be dy or the residual.
extern "C" __global__ void __launch_bounds__(THREADS)
layer_norm_backward_f32(const real* dy, const real* __restrict__ x, const float* __restrict__ weight,
                        const float* __restrict__ mean, const float* __restrict__ rstd, const real* residual, real* dx,
                        float* __restrict__ parts, int rows, int cols, int dy_ld, int x_ld, int residual_ld, int dx_ld,
                        int per, int center, int warps) {
    __shared__ float sums[2][COLUMNS][THREADS + WARP / COLUMNS];
    bool holds = cols % COLUMNS == 0 && rows_fit(dy, dy_ld) && rows_fit(x, x_ld) && rows_fit(residual, residual_ld) &&
                 rows_fit(dx, dx_ld) && rows_fit(weight, 0);
    // What is not held has sums that a block's only team adds up in `parts`.
    if (!holds) warps = WARPS;
    Team team = my_team(warps, holds);
    float* dweight = parts + (long long)blockIdx.x * cols;
    float* dbias = parts + (long long)(gridDim.x + blockIdx.x) * cols;
    int from = blockIdx.x * per, to = min(from + per, rows);
    Values dw[PIECES], db[PIECES];
#pragma unroll
    for (int p = 0; p < PIECES; ++p) dw[p] = db[p] = all_of(0.f);

    // Each team walks over rows of its own, all of them in step.
    for (int at = from; at < to; at += team.count) {
        int row = at + team.number;
        int mine = row < to ? cols : 0;
        float centre = mine > 0 ? mean[row] : 0.f, inverse = mine > 0 ? rstd[row] : 0.f;
        Row dys(dy + (long long)row * dy_ld, mine, team), xs(x + (long long)row * x_ld, mine, team);
        const real* residual_row = residual + (long long)row * residual_ld;
        real* dx_row = dx + (long long)row * dx_ld;
        float along[2] = {0.f, 0.f};
        for_groups(team, mine, [&](int p, int c, int n) {
            Values h = xs.centred(p, c, n, centre), g = dys.group(p, c, n), w = load(whole(weight + c, p), n);
            Values dh, gh;
#pragma unroll
            for (int i = 0; i < COLUMNS; ++i) {
                dh.x[i] = g.x[i] * w.x[i];
                gh.x[i] = g.x[i] * h.x[i] * inverse;
            }
            along[0] += sum_of(dh);
            along[1] += sum_of_products(dh, h);
            if (p < PIECES) {
#pragma unroll
                for (int i = 0; i < COLUMNS; ++i) {
                    dw[p].x[i] += gh.x[i];
                    db[p].x[i] += g.x[i];
                }
            } else {
                Values sw = at > from ? load(dweight + c, n) : all_of(0.f);
                Values sb = at > from ? load(dbias + c, n) : all_of(0.f);
#pragma unroll
                for (int i = 0; i < COLUMNS; ++i) {
                    sw.x[i] += gh.x[i];
                    sb.x[i] += g.x[i];
                }
                store(dweight + c, sw, n);
                store(dbias + c, sb, n);
            }
        });
        team_sums(along, warps);
        float average = center ? along[0] / cols : 0.f, slope = along[1] * inverse / cols;

        for_groups(team, mine, [&](int p, int c, int n) {
            Values h = xs.centred(p, c, n, centre), g = dys.group(p, c, n), w = load(whole(weight + c, p), n);
            Values r = residual ? load(whole(residual_row + c, p), n) : all_of(0.f);
#pragma unroll
            for (int i = 0; i < COLUMNS; ++i) r.x[i] += inverse * (g.x[i] * w.x[i] - average - h.x[i] * inverse * slope);
            store(whole(dx_row + c, p), r, n);
        });
    }

    if (!holds) return;
    // The sums of the block's teams are added in order, piece by piece. Neighbouring threads have neighbouring columns
    // then, which stand in different banks.
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
        if (p * team.step >= cols) continue;
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) {
            sums[0][i][threadIdx.x] = dw[p].x[i];
            sums[1][i][threadIdx.x] = db[p].x[i];
        }
        __syncthreads();
#pragma unroll 1
        for (int k = threadIdx.x; k < 2 * team.step; k += THREADS) {
            int which = k / team.step, column = k % team.step, c = p * team.step + column;
            if (c >= cols) continue;
            float total = 0.f;
#pragma unroll 1
            for (int t = 0; t < team.count; ++t) {
                total += sums[which][column % COLUMNS][t * (team.step / COLUMNS) + column / COLUMNS];
            }
            (which ? dbias : dweight)[c] = total;
        }
        __syncthreads();  // `sums` is used again
    }
}
