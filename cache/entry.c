/* One entry: its bytes, and whether a file with those bytes may be believed.
 *
 *   0  magic            8 bytes
 *   8  format version   u32
 *  12  header size      u32
 *  16  key             16 bytes
 *  32  payload size     u64
 *  40  payload XXH3    16 bytes, canonical (big-endian)
 *  56  header XXH3     16 bytes, over bytes 0..55
 *  72  payload
 */
#include "cache/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>
#include <xxhash.h>

enum { AT_VERSION = 8, AT_HEADER_SIZE = 12, AT_KEY = 16, AT_SIZE = 32, AT_PAYLOAD_HASH = 40, AT_HEADER_HASH = 56 };

static const uint8_t magic[8] = {'P', 'E', 'R', 'K', 0xc0, 0xb1, '\r', '\n'};

static void put_number(uint8_t *at, int bytes, uint64_t number) {
    for (int i = 0; i < bytes; i++) at[i] = (uint8_t)(number >> (8 * i));
}

static uint64_t get_number(const uint8_t *at, int bytes) {
    uint64_t number = 0;
    for (int i = 0; i < bytes; i++) number |= (uint64_t)at[i] << (8 * i);
    return number;
}

static void put_hash(uint8_t *at, const void *data, size_t size) {
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits(data, size));
    memcpy(at, canonical.digest, sizeof canonical.digest);
}

static bool hash_matches(const uint8_t *at, const void *data, size_t size) {
    uint8_t hash[16];
    put_hash(hash, data, size);
    return memcmp(hash, at, sizeof hash) == 0;
}

void perk_cache_entry_header(uint8_t header[PERK_CACHE_HEADER_SIZE], const perk_cache_key *key, const void *data,
                             size_t size) {
    memcpy(header, magic, sizeof magic);
    put_number(header + AT_VERSION, 4, PERK_CACHE_FORMAT_VERSION);
    put_number(header + AT_HEADER_SIZE, 4, PERK_CACHE_HEADER_SIZE);
    memcpy(header + AT_KEY, key->bytes, PERK_CACHE_KEY_SIZE);
    put_number(header + AT_SIZE, 8, size);
    put_hash(header + AT_PAYLOAD_HASH, data, size);
    put_hash(header + AT_HEADER_HASH, header, AT_HEADER_HASH);
}

const char *perk_cache_entry_check(const uint8_t *bytes, size_t size, const perk_cache_key *key) {
    if (size < PERK_CACHE_HEADER_SIZE) return "it is cut short";
    if (memcmp(bytes, magic, sizeof magic) != 0) return "it is not a cache entry";
    if (get_number(bytes + AT_VERSION, 4) != PERK_CACHE_FORMAT_VERSION) return "it has another format version";
    if (get_number(bytes + AT_HEADER_SIZE, 4) != PERK_CACHE_HEADER_SIZE ||
        !hash_matches(bytes + AT_HEADER_HASH, bytes, AT_HEADER_HASH))
        return "its header is damaged";
    if (memcmp(bytes + AT_KEY, key->bytes, PERK_CACHE_KEY_SIZE) != 0) return "it belongs to another key";
    uint64_t payload_size = size - PERK_CACHE_HEADER_SIZE;
    uint64_t stated_size = get_number(bytes + AT_SIZE, 8);
    if (stated_size > payload_size) return "it is cut short";
    if (stated_size < payload_size) return "it has bytes past its end";
    if (!hash_matches(bytes + AT_PAYLOAD_HASH, bytes + PERK_CACHE_HEADER_SIZE, (size_t)payload_size))
        return "its payload is damaged";
    return NULL;
}

/* Whoever can write an entry decides what code runs on the GPU, so only files that nobody else could have written are
 * read: ours, or where a deployment ships them, ours or root's. A second hard link could be somebody's way of passing
 * off another file of ours; in shipped folders it is an everyday result of image layers and packages. */
static const char *check_trust(const struct stat *info, bool writable_place) {
    if (!S_ISREG(info->st_mode)) return "it is not a regular file";
    if (info->st_uid != geteuid() && (writable_place || info->st_uid != 0)) return "it belongs to another user";
    if (info->st_mode & (S_IWGRP | S_IWOTH)) return "others may write to it";
    if (writable_place && info->st_nlink > 1) return "it has another hard link";
    if (info->st_size < PERK_CACHE_HEADER_SIZE) return "it is cut short";
    if ((uint64_t)info->st_size - PERK_CACHE_HEADER_SIZE > PERK_CACHE_MAX_ENTRY_SIZE) return "it is too large";
    return NULL;
}

static const char no_memory[] = "there is no memory for it";

static const char *read_bytes(int fd, uint8_t *bytes, size_t size) {
    for (size_t used = 0; used < size;) {
        ssize_t got = read(fd, bytes + used, size - used);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return "it cannot be read";
        if (got == 0) return "it is cut short";
        used += (size_t)got;
    }
    return NULL;
}

static const char *read_trusted(int fd, bool writable_place, const perk_cache_key *key, perk_cache_blob *blob) {
    struct stat info;
    if (fstat(fd, &info) != 0) return "it cannot be examined";
    const char *problem = check_trust(&info, writable_place);
    if (problem) return problem;
    size_t size = (size_t)info.st_size;
    uint8_t *bytes = malloc(size);
    if (!bytes) return no_memory;
    problem = read_bytes(fd, bytes, size);
    if (!problem) problem = perk_cache_entry_check(bytes, size, key);
    if (problem) {
        free(bytes);
        return problem;
    }
    blob->data = bytes;
    blob->size = size - PERK_CACHE_HEADER_SIZE;
    memmove(bytes, bytes + PERK_CACHE_HEADER_SIZE, blob->size);
    return NULL;
}

perk_cache_found perk_cache_entry_read(const perk_cache_place *place, const perk_cache_key *key, bool touch,
                                       perk_cache_blob *blob, const char **problem) {
    perk_cache_name name = perk_cache_file_name(key, PERK_CACHE_ENTRY_SUFFIX);
    *blob = (perk_cache_blob){0};
    /* O_NONBLOCK: a FIFO under this name must not stop us. */
    int fd = openat(place->fd, name.text, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0 && errno == ENOENT) return PERK_CACHE_ABSENT;
    if (fd < 0) {
        *problem = errno == ELOOP ? "it is a symbolic link" : "it cannot be opened";
        return errno == EMFILE || errno == ENFILE || errno == ENOMEM ? PERK_CACHE_UNKNOWN : PERK_CACHE_BAD;
    }
    *problem = read_trusted(fd, place->writable, key, blob);
    if (!*problem && touch && place->writable) futimens(fd, NULL); /* the order of use is a hint: failure is fine */
    close(fd);
    if (*problem == no_memory) return PERK_CACHE_UNKNOWN;
    return *problem ? PERK_CACHE_BAD : PERK_CACHE_GOOD;
}
