/* perk: the cubin cache, a folder of byte strings under 128-bit keys that many processes share without a server.
 *
 * What is stored is opaque here. A cache never makes a start fail: whatever goes wrong with it (no place, no room,
 * damage, somebody else's file) is a warning through the log and a miss. docs/cache.md has the format and the rules.
 *
 * Threads: every function may be called from any thread at any time on one perk_cache, except perk_cache_free. Several
 * caches and several processes may use one folder. A NULL `perk_cache *` behaves as a cache without any folder.
 */
#ifndef PERK_CACHE_H
#define PERK_CACHE_H

#include "perk/base.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- keys --------------------------------------------------------------------------------------------------------
 * A key is a hash over named parts, in the order in which they are added. Names and lengths go in as well, so moving a
 * byte from one part to the next gives another key. */
#define PERK_CACHE_KEY_SIZE 16
#define PERK_CACHE_KEY_HEX_SIZE (2 * PERK_CACHE_KEY_SIZE + 1) /* with the NUL */

typedef struct perk_cache_key {
    uint8_t bytes[PERK_CACHE_KEY_SIZE];
} perk_cache_key;

typedef struct perk_cache_key_builder perk_cache_key_builder;

/* NULL when out of memory; add and finish accept that, and finish reports it. */
PERK_API perk_cache_key_builder *perk_cache_key_begin(void);
PERK_API void perk_cache_key_add(perk_cache_key_builder *builder, const char *name, const void *data, size_t size);
/* Writes the key and frees the builder, also on failure. `key` may be NULL, to drop a builder. */
PERK_API perk_status perk_cache_key_finish(perk_cache_key_builder *builder, perk_cache_key *key, perk_error *err);

/* 32 lower-case hexadecimal digits and a NUL. */
PERK_API void perk_cache_key_hex(const perk_cache_key *key, char hex[PERK_CACHE_KEY_HEX_SIZE]);
/* The reverse; exactly 32 lower-case digits, else PERK_INVALID_ARGUMENT. */
PERK_API perk_status perk_cache_key_parse(const char *hex, perk_cache_key *key, perk_error *err);

/* ---- opening ----------------------------------------------------------------------------------------------------- */
typedef struct perk_cache_options {
    const char *folder;                   /* NULL: PERK_CACHE_DIR, else $XDG_CACHE_HOME/perk, else $HOME/.cache/perk */
    uint64_t max_bytes;                   /* size limit of that folder's entries; 0: 1 GiB */
    double max_lock_wait;                 /* seconds that get_or_make waits for somebody else's make; 0: 60 */
    const char *const *read_only_folders; /* looked at after `folder`; those in PERK_CACHE_READONLY follow */
    size_t read_only_count;
    perk_log log; /* kept until perk_cache_free; called by one thread at a time */
    int disabled; /* no folder at all: every load misses, nothing is written */
} perk_cache_options;

typedef struct perk_cache perk_cache;

/* Creates the folder (mode 0700) where it is missing. Fails only for want of memory or a negative or NaN wait. NULL
 * options are all zero. */
PERK_API perk_status perk_cache_open(perk_cache **out, const perk_cache_options *options, perk_error *err);
PERK_API void perk_cache_free(perk_cache *cache);

/* The folder that this cache writes to, or NULL where there is none. Lives as long as the cache. */
PERK_API const char *perk_cache_folder(const perk_cache *cache);

/* ---- entries ----------------------------------------------------------------------------------------------------- */
#define PERK_CACHE_MAX_ENTRY_SIZE ((size_t)256 << 20)

/* Bytes from malloc, owned by whoever holds the struct; data is never NULL in a blob that a call here has filled. */
typedef struct perk_cache_blob {
    void *data;
    size_t size;
} perk_cache_blob;

/* Frees the bytes and zeroes the struct. NULL and zeroed blobs are fine. */
PERK_API void perk_cache_blob_free(perk_cache_blob *blob);

/* 1 and the caller's own copy in `blob`, or 0 and a zeroed `blob`: absent or not to be trusted (logged). */
PERK_API int perk_cache_load(perk_cache *cache, const perk_cache_key *key, perk_cache_blob *blob);

/* 1 once the entry is published under `key`, in place of what was there; 0 when it could not be (logged). Then removes
 * least recently used entries down to the size limit, though never this one. */
PERK_API int perk_cache_store(perk_cache *cache, const perk_cache_key *key, const void *data, size_t size);

/* Makes the bytes of a missing entry. On PERK_OK it hands over `out`, whose data came from malloc; on failure it leaves
 * nothing to free. It must not call get_or_make with the same key. */
typedef perk_status (*perk_cache_make)(void *user, perk_cache_blob *out, perk_error *err);

/* The entry, or else what `make` makes, which is then stored. Of all threads and processes that ask for one key at one
 * time a single one makes; the others wait for it, up to max_lock_wait, and then make for themselves. `hit` (may be
 * NULL) says whether make was spared. Fails only as `make` fails. */
PERK_API perk_status perk_cache_get_or_make(perk_cache *cache, const perk_cache_key *key, perk_cache_make make,
                                            void *user, perk_cache_blob *blob, int *hit, perk_error *err);

/* ---- housekeeping ------------------------------------------------------------------------------------------------ */
typedef struct perk_cache_entry {
    perk_cache_key key;
    uint64_t size;       /* bytes on disk */
    int64_t last_use;    /* seconds since 1970, by the clock of whoever used it */
    int read_only;       /* lies in a read-only folder */
    int valid;           /* perk_cache_load would return it */
    const char *problem; /* why not; NULL when valid */
    const char *folder;
} perk_cache_entry;

typedef struct perk_cache_report {
    uint64_t entries, bytes;         /* looked at */
    uint64_t bad;                    /* of those, not valid */
    uint64_t removed, removed_bytes; /* of those, removed */
} perk_cache_report;

/* Calls `visit` for each entry of all folders, each folder's oldest use first, with everything checked; a non-zero
 * return ends the walk. The entry lives during the call only. */
PERK_API perk_status perk_cache_list(perk_cache *cache, int (*visit)(void *user, const perk_cache_entry *entry),
                                     void *user, perk_error *err);

/* Checks every entry of all folders; removes bad ones from the writable folder when `remove_bad`. */
PERK_API perk_status perk_cache_verify(perk_cache *cache, int remove_bad, perk_cache_report *report, perk_error *err);

/* Removes least recently used entries of the writable folder until at most `max_bytes` are left, and what killed
 * processes left behind. PERK_NOT_FOUND when there is no writable folder. `report` may be NULL. */
PERK_API perk_status perk_cache_prune(perk_cache *cache, uint64_t max_bytes, perk_cache_report *report,
                                      perk_error *err);
/* Prune to nothing. */
PERK_API perk_status perk_cache_clear(perk_cache *cache, perk_cache_report *report, perk_error *err);

#ifdef __cplusplus
}
#endif
#endif
