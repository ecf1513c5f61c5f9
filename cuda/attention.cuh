// What attention.cu and attention_bf16.cu share: heads, masks, the gradient of a score.

#define TILE 64  // queries or keys of a block

// What of a sequence belongs to one head: `rows` tokens, `ld` apart, `width` elements each.
struct Rows {
    const float* x;
    int ld;
    int rows;
    int width;
};

__device__ __forceinline__ Rows head_rows(const float* x, int ld, int b, int head, int tokens, int width) {
    return {x + (long long)b * tokens * ld + (long long)head * width, ld, tokens, width};
}

// ---- Which keys a query sees ---------------------------------------------------------------------------------------

struct Mask {
    const int* segments;  // of this sequence, or null
    int tokens;
    int causal;
    int window;
    int prefix;  // keys that all queries may see

    __device__ __forceinline__ bool sees(int i, int j) const {
        if (i >= tokens || j >= tokens || (causal && j > i && j >= prefix) || i - j >= window || j - i >= window) return false;
        if (!segments) return true;
        int own = segments[i], other = segments[j];
        return other != 0 && (own == other || own == 0);
    }

    // The first tile of keys that some query from `i` on sees, and the end of those that queries before `end` see.
    __device__ __forceinline__ int first_key(int i) const { return max(0, i - window + 1) / TILE * TILE; }
    __device__ __forceinline__ int end_key(int end) const {
        int last = causal ? min(max(end, prefix), tokens) : tokens;
        return window >= tokens ? last : min(last, end - 1 + window);
    }

    // The probability of key j for a query that sees nothing, or 0 for one that sees something.
    __device__ __forceinline__ float blind_weight(bool blind, int j) const { return blind && j < tokens ? 1.f / tokens : 0.f; }

    // The same for the queries that see some key from `j` on, and before `end`.
    __device__ __forceinline__ int first_query(int j) const {
        return (causal && j >= prefix ? j : max(0, j - window + 1)) / TILE * TILE;
    }
    __device__ __forceinline__ int end_query(int end) const { return window >= tokens ? tokens : min(tokens, end - 1 + window); }
};

// p and dp of a tile -> (p * keep) and the score gradient p * (dp * keep - delta) * scale, in place; zeros for a query that
// sees nothing, whose probabilities depend on no score.
__device__ __forceinline__ void score_gradient(float& p, float& dp, bool seen, float bias, float lse, float delta,
                                               float factor, float scale) {
    p = seen && lse != -INFINITY ? expf(p * scale + bias - lse) : 0.f;
    dp = p * (dp * factor - delta) * scale;
    p *= factor;
}
