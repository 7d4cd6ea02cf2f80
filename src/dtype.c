#include "perk/dtype.h"

size_t perk_dtype_size(perk_dtype dtype) {
    switch (dtype) {
    case PERK_BF16:
    case PERK_F16: return 2;
    case PERK_F32:
    case PERK_I32: return 4;
    }
    return 0;
}

const char *perk_dtype_name(perk_dtype dtype) {
    switch (dtype) {
    case PERK_BF16: return "bf16";
    case PERK_F16: return "f16";
    case PERK_F32: return "f32";
    case PERK_I32: return "i32";
    }
    return "unknown";
}
