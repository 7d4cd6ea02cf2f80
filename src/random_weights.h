/* Weights drawn from a seed, for measurements of shapes whose real weights are not at hand. */
#ifndef PERK_SRC_RANDOM_WEIGHTS_H
#define PERK_SRC_RANDOM_WEIGHTS_H

#include "checkpoint.h"
#include "graph.h"

/* A checkpoint of `config_path` (a config.json) with every weight that `graph` attaches, in bf16, in memory. Each value
 * depends on the seed, the tensor's name and the value's index alone: any machine draws the same. Matrices have mean 0
 * and standard deviation 1 / sqrt(cols), so that activations keep their size from layer to layer; norm weights lie
 * around 1, biases around 0, both with deviation 0.1. Uses all cores. */
perk_status perk_checkpoint_open_random(perk_checkpoint **out, const char *config_path, const perk_graph *graph,
                                        uint64_t seed, perk_error *err);

#endif
