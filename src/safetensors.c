#include "safetensors.h"

#include "json.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define LENGTH_BYTES 8
#define METADATA_KEY "__metadata__"
#define SHAPE_TEXT 256

struct perk_safetensors {
    char *path;
    unsigned char *map;
    size_t size;
    size_t data_start;
    perk_safetensors_tensor *tensors; /* names, and data where copied, are owned */
    size_t count;
};

typedef struct stored_type {
    const char *name;
    unsigned bits;
    bool usable;
    perk_dtype dtype;
} stored_type;

static const stored_type stored_types[] = {
    {"BF16", 16, true, PERK_BF16}, {"F16", 16, true, PERK_F16},  {"F32", 32, true, PERK_F32},  {"F64", 64, false, 0},
    {"BOOL", 8, false, 0},         {"U8", 8, false, 0},          {"I8", 8, false, 0},          {"U16", 16, false, 0},
    {"I16", 16, false, 0},         {"U32", 32, false, 0},        {"I32", 32, false, 0},        {"U64", 64, false, 0},
    {"I64", 64, false, 0},         {"C64", 64, false, 0},        {"F8_E4M3", 8, false, 0},     {"F8_E5M2", 8, false, 0},
    {"F8_E8M0", 8, false, 0},      {"F8_E4M3FNUZ", 8, false, 0}, {"F8_E5M2FNUZ", 8, false, 0}, {"F6_E2M3", 6, false, 0},
    {"F6_E3M2", 6, false, 0},      {"F4", 4, false, 0},
};

size_t perk_safetensors_count(const perk_safetensors *file) { return file->count; }

const perk_safetensors_tensor *perk_safetensors_at(const perk_safetensors *file, size_t index) {
    return index < file->count ? &file->tensors[index] : NULL;
}

const char *perk_safetensors_path(const perk_safetensors *file) { return file->path; }

const char *perk_shape_text(int ndim, const int64_t *dims, char *text, size_t size) {
    size_t used = (size_t)snprintf(text, size, "[");
    for (int i = 0; i < ndim && used < size; i++)
        used += (size_t)snprintf(text + used, size - used, "%s%" PRId64, i ? ", " : "", dims[i]);
    if (used < size) snprintf(text + used, size - used, "]");
    return text;
}

static const stored_type *find_stored_type(const char *name) {
    for (size_t i = 0; i < PERK_COUNT(stored_types); i++)
        if (strcmp(stored_types[i].name, name) == 0) return &stored_types[i];
    return NULL;
}

static perk_status map_file(perk_safetensors *file, perk_error *err) {
    perk_status status = PERK_OK;
    struct stat info;
    /* O_NONBLOCK: opening a pipe by mistake must not wait for a writer. */
    int fd = open(file->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return perk_fail(err, errno == ENOENT ? PERK_NOT_FOUND : PERK_IO, "cannot open: %s", strerror(errno));
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        status = perk_fail(err, PERK_IO, "not a regular file");
        goto out;
    }
    if (info.st_size < LENGTH_BYTES) {
        status = perk_fail(err, PERK_BAD_FORMAT, "%lld bytes are too few for a safetensors file; download it again",
                           (long long)info.st_size);
        goto out;
    }
    void *map = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (map == MAP_FAILED) {
        status = perk_fail(err, PERK_IO, "cannot map %lld bytes: %s", (long long)info.st_size, strerror(errno));
        goto out;
    }
    file->map = map;
    file->size = (size_t)info.st_size;
out:
    close(fd);
    return status;
}

static perk_status parse_header(perk_safetensors *file, json_t **header, perk_error *err) {
    static const char lfs_pointer[] = "version https://git-lfs";
    uint64_t length = 0;
    for (int i = LENGTH_BYTES - 1; i >= 0; i--) length = length << 8 | file->map[i];
    if (file->size >= sizeof lfs_pointer - 1 && memcmp(file->map, lfs_pointer, sizeof lfs_pointer - 1) == 0)
        return perk_fail(err, PERK_BAD_FORMAT, "a Git LFS pointer, not the weights themselves; run 'git lfs pull'");
    if (length > PERK_SAFETENSORS_MAX_HEADER)
        return perk_fail(err, PERK_BAD_FORMAT,
                         "header length %" PRIu64 " exceeds %" PRIu64 "; this is no safetensors file", length,
                         PERK_SAFETENSORS_MAX_HEADER);
    if (length > file->size - LENGTH_BYTES)
        return perk_fail(err, PERK_BAD_FORMAT,
                         "header length %" PRIu64 " exceeds the file's %zu bytes; "
                         "the file is truncated or no safetensors file: download it again",
                         length, file->size);
    const char *text = (const char *)file->map + LENGTH_BYTES;
    if (length == 0 || text[0] != '{')
        return perk_fail(err, PERK_BAD_FORMAT, "the header does not begin with '{'; this is no safetensors file");
    json_error_t where;
    *header = json_loadb(text, (size_t)length, JSON_REJECT_DUPLICATES, &where);
    if (!*header && perk_json_status(&where) == PERK_OUT_OF_MEMORY) return perk_fail_memory(err, "the header");
    if (!*header)
        return perk_fail(err, PERK_BAD_FORMAT, "header is not valid JSON: %s (byte %d)", where.text, where.position);
    file->data_start = LENGTH_BYTES + (size_t)length;
    return PERK_OK;
}

static perk_status check_metadata(const json_t *metadata, perk_error *err) {
    const char *key;
    json_t *value;
    if (!json_is_object(metadata)) return perk_fail(err, PERK_BAD_FORMAT, METADATA_KEY " must be an object");
    json_object_foreach((json_t *)metadata, key, value) {
        if (!json_is_string(value))
            return perk_fail(err, PERK_BAD_FORMAT, METADATA_KEY ": \"%.200s\" must be a string", key);
    }
    return PERK_OK;
}

/* Fills dims and gives the number of bits that they hold. */
static perk_status read_shape(perk_safetensors_tensor *tensor, const json_t *shape, unsigned element_bits,
                              uint64_t *bits, perk_error *err) {
    if (!json_is_array(shape)) return perk_fail(err, PERK_BAD_FORMAT, "\"shape\" must be a list");
    size_t ndim = json_array_size(shape);
    if (ndim > PERK_SAFETENSORS_MAX_DIMS)
        return perk_fail(err, PERK_UNSUPPORTED, "%zu dimensions, more than the %d that perk reads", ndim,
                         PERK_SAFETENSORS_MAX_DIMS);
    *bits = element_bits;
    for (size_t i = 0; i < ndim; i++) {
        const json_t *dim = json_array_get(shape, i);
        if (!json_is_integer(dim) || json_integer_value(dim) < 0)
            return perk_fail(err, PERK_BAD_FORMAT, "\"shape\" must hold non-negative integers");
        tensor->dims[i] = json_integer_value(dim);
        if (__builtin_mul_overflow(*bits, (uint64_t)tensor->dims[i], bits))
            return perk_fail(err, PERK_BAD_FORMAT, "\"shape\" overflows");
    }
    tensor->ndim = (int)ndim;
    if (*bits % 8 != 0) return perk_fail(err, PERK_BAD_FORMAT, "\"shape\" ends within a byte");
    return PERK_OK;
}

static perk_status read_offsets(const json_t *offsets, uint64_t *begin, uint64_t *end, perk_error *err) {
    const json_t *first = json_array_get(offsets, 0), *second = json_array_get(offsets, 1);
    if (json_array_size(offsets) != 2 || !json_is_integer(first) || !json_is_integer(second) ||
        json_integer_value(first) < 0 || json_integer_value(second) < json_integer_value(first))
        return perk_fail(err, PERK_BAD_FORMAT, "\"data_offsets\" must be [begin, end] with 0 <= begin <= end");
    *begin = (uint64_t)json_integer_value(first);
    *end = (uint64_t)json_integer_value(second);
    return PERK_OK;
}

static perk_status read_tensor(const perk_safetensors *file, perk_safetensors_tensor *tensor, const json_t *entry,
                               perk_error *err) {
    uint64_t bits = 0, begin = 0, end = 0, available = file->size - file->data_start;
    char shape[SHAPE_TEXT];
    if (!json_is_object(entry)) return perk_fail(err, PERK_BAD_FORMAT, "must be an object");
    const char *dtype = json_string_value(json_object_get(entry, "dtype"));
    if (!dtype) return perk_fail(err, PERK_BAD_FORMAT, "\"dtype\" must be a string");
    const stored_type *type = find_stored_type(dtype);
    if (!type) return perk_fail(err, PERK_BAD_FORMAT, "dtype \"%.40s\" is unknown", dtype);
    perk_status status = read_shape(tensor, json_object_get(entry, "shape"), type->bits, &bits, err);
    if (!status) status = read_offsets(json_object_get(entry, "data_offsets"), &begin, &end, err);
    if (status) return status;
    if (end > available)
        return perk_fail(err, PERK_BAD_FORMAT,
                         "data end at byte %" PRIu64 " of %" PRIu64 "; the file is truncated: download it again", end,
                         available);
    if (end - begin != bits / 8)
        return perk_fail(err, PERK_BAD_FORMAT, "%s of shape %s takes %" PRIu64 " bytes, but data_offsets span %" PRIu64,
                         type->name, perk_shape_text(tensor->ndim, tensor->dims, shape, sizeof shape), bits / 8,
                         end - begin);
    tensor->stored = type->name;
    tensor->usable = type->usable;
    tensor->dtype = type->dtype;
    tensor->bytes = end - begin;
    tensor->offset = file->data_start + begin;
    tensor->data = file->map + tensor->offset;
    return PERK_OK;
}

static perk_status read_tensors(perk_safetensors *file, const json_t *header, int number, perk_error *err) {
    const char *name;
    json_t *entry;
    file->tensors = perk_calloc(json_object_size(header), sizeof *file->tensors);
    if (!file->tensors) return perk_fail_memory(err, "the list of tensors");
    json_object_foreach((json_t *)header, name, entry) {
        perk_status status;
        if (strcmp(name, METADATA_KEY) == 0) {
            status = check_metadata(entry, err);
            if (status) return status;
            continue;
        }
        perk_safetensors_tensor *tensor = &file->tensors[file->count];
        tensor->name = perk_strdup(name);
        if (!tensor->name) return perk_fail_memory(err, "a tensor's name");
        tensor->file = number;
        file->count++;
        status = read_tensor(file, tensor, entry, err);
        if (status) return perk_fail_prefix(err, status, "tensor \"%.200s\"", name);
    }
    return PERK_OK;
}

/* By place; an empty tensor comes before the one that begins where it lies. */
static int compare_places(const void *left, const void *right) {
    const perk_safetensors_tensor *a = left, *b = right;
    if (a->offset != b->offset) return a->offset < b->offset ? -1 : 1;
    if (a->bytes != b->bytes) return a->bytes < b->bytes ? -1 : 1;
    return strcmp(a->name, b->name);
}

/* Sorts the tensors by place and checks that they tile the data. */
static perk_status check_layout(perk_safetensors *file, perk_error *err) {
    uint64_t reached = file->data_start;
    qsort(file->tensors, file->count, sizeof *file->tensors, compare_places);
    for (size_t i = 0; i < file->count; i++) {
        const perk_safetensors_tensor *tensor = &file->tensors[i];
        if (tensor->offset < reached)
            return perk_fail(err, PERK_BAD_FORMAT, "tensors \"%.200s\" and \"%.200s\" overlap", tensor[-1].name,
                             tensor->name);
        if (tensor->offset > reached)
            return perk_fail(err, PERK_BAD_FORMAT, "%" PRIu64 " bytes before tensor \"%.200s\" belong to no tensor",
                             tensor->offset - reached, tensor->name);
        reached = tensor->offset + tensor->bytes;
    }
    if (reached != file->size)
        return perk_fail(err, PERK_BAD_FORMAT, "%" PRIu64 " bytes at the end belong to no tensor",
                         file->size - reached);
    return PERK_OK;
}

/* Nothing in the format keeps data aligned (the header may have any length), yet perk reads them as arrays. */
static perk_status copy_misaligned(perk_safetensors *file, perk_error *err) {
    for (size_t i = 0; i < file->count; i++) {
        perk_safetensors_tensor *tensor = &file->tensors[i];
        if (!tensor->usable || tensor->offset % perk_dtype_size(tensor->dtype) == 0) continue;
        void *copy = malloc(PERK_MAX((size_t)tensor->bytes, (size_t)1));
        if (!copy) return perk_fail_memory(err, "an aligned copy of a tensor");
        memcpy(copy, tensor->data, (size_t)tensor->bytes);
        tensor->data = copy;
        tensor->copied = true;
    }
    return PERK_OK;
}

perk_status perk_safetensors_open(perk_safetensors **out, const char *path, int number, perk_error *err) {
    json_t *header = NULL;
    *out = NULL;
    perk_safetensors *file = perk_calloc(1, sizeof *file);
    if (!file || !(file->path = perk_strdup(path))) {
        perk_safetensors_free(file);
        return perk_fail_memory(err, path);
    }
    perk_status status = map_file(file, err);
    if (!status) status = parse_header(file, &header, err);
    if (!status) status = read_tensors(file, header, number, err);
    if (!status) status = check_layout(file, err);
    if (!status) status = copy_misaligned(file, err);
    json_decref(header);
    if (status) {
        perk_safetensors_free(file);
        return perk_fail_prefix(err, status, "%s", path);
    }
    *out = file;
    return PERK_OK;
}

void perk_safetensors_free(perk_safetensors *file) {
    if (!file) return;
    for (size_t i = 0; i < file->count; i++) {
        free((char *)file->tensors[i].name);
        if (file->tensors[i].copied) free((void *)file->tensors[i].data);
    }
    free(file->tensors);
    if (file->map) munmap(file->map, file->size);
    free(file->path);
    free(file);
}
