/* What a compiled kernel needs, read from the cubin itself: registers, local memory, shared memory, code size.
 *
 * The cubin is an ELF file; the sections .nv.info and .nv.info.<kernel> hold the records. Their layout is not
 * documented by the vendor: it was read from cubins of NVRTC 12.0 to 13.0 for sm_80 to sm_120a, and
 * tests/test_cubin_info.c compares it with what ptxas says. */
#ifndef PERK_JIT_CUBIN_INFO_H
#define PERK_JIT_CUBIN_INFO_H

#include "src/base.h"

typedef struct perk_cubin_kernel_info {
    int capability;                 /* of the whole cubin: 80, 90, 120 */
    uint32_t registers;             /* a thread */
    uint32_t frame_bytes;           /* the kernel's local memory a thread: spills and local arrays */
    uint32_t stack_bytes;           /* the same with the deepest chain of calls */
    uint32_t spill_instructions;    /* recorded by NVRTC 12.9 and newer; older ones show spills in frame_bytes alone */
    uint32_t shared_bytes;          /* static shared memory, without what follows */
    uint32_t reserved_shared_bytes; /* what the system keeps of a block's shared memory: 1024 from sm_90 on */
    uint32_t max_threads;           /* of a block, from __launch_bounds__; 0: no bound */
    uint64_t code_bytes;
    bool spills; /* some register is spilled, as far as the cubin tells */
} perk_cubin_kernel_info;

/* Every offset, size and index of the file is checked, so damaged input is PERK_BAD_FORMAT; PERK_NOT_FOUND when there
 * is no such kernel. Thread-safe. */
perk_status perk_cubin_info(const void *cubin, size_t size, const char *kernel, perk_cubin_kernel_info *info,
                            perk_error *err);

#endif
