/* How far values are from those wanted, in units of bf16 rounding. */
#include "test_mode.h"

#include <math.h>

/* The distance of bf16 numbers around this magnitude: 8 significant bits; below 2^-126 as there. */
static double bf16_unit(double magnitude) {
    int exponent = -125;
    if (magnitude > 0x1p-126) frexp(magnitude, &exponent);
    return ldexp(1, exponent - 8);
}

static double root_mean_square(const float *row, size_t cols) {
    double sum = 0;
    for (size_t i = 0; i < cols; i++)
        if (isfinite(row[i])) sum += (double)row[i] * (double)row[i];
    return sqrt(sum / (double)PERK_MAX(cols, (size_t)1));
}

void perk_test_measure_by(const float *got, const float *wanted, size_t rows, size_t cols, double unit,
                          perk_test_difference *out) {
    double squares = 0, norm = 0;
    *out = (perk_test_difference){.worst = -1, .count = rows * cols};
    for (size_t row = 0; row < rows; row++) {
        const float *g = got + row * cols, *w = wanted + row * cols;
        double scale = root_mean_square(w, cols);
        for (size_t col = 0; col < cols; col++) {
            double difference = fabs((double)g[col] - (double)w[col]), units = INFINITY;
            if (isfinite(difference))
                units = difference / (unit > 0 ? unit : bf16_unit(fmax(fabs((double)w[col]), scale)));
            else if (g[col] == w[col])
                units = difference = 0; /* the same infinity */
            if (isinf(units)) out->unusable++;
            squares += difference * difference;
            if (isfinite(w[col])) norm += (double)w[col] * (double)w[col];
            if (!(units > out->worst)) continue;
            out->worst = units;
            out->row = row;
            out->col = col;
            out->got = (double)g[col];
            out->wanted = (double)w[col];
        }
    }
    out->worst = fmax(out->worst, 0);
    out->relative = out->unusable ? INFINITY : squares > 0 ? sqrt(squares / fmax(norm, 1e-300)) : 0;
}

void perk_test_measure(const float *got, const float *wanted, size_t rows, size_t cols, perk_test_difference *out) {
    perk_test_measure_by(got, wanted, rows, cols, 0, out);
}
