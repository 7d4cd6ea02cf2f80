/* A program: the cubin of a plan's kernel, from the cache or from the compiler. The one place that turns source into a
 * cubin; the GPU executor and `perk compile` both come here.
 *
 * A cubin's key is a hash over all that decides it: format version, source, names and texts of the headers, options,
 * architecture, NVRTC's build-id (jit/nvrtc.h says which, and what the alias for any NVRTC is for). A warm start
 * hashes, reads one file and opens no NVRTC. */
#ifndef PERK_SRC_PROGRAM_H
#define PERK_SRC_PROGRAM_H

#include "jit/compile.h"
#include "jit/cubin_info.h"
#include "perk/cache.h"
#include "plan.h"

/* Everything is borrowed for the call. */
typedef struct perk_program_options {
    perk_cache *cache;      /* NULL: no cache, every build compiles */
    int driver_version;     /* as cuDriverGetVersion gives it (12080): which NVRTC suits; 0: unknown */
    bool compile_forbidden; /* what is not in the cache is a failure, even where there is an NVRTC */
    bool made_anew;         /* what the cache holds is not used, and replaced */
    const perk_log *log;    /* NULL: silence */
} perk_program_options;

/* Source text and what it takes to compile it. Everything is borrowed for the call. */
typedef struct perk_program_source {
    const char *name; /* what the compiler's messages call the text; part of the key. NULL: "program.cu" */
    const char *text; /* NUL-terminated CUDA C++ */
    const perk_compile_header *headers;
    size_t header_count;
    const char *arch;   /* "sm_90a" */
    const char *kernel; /* the extern "C" kernel whose needs are reported, and which should not spill */
} perk_program_source;

typedef struct perk_program {
    unsigned char *cubin;
    size_t cubin_size;
    perk_cubin_kernel_info kernel;      /* read from the cubin, so the same for a hit and a compile */
    perk_cache_key key;                 /* where the cache has it, or would have it */
    char nvrtc[PERK_LIBRARY_PATH_SIZE]; /* the NVRTC that the key names; "" where there is none */
    size_t source_bytes;                /* without headers */
    size_t spill_bytes; /* local memory a thread: perk's kernels keep no arrays there, so all of it is spills */
    bool cache_hit;
    double emit_ms;    /* source and headers; 0 from perk_program_build_source */
    double lookup_ms;  /* identifying NVRTC, the key, the cache */
    double compile_ms; /* opening NVRTC and compiling; 0 for a hit */
} perk_program;

/* Emits the plan's source and builds it; the kernel is PERK_KERNEL_NAME (jit/emit.h). On failure *out is zeroed.
 * Failures: PERK_NO_COMPILER (not cached, and no NVRTC), PERK_NOT_FOUND (not cached, and compiling is forbidden),
 * PERK_COMPILE, PERK_UNSUPPORTED (this NVRTC does not know the architecture), PERK_OUT_OF_MEMORY. A cache that does not
 * work is never a failure. Thread-safe. */
perk_status perk_program_build(const perk_plan *plan, const perk_program_options *options, perk_program *out,
                               perk_error *err);
/* The same for plain source text. */
perk_status perk_program_build_source(const perk_program_source *source, const perk_program_options *options,
                                      perk_program *out, perk_error *err);
/* Accepts a zeroed program. */
void perk_program_free(perk_program *program);

#endif
