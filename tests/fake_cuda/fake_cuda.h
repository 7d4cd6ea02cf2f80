/* A CUDA driver for tests, on host memory: exactly the calls of src/driver.h, one context. Launches compute nothing,
 * unless the programs were compiled to be emulated (tests/emulator/). It fails where it is told to, counts what is
 * alive, and notes calls that a real driver would not have forgiven. A test sets PERK_LIBCUDA to the library and
 * reaches its state through open_fake.h. */
#ifndef PERK_TESTS_FAKE_CUDA_H
#define PERK_TESTS_FAKE_CUDA_H

#include <cuda.h>
#include <stdbool.h>
#include <stddef.h>

/* What the driver and its devices say of themselves. */
typedef struct fake_device {
    int driver_version, count, cc_major, cc_minor, sm_count, shared_bytes;
    bool cooperative, fits_sm; /* fits_sm: the occupancy of every kernel is 1, else 0 */
    size_t memory;             /* bytes of device memory */
} fake_device;

/* Call number `call` (of `function`, or of all when that is NULL) fails with `result`, and where `lasting` every later
 * call does, too. A call that gives something back does so all the same: its result tells of earlier work. */
typedef struct fake_fault {
    long call; /* from 1, since fake_reset; 0: none */
    const char *function;
    CUresult result;
    bool lasting;
} fake_fault;

typedef struct fake_live {
    long memory, pinned, modules, streams, events, contexts;
} fake_live;

typedef struct fake_cuda {
    fake_device device;
    fake_fault fault;
    bool hang;         /* the next cooperative launch ends as one does in which a wait exceeded its limit */
    unsigned seed;     /* of the orders in which emulated launches run; EMULATOR_SEED's at first */
    bool made_by_fake; /* every module must be a file of the fake NVRTC, as it was made: anything else is misuse */

    long calls, launches;
    const char *failed; /* the function that failed first; NULL: none */
    long failed_call;   /* its number among all */
    fake_live live;
    size_t memory_used;
    long swept;             /* objects that went with their context, because nobody had released them before */
    const char *misuse;     /* the first call that was wrong, and how */
    const char *misused_in; /* which function */
} fake_cuda;

/* The calling thread's current context; a context is any address to the fake. */
CUcontext fake_cuda_current(void);
void fake_cuda_make_current(CUcontext context);
fake_cuda *fake_cuda_state(void);
/* As after loading: an H100 (with FAKE_CUDA_SMS SMs, where that is set), no fault, nothing counted. Nothing may be
 * alive. */
void fake_cuda_reset(void);

/* ---- the NVRTC in the same library: a test sets PERK_LIBNVRTC to it (fake_nvrtc.c). Its calls may come
 * from several threads. ---- */

/* A change to a device header before it is compiled for the CPU: all of `from` becomes `to`. */
typedef struct fake_edit {
    const char *file, *from, *to; /* file NULL: none */
} fake_edit;

enum { FAKE_EDITS = 3, FAKE_EDIT_MISSES = 99 }; /* the exit code where an edit shows nothing */

typedef struct fake_nvrtc {
    int major;         /* its version */
    long failing_call; /* this call, from 1, fails with `result` (an nvrtcResult); 0: none */
    int result;
    int milliseconds; /* that a compile takes */
    bool emulates;    /* programs are compiled for the CPU and run there; else they compute nothing */
    fake_edit edits[FAKE_EDITS];

    long calls, compiles, programs; /* programs: that nobody has destroyed yet */
    const char *failed;
} fake_nvrtc;

fake_nvrtc *fake_nvrtc_state(void);
/* NVRTC 13.0, no fault, nothing counted; it emulates where FAKE_CUDA_EMULATES is set. Each compile also adds a byte to
 * the file that FAKE_NVRTC_TALLY names. */
void fake_nvrtc_reset(void);
/* Whether the bytes (at least as many as it makes) are a file of the fake NVRTC, as it was made. */
bool fake_nvrtc_is_whole(const void *bytes);
/* The library for the CPU that follows such a file; NULL: none. */
const void *fake_nvrtc_library(const void *bytes, size_t *size);

#endif
