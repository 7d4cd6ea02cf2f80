/* A plan becomes the simulator's: checked as far as computing its tasks needs it, with memory of its own. */
#include "check.h"
#include "simulator/machine.h"

/* That tasks of a stage can be computed: that its op is what its work is about. */
static perk_status check_stage(const perk_simulator *sim, const perk_stage *stage, perk_error *err) {
    static const perk_op_type *const types[][2] = {
        [PERK_WORK_GATHER] = {&perk_op_embed, &perk_op_select_rows},
        [PERK_WORK_RMSNORM] = {&perk_op_rmsnorm},
        [PERK_WORK_GATE_MUL] = {&perk_op_gate_mul},
        [PERK_WORK_ARGMAX] = {&perk_op_argmax},
        [PERK_WORK_LINEAR] = {&perk_op_linear},
        [PERK_WORK_ARRANGE] = {&perk_op_linear},
        [PERK_WORK_APPEND] = {&perk_op_attention},
        [PERK_WORK_PARTIAL] = {&perk_op_attention},
        [PERK_WORK_MERGE] = {&perk_op_attention},
        [PERK_WORK_MOE_ROUTE] = {&perk_op_moe_route},
        [PERK_WORK_MOE_LINEAR] = {&perk_op_moe_linear},
        [PERK_WORK_MOE_SUM] = {&perk_op_moe_sum},
    };
    const perk_op *op = sim->graph->ops[stage->op];
    if ((int)stage->work <= PERK_WORK_NONE || (size_t)stage->work >= PERK_COUNT(types) ||
        (op->type != types[stage->work][0] && op->type != types[stage->work][1]))
        return perk_fail(err, PERK_UNSUPPORTED, "stage %.95s: its tasks do work %d, which is none of %s", stage->name,
                         (int)stage->work, op->type->name);
    return PERK_OK;
}

/* That a step's cut of attention has room in the batch and in scratch. */
static perk_status check_attention(const perk_simulator *sim, perk_error *err) {
    const perk_plan *plan = sim->plan;
    const perk_config *c = &sim->config;
    for (int i = 0; i < sim->graph->op_count; i++) {
        const perk_op *op = sim->graph->ops[i];
        const perk_attention_params *p = &op->attention;
        if (op->type != &perk_op_attention) continue;
        uint64_t vector = (uint64_t)p->num_kv_heads * (uint64_t)p->head_dim * 2;
        uint64_t layer = (uint64_t)c->max_num_pages * (uint64_t)c->page_size * vector * 2;
        int per_tile = plan->tokens_per_query_tile, tokens = c->max_num_batched_tokens;
        bool fits = plan->attention_parts >= 1 && plan->append_slices >= 1 && plan->append_slices <= tokens &&
                    per_tile >= 1 && plan->kv_layer_bytes == layer &&
                    per_tile <= PERK_QUERY_ROWS / (p->num_heads / p->num_kv_heads) && plan->prompt_slice >= 0 &&
                    plan->max_query_tiles >= PERK_MIN(tokens, tokens / per_tile + c->max_num_batched_requests) &&
                    plan->attention_parts <= plan->device.worker_count &&
                    plan->max_attention_items >= perk_plan_attention_items(plan);
        if (!fits)
            return perk_fail(err, PERK_UNSUPPORTED, "%s: the plan's cut of attention is not that of this graph",
                             op->output->name);
    }
    return PERK_OK;
}

static perk_status check_plan(const perk_simulator *sim, perk_error *err) {
    const perk_plan *plan = sim->plan;
    const perk_config *a = &plan->config, *b = &sim->config;
    if (plan->graph != sim->graph || a->max_num_batched_tokens != b->max_num_batched_tokens ||
        a->max_num_batched_requests != b->max_num_batched_requests || a->max_num_logit_rows != b->max_num_logit_rows ||
        a->page_size != b->page_size || a->max_num_pages != b->max_num_pages || a->max_seq_length != b->max_seq_length)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "the plan is of another graph or configuration");
    perk_status status = perk_check_structure(plan, err);
    for (int i = 0; i < plan->stage_count && !status; i++) status = check_stage(sim, &plan->stages[i], err);
    if (!status) status = check_attention(sim, err);
    return status;
}

static perk_status list_kv_tensors(perk_simulator *sim, perk_error *err) {
    int layers = 0;
    for (int i = 0; i < sim->plan->tensor_count && layers < sim->graph->kv_layer_count; i++)
        if (sim->plan->tensors[i].space == PERK_SPACE_KV) sim->kv_tensors[layers++] = i;
    if (layers == sim->graph->kv_layer_count) return PERK_OK;
    return perk_fail(err, PERK_UNSUPPORTED, "the plan has %d KV tensors, the graph %d layers", layers,
                     sim->graph->kv_layer_count);
}

static void sort_by_stage(perk_simulator *sim) {
    const perk_plan *plan = sim->plan;
    int next = 0;
    for (int stage = 0; stage < plan->stage_count; stage++)
        for (int i = 0; i < plan->task_count; i++)
            if (plan->tasks[i].stage == stage) sim->by_stage[next++] = i;
}

/* As on the device, but NaN where something is to be written: zero between the width and the stride of rows. */
static void clear_memory(const perk_simulator *sim, const perk_sim_memory *memory) {
    memset(memory->bytes, 0xff, sim->bytes);
    for (int i = 0; i < sim->plan->tensor_count; i++) {
        const perk_plan_tensor *t = &sim->plan->tensors[i];
        size_t size = perk_dtype_size(t->dtype);
        if (t->space != PERK_SPACE_ACTIVATIONS || t->cols == t->row_stride) continue;
        for (int64_t row = 0; row < t->rows; row++)
            memset(memory->bytes + t->offset + (size_t)(row * t->row_stride + t->cols) * size, 0,
                   (size_t)(t->row_stride - t->cols) * size);
    }
    memset(memory->versions, 0, sim->granules * sizeof *memory->versions);
}

static perk_status allocate_memory(perk_simulator *sim, perk_error *err) {
    perk_sim_memory *memories[] = {&sim->truth, &sim->before, &sim->run};
    for (size_t i = 0; i < PERK_COUNT(memories); i++) {
        memories[i]->bytes = perk_calloc(1, sim->bytes);
        memories[i]->versions = perk_calloc(sim->granules, sizeof *memories[i]->versions);
        if (!memories[i]->bytes || !memories[i]->versions) return perk_fail_memory(err, "the simulator's memory");
    }
    return PERK_OK;
}

void perk_sim_drop_plan(perk_simulator *sim) {
    perk_sim_memory *memories[] = {&sim->truth, &sim->before, &sim->run};
    for (size_t i = 0; i < PERK_COUNT(memories); i++) {
        free(memories[i]->bytes);
        free(memories[i]->versions);
        *memories[i] = (perk_sim_memory){0};
    }
    for (int i = 0; i < sim->pending_count; i++) {
        free(sim->pendings[i].pieces);
        free(sim->pendings[i].bytes);
    }
    for (int i = 0; i < sim->step_capacity; i++) free(sim->results[i]);
    void *arrays[] = {sim->by_stage, sim->kv_tensors, sim->read_mark, sim->write_mark, sim->slot_rows,
                      sim->counters, sim->done,       sim->started,   sim->choices,    sim->ranking,
                      sim->pendings, sim->words,      sim->results};
    for (size_t i = 0; i < PERK_COUNT(arrays); i++) free(arrays[i]);
    sim->by_stage = sim->kv_tensors = sim->choices = sim->ranking = NULL;
    sim->read_mark = sim->write_mark = sim->slot_rows = sim->done = sim->words = NULL;
    sim->counters = NULL;
    sim->started = NULL;
    sim->pendings = NULL;
    sim->pending_count = 0;
    sim->results = NULL;
    sim->steps = sim->step_capacity = sim->steps_before = sim->mark = 0;
    sim->plan = NULL;
}

static perk_status allocate_plan_state(perk_simulator *sim, perk_error *err) {
    const perk_plan *plan = sim->plan;
    size_t workers = (size_t)plan->device.worker_count;
    sim->layout = perk_plan_batch_layout(plan);
    sim->activation_bytes = perk_round_up(plan->space_bytes[PERK_SPACE_ACTIVATIONS], 256);
    sim->bytes = sim->activation_bytes + plan->kv_layer_bytes * (uint64_t)sim->graph->kv_layer_count;
    sim->granules = perk_ceil_div(sim->bytes, PERK_SIM_GRANULE);
    if (sim->granules > INT32_MAX)
        return perk_fail(err, PERK_LIMIT, "%llu bytes of activations and KV pages are more than the simulator takes",
                         (unsigned long long)sim->bytes);
    sim->by_stage = perk_calloc((size_t)plan->task_count, sizeof *sim->by_stage);
    sim->kv_tensors = perk_calloc((size_t)sim->graph->kv_layer_count, sizeof *sim->kv_tensors);
    sim->read_mark = perk_calloc(sim->granules, sizeof *sim->read_mark);
    sim->write_mark = perk_calloc(sim->granules, sizeof *sim->write_mark);
    sim->slot_rows = perk_calloc((size_t)sim->config.max_num_pages * (size_t)sim->config.page_size, sizeof(int32_t));
    sim->counters = perk_calloc((size_t)plan->counter_count, sizeof *sim->counters);
    sim->done = perk_calloc(workers, sizeof *sim->done);
    sim->started = perk_calloc(workers, sizeof *sim->started);
    sim->choices = perk_calloc(workers, sizeof *sim->choices);
    sim->ranking = perk_calloc(workers, sizeof *sim->ranking);
    sim->pendings = perk_calloc(workers, sizeof *sim->pendings);
    if (sim->pendings) sim->pending_count = plan->device.worker_count;
    if (!sim->by_stage || !sim->kv_tensors || !sim->read_mark || !sim->write_mark || !sim->slot_rows ||
        !sim->counters || !sim->done || !sim->started || !sim->choices || !sim->ranking || !sim->pendings)
        return perk_fail_memory(err, "the simulator");
    return allocate_memory(sim, err);
}

perk_status perk_sim_set_plan(perk_simulator *sim, const perk_plan *plan, perk_error *err) {
    perk_sim_drop_plan(sim);
    sim->plan = plan;
    perk_status status = check_plan(sim, err);
    if (!status) status = perk_sim_load_constants(sim, err);
    if (!status) status = allocate_plan_state(sim, err);
    if (!status) status = list_kv_tensors(sim, err);
    if (status) {
        perk_sim_drop_plan(sim);
        return status;
    }
    sort_by_stage(sim);
    clear_memory(sim, &sim->truth);
    return PERK_OK;
}
