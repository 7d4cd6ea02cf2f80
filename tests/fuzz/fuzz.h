/* What the fuzz targets share. A target is one function that libFuzzer calls with bytes of its own making. Beside what
 * the sanitizers see, a target holds perk to its contracts: FUZZ_CHECK fails the run like a crash. */
#ifndef PERK_TESTS_FUZZ_H
#define PERK_TESTS_FUZZ_H

#include "src/base.h"
#include "src/tokenizer/utf8.h"

#include <ctype.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerInitialize(int *argc, char ***argv);

#define FUZZ_CHECK(condition, ...)                                                                                     \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            dprintf(STDERR_FILENO, "%s:%d: FUZZ_CHECK failed: %s  ", __FILE__, __LINE__, #condition);                  \
            dprintf(STDERR_FILENO, " " __VA_ARGS__);                                                                   \
            dprintf(STDERR_FILENO, "\n");                                                                              \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

/* The status of a call with its error record, which started zeroed, and whether it gave an object: all or nothing. */
static inline void fuzz_check_result(perk_status status, const perk_error *err, bool given) {
    FUZZ_CHECK(given == (status == PERK_OK), "%s: %s", perk_status_text(status), err->message);
    if (status == PERK_OK) return;
    size_t length = strnlen(err->message, sizeof err->message);
    FUZZ_CHECK(err->status == status, "%d is not %d", err->status, status);
    FUZZ_CHECK(length > 0 && length < sizeof err->message && perk_utf8_valid(err->message, length), "\"%s\"",
               err->message);
    FUZZ_CHECK(status != PERK_INTERNAL, "%s", err->message);
}

typedef struct fuzz_part {
    char *data; /* of exactly `size` bytes, so that a sanitizer sees the first read behind them */
    size_t size;
} fuzz_part;

/* Inputs of several parts have them separated by a byte 0xff, which is in no UTF-8 text. Takes the next part off
 * `data`; the last one has everything that is left, when `last`. Freed by the caller. */
static inline fuzz_part fuzz_take(const uint8_t **data, size_t *size, bool last) {
    const uint8_t *mark = last || !*size ? NULL : memchr(*data, 0xff, *size);
    fuzz_part part = {.size = mark ? (size_t)(mark - *data) : *size};
    size_t taken = part.size + (mark != NULL);
    part.data = malloc(part.size);
    FUZZ_CHECK(part.data || !part.size);
    if (part.size) memcpy(part.data, *data, part.size);
    *data += taken;
    *size -= taken;
    return part;
}

/* A file without a name. fuzz_file_fill replaces its bytes, and the path serves until the next call. */
typedef struct fuzz_file {
    int fd;
    char path[64];
} fuzz_file;

static inline const char *fuzz_file_fill(fuzz_file *file, const void *data, size_t size) {
    if (!file->path[0]) {
        file->fd = memfd_create("perk-fuzz", MFD_CLOEXEC);
        FUZZ_CHECK(file->fd >= 0);
        snprintf(file->path, sizeof file->path, "/proc/self/fd/%d", file->fd);
    }
    FUZZ_CHECK(ftruncate(file->fd, 0) == 0);
    FUZZ_CHECK(pwrite(file->fd, data, size, 0) == (ssize_t)size);
    return file->path;
}

/* Reads one of the repository's files, at start-up; the caller frees it. */
static inline fuzz_part fuzz_read(const char *path) {
    fuzz_part file;
    perk_error err = {0};
    FUZZ_CHECK(perk_read_file(path, SIZE_MAX, &file.data, &file.size, &err) == PERK_OK, "%s", err.message);
    return file;
}

#endif
