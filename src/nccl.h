/* NCCL: whether it is there, and which version. Nothing of it is used yet. */
#ifndef PERK_SRC_NCCL_H
#define PERK_SRC_NCCL_H

#include "dynlib.h"

typedef struct perk_nccl_info {
    char path[PERK_LIBRARY_PATH_SIZE];
    int version; /* as ncclGetVersion counts: 22809 for 2.28.9 */
} perk_nccl_info;

/* Loads the library to ask it. PERK_NOT_FOUND, with what was tried, when there is none. */
perk_status perk_nccl_probe(perk_nccl_info *out, perk_error *err);

#endif
