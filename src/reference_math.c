/* Written with the compilers' vector types, so that the order of every sum is in the source and no flag changes it. */
#include "reference_math.h"

#include <string.h>

#define INLINED static inline __attribute__((always_inline))

enum { LANES = 16, VECTORS = 4 };
typedef float lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef uint32_t lanes_u32 __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint16_t lanes_u16 __attribute__((vector_size(LANES * sizeof(uint16_t))));

/* Adds what is left behind the last whole vector, then the lanes, pairwise. */
INLINED float finish(const lanes *sums, const float *w, const float *x, size_t left) {
    float sum[LANES];
    memcpy(sum, sums, sizeof sum);
    for (size_t i = 0; i < left; i++) sum[i] += w[i] * x[i];
    for (size_t half = LANES / 2; half; half /= 2)
        for (size_t i = 0; i < half; i++) sum[i] += sum[i + half];
    return sum[0];
}

/* perk_math_dots with small constant `rows` and `vectors`: the sums stay in registers. */
INLINED void dots_tile(float *out, size_t out_stride, const float *w, size_t rows, const float *x, size_t vectors,
                       size_t n) {
    lanes sums[PERK_MATH_ROWS][VECTORS] = {0};
    size_t whole = n / LANES * LANES;
    for (size_t i = 0; i < whole; i += LANES) {
        lanes a[PERK_MATH_ROWS], b[VECTORS];
        for (size_t r = 0; r < rows; r++) memcpy(&a[r], w + r * n + i, sizeof a[r]);
        for (size_t v = 0; v < vectors; v++) memcpy(&b[v], x + v * n + i, sizeof b[v]);
        for (size_t r = 0; r < rows; r++)
            for (size_t v = 0; v < vectors; v++) sums[r][v] += a[r] * b[v];
    }
    for (size_t r = 0; r < rows; r++)
        for (size_t v = 0; v < vectors; v++)
            out[v * out_stride + r] = finish(&sums[r][v], w + r * n + whole, x + v * n + whole, n - whole);
}

INLINED void dots_rows(float *out, size_t out_stride, const float *w, size_t rows, const float *x, size_t vectors,
                       size_t n) {
    size_t v = 0;
    for (; v + VECTORS <= vectors; v += VECTORS)
        dots_tile(out + v * out_stride, out_stride, w, rows, x + v * n, VECTORS, n);
    for (; v < vectors; v++) dots_tile(out + v * out_stride, out_stride, w, rows, x + v * n, 1, n);
}

INLINED void dots(float *out, size_t out_stride, const float *w, size_t rows, const float *x, size_t vectors,
                  size_t n) {
    size_t r = 0;
    for (; r + PERK_MATH_ROWS <= rows; r += PERK_MATH_ROWS)
        dots_rows(out + r, out_stride, w + r * n, PERK_MATH_ROWS, x, vectors, n);
    for (; r < rows; r++) dots_rows(out + r, out_stride, w + r * n, 1, x, vectors, n);
}

INLINED void add_rows(float *out, const float *scale, const float *w, size_t rows, size_t n) {
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        lanes sum, row;
        memcpy(&sum, out + i, sizeof sum);
        for (size_t r = 0; r < rows; r++) {
            memcpy(&row, w + r * n + i, sizeof row);
            sum += scale[r] * row;
        }
        memcpy(out + i, &sum, sizeof sum);
    }
    for (; i < n; i++)
        for (size_t r = 0; r < rows; r++) out[i] += scale[r] * w[r * n + i];
}

INLINED void widen_bf16(float *out, const uint16_t *in, size_t n) {
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        lanes_u16 narrow;
        memcpy(&narrow, in + i, sizeof narrow);
        lanes_u32 wide = __builtin_convertvector(narrow, lanes_u32) << 16;
        memcpy(out + i, &wide, sizeof wide);
    }
    for (; i < n; i++) {
        uint32_t bits = (uint32_t)in[i] << 16;
        memcpy(out + i, &bits, sizeof bits);
    }
}

/* ---- one body, compiled for each width of vectors; the processor decides at every call, which costs a load ---- */

#if defined(__x86_64__)
#define FOR_EACH_WIDTH(name, parameters, arguments)                                                                    \
    __attribute__((target("avx512f"))) static void name##_avx512 parameters { name arguments; }                        \
    __attribute__((target("avx2"))) static void name##_avx2 parameters { name arguments; }                             \
    void perk_math_##name parameters {                                                                                 \
        if (__builtin_cpu_supports("avx512f"))                                                                         \
            name##_avx512 arguments;                                                                                   \
        else if (__builtin_cpu_supports("avx2"))                                                                       \
            name##_avx2 arguments;                                                                                     \
        else                                                                                                           \
            name arguments;                                                                                            \
    }
#else
#define FOR_EACH_WIDTH(name, parameters, arguments)                                                                    \
    void perk_math_##name parameters { name arguments; }
#endif

FOR_EACH_WIDTH(dots,
               (float *out, size_t out_stride, const float *w, size_t rows, const float *x, size_t vectors, size_t n),
               (out, out_stride, w, rows, x, vectors, n))
FOR_EACH_WIDTH(add_rows, (float *out, const float *scale, const float *w, size_t rows, size_t n),
               (out, scale, w, rows, n))
FOR_EACH_WIDTH(widen_bf16, (float *out, const uint16_t *in, size_t n), (out, in, n))

float perk_math_dot(const float *x, const float *y, size_t n) {
    float sum;
    perk_math_dots(&sum, 1, x, 1, y, 1, n);
    return sum;
}
