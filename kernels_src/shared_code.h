/* Code that runs on the host and in the kernel alike: C11 for the one, C++ for NVRTC, and the same text. What both
 * take: static inline functions, flat arrays that somebody else allocated, 32-bit and 64-bit integers. No library, no
 * recursion, no designated initialisers, no pointer inside what both sides see. */
#ifndef PERK_SHARED_CODE_H
#define PERK_SHARED_CODE_H

#include "abi.h"

#ifdef __CUDACC_RTC__
typedef long long int64_t;
#define PERK_SHARED_CODE static __device__ inline
#else
#define PERK_SHARED_CODE static inline
#endif

PERK_SHARED_CODE int32_t perk_lesser(int32_t a, int32_t b) { return a < b ? a : b; }
PERK_SHARED_CODE int32_t perk_greater(int32_t a, int32_t b) { return a > b ? a : b; }

/* The pieces of up to `size` that `length` falls into; both together below 2^31. */
PERK_SHARED_CODE int32_t perk_pieces(int32_t length, int32_t size) { return (length + size - 1) / size; }

#endif
