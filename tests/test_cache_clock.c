/* The cubin cache and a clock that jumps: the wall clock of this program is off by what the test says, for perk's
 * questions and for the times of its files alike. Whatever it does, nothing wrong is loaded, no start fails, the folder
 * keeps its size, and nobody waits longer than without it. */
#include "test_cache.h"

#include "src/base.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/file.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>

#define SIZE 1000
#define ENTRY (SIZE + 72)

enum { DAY = 24 * 60 * 60, YEAR = 365 * DAY };

/* ---- the clock: perk's calls land here, since a program's own symbols come before libc's ---- */

static _Atomic int64_t offset; /* seconds that the wall clock is ahead */
static bool no_flock;

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = (int)syscall(SYS_clock_gettime, clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += offset;
    return result;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}

static int set_time_of(int folder, const char *name) {
    struct timespec times[2];
    clock_gettime(CLOCK_REALTIME, &times[0]);
    times[1] = times[0];
    return (int)syscall(SYS_utimensat, folder, name, times, 0);
}

int futimens(int fd, const struct timespec times[2]) {
    return times ? (int)syscall(SYS_utimensat, fd, NULL, times, 0) : set_time_of(fd, NULL);
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    set_time_of(from_folder, from); /* written just now */
    return (int)syscall(SYS_renameat2, from_folder, from, to_folder, to, 0);
}

int fsync(int fd) { return fd < 0; } /* power stays on here; it would be most of the test's time */

int flock(int fd, int operation) {
    if (no_flock) {
        errno = ENOLCK;
        return -1;
    }
    return (int)syscall(SYS_flock, fd, operation);
}

/* ---- helpers ---- */

static perk_status make_payload(void *user, perk_cache_blob *out, perk_error *err) {
    (void)err;
    *out = payload_of(user, SIZE);
    return PERK_OK;
}

static int get(perk_cache *cache, perk_cache_key *key) {
    perk_cache_blob blob;
    perk_error err;
    int hit;
    CHECK_OK(perk_cache_get_or_make(cache, key, make_payload, key, &blob, &hit, &err));
    CHECK(is_payload(&blob, key, SIZE), "wrong bytes");
    perk_cache_blob_free(&blob);
    return hit;
}

typedef struct folder_state {
    uint64_t bytes;
    int entries, ahead; /* ahead: entries whose time is in the future */
} folder_state;

static int look_at_entry(void *user, const perk_cache_entry *entry) {
    folder_state *seen = user;
    CHECK(entry->valid, "%s", entry->problem);
    seen->bytes += entry->size;
    seen->entries++;
    seen->ahead += entry->last_use > time(NULL);
    return 0;
}

static folder_state look(perk_cache *cache) {
    folder_state seen = {0};
    perk_error err;
    CHECK_OK(perk_cache_list(cache, look_at_entry, &seen, &err));
    return seen;
}

/* ---- any jump at any time ---- */

static void jump(unsigned *seed) {
    static const int64_t jumps[] = {-10 * (int64_t)YEAR, -YEAR, -2 * DAY, -3600, -1, 1, 3600, 2 * DAY, YEAR,
                                    10 * (int64_t)YEAR};
    int64_t next = offset + jumps[(size_t)rand_r(seed) % PERK_COUNT(jumps)];
    if (next > -40 * (int64_t)YEAR && next < 40 * (int64_t)YEAR) offset = next;
}

static void test_random_jumps(void) {
    enum { ROUNDS = 3000, KEYS = 8, KEPT = 4 };
    perk_cache *cache = open_cache(path_in(scratch, "jumps").text, KEPT * ENTRY);
    unsigned seed = 1;
    int hits = 0;
    warnings = 0;
    for (int round = 0; round < ROUNDS; round++) {
        perk_cache_key key = numbered_key((uint32_t)rand_r(&seed) % KEYS);
        if (rand_r(&seed) % 4 == 0) jump(&seed);
        int hit = get(cache, &key);
        hits += hit;
        folder_state seen = look(cache);
        CHECK(hit || (has_payload(cache, &key, SIZE) && seen.ahead == 0), "round %d: %d ahead", round, seen.ahead);
        CHECK(seen.bytes <= KEPT * ENTRY && seen.entries <= KEPT, "round %d: %d entries", round, seen.entries);
    }
    CHECK(warnings == 0, "%s", last_log);
    CHECK(hits > ROUNDS / 4, "%d hits: the jumps cost too much", hits);
    CHECK(count_files(path_in(scratch, "jumps").text, "") == KEPT);
    fprintf(stderr, "%d uses with a clock that jumps: %d hits, nothing wrong\n", ROUNDS, hits);
    offset = 0;
    perk_cache_free(cache);
}

/* After a jump back, what is used from then on stays, although it looks older than all before. */
static void test_use_counts_after_a_jump_back(void) {
    perk_cache *cache = open_cache(path_in(scratch, "back").text, 4 * ENTRY);
    perk_cache_key keys[8];
    for (uint32_t i = 0; i < 8; i++) keys[i] = numbered_key(i);
    for (int i = 0; i < 4; i++) get(cache, &keys[i]);
    offset = -YEAR;
    for (int i = 4; i < 8; i++) {
        get(cache, &keys[i]);
        CHECK(get(cache, &keys[i]) == 1);
    }
    for (int i = 4; i < 8; i++) CHECK(has_payload(cache, &keys[i], SIZE), "entry %d went before older ones", i);
    offset = 0;
    perk_cache_free(cache);
}

/* ---- waiting ---- */

static void *jump_while_waiting(void *user) {
    const struct timespec pause = {.tv_nsec = 50 * 1000 * 1000};
    nanosleep(&pause, NULL);
    offset = *(const int64_t *)user;
    return NULL;
}

/* Somebody holds the key's lock; the wait for it takes its 0.3 s whatever the clock says. */
static void test_waits_do_not_follow_the_clock(void) {
    static const int64_t jumps[] = {-10 * (int64_t)YEAR, 10 * (int64_t)YEAR};
    path_text folder = path_in(scratch, "waits");
    for (size_t i = 0; i < PERK_COUNT(jumps); i++) {
        perk_cache *cache;
        perk_error err;
        perk_cache_key key = numbered_key((uint32_t)i);
        char hex[PERK_CACHE_KEY_HEX_SIZE + 8];
        const perk_cache_options options = {.folder = folder.text, .max_lock_wait = 0.3, .log = {.write = keep_log}};
        CHECK_OK(perk_cache_open(&cache, &options, &err));
        perk_cache_key_hex(&key, hex);
        strcat(hex, ".lock");
        int lock = open(path_in(folder.text, hex).text, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        CHECK(lock >= 0 && flock(lock, LOCK_EX) == 0);
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, jump_while_waiting, (void *)(uintptr_t)&jumps[i]) == 0);
        double start = perk_now();
        warnings = 0;
        CHECK(get(cache, &key) == 0);
        double waited = perk_now() - start;
        CHECK(waited >= 0.3 && waited < 60 && warnings == 1, "%g s: %s", waited, last_log);
        pthread_join(thread, NULL);
        close(lock);
        offset = 0;
        CHECK(get(cache, &key) == 1);
        perk_cache_free(cache);
    }
}

/* ---- left-over or alive ---- */

static int put_temp(const char *folder) {
    int fd = open(path_in(folder, ".tmp-1-0123456789abcdef").text, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    CHECK(fd >= 0 && futimens(fd, NULL) == 0);
    return fd;
}

/* Who writes holds a lock, and is not swept away by any clock. */
static void test_living_writers_stay(void) {
    path_text folder = path_in(scratch, "alive");
    perk_cache *cache = open_cache(folder.text, 0);
    perk_error err;
    int fd = put_temp(folder.text);
    CHECK(flock(fd, LOCK_EX) == 0);
    for (int years = -20; years <= 20; years += 10) {
        offset = (int64_t)years * YEAR;
        CHECK_OK(perk_cache_clear(cache, NULL, &err));
        CHECK(count_files(folder.text, ".tmp-") == 1, "swept away %d years off", years);
    }
    close(fd); /* it died */
    CHECK_OK(perk_cache_clear(cache, NULL, &err));
    CHECK(count_files(folder.text, "") == 0);
    offset = 0;
    perk_cache_free(cache);
}

/* Where there is no flock, the clock is asked after all: a file stays for a day, to either side, and not for ever. */
static void test_without_locks(void) {
    static const struct {
        int64_t off;
        bool stays;
    } cases[] = {{0, true}, {3600, true}, {-3600, true}, {2 * DAY, false}, {-2 * DAY, false}, {-10 * YEAR, false}};
    path_text folder = path_in(scratch, "no-locks");
    perk_cache *cache = open_cache(folder.text, 0);
    perk_error err;
    no_flock = true;
    for (size_t i = 0; i < PERK_COUNT(cases); i++) {
        perk_cache_key key = numbered_key((uint32_t)i);
        offset = 0;
        close(put_temp(folder.text));
        offset = cases[i].off;
        warnings = 0;
        CHECK(get(cache, &key) == 0 && warnings == 1 && strstr(last_log, "cannot lock"), "%s", last_log);
        CHECK(get(cache, &key) == 1);
        CHECK(count_files(folder.text, ".tmp-") == cases[i].stays, "%lld s off", (long long)cases[i].off);
        offset = 0;
        CHECK(get(cache, &key) == 1);
        CHECK_OK(perk_cache_clear(cache, NULL, &err));
        unlink(path_in(folder.text, ".tmp-1-0123456789abcdef").text);
    }
    no_flock = false;
    perk_cache_free(cache);
}

int main(void) {
    make_scratch();
    test_random_jumps();
    test_use_counts_after_a_jump_back();
    test_waits_do_not_follow_the_clock();
    test_living_writers_stay();
    test_without_locks();
    return 0;
}
