/* Writing a matrix of floats as NumPy's .npy, version 1.0, row by row. */
#ifndef PERK_SRC_CLI_NPY_H
#define PERK_SRC_CLI_NPY_H

#include "src/base.h"

#include <stdio.h>

typedef struct perk_npy {
    FILE *file;
    const char *path; /* borrowed */
    uint64_t cols;
} perk_npy;

/* Creates `path` and writes the header of float32 [rows, cols]; exactly that many rows must follow. */
perk_status perk_npy_create(perk_npy *npy, const char *path, uint64_t rows, uint64_t cols, perk_error *err);
perk_status perk_npy_write(perk_npy *npy, const float *values, size_t rows, perk_error *err);
/* Closes the file. With `keep` false a regular file is removed: nobody shall read half of a result. */
perk_status perk_npy_close(perk_npy *npy, bool keep, perk_error *err);

#endif
