/* Source text to cubin, through NVRTC. */
#ifndef PERK_JIT_COMPILE_H
#define PERK_JIT_COMPILE_H

#include "jit/nvrtc.h"

typedef struct perk_compile_header {
    const char *name; /* exactly what the #include says between its quotes */
    const char *text; /* NUL-terminated */
} perk_compile_header;

/* Everything is borrowed for the call. Headers come from memory alone: no folder of the disk is searched. */
typedef struct perk_compile_request {
    const char *source; /* NUL-terminated CUDA C++ */
    const char *name;   /* what errors call the source; NULL: "perk.cu" */
    const perk_compile_header *headers;
    size_t header_count;
    const char *arch;           /* "sm_90a", with the suffix that the source's instructions need */
    const char *const *options; /* after perk_compile_options */
    size_t option_count;
    const perk_log *log; /* the compiler's log, line by line: DEBUG, but its warnings as WARNING; NULL: silence */
} perk_compile_request;

typedef struct perk_compile_result {
    unsigned char *cubin;
    size_t cubin_size;
    char *log;                   /* what NVRTC and ptxas said; never NULL on success */
    size_t spill_bytes;          /* bytes of spill stores and loads in all functions, as ptxas reports them */
    size_t performance_warnings; /* lines "(C75xx) Potential Performance Loss": wgmma or setmaxnreg undone */
    double milliseconds;
} perk_compile_result;

/* The options of every compile that can change a cubin, in their order, NULL at the end: part of the cache key, beside
 * arch and request options. */
const char *const *perk_compile_options(void);

/* Compiles on a thread of its own (the compiler needs a deep stack, and would else raise the process's stack limit).
 * Thread-safe; several compiles may run at once. Failures: PERK_COMPILE with the compiler's errors, first errors first,
 * in the message; PERK_UNSUPPORTED for an architecture that this NVRTC does not know. */
perk_status perk_compile(const perk_nvrtc *nvrtc, const perk_compile_request *request, perk_compile_result *result,
                         perk_error *err);
void perk_compile_result_free(perk_compile_result *result);

/* The architecture to compile for on a device of capability major.minor, with the suffix that gives access to the
 * instructions of that chip alone: 8.6 -> "sm_86", 9.0 -> "sm_90a", 12.0 -> "sm_120a". */
void perk_arch_of_capability(int major, int minor, char arch[16]);

#endif
