#include "activations.h"
#include "npy.h"

#include "src/engine.h"
#include "src/ops/op.h"
#include "src/plan_facts.h"

#include <errno.h>
#include <sys/stat.h>

#define INDEX_NAME "index.json"

void perk_cli_add_dump(perk_cli_options *options, perk_cli_dump *dump) {
    const perk_cli_option items[] = {
        PERK_CLI_OPTION_TEXT("dump-activations", &dump->folder, "DIR", "write what every op made (backend reference)"),
        PERK_CLI_OPTION_INT("dump-step", &dump->step, "N", "of this step; 0, the first, is the default", 0, INT32_MAX),
    };
    perk_cli_add(options, items, (int)PERK_COUNT(items));
}

/* The layer's number in "layers.7.qkv", else null. */
static json_t *layer_of(const char *name) {
    perk_layer_name parts = perk_layer_name_split(name);
    return parts.layer < 0 ? json_null() : json_integer(parts.layer);
}

static perk_status write_values(perk_executor *executor, const perk_tensor *tensor, int64_t rows, const char *path,
                                perk_error *err) {
    perk_npy npy = {0};
    float *values = perk_calloc((size_t)rows * (size_t)tensor->cols, sizeof *values);
    perk_status status = values ? PERK_OK : perk_fail_memory(err, tensor->name);
    if (!status) status = executor->type->read(executor, tensor, values, rows, err);
    if (!status) status = perk_npy_create(&npy, path, (uint64_t)rows, (uint64_t)tensor->cols, err);
    if (!status) status = perk_npy_write(&npy, values, (size_t)rows, err);
    perk_status closed = perk_npy_close(&npy, !status, status ? NULL : err);
    free(values);
    return status ? status : closed;
}

/* One tensor: its file and its line in the index. */
static perk_status dump_tensor(const perk_cli_dump *dump, perk_executor *executor, const perk_tensor *tensor,
                               const perk_batch *batch, json_t *list, perk_error *err) {
    int64_t rows = perk_executor_rows(tensor, batch);
    char *file = perk_format("%04d-%s.npy", tensor->producer->index, tensor->name);
    char *path = file ? perk_format("%s/%s", dump->folder, file) : NULL;
    perk_status status = path ? write_values(executor, tensor, rows, path, err) : perk_fail_memory(err, "a path");
    json_t *line = status
                       ? NULL
                       : json_pack("{s:s, s:s, s:s, s:o, s:[I, I], s:s}", "file", file, "name", tensor->name, "op",
                                   tensor->producer->type->name, "layer", layer_of(tensor->name), "shape",
                                   (json_int_t)rows, (json_int_t)tensor->cols, "dtype", perk_dtype_name(tensor->dtype));
    if (!status && json_array_append_new(list, line) != 0) status = perk_fail_memory(err, INDEX_NAME);
    free(path);
    free(file);
    return status;
}

static json_t *integers(const int32_t *values, int32_t count) {
    json_t *list = json_array();
    for (int32_t i = 0; i < count; i++) json_array_append_new(list, json_integer(values[i]));
    return list;
}

static perk_status write_index(const perk_cli_dump *dump, const perk_graph *graph, const perk_batch *batch,
                               json_t *list, perk_error *err) {
    json_t *index = json_pack("{s:s, s:i, s:o, s:o, s:O}", "model", graph->name, "step", (int)dump->step, "tokens",
                              integers(batch->token_ids, batch->num_tokens), "positions",
                              integers(batch->positions, batch->num_tokens), "activations", list);
    char *path = perk_format("%s/" INDEX_NAME, dump->folder);
    char *text = index ? json_dumps(index, 0) : NULL;
    perk_status status =
        path && text ? perk_cli_write_file(path, text, strlen(text), err) : perk_fail_memory(err, INDEX_NAME);
    free(text);
    free(path);
    json_decref(index);
    return status;
}

static perk_status dump_step(void *user, perk_executor *executor, const perk_graph *graph, const perk_batch *batch,
                             perk_error *err) {
    perk_cli_dump *dump = user;
    if (dump->seen++ != dump->step) return PERK_OK;
    if (mkdir(dump->folder, 0777) != 0 && errno != EEXIST)
        return perk_fail(err, PERK_IO, "%s: cannot create: %s", dump->folder, strerror(errno));
    json_t *list = json_array();
    perk_status status = list ? PERK_OK : perk_fail_memory(err, INDEX_NAME);
    for (int i = 0; !status && i < graph->tensor_count; i++)
        if (graph->tensors[i]->kind == PERK_TENSOR_ACTIVATION)
            status = dump_tensor(dump, executor, graph->tensors[i], batch, list, err);
    if (!status) status = write_index(dump, graph, batch, list, err);
    json_decref(list);
    return status;
}

perk_status perk_cli_dump_begin(perk_cli_dump *dump, perk_engine *engine, perk_error *err) {
    if (!dump->folder) return PERK_OK;
    perk_status status = perk_engine_watch(engine, dump_step, dump, err);
    return status ? perk_fail_prefix(err, status, "--dump-activations") : PERK_OK;
}

perk_status perk_cli_dump_end(const perk_cli_dump *dump, perk_error *err) {
    if (!dump->folder || dump->seen > dump->step) return PERK_OK;
    return perk_fail(err, PERK_INVALID_ARGUMENT, "--dump-step %d: there were %d steps, the first being 0", dump->step,
                     dump->seen);
}
