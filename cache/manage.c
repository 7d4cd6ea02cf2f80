/* Walking over entries: listing, checking, keeping the folder within its size. */
#include "cache/internal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <time.h>
#include <unistd.h>

/* Whatever has an entry's name, whether or not it is one. */
typedef struct cache_item {
    perk_cache_key key;
    uint64_t size;
    struct timespec last_use;
} cache_item;

typedef struct cache_items {
    cache_item *data;
    size_t count, capacity;
} cache_items;

static int compare_times(const struct timespec *a, const struct timespec *b) {
    if (a->tv_sec != b->tv_sec) return a->tv_sec < b->tv_sec ? -1 : 1;
    return (a->tv_nsec > b->tv_nsec) - (a->tv_nsec < b->tv_nsec);
}

static int compare_items(const void *a, const void *b) {
    const cache_item *left = a, *right = b;
    int order = compare_times(&left->last_use, &right->last_use);
    return order ? order : memcmp(left->key.bytes, right->key.bytes, sizeof left->key.bytes);
}

static bool append_item(cache_items *items, const perk_cache_key *key, const struct stat *info) {
    if (items->count == items->capacity) {
        size_t capacity = items->capacity ? items->capacity * 2 : 64;
        cache_item *data = perk_realloc_array(items->data, capacity, sizeof *data);
        if (!data) return false;
        items->data = data;
        items->capacity = capacity;
    }
    items->data[items->count++] = (cache_item){.key = *key, .size = (uint64_t)info->st_size, .last_use = info->st_mtim};
    return true;
}

/* Everything with an entry's name, oldest use first. The caller frees items->data. */
static perk_status scan(const perk_cache_place *place, cache_items *items, perk_error *err) {
    *items = (cache_items){0};
    int fd = openat(place->fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *folder = fd < 0 ? NULL : fdopendir(fd);
    if (!folder) {
        perk_status status =
            perk_fail(err, PERK_IO, "%s: cannot list this cache folder: %s", place->path, strerror(errno));
        if (fd >= 0) close(fd);
        return status;
    }
    perk_status status = PERK_OK;
    for (struct dirent *item; !status && (item = readdir(folder));) {
        perk_cache_key key;
        struct stat info;
        if (!perk_cache_name_parse(item->d_name, PERK_CACHE_ENTRY_SUFFIX, &key)) continue;
        if (fstatat(place->fd, item->d_name, &info, AT_SYMLINK_NOFOLLOW) != 0) continue; /* just removed */
        if (!append_item(items, &key, &info)) status = perk_fail_memory(err, "the list of cache entries");
    }
    closedir(folder);
    if (!status && items->count) qsort(items->data, items->count, sizeof *items->data, compare_items);
    if (status) {
        free(items->data);
        *items = (cache_items){0};
    }
    return status;
}

/* A folder under an entry's name goes only if it is empty. */
static bool remove_item(const perk_cache_place *place, const perk_cache_key *key) {
    perk_cache_name name = perk_cache_file_name(key, PERK_CACHE_ENTRY_SUFFIX);
    return unlinkat(place->fd, name.text, 0) == 0 ||
           (errno == EISDIR && unlinkat(place->fd, name.text, AT_REMOVEDIR) == 0);
}

/* A last use in the future means that the clock was set back since. Such an entry would count as the newest until the
 * clock catches up, perhaps for years. It was used before whatever is used now: it goes a second back from now, and the
 * nanoseconds keep the order among those that do. */
static void rejoin_present(const perk_cache_place *place, const cache_item *item, size_t rank,
                           const struct timespec *now) {
    if (compare_times(&item->last_use, now) <= 0) return;
    perk_cache_name name = perk_cache_file_name(&item->key, PERK_CACHE_ENTRY_SUFFIX);
    const struct timespec time = {.tv_sec = now->tv_sec - 1, .tv_nsec = (long)PERK_MIN(rank, (size_t)999999999)};
    const struct timespec times[2] = {time, time};
    utimensat(place->fd, name.text, times, AT_SYMLINK_NOFOLLOW);
}

perk_status perk_cache_make_room(const perk_cache_place *place, uint64_t max_bytes, const perk_cache_key *keep,
                                 perk_cache_report *report, perk_error *err) {
    perk_cache_report counts = {0};
    cache_items items;
    struct timespec now;
    perk_cache_sweep(place);
    perk_status status = scan(place, &items, err);
    if (status) goto out;
    clock_gettime(CLOCK_REALTIME, &now);
    for (size_t i = 0; i < items.count; i++) counts.bytes += items.data[i].size;
    counts.entries = items.count;
    for (size_t i = 0; i < items.count; i++) {
        const cache_item *item = &items.data[i];
        bool kept = keep && memcmp(keep->bytes, item->key.bytes, sizeof keep->bytes) == 0;
        bool full = counts.bytes - counts.removed_bytes > max_bytes || max_bytes == 0;
        if (full && !kept && remove_item(place, &item->key)) {
            counts.removed++;
            counts.removed_bytes += item->size;
        } else {
            rejoin_present(place, item, i, &now);
        }
    }
out:
    free(items.data);
    if (report) *report = counts;
    return status;
}

/* `found` is never PERK_CACHE_ABSENT. A non-zero return ends the walk. */
typedef int (*place_visitor)(void *user, const perk_cache_place *place, perk_cache_found found,
                             const perk_cache_entry *entry);

static perk_status walk_place(const perk_cache_place *place, place_visitor visit, void *user, int *stopped,
                              perk_error *err) {
    cache_items items;
    perk_status status = scan(place, &items, err);
    if (status) return status;
    for (size_t i = 0; i < items.count && !*stopped; i++) {
        const cache_item *item = &items.data[i];
        perk_cache_blob blob;
        const char *problem = NULL;
        perk_cache_found found = perk_cache_entry_read(place, &item->key, false, &blob, &problem);
        perk_cache_blob_free(&blob);
        if (found == PERK_CACHE_ABSENT) continue; /* removed since the scan */
        perk_cache_entry entry = {.key = item->key,
                                  .size = item->size,
                                  .last_use = item->last_use.tv_sec,
                                  .read_only = !place->writable,
                                  .valid = found == PERK_CACHE_GOOD,
                                  .problem = problem,
                                  .folder = place->path};
        *stopped = visit(user, place, found, &entry);
    }
    free(items.data);
    return PERK_OK;
}

static perk_status walk(perk_cache *cache, place_visitor visit, void *user, perk_error *err) {
    perk_status status = PERK_OK;
    int stopped = 0;
    for (size_t i = 0; cache && i < cache->place_count && !status && !stopped; i++)
        status = walk_place(&cache->places[i], visit, user, &stopped, err);
    return status;
}

typedef struct list_request {
    int (*visit)(void *user, const perk_cache_entry *entry);
    void *user;
} list_request;

static int list_visit(void *user, const perk_cache_place *place, perk_cache_found found,
                      const perk_cache_entry *entry) {
    (void)place, (void)found;
    const list_request *request = user;
    return request->visit(request->user, entry);
}

perk_status perk_cache_list(perk_cache *cache, int (*visit)(void *user, const perk_cache_entry *entry), void *user,
                            perk_error *err) {
    list_request request = {visit, user};
    return walk(cache, list_visit, &request, err);
}

typedef struct verify_request {
    bool remove_bad;
    perk_cache_report counts;
} verify_request;

static int verify_visit(void *user, const perk_cache_place *place, perk_cache_found found,
                        const perk_cache_entry *entry) {
    verify_request *request = user;
    request->counts.entries++;
    request->counts.bytes += entry->size;
    if (found == PERK_CACHE_GOOD) return 0;
    request->counts.bad++;
    if (found == PERK_CACHE_BAD && request->remove_bad && place->writable && remove_item(place, &entry->key)) {
        request->counts.removed++;
        request->counts.removed_bytes += entry->size;
    }
    return 0;
}

perk_status perk_cache_verify(perk_cache *cache, int remove_bad, perk_cache_report *report, perk_error *err) {
    verify_request request = {.remove_bad = remove_bad != 0};
    perk_status status = walk(cache, verify_visit, &request, err);
    if (report) *report = request.counts;
    return status;
}

perk_status perk_cache_prune(perk_cache *cache, uint64_t max_bytes, perk_cache_report *report, perk_error *err) {
    const perk_cache_place *place = perk_cache_writable_place(cache);
    if (report) *report = (perk_cache_report){0};
    if (!place) return perk_fail(err, PERK_NOT_FOUND, "there is no writable cache folder: set PERK_CACHE_DIR to one");
    return perk_cache_make_room(place, max_bytes, NULL, report, err);
}

perk_status perk_cache_clear(perk_cache *cache, perk_cache_report *report, perk_error *err) {
    return perk_cache_prune(cache, 0, report, err);
}
