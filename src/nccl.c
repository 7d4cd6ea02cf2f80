#include "nccl.h"

#include <stdio.h>

static const char *const NAMES[] = {"libnccl.so.2", NULL};
static const char *const PIP_FOLDERS[] = {"nvidia/nccl/lib", NULL};

static const perk_library_spec NCCL_SPEC = {
    .title = "NCCL",
    .override = "PERK_LIBNCCL",
    .names = NAMES,
    .pip_folders = PIP_FOLDERS,
    .missing = PERK_NOT_FOUND,
    .advice = "Only several GPUs need it: install the package libnccl2 or the pip package nvidia-nccl, or set "
              "PERK_LIBNCCL to the path of libnccl.so.2.",
    .ask_loader = true,
};

perk_status perk_nccl_probe(perk_nccl_info *out, perk_error *err) {
    *out = (perk_nccl_info){0};
    perk_library library;
    perk_status status = perk_library_open(&library, &NCCL_SPEC, err);
    if (status != PERK_OK) return status;
    int (*get_version)(int *version) = NULL;
    if (!perk_library_symbol(&library, "ncclGetVersion", &get_version) || get_version(&out->version) != 0)
        status = perk_fail(err, PERK_NOT_FOUND, "%s: does not tell its version, so it is no NCCL", library.path);
    else
        snprintf(out->path, sizeof out->path, "%s", library.path);
    perk_library_close(&library);
    return status;
}
