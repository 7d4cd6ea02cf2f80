/* Libraries that are opened at run time: where they are looked for, which file they are, and their symbols.
 *
 * The order of the search, the same for finding and for opening
 *  1. the override: an environment variable that names a file; when set, nothing else is tried;
 *  2. the dynamic loader's own folders: LD_LIBRARY_PATH and RPATH of the program, /etc/ld.so.conf, /lib, /usr/lib;
 *  3. toolkits: $CUDA_HOME, $CUDA_PATH, $CONDA_PREFIX, /usr/local/cuda, /usr/local/cuda-* (newest first), ...;
 *  4. pip installs: site-packages of $VIRTUAL_ENV, $CONDA_PREFIX, the system and the user.
 * All places are searched for the first name before any is searched for the second. A file whose real path lies in
 * a `stubs` folder is never opened: stubs satisfy a linker and fail every call.
 *
 * Everything here is thread-safe as long as no other thread changes the environment. */
#ifndef PERK_SRC_DYNLIB_H
#define PERK_SRC_DYNLIB_H

#include "base.h"

enum { PERK_LIBRARY_PATH_SIZE = 1024, PERK_BUILD_ID_SIZE = 72 };

typedef struct perk_library_spec {
    const char *title;              /* what messages call it: "NVRTC" */
    const char *override;           /* environment variable of a file path */
    const char *const *names;       /* one or two sonames, best first, NULL at the end */
    const char *const *pip_folders; /* below site-packages, NULL at the end; NULL: none */
    const char *advice;             /* the last sentence of the error: what to do */
    perk_status missing;            /* the status when it cannot be had */
    bool ask_loader;                /* opening starts with dlopen(name): finds what this process already uses */
} perk_library_spec;

/* An open library. The file stays mapped until the process ends, even after perk_library_close: the CUDA libraries
 * start threads and exit handlers of their own. */
typedef struct perk_library {
    void *handle;
    char path[PERK_LIBRARY_PATH_SIZE];
} perk_library;

/* The first file that the search gives and that is a shared object for this machine; loads nothing. Fails with
 * spec->missing and a message that lists what was tried and why each file was passed over. */
perk_status perk_library_find(const perk_library_spec *spec, char path[PERK_LIBRARY_PATH_SIZE], perk_error *err);

/* Opens the first library of the search that loads. */
perk_status perk_library_open(perk_library *out, const perk_library_spec *spec, perk_error *err);

/* Opens exactly this file. */
perk_status perk_library_open_path(perk_library *out, const perk_library_spec *spec, const char *path, perk_error *err);

/* Accepts a zeroed library. */
void perk_library_close(perk_library *library);

/* Stores the symbol's address in `slot`, a pointer to a function pointer; false and NULL when there is none. */
bool perk_library_symbol(const perk_library *library, const char *symbol, void *slot);

/* The GNU build-id as lower-case hex, of a file (which is not loaded) or of what is loaded. PERK_NOT_FOUND when it has
 * none, PERK_BAD_FORMAT when the file is no shared object for this machine. */
perk_status perk_file_build_id(const char *path, char hex[PERK_BUILD_ID_SIZE], perk_error *err);
perk_status perk_library_build_id(const perk_library *library, char hex[PERK_BUILD_ID_SIZE], perk_error *err);

#endif
