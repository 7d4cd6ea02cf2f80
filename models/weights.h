/* Which weights a family has and where they go, as data: one table a family. Builders find weights through it alone, a
 * checkpoint is held against it, and it says how each weight is divided among devices. */
#ifndef PERK_MODELS_WEIGHTS_H
#define PERK_MODELS_WEIGHTS_H

#include "graph.h"

/* How tensor parallelism divides a weight: nothing does yet. */
typedef enum perk_weight_split {
    PERK_SPLIT_NONE,   /* every device has all of it */
    PERK_SPLIT_COLUMN, /* by outputs, which are the rows of the stored matrix: whole heads, whole experts' widths */
    PERK_SPLIT_ROW,    /* by inputs: the devices' results are added */
} perk_weight_split;

/* Widths and counts that the config gives. */
typedef enum perk_weight_size {
    PERK_SIZE_NONE, /* the rows of a vector */
    PERK_SIZE_VOCAB,
    PERK_SIZE_HIDDEN,
    PERK_SIZE_QUERIES,      /* heads x head_dim */
    PERK_SIZE_KEYS,         /* KV heads x head_dim */
    PERK_SIZE_HEAD,         /* head_dim */
    PERK_SIZE_INTERMEDIATE, /* of the dense MLP */
    PERK_SIZE_EXPERTS,      /* how many a layer has */
    PERK_SIZE_EXPERT_WIDTH, /* of one expert's MLP */
    PERK_SIZE_COUNT,
} perk_weight_size;

/* What a model may lack, as bits. */
typedef enum perk_weight_feature {
    PERK_HAS_QKV_BIAS = 1,
    PERK_HAS_OUT_BIAS = 2,
    PERK_HAS_MLP_BIAS = 4,
    PERK_HAS_HEAD_NORMS = 8,
    PERK_HAS_OWN_HEAD = 16, /* the vocabulary projection is not the embedding table */
} perk_weight_feature;

typedef struct perk_weight_row {
    const char *target; /* in the graph; the rows of one target are stacked in their order. NULL: nothing reads it */
    const char *stored; /* in the checkpoint. In both names # stands for the layer's number, in this one * for every
                           expert's: then they are one weight */
    perk_weight_size rows, cols; /* out x in; a vector has cols alone */
    perk_weight_split split;
    unsigned needs;   /* features without which the model has no such weight */
    bool may_be_left; /* stored, but not read, it is no cause for a warning */
} perk_weight_row;

/* Rows of a table: PERK_WEIGHT_MATRIX("head", "lm_head.weight", VOCAB, HIDDEN, COLUMN, 0). */
#define PERK_WEIGHT_MATRIX(target, stored, rows, cols, split, needs)                                                   \
    { target, stored, PERK_SIZE_##rows, PERK_SIZE_##cols, PERK_SPLIT_##split, needs, false }
#define PERK_WEIGHT_VECTOR(target, stored, length, split, needs)                                                       \
    { target, stored, PERK_SIZE_NONE, PERK_SIZE_##length, PERK_SPLIT_##split, needs, false }
/* What checkpoints hold beside a model's weights. */
#define PERK_WEIGHT_LEFT(stored)                                                                                       \
    { NULL, stored, PERK_SIZE_NONE, PERK_SIZE_NONE, PERK_SPLIT_NONE, 0, true }

typedef struct perk_weight_table {
    const perk_weight_row *rows;
    size_t count;
} perk_weight_table;

/* A table, and what one model's config makes of it. */
typedef struct perk_weight_map {
    perk_graph *graph;
    const perk_weight_table *table;
    int64_t sizes[PERK_SIZE_COUNT];
    unsigned features;
} perk_weight_map;

/* Attaches the weight `target` of a layer (any number where the name has no #). NULL where the model has none, which is
 * how a layer call takes an absent bias; a target that the table does not know is a failure of the graph. */
perk_tensor *perk_weight_find(const perk_weight_map *map, const char *target, int64_t layer);

/* Whether a stored tensor is one of those that may be left unread. */
bool perk_weight_may_be_left(const perk_weight_table *table, const char *stored);

#endif
