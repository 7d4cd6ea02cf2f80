/* Locks: who makes an entry, and which left-over files have no living owner.
 *
 * flock belongs to the open file, so it also separates threads, and the kernel drops it with the process that held it:
 * no clock and no process id is ever asked. A lock file is removed by its holder, hence a lock counts only while the
 * file that it is on still has its name. */
#include "cache/internal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

bool perk_cache_still_named(const perk_cache_place *place, const char *name, int fd) {
    struct stat held, named;
    return fstat(fd, &held) == 0 && fstatat(place->fd, name, &named, AT_SYMLINK_NOFOLLOW) == 0 &&
           held.st_dev == named.st_dev && held.st_ino == named.st_ino;
}

static void sleep_seconds(double seconds) {
    struct timespec time = {.tv_sec = 0, .tv_nsec = (long)(seconds * 1e9)};
    nanosleep(&time, NULL);
}

perk_cache_lock_result perk_cache_lock(const perk_cache_place *place, const perk_cache_key *key, double max_wait,
                                       int *fd) {
    perk_cache_name name = perk_cache_file_name(key, PERK_CACHE_LOCK_SUFFIX);
    double deadline = perk_now() + max_wait, pause = 0.001;
    *fd = -1;
    for (;;) {
        if (*fd < 0) *fd = openat(place->fd, name.text, O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0600);
        if (*fd < 0) return PERK_CACHE_LOCK_FAILED;
        bool taken = flock(*fd, LOCK_EX | LOCK_NB) == 0;
        if (taken && perk_cache_still_named(place, name.text, *fd)) return PERK_CACHE_LOCKED;
        int error = taken || errno == EINTR ? EWOULDBLOCK : errno;
        bool late = perk_now() >= deadline;
        if (taken || late || error != EWOULDBLOCK) {
            close(*fd);
            *fd = -1;
        }
        errno = error;
        if (error != EWOULDBLOCK) return PERK_CACHE_LOCK_FAILED;
        if (late) return PERK_CACHE_LOCK_TIMEOUT;
        if (taken) continue; /* its last holder removed it: open the name again */
        sleep_seconds(pause);
        pause = PERK_MIN(pause * 2, 0.016);
    }
}

void perk_cache_unlock(const perk_cache_place *place, const perk_cache_key *key, int fd) {
    perk_cache_name name = perk_cache_file_name(key, PERK_CACHE_LOCK_SUFFIX);
    if (perk_cache_still_named(place, name.text, fd)) unlinkat(place->fd, name.text, 0);
    flock(fd, LOCK_UN); /* said aloud, because a child forked by another thread may share this open file */
    close(fd);
}

/* Some network file systems know no flock. There a file is left over once its time is a day away from now, before or
 * after: a clock that was set back must not keep it for ever. */
static bool is_old(const struct stat *info) {
    const int64_t day = 24 * 60 * 60;
    int64_t age = (int64_t)time(NULL) - (int64_t)info->st_mtim.tv_sec;
    return age > day || age < -day;
}

static void sweep_file(const perk_cache_place *place, const char *name) {
    int fd = openat(place->fd, name, O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) {
        if (errno == ELOOP) unlinkat(place->fd, name, 0); /* a symbolic link: none of ours */
        return;
    }
    struct stat info;
    if (fstat(fd, &info) == 0 && S_ISREG(info.st_mode) && info.st_uid == geteuid()) {
        bool idle = flock(fd, LOCK_EX | LOCK_NB) == 0;
        if (!idle && errno != EWOULDBLOCK && errno != EINTR) idle = is_old(&info);
        if (idle && perk_cache_still_named(place, name, fd)) unlinkat(place->fd, name, 0);
    }
    close(fd);
}

void perk_cache_sweep(const perk_cache_place *place) {
    int fd = openat(place->fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *folder = fd < 0 ? NULL : fdopendir(fd);
    if (!folder) {
        if (fd >= 0) close(fd);
        return;
    }
    for (struct dirent *item; (item = readdir(folder));) {
        perk_cache_key key;
        if (strncmp(item->d_name, PERK_CACHE_TEMP_PREFIX, strlen(PERK_CACHE_TEMP_PREFIX)) == 0 ||
            perk_cache_name_parse(item->d_name, PERK_CACHE_LOCK_SUFFIX, &key))
            sweep_file(place, item->d_name);
    }
    closedir(folder);
}
