/* What the cache's tests share: a scratch folder, files in it, a log that is kept, payloads that follow from a key. */
#ifndef PERK_TESTS_TEST_CACHE_H
#define PERK_TESTS_TEST_CACHE_H

#include "test.h"

#include "perk/cache.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <stdbool.h>
#include <sys/stat.h>
#include <unistd.h>

static char scratch[256]; /* the test's own folder, removed at exit */
static pid_t scratch_owner;

static int remove_one(const char *path, const struct stat *info, int type, struct FTW *walk) {
    (void)info, (void)type, (void)walk;
    return remove(path);
}

static inline void remove_tree(const char *path) { nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS); }

static void remove_scratch(void) {
    if (getpid() == scratch_owner) remove_tree(scratch);
}

static inline void make_scratch(void) {
    const char *base = getenv("TMPDIR");
    snprintf(scratch, sizeof scratch, "%s/perk-cache-test-XXXXXX", base && *base ? base : "/tmp");
    CHECK(mkdtemp(scratch) != NULL, "%s: %s", scratch, strerror(errno));
    scratch_owner = getpid();
    atexit(remove_scratch);
    unsetenv("PERK_CACHE_DIR");
    unsetenv("PERK_CACHE_READONLY");
    unsetenv("XDG_CACHE_HOME");
}

typedef struct path_text {
    char text[PATH_MAX];
} path_text;

static inline path_text path_in(const char *folder, const char *name) {
    path_text path;
    int length = snprintf(path.text, sizeof path.text, "%s/%s", folder, name);
    CHECK(length > 0 && (size_t)length < sizeof path.text);
    return path;
}

static inline path_text entry_path(const char *folder, const perk_cache_key *key) {
    char name[PERK_CACHE_KEY_HEX_SIZE + 8];
    perk_cache_key_hex(key, name);
    strcat(name, ".perk");
    return path_in(folder, name);
}

static inline void put_file(const char *path, const void *data, size_t size) {
    unlink(path);
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    CHECK(fd >= 0, "%s: %s", path, strerror(errno));
    CHECK(write(fd, data, size) == (ssize_t)size);
    close(fd);
}

static inline size_t get_file(const char *path, uint8_t *data, size_t capacity) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0, "%s: %s", path, strerror(errno));
    ssize_t size = read(fd, data, capacity);
    CHECK(size >= 0);
    close(fd);
    return (size_t)size;
}

/* Files in `folder` whose name contains `part`. */
static inline int count_files(const char *folder, const char *part) {
    int count = 0;
    DIR *listing = opendir(folder);
    CHECK(listing != NULL, "%s", folder);
    for (struct dirent *item; (item = readdir(listing));)
        count += strcmp(item->d_name, ".") && strcmp(item->d_name, "..") && strstr(item->d_name, part);
    closedir(listing);
    return count;
}

static char last_log[2048]; /* the latest warning */
static int warnings;

static void keep_log(void *user, perk_log_level level, const char *message) {
    (void)user;
    if (level < PERK_LOG_WARNING) return;
    warnings++;
    snprintf(last_log, sizeof last_log, "%s", message);
}

static inline perk_cache *open_cache(const char *folder, uint64_t max_bytes) {
    perk_cache *cache;
    perk_error err;
    perk_cache_options options = {.folder = folder, .max_bytes = max_bytes, .log = {.write = keep_log}};
    CHECK_OK(perk_cache_open(&cache, &options, &err));
    return cache;
}

static inline perk_cache_key numbered_key(uint32_t number) {
    perk_cache_key key;
    perk_error err;
    perk_cache_key_builder *builder = perk_cache_key_begin();
    perk_cache_key_add(builder, "number", &number, sizeof number);
    CHECK_OK(perk_cache_key_finish(builder, &key, &err));
    return key;
}

/* The bytes that belong to a key: anything else that a load gives is a wrong entry. */
static inline perk_cache_blob payload_of(const perk_cache_key *key, size_t size) {
    perk_cache_blob blob = {malloc(size ? size : 1), size};
    CHECK(blob.data != NULL);
    uint32_t state = (uint32_t)key->bytes[0] << 16 | (uint32_t)key->bytes[1] << 8 | key->bytes[2] | 1;
    for (size_t i = 0; i < size; i++) {
        state = state * 1664525u + 1013904223u;
        ((uint8_t *)blob.data)[i] = (uint8_t)(state >> 24);
    }
    return blob;
}

static inline int is_payload(const perk_cache_blob *blob, const perk_cache_key *key, size_t size) {
    if (blob->size != size || !blob->data) return 0;
    perk_cache_blob wanted = payload_of(key, size);
    int same = memcmp(wanted.data, blob->data, size) == 0;
    perk_cache_blob_free(&wanted);
    return same;
}

static inline void store_payload(perk_cache *cache, const perk_cache_key *key, size_t size) {
    perk_cache_blob blob = payload_of(key, size);
    CHECK(perk_cache_store(cache, key, blob.data, blob.size), "%s", last_log);
    perk_cache_blob_free(&blob);
}

/* Whether the cache has the key; what it has must be right. */
static inline int has_payload(perk_cache *cache, const perk_cache_key *key, size_t size) {
    perk_cache_blob blob;
    int found = perk_cache_load(cache, key, &blob);
    CHECK(!found || is_payload(&blob, key, size), "a wrong entry was loaded");
    CHECK(found || (!blob.data && !blob.size));
    perk_cache_blob_free(&blob);
    return found;
}

#endif
