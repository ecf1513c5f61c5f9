// Rows by index: gather, scatter-add, counting labels.
//
// Dimensions: R rows of a table, N rows, C columns.
// Launch:
//   gather_forward_f32            block = 256, grid = ceil(N * ceil(C / 4) / 256): a thread has four columns.
//   scatter_add_forward_f32       block = 128, grid = (ceil(N / 4), ceil(C / 128)): a warp has 128 columns of a row.
//   count_labels_forward_f32      block = 256, grid = 1.
// Shared memory: static, 32 bytes in count_labels_forward_f32.
//
// Indices are checked by whoever uploads them. One that is out of range all the same reads nothing out of bounds: gather
// gives a row of NaN, scatter-add leaves it out.

#define THREADS 256

// y[n] = table[index[n]]. table [R, C], index [N], y [N, C].
extern "C" __global__ void __launch_bounds__(THREADS)
gather_forward_f32(const float* __restrict__ table, const int* __restrict__ index, float* __restrict__ y, int table_rows,
                   int rows, int cols, int table_ld, int y_ld) {
    unsigned per_row = ((unsigned)cols + 3) / 4;
    unsigned i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= per_row * rows) return;
    int row = (int)(i / per_row), c = 4 * (int)(i % per_row);
    int from = index[row];
    float4 value = make_float4(NAN, NAN, NAN, NAN);
    if (from >= 0 && from < table_rows) value = load4(table + (long long)from * table_ld + c, cols - c);
    store4(y + (long long)row * y_ld + c, value, cols - c);
}

// y[index[n]] += source[n], in the order of n. source [N, C], index [N], y [R, C], which holds the base already.
//
// The warp of the first row with some index owns that index: it adds the rows of all later equals. Finding them is a scan
// of the index by every warp, N * N / 32 comparisons, which costs less than sorting for the N of a batch.
extern "C" __global__ void __launch_bounds__(4 * WARP)
scatter_add_forward_f32(const float* __restrict__ source, const int* __restrict__ index, float* __restrict__ y,
                        int table_rows, int rows, int cols, int source_ld, int y_ld) {
    int row = blockIdx.x * 4 + threadIdx.x / WARP;
    int lane = threadIdx.x % WARP;
    int c = blockIdx.y * 4 * WARP + 4 * lane;
    if (row >= rows) return;
    int mine = index[row];
    if (mine < 0 || mine >= table_rows) return;
    for (int from = 0; from < row; from += WARP) {
        bool earlier = from + lane < row && index[from + lane] == mine;
        if (__ballot_sync(ALL_LANES, earlier)) return;
    }
    float* to = y + (long long)mine * y_ld + c;
    float4 sum = load4(to, cols - c);
    for (int from = row; from < rows; from += WARP) {
        bool equal = from + lane < rows && index[from + lane] == mine;
        for (unsigned found = __ballot_sync(ALL_LANES, equal); found; found &= found - 1) {
            int n = from + __ffs(found) - 1;
            float4 x = load4(source + (long long)n * source_ld + c, cols - c);
            sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
        }
    }
    store4(to, sum, cols - c);
}

// y = how many labels are 0 or more. labels [N], y [].
extern "C" __global__ void __launch_bounds__(THREADS)
count_labels_forward_f32(const int* __restrict__ labels, float* __restrict__ y, int rows) {
    // Counts below 2^24 are exact in float32.
    float count = 0.f;
    for (int n = threadIdx.x; n < rows; n += THREADS) count += labels[n] >= 0 ? 1.f : 0.f;
    count = block_sum<THREADS / WARP>(count);
    if (threadIdx.x == 0) *y = count;
}
