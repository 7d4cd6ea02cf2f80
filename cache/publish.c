/* Publication: an entry appears under its name whole and on disk, or not at all. */
#include "cache/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

typedef struct temp_name {
    char text[40];
} temp_name;

/* Need not be unguessable: O_EXCL makes it ours. The process id is for people who look into the folder. */
static temp_name random_temp_name(void) {
    temp_name name;
    uint64_t random;
    if (getrandom(&random, sizeof random, GRND_NONBLOCK) != sizeof random) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        random = (uint64_t)now.tv_nsec << 32 ^ (uint64_t)(uintptr_t)&name;
    }
    snprintf(name.text, sizeof name.text, PERK_CACHE_TEMP_PREFIX "%ld-%016llx", (long)getpid(),
             (unsigned long long)random);
    return name;
}

/* The file comes locked, which tells sweepers that its writer lives. Between creation and lock a sweeper may take it
 * away; then another one is created. */
static int create_temp(const perk_cache_place *place, temp_name *name, int *fd) {
    for (int attempt = 0; attempt < 16; attempt++) {
        *name = random_temp_name();
        *fd = openat(place->fd, name->text, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
        if (*fd < 0 && errno != EEXIST) return errno;
        if (*fd < 0) continue;
        bool swept = flock(*fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK;
        if (!swept && perk_cache_still_named(place, name->text, *fd)) return 0;
        close(*fd);
        *fd = -1;
    }
    return EEXIST;
}

static int write_bytes(int fd, const void *data, size_t size) {
    for (size_t done = 0; done < size;) {
        ssize_t wrote = write(fd, (const char *)data + done, size - done);
        if (wrote < 0 && errno == EINTR) continue;
        if (wrote < 0) return errno;
        if (wrote == 0) return ENOSPC;
        done += (size_t)wrote;
    }
    return 0;
}

/* Writing past this limit would raise SIGXFSZ, whose default is to end the process. */
static bool exceeds_file_limit(size_t size) {
    struct rlimit limit;
    return getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY && size > limit.rlim_cur;
}

static int rename_over(const perk_cache_place *place, const char *from, const char *to) {
    if (renameat(place->fd, from, place->fd, to) == 0) return 0;
    if (errno != EISDIR) return errno;
    /* A folder has the entry's name. Nothing of ours made it; if it is empty, it may go. */
    if (unlinkat(place->fd, to, AT_REMOVEDIR) != 0) return errno;
    return renameat(place->fd, from, place->fd, to) == 0 ? 0 : errno;
}

int perk_cache_publish(const perk_cache_place *place, const perk_cache_key *key, const void *data, size_t size,
                       const char **step) {
    perk_cache_name name = perk_cache_file_name(key, PERK_CACHE_ENTRY_SUFFIX);
    uint8_t header[PERK_CACHE_HEADER_SIZE];
    temp_name temp;
    int fd = -1;
    *step = "write";
    if (exceeds_file_limit(sizeof header + size)) return EFBIG;
    perk_cache_entry_header(header, key, data, size);

    *step = "create a file";
    int error = create_temp(place, &temp, &fd);
    if (error) return error;
    *step = "write";
    error = write_bytes(fd, header, sizeof header);
    if (!error) error = write_bytes(fd, data, size);
    if (!error && fsync(fd) != 0) error = errno;
    if (!error) {
        *step = "rename";
        error = rename_over(place, temp.text, name.text);
    }
    if (error) unlinkat(place->fd, temp.text, 0);
    close(fd);
    /* Should a crash undo the rename, the entry is made again: nothing depends on this sync having worked. */
    if (!error) fsync(place->fd);
    return error;
}
