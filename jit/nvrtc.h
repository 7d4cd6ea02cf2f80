/* NVRTC, opened at run time: which one there is (without loading it), its functions, what it can compile for.
 *
 * NVRTC's part of a cubin's cache key is the build-id of the library, read from its file, so a warm start never opens
 * NVRTC. How a start uses it:
 *  - found: look up under perk_nvrtc_identity.build_id. After a compile, store under that key, and store under the key
 *    with PERK_NVRTC_ANY in its place too: an alias that says "compiled by some NVRTC from the same other parts".
 *  - absent (build_id is PERK_NVRTC_ANY): look up the alias. So a deployment may ship cubins and no NVRTC, and a
 *    machine that loses its NVRTC keeps starting. Nothing found: the start fails with PERK_NO_COMPILER.
 *  - another one than before: its build-id gives another key, so the program is compiled again, and the alias then
 *    names the newest result. The alias is never consulted where an NVRTC is found.
 */
#ifndef PERK_JIT_NVRTC_H
#define PERK_JIT_NVRTC_H

#include "src/dynlib.h"

#include <nvrtc.h>

#define PERK_NVRTC_ANY "any"

typedef struct perk_nvrtc_identity {
    bool found;
    char path[PERK_LIBRARY_PATH_SIZE];
    char build_id[PERK_BUILD_ID_SIZE]; /* hex; "file-<size>-<mtime>" without one; PERK_NVRTC_ANY when not found */
    char version[24];                  /* "13.0" where file names tell, else "13" or "" */
} perk_nvrtc_identity;

/* Says which NVRTC perk_nvrtc_open would open, and loads nothing. `driver_version` as cuDriverGetVersion gives it
 * (12080) puts a newer major version than the driver's last, because an older driver may refuse its cubins; 0: unknown.
 * Where there is none: PERK_NO_COMPILER with what was tried, and *out is the identity of absence. */
perk_status perk_nvrtc_identify(int driver_version, perk_nvrtc_identity *out, perk_error *err);

#define PERK_NVRTC_FUNCTIONS(X)                                                                                        \
    X(nvrtcVersion)                                                                                                    \
    X(nvrtcGetErrorString)                                                                                             \
    X(nvrtcGetNumSupportedArchs)                                                                                       \
    X(nvrtcGetSupportedArchs)                                                                                          \
    X(nvrtcCreateProgram)                                                                                              \
    X(nvrtcDestroyProgram)                                                                                             \
    X(nvrtcCompileProgram)                                                                                             \
    X(nvrtcGetCUBINSize)                                                                                               \
    X(nvrtcGetCUBIN)                                                                                                   \
    X(nvrtcGetPTXSize)                                                                                                 \
    X(nvrtcGetPTX)                                                                                                     \
    X(nvrtcGetProgramLogSize)                                                                                          \
    X(nvrtcGetProgramLog)

/* An open NVRTC. Immutable after opening, so threads may share it. */
typedef struct perk_nvrtc {
    perk_library library, builtins;
    perk_nvrtc_identity identity;
    int major, minor;
    int archs[64]; /* capabilities it compiles for, ascending: 75, 80, ... */
    size_t arch_count;
#define PERK_NVRTC_FIELD(name) __typeof__(name) *name;
    PERK_NVRTC_FUNCTIONS(PERK_NVRTC_FIELD)
#undef PERK_NVRTC_FIELD
} perk_nvrtc;

/* Opens the NVRTC of `identity` (NULL: identifies first, driver unknown). Fails when what got loaded is not the build
 * that was identified: the file was exchanged, and results must not be stored under the old key. */
perk_status perk_nvrtc_open(perk_nvrtc **out, const perk_nvrtc_identity *identity, perk_error *err);
void perk_nvrtc_free(perk_nvrtc *nvrtc);

/* PERK_OK when "sm_90a" and the like are well-formed and of a supported capability; else says which are supported. The
 * suffix itself is NVRTC's to judge. */
perk_status perk_nvrtc_check_arch(const perk_nvrtc *nvrtc, const char *arch, perk_error *err);

#endif
