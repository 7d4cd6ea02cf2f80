/* The device code of kernels_src/, embedded in the library as text. */
#ifndef PERK_JIT_EMBEDDED_H
#define PERK_JIT_EMBEDDED_H
#include <stddef.h>

typedef struct perk_embedded_file {
    const char *name; /* "linear.cuh": what an #include in device code says */
    const char *text; /* NUL-terminated */
    size_t size;      /* bytes, without the NUL */
} perk_embedded_file;

extern const perk_embedded_file perk_embedded_files[]; /* ends with a row whose name is NULL */
#endif
