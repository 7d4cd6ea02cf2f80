/* The loops in which the reference executor spends its time. Every result is a fixed sequence of fp32 operations that
 * depends on its own operands alone: not on the batch around it, the threads, or the processor's vector width. */
#ifndef PERK_SRC_REFERENCE_MATH_H
#define PERK_SRC_REFERENCE_MATH_H

#include <stddef.h>
#include <stdint.h>

/* Rows that callers had better hand over together. */
enum { PERK_MATH_ROWS = 4 };

/* out[v * out_stride + r] = sum over i of w[r * n + i] * x[v * n + i],  r < rows, v < vectors. */
void perk_math_dots(float *out, size_t out_stride, const float *w, size_t rows, const float *x, size_t vectors,
                    size_t n);

/* Sum of x[i] * y[i], in the order of perk_math_dots. */
float perk_math_dot(const float *x, const float *y, size_t n);

/* out[i] += sum over r of scale[r] * w[r * n + i], rows in rising order. */
void perk_math_add_rows(float *out, const float *scale, const float *w, size_t rows, size_t n);

void perk_math_widen_bf16(float *out, const uint16_t *in, size_t n);

#endif
