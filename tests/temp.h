/* A temporary folder for a test: made, filled with files, removed with all of them. */
#ifndef PERK_TESTS_TEMP_H
#define PERK_TESTS_TEMP_H

#include "test.h"

#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct temp_folder {
    char path[512];
} temp_folder;

static inline temp_folder temp_make(void) {
    temp_folder folder;
    const char *root = getenv("TMPDIR");
    snprintf(folder.path, sizeof folder.path, "%s/perk-test-XXXXXX", root && *root ? root : "/tmp");
    CHECK(mkdtemp(folder.path), "%s", folder.path);
    return folder;
}

/* "folder/name", valid until the caller's buffer is reused. */
static inline const char *temp_path(const temp_folder *folder, const char *name, char *path, size_t size) {
    int length = snprintf(path, size, "%s/%s", folder->path, name);
    CHECK(length > 0 && (size_t)length < size, "%s", name);
    return path;
}

static inline void temp_write(const temp_folder *folder, const char *name, const void *data, size_t size) {
    char path[1024];
    FILE *file = fopen(temp_path(folder, name, path, sizeof path), "wb");
    CHECK(file, "%s", path);
    CHECK(size == 0 || fwrite(data, 1, size, file) == size, "%s", path);
    CHECK(fclose(file) == 0, "%s", path);
}

static inline void temp_write_text(const temp_folder *folder, const char *name, const char *text) {
    temp_write(folder, name, text, strlen(text));
}

/* A file's bytes, with a zero after them; the caller frees them. */
static inline char *temp_read(const temp_folder *folder, const char *name, size_t *size) {
    char path[1024];
    struct stat info;
    FILE *file = fopen(temp_path(folder, name, path, sizeof path), "rb");
    CHECK(file && fstat(fileno(file), &info) == 0, "%s", path);
    *size = (size_t)info.st_size;
    char *data = malloc(*size + 1);
    CHECK(data && fread(data, 1, *size, file) == *size, "%s", path);
    data[*size] = '\0';
    fclose(file);
    return data;
}

/* Removes the files (no folders below) and the folder. */
static inline void temp_remove(const temp_folder *folder) {
    char path[1024];
    DIR *entries = opendir(folder->path);
    CHECK(entries, "%s", folder->path);
    for (struct dirent *entry; (entry = readdir(entries));)
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            CHECK(unlink(temp_path(folder, entry->d_name, path, sizeof path)) == 0, "%s", path);
    closedir(entries);
    CHECK(rmdir(folder->path) == 0, "%s", folder->path);
}

#endif
