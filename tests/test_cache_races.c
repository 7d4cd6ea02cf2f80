/* The cubin cache under attack: many processes and threads at once, death at any moment, calls that fail.
 *
 * PERK_TEST_KILLS=n kills n writers instead of 200. */
#include "test_cache.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>

#define PAYLOAD 50000

/* ---- the calls that publish, made to fail or to be the last of this process --------------------------------------
 * The library's calls land here, since a program's own symbols come before libc's. */
typedef enum fault_kind { FAULT_NONE, FAULT_ERROR, FAULT_SHORT, FAULT_KILL } fault_kind;

static struct {
    fault_kind kind;
    int at;    /* which call, from 1 */
    int error; /* FAULT_ERROR */
    int calls;
} fault;

static bool fault_strikes(void) { return fault.kind && ++fault.calls == fault.at; }

ssize_t write(int fd, const void *data, size_t size) {
    bool strikes = fault_strikes();
    if (strikes && fault.kind == FAULT_ERROR) {
        errno = fault.error;
        return -1;
    }
    if (strikes && size > 1) size /= 2;
    ssize_t wrote = syscall(SYS_write, fd, data, size);
    if (strikes && fault.kind == FAULT_KILL) raise(SIGKILL);
    return wrote;
}

int fsync(int fd) {
    bool strikes = fault_strikes();
    if (strikes && fault.kind == FAULT_KILL) raise(SIGKILL);
    if (strikes && fault.kind == FAULT_ERROR) {
        errno = fault.error;
        return -1;
    }
    return (int)syscall(SYS_fsync, fd);
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    bool strikes = fault_strikes();
    if (strikes && fault.kind == FAULT_KILL) raise(SIGKILL);
    if (strikes && fault.kind == FAULT_ERROR) {
        errno = fault.error;
        return -1;
    }
    return (int)syscall(SYS_renameat2, from_folder, from, to_folder, to, 0);
}

/* ---- helpers ----------------------------------------------------------------------------------------------------- */
static void sleep_microseconds(long microseconds) {
    struct timespec time = {.tv_sec = microseconds / 1000000, .tv_nsec = microseconds % 1000000 * 1000};
    nanosleep(&time, NULL);
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static pid_t checked_fork(void) {
    pid_t child = fork();
    CHECK(child >= 0, "fork: %s", strerror(errno));
    if (!child) warnings = 0;
    return child;
}

static int exit_code_of(pid_t child) {
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

typedef struct maker {
    const perk_cache_key *key;
    const char *tally; /* a file that grows by a byte with each make */
    long microseconds;
    int started; /* a descriptor that gets a byte when making begins, or -1 */
} maker;

static perk_status make_payload(void *user, perk_cache_blob *out, perk_error *err) {
    (void)err;
    const maker *self = user;
    if (self->tally) {
        int fd = open(self->tally, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        CHECK(fd >= 0 && write(fd, "x", 1) == 1);
        close(fd);
    }
    if (self->started >= 0) CHECK(write(self->started, "x", 1) == 1);
    sleep_microseconds(self->microseconds);
    *out = payload_of(self->key, PAYLOAD);
    return PERK_OK;
}

static int get(perk_cache *cache, const maker *self) {
    perk_cache_blob blob;
    perk_error err;
    int hit;
    CHECK_OK(perk_cache_get_or_make(cache, self->key, make_payload, (void *)(uintptr_t)self, &blob, &hit, &err));
    CHECK(is_payload(&blob, self->key, PAYLOAD), "wrong bytes");
    perk_cache_blob_free(&blob);
    return hit;
}

static long tally_of(const char *path) {
    struct stat info;
    return stat(path, &info) == 0 ? (long)info.st_size : 0;
}

/* ---- many at once ------------------------------------------------------------------------------------------------ */
static void test_cold_processes(void) {
    enum { PROCESSES = 64 };
    path_text folder = path_in(scratch, "cold"), tally = path_in(scratch, "cold-tally");
    perk_cache_key key = numbered_key(1);
    maker self = {.key = &key, .tally = tally.text, .microseconds = 30000, .started = -1};
    int gate[2];
    CHECK(pipe(gate) == 0);
    pid_t children[PROCESSES];
    for (int i = 0; i < PROCESSES; i++) {
        children[i] = checked_fork();
        if (children[i]) continue;
        char byte;
        close(gate[1]);
        CHECK(read(gate[0], &byte, 1) == 0); /* until the parent closes its end */
        perk_cache *cache = open_cache(folder.text, 0);
        get(cache, &self);
        perk_cache_free(cache);
        _exit(warnings != 0);
    }
    close(gate[0]);
    close(gate[1]);
    for (int i = 0; i < PROCESSES; i++) CHECK(exit_code_of(children[i]) == 0);
    CHECK(tally_of(tally.text) == 1, "%ld makes", tally_of(tally.text));
    CHECK(count_files(folder.text, "") == 1, "left-overs");
}

static perk_cache *shared_cache;

static void *get_in_thread(void *user) {
    get(shared_cache, user);
    return NULL;
}

static void test_cold_threads(void) {
    enum { THREADS = 16 };
    path_text folder = path_in(scratch, "threads"), tally = path_in(scratch, "threads-tally");
    perk_cache_key key = numbered_key(1);
    maker self = {.key = &key, .tally = tally.text, .microseconds = 30000, .started = -1};
    pthread_t threads[THREADS];
    shared_cache = open_cache(folder.text, 0);
    for (int i = 0; i < THREADS; i++) CHECK(pthread_create(&threads[i], NULL, get_in_thread, &self) == 0);
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    CHECK(tally_of(tally.text) == 1, "%ld makes", tally_of(tally.text));
    CHECK(count_files(folder.text, "") == 1);
    perk_cache_free(shared_cache);
}

/* Fails, so that everybody gets a turn; complains if two have it at once. */
static perk_status fail_alone(void *user, perk_cache_blob *out, perk_error *err) {
    (void)out, (void)err;
    int fd = open(user, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    CHECK(fd >= 0, "two make at once");
    close(fd);
    sleep_microseconds(200);
    CHECK(unlink(user) == 0);
    return PERK_COMPILE;
}

/* Locks whose files come and go with each turn still let in one at a time. */
static void test_one_at_a_time(void) {
    enum { PROCESSES = 8, ROUNDS = 20 };
    path_text folder = path_in(scratch, "alone"), inside = path_in(scratch, "alone-inside");
    perk_cache_key key = numbered_key(1);
    pid_t children[PROCESSES];
    for (int i = 0; i < PROCESSES; i++) {
        children[i] = checked_fork();
        if (children[i]) continue;
        perk_cache *cache = open_cache(folder.text, 0);
        perk_cache_blob blob;
        for (int round = 0; round < ROUNDS; round++)
            CHECK(perk_cache_get_or_make(cache, &key, fail_alone, inside.text, &blob, NULL, NULL) == PERK_COMPILE);
        perk_cache_free(cache);
        _exit(warnings != 0);
    }
    for (int i = 0; i < PROCESSES; i++) CHECK(exit_code_of(children[i]) == 0);
    CHECK(count_files(folder.text, "") == 0);
}

/* Storing, loading, checking and removing all at once: whatever is loaded is right. */
static void test_churn(void) {
    enum { PROCESSES = 4, ROUNDS = 150, KEYS = 6 };
    path_text folder = path_in(scratch, "churn");
    pid_t children[PROCESSES];
    for (int i = 0; i < PROCESSES; i++) {
        children[i] = checked_fork();
        if (children[i]) continue;
        perk_cache *cache = open_cache(folder.text, 3 * PAYLOAD);
        perk_error err;
        unsigned seed = (unsigned)i;
        for (int round = 0; round < ROUNDS; round++) {
            perk_cache_key key = numbered_key((uint32_t)rand_r(&seed) % KEYS);
            maker self = {.key = &key, .started = -1};
            get(cache, &self);
            has_payload(cache, &key, PAYLOAD);
            if (round % 10 == 0) CHECK_OK(perk_cache_prune(cache, PAYLOAD, NULL, &err));
            if (round % 25 == 0) CHECK_OK(perk_cache_verify(cache, 1, NULL, &err));
        }
        perk_cache_free(cache);
        CHECK(warnings == 0, "%s", last_log);
        _exit(0);
    }
    for (int i = 0; i < PROCESSES; i++) CHECK(exit_code_of(children[i]) == 0);
    CHECK(count_files(folder.text, ".tmp-") == 0);
}

/* ---- a maker that hangs or dies ---------------------------------------------------------------------------------- */
static pid_t start_slow_maker(const char *folder, const perk_cache_key *key) {
    int started[2];
    CHECK(pipe(started) == 0);
    pid_t child = checked_fork();
    if (!child) {
        maker self = {.key = key, .microseconds = 60000000, .started = started[1]};
        get(open_cache(folder, 0), &self);
        _exit(0);
    }
    char byte;
    CHECK(read(started[0], &byte, 1) == 1);
    close(started[0]);
    close(started[1]);
    return child;
}

static void test_stuck_and_dead_makers(void) {
    path_text folder = path_in(scratch, "stuck");
    perk_cache_key key = numbered_key(1);
    maker self = {.key = &key, .started = -1};
    pid_t child = start_slow_maker(folder.text, &key);

    perk_cache *cache;
    perk_error err;
    perk_cache_options options = {.folder = folder.text, .max_lock_wait = 0.1, .log = {.write = keep_log}};
    CHECK_OK(perk_cache_open(&cache, &options, &err));
    double start = seconds();
    warnings = 0;
    CHECK(get(cache, &self) == 0);
    CHECK(seconds() - start >= 0.1 && warnings == 1 && strstr(last_log, "compiling it here"), "%s", last_log);
    CHECK(get(cache, &self) == 1); /* the bounded wait's result was published */
    CHECK(count_files(folder.text, ".lock") == 1);
    CHECK_OK(perk_cache_clear(cache, NULL, &err));
    CHECK(count_files(folder.text, ".lock") == 1); /* its holder lives: not swept */
    perk_cache_free(cache);

    kill(child, SIGKILL);
    CHECK(exit_code_of(child) == 128 + SIGKILL);
    CHECK(count_files(folder.text, ".lock") == 1);
    cache = open_cache(folder.text, 0); /* waits up to 60 s, if there is somebody to wait for */
    start = seconds();
    CHECK(get(cache, &self) == 0);
    CHECK(seconds() - start < 5, "waited for a dead process");
    CHECK(count_files(folder.text, "") == 1);
    perk_cache_free(cache);
}

/* ---- kill -9 ----------------------------------------------------------------------------------------------------- */
enum { KILL_KEYS = 4 };

static _Noreturn void publish_for_ever(const char *folder, unsigned seed) {
    perk_cache *cache = open_cache(folder, 0);
    for (;;) {
        perk_cache_key key = numbered_key((uint32_t)rand_r(&seed) % KILL_KEYS);
        maker self = {.key = &key, .started = -1};
        if (rand_r(&seed) % 2) {
            store_payload(cache, &key, PAYLOAD);
        } else {
            unlink(entry_path(folder, &key).text);
            get(cache, &self);
        }
    }
}

static void test_random_kills(void) {
    const char *setting = getenv("PERK_TEST_KILLS");
    int kills = setting ? atoi(setting) : 200, interrupted = 0, held = 0;
    path_text folder = path_in(scratch, "kills");
    perk_cache *cache = open_cache(folder.text, 0);
    unsigned seed = 1;
    for (int i = 0; i < kills; i++) {
        pid_t child = checked_fork();
        if (!child) publish_for_ever(folder.text, (unsigned)i);
        sleep_microseconds(500 + rand_r(&seed) % 3000);
        kill(child, SIGKILL);
        CHECK(exit_code_of(child) == 128 + SIGKILL);
        interrupted += count_files(folder.text, ".tmp-");
        held += count_files(folder.text, ".lock");
        warnings = 0;
        for (uint32_t j = 0; j < KILL_KEYS; j++) {
            perk_cache_key key = numbered_key(j);
            maker self = {.key = &key, .started = -1};
            has_payload(cache, &key, PAYLOAD);
            get(cache, &self);
            CHECK(get(cache, &self) == 1);
        }
        CHECK(warnings == 0, "%s", last_log); /* a kill leaves nothing behind under an entry's name */
        if (i % 4 == 3) {
            perk_cache_key key = numbered_key(0);
            store_payload(cache, &key, PAYLOAD);
            CHECK(count_files(folder.text, "") == KILL_KEYS, "left-overs stay");
        }
    }
    fprintf(stderr, "%d kills: temporary files seen after them %d, locks %d\n", kills, interrupted, held);
    CHECK(kills < 100 || interrupted > 0, "no kill fell into a publication: this tested nothing");
    perk_cache_free(cache);
}

/* Death in each of the calls that publish, the first to the last. */
static void test_kill_in_every_call(void) {
    path_text folder = path_in(scratch, "kill-points");
    perk_cache *cache = open_cache(folder.text, 0);
    perk_cache_key key = numbered_key(1);
    maker self = {.key = &key, .started = -1};
    int at = 0, code;
    do {
        perk_error err;
        CHECK_OK(perk_cache_clear(cache, NULL, &err));
        pid_t child = checked_fork();
        if (!child) {
            fault.kind = FAULT_KILL;
            fault.at = at + 1;
            get(cache, &self);
            _exit(0);
        }
        code = exit_code_of(child);
        CHECK(code == 0 || code == 128 + SIGKILL);
        at++;
        CHECK(has_payload(cache, &key, PAYLOAD) == (at >= 5)); /* two writes, fsync, rename | fsync of the folder */
        CHECK(get(cache, &self) == (at >= 5));
        CHECK(get(cache, &self) == 1 && warnings == 0);
    } while (code != 0);
    CHECK(at == 6, "%d", at);
    perk_cache_free(cache);
}

/* ---- calls that fail --------------------------------------------------------------------------------------------- */
static void test_failing_calls(void) {
    path_text folder = path_in(scratch, "failing");
    perk_cache *cache = open_cache(folder.text, 0);
    perk_cache_key key = numbered_key(1);
    maker self = {.key = &key, .started = -1};
    const int errors[] = {ENOSPC, EDQUOT, EIO, EROFS};
    for (int at = 1; at <= 4; at++) {
        for (size_t i = 0; i < 4; i++) {
            warnings = 0;
            fault.kind = FAULT_ERROR;
            fault.at = at;
            fault.error = errors[i];
            fault.calls = 0;
            CHECK(get(cache, &self) == 0);
            fault.kind = FAULT_NONE;
            CHECK(warnings == 1 && strstr(last_log, strerror(errors[i])), "%s", last_log);
            CHECK(count_files(folder.text, "") == 0, "left-overs");
        }
    }
    fault.kind = FAULT_ERROR; /* an interrupted or partial write is no failure */
    fault.error = EINTR;
    fault.at = 2;
    fault.calls = 0;
    CHECK(get(cache, &self) == 0 && fault.calls > 2);
    fault.kind = FAULT_SHORT;
    fault.calls = 0;
    perk_error err;
    CHECK_OK(perk_cache_clear(cache, NULL, &err));
    CHECK(get(cache, &self) == 0);
    fault.kind = FAULT_NONE;
    CHECK(has_payload(cache, &key, PAYLOAD));
    perk_cache_free(cache);
}

/* A file size limit must not end the process, although SIGXFSZ would. */
static void test_file_size_limit(void) {
    path_text folder = path_in(scratch, "limit");
    pid_t child = checked_fork();
    if (!child) {
        perk_cache *cache = open_cache(folder.text, 0);
        perk_cache_key key = numbered_key(1);
        maker self = {.key = &key, .started = -1};
        const struct rlimit limit = {.rlim_cur = 4096, .rlim_max = 4096};
        CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
        CHECK(get(cache, &self) == 0 && warnings == 1 && strstr(last_log, "not kept"));
        CHECK(count_files(folder.text, "") == 0);
        store_payload(cache, &key, 1000);
        CHECK(has_payload(cache, &key, 1000));
        _exit(0);
    }
    CHECK(exit_code_of(child) == 0);
}

/* No descriptors left: the cache misses, and an intact entry is not taken for a damaged one. */
static void test_no_descriptors(void) {
    path_text folder = path_in(scratch, "descriptors");
    pid_t child = checked_fork();
    if (!child) {
        perk_cache *cache = open_cache(folder.text, 0);
        perk_cache_key key = numbered_key(1);
        maker self = {.key = &key, .started = -1};
        perk_error err;
        store_payload(cache, &key, PAYLOAD);
        int next = dup(0);
        close(next);
        const struct rlimit limit = {.rlim_cur = (rlim_t)next, .rlim_max = (rlim_t)next + 1};
        CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
        CHECK(get(cache, &self) == 0 && warnings > 0);
        CHECK_FAILS(perk_cache_verify(cache, 1, NULL, &err), PERK_IO, "cannot list");
        CHECK(access(entry_path(folder.text, &key).text, F_OK) == 0);
        _exit(0);
    }
    CHECK(exit_code_of(child) == 0);
}

static void test_full_disk(void) {
    path_text folder = path_in(scratch, "small-disk");
    CHECK(mkdir(folder.text, 0700) == 0);
    pid_t child = checked_fork();
    if (!child) {
        if (unshare(CLONE_NEWNS) != 0 || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0 ||
            mount("perk-test", folder.text, "tmpfs", 0, "size=128k,mode=0700") != 0)
            _exit(TEST_SKIP);
        perk_cache *cache = open_cache(folder.text, 0);
        perk_cache_key keys[4];
        int stored = 0;
        for (uint32_t i = 0; i < 4; i++) {
            keys[i] = numbered_key(i);
            maker self = {.key = &keys[i], .started = -1};
            get(cache, &self);
            stored += has_payload(cache, &keys[i], PAYLOAD);
        }
        CHECK(stored == 2 && warnings > 0 && strstr(last_log, strerror(ENOSPC)), "%d: %s", stored, last_log);
        CHECK(count_files(folder.text, "") == 2, "left-overs");
        CHECK(mount(NULL, folder.text, NULL, MS_REMOUNT | MS_RDONLY, NULL) == 0, "%s", strerror(errno));
        maker late = {.key = &keys[3], .started = -1}; /* the disk turned read-only under an open cache */
        CHECK(get(cache, &late) == 0 && strstr(last_log, strerror(EROFS)), "%s", last_log);
        CHECK(has_payload(cache, &keys[0], PAYLOAD));
        perk_cache_free(cache);
        warnings = 0;
        cache = open_cache(folder.text, 0); /* and a start on it: one warning, what is there still serves */
        CHECK(warnings == 1 && strstr(last_log, "cannot be written to") && !perk_cache_folder(cache), "%s", last_log);
        CHECK(get(cache, &late) == 0 && has_payload(cache, &keys[0], PAYLOAD) && warnings == 1);
        _exit(0);
    }
    int code = exit_code_of(child);
    if (code == TEST_SKIP)
        fprintf(stderr, "skipped: a full and a read-only disk (needs the right to mount a tmpfs)\n");
    else
        CHECK(code == 0);
}

int main(void) {
    make_scratch();
    test_cold_processes();
    test_cold_threads();
    test_one_at_a_time();
    test_churn();
    test_stuck_and_dead_makers();
    test_random_kills();
    test_kill_in_every_call();
    test_failing_calls();
    test_file_size_limit();
    test_no_descriptors();
    test_full_disk();
    return 0;
}
