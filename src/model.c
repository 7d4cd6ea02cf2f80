/* From a model folder to a checkpoint and a graph. */
#include "model.h"

#include "config.h"
#include "models/decoder.h"
#include "models/models.h"
#include "ops/op.h"
#include "random_weights.h"
#include "stored_weight.h"

#include <stdio.h>
#include <sys/stat.h>

static const perk_model_family families[] = {
#define PERK_MODEL(architecture, build, weights) {architecture, build, &weights},
#include "models/models.def"
#undef PERK_MODEL
};

static perk_status fail_architecture(const char *found, perk_error *err) {
    perk_buffer known = {0};
    for (size_t i = 0; i < PERK_COUNT(families); i++)
        perk_buffer_printf(&known, "%s%s", i ? ", " : "", families[i].architecture);
    perk_fail(err, PERK_UNSUPPORTED, "config.json: architecture \"%.60s\" is not supported; perk knows %s", found,
              known.data ? known.data : "others");
    perk_buffer_free(&known);
    return PERK_UNSUPPORTED;
}

static perk_status find_family(const json_t *config, const perk_model_family **out, perk_error *err) {
    const char *name = json_string_value(json_array_get(perk_config_get(config, "architectures"), 0));
    if (!name)
        return perk_fail(err, PERK_BAD_FORMAT,
                         "config.json: \"architectures\" must be a list that begins with the model's architecture");
    for (size_t i = 0; i < PERK_COUNT(families); i++) {
        if (strcmp(families[i].architecture, name) != 0) continue;
        *out = &families[i];
        return PERK_OK;
    }
    return fail_architecture(name, err);
}

static perk_status build_graph(perk_model *model, perk_error *err) {
    const json_t *config = perk_checkpoint_config(model->checkpoint);
    const perk_model_family *family = NULL;
    int64_t vocab = 0, positions = 0;
    perk_status status = find_family(config, &family, err);
    if (!status) status = perk_config_i64(config, "vocab_size", PERK_CONFIG_REQUIRED, 1, INT32_MAX, &vocab, err);
    if (!status) status = perk_config_i64(config, "max_position_embeddings", 32768, 1, INT32_MAX, &positions, err);
    if (!status) status = perk_graph_create(&model->graph, family->architecture, err);
    if (status) return status;
    model->family = family;
    snprintf(model->architecture, sizeof model->architecture, "%s", family->architecture);
    model->vocab_size = (int32_t)vocab;
    model->max_positions = (int32_t)positions;
    family->build(model->graph, config);
    return perk_graph_check(model->graph, err);
}

static perk_status check_weights(const perk_model *model, perk_error *err) {
    for (int i = 0; i < model->graph->tensor_count; i++) {
        const perk_tensor *tensor = model->graph->tensors[i];
        const perk_checkpoint_tensor *stored;
        if (tensor->kind != PERK_TENSOR_WEIGHT) continue;
        for (int64_t expert = 0; expert < perk_weight_count(tensor); expert++) {
            perk_status status = perk_weight_require(model->checkpoint, tensor, expert, &stored, err);
            if (status) return status;
        }
    }
    return PERK_OK;
}

static perk_status read_eos(perk_model *model, perk_error *err) {
    perk_generation_defaults generation;
    perk_status status = perk_generation_defaults_read(perk_checkpoint_generation_config(model->checkpoint),
                                                       perk_checkpoint_config(model->checkpoint), &generation, err);
    if (status) return status;
    model->eos_ids = perk_calloc(generation.eos_count, sizeof *model->eos_ids);
    if (!model->eos_ids) return perk_fail_memory(err, "the model's end tokens");
    for (size_t i = 0; i < generation.eos_count; i++) model->eos_ids[i] = (int32_t)generation.eos[i];
    model->eos_count = (int)generation.eos_count;
    return PERK_OK;
}

/* The config.json of `path`, which may be the file itself. */
static char *config_path(const char *path) {
    struct stat info;
    bool folder = stat(path, &info) == 0 && S_ISDIR(info.st_mode);
    return folder ? perk_format("%s/config.json", path) : perk_strdup(path);
}

/* The graph says which weights to draw, and it is made from the config alone: so the checkpoint is opened twice. */
static perk_status open_random(perk_model *model, const char *path, uint64_t seed, perk_error *err) {
    char *config = config_path(path);
    if (!config) return perk_fail_memory(err, "a path");
    perk_checkpoint *weights = NULL;
    perk_status status = perk_checkpoint_open(&model->checkpoint, config, err);
    if (!status) status = build_graph(model, err);
    if (!status) status = perk_checkpoint_open_random(&weights, config, model->graph, seed, err);
    if (!status) {
        perk_checkpoint_free(model->checkpoint);
        model->checkpoint = weights;
    }
    free(config);
    return status;
}

static perk_status open_stored(perk_model *model, const char *path, perk_error *err) {
    perk_status status = perk_checkpoint_open(&model->checkpoint, path, err);
    if (!status) status = build_graph(model, err);
    if (!status) status = check_weights(model, err);
    return status;
}

static perk_status open_config(perk_model *model, const char *path, perk_error *err) {
    char *config = config_path(path);
    if (!config) return perk_fail_memory(err, "a path");
    perk_status status = perk_checkpoint_open(&model->checkpoint, config, err);
    if (!status) status = build_graph(model, err);
    free(config);
    return status;
}

/* Where the weights come from. */
typedef enum weights_source { WEIGHTS_STORED, WEIGHTS_RANDOM, WEIGHTS_NONE } weights_source;

static perk_status open_model(perk_model **out, const char *path, weights_source source, uint64_t seed,
                              perk_error *err) {
    *out = NULL;
    perk_model *model = perk_calloc(1, sizeof *model);
    if (!model) return perk_fail_memory(err, "a model");
    perk_status status = PERK_OK;
    switch (source) {
    case WEIGHTS_STORED: status = open_stored(model, path, err); break;
    case WEIGHTS_RANDOM: status = open_random(model, path, seed, err); break;
    case WEIGHTS_NONE: status = open_config(model, path, err); break;
    }
    if (!status) status = read_eos(model, err);
    if (status) {
        perk_model_free(model);
        return status;
    }
    *out = model;
    return PERK_OK;
}

perk_status perk_model_open(perk_model **out, const char *path, bool random_weights, uint64_t seed, perk_error *err) {
    return open_model(out, path, random_weights ? WEIGHTS_RANDOM : WEIGHTS_STORED, seed, err);
}

perk_status perk_model_describe(perk_model **out, const char *path, perk_error *err) {
    return open_model(out, path, WEIGHTS_NONE, 0, err);
}

perk_model_memory perk_model_measure(const perk_model *model, uint64_t positions) {
    perk_model_memory memory = {0};
    const perk_graph *graph = model->graph;
    for (int i = 0; i < graph->tensor_count; i++) {
        const perk_tensor *tensor = graph->tensors[i];
        if (tensor->kind == PERK_TENSOR_WEIGHT)
            memory.weights_bytes += (uint64_t)(tensor->rows * tensor->cols * perk_weight_count(tensor)) * 2;
    }
    for (int i = 0; i < graph->op_count; i++) {
        const perk_attention_params *p = &graph->ops[i]->attention;
        if (graph->ops[i]->type == &perk_op_attention)
            memory.kv_bytes += positions * (uint64_t)p->num_kv_heads * (uint64_t)p->head_dim * 2 * 2;
    }
    return memory;
}

static int compare_addresses(const void *left, const void *right) {
    uintptr_t a = (uintptr_t) * (const void *const *)left, b = (uintptr_t) * (const void *const *)right;
    return (a > b) - (a < b);
}

/* The stored tensors that the graph's weights are, sorted by address; NULL where memory lacks. The caller frees it. */
static const perk_checkpoint_tensor **list_read(const perk_model *model, size_t *count) {
    size_t all = perk_checkpoint_count(model->checkpoint);
    const perk_checkpoint_tensor **read = perk_calloc(all, sizeof *read);
    *count = 0;
    for (int i = 0; read && i < model->graph->tensor_count; i++) {
        const perk_tensor *tensor = model->graph->tensors[i];
        if (tensor->kind != PERK_TENSOR_WEIGHT) continue;
        for (int64_t expert = 0; expert < perk_weight_count(tensor) && *count < all; expert++) {
            char name[PERK_STORED_NAME];
            read[*count] = perk_checkpoint_find(model->checkpoint, perk_weight_name(tensor, expert, name));
            *count += read[*count] != NULL;
        }
    }
    if (read) qsort(read, *count, sizeof *read, compare_addresses);
    return read;
}

void perk_model_report_unread(const perk_model *model, const perk_log *log) {
    enum { NAMED = 3 };
    perk_buffer names = {0};
    size_t unread = 0, read_count;
    const perk_checkpoint_tensor **read = list_read(model, &read_count);
    for (size_t i = 0; read && i < perk_checkpoint_count(model->checkpoint); i++) {
        const perk_checkpoint_tensor *stored = perk_checkpoint_at(model->checkpoint, i);
        if (bsearch(&stored, read, read_count, sizeof *read, compare_addresses)) continue;
        if (perk_weight_may_be_left(model->family->weights, stored->name)) continue;
        if (unread++ < NAMED) perk_buffer_printf(&names, "%s%.90s", names.size ? ", " : "", stored->name);
    }
    free(read);
    if (unread)
        perk_log_write(log, PERK_LOG_WARNING,
                       "%s: %zu stored tensors are not read: %s%s; the model may compute something else than it should",
                       perk_checkpoint_folder(model->checkpoint), unread, names.data ? names.data : "",
                       unread > NAMED ? ", ..." : "");
    perk_buffer_free(&names);
}

void perk_model_free(perk_model *model) {
    if (!model) return;
    free(model->eos_ids);
    perk_graph_free(model->graph);
    perk_checkpoint_free(model->checkpoint);
    free(model);
}
