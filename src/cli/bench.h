/* What perk bench can measure, one file each. */
#ifndef PERK_SRC_CLI_BENCH_H
#define PERK_SRC_CLI_BENCH_H

#include "cli.h"

typedef struct perk_bench_load_options {
    const char *model;
    int32_t threads;
    int warm; /* leave the weights in the page cache, so that memory and bus are measured */
    int verbose, json;
} perk_bench_load_options;

/* Prints how fast the weights of a folder load; returns an exit code. */
int perk_bench_load(const perk_bench_load_options *options);

#endif
