// What the files of attention share: heads, masks.

#define TILE 64  // visits of keys and of queries begin at multiples of it

// What of a sequence belongs to one head: `rows` tokens, `ld` apart, `width` elements each.
template <class T>
struct Rows {
    const T* x;
    int ld;
    int rows;
    int width;
};

template <class T>
__device__ __forceinline__ Rows<T> head_rows(const T* x, int ld, int b, int head, int tokens, int width) {
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

    // Of queries i .. i + n and keys j .. j + m: whether all see all, and whether some may see some.
    __device__ __forceinline__ bool all(int i, int n, int j, int m) const {
        bool before = !causal || j + m - 1 <= i || j + m <= prefix;
        return !segments && before && i + n <= tokens && j + m <= tokens && i + n - 1 - j < window && j + m - 1 - i < window;
    }
    __device__ __forceinline__ bool some(int i, int n, int j, int m) const {
        bool after = causal && j > i + n - 1 && j >= prefix;
        return !after && i < tokens && j < tokens && i - (j + m - 1) < window && j - (i + n - 1) < window;
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
