/* The cache's life and its main way: load, or lock, look again, make, publish. */
#include "cache/internal.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

#define DEFAULT_MAX_BYTES ((uint64_t)1 << 30)
#define DEFAULT_LOCK_WAIT 60.0

void perk_cache_say(perk_cache *cache, perk_log_level level, const char *format, ...) {
    if (!cache || !cache->log.write) return;
    char message[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    pthread_mutex_lock(&cache->log_mutex);
    perk_log_write(&cache->log, level, "%s", message);
    pthread_mutex_unlock(&cache->log_mutex);
}

const perk_cache_place *perk_cache_writable_place(const perk_cache *cache) {
    return cache && cache->place_count && cache->places[0].writable ? &cache->places[0] : NULL;
}

perk_status perk_cache_open(perk_cache **out, const perk_cache_options *options, perk_error *err) {
    static const perk_cache_options defaults = {0};
    *out = NULL;
    if (!options) options = &defaults;
    if (!(options->max_lock_wait >= 0))
        return perk_fail(err, PERK_INVALID_ARGUMENT, "max_lock_wait of a cache is %g: give seconds, or 0 for %g",
                         options->max_lock_wait, DEFAULT_LOCK_WAIT);
    perk_cache *cache = perk_calloc(1, sizeof *cache);
    if (!cache) return perk_fail_memory(err, "the cache");
    if (pthread_mutex_init(&cache->log_mutex, NULL) != 0) {
        free(cache);
        return perk_fail_memory(err, "the cache's mutex");
    }
    cache->log = options->log;
    cache->max_bytes = options->max_bytes ? options->max_bytes : DEFAULT_MAX_BYTES;
    cache->max_lock_wait = options->max_lock_wait > 0 ? options->max_lock_wait : DEFAULT_LOCK_WAIT;
    perk_status status = options->disabled ? PERK_OK : perk_cache_open_places(cache, options, err);
    if (status) {
        perk_cache_free(cache);
        return status;
    }
    *out = cache;
    return PERK_OK;
}

void perk_cache_free(perk_cache *cache) {
    if (!cache) return;
    for (size_t i = 0; i < cache->place_count; i++) {
        close(cache->places[i].fd);
        free(cache->places[i].path);
    }
    free(cache->places);
    pthread_mutex_destroy(&cache->log_mutex);
    free(cache);
}

const char *perk_cache_folder(const perk_cache *cache) {
    const perk_cache_place *place = perk_cache_writable_place(cache);
    return place ? place->path : NULL;
}

void perk_cache_blob_free(perk_cache_blob *blob) {
    if (!blob) return;
    free(blob->data);
    *blob = (perk_cache_blob){0};
}

static int load(perk_cache *cache, const perk_cache_key *key, perk_cache_blob *blob, perk_log_level complain_at) {
    *blob = (perk_cache_blob){0};
    for (size_t i = 0; cache && i < cache->place_count; i++) {
        const perk_cache_place *place = &cache->places[i];
        const char *problem = NULL;
        perk_cache_found found = perk_cache_entry_read(place, key, true, blob, &problem);
        if (found == PERK_CACHE_GOOD) return 1;
        if (found != PERK_CACHE_ABSENT)
            perk_cache_say(cache, complain_at, "%s/%s: this cache entry is not used: %s%s", place->path,
                           perk_cache_file_name(key, PERK_CACHE_ENTRY_SUFFIX).text, problem,
                           place->writable && found == PERK_CACHE_BAD ? "; it will be replaced" : "");
    }
    return 0;
}

int perk_cache_load(perk_cache *cache, const perk_cache_key *key, perk_cache_blob *blob) {
    return load(cache, key, blob, PERK_LOG_WARNING);
}

int perk_cache_store(perk_cache *cache, const perk_cache_key *key, const void *data, size_t size) {
    const perk_cache_place *place = perk_cache_writable_place(cache);
    if (!place) return 0;
    const char *step;
    int error = size > PERK_CACHE_MAX_ENTRY_SIZE ? EFBIG : perk_cache_publish(place, key, data, size, &step);
    if (error) {
        perk_cache_say(
            cache, PERK_LOG_WARNING,
            "%s: a compiled kernel of %zu bytes is not kept: cannot %s: %s; the next start compiles it again",
            place->path, size, size > PERK_CACHE_MAX_ENTRY_SIZE ? "store that much" : step, strerror(error));
        return 0;
    }
    perk_error problem;
    if (perk_cache_make_room(place, cache->max_bytes, key, NULL, &problem))
        perk_cache_say(cache, PERK_LOG_WARNING, "%s", problem.message);
    return 1;
}

static perk_status make_checked(perk_cache_make make, void *user, perk_cache_blob *blob, perk_error *err) {
    *blob = (perk_cache_blob){0};
    perk_status status = make(user, blob, err);
    if (status) {
        *blob = (perk_cache_blob){0};
        return status;
    }
    if (!blob->data)
        return perk_fail(err, PERK_INTERNAL, "the maker of a cache entry reported success but made nothing");
    return PERK_OK;
}

/* Takes the key's lock if it can be had; -1 otherwise, which only costs a second make. */
static int lock_or_complain(perk_cache *cache, const perk_cache_place *place, const perk_cache_key *key) {
    int fd;
    switch (perk_cache_lock(place, key, cache->max_lock_wait, &fd)) {
    case PERK_CACHE_LOCKED: return fd;
    case PERK_CACHE_LOCK_TIMEOUT:
        perk_cache_say(cache, PERK_LOG_WARNING,
                       "%s: another process has been compiling the same kernel for %g s; compiling it here as well",
                       place->path, cache->max_lock_wait);
        return -1;
    case PERK_CACHE_LOCK_FAILED: break;
    }
    perk_cache_say(cache, PERK_LOG_WARNING, "%s: cannot lock a cache entry, compiling without: %s", place->path,
                   strerror(errno));
    return -1;
}

perk_status perk_cache_get_or_make(perk_cache *cache, const perk_cache_key *key, perk_cache_make make, void *user,
                                   perk_cache_blob *blob, int *hit, perk_error *err) {
    int found = perk_cache_load(cache, key, blob);
    if (hit) *hit = found;
    if (found) return PERK_OK;
    const perk_cache_place *place = perk_cache_writable_place(cache);
    if (!place) return make_checked(make, user, blob, err);

    int lock = lock_or_complain(cache, place, key);
    perk_status status = PERK_OK;
    found = load(cache, key, blob, PERK_LOG_DEBUG); /* whoever held the lock may have made it */
    if (hit) *hit = found;
    if (!found) {
        status = make_checked(make, user, blob, err);
        if (!status) perk_cache_store(cache, key, blob->data, blob->size);
    }
    if (lock >= 0) perk_cache_unlock(place, key, lock);
    return status;
}
