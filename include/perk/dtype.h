/* perk: element types of tensors. */
#ifndef PERK_DTYPE_H
#define PERK_DTYPE_H

#include "perk/base.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The numbers are part of the ABI: new types are added at the end. */
typedef enum perk_dtype { PERK_BF16 = 0, PERK_F16 = 1, PERK_F32 = 2, PERK_I32 = 3 } perk_dtype;

/* Bytes of one element; 0 for a number that is no dtype. Thread-safe. */
PERK_API size_t perk_dtype_size(perk_dtype dtype);

/* "bf16", "f16", "f32", "i32"; "unknown" for a number that is no dtype. Static, thread-safe. */
PERK_API const char *perk_dtype_name(perk_dtype dtype);

#ifdef __cplusplus
}
#endif
#endif
