/* The builders of all model families: see models.def. */
#ifndef PERK_MODELS_MODELS_H
#define PERK_MODELS_MODELS_H

#include "model.h"

/* perk_model_family.build: adds the whole model to `graph`; failures go into the graph. */
#define PERK_MODEL(architecture, build, weights) void build(perk_graph *graph, const json_t *config);
#include "models.def"
#undef PERK_MODEL

#endif
