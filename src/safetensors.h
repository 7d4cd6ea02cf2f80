/* One safetensors file: mapped read-only, its header checked in full before anything else sees it.
 *
 * The format: 8 bytes of little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the
 * data, which the tensors must tile exactly: no overlap, no hole, nothing left over.
 *
 * A file that is truncated in place while it is mapped makes the next access to the lost pages fatal (SIGBUS); sizes
 * are checked at open, later truncation cannot be. Replacing a file by rename, as downloaders do, is harmless. */
#ifndef PERK_SRC_SAFETENSORS_H
#define PERK_SRC_SAFETENSORS_H

#include "base.h"
#include "perk/dtype.h"

#define PERK_SAFETENSORS_MAX_DIMS 8
#define PERK_SAFETENSORS_MAX_HEADER ((uint64_t)100 << 20)

/* Owned by its file; immutable. */
typedef struct perk_safetensors_tensor {
    const char *name;
    const char *stored; /* the dtype as the file writes it, "BF16", "F8_E4M3", ... */
    bool usable;        /* perk computes with it: BF16, F16, F32 */
    perk_dtype dtype;   /* meaningful only where usable */
    int ndim;
    int64_t dims[PERK_SAFETENSORS_MAX_DIMS];
    const void *data; /* row-major, little-endian; aligned for its dtype where usable */
    uint64_t bytes;
    uint64_t offset; /* of the first byte, from the start of the file */
    int file;        /* the number that perk_safetensors_open was given */
    bool copied;     /* data is a private copy, not the mapping (see perk_safetensors_open) */
} perk_safetensors_tensor;

typedef struct perk_safetensors perk_safetensors;

/* Maps and checks `path`; `file` is a number for the caller's own use that every tensor repeats. Data that lie
 * misaligned for their dtype, as in files of early writers, are copied to aligned memory here: slower to open, but
 * every tensor can then be read in place as its type. Fails with PERK_NOT_FOUND, PERK_IO, PERK_BAD_FORMAT, PERK_LIMIT,
 * PERK_UNSUPPORTED (more dimensions than PERK_SAFETENSORS_MAX_DIMS). An opened file is immutable: any thread may read.
 */
perk_status perk_safetensors_open(perk_safetensors **out, const char *path, int file, perk_error *err);
void perk_safetensors_free(perk_safetensors *file);

/* Tensors in the order of their data. */
size_t perk_safetensors_count(const perk_safetensors *file);
const perk_safetensors_tensor *perk_safetensors_at(const perk_safetensors *file, size_t index);

const char *perk_safetensors_path(const perk_safetensors *file);

/* "[2, 3]" into `text`, cut where it does not fit; returns `text`. For messages. */
const char *perk_shape_text(int ndim, const int64_t *dims, char *text, size_t size);

#endif
