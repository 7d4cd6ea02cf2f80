#define _POSIX_C_SOURCE 200809L
#include "base.h"

#include "tokenizer/utf8.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

const char *perk_status_text(perk_status status) {
    switch (status) {
#define PERK_STATUS_CASE(name, number, text)                                                                           \
    case name: return text;
        PERK_STATUS_LIST(PERK_STATUS_CASE)
#undef PERK_STATUS_CASE
    }
    return "unknown status";
}

#define PERK_TEXT(x) #x
#define PERK_VERSION_TEXT(major, minor, patch) PERK_TEXT(major) "." PERK_TEXT(minor) "." PERK_TEXT(patch)
const char *perk_version(void) { return PERK_VERSION_TEXT(PERK_VERSION_MAJOR, PERK_VERSION_MINOR, PERK_VERSION_PATCH); }

/* Messages are UTF-8, but what they quote may not be, and both are cut to fit, within a character if need be. */
perk_status perk_fail(perk_error *err, perk_status status, const char *format, ...) {
    if (!err) return status;
    err->status = status;
    va_list args;
    va_start(args, format);
    vsnprintf(err->message, sizeof err->message, format, args);
    va_end(args);
    perk_utf8_mask(err->message);
    return status;
}

perk_status perk_fail_prefix(perk_error *err, perk_status status, const char *format, ...) {
    if (!err) return status;
    char old[sizeof err->message];
    memcpy(old, err->message, sizeof old);
    va_list args;
    va_start(args, format);
    int used = vsnprintf(err->message, sizeof err->message, format, args);
    va_end(args);
    if (used >= 0 && (size_t)used < sizeof err->message) {
        size_t room = sizeof err->message - (size_t)used;
        snprintf(err->message + used, room, ": %.*s", (int)room, old);
    }
    perk_utf8_mask(err->message);
    return status;
}

perk_status perk_fail_memory(perk_error *err, const char *what) {
    return perk_fail(err, PERK_OUT_OF_MEMORY, "out of host memory for %s", what);
}

void perk_log_write(const perk_log *log, perk_log_level level, const char *format, ...) {
    if (!log || !log->write) return;
    char message[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    perk_utf8_mask(message);
    log->write(log->user, level, message);
}

void *perk_calloc(size_t count, size_t size) { return calloc(count ? count : 1, size ? size : 1); }

void *perk_realloc_array(void *old, size_t count, size_t size) {
    if (size && count > SIZE_MAX / size) return NULL;
    return realloc(old, PERK_MAX(count * size, (size_t)1));
}

char *perk_strdup(const char *text) { return strdup(text); }

char *perk_format(const char *format, ...) {
    va_list args;
    va_start(args, format);
    int length = vsnprintf(NULL, 0, format, args);
    va_end(args);
    char *text = length < 0 ? NULL : malloc((size_t)length + 1);
    if (!text) return NULL;
    va_start(args, format);
    vsnprintf(text, (size_t)length + 1, format, args);
    va_end(args);
    return text;
}

double perk_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static bool buffer_reserve(perk_buffer *buffer, size_t extra) {
    if (buffer->failed) return false;
    if (extra >= SIZE_MAX / 2 - buffer->size) return !(buffer->failed = true);
    size_t needed = buffer->size + extra + 1;
    if (needed <= buffer->capacity) return true;
    size_t capacity = PERK_MAX(buffer->capacity * 2, PERK_MAX(needed, (size_t)256));
    char *data = realloc(buffer->data, capacity);
    if (!data) return !(buffer->failed = true);
    buffer->data = data;
    buffer->capacity = capacity;
    return true;
}

void perk_buffer_append(perk_buffer *buffer, const void *data, size_t size) {
    if (!buffer_reserve(buffer, size)) return;
    if (size) memcpy(buffer->data + buffer->size, data, size);
    buffer->size += size;
    buffer->data[buffer->size] = '\0';
}

void perk_buffer_printf(perk_buffer *buffer, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int length = vsnprintf(NULL, 0, format, args);
    va_end(args);
    if (length < 0 || !buffer_reserve(buffer, (size_t)length)) {
        buffer->failed = true;
        return;
    }
    va_start(args, format);
    vsnprintf(buffer->data + buffer->size, (size_t)length + 1, format, args);
    va_end(args);
    buffer->size += (size_t)length;
}

void perk_buffer_free(perk_buffer *buffer) {
    free(buffer->data);
    *buffer = (perk_buffer){0};
}

perk_status perk_read_file(const char *path, size_t max_size, char **data, size_t *size, perk_error *err) {
    perk_status status = PERK_OK;
    *data = NULL;
    *size = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return perk_fail(err, errno == ENOENT ? PERK_NOT_FOUND : PERK_IO, "%s: cannot open: %s", path, strerror(errno));
    struct stat info;
    char *bytes = NULL;
    size_t used = 0;
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        status = perk_fail(err, PERK_IO, "%s: not a regular file", path);
        goto out;
    }
    if ((uint64_t)info.st_size > max_size) {
        status = perk_fail(err, PERK_LIMIT, "%s: %lld bytes, more than the %zu that such a file may have", path,
                           (long long)info.st_size, max_size);
        goto out;
    }
    bytes = malloc((size_t)info.st_size + 1);
    if (!bytes) {
        status = perk_fail_memory(err, path);
        goto out;
    }
    while (used < (size_t)info.st_size) {
        ssize_t got = read(fd, bytes + used, (size_t)info.st_size - used);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) {
            status = perk_fail(err, PERK_IO, "%s: cannot read: %s", path, strerror(errno));
            goto out;
        }
        if (got == 0) break; /* the file shrank while it was read: what is there decides */
        used += (size_t)got;
    }
    bytes[used] = '\0';
    *data = bytes;
    *size = used;
    bytes = NULL;
out:
    free(bytes);
    close(fd);
    return status;
}
