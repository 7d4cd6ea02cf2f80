/* The device code of kernels_src/ and the files of page/, embedded in the library as text. */
#ifndef PERK_JIT_EMBEDDED_H
#define PERK_JIT_EMBEDDED_H
#include <stddef.h>

typedef struct perk_embedded_file {
    const char *name; /* "linear.cuh": of device code, what an #include says */
    const char *text; /* NUL-terminated */
    size_t size;      /* bytes, without the NUL */
} perk_embedded_file;

/* Each ends with a row whose name is NULL. */
extern const perk_embedded_file perk_embedded_files[]; /* kernels_src/ */
extern const perk_embedded_file perk_embedded_pages[]; /* page/ */
#endif
