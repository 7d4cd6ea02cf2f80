#include "checkpoint.h"

#include "json.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#define CONFIG_NAME "config.json"
#define GENERATION_NAME "generation_config.json"
#define WEIGHTS_NAME "model.safetensors"
#define INDEX_NAME "model.safetensors.index.json"
#define MEMORY_NAME "(memory)" /* in messages, where there is no file */

#define MAX_CONFIG_BYTES ((size_t)16 << 20)
#define MAX_INDEX_BYTES ((size_t)100 << 20)
#define MAX_SUGGESTIONS 3
#define MAX_COMPARED_NAME 256
#define SHAPE_TEXT 256

struct perk_checkpoint {
    char *folder, *config_path;
    json_t *config, *generation;
    perk_safetensors **files;
    size_t file_count;
    const perk_checkpoint_tensor **tensors; /* borrowed from files, in reading order */
    size_t tensor_count;
    const perk_checkpoint_tensor **slots; /* open addressing by name, at most half full */
    size_t slot_count;                    /* a power of two */
    uint64_t bytes;
    bool has_weights;
    perk_checkpoint_tensor *memory_tensors; /* of perk_checkpoint_open_memory; their names are owned */
    size_t memory_tensor_count;
    void *memory;
    size_t memory_bytes;
};

/* ---- accessors ----------------------------------------------------------------------------------------------------
 */

const json_t *perk_checkpoint_config(const perk_checkpoint *checkpoint) { return checkpoint->config; }

const json_t *perk_checkpoint_generation_config(const perk_checkpoint *checkpoint) { return checkpoint->generation; }

bool perk_checkpoint_has_weights(const perk_checkpoint *checkpoint) { return checkpoint->has_weights; }

uint64_t perk_checkpoint_bytes(const perk_checkpoint *checkpoint) { return checkpoint->bytes; }

size_t perk_checkpoint_count(const perk_checkpoint *checkpoint) { return checkpoint->tensor_count; }

const perk_checkpoint_tensor *perk_checkpoint_at(const perk_checkpoint *checkpoint, size_t index) {
    return index < checkpoint->tensor_count ? checkpoint->tensors[index] : NULL;
}

const char *perk_checkpoint_folder(const perk_checkpoint *checkpoint) { return checkpoint->folder; }

const char *perk_checkpoint_config_path(const perk_checkpoint *checkpoint) { return checkpoint->config_path; }

size_t perk_checkpoint_file_count(const perk_checkpoint *checkpoint) { return checkpoint->file_count; }

const char *perk_checkpoint_file_path(const perk_checkpoint *checkpoint, size_t index) {
    return index < checkpoint->file_count ? perk_safetensors_path(checkpoint->files[index]) : NULL;
}

/* ---- tensors by name ----------------------------------------------------------------------------------------------
 */

/* The slot that holds `name`, or the empty one where it belongs. */
static size_t find_slot(const perk_checkpoint *checkpoint, const char *name) {
    size_t mask = checkpoint->slot_count - 1;
    size_t slot = (size_t)XXH3_64bits(name, strlen(name)) & mask;
    while (checkpoint->slots[slot] && strcmp(checkpoint->slots[slot]->name, name) != 0) slot = (slot + 1) & mask;
    return slot;
}

const perk_checkpoint_tensor *perk_checkpoint_find(const perk_checkpoint *checkpoint, const char *name) {
    return checkpoint->slot_count ? checkpoint->slots[find_slot(checkpoint, name)] : NULL;
}

static void add_tensor(perk_checkpoint *checkpoint, const perk_checkpoint_tensor *tensor) {
    checkpoint->slots[find_slot(checkpoint, tensor->name)] = tensor;
    checkpoint->tensors[checkpoint->tensor_count++] = tensor;
    checkpoint->bytes += tensor->bytes;
}

static perk_status make_room(perk_checkpoint *checkpoint, size_t tensor_count, perk_error *err) {
    checkpoint->slot_count = 1;
    while (checkpoint->slot_count / 2 < tensor_count) checkpoint->slot_count *= 2;
    checkpoint->slots = perk_calloc(checkpoint->slot_count, sizeof(void *));
    checkpoint->tensors = perk_calloc(tensor_count, sizeof(void *));
    return checkpoint->slots && checkpoint->tensors ? PERK_OK : perk_fail_memory(err, "the table of tensors");
}

/* Edits (insert, delete, replace) between two names, by the usual table kept to one row. */
static size_t edit_distance(const char *a, const char *b) {
    size_t row[MAX_COMPARED_NAME + 1], b_length = strlen(b);
    for (size_t j = 0; j <= b_length; j++) row[j] = j;
    for (size_t i = 1; a[i - 1]; i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= b_length; j++) {
            size_t replaced = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            row[j] = PERK_MIN(replaced, PERK_MIN(row[j], row[j - 1]) + 1);
        }
    }
    return row[b_length];
}

/* Keeps the nearest names sorted; fewer than MAX_SUGGESTIONS where little is near. */
static size_t nearest_names(const perk_checkpoint *checkpoint, const char *name, const char **nearest) {
    size_t distances[MAX_SUGGESTIONS], count = 0, length = strlen(name);
    if (length > MAX_COMPARED_NAME) return 0;
    for (size_t i = 0; i < checkpoint->tensor_count; i++) {
        const char *candidate = checkpoint->tensors[i]->name;
        if (strlen(candidate) > MAX_COMPARED_NAME) continue;
        size_t distance = edit_distance(name, candidate);
        if (distance > PERK_MAX(length / 3, (size_t)2)) continue;
        size_t place = count;
        while (place > 0 && distances[place - 1] > distance) place--;
        if (place == MAX_SUGGESTIONS) continue;
        if (count < MAX_SUGGESTIONS) count++;
        for (size_t j = count - 1; j > place; j--) {
            distances[j] = distances[j - 1];
            nearest[j] = nearest[j - 1];
        }
        distances[place] = distance;
        nearest[place] = candidate;
    }
    return count;
}

static perk_status fail_missing_tensor(const perk_checkpoint *checkpoint, const char *name, perk_error *err) {
    const char *nearest[MAX_SUGGESTIONS];
    if (!checkpoint->has_weights)
        return perk_fail(err, PERK_NOT_FOUND, "tensor \"%.200s\" is missing: %s was opened without weights", name,
                         checkpoint->config_path);
    size_t count = nearest_names(checkpoint, name, nearest);
    perk_fail(err, PERK_NOT_FOUND, "%s: tensor \"%.200s\" is missing among %zu tensors", checkpoint->folder, name,
              checkpoint->tensor_count);
    for (size_t i = 0; err && i < count; i++) {
        size_t used = strlen(err->message);
        snprintf(err->message + used, sizeof err->message - used, "%s\"%s\"", i ? ", " : "; nearest: ", nearest[i]);
    }
    return PERK_NOT_FOUND;
}

static bool same_shape(const perk_checkpoint_tensor *tensor, int ndim, const int64_t *dims) {
    return tensor->ndim == ndim && (ndim == 0 || memcmp(tensor->dims, dims, (size_t)ndim * sizeof *dims) == 0);
}

perk_status perk_checkpoint_require(const perk_checkpoint *checkpoint, const char *name, int ndim, const int64_t *dims,
                                    const perk_checkpoint_tensor **out, perk_error *err) {
    char found[SHAPE_TEXT], expected[SHAPE_TEXT];
    *out = NULL;
    const perk_checkpoint_tensor *tensor = perk_checkpoint_find(checkpoint, name);
    if (!tensor) return fail_missing_tensor(checkpoint, name, err);
    const char *path = perk_checkpoint_file_path(checkpoint, (size_t)tensor->file);
    if (!path) path = checkpoint->config_path; /* a tensor in memory */
    if (!same_shape(tensor, ndim, dims))
        return perk_fail(err, PERK_BAD_FORMAT, "%s: tensor \"%.200s\" has shape %s, but %s asks for %s", path, name,
                         perk_shape_text(tensor->ndim, tensor->dims, found, sizeof found), CONFIG_NAME,
                         perk_shape_text(ndim, dims, expected, sizeof expected));
    if (!tensor->usable)
        return perk_fail(err, PERK_UNSUPPORTED,
                         "%s: tensor \"%.200s\" is stored as %s; perk reads BF16, F16 and F32: "
                         "convert the checkpoint to one of them",
                         path, name, tensor->stored);
    *out = tensor;
    return PERK_OK;
}

/* ---- opening ------------------------------------------------------------------------------------------------------
 */

/* Only what is surely absent counts as absent: any other trouble is left to the open that follows, which reports it. */
static bool exists(const char *folder, const char *name) {
    struct stat info;
    char path[PATH_MAX];
    int length = snprintf(path, sizeof path, "%s/%s", folder, name);
    if (length < 0 || (size_t)length >= sizeof path || stat(path, &info) == 0) return true;
    return errno != ENOENT && errno != ENOTDIR;
}

static perk_status load_json(const char *path, size_t max_bytes, json_t **out, perk_error *err) {
    char *text = NULL;
    size_t size = 0;
    json_error_t where;
    *out = NULL;
    perk_status status = perk_read_file(path, max_bytes, &text, &size, err);
    if (status) return status;
    *out = json_loadb(text, size, JSON_REJECT_DUPLICATES, &where);
    free(text);
    if (!*out && perk_json_status(&where) == PERK_OUT_OF_MEMORY) return perk_fail_memory(err, path);
    if (!*out)
        return perk_fail(err, PERK_BAD_FORMAT, "%s: line %d, column %d: %s", path, where.line, where.column,
                         where.text);
    if (json_is_object(*out)) return PERK_OK;
    json_decref(*out);
    *out = NULL;
    return perk_fail(err, PERK_BAD_FORMAT, "%s: must hold a JSON object", path);
}

static perk_status load_json_in(const char *folder, const char *name, size_t max_bytes, json_t **out, perk_error *err) {
    *out = NULL;
    char *path = perk_format("%s/%s", folder, name);
    if (!path) return perk_fail_memory(err, "a path");
    perk_status status = load_json(path, max_bytes, out, err);
    free(path);
    return status;
}

static perk_status open_file(perk_checkpoint *checkpoint, const char *name, perk_error *err) {
    char *path = perk_format("%s/%s", checkpoint->folder, name);
    if (!path) return perk_fail_memory(err, "a path");
    size_t number = checkpoint->file_count;
    perk_status status = perk_safetensors_open(&checkpoint->files[number], path, (int)number, err);
    if (!status) checkpoint->file_count++;
    free(path);
    return status;
}

static perk_status open_single(perk_checkpoint *checkpoint, perk_error *err) {
    checkpoint->files = perk_calloc(1, sizeof *checkpoint->files);
    if (!checkpoint->files) return perk_fail_memory(err, "the list of weight files");
    perk_status status = open_file(checkpoint, WEIGHTS_NAME, err);
    if (status) return status;
    const perk_safetensors *file = checkpoint->files[0];
    status = make_room(checkpoint, perk_safetensors_count(file), err);
    for (size_t i = 0; !status && i < perk_safetensors_count(file); i++)
        add_tensor(checkpoint, perk_safetensors_at(file, i));
    return status;
}

static int compare_names(const void *left, const void *right) {
    return strcmp(*(const char *const *)left, *(const char *const *)right);
}

/* A shard is a plain name beside the index; anything else could reach files outside the model folder. */
static bool safe_name(const char *name) { return *name && !strchr(name, '/') && !strstr(name, ".."); }

/* The shards that the weight map names, each once, sorted; *names is the caller's to free, its texts are the map's. */
static perk_status list_shards(const json_t *weight_map, const char ***names, size_t *count, perk_error *err) {
    const char *tensor;
    json_t *shard;
    size_t used = 0, unique = 0;
    *count = 0;
    *names = perk_calloc(json_object_size(weight_map), sizeof **names);
    if (!*names) return perk_fail_memory(err, "the list of shards");
    json_object_foreach((json_t *)weight_map, tensor, shard) {
        const char *name = json_string_value(shard);
        if (!name || !safe_name(name))
            return perk_fail(err, PERK_BAD_FORMAT, "the shard of \"%.200s\" must be a file name without '/' or '..'",
                             tensor);
        (*names)[used++] = name;
    }
    qsort(*names, used, sizeof **names, compare_names);
    for (size_t i = 0; i < used; i++)
        if (i == 0 || strcmp((*names)[i], (*names)[i - 1]) != 0) (*names)[unique++] = (*names)[i];
    *count = unique;
    return PERK_OK;
}

static perk_status open_shards(perk_checkpoint *checkpoint, const char **names, size_t count, perk_error *err) {
    size_t missing = 0;
    const char *first = NULL;
    for (size_t i = 0; i < count; i++) {
        if (exists(checkpoint->folder, names[i])) continue;
        if (!first) first = names[i];
        missing++;
    }
    if (first)
        return perk_fail(err, PERK_NOT_FOUND, "%zu of %zu shards are missing, the first being %.200s; download them",
                         missing, count, first);
    checkpoint->files = perk_calloc(count, sizeof *checkpoint->files);
    if (!checkpoint->files) return perk_fail_memory(err, "the list of weight files");
    perk_status status = PERK_OK;
    for (size_t i = 0; !status && i < count; i++) status = open_file(checkpoint, names[i], err);
    return status;
}

/* Adds each tensor of the map from the shard that the map names. What a shard holds beyond its part is left out. */
static perk_status add_mapped(perk_checkpoint *checkpoint, const json_t *weight_map, const char *const *shards,
                              perk_error *err) {
    const char *name;
    json_t *shard;
    perk_status status = make_room(checkpoint, json_object_size(weight_map), err);
    if (status) return status;
    for (size_t i = 0; i < checkpoint->file_count; i++) {
        const perk_safetensors *file = checkpoint->files[i];
        for (size_t j = 0; j < perk_safetensors_count(file); j++) {
            const perk_checkpoint_tensor *tensor = perk_safetensors_at(file, j);
            const char *named = json_string_value(json_object_get(weight_map, tensor->name));
            if (named && strcmp(named, shards[i]) == 0) add_tensor(checkpoint, tensor);
        }
    }
    json_object_foreach((json_t *)weight_map, name, shard) {
        if (!perk_checkpoint_find(checkpoint, name))
            return perk_fail(err, PERK_BAD_FORMAT,
                             "tensor \"%.200s\" is not in %.200s, where the index places it; "
                             "download the model again",
                             name, json_string_value(shard));
    }
    return PERK_OK;
}

static perk_status open_sharded(perk_checkpoint *checkpoint, perk_error *err) {
    json_t *index = NULL;
    const char **shards = NULL;
    size_t count = 0;
    perk_status status = load_json_in(checkpoint->folder, INDEX_NAME, MAX_INDEX_BYTES, &index, err);
    if (status) return status;
    const json_t *weight_map = json_object_get(index, "weight_map");
    if (json_object_size(weight_map) == 0)
        status = perk_fail(err, PERK_BAD_FORMAT, "\"weight_map\" must be an object that names at least one tensor");
    if (!status) status = list_shards(weight_map, &shards, &count, err);
    if (!status) status = open_shards(checkpoint, shards, count, err);
    if (!status) status = add_mapped(checkpoint, weight_map, shards, err);
    free(shards);
    json_decref(index);
    return status ? perk_fail_prefix(err, status, "%s/%s", checkpoint->folder, INDEX_NAME) : PERK_OK;
}

static bool has_suffix(const char *text, const char *suffix) {
    size_t length = strlen(text), suffix_length = strlen(suffix);
    return length >= suffix_length && strcmp(text + length - suffix_length, suffix) == 0;
}

/* Whether the folder holds any file whose name ends so. */
static bool any_with_suffix(const char *folder, const char *suffix) {
    bool found = false;
    DIR *entries = opendir(folder);
    if (!entries) return false;
    for (struct dirent *entry; !found && (entry = readdir(entries));) found = has_suffix(entry->d_name, suffix);
    closedir(entries);
    return found;
}

static perk_status fail_no_weights(const char *folder, perk_error *err) {
    const char *hint = "download them, or give the path of config.json itself to run without";
    if (any_with_suffix(folder, ".safetensors"))
        hint = "there are .safetensors files of other names: rename the only one, or restore the index of the shards";
    else if (any_with_suffix(folder, ".bin") || any_with_suffix(folder, ".pth") || any_with_suffix(folder, ".pt"))
        hint = "there are only PyTorch pickle files, which can run code when read: convert them to safetensors";
    else if (any_with_suffix(folder, ".gguf"))
        hint = "there are only GGUF files: get the model's safetensors instead";
    return perk_fail(err, PERK_NOT_FOUND, "%s: no weights: neither %s nor %s is there; %s", folder, WEIGHTS_NAME,
                     INDEX_NAME, hint);
}

static perk_status open_folder(perk_checkpoint *checkpoint, perk_error *err) {
    const char *folder = checkpoint->folder;
    perk_status status = PERK_OK;
    if (!exists(folder, CONFIG_NAME))
        return perk_fail(err, PERK_NOT_FOUND, "%s: no %s there; is this a model folder?", folder, CONFIG_NAME);
    status = load_json(checkpoint->config_path, MAX_CONFIG_BYTES, &checkpoint->config, err);
    if (!status && exists(folder, GENERATION_NAME))
        status = load_json_in(folder, GENERATION_NAME, MAX_CONFIG_BYTES, &checkpoint->generation, err);
    if (status) return status;
    checkpoint->has_weights = true;
    if (exists(folder, WEIGHTS_NAME)) return open_single(checkpoint, err);
    if (exists(folder, INDEX_NAME)) return open_sharded(checkpoint, err);
    return fail_no_weights(folder, err);
}

/* Splits `path` into the folder and its config.json; `lone` tells whether the path was the file. */
static perk_status set_paths(perk_checkpoint *checkpoint, const char *path, bool *lone, perk_error *err) {
    struct stat info;
    if (stat(path, &info) != 0)
        return perk_fail(err, errno == ENOENT || errno == ENOTDIR ? PERK_NOT_FOUND : PERK_IO,
                         "%s: %s; give a downloaded model folder, or the path of a config.json", path, strerror(errno));
    *lone = !S_ISDIR(info.st_mode);
    size_t length = strlen(path);
    if (*lone) {
        const char *slash = strrchr(path, '/');
        checkpoint->folder = slash ? perk_format("%.*s", (int)PERK_MAX(slash - path, 1), path) : perk_strdup(".");
        checkpoint->config_path = perk_strdup(path);
    } else {
        while (length > 1 && path[length - 1] == '/') length--;
        checkpoint->folder = perk_format("%.*s", (int)length, path);
        checkpoint->config_path = perk_format("%.*s/" CONFIG_NAME, (int)length, path);
    }
    return checkpoint->folder && checkpoint->config_path ? PERK_OK : perk_fail_memory(err, "a path");
}

perk_status perk_checkpoint_open(perk_checkpoint **out, const char *path, perk_error *err) {
    bool lone = false;
    *out = NULL;
    perk_checkpoint *checkpoint = perk_calloc(1, sizeof *checkpoint);
    if (!checkpoint) return perk_fail_memory(err, "a checkpoint");
    perk_status status = set_paths(checkpoint, path, &lone, err);
    if (!status && lone) status = load_json(path, MAX_CONFIG_BYTES, &checkpoint->config, err);
    if (!status && !lone) status = open_folder(checkpoint, err);
    if (status) {
        perk_checkpoint_free(checkpoint);
        return status;
    }
    *out = checkpoint;
    return PERK_OK;
}

/* Every tensor is marked as copied: the hints below are about mapped files. */
static perk_status copy_tensors(perk_checkpoint *checkpoint, const perk_checkpoint_tensor *tensors, size_t count,
                                perk_error *err) {
    perk_status status = make_room(checkpoint, count, err);
    checkpoint->memory_tensors = perk_calloc(count, sizeof *tensors);
    if (!status && !checkpoint->memory_tensors) status = perk_fail_memory(err, "the table of tensors");
    for (size_t i = 0; !status && i < count; i++) {
        perk_checkpoint_tensor *tensor = &checkpoint->memory_tensors[i];
        *tensor = tensors[i];
        tensor->file = -1;
        tensor->copied = true;
        tensor->name = perk_strdup(tensors[i].name);
        if (!tensor->name) return perk_fail_memory(err, "a tensor's name");
        checkpoint->memory_tensor_count++;
        add_tensor(checkpoint, tensor);
    }
    return status;
}

static perk_status open_without_config(perk_checkpoint **out, perk_error *err) {
    perk_checkpoint *checkpoint = perk_calloc(1, sizeof *checkpoint);
    *out = checkpoint;
    if (!checkpoint) return perk_fail_memory(err, "a checkpoint");
    checkpoint->folder = perk_strdup(MEMORY_NAME);
    checkpoint->config_path = perk_strdup(MEMORY_NAME);
    return checkpoint->folder && checkpoint->config_path ? PERK_OK : perk_fail_memory(err, "a path");
}

perk_status perk_checkpoint_open_memory(perk_checkpoint **out, const char *config_path,
                                        const perk_checkpoint_tensor *tensors, size_t count, void *memory,
                                        size_t memory_bytes, perk_error *err) {
    perk_checkpoint *checkpoint;
    *out = NULL;
    perk_status status =
        config_path ? perk_checkpoint_open(&checkpoint, config_path, err) : open_without_config(&checkpoint, err);
    if (!status) status = copy_tensors(checkpoint, tensors, count, err);
    if (status) {
        perk_checkpoint_free(checkpoint);
        return status;
    }
    checkpoint->has_weights = true;
    checkpoint->memory = memory;
    checkpoint->memory_bytes = memory_bytes;
    *out = checkpoint;
    return PERK_OK;
}

void perk_checkpoint_free(perk_checkpoint *checkpoint) {
    if (!checkpoint) return;
    for (size_t i = 0; i < checkpoint->memory_tensor_count; i++) free((char *)checkpoint->memory_tensors[i].name);
    free(checkpoint->memory_tensors);
    if (checkpoint->memory) munmap(checkpoint->memory, checkpoint->memory_bytes);
    for (size_t i = 0; i < checkpoint->file_count; i++) perk_safetensors_free(checkpoint->files[i]);
    free(checkpoint->files);
    free(checkpoint->tensors);
    free(checkpoint->slots);
    json_decref(checkpoint->generation);
    json_decref(checkpoint->config);
    free(checkpoint->config_path);
    free(checkpoint->folder);
    free(checkpoint);
}

/* ---- reading hints ------------------------------------------------------------------------------------------------
 */

static uintptr_t page_size(void) { return (uintptr_t)sysconf(_SC_PAGESIZE); }

void perk_checkpoint_will_read(const perk_checkpoint_tensor *tensor) {
    if (tensor->copied || tensor->bytes == 0) return;
    uintptr_t page = page_size(), data = (uintptr_t)tensor->data, begin = data / page * page;
    madvise((void *)begin, data + (size_t)tensor->bytes - begin, MADV_WILLNEED);
}

void perk_checkpoint_done_reading(const perk_checkpoint_tensor *tensor) {
    if (tensor->copied) return;
    /* Pages that a neighbour shares stay: it may still be read. */
    uintptr_t page = page_size(), data = (uintptr_t)tensor->data;
    uintptr_t begin = (uintptr_t)perk_round_up(data, page), end = (data + (uintptr_t)tensor->bytes) / page * page;
    if (begin < end) madvise((void *)begin, end - begin, MADV_DONTNEED);
}
