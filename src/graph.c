/* Building a graph: tensors by name, the sticky first failure, adding ops. */
#include "graph.h"
#include "ops/op.h"
#include "tokenizer/utf8.h"

#include <stdarg.h>
#include <stdio.h>

enum { MAX_EXPERTS = 65536 };

perk_status perk_graph_create(perk_graph **out, const char *name, perk_error *err) {
    *out = NULL;
    perk_graph *graph = perk_calloc(1, sizeof *graph);
    char *copy = perk_strdup(name ? name : "");
    if (!graph || !copy) {
        free(graph);
        free(copy);
        return perk_fail_memory(err, "the graph");
    }
    graph->name = copy;
    *out = graph;
    return PERK_OK;
}

void perk_graph_free(perk_graph *graph) {
    if (!graph) return;
    for (int i = 0; i < graph->tensor_count; i++) {
        free(graph->tensors[i]->name);
        free(graph->tensors[i]);
    }
    for (int i = 0; i < graph->op_count; i++) {
        free((void *)(uintptr_t)graph->ops[i]->attention.inv_freq);
        free(graph->ops[i]);
    }
    free(graph->tensors);
    free(graph->ops);
    free(graph->name);
    free(graph);
}

perk_status perk_graph_check(const perk_graph *graph, perk_error *err) {
    if (graph->error.status != PERK_OK && err) *err = graph->error;
    return graph->error.status;
}

void perk_graph_fail(perk_graph *graph, perk_status status, const char *format, ...) {
    if (graph->error.status != PERK_OK) return;
    graph->error.status = status;
    va_list args;
    va_start(args, format);
    vsnprintf(graph->error.message, sizeof graph->error.message, format, args);
    va_end(args);
    perk_utf8_mask(graph->error.message);
}

perk_tensor *perk_graph_find(const perk_graph *graph, const char *name) {
    for (int i = 0; i < graph->tensor_count; i++)
        if (!strcmp(graph->tensors[i]->name, name)) return graph->tensors[i];
    return NULL;
}

bool perk_graph_owns(perk_graph *graph, const char *op_name, perk_tensor *const *tensors, int count) {
    if (graph->error.status != PERK_OK) return false;
    for (int i = 0; i < count; i++) {
        if (tensors[i] && tensors[i]->graph == graph) continue;
        perk_graph_fail(graph, PERK_INVALID_ARGUMENT, "%s: input %d is %s", op_name, i,
                        tensors[i] ? "a tensor of another graph" : "NULL");
        return false;
    }
    return true;
}

static bool grow(void *list, int *capacity, int count, size_t size) {
    if (count < *capacity) return true;
    int wanted = PERK_MAX(64, *capacity * 2);
    void *bigger = perk_realloc_array(*(void **)list, (size_t)wanted, size);
    if (!bigger) return false;
    *(void **)list = bigger;
    *capacity = wanted;
    return true;
}

static bool is_frozen(perk_graph *graph, const char *name) {
    if (graph->frozen)
        perk_graph_fail(graph, PERK_INVALID_ARGUMENT, "%s: the graph is in use, nothing can be added to it any more",
                        name ? name : "NULL");
    return graph->frozen;
}

/* A new tensor under a fresh name; `shape` gives everything but the graph's own fields. */
static perk_tensor *add_tensor(perk_graph *graph, const char *name, perk_tensor shape) {
    if (graph->error.status != PERK_OK || is_frozen(graph, name)) return NULL;
    if (!name || !*name || strlen(name) > 90) {
        perk_graph_fail(graph, PERK_INVALID_ARGUMENT, "a tensor needs a name of 1 to 90 bytes");
        return NULL;
    }
    if (perk_graph_find(graph, name)) {
        perk_graph_fail(graph, PERK_INVALID_ARGUMENT, "the graph has a tensor %s already", name);
        return NULL;
    }
    if (shape.rows < 1 || shape.cols < 1 || shape.rows > INT32_MAX || shape.cols > INT32_MAX) {
        perk_graph_fail(graph, PERK_INVALID_ARGUMENT, "tensor %s: [%lld, %lld] is not a shape", name,
                        (long long)shape.rows, (long long)shape.cols);
        return NULL;
    }
    perk_tensor *tensor = perk_calloc(1, sizeof *tensor);
    char *copy = perk_strdup(name);
    if (!tensor || !copy || !grow(&graph->tensors, &graph->tensor_capacity, graph->tensor_count, sizeof tensor)) {
        free(tensor);
        free(copy);
        perk_graph_fail(graph, PERK_OUT_OF_MEMORY, "out of host memory for tensor %s", name);
        return NULL;
    }
    *tensor = shape;
    tensor->graph = graph;
    tensor->name = copy;
    tensor->index = graph->tensor_count;
    graph->tensors[graph->tensor_count++] = tensor;
    return tensor;
}

/* Attaching a weight again gives the tensor that is there: tied weights are one tensor with several readers. */
static perk_tensor *attach(perk_graph *graph, const char *name, perk_tensor shape) {
    perk_tensor *known = graph->error.status == PERK_OK && name ? perk_graph_find(graph, name) : NULL;
    if (known && known->kind == PERK_TENSOR_WEIGHT && known->rows == shape.rows && known->cols == shape.cols &&
        known->is_vector == shape.is_vector && known->experts == shape.experts)
        return known;
    shape.kind = PERK_TENSOR_WEIGHT;
    shape.dtype = PERK_BF16;
    return add_tensor(graph, name, shape);
}

perk_tensor *perk_attach_matrix(perk_graph *graph, const char *name, int64_t rows, int64_t cols) {
    return attach(graph, name, (perk_tensor){.rows = rows, .cols = cols});
}

perk_tensor *perk_attach_vector(perk_graph *graph, const char *name, int64_t length) {
    return attach(graph, name, (perk_tensor){.rows = 1, .cols = length, .is_vector = true});
}

perk_tensor *perk_attach_experts(perk_graph *graph, const char *name, int64_t count, int64_t rows, int64_t cols) {
    const char *mark = name ? strchr(name, '*') : NULL;
    if (!mark || strchr(mark + 1, '*') || count < 1 || count > MAX_EXPERTS) {
        perk_graph_fail(graph, PERK_INVALID_ARGUMENT,
                        "experts %s: needs 1 to %d of them and one * for the expert's number, found %lld",
                        name ? name : "NULL", (int)MAX_EXPERTS, (long long)count);
        return NULL;
    }
    return attach(graph, name, (perk_tensor){.rows = rows, .cols = cols, .experts = count});
}

perk_tensor *perk_stack(perk_graph *graph, const char *name, perk_tensor *const *parts, int count) {
    if (graph->error.status != PERK_OK) return NULL;
    int absent = 0;
    for (int i = 0; i < count; i++) absent += !parts[i];
    if (absent == count) return NULL;
    if (count > PERK_STACK_MAX) {
        perk_graph_fail(graph, PERK_INVALID_ARGUMENT, "stack %s: %d parts, at most %d", name, count, PERK_STACK_MAX);
        return NULL;
    }
    if (!perk_graph_owns(graph, name, parts, count)) return NULL;
    perk_tensor shape = {.kind = PERK_TENSOR_STACK,
                         .dtype = PERK_BF16,
                         .is_vector = parts[0]->is_vector,
                         .rows = parts[0]->is_vector,
                         .cols = parts[0]->is_vector ? 0 : parts[0]->cols,
                         .experts = parts[0]->experts,
                         .part_count = count};
    for (int i = 0; i < count; i++) {
        bool fits = parts[i]->kind == PERK_TENSOR_WEIGHT && parts[i]->is_vector == shape.is_vector &&
                    parts[i]->experts == shape.experts && (shape.is_vector || parts[i]->cols == shape.cols);
        if (!fits) {
            perk_graph_fail(graph, PERK_INVALID_ARGUMENT, "stack %s: the part %s does not fit the first", name,
                            parts[i]->name);
            return NULL;
        }
        if (shape.is_vector)
            shape.cols += parts[i]->cols;
        else
            shape.rows += parts[i]->rows;
        shape.parts[i] = parts[i];
    }
    return add_tensor(graph, name, shape);
}

perk_tensor *perk_input(perk_graph *graph, const char *name, int64_t width) {
    return add_tensor(
        graph, name,
        (perk_tensor){
            .kind = PERK_TENSOR_INPUT, .dtype = PERK_BF16, .row_kind = PERK_ROWS_TOKENS, .rows = 1, .cols = width});
}

void perk_keep(perk_graph *graph, perk_tensor *tensor) {
    if (perk_graph_owns(graph, "keep", &tensor, 1) && !is_frozen(graph, tensor->name)) tensor->kept = true;
}

perk_op *perk_graph_add_op(perk_graph *graph, const perk_op_type *type, perk_tensor *const *inputs, const char *name,
                           perk_dtype dtype, perk_rows rows, int64_t cols) {
    perk_op *op = perk_calloc(1, sizeof *op);
    if (!op || !grow(&graph->ops, &graph->op_capacity, graph->op_count, sizeof op)) {
        free(op);
        perk_graph_fail(graph, PERK_OUT_OF_MEMORY, "out of host memory for %s", name);
        return NULL;
    }
    op->output = add_tensor(
        graph, name,
        (perk_tensor){
            .kind = PERK_TENSOR_ACTIVATION, .dtype = dtype, .row_kind = rows, .rows = 1, .cols = cols, .producer = op});
    if (!op->output) {
        free(op);
        return NULL;
    }
    op->type = type;
    op->index = graph->op_count;
    memcpy(op->inputs, inputs, sizeof op->inputs);
    if (rows == PERK_ROWS_PAIRS) op->output->slots = inputs[0]->slots;
    graph->ops[graph->op_count++] = op;
    return op;
}

bool perk_graph_add_second(perk_graph *graph, perk_op *op, const char *name, perk_dtype dtype, int64_t cols) {
    perk_tensor shape = *op->output;
    shape.dtype = dtype;
    shape.cols = cols;
    shape.kept = false;
    op->second = add_tensor(graph, name, shape);
    return op->second != NULL;
}
