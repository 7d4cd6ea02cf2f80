/* What the files of the cubin cache share. key.c: names; entry.c: one entry's bytes and whether to trust them; place.c:
 * folders; lock.c: one maker a key; publish.c: writing; manage.c: walking and removing; cache.c: putting it together.
 */
#ifndef PERK_CACHE_INTERNAL_H
#define PERK_CACHE_INTERNAL_H

#include "base.h"
#include "perk/cache.h"

#include <pthread.h>
#include <stdbool.h>
#include <sys/stat.h>

/* Part of every key and of every entry: raise it and old entries are neither found nor believed. */
#define PERK_CACHE_FORMAT_VERSION 1u

/* A folder, held open so that it stays the same one whatever happens to its path. */
typedef struct perk_cache_place {
    char *path;
    int fd;
    bool writable;
} perk_cache_place;

struct perk_cache {
    perk_cache_place *places; /* in the order in which they are looked at; only the first may be writable */
    size_t place_count;
    uint64_t max_bytes;
    double max_lock_wait;
    perk_log log;
    pthread_mutex_t log_mutex;
};

void perk_cache_say(perk_cache *cache, perk_log_level level, const char *format, ...) PERK_PRINTF(3, 4);
/* NULL where there is none. */
const perk_cache_place *perk_cache_writable_place(const perk_cache *cache);

/* ---- key.c: file names, "<32 hex digits><suffix>" ---- */
#define PERK_CACHE_ENTRY_SUFFIX ".perk"
#define PERK_CACHE_LOCK_SUFFIX ".lock"
#define PERK_CACHE_TEMP_PREFIX ".tmp-"
typedef struct perk_cache_name {
    char text[PERK_CACHE_KEY_HEX_SIZE + 8];
} perk_cache_name;
perk_cache_name perk_cache_file_name(const perk_cache_key *key, const char *suffix);
bool perk_cache_name_parse(const char *name, const char *suffix, perk_cache_key *key);

/* ---- entry.c ---- */
#define PERK_CACHE_HEADER_SIZE 72
void perk_cache_entry_header(uint8_t header[PERK_CACHE_HEADER_SIZE], const perk_cache_key *key, const void *data,
                             size_t size);
/* NULL when the bytes are a whole entry for `key`, else what is wrong with them (static text). */
const char *perk_cache_entry_check(const uint8_t *bytes, size_t size, const perk_cache_key *key);

typedef enum perk_cache_found {
    PERK_CACHE_ABSENT,
    PERK_CACHE_BAD,
    PERK_CACHE_UNKNOWN, /* it could not be examined for want of memory or file descriptors */
    PERK_CACHE_GOOD
} perk_cache_found;
/* Fills `blob` only when good, `problem` (static text) only when bad or unknown. A good entry of a writable place
 * counts as used now when `touch`. */
perk_cache_found perk_cache_entry_read(const perk_cache_place *place, const perk_cache_key *key, bool touch,
                                       perk_cache_blob *blob, const char **problem);

/* ---- place.c ---- */
/* Opens all places that the options and the environment name; those that are missing are logged and left out. */
perk_status perk_cache_open_places(perk_cache *cache, const perk_cache_options *options, perk_error *err);

/* ---- lock.c ---- */
/* True while `name` in this place is still the file behind `fd`. */
bool perk_cache_still_named(const perk_cache_place *place, const char *name, int fd);
typedef enum perk_cache_lock_result {
    PERK_CACHE_LOCKED,
    PERK_CACHE_LOCK_TIMEOUT,
    PERK_CACHE_LOCK_FAILED
} perk_cache_lock_result;
/* Takes the key's lock within `max_wait` seconds; errno says why it failed. Released with perk_cache_unlock. */
perk_cache_lock_result perk_cache_lock(const perk_cache_place *place, const perk_cache_key *key, double max_wait,
                                       int *fd);
void perk_cache_unlock(const perk_cache_place *place, const perk_cache_key *key, int fd);
/* Removes temporary files and locks that no living process holds. */
void perk_cache_sweep(const perk_cache_place *place);

/* ---- publish.c ---- */
/* 0, or the errno of the `step` (static text) that failed; then nothing is left behind. */
int perk_cache_publish(const perk_cache_place *place, const perk_cache_key *key, const void *data, size_t size,
                       const char **step);

/* ---- manage.c ---- */
/* Sweeps, then removes oldest entries down to `max_bytes`, but not `keep` (may be NULL). */
perk_status perk_cache_make_room(const perk_cache_place *place, uint64_t max_bytes, const perk_cache_key *keep,
                                 perk_cache_report *report, perk_error *err);

#endif
