/* Folders: where the cache lies, and opening it. */
#include "cache/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

/* Unset, empty and set-user-id all count as not there. */
static const char *environment(const char *name) {
    const char *value = secure_getenv(name);
    return value && *value ? value : NULL;
}

/* NULL in *out: no variable gives a place. */
static perk_status choose_folder(const char *option, char **out, perk_error *err) {
    const char *own = option ? option : environment("PERK_CACHE_DIR");
    const char *xdg = environment("XDG_CACHE_HOME");
    const char *home = environment("HOME");
    *out = NULL;
    if (own)
        *out = perk_strdup(own);
    else if (xdg && xdg[0] == '/') /* the XDG specification has relative paths ignored */
        *out = perk_format("%s/perk", xdg);
    else if (home && home[0] == '/')
        *out = perk_format("%s/.cache/perk", home);
    else
        return PERK_OK;
    return *out ? PERK_OK : perk_fail_memory(err, "the cache folder's name");
}

/* mkdir -p with mode 0700; `path` is scratch space and comes back as it was. */
static int make_folders(char *path) {
    for (char *at = path + 1;; at++) {
        if (*at != '/' && *at != '\0') continue;
        char end = *at;
        *at = '\0';
        int error = mkdir(path, 0700) == 0 || errno == EEXIST ? 0 : errno;
        *at = end;
        /* A parent may be closed to us or on a read-only disk and yet exist: the last step decides. */
        if (end == '\0') return error;
        while (at[1] == '/') at++;
        if (at[1] == '\0') return error;
    }
}

static int open_folder(const char *path) { return open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC); }

/* Takes over `path`. */
static void add_place(perk_cache *cache, char *path, int fd, bool writable) {
    cache->places[cache->place_count++] = (perk_cache_place){.path = path, .fd = fd, .writable = writable};
}

static void note_sharing(perk_cache *cache, const char *path, int fd) {
    struct stat info;
    if (fstat(fd, &info) == 0 && ((info.st_mode & (S_IWGRP | S_IWOTH)) || info.st_uid != geteuid()))
        perk_cache_say(cache, PERK_LOG_INFO,
                       "%s: other users may write to this cache folder; only entries that are yours alone are used",
                       path);
}

static perk_status open_main_folder(perk_cache *cache, const char *option, perk_error *err) {
    char *path;
    perk_status status = choose_folder(option, &path, err);
    if (status) return status;
    if (!path) {
        perk_cache_say(cache, PERK_LOG_WARNING,
                       "no place for compiled kernels, so each start compiles anew: set PERK_CACHE_DIR or HOME");
        return PERK_OK;
    }
    int made = path[0] ? make_folders(path) : ENOENT;
    int fd = open_folder(path);
    if (fd < 0) {
        perk_cache_say(cache, PERK_LOG_WARNING,
                       "%s: cannot be used for compiled kernels, so each start compiles anew: %s; set PERK_CACHE_DIR",
                       path, strerror(made ? made : errno));
        free(path);
        return PERK_OK;
    }
    bool writable = faccessat(fd, ".", W_OK | X_OK, AT_EACCESS) == 0;
    if (!writable)
        perk_cache_say(cache, PERK_LOG_WARNING,
                       "%s: cannot be written to, so no compiled kernel is kept there: %s; set PERK_CACHE_DIR", path,
                       strerror(errno));
    else
        note_sharing(cache, path, fd);
    add_place(cache, path, fd, writable);
    return PERK_OK;
}

/* A missing folder is a warning, but want of memory is a failure. */
static perk_status open_read_only_folder(perk_cache *cache, const char *path, size_t length, perk_error *err) {
    if (!length) return PERK_OK;
    char *copy = perk_format("%.*s", (int)PERK_MIN(length, (size_t)INT32_MAX), path);
    if (!copy) return perk_fail_memory(err, "a cache folder's name");
    int fd = open_folder(copy);
    if (fd < 0) {
        perk_cache_say(cache, PERK_LOG_WARNING, "%s: this read-only cache folder is not used: %s", copy,
                       strerror(errno));
        free(copy);
        return PERK_OK;
    }
    add_place(cache, copy, fd, false);
    return PERK_OK;
}

static size_t count_colons(const char *text) {
    size_t count = 0;
    for (; *text; text++) count += *text == ':';
    return count;
}

perk_status perk_cache_open_places(perk_cache *cache, const perk_cache_options *options, perk_error *err) {
    const char *listed = environment("PERK_CACHE_READONLY");
    size_t listed_count = listed ? count_colons(listed) + 1 : 0;
    if (options->read_only_count > SIZE_MAX / sizeof *cache->places - listed_count - 1)
        return perk_fail_memory(err, "the cache's folders");
    cache->places = perk_calloc(1 + options->read_only_count + listed_count, sizeof *cache->places);
    if (!cache->places) return perk_fail_memory(err, "the cache's folders");

    perk_status status = open_main_folder(cache, options->folder, err);
    for (size_t i = 0; i < options->read_only_count && !status; i++) {
        const char *path = options->read_only_folders[i];
        status = open_read_only_folder(cache, path, strlen(path), err);
    }
    while (listed && !status) {
        const char *end = strchrnul(listed, ':');
        status = open_read_only_folder(cache, listed, (size_t)(end - listed), err);
        listed = *end ? end + 1 : NULL;
    }
    return status;
}
