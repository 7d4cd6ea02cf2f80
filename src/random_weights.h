/* Weights drawn from a seed, for measurements of shapes whose real weights are not at hand, and for tests. */
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

/* Values [rows][cols] for one of the graph's weights, in place of drawn ones; rounded to bf16. */
typedef struct perk_given_weight {
    const perk_tensor *tensor;
    const float *values;
} perk_given_weight;

/* The same without a configuration, and with the values of some weights given. */
perk_status perk_checkpoint_open_given(perk_checkpoint **out, const perk_graph *graph, uint64_t seed,
                                       const perk_given_weight *given, size_t given_count, perk_error *err);

/* Draws as weights are drawn: nearly normal, rounded to bf16, of the seed, the name and each value's index alone. */
void perk_random_values(const char *name, uint64_t seed, float mean, float deviation, uint16_t *out, size_t count);

#endif
