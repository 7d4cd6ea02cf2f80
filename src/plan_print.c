/* The printers: two forms of telling the facts about a plan. */
#include "plan_print.h"

#include "ops/op.h"
#include "plan_facts.h"

#include <jansson.h>
#include <stdio.h>

static const char *space_name(perk_space space) {
    switch (space) {
    case PERK_SPACE_ACTIVATIONS: return "activations";
    case PERK_SPACE_KV: return "kv";
    case PERK_SPACE_CONSTANTS: return "constants";
    case PERK_SPACE_WEIGHTS: return "weights";
    case PERK_SPACE_COUNT: break;
    }
    return "unknown";
}

static const char *layout_name(perk_layout layout) {
    switch (layout) {
    case PERK_LAYOUT_ROWS: return "rows";
    case PERK_LAYOUT_TILES: return "tiles";
    case PERK_LAYOUT_PAIRED_TILES: return "paired tiles";
    case PERK_LAYOUT_WIDE_INPUT: return "slices";
    case PERK_LAYOUT_ROPE: return "rope";
    }
    return "unknown";
}

static const char *rows_name(perk_rows rows) {
    if (rows == PERK_ROWS_PAIRS) return "pairs";
    return rows == PERK_ROWS_TOKENS ? "tokens" : "logit rows";
}

/* ---- JSON ----------------------------------------------------------------------------------------------------------
 */

/* Appends to an array that may already be lost; a NULL item loses it. So only the last result needs a look. */
static void append(json_t **array, json_t *item) {
    if (*array && item && json_array_append_new(*array, item) == 0) return;
    if (!*array) json_decref(item);
    json_decref(*array);
    *array = NULL;
}

/* The inputs of an op, also those that the op holds in its parameters. */
static int op_inputs(const perk_op *op, const perk_tensor *inputs[PERK_OP_INPUTS_MAX]) {
    int count = 0;
    for (int i = 0; i < PERK_OP_INPUTS_MAX; i++)
        if (op->inputs[i]) inputs[count++] = op->inputs[i];
    return count;
}

/* The stages that do the op's work. */
static json_t *stages_of_json(const perk_plan *plan, const perk_plan_facts *facts, const perk_op *op) {
    json_t *stages = json_array();
    for (int i = 0; i < plan->stage_count; i++)
        if (perk_plan_stage_does(plan, facts, i, op)) append(&stages, json_string(plan->stages[i].name));
    return stages;
}

/* NULL: the op has none. */
static const char *activation_of(const perk_op *op) {
    return op->activation == PERK_ACTIVATION_NONE ? NULL : perk_activation_name(op->activation);
}

static json_t *ops_json(const perk_plan *plan, const perk_plan_facts *facts) {
    json_t *ops = json_array();
    for (int i = 0; i < plan->graph->op_count; i++) {
        const perk_op *op = plan->graph->ops[i];
        const perk_tensor *tensors[PERK_OP_INPUTS_MAX];
        int count = op_inputs(op, tensors);
        json_t *inputs = json_array();
        for (int j = 0; j < count; j++) append(&inputs, json_string(tensors[j]->name));
        append(&ops, json_pack("{s:s, s:s, s:s*, s:o, s:[s, I], s:s, s:b, s:o}", "name", op->output->name, "kind",
                               op->type->name, "activation", activation_of(op), "inputs", inputs, "shape",
                               rows_name(op->output->row_kind), (json_int_t)op->output->cols, "dtype",
                               perk_dtype_name(op->output->dtype), "folded", !facts->op_has_stage[i], "stages",
                               stages_of_json(plan, facts, op)));
    }
    return ops;
}

static json_t *weights_json(const perk_graph *graph) {
    json_t *weights = json_array();
    for (int i = 0; i < graph->tensor_count; i++) {
        const perk_tensor *tensor = graph->tensors[i];
        if (!perk_tensor_is_weight(tensor)) continue;
        json_t *parts = json_array();
        for (int j = 0; j < tensor->part_count; j++) append(&parts, json_string(tensor->parts[j]->name));
        append(&weights, json_pack("{s:s, s:[I, I], s:o}", "name", tensor->name, "shape", (json_int_t)tensor->rows,
                                   (json_int_t)tensor->cols, "parts", parts));
    }
    return weights;
}

static json_t *tensors_json(const perk_plan *plan) {
    json_t *tensors = json_array();
    for (int i = 0; i < plan->tensor_count; i++) {
        const perk_plan_tensor *t = &plan->tensors[i];
        append(&tensors, json_pack("{s:s, s:s, s:s, s:s, s:i, s:i, s:i, s:I, s:I}", "name", t->name, "space",
                                   space_name(t->space), "layout", layout_name(t->layout), "dtype",
                                   perk_dtype_name(t->dtype), "rows", (int)t->rows, "cols", (int)t->cols, "row_stride",
                                   (int)t->row_stride, "offset", (json_int_t)t->offset, "bytes", (json_int_t)t->bytes));
    }
    return tensors;
}

static json_t *waits_json(const perk_plan *plan, const perk_plan_facts *facts, const perk_task *task) {
    json_t *waits = json_array();
    for (int w = task ? task->wait_begin : 0; task && w < task->wait_end; w++) {
        const perk_wait *wait = &plan->waits[w];
        int stage = facts->stage_of_counter[wait->counter];
        append(&waits, json_pack("{s:s?, s:i}", "stage", stage < 0 ? NULL : plan->stages[stage].name, "needed",
                                 (int)wait->needed));
    }
    return waits;
}

static json_t *stages_json(const perk_plan *plan, const perk_plan_facts *facts) {
    json_t *stages = json_array();
    for (int i = 0; i < plan->stage_count; i++) {
        const perk_stage *stage = &plan->stages[i];
        json_t *operands = json_array();
        for (int j = 0; j < PERK_RECORD_OPERANDS; j++)
            append(&operands, stage->operands[j] < 0 ? json_null() : json_integer(stage->operands[j]));
        append(&stages, json_pack("{s:s, s:s, s:i, s:i, s:i, s:i, s:o, s:I, s:i, s:i, s:o, s:i, s:b}", "name",
                                  stage->name, "op", plan->graph->ops[stage->op]->output->name, "kind", stage->kind,
                                  "counter", stage->counter, "tasks", stage->task_count, "units", stage->unit_count,
                                  "waits", waits_json(plan, facts, facts->sample[i]), "stream_bytes",
                                  (json_int_t)facts->stage_stream[i], "stream_tiles", stage->stream.tile_count,
                                  "stream_blocks_per_tile", stage->stream.blocks_per_tile, "operands", operands,
                                  "scalar", stage->scalar, "eager", stage->eager));
    }
    return stages;
}

static json_t *tasks_json(const perk_plan *plan) {
    json_t *tasks = json_array();
    for (int i = 0; i < plan->task_count; i++) {
        const perk_task *task = &plan->tasks[i];
        append(&tasks, json_pack("{s:i, s:i, s:i, s:i, s:i, s:I}", "worker", (int)task->worker, "stage",
                                 (int)task->stage, "first", (int)task->first, "stride", (int)task->stride, "count",
                                 (int)task->count, "stream_bytes", (json_int_t)task->stream_bytes));
    }
    return tasks;
}

static json_t *config_json(const perk_config *config) {
    return json_pack("{s:i, s:i, s:i, s:i, s:i, s:i}", "max_num_batched_tokens", (int)config->max_num_batched_tokens,
                     "max_num_batched_requests", (int)config->max_num_batched_requests, "max_num_logit_rows",
                     (int)config->max_num_logit_rows, "page_size", (int)config->page_size, "max_num_pages",
                     (int)config->max_num_pages, "max_seq_length", (int)config->max_seq_length);
}

static json_t *device_json(const perk_device_desc *device) {
    return json_pack("{s:s, s:i, s:i, s:i, s:b}", "arch", device->arch, "capability", device->capability, "workers",
                     device->worker_count, "shared_memory", device->shared_memory, "portable", device->portable);
}

static json_t *shared_memory_json(const perk_plan *plan) {
    return json_pack("{s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i}", "ring_slots", plan->ring_slots, "slot_bytes",
                     (int)PERK_CHUNK_BYTES, "slices_bytes", perk_plan_input_bytes(plan), "staging_bytes",
                     plan->staging_bytes, "reduction_bytes", plan->reduction_bytes, "batch_bytes",
                     perk_plan_batch_shared_bytes(plan), "barrier_bytes", perk_plan_barrier_bytes(plan), "bytes",
                     plan->shared_bytes);
}

static json_t *spaces_json(const perk_plan_facts *facts) {
    json_t *spaces = json_object();
    for (int i = 0; i < PERK_SPACE_COUNT; i++)
        if (spaces && json_object_set_new(spaces, space_name((perk_space)i),
                                          json_integer((json_int_t)facts->space_bytes[i])) != 0) {
            json_decref(spaces);
            spaces = NULL;
        }
    return spaces;
}

static json_t *workers_json(const perk_plan_facts *facts) {
    return json_pack("{s:{s:i, s:i, s:i}, s:{s:I, s:I, s:f}}", "tasks", "min", facts->tasks_min, "median",
                     facts->tasks_median, "max", facts->tasks_max, "stream_bytes", "min", (json_int_t)facts->stream_min,
                     "max", (json_int_t)facts->stream_max, "imbalance_percent", facts->imbalance_percent);
}

static json_t *plan_json(const perk_plan *plan, const perk_plan_facts *facts, bool with_tasks) {
    json_t *kinds = json_array(), *path = json_array();
    for (int i = 0; i < plan->kind_count; i++) append(&kinds, json_string(plan->kinds[i]));
    for (int i = 0; i < facts->critical_count; i++) append(&path, json_string(plan->stages[facts->critical[i]].name));
    json_t *graph =
        json_pack("{s:s, s:i, s:o, s:o}", "name", plan->graph->name, "kv_layers", plan->graph->kv_layer_count, "ops",
                  ops_json(plan, facts), "weights", weights_json(plan->graph));
    return json_pack("{s:o, s:o, s:o, s:o, s:o, s:I, s:o, s:o, s:i, s:i, s:o, s:o, s:o, s:o*}", "graph", graph,
                     "device", device_json(&plan->device), "config", config_json(&plan->config), "shared_memory",
                     shared_memory_json(plan), "spaces", spaces_json(facts), "stream_bytes",
                     (json_int_t)facts->stream_total, "workers", workers_json(facts), "critical_path", path,
                     "task_count", plan->task_count, "counter_count", plan->counter_count, "kinds", kinds, "stages",
                     stages_json(plan, facts), "tensors", tensors_json(plan), "tasks",
                     with_tasks ? tasks_json(plan) : NULL);
}

static int append_dump(const char *data, size_t size, void *out) {
    perk_buffer_append(out, data, size);
    return 0;
}

static perk_status print_json(const perk_plan *plan, const perk_plan_facts *facts, bool with_tasks, perk_buffer *out,
                              perk_error *err) {
    json_t *json = plan_json(plan, facts, with_tasks);
    bool dumped = json && json_dump_callback(json, append_dump, out, JSON_REAL_PRECISION(10)) == 0;
    json_decref(json);
    perk_buffer_append(out, "\n", 1);
    if (dumped) return PERK_OK;
    return perk_fail(err, PERK_OUT_OF_MEMORY,
                     "the plan as JSON: out of host memory, or a tensor's name is not valid UTF-8");
}

/* ---- text: rows, of which repeated layers are folded ---------------------------------------------------------------
 */

typedef struct row {
    perk_layer_name name;
    const char *full_name;
    perk_buffer text;  /* what follows the name; names of the row's own layer are cut to their suffix */
    perk_buffer shape; /* the same with a mark in place of names of other layers: rows that agree in it are folded */
} row;

typedef struct rows {
    row *items;
    int count;
    bool failed;
} rows;

static rows make_rows(int count) {
    rows list = {.items = perk_calloc((size_t)count, sizeof(row)), .count = count};
    if (!list.items) list = (rows){.failed = true};
    return list;
}

static void free_rows(rows *list) {
    for (int i = 0; i < list->count; i++) {
        perk_buffer_free(&list->items[i].text);
        perk_buffer_free(&list->items[i].shape);
    }
    free(list->items);
}

static void row_begin(row *r, const char *name) {
    r->full_name = name;
    r->name = perk_layer_name_split(name);
}

static void row_text(row *r, const char *text) {
    perk_buffer_append(&r->text, text, strlen(text));
    perk_buffer_append(&r->shape, text, strlen(text));
}

static void row_name(row *r, const char *name) {
    perk_layer_name split = perk_layer_name_split(name);
    bool own = split.layer == r->name.layer;
    perk_buffer_printf(&r->text, "%s", own ? split.suffix : name);
    perk_buffer_printf(&r->shape, "%s", own ? split.suffix : "^");
}

/* The rows from `at` on that belong to one layer; 1 for a row of no layer. */
static int layer_length(const rows *list, int at) {
    const row *first = &list->items[at];
    int end = at + 1;
    if (first->name.layer < 0) return 1;
    while (end < list->count && list->items[end].name.layer == first->name.layer &&
           list->items[end].name.prefix_length == first->name.prefix_length &&
           !strncmp(list->items[end].full_name, first->full_name, (size_t)first->name.prefix_length))
        end++;
    return end - at;
}

static bool is_same_row(const row *a, const row *b) {
    return !strcmp(a->name.suffix, b->name.suffix) &&
           !strcmp(a->shape.data ? a->shape.data : "", b->shape.data ? b->shape.data : "");
}

/* How many layers in a row look like the one of `length` rows at `at`, itself included. */
static int count_repeats(const rows *list, int at, int length) {
    int repeats = 1;
    if (list->items[at].name.layer < 0) return 1;
    for (int next = at + length; next < list->count; next += length, repeats++) {
        if (list->items[next].name.layer != list->items[at].name.layer + repeats) break;
        if (layer_length(list, next) != length) break;
        for (int i = 0; i < length; i++)
            if (!is_same_row(&list->items[at + i], &list->items[next + i])) return repeats;
    }
    return repeats;
}

static void print_rows(rows *list, const char *what, perk_buffer *out) {
    int width = 0;
    for (int i = 0; i < list->count; i++) {
        int indent = list->items[i].name.layer < 0 ? 0 : 2;
        width = PERK_MAX(width, indent + (int)strlen(list->items[i].name.suffix));
        if (list->items[i].text.failed || list->items[i].shape.failed) list->failed = true;
    }
    for (int at = 0; at < list->count && !list->failed;) {
        int length = layer_length(list, at), repeats = count_repeats(list, at, length);
        const row *first = &list->items[at];
        int indent = first->name.layer < 0 ? 0 : 2;
        if (repeats > 1)
            perk_buffer_printf(out, "  %.*s.%ld ... %.*s.%ld: the same %s x %d, shown as of layer %ld\n",
                               first->name.prefix_length, first->full_name, first->name.layer,
                               first->name.prefix_length, first->full_name, first->name.layer + repeats - 1, what,
                               repeats, first->name.layer);
        else if (indent)
            perk_buffer_printf(out, "  %.*s.%ld:\n", first->name.prefix_length, first->full_name, first->name.layer);
        for (int i = at; i < at + length; i++)
            perk_buffer_printf(out, "  %*s%-*s  %s\n", indent, "", width - indent, list->items[i].name.suffix,
                               list->items[i].text.data ? list->items[i].text.data : "");
        at += length * repeats;
    }
}

/* ---- text: the sections --------------------------------------------------------------------------------------------
 */

typedef struct size_text {
    char text[32];
} size_text;

static size_text size_of(uint64_t bytes) {
    static const char *const units[] = {"KB", "MB", "GB", "TB"};
    size_text size;
    double value = (double)bytes / 1e3;
    size_t unit = 0;
    for (; value >= 1e3 && unit + 1 < PERK_COUNT(units); unit++) value /= 1e3;
    if (bytes < 1000)
        snprintf(size.text, sizeof size.text, "%d bytes", (int)bytes);
    else
        snprintf(size.text, sizeof size.text, "%.*f %s", value < 10 ? 2 : 1, value, units[unit]);
    return size;
}

static void print_head(const perk_plan *plan, const perk_plan_facts *facts, perk_buffer *out) {
    const perk_config *c = &plan->config;
    perk_buffer_printf(out, "%s for %s: %d workers, %d bytes of shared memory a block%s\n", plan->graph->name,
                       plan->device.arch, plan->device.worker_count, plan->device.shared_memory,
                       plan->device.portable ? ", portable" : "");
    perk_buffer_printf(out, "  step           at most %d tokens of %d requests, %d rows of logits\n",
                       c->max_num_batched_tokens, c->max_num_batched_requests, c->max_num_logit_rows);
    perk_buffer_printf(out, "  sequence       at most %d positions; %d KV pages of %d\n", c->max_seq_length,
                       c->max_num_pages, c->page_size);
    perk_buffer_printf(out, "  shared memory  ring %d x %d", plan->ring_slots, (int)PERK_CHUNK_BYTES);
    if (plan->wide_tokens > 0)
        perk_buffer_printf(out, " + slices %d x %d", plan->input_slots, plan->wide_tokens * PERK_SLICE_ROW_BYTES);
    perk_buffer_printf(out, " + staging %d + reduction %d + batch %d + barriers %d = %d bytes\n", plan->staging_bytes,
                       plan->reduction_bytes, perk_plan_batch_shared_bytes(plan), perk_plan_barrier_bytes(plan),
                       plan->shared_bytes);
    perk_buffer_printf(
        out, "  device memory  weights %s, constants %s, KV cache %s, activations %s\n",
        size_of(facts->space_bytes[PERK_SPACE_WEIGHTS]).text, size_of(facts->space_bytes[PERK_SPACE_CONSTANTS]).text,
        size_of(facts->space_bytes[PERK_SPACE_KV]).text, size_of(facts->space_bytes[PERK_SPACE_ACTIVATIONS]).text);
    bool has_experts = false;
    for (int i = 0; i < plan->stage_count; i++) has_experts |= plan->stages[i].stream.deal != PERK_DEAL_NONE;
    perk_buffer_printf(out, "  weights        %s%llu bytes streamed a step (%s); a worker %s to %s, imbalance %.1f%%\n",
                       has_experts ? "at most " : "", (unsigned long long)facts->stream_total,
                       size_of(facts->stream_total).text, size_of(facts->stream_min).text,
                       size_of(facts->stream_max).text, facts->imbalance_percent);
    perk_buffer_printf(out, "  tasks          %d; a worker %d to %d, median %d; %d counters\n", plan->task_count,
                       facts->tasks_min, facts->tasks_max, facts->tasks_median, plan->counter_count);
}

static void print_critical_path(const perk_plan *plan, const perk_plan_facts *facts, rows *list, perk_buffer *out) {
    perk_buffer_printf(out, "  critical path  %d of %d stages:", facts->critical_count, plan->stage_count);
    for (int i = 0; i < list->count; i++) row_begin(&list->items[i], plan->stages[facts->critical[i]].name);
    for (int at = 0; at < list->count;) {
        int length = layer_length(list, at), repeats = count_repeats(list, at, length);
        const row *first = &list->items[at];
        bool is_layer = first->name.layer >= 0;
        if (is_layer)
            perk_buffer_printf(out, "\n    %d x %.*s (", repeats, first->name.prefix_length, first->full_name);
        else
            perk_buffer_printf(out, at ? "\n    " : " ");
        for (int i = at; i < at + length; i++)
            perk_buffer_printf(out, "%s%s", i > at ? " " : "", list->items[i].name.suffix);
        if (is_layer) perk_buffer_printf(out, ")");
        at += length * repeats;
    }
    perk_buffer_printf(out, "\n");
}

static void print_ops(const perk_plan *plan, const perk_plan_facts *facts, rows *list, perk_buffer *out) {
    for (int i = 0; i < list->count; i++) {
        const perk_op *op = plan->graph->ops[i];
        const perk_tensor *inputs[PERK_OP_INPUTS_MAX];
        row *r = &list->items[i];
        char text[128];
        const char *activation = activation_of(op);
        int count = op_inputs(op, inputs);
        row_begin(r, op->output->name);
        snprintf(text, sizeof text, "%-11s [%s, %lld] %s%s%s%s <-", op->type->name, rows_name(op->output->row_kind),
                 (long long)op->output->cols, perk_dtype_name(op->output->dtype), activation ? ", " : "",
                 activation ? activation : "", facts->op_has_stage[i] ? "" : ", folded");
        row_text(r, text);
        for (int j = 0; j < count; j++) {
            row_text(r, j ? ", " : " ");
            row_name(r, inputs[j]->name);
            char experts[32] = "";
            if (inputs[j]->experts) snprintf(experts, sizeof experts, "%lld, ", (long long)inputs[j]->experts);
            snprintf(text, sizeof text, " [%s%lld, %lld]", experts, (long long)inputs[j]->rows,
                     (long long)inputs[j]->cols);
            if (perk_tensor_is_weight(inputs[j]) && !inputs[j]->is_vector) row_text(r, text);
        }
    }
    perk_buffer_printf(out, "\nGraph: %d ops, %d layers of KV cache\n", plan->graph->op_count,
                       plan->graph->kv_layer_count);
    print_rows(list, "ops", out);
}

static void print_stages(const perk_plan *plan, const perk_plan_facts *facts, rows *list, perk_buffer *out) {
    for (int i = 0; i < list->count; i++) {
        const perk_stage *stage = &plan->stages[i];
        const perk_task *task = facts->sample[i];
        row *r = &list->items[i];
        char text[128];
        row_begin(r, stage->name);
        snprintf(text, sizeof text, "kind %2d  %4d tasks  %6d units  %10s", stage->kind, stage->task_count,
                 stage->unit_count, facts->stage_stream[i] ? size_of(facts->stage_stream[i]).text : "-");
        row_text(r, text);
        for (int w = task ? task->wait_begin : 0; task && w < task->wait_end; w++) {
            int other = facts->stage_of_counter[plan->waits[w].counter];
            row_text(r, w > task->wait_begin ? ", " : "  after ");
            row_name(r, other < 0 ? "nothing" : plan->stages[other].name);
            if (plan->waits[w].needed <= 0) row_text(r, " of the step before");
        }
    }
    perk_buffer_printf(out, "\nPlan: %d stages (kind, tasks, units, bytes streamed, what they wait for)\n",
                       plan->stage_count);
    print_rows(list, "stages", out);
}

static perk_status print_text(const perk_plan *plan, const perk_plan_facts *facts, perk_buffer *out, perk_error *err) {
    rows path = make_rows(facts->critical_count), ops = make_rows(plan->graph->op_count);
    rows stages = make_rows(plan->stage_count);
    bool failed = path.failed || ops.failed || stages.failed;
    if (!failed) {
        print_head(plan, facts, out);
        print_critical_path(plan, facts, &path, out);
        print_ops(plan, facts, &ops, out);
        print_stages(plan, facts, &stages, out);
        perk_buffer_printf(out, "\nKinds: what a task runs\n");
        for (int i = 0; i < plan->kind_count; i++) perk_buffer_printf(out, "  %2d  %s\n", i, plan->kinds[i]);
        failed = ops.failed || stages.failed;
    }
    free_rows(&path);
    free_rows(&ops);
    free_rows(&stages);
    return failed ? perk_fail_memory(err, "the plan's print") : PERK_OK;
}

perk_status perk_plan_print(const perk_plan *plan, perk_plan_format format, perk_buffer *out, perk_error *err) {
    perk_plan_facts facts = {0};
    perk_status status = perk_plan_facts_gather(plan, &facts, err);
    if (!status && format == PERK_PLAN_TEXT) status = print_text(plan, &facts, out, err);
    if (!status && format != PERK_PLAN_TEXT)
        status = print_json(plan, &facts, format == PERK_PLAN_JSON_AND_TASKS, out, err);
    if (!status && out->failed) status = perk_fail_memory(err, "the plan's print");
    perk_plan_facts_free(&facts);
    return status;
}
