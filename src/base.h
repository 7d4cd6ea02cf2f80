/* Internal helpers that every file of the library shares: error filling, logging, checked memory, time. */
#ifndef PERK_SRC_BASE_H
#define PERK_SRC_BASE_H

#include "perk/base.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PERK_COUNT(array) (sizeof(array) / sizeof((array)[0]))
#define PERK_MIN(a, b) ((a) < (b) ? (a) : (b))
#define PERK_MAX(a, b) ((a) > (b) ? (a) : (b))

/* Fills `err` (may be NULL) with `status` and the formatted message, and returns `status`:
 *     return perk_fail(err, PERK_IO, "%s: cannot open: %s", path, strerror(errno)); */
perk_status perk_fail(perk_error *err, perk_status status, const char *format, ...) PERK_PRINTF(3, 4);

/* Puts "prefix: " before the message that `err` already holds; returns its status. For adding the where. */
perk_status perk_fail_prefix(perk_error *err, perk_status status, const char *format, ...) PERK_PRINTF(3, 4);

/* The usual out-of-memory failure. `what` names what was being allocated. */
perk_status perk_fail_memory(perk_error *err, const char *what);

void perk_log_write(const perk_log *log, perk_log_level level, const char *format, ...) PERK_PRINTF(3, 4);

/* malloc family with overflow checks; NULL on failure or overflow. Freed with free(). */
void *perk_calloc(size_t count, size_t size);
void *perk_realloc_array(void *old, size_t count, size_t size);
char *perk_strdup(const char *text);
/* printf into fresh memory; NULL on failure. */
char *perk_format(const char *format, ...) PERK_PRINTF(1, 2);

/* Monotonic wall clock in seconds. */
double perk_now(void);

static inline uint64_t perk_round_up(uint64_t value, uint64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}
static inline uint64_t perk_ceil_div(uint64_t value, uint64_t divisor) { return (value + divisor - 1) / divisor; }

/* A growing byte buffer for text and binary output. Zero-initialise; `failed` is sticky after an allocation failure,
 * so callers append freely and check once. */
typedef struct perk_buffer {
    char *data; /* always NUL-terminated when non-NULL */
    size_t size, capacity;
    bool failed;
} perk_buffer;
void perk_buffer_append(perk_buffer *buffer, const void *data, size_t size);
void perk_buffer_printf(perk_buffer *buffer, const char *format, ...) PERK_PRINTF(2, 3);
void perk_buffer_free(perk_buffer *buffer);

/* Reads a whole file (a NUL is appended, not counted). Fails with PERK_NOT_FOUND, PERK_IO, or PERK_LIMIT when it is
 * larger than `max_size`. */
perk_status perk_read_file(const char *path, size_t max_size, char **data, size_t *size, perk_error *err);

#endif
