#include "plan_shared.h"

static perk_status fail_number(const char *what, uint64_t one, uint64_t two, perk_error *err) {
    return perk_fail(err, PERK_UNSUPPORTED, "two plans cannot share their memory: %s is %llu in one, %llu in the other",
                     what, (unsigned long long)one, (unsigned long long)two);
}

static perk_status check_numbers(const perk_plan *a, const perk_plan *b, perk_error *err) {
    const struct {
        const char *what;
        uint64_t one, two;
    } numbers[] = {
        {"the number of workers", (uint64_t)a->device.worker_count, (uint64_t)b->device.worker_count},
        {"bytes of weights", a->space_bytes[PERK_SPACE_WEIGHTS], b->space_bytes[PERK_SPACE_WEIGHTS]},
        {"bytes of constants", a->space_bytes[PERK_SPACE_CONSTANTS], b->space_bytes[PERK_SPACE_CONSTANTS]},
        {"bytes of a layer's KV pages", a->kv_layer_bytes, b->kv_layer_bytes},
        {"page_size", (uint64_t)a->config.page_size, (uint64_t)b->config.page_size},
        {"max_num_pages", (uint64_t)a->config.max_num_pages, (uint64_t)b->config.max_num_pages},
        {"max_seq_length", (uint64_t)a->config.max_seq_length, (uint64_t)b->config.max_seq_length},
        {"whether a launch runs many steps", a->many_steps, b->many_steps},
        {"max_num_batched_requests", (uint64_t)(a->many_steps ? a->config.max_num_batched_requests : 0),
         (uint64_t)(b->many_steps ? b->config.max_num_batched_requests : 0)}, /* rows and slots of one schedule */
    };
    if (a->graph != b->graph)
        return perk_fail(err, PERK_UNSUPPORTED, "two plans cannot share their memory: they are of different graphs");
    for (size_t i = 0; i < PERK_COUNT(numbers); i++)
        if (numbers[i].one != numbers[i].two) return fail_number(numbers[i].what, numbers[i].one, numbers[i].two, err);
    return PERK_OK;
}

/* ---- stored tensors ---- */

/* The next one from *at on that is written at load; NULL: there is none. */
static const perk_plan_tensor *next_stored(const perk_plan *plan, int *at) {
    for (; *at < plan->tensor_count; ++*at) {
        const perk_plan_tensor *t = &plan->tensors[*at];
        if (t->space == PERK_SPACE_WEIGHTS || t->space == PERK_SPACE_CONSTANTS) return &plan->tensors[(*at)++];
    }
    return NULL;
}

static bool is_same_place(const perk_plan_tensor *a, const perk_plan_tensor *b) {
    return a->graph_tensor == b->graph_tensor && a->space == b->space && a->layout == b->layout &&
           (a->layout != PERK_LAYOUT_ROPE || a->rope_op == b->rope_op) && a->offset == b->offset &&
           a->bytes == b->bytes && a->rows == b->rows && a->cols == b->cols && a->row_stride == b->row_stride &&
           a->dtype == b->dtype;
}

static perk_status check_stored(const perk_plan *a, const perk_plan *b, perk_error *err) {
    const perk_plan_tensor *one, *two;
    int at = 0, other_at = 0;
    do {
        one = next_stored(a, &at);
        two = next_stored(b, &other_at);
        bool same = one && two ? is_same_place(one, two) : one == two;
        if (!same)
            return perk_fail(err, PERK_UNSUPPORTED,
                             "two plans cannot share their memory: where one has %s, the other has %s%s",
                             one ? one->name : "no more tensors", two ? two->name : "no more",
                             one && two && !strcmp(one->name, two->name) ? " in another place or layout" : "");
    } while (one);
    return PERK_OK;
}

/* ---- pages ---- */

/* The layer of the pages that the stages of an op use; -1: none does. */
static int layer_of(const perk_plan *plan, int op) {
    for (int i = 0; i < plan->stage_count; i++) {
        const perk_stage *stage = &plan->stages[i];
        if (stage->op == op && (stage->work == PERK_WORK_PARTIAL || stage->work == PERK_WORK_APPEND))
            return stage->scalar;
    }
    return -1;
}

static perk_status check_layers(const perk_plan *a, const perk_plan *b, perk_error *err) {
    for (int op = 0; op < a->graph->op_count; op++) {
        int one = layer_of(a, op), two = layer_of(b, op);
        if (one != two)
            return perk_fail(err, PERK_UNSUPPORTED,
                             "two plans cannot share their memory: %s uses layer %d of the KV pages in one, %d in the "
                             "other",
                             a->graph->ops[op]->output->name, one, two);
    }
    return PERK_OK;
}

perk_status perk_plan_check_shared(const perk_plan *plan, const perk_plan *other, perk_error *err) {
    perk_status status = check_numbers(plan, other, err);
    if (!status) status = check_stored(plan, other, err);
    if (!status) status = check_layers(plan, other, err);
    return status;
}
