// Functions of one element: unary functions and their gradients, binary functions with suffix broadcast, dropout, the
// epilogue of a matrix product, and gated activations.
//
// Dimensions: N rows, C columns, M rows of a broadcast operand; G columns in 128 bits, 4 in float32, 8 in bfloat16.
// Launch of every kernel here: block = 256, grid = ceil(N * ceil(C / G) / 256); a thread has G columns of one row.
// A contiguous tensor is best given as one row of N * C elements, unless the kernel broadcasts.
// Shared memory: none.

#define THREADS 256

// The columns of a row that a thread has.
struct Group {
    int row;
    int col;
    int n;  // how many of them exist; 0 for a thread without work
};

__device__ __forceinline__ Group my_group(int rows, int cols) {
    unsigned per_row = ((unsigned)cols + COLUMNS - 1) / COLUMNS;
    unsigned i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= per_row * rows) return {0, 0, 0};
    int col = COLUMNS * (int)(i % per_row);
    return {(int)(i / per_row), col, min(COLUMNS, cols - col)};
}

template <class T>
__device__ __forceinline__ T* at(T* x, int row, int ld, int col) {
    return x + (long long)row * ld + col;
}

// ---- Functions of one argument -------------------------------------------------------------------------------------

#define SQRT_2_OVER_PI 0.7978845608028654f
#define SQRT_HALF 0.7071067811865476f
#define INV_SQRT_2PI 0.3989422804014327f
// The cubic coefficient inside GELU's tanh form. Source: Hendrycks and Gimpel 2016, section 2.
#define GELU_CUBIC 0.044715f

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

struct Exp {
    static __device__ __forceinline__ float f(float x) { return expf(x); }
    static __device__ __forceinline__ float df(float x) { return expf(x); }
};
struct Tanh {
    static __device__ __forceinline__ float f(float x) { return tanhf(x); }
    static __device__ __forceinline__ float df(float x) {
        float t = tanhf(x);
        return 1.f - t * t;
    }
};
struct Sigmoid {
    static __device__ __forceinline__ float f(float x) { return sigmoid(x); }
    static __device__ __forceinline__ float df(float x) {
        float s = sigmoid(x);
        return s * (1.f - s);
    }
};
struct Relu {
    static __device__ __forceinline__ float f(float x) { return x > 0.f ? x : x != x ? x : 0.f; }
    static __device__ __forceinline__ float df(float x) { return x > 0.f ? 1.f : 0.f; }
};
struct Gelu {
    static __device__ __forceinline__ float f(float x) { return 0.5f * x * (1.f + erff(x * SQRT_HALF)); }
    static __device__ __forceinline__ float df(float x) {
        return 0.5f * (1.f + erff(x * SQRT_HALF)) + x * INV_SQRT_2PI * expf(-0.5f * x * x);
    }
};
struct GeluTanh {
    static __device__ __forceinline__ float inner(float x) { return SQRT_2_OVER_PI * (x + GELU_CUBIC * x * x * x); }
    static __device__ __forceinline__ float f(float x) { return 0.5f * x * (1.f + tanhf(inner(x))); }
    static __device__ __forceinline__ float df(float x) {
        float t = tanhf(inner(x));
        return 0.5f * (1.f + t) + 0.5f * x * (1.f - t * t) * SQRT_2_OVER_PI * (1.f + 3.f * GELU_CUBIC * x * x);
    }
};
struct Silu {
    static __device__ __forceinline__ float f(float x) { return x * sigmoid(x); }
    static __device__ __forceinline__ float df(float x) {
        float s = sigmoid(x);
        return s * (1.f + x * (1.f - s));
    }
};

#define QUICK 1.702f
struct QuickGelu {
    static __device__ __forceinline__ float f(float x) { return x * sigmoid(QUICK * x); }
    static __device__ __forceinline__ float df(float x) {
        float s = sigmoid(QUICK * x);
        return s * (1.f + QUICK * x * (1.f - s));
    }
};
struct Relu2 {
    static __device__ __forceinline__ float f(float x) { return Relu::f(x) * Relu::f(x); }
    static __device__ __forceinline__ float df(float x) { return 2.f * Relu::f(x); }
};
struct Mish {
    // tanh(ln(1 + e^x)) = n / (n + 2) with n = e^x (e^x + 2); beyond 20 it is 1 to the last digit.
    static __device__ __forceinline__ float gate(float x) {
        float e = expf(fminf(x, 20.f)), n = e * (e + 2.f);
        return n / (n + 2.f);
    }
    static __device__ __forceinline__ float f(float x) { return x * gate(x); }
    static __device__ __forceinline__ float df(float x) {
        float g = gate(x);
        return g + x * (1.f - g * g) * sigmoid(x);
    }
};
struct Sqrt {
    static __device__ __forceinline__ float f(float x) { return sqrtf(x); }
    static __device__ __forceinline__ float df(float x) { return 0.5f / sqrtf(x); }
};
// The sign of 0 and of NaN is 0.
struct Sign {
    static __device__ __forceinline__ float f(float x) { return x > 0.f ? 1.f : x < 0.f ? -1.f : 0.f; }
    static __device__ __forceinline__ float df(float) { return 0.f; }
};

template <class F>
__device__ __forceinline__ Values map(Values v) {
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) v.x[i] = F::f(v.x[i]);
    return v;
}

template <class F>
__device__ __forceinline__ Values slopes(Values v) {
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) v.x[i] = F::df(v.x[i]);
    return v;
}

#define VALUES(o)                                                                                                      \
    __device__ __forceinline__ Values operator o(Values a, const Values& b) {                                          \
        _Pragma("unroll") for (int i = 0; i < COLUMNS; ++i) a.x[i] = a.x[i] o b.x[i];                                  \
        return a;                                                                                                      \
    }

VALUES(+)
VALUES(-)
VALUES(*)
VALUES(/)

// <f>_forward_f32: y = f(x). x, y [N, C]; y may be x.
// <f>_backward_f32: dx = f'(x) * dy. x, dy, dx [N, C]; dx may be dy or x.
#define UNARY(name, F)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
    name##_forward_f32(const real* x, real* y, int rows, int cols, int x_ld, int y_ld) {                               \
        Group g = my_group(rows, cols);                                                                                \
        if (g.n == 0) return;                                                                                          \
        Values value = load(at(x, g.row, x_ld, g.col), g.n);                                                           \
        store(at(y, g.row, y_ld, g.col), map<F>(value), g.n);                                                          \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
    name##_backward_f32(const real* x, const real* dy, real* dx, int rows, int cols, int x_ld, int dy_ld,              \
                        int dx_ld) {                                                                                   \
        Group g = my_group(rows, cols);                                                                                \
        if (g.n == 0) return;                                                                                          \
        Values slope = slopes<F>(load(at(x, g.row, x_ld, g.col), g.n));                                                \
        store(at(dx, g.row, dx_ld, g.col), slope * load(at(dy, g.row, dy_ld, g.col), g.n), g.n);                       \
    }

UNARY(exp, Exp)
UNARY(tanh, Tanh)
UNARY(sigmoid, Sigmoid)
UNARY(relu, Relu)
UNARY(gelu, Gelu)
UNARY(gelu_tanh, GeluTanh)
UNARY(silu, Silu)
UNARY(quick_gelu, QuickGelu)
UNARY(relu2, Relu2)
UNARY(mish, Mish)
UNARY(sqrt, Sqrt)
UNARY(sign, Sign)

// y = s * x, which is its own gradient. x, y [N, C]; y may be x.
extern "C" __global__ void __launch_bounds__(THREADS)
scale_forward_f32(const real* x, real* y, int rows, int cols, int x_ld, int y_ld, float s) {
    Group g = my_group(rows, cols);
    if (g.n == 0) return;
    Values value = load(at(x, g.row, x_ld, g.col), g.n);
    store(at(y, g.row, y_ld, g.col), value * all_of(s), g.n);
}

// y = value. y [N, C].
extern "C" __global__ void __launch_bounds__(THREADS)
fill_forward_f32(real* y, int rows, int cols, int y_ld, float value) {
    Group g = my_group(rows, cols);
    if (g.n == 0) return;
    store(at(y, g.row, y_ld, g.col), all_of(value), g.n);
}

#ifdef HALF
// y = x in 16 bits, ties to even. x, y [N, C].
extern "C" __global__ void __launch_bounds__(THREADS)
narrow_forward_f32(const float* __restrict__ x, real* __restrict__ y, int rows, int cols, int x_ld, int y_ld) {
    Group g = my_group(rows, cols);
    if (g.n == 0) return;
    store(at(y, g.row, y_ld, g.col), load(at(x, g.row, x_ld, g.col), g.n), g.n);
}

// y = x in float32. x, y [N, C].
extern "C" __global__ void __launch_bounds__(THREADS)
widen_forward_f32(const real* __restrict__ x, float* __restrict__ y, int rows, int cols, int x_ld, int y_ld) {
    Group g = my_group(rows, cols);
    if (g.n == 0) return;
    store(at(y, g.row, y_ld, g.col), load(at(x, g.row, x_ld, g.col), g.n), g.n);
}
#endif

// ---- Functions of two arguments ------------------------------------------------------------------------------------

// Row `row % b_rows` of b [M, C], or its only element where b has one column and the result has more.
__device__ __forceinline__ Values load_repeated(const real* b, Group g, int b_rows, int b_cols, int cols, int b_ld) {
    const real* row = at(b, g.row % b_rows, b_ld, 0);
    if (b_cols == cols) return load(row + g.col, g.n);
    return all_of(widen(row[0]));
}

// <f>_forward_f32: y = a o b. a, y [N, C]; b [M, C] with M a divisor of N (b_rows = M, b_cols = C), or one element
// (b_rows = b_cols = 1). y may be a. halt: see common.cuh.
#define BINARY(name, o)                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
    name##_forward_f32(const real* a, const real* b, real* y, int rows, int cols, int b_rows, int b_cols, int a_ld,    \
                       int b_ld, int y_ld, const int* halt) {                                                          \
        Group g = my_group(rows, cols);                                                                                \
        if (g.n == 0 || halted(halt)) return;                                                                          \
        Values left = load(at(a, g.row, a_ld, g.col), g.n);                                                            \
        Values right = load_repeated(b, g, b_rows, b_cols, cols, b_ld);                                                \
        store(at(y, g.row, y_ld, g.col), left o right, g.n);                                                           \
    }

BINARY(add, +)
BINARY(sub, -)
BINARY(mul, *)
BINARY(div, /)

// y = x repeated: shapes as for b above. With x [N, C] it is a copy, in float32 of any 32-bit type.
extern "C" __global__ void __launch_bounds__(THREADS)
broadcast_forward_f32(const real* x, real* y, int rows, int cols, int x_rows, int x_cols, int x_ld, int y_ld,
                      const int* halt) {
    Group g = my_group(rows, cols);
    if (g.n == 0 || halted(halt)) return;
    store(at(y, g.row, y_ld, g.col), load_repeated(x, g, x_rows, x_cols, cols, x_ld), g.n);
}

// ---- Dropout -------------------------------------------------------------------------------------------------------

// y = x * mask / (1 - p) (+ residual), element r * C + c drawing number r * C + c of the site; without the residual its own
// gradient. x, y and the optional residual [N, C], rng [4]; scale = 1 / (1 - p). The sum is one in float32, rounded once.
// y may be x or the residual.
extern "C" __global__ void __launch_bounds__(THREADS)
dropout_forward_f32(const real* x, const int* rng, const real* residual, real* y, int rows, int cols, int x_ld,
                    int residual_ld, int y_ld, unsigned stream, float p, float scale) {
    Group g = my_group(rows, cols);
    if (g.n == 0) return;
    Keep keep = keep_rule(rng, stream, p, scale);
    Values factor = keep_factors(keep, (unsigned long long)g.row * cols + g.col);
    Values value = load(at(x, g.row, x_ld, g.col), g.n);
    // What falls out is 0, whatever it was.
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) value.x[i] = factor.x[i] == 0.f ? 0.f : value.x[i] * factor.x[i];
    if (residual) value = value + load(at(residual, g.row, residual_ld, g.col), g.n);
    store(at(y, g.row, y_ld, g.col), value, g.n);
}

// ---- The epilogue of a matrix product ------------------------------------------------------------------------------

// Numbers of the functions in epilogue_forward_f32; 0 is none.
enum Function { NONE, EXP, TANH, SIGMOID, RELU, GELU, GELU_TANH, SILU, QUICK_GELU, RELU2, MISH, SQRT, SIGN };

__device__ __forceinline__ Values apply(int function, Values x) {
    switch (function) {
        case EXP: return map<Exp>(x);
        case TANH: return map<Tanh>(x);
        case SIGMOID: return map<Sigmoid>(x);
        case RELU: return map<Relu>(x);
        case GELU: return map<Gelu>(x);
        case GELU_TANH: return map<GeluTanh>(x);
        case SILU: return map<Silu>(x);
        case QUICK_GELU: return map<QuickGelu>(x);
        case RELU2: return map<Relu2>(x);
        case MISH: return map<Mish>(x);
        case SQRT: return map<Sqrt>(x);
        case SIGN: return map<Sign>(x);
        default: return x;
    }
}

__device__ __forceinline__ Values apply_slope(int function, Values x) {
    switch (function) {
        case EXP: return slopes<Exp>(x);
        case TANH: return slopes<Tanh>(x);
        case SIGMOID: return slopes<Sigmoid>(x);
        case RELU: return slopes<Relu>(x);
        case GELU: return slopes<Gelu>(x);
        case GELU_TANH: return slopes<GeluTanh>(x);
        case SILU: return slopes<Silu>(x);
        case QUICK_GELU: return slopes<QuickGelu>(x);
        case RELU2: return slopes<Relu2>(x);
        case MISH: return slopes<Mish>(x);
        case SQRT: return slopes<Sqrt>(x);
        case SIGN: return slopes<Sign>(x);
        default: return all_of(1.f);
    }
}

// pre = product + bias; y = act(pre) * act_grad'(x) + residual. product, y, and the optional pre, x, residual [N, C];
// optional bias [C]; act, act_grad: members of Function. y may be the product or the residual.
extern "C" __global__ void __launch_bounds__(THREADS)
epilogue_forward_f32(const real* product, const real* bias, const real* x, const real* residual, real* y, real* pre,
                     int rows, int cols, int product_ld, int x_ld, int residual_ld, int y_ld, int pre_ld, int act,
                     int act_grad) {
    Group g = my_group(rows, cols);
    if (g.n == 0) return;
    Values value = load(at(product, g.row, product_ld, g.col), g.n);
    if (bias) value = value + load(bias + g.col, g.n);
    if (pre) store(at(pre, g.row, pre_ld, g.col), value, g.n);
    value = apply(act, value);
    if (x) value = value * apply_slope(act_grad, load(at(x, g.row, x_ld, g.col), g.n));
    if (residual) value = value + load(at(residual, g.row, residual_ld, g.col), g.n);
    store(at(y, g.row, y_ld, g.col), value, g.n);
}

// y = act(gate) * up. gate, up, y [N, C]; act: a member of Function. y may be gate or up.
extern "C" __global__ void __launch_bounds__(THREADS)
gated_forward_f32(const real* gate, const real* up, real* y, int rows, int cols, int gate_ld, int up_ld, int y_ld,
                  int act) {
    Group g = my_group(rows, cols);
    if (g.n == 0) return;
    Values value = apply(act, load(at(gate, g.row, gate_ld, g.col), g.n));
    store(at(y, g.row, y_ld, g.col), value * load(at(up, g.row, up_ld, g.col), g.n), g.n);
}

// dgate = dy * up * act'(gate), dup = dy * act(gate). All [N, C]; each result may be any of the operands.
extern "C" __global__ void __launch_bounds__(THREADS)
gated_backward_f32(const real* dy, const real* gate, const real* up, real* dgate, real* dup, int rows, int cols,
                   int dy_ld, int gate_ld, int up_ld, int dgate_ld, int dup_ld, int act) {
    Group g = my_group(rows, cols);
    if (g.n == 0) return;
    Values d = load(at(dy, g.row, dy_ld, g.col), g.n), x = load(at(gate, g.row, gate_ld, g.col), g.n);
    Values through = d * load(at(up, g.row, up_ld, g.col), g.n);
    store(at(dgate, g.row, dgate_ld, g.col), through * apply_slope(act, x), g.n);
    store(at(dup, g.row, dup_ld, g.col), d * apply(act, x), g.n);
}
