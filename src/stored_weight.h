/* Where a graph's attached weights are in a checkpoint: one stored tensor a weight, or one an expert. */
#ifndef PERK_SRC_STORED_WEIGHT_H
#define PERK_SRC_STORED_WEIGHT_H

#include "checkpoint.h"
#include "graph.h"

enum { PERK_STORED_NAME = 112 }; /* bytes that hold any name */

static inline int64_t perk_weight_count(const perk_tensor *weight) { return weight->experts ? weight->experts : 1; }

/* The name of the stored tensor: the weight's own, or made in text[PERK_STORED_NAME]. `expert` is 0 where there is one.
 */
const char *perk_weight_name(const perk_tensor *weight, int64_t expert, char *text);

/* perk_checkpoint_require with the weight's shape. */
perk_status perk_weight_require(const perk_checkpoint *checkpoint, const perk_tensor *weight, int64_t expert,
                                const perk_checkpoint_tensor **out, perk_error *err);

#endif
