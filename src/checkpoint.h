/* A model folder in the Hugging Face layout: its configuration and its tensors by name.
 *
 *   config.json                     required, kept as parsed JSON (src/config.h reads it)
 *   generation_config.json          optional
 *   model.safetensors               the weights, or
 *   model.safetensors.index.json    {"weight_map": {tensor name: shard's file name}} with the shards beside it
 *
 * Weights stay on disk, mapped read-only. See safetensors.h for what a file truncated while it is mapped does. An
 * opened checkpoint is immutable: any number of threads may use it. Everything returned is owned by the checkpoint. */
#ifndef PERK_SRC_CHECKPOINT_H
#define PERK_SRC_CHECKPOINT_H

#include "safetensors.h"

#include <jansson.h>

typedef perk_safetensors_tensor perk_checkpoint_tensor; /* `file` is the index for perk_checkpoint_file_path */

typedef struct perk_checkpoint perk_checkpoint;

/* `path` is a model folder, or a config.json alone (whatever its name): then there are no weights, for runs with random
 * ones. Fails with PERK_NOT_FOUND (folder, config, weights or a shard missing), PERK_IO, PERK_BAD_FORMAT, PERK_LIMIT.
 */
perk_status perk_checkpoint_open(perk_checkpoint **out, const char *path, perk_error *err);
void perk_checkpoint_free(perk_checkpoint *checkpoint);

/* Opens `config_path` (a config.json; NULL: there is no configuration) with tensors that lie in memory instead of
 * files. Names and descriptions are copied; `memory`, which the tensors point into, is of mmap and belongs to the
 * checkpoint once the call succeeds. Names must differ from each other. */
perk_status perk_checkpoint_open_memory(perk_checkpoint **out, const char *config_path,
                                        const perk_checkpoint_tensor *tensors, size_t count, void *memory,
                                        size_t memory_bytes, perk_error *err);

const json_t *perk_checkpoint_config(const perk_checkpoint *checkpoint); /* a JSON object; NULL where none was given */
const json_t *perk_checkpoint_generation_config(const perk_checkpoint *checkpoint); /* NULL when the folder has none */

bool perk_checkpoint_has_weights(const perk_checkpoint *checkpoint);
uint64_t perk_checkpoint_bytes(const perk_checkpoint *checkpoint); /* of all tensors together */

/* All tensors, file by file in the order of their data: walking them reads the disk forward. */
size_t perk_checkpoint_count(const perk_checkpoint *checkpoint);
const perk_checkpoint_tensor *perk_checkpoint_at(const perk_checkpoint *checkpoint,
                                                 size_t index); /* NULL past the end */

/* NULL when there is no such tensor. Constant time. What it finds may be of a dtype that perk cannot use. */
const perk_checkpoint_tensor *perk_checkpoint_find(const perk_checkpoint *checkpoint, const char *name);

/* The tensor, which must have exactly these dimensions and a usable dtype. Fails with PERK_NOT_FOUND (and suggests the
 * nearest names), PERK_BAD_FORMAT (shape), PERK_UNSUPPORTED (dtype). */
perk_status perk_checkpoint_require(const perk_checkpoint *checkpoint, const char *name, int ndim, const int64_t *dims,
                                    const perk_checkpoint_tensor **out, perk_error *err);

const char *perk_checkpoint_folder(const perk_checkpoint *checkpoint); /* the one that holds config.json */
const char *perk_checkpoint_config_path(const perk_checkpoint *checkpoint);
size_t perk_checkpoint_file_count(const perk_checkpoint *checkpoint);
const char *perk_checkpoint_file_path(const perk_checkpoint *checkpoint, size_t index); /* NULL past the end */

/* Hints around a single pass over a tensor's data, for the loader that copies it elsewhere: start reading it from disk
 * now; drop its whole pages from this process, so that no second copy stays resident. Data remain readable after. */
void perk_checkpoint_will_read(const perk_checkpoint_tensor *tensor);
void perk_checkpoint_done_reading(const perk_checkpoint_tensor *tensor);

#endif
