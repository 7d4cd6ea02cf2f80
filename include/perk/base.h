/* perk: what every public header shares: export marks, status codes, the error record, logging, progress.
 *
 * Conventions of the whole API
 *  - A function that can fail returns a perk_status and takes a `perk_error *` last; NULL is accepted.
 *  - A failed create leaves nothing to free and sets *out to NULL; a successful one obliges one matching free.
 *    Every free function accepts NULL.
 *  - Pointers in options are borrowed for the duration of the call unless the field says otherwise.
 *  - The library never prints, aborts, exits or keeps global mutable state.
 */
#ifndef PERK_BASE_H
#define PERK_BASE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__) || defined(__clang__)
#define PERK_API __attribute__((visibility("default")))
#define PERK_PRINTF(format_index, first_arg) __attribute__((format(printf, format_index, first_arg)))
#else
#define PERK_API
#define PERK_PRINTF(format_index, first_arg)
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define PERK_VERSION_MAJOR 0
#define PERK_VERSION_MINOR 1
#define PERK_VERSION_PATCH 0

/* The numbers are part of the ABI: new codes are added at the end. */
#define PERK_STATUS_LIST(X)                                                                                            \
    X(PERK_OK, 0, "ok")                                                                                                \
    X(PERK_INVALID_ARGUMENT, 1, "invalid argument")                                                                    \
    X(PERK_OUT_OF_MEMORY, 2, "out of host memory")                                                                     \
    X(PERK_NOT_FOUND, 3, "not found")                                                                                  \
    X(PERK_IO, 4, "input/output error")                                                                                \
    X(PERK_BAD_FORMAT, 5, "malformed input")                                                                           \
    X(PERK_UNSUPPORTED, 6, "unsupported")                                                                              \
    X(PERK_LIMIT, 7, "limit exceeded")                                                                                 \
    X(PERK_NO_DRIVER, 8, "no usable CUDA driver")                                                                      \
    X(PERK_NO_DEVICE, 9, "no usable CUDA device")                                                                      \
    X(PERK_NO_COMPILER, 10, "no usable NVRTC")                                                                         \
    X(PERK_COMPILE, 11, "kernel compilation failed")                                                                   \
    X(PERK_DEVICE_MEMORY, 12, "out of device memory")                                                                  \
    X(PERK_DRIVER, 13, "CUDA driver error")                                                                            \
    X(PERK_UNSAFE_PLAN, 14, "unsafe plan")                                                                             \
    X(PERK_HANG, 15, "a wait in the kernel exceeded its limit")                                                        \
    X(PERK_CANCELLED, 16, "cancelled")                                                                                 \
    X(PERK_INTERNAL, 17, "internal error")

typedef enum perk_status {
#define PERK_STATUS_ENUM(name, number, text) name = number,
    PERK_STATUS_LIST(PERK_STATUS_ENUM)
#undef PERK_STATUS_ENUM
} perk_status;

/* Caller-owned; zero-initialise it or let the first failing call fill it. `message` is one or more lines of UTF-8
 * that say what was wrong, where, and what to do. */
typedef struct perk_error {
    perk_status status;
    char message[2048];
} perk_error;

/* Static text of a status ("ok", "unsupported", ...); never NULL. Thread-safe. */
PERK_API const char *perk_status_text(perk_status status);

/* "0.1.0". Static. */
PERK_API const char *perk_version(void);

typedef enum perk_log_level { PERK_LOG_DEBUG = 0, PERK_LOG_INFO = 1, PERK_LOG_WARNING = 2 } perk_log_level;

/* A log callback; `write` may be NULL (silence). `message` has no trailing newline and is valid during the call only.
 * It may be called from any thread that perk uses, one call at a time. */
typedef struct perk_log {
    void (*write)(void *user, perk_log_level level, const char *message);
    void *user;
} perk_log;

/* Progress of a long phase; `report` may be NULL. `done` and `total` are bytes; a non-zero return cancels the phase,
 * whose call then fails with PERK_CANCELLED. */
typedef struct perk_progress {
    int (*report)(void *user, const char *phase, uint64_t done, uint64_t total);
    void *user;
} perk_progress;

#ifdef __cplusplus
}
#endif
#endif
