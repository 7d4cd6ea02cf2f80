/* A model: a checkpoint and the graph that its family's builder made from the config. */
#ifndef PERK_SRC_MODEL_H
#define PERK_SRC_MODEL_H

#include "checkpoint.h"
#include "graph.h"

typedef struct perk_model_family perk_model_family;

typedef struct perk_model {
    perk_checkpoint *checkpoint;
    perk_graph *graph;
    const perk_model_family *family;
    char architecture[64];
    int32_t vocab_size;
    int32_t max_positions;
    int32_t *eos_ids; /* from generation_config.json, else config.json */
    int eos_count;
} perk_model;

/* What a family gives: models/<family>.c, one line in models/models.def. */
struct perk_model_family {
    const char *architecture; /* config.json "architectures"[0] */
    /* Adds the whole model to `graph` from its config; failures go into the graph. */
    void (*build)(perk_graph *graph, const json_t *config);
    const struct perk_weight_table *weights; /* models/weights.h */
};

/* Opens a folder (or a lone config.json), picks the family by its architecture string, builds the graph, and checks
 * that every attached weight is in the checkpoint with its shape. With `random_weights` the checkpoint's tensors are
 * drawn from `seed` instead: see perk_checkpoint_open_random. */
perk_status perk_model_open(perk_model **out, const char *path, bool random_weights, uint64_t seed, perk_error *err);
/* The graph alone, from the config of a folder or a lone config.json: for plans and compiling ahead of time. */
perk_status perk_model_describe(perk_model **out, const char *path, perk_error *err);
/* What a model takes on a device: all of its weights in bf16, and a KV cache of `positions` in all layers. */
typedef struct perk_model_memory {
    uint64_t weights_bytes, kv_bytes;
} perk_model_memory;
perk_model_memory perk_model_measure(const perk_model *model, uint64_t positions);

/* One warning about stored tensors that the graph does not read, unless the family's table says that they may be left:
 * a forgotten bias looks like that. */
void perk_model_report_unread(const perk_model *model, const perk_log *log);
void perk_model_free(perk_model *model);

#endif
