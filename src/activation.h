/* Functions that an op applies to single values: their names, and what they are in plain C. kernels_src/rows.cuh has
 * them for the GPU, under the same names. */
#ifndef PERK_SRC_ACTIVATION_H
#define PERK_SRC_ACTIVATION_H

typedef enum perk_activation { PERK_ACTIVATION_NONE, PERK_ACTIVATION_SILU, PERK_ACTIVATION_GELU_TANH } perk_activation;

/* As the enumerator of the device code is called: "gelu_tanh". */
const char *perk_activation_name(perk_activation activation);

float perk_activate(perk_activation activation, float value);

#endif
