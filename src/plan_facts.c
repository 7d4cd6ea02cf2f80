#include "plan_facts.h"

void perk_plan_facts_free(perk_plan_facts *facts) {
    free(facts->sample);
    free(facts->stage_stream);
    free(facts->stage_of_counter);
    free(facts->op_has_stage);
    free(facts->critical);
}

static int compare_ints(const void *a, const void *b) {
    int left = *(const int *)a, right = *(const int *)b;
    return (left > right) - (left < right);
}

static perk_status count_workers(const perk_plan *plan, perk_plan_facts *facts, perk_error *err) {
    int workers = plan->device.worker_count;
    int *counts = perk_calloc((size_t)workers, sizeof *counts);
    if (!counts) return perk_fail_memory(err, "the plan's facts");
    facts->stream_min = UINT64_MAX;
    for (int w = 0; w < workers; w++) {
        uint64_t bytes = 0;
        counts[w] = plan->worker_begin[w + 1] - plan->worker_begin[w];
        for (int t = plan->worker_begin[w]; t < plan->worker_begin[w + 1]; t++) bytes += plan->tasks[t].stream_bytes;
        facts->stream_min = PERK_MIN(facts->stream_min, bytes);
        facts->stream_max = PERK_MAX(facts->stream_max, bytes);
        facts->stream_total += bytes;
    }
    qsort(counts, (size_t)workers, sizeof *counts, compare_ints);
    facts->tasks_min = counts[0];
    facts->tasks_median = counts[workers / 2];
    facts->tasks_max = counts[workers - 1];
    if (facts->stream_total > 0)
        facts->imbalance_percent = ((double)facts->stream_max * workers / (double)facts->stream_total - 1.0) * 100.0;
    free(counts);
    return PERK_OK;
}

/* Waits with needed <= 0 are for the step before: they are no part of a step's chain. */
static int stage_waited_for(const perk_plan *plan, const perk_plan_facts *facts, const perk_wait *wait) {
    bool in_step = wait->needed > 0 && wait->counter >= 0 && wait->counter < plan->counter_count;
    return in_step ? facts->stage_of_counter[wait->counter] : -1;
}

/* Stages are in topological order, so one pass finds the depth of each. */
static perk_status find_critical_path(const perk_plan *plan, perk_plan_facts *facts, perk_error *err) {
    int *depth = perk_calloc((size_t)plan->stage_count, sizeof *depth);
    int *before = perk_calloc((size_t)plan->stage_count, sizeof *before);
    int last = 0;
    if (!depth || !before) {
        free(depth);
        free(before);
        return perk_fail_memory(err, "the plan's facts");
    }
    for (int s = 0; s < plan->stage_count; s++) {
        const perk_task *task = facts->sample[s];
        depth[s] = 1;
        before[s] = -1;
        for (int w = task ? task->wait_begin : 0; task && w < task->wait_end; w++) {
            int other = stage_waited_for(plan, facts, &plan->waits[w]);
            if (other < 0 || other >= s || depth[other] < depth[s]) continue;
            depth[s] = depth[other] + 1;
            before[s] = other;
        }
        if (depth[s] > depth[last]) last = s;
    }
    facts->critical_count = plan->stage_count ? depth[last] : 0;
    for (int i = facts->critical_count - 1, s = last; i >= 0; i--, s = before[s]) facts->critical[i] = s;
    free(depth);
    free(before);
    return PERK_OK;
}

perk_status perk_plan_facts_gather(const perk_plan *plan, perk_plan_facts *facts, perk_error *err) {
    size_t stages = (size_t)plan->stage_count;
    facts->sample = perk_calloc(stages, sizeof *facts->sample);
    facts->stage_stream = perk_calloc(stages, sizeof *facts->stage_stream);
    facts->critical = perk_calloc(stages, sizeof *facts->critical);
    facts->stage_of_counter = perk_calloc((size_t)plan->counter_count, sizeof *facts->stage_of_counter);
    facts->op_has_stage = perk_calloc((size_t)plan->graph->op_count, sizeof *facts->op_has_stage);
    if (!facts->sample || !facts->stage_stream || !facts->critical || !facts->stage_of_counter || !facts->op_has_stage)
        return perk_fail_memory(err, "the plan's facts");
    for (int i = 0; i < plan->task_count; i++) {
        facts->sample[plan->tasks[i].stage] = &plan->tasks[i];
        facts->stage_stream[plan->tasks[i].stage] += plan->tasks[i].stream_bytes;
    }
    for (int i = 0; i < plan->counter_count; i++) facts->stage_of_counter[i] = -1;
    for (int i = 0; i < plan->stage_count; i++) {
        facts->stage_of_counter[plan->stages[i].counter] = i;
        facts->op_has_stage[plan->stages[i].op] = true;
    }
    memcpy(facts->space_bytes, plan->space_bytes, sizeof facts->space_bytes);
    facts->space_bytes[PERK_SPACE_KV] = plan->kv_layer_bytes * (uint64_t)plan->graph->kv_layer_count;
    perk_status status = count_workers(plan, facts, err);
    return status ? status : find_critical_path(plan, facts, err);
}

int perk_plan_barrier_bytes(const perk_plan *plan) {
    return plan->shared_bytes - plan->ring_slots * PERK_CHUNK_BYTES - plan->staging_bytes - plan->reduction_bytes -
           perk_plan_batch_shared_bytes(plan) - perk_plan_input_bytes(plan);
}

int perk_plan_input_bytes(const perk_plan *plan) {
    return plan->input_slots * plan->wide_tokens * PERK_SLICE_ROW_BYTES;
}

static bool has_operand(const perk_plan *plan, const perk_stage *stage, const perk_tensor *tensor) {
    for (int i = 0; i < PERK_RECORD_OPERANDS; i++)
        if (stage->operands[i] >= 0 && plan->tensors[stage->operands[i]].graph_tensor == tensor->index) return true;
    return false;
}

bool perk_plan_stage_does(const perk_plan *plan, const perk_plan_facts *facts, int stage, const perk_op *op) {
    const perk_op *owner = plan->graph->ops[plan->stages[stage].op];
    if (owner == op) return true;
    if (facts->op_has_stage[op->index]) return false;
    bool has_output = has_operand(plan, &plan->stages[stage], op->output);
    for (int i = 0; i < PERK_OP_INPUTS_MAX; i++) {
        if (op->inputs[i] == owner->output && has_output) return true;  /* it follows, as gate_mul does */
        if (owner->inputs[i] == op->output && !has_output) return true; /* it leads, as a norm does */
    }
    return false;
}

perk_layer_name perk_layer_name_split(const char *name) {
    for (const char *part = strchr(name, '.'); part; part = strchr(part + 1, '.')) {
        size_t digits = strspn(part + 1, "0123456789");
        if (digits > 0 && digits < 9 && part[1 + digits] == '.')
            return (perk_layer_name){(int)(part - name), strtol(part + 1, NULL, 10), part + 1 + digits};
    }
    return (perk_layer_name){0, -1, name};
}
