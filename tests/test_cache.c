/* The cubin cache, one process: keys, round trips, what is refused, order of removal, housekeeping, choice of folder.
 */
#include "test_cache.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>

#define SMALL 40  /* bytes of payload where every byte of an entry is tried */
#define HEADER 72 /* as docs/cache.md has it */

typedef struct part {
    const char *name, *data;
} part;

static perk_cache_key key_of(const part *parts, size_t count) {
    perk_cache_key key;
    perk_error err;
    perk_cache_key_builder *builder = perk_cache_key_begin();
    for (size_t i = 0; i < count; i++) perk_cache_key_add(builder, parts[i].name, parts[i].data, strlen(parts[i].data));
    CHECK_OK(perk_cache_key_finish(builder, &key, &err));
    return key;
}

static void test_keys(void) {
    static const struct {
        part parts[3];
        size_t count;
    } lists[] = {
        {{{"", ""}}, 0},
        {{{"", ""}}, 1},
        {{{"", ""}, {"", ""}}, 2},
        {{{"a", "bc"}}, 1},
        {{{"ab", "c"}}, 1},
        {{{"abc", ""}}, 1},
        {{{"", "abc"}}, 1},
        {{{"a", "b"}, {"c", ""}}, 2},
        {{{"a", ""}, {"b", "c"}}, 2},
        {{{"source", "xy"}, {"options", "z"}}, 2},
        {{{"source", "x"}, {"options", "yz"}}, 2},
        {{{"options", "z"}, {"source", "xy"}}, 2},
        {{{"source", "xy"}, {"options", "z"}, {"arch", ""}}, 3},
    };
    enum { LISTS = sizeof lists / sizeof lists[0] };
    perk_cache_key keys[LISTS];
    for (size_t i = 0; i < LISTS; i++) {
        keys[i] = key_of(lists[i].parts, lists[i].count);
        perk_cache_key again = key_of(lists[i].parts, lists[i].count);
        CHECK(memcmp(&keys[i], &again, sizeof again) == 0);
        for (size_t j = 0; j < i; j++) CHECK(memcmp(&keys[i], &keys[j], sizeof again) != 0, "lists %zu, %zu", i, j);
    }

    perk_error err;
    perk_cache_key parsed;
    char hex[PERK_CACHE_KEY_HEX_SIZE];
    perk_cache_key_hex(&keys[3], hex);
    CHECK(strlen(hex) == 32);
    CHECK_OK(perk_cache_key_parse(hex, &parsed, &err));
    CHECK(memcmp(&parsed, &keys[3], sizeof parsed) == 0);
    const char *wrong[] = {"",
                           "0",
                           "0123456789abcdef0123456789abcde",
                           "0123456789abcdef0123456789abcdef0",
                           "0123456789abcdef0123456789abcdeF",
                           "0123456789abcdef0123456789abcde/"};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++)
        CHECK_FAILS(perk_cache_key_parse(wrong[i], &parsed, &err), PERK_INVALID_ARGUMENT, "32 hexadecimal");
    CHECK_FAILS(perk_cache_key_finish(NULL, &parsed, &err), PERK_OUT_OF_MEMORY, "cache key");
    CHECK_OK(perk_cache_key_finish(perk_cache_key_begin(), NULL, &err));
}

typedef struct maker {
    const perk_cache_key *key;
    size_t size;
    int calls;
    perk_status status;
} maker;

static perk_status make_payload(void *user, perk_cache_blob *out, perk_error *err) {
    maker *self = user;
    self->calls++;
    if (self->status) {
        if (err) *err = (perk_error){.status = self->status, .message = "no luck"};
        return self->status;
    }
    if (self->size) *out = payload_of(self->key, self->size);
    return PERK_OK;
}

/* 1 when it was a hit; the bytes must be right. */
static int get(perk_cache *cache, const perk_cache_key *key, size_t size) {
    maker self = {.key = key, .size = size};
    perk_cache_blob blob;
    perk_error err;
    int hit;
    CHECK_OK(perk_cache_get_or_make(cache, key, make_payload, &self, &blob, &hit, &err));
    CHECK(is_payload(&blob, key, size));
    CHECK(self.calls == !hit);
    perk_cache_blob_free(&blob);
    return hit;
}

static void test_round_trip(void) {
    path_text folder = path_in(scratch, "deep/er/cache");
    perk_cache *cache = open_cache(folder.text, 0);
    const size_t sizes[] = {0, 1, 71, 72, 4096, 300000};
    for (uint32_t i = 0; i < 6; i++) {
        perk_cache_key key = numbered_key(i);
        CHECK(!has_payload(cache, &key, sizes[i]));
        store_payload(cache, &key, sizes[i]);
        CHECK(has_payload(cache, &key, sizes[i]));
        store_payload(cache, &key, sizes[i]);
        struct stat info;
        CHECK(stat(entry_path(folder.text, &key).text, &info) == 0);
        CHECK((info.st_mode & 07777) == 0600 && (size_t)info.st_size == HEADER + sizes[i]);
    }
    struct stat info;
    CHECK(stat(path_in(scratch, "deep").text, &info) == 0 && (info.st_mode & 07777) == 0700);
    CHECK(stat(folder.text, &info) == 0 && (info.st_mode & 07777) == 0700);
    CHECK(strcmp(perk_cache_folder(cache), folder.text) == 0);
    CHECK(count_files(folder.text, "") == 6);
    perk_cache_free(cache);

    cache = open_cache(folder.text, 0); /* another start */
    perk_cache_key old = numbered_key(5), new = numbered_key(6);
    CHECK(get(cache, &old, 300000) == 1);
    CHECK(get(cache, &new, 500) == 0);
    CHECK(get(cache, &new, 500) == 1);
    CHECK(count_files(folder.text, "") == 7 && warnings == 0);
    static char large[1];
    CHECK(!perk_cache_store(cache, &new, large, PERK_CACHE_MAX_ENTRY_SIZE + 1) && strstr(last_log, "not kept"));
    CHECK(get(cache, &new, 500) == 1);
    perk_cache_free(cache);
}

static void test_makers(void) {
    path_text folder = path_in(scratch, "makers");
    perk_cache *cache = open_cache(folder.text, 0);
    perk_cache_key key = numbered_key(1);
    perk_cache_blob blob;
    perk_error err;
    int hit;
    maker failing = {.key = &key, .status = PERK_COMPILE};
    CHECK_FAILS(perk_cache_get_or_make(cache, &key, make_payload, &failing, &blob, &hit, &err), PERK_COMPILE, "luck");
    CHECK(!blob.data && !hit && failing.calls == 1);
    maker empty = {.key = &key};
    CHECK_FAILS(perk_cache_get_or_make(cache, &key, make_payload, &empty, &blob, NULL, &err), PERK_INTERNAL, "nothing");
    CHECK(count_files(folder.text, "") == 0); /* no lock stays */
    perk_cache_free(cache);

    CHECK(get(NULL, &key, 10) == 0);
    CHECK(!perk_cache_load(NULL, &key, &blob) && !perk_cache_store(NULL, &key, "x", 1) && !perk_cache_folder(NULL));
    CHECK_OK(perk_cache_verify(NULL, 0, NULL, &err));
    CHECK_FAILS(perk_cache_clear(NULL, NULL, &err), PERK_NOT_FOUND, "PERK_CACHE_DIR");
    perk_cache_free(NULL);
    perk_cache_blob_free(NULL);
}

/* The entry is damaged now: it must be a miss with a warning, be made again once, and then be a hit. */
static void check_refused(perk_cache *cache, const perk_cache_key *key, size_t size, const char *why) {
    warnings = 0;
    CHECK(!has_payload(cache, key, size));
    CHECK(warnings == 1 && strstr(last_log, why), "%d warnings, the last: %s (wanted '%s')", warnings, last_log, why);
    CHECK(get(cache, key, size) == 0);
    CHECK(get(cache, key, size) == 1);
}

static void test_damage(void) {
    path_text folder = path_in(scratch, "damage");
    perk_cache *cache = open_cache(folder.text, 0);
    perk_cache_key key = numbered_key(1), other = numbered_key(2);
    path_text path = entry_path(folder.text, &key);
    store_payload(cache, &key, SMALL);
    uint8_t good[HEADER + SMALL + 1] = {0}, bad[HEADER + SMALL + 1];
    CHECK(get_file(path.text, good, sizeof good) == HEADER + SMALL);

    for (size_t byte = 0; byte < HEADER + SMALL; byte++) {
        for (int bit = 0; bit < 8; bit++) { /* every bit is a miss ... */
            memcpy(bad, good, sizeof bad);
            bad[byte] ^= (uint8_t)(1 << bit);
            put_file(path.text, bad, HEADER + SMALL);
            CHECK(!has_payload(cache, &key, SMALL), "byte %zu bit %d", byte, bit);
        }
        check_refused(cache, &key, SMALL, "not used"); /* ... and every byte is replaced */
    }
    for (size_t size = 0; size < HEADER + SMALL; size++) {
        put_file(path.text, good, size);
        check_refused(cache, &key, SMALL, "cut short");
    }
    put_file(path.text, good, sizeof good);
    check_refused(cache, &key, SMALL, "past its end");

    store_payload(cache, &other, SMALL);
    CHECK(rename(entry_path(folder.text, &other).text, path.text) == 0);
    check_refused(cache, &key, SMALL, "another key");
    memcpy(bad, good, sizeof bad);
    bad[8]++;
    put_file(path.text, bad, HEADER + SMALL);
    check_refused(cache, &key, SMALL, "another format version");
    CHECK(truncate(path.text, (off_t)PERK_CACHE_MAX_ENTRY_SIZE + HEADER + 1) == 0);
    check_refused(cache, &key, SMALL, "too large");
    perk_cache_free(cache);
}

/* Payloads of several sizes, because the hash takes another way for each: one bit of every byte, in place. */
static void test_damage_of_large_entries(void) {
    static const size_t sizes[] = {1, 16, 17, 128, 129, 240, 241, 1025, 20000};
    path_text folder = path_in(scratch, "large");
    perk_cache *cache = open_cache(folder.text, 0);
    perk_cache_key key = numbered_key(1);
    long flips = 0;
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        store_payload(cache, &key, sizes[i]);
        int fd = open(entry_path(folder.text, &key).text, O_RDWR | O_CLOEXEC);
        CHECK(fd >= 0);
        for (size_t at = 0; at < HEADER + sizes[i]; at++, flips++) {
            uint8_t good, bad;
            CHECK(pread(fd, &good, 1, (off_t)at) == 1);
            bad = good ^ (uint8_t)(1u << (at % 8));
            CHECK(pwrite(fd, &bad, 1, (off_t)at) == 1);
            CHECK(!has_payload(cache, &key, sizes[i]), "byte %zu of %zu", at, sizes[i]);
            CHECK(pwrite(fd, &good, 1, (off_t)at) == 1);
        }
        close(fd);
        CHECK(has_payload(cache, &key, sizes[i]));
    }
    fprintf(stderr, "%ld flipped bits, each of them a miss\n", flips);
    perk_cache_free(cache);
}

static void plant_socket(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    CHECK(strlen(path) < sizeof address.sun_path);
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(fd >= 0 && bind(fd, (struct sockaddr *)&address, sizeof address) == 0, "%s", strerror(errno));
    close(fd);
}

static void test_foreign_files(void) {
    path_text folder = path_in(scratch, "foreign"), aside = path_in(scratch, "aside");
    perk_cache *cache = open_cache(folder.text, 0);
    perk_cache_key key = numbered_key(1);
    path_text path = entry_path(folder.text, &key);
    store_payload(cache, &key, SMALL);

    CHECK(rename(path.text, aside.text) == 0 && symlink(aside.text, path.text) == 0);
    check_refused(cache, &key, SMALL, "symbolic link");
    CHECK(unlink(path.text) == 0 && symlink("/nowhere/at/all", path.text) == 0);
    check_refused(cache, &key, SMALL, "symbolic link");
    CHECK(unlink(path.text) == 0 && link(aside.text, path.text) == 0);
    check_refused(cache, &key, SMALL, "hard link");
    CHECK(unlink(path.text) == 0 && mkfifo(path.text, 0600) == 0);
    check_refused(cache, &key, SMALL, "regular file");
    CHECK(unlink(path.text) == 0);
    plant_socket(path.text);
    check_refused(cache, &key, SMALL, "cannot be opened");
    CHECK(unlink(path.text) == 0 && mkdir(path.text, 0700) == 0);
    check_refused(cache, &key, SMALL, "regular file");

    const mode_t modes[] = {0602, 0620, 0666, 0777};
    for (size_t i = 0; i < 4; i++) {
        CHECK(chmod(path.text, modes[i]) == 0);
        check_refused(cache, &key, SMALL, "others may write");
    }
    if (chown(path.text, 12345, (gid_t)-1) == 0)
        check_refused(cache, &key, SMALL, "another user");
    else
        fprintf(stderr, "skipped: entries of another user (needs root)\n");

    /* A full folder in the way cannot be replaced: no entry, but the bytes all the same. */
    CHECK(unlink(path.text) == 0 && mkdir(path.text, 0700) == 0);
    put_file(path_in(path.text, "file").text, "x", 1);
    CHECK(get(cache, &key, SMALL) == 0 && get(cache, &key, SMALL) == 0);
    CHECK(strstr(last_log, "cannot rename"), "%s", last_log);
    perk_cache_free(cache);
}

static void set_age(const char *folder, const perk_cache_key *key, long seconds) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    now.tv_sec -= seconds;
    const struct timespec times[2] = {now, now};
    CHECK(utimensat(AT_FDCWD, entry_path(folder, key).text, times, 0) == 0);
}

#define ENTRY (1000u + HEADER)

/* Which of the keys 0..31 are there, as bits. */
static uint32_t present(const char *folder) {
    uint32_t bits = 0;
    for (uint32_t i = 0; i < 32; i++) {
        perk_cache_key key = numbered_key(i);
        if (access(entry_path(folder, &key).text, F_OK) == 0) bits |= 1u << i;
    }
    return bits;
}

static void test_least_recently_used(void) {
    path_text folder = path_in(scratch, "lru");
    perk_cache *cache = open_cache(folder.text, 4 * ENTRY);
    perk_cache_key keys[8];
    for (uint32_t i = 0; i < 8; i++) keys[i] = numbered_key(i);
    for (uint32_t i = 0; i < 4; i++) {
        store_payload(cache, &keys[i], 1000);
        set_age(folder.text, &keys[i], 1000 - 100 * (long)i);
    }
    CHECK(present(folder.text) == 0x0f);
    CHECK(has_payload(cache, &keys[0], 1000)); /* used: now the newest */
    store_payload(cache, &keys[4], 1000);
    CHECK(present(folder.text) == 0x1d, "%x", present(folder.text));
    store_payload(cache, &keys[5], 1000);
    CHECK(present(folder.text) == 0x39, "%x", present(folder.text));

    /* The clock was set back: what was used before looks as if it came from the future. */
    for (uint32_t i = 0; i < 6; i++)
        if (present(folder.text) >> i & 1) set_age(folder.text, &keys[i], -1000000 - (long)i);
    store_payload(cache, &keys[6], 1000); /* oldest of all by its time, and yet not removed */
    CHECK(present(folder.text) == 0x78, "%x", present(folder.text));
    CHECK(has_payload(cache, &keys[3], 1000));
    store_payload(cache, &keys[7], 1000); /* those from the future have aged since */
    CHECK(present(folder.text) == 0xe8, "%x", present(folder.text));

    /* One entry above the limit displaces the rest and stays itself. */
    perk_cache_key large = numbered_key(8);
    store_payload(cache, &large, 10000);
    CHECK(present(folder.text) == 0x100, "%x", present(folder.text));
    CHECK(has_payload(cache, &large, 10000));
    perk_cache_free(cache);
}

typedef struct listing {
    int count, valid, read_only, ordered;
    int64_t last;
    uint64_t bytes;
} listing;

static int list_entry(void *user, const perk_cache_entry *entry) {
    listing *seen = user;
    CHECK(entry->valid == !entry->problem);
    seen->count++;
    seen->valid += entry->valid;
    seen->read_only += entry->read_only;
    seen->ordered += entry->last_use >= seen->last;
    seen->last = entry->last_use;
    seen->bytes += entry->size;
    return 0;
}

static int stop_at_once(void *user, const perk_cache_entry *entry) {
    (void)entry;
    ++*(int *)user;
    return 1;
}

static void test_housekeeping(void) {
    path_text folder = path_in(scratch, "keep");
    perk_cache *cache = open_cache(folder.text, 0);
    perk_cache_key keys[5];
    for (uint32_t i = 0; i < 5; i++) {
        keys[i] = numbered_key(i);
        store_payload(cache, &keys[i], 1000);
        set_age(folder.text, &keys[i], 100 * (long)i); /* the last is the oldest */
    }
    put_file(path_in(folder.text, "notes.txt").text, "mine", 4); /* not the cache's: never touched */
    put_file(entry_path(folder.text, &keys[2]).text, "junk", 4);
    set_age(folder.text, &keys[2], 200);

    perk_error err;
    perk_cache_report report;
    listing seen = {.last = INT64_MIN};
    CHECK_OK(perk_cache_list(cache, list_entry, &seen, &err));
    CHECK(seen.count == 5 && seen.valid == 4 && seen.ordered == 5 && seen.bytes == 4 * ENTRY + 4);
    int visits = 0;
    CHECK_OK(perk_cache_list(cache, stop_at_once, &visits, &err));
    CHECK(visits == 1);

    CHECK_OK(perk_cache_verify(cache, 0, &report, &err));
    CHECK(report.entries == 5 && report.bad == 1 && report.removed == 0 && report.bytes == 4 * ENTRY + 4);
    CHECK_OK(perk_cache_verify(cache, 1, &report, &err));
    CHECK(report.entries == 5 && report.bad == 1 && report.removed == 1 && report.removed_bytes == 4);
    CHECK_OK(perk_cache_prune(cache, 2 * ENTRY, &report, &err));
    CHECK(report.entries == 4 && report.removed == 2 && report.removed_bytes == 2 * ENTRY);
    CHECK(present(folder.text) == 0x03, "%x", present(folder.text));
    CHECK_OK(perk_cache_prune(cache, 2 * ENTRY, &report, &err));
    CHECK(report.removed == 0);
    CHECK_OK(perk_cache_clear(cache, &report, &err));
    CHECK(report.removed == 2 && count_files(folder.text, "") == 1);
    perk_cache_free(cache);
}

static void test_left_overs(void) {
    path_text folder = path_in(scratch, "left");
    perk_cache *cache = open_cache(folder.text, 0);
    perk_cache_key key = numbered_key(1);
    const struct timespec future[2] = {{.tv_sec = 4000000000}, {.tv_sec = 4000000000}};
    path_text dead = path_in(folder.text, ".tmp-1-0123456789abcdef");
    path_text lock = path_in(folder.text, "0123456789abcdef0123456789abcdef.lock");
    put_file(dead.text, "half", 4);
    put_file(lock.text, "", 0);
    CHECK(utimensat(AT_FDCWD, dead.text, future, 0) == 0);
    CHECK(symlink("/etc/passwd", path_in(folder.text, ".tmp-2-0123456789abcdef").text) == 0);
    store_payload(cache, &key, 100);
    CHECK(count_files(folder.text, "") == 1); /* only the entry */

    /* A lock that cannot be taken costs a warning, not the entry. */
    char name[64];
    perk_cache_key other = numbered_key(2);
    perk_cache_key_hex(&other, name);
    strcat(name, ".lock");
    CHECK(mkdir(path_in(folder.text, name).text, 0700) == 0);
    warnings = 0;
    CHECK(get(cache, &other, 100) == 0 && warnings == 1 && strstr(last_log, "cannot lock"), "%s", last_log);
    CHECK(get(cache, &other, 100) == 1);
    perk_cache_free(cache);
}

static perk_cache *open_with(const perk_cache_options *options) {
    perk_cache *cache;
    perk_error err;
    perk_cache_options copy = *options;
    copy.log.write = keep_log;
    warnings = 0;
    CHECK_OK(perk_cache_open(&cache, &copy, &err));
    return cache;
}

static void test_read_only_folders(void) {
    path_text shipped = path_in(scratch, "shipped"), own = path_in(scratch, "own");
    perk_cache_key key = numbered_key(1), mine = numbered_key(2);
    perk_cache *cache = open_cache(shipped.text, 0);
    store_payload(cache, &key, SMALL);
    perk_cache_free(cache);
    path_text path = entry_path(shipped.text, &key);
    CHECK(chmod(path.text, 0444) == 0);

    path_text missing = path_in(scratch, "missing");
    const char *folders[] = {missing.text, shipped.text};
    cache = open_with(&(perk_cache_options){.folder = own.text, .read_only_folders = folders, .read_only_count = 2});
    CHECK(warnings == 1 && strstr(last_log, "missing"));
    CHECK(get(cache, &key, SMALL) == 1 && count_files(own.text, "") == 0);
    CHECK(get(cache, &mine, SMALL) == 0 && count_files(own.text, "") == 1);
    listing seen = {.last = INT64_MIN};
    perk_error err;
    perk_cache_report report;
    CHECK_OK(perk_cache_list(cache, list_entry, &seen, &err));
    CHECK(seen.count == 2 && seen.valid == 2 && seen.read_only == 1);
    CHECK_OK(perk_cache_clear(cache, &report, &err));
    CHECK(report.removed == 1 && count_files(own.text, "") == 0 && count_files(shipped.text, "") == 1);

    /* Bad entries there are passed over and left alone. */
    CHECK(chmod(path.text, 0646) == 0);
    CHECK(get(cache, &key, SMALL) == 0 && get(cache, &key, SMALL) == 1);
    CHECK_OK(perk_cache_verify(cache, 1, &report, &err));
    CHECK(report.entries == 2 && report.bad == 1 && report.removed == 0 && count_files(shipped.text, "") == 1);
    if (geteuid() == 0) {
        CHECK(chmod(path.text, 0444) == 0 && chown(path.text, 12345, (gid_t)-1) == 0);
        CHECK_OK(perk_cache_clear(cache, NULL, &err));
        CHECK(get(cache, &key, SMALL) == 0);
        CHECK(chown(path.text, 0, (gid_t)-1) == 0);
    }
    perk_cache_free(cache);

    CHECK(chmod(path.text, 0444) == 0);
    path_text list;
    CHECK(snprintf(list.text, sizeof list.text, ":%s::%s:", own.text, shipped.text) > 0);
    setenv("PERK_CACHE_READONLY", list.text, 1);
    cache = open_with(&(perk_cache_options){.folder = path_in(scratch, "own2").text});
    CHECK(warnings == 0 && get(cache, &key, SMALL) == 1);
    perk_cache_free(cache);
    cache = open_with(&(perk_cache_options){.folder = path_in(scratch, "own2").text, .disabled = 1});
    CHECK(!perk_cache_folder(cache) && get(cache, &key, SMALL) == 0 && get(cache, &key, SMALL) == 0);
    perk_cache_free(cache);
    unsetenv("PERK_CACHE_READONLY");
}

/* A folder of root's that is read-only by its mode, seen by a user who may not write there. */
static void test_folder_without_permission(void) {
    path_text folder = path_in(scratch, "forbidden");
    perk_cache_key key = numbered_key(1), other = numbered_key(2);
    if (geteuid() != 0) {
        fprintf(stderr, "skipped: a folder that another user may not write to (needs root)\n");
        return;
    }
    perk_cache *cache = open_cache(folder.text, 0);
    store_payload(cache, &key, SMALL);
    perk_cache_free(cache);
    CHECK(chmod(scratch, 0755) == 0 && chmod(folder.text, 0555) == 0);
    CHECK(chmod(entry_path(folder.text, &key).text, 0444) == 0);
    pid_t child = fork();
    CHECK(child >= 0);
    if (!child) {
        CHECK(setgid(12345) == 0 && setuid(12345) == 0);
        cache = open_with(&(perk_cache_options){.folder = folder.text});
        CHECK(warnings == 1 && strstr(last_log, "cannot be written to") && !perk_cache_folder(cache), "%s", last_log);
        CHECK(get(cache, &key, SMALL) == 1); /* root's, which a read-only place may hold */
        CHECK(get(cache, &other, SMALL) == 0 && get(cache, &other, SMALL) == 0 && warnings == 1);
        perk_cache_free(cache);
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0, "status %x", status);
    CHECK(count_files(folder.text, "") == 1);
    CHECK(chmod(folder.text, 0755) == 0);
}

/* Places that no process can write to, whatever its user: they warn, and everything else goes on. */
static void test_unusable_places(void) {
    path_text file = path_in(scratch, "file"), below = path_in(file.text, "cache");
    put_file(file.text, "x", 1);
    const char *places[] = {file.text, below.text, "/proc/perk-cache/deep", ""};
    perk_cache_key key = numbered_key(1);
    for (size_t i = 0; i < 4; i++) {
        perk_cache *cache = open_with(&(perk_cache_options){.folder = places[i]});
        CHECK(warnings == 1 && strstr(last_log, "PERK_CACHE_DIR"), "%s", last_log);
        CHECK(!perk_cache_folder(cache));
        CHECK(get(cache, &key, SMALL) == 0 && get(cache, &key, SMALL) == 0 && warnings == 1);
        perk_error err;
        CHECK_FAILS(perk_cache_prune(cache, 0, NULL, &err), PERK_NOT_FOUND, "no writable cache folder");
        perk_cache_free(cache);
    }
    perk_error err;
    perk_cache *cache;
    CHECK_FAILS(perk_cache_open(&cache, &(perk_cache_options){.max_lock_wait = -1}, &err), PERK_INVALID_ARGUMENT,
                "max_lock_wait");
    CHECK(!cache);

    /* A folder that vanishes under a running process. */
    path_text folder = path_in(scratch, "vanishing");
    cache = open_with(&(perk_cache_options){.folder = folder.text});
    CHECK(get(cache, &key, SMALL) == 0);
    remove_tree(folder.text);
    CHECK(get(cache, &key, SMALL) == 0 && get(cache, &key, SMALL) == 0 && warnings > 0);
    perk_cache_free(cache);
}

static void check_folder(const char *expected) {
    perk_cache *cache = open_with(&(perk_cache_options){0});
    const char *folder = perk_cache_folder(cache);
    CHECK((!folder && !expected) || (folder && expected && strcmp(folder, expected) == 0), "%s, not %s",
          folder ? folder : "(none)", expected ? expected : "(none)");
    CHECK(warnings == !expected, "%s", last_log);
    perk_cache_free(cache);
}

static void test_environment(void) {
    path_text own = path_in(scratch, "env-own"), xdg = path_in(scratch, "env-xdg"), home = path_in(scratch, "env-home");
    setenv("PERK_CACHE_DIR", own.text, 1);
    setenv("XDG_CACHE_HOME", xdg.text, 1);
    setenv("HOME", home.text, 1);
    check_folder(own.text);
    setenv("PERK_CACHE_DIR", "", 1);
    check_folder(path_in(xdg.text, "perk").text);
    unsetenv("PERK_CACHE_DIR");
    check_folder(path_in(xdg.text, "perk").text);
    setenv("XDG_CACHE_HOME", "relative/path", 1);
    check_folder(path_in(home.text, ".cache/perk").text);
    unsetenv("XDG_CACHE_HOME");
    check_folder(path_in(home.text, ".cache/perk").text);
    unsetenv("HOME");
    check_folder(NULL);
}

int main(void) {
    make_scratch();
    test_keys();
    test_round_trip();
    test_makers();
    test_damage();
    test_damage_of_large_entries();
    test_foreign_files();
    test_least_recently_used();
    test_housekeeping();
    test_left_overs();
    test_read_only_folders();
    test_folder_without_permission();
    test_unusable_places();
    test_environment();
    return 0;
}
