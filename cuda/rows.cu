// Rows by index: gather, scatter-add, counting labels.
//
// Dimensions: R rows of a table, N rows, C columns; G columns in 128 bits, 4 in float32, 8 in bfloat16.
// Launch:
//   gather_forward_f32            block = 256, grid = ceil(N * ceil(C / G) / 256): a thread has G columns.
//   scatter_add_forward_f32       block = 128, grid = (ceil(N / 4), ceil(C / 32 G)): a warp has 32 G columns of a row.
//   count_labels_forward_f32      block = 256, grid = 1.
// Shared memory: static, 32 bytes in count_labels_forward_f32.
//
// Indices are checked by whoever uploads them. One that is out of range all the same reads nothing out of bounds: gather
// gives a row of NaN, scatter-add leaves it out.

#define THREADS 256

template <class T>
__device__ __forceinline__ void gather(const T* table, const int* index, real* y, int table_rows, int rows, int cols,
                                       int table_ld, int y_ld) {
    unsigned per_row = ((unsigned)cols + COLUMNS - 1) / COLUMNS;
    unsigned i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= per_row * rows) return;
    int row = (int)(i / per_row), c = COLUMNS * (int)(i % per_row);
    int from = index[row];
    Values value = all_of(NAN);
    if (from >= 0 && from < table_rows) value = load(table + (long long)from * table_ld + c, cols - c);
    store(y + (long long)row * y_ld + c, value, cols - c);
}

// y[n] = table[index[n]]. table [R, C], index [N], y [N, C].
extern "C" __global__ void __launch_bounds__(THREADS)
gather_forward_f32(const real* __restrict__ table, const int* __restrict__ index, real* __restrict__ y, int table_rows,
                   int rows, int cols, int table_ld, int y_ld) {
    gather(table, index, y, table_rows, rows, cols, table_ld, y_ld);
}

#ifdef HALF
// The same of a table in float32.
extern "C" __global__ void __launch_bounds__(THREADS)
gather_narrow_forward_f32(const float* __restrict__ table, const int* __restrict__ index, real* __restrict__ y,
                          int table_rows, int rows, int cols, int table_ld, int y_ld) {
    gather(table, index, y, table_rows, rows, cols, table_ld, y_ld);
}
#endif

// y[index[n]] += source[n], in the order of n. source [N, C], index [N], y [R, C], which holds the base already.
//
// The warp of the first row with some index owns that index: it adds the rows of all later equals. Finding them is a scan
// of the index by every warp, N * N / 32 comparisons, which costs less than sorting for the N of a batch.
extern "C" __global__ void __launch_bounds__(4 * WARP)
scatter_add_forward_f32(const real* __restrict__ source, const int* __restrict__ index, float* __restrict__ y,
                        int table_rows, int rows, int cols, int source_ld, int y_ld) {
    int row = blockIdx.x * 4 + threadIdx.x / WARP;
    int lane = threadIdx.x % WARP;
    int c = blockIdx.y * COLUMNS * WARP + COLUMNS * lane;
    if (row >= rows) return;
    int mine = index[row];
    if (mine < 0 || mine >= table_rows) return;
    for (int from = 0; from < row; from += WARP) {
        bool earlier = from + lane < row && index[from + lane] == mine;
        if (__ballot_sync(ALL_LANES, earlier)) return;
    }
    float* to = y + (long long)mine * y_ld + c;
    Values sum = load(to, cols - c);
    for (int from = row; from < rows; from += WARP) {
        bool equal = from + lane < rows && index[from + lane] == mine;
        for (unsigned found = __ballot_sync(ALL_LANES, equal); found; found &= found - 1) {
            int n = from + __ffs(found) - 1;
            Values v = load(source + (long long)n * source_ld + c, cols - c);
#pragma unroll
            for (int i = 0; i < COLUMNS; ++i) sum.x[i] += v.x[i];
        }
    }
    store(to, sum, cols - c);
}

#ifndef HALF
// y = how many labels are 0 or more. labels [N], y [].
extern "C" __global__ void __launch_bounds__(THREADS)
count_labels_forward_f32(const int* __restrict__ labels, float* __restrict__ y, int rows) {
    // Counts below 2^24 are exact in float32.
    float count = 0.f;
    for (int n = threadIdx.x; n < rows; n += THREADS) count += labels[n] >= 0 ? 1.f : 0.f;
    count = block_sum<THREADS / WARP>(count);
    if (threadIdx.x == 0) *y = count;
}
#endif
