#include "plan_steps.h"

#include "ops/op.h"
#include "scheduler.h"

int perk_plan_step_end(const perk_plan *plan, int counters[PERK_RECORD_WAITS]) {
    int count = 0;
    for (int i = 0; i < plan->task_count; i++)
        for (int j = plan->tasks[i].wait_begin; j < plan->tasks[i].wait_end; j++) {
            const perk_wait *wait = &plan->waits[j];
            int known = 0;
            while (known < count && counters[known] != wait->counter) known++;
            if (wait->needed != 0 || known < count) continue;
            if (count == PERK_RECORD_WAITS) return -1;
            counters[count++] = wait->counter;
        }
    return count;
}

perk_schedule_limits perk_plan_schedule_limits(const perk_plan *plan) { return perk_scheduler_limits(&plan->config); }

int32_t perk_plan_outbox_records(const perk_plan *plan) {
    perk_schedule_limits limits = perk_plan_schedule_limits(plan);
    return limits.logit_rows + limits.slots;
}

static const perk_op *find_argmax(const perk_plan *plan) {
    const perk_op *found = NULL;
    for (int i = 0; i < plan->graph->op_count; i++) {
        if (plan->graph->ops[i]->type != &perk_op_argmax) continue;
        if (found) return NULL;
        found = plan->graph->ops[i];
    }
    return found;
}

static int find_activations(const perk_plan *plan, const perk_tensor *tensor) {
    for (int i = 0; i < plan->tensor_count; i++)
        if (plan->tensors[i].graph_tensor == tensor->index && plan->tensors[i].space == PERK_SPACE_ACTIVATIONS)
            return i;
    return -1;
}

int perk_plan_picks(const perk_plan *plan) {
    const perk_op *argmax = find_argmax(plan);
    return argmax ? find_activations(plan, argmax->output) : -1;
}

int perk_plan_picked_logits(const perk_plan *plan) {
    const perk_op *argmax = find_argmax(plan);
    return argmax ? find_activations(plan, argmax->inputs[PERK_IN_X]) : -1;
}

int64_t perk_plan_vocab_size(const perk_plan *plan) {
    const perk_op *argmax = find_argmax(plan);
    return argmax ? argmax->inputs[PERK_IN_X]->cols : 0;
}

/* Of one task; of a wide linear as many as its chunks or its slices of the input, whichever are more. */
static uint64_t task_chunks(const perk_plan *plan, const perk_task *task) {
    const perk_stream *stream = &plan->stages[task->stage].stream;
    uint64_t chunks = 0, blocks = (uint64_t)PERK_MAX(stream->blocks_per_tile, 0);
    if (stream->tensor < 0) return 0;
    if (stream->together == 0) return (uint64_t)task->count * perk_ceil_div(blocks, PERK_CHUNK_BLOCKS);
    for (int first = 0; first < task->count; first += stream->together) {
        int tiles = PERK_MIN(stream->together, task->count - first), slot_blocks = PERK_WIDE_SLOT_BLOCKS(tiles);
        chunks += perk_ceil_div(blocks, (uint64_t)PERK_MIN(slot_blocks, (int)PERK_SLICE_BLOCKS));
    }
    return chunks;
}

/* Of a task of attention, at most: a unit of the cache a chunk, if one warp had all that there is of the longest items.
 */
static uint64_t kv_chunks(const perk_plan *plan, const perk_task *task) {
    uint64_t warps = (uint64_t)plan->attention_parts * PERK_CONSUMER_WARPS;
    uint64_t items = (uint64_t)task->count * perk_ceil_div((uint64_t)plan->max_attention_items, warps);
    uint64_t units = perk_ceil_div((uint64_t)plan->config.max_seq_length, PERK_KV_UNIT);
    return PERK_MAX(items * units * PERK_CONSUMER_WARPS, 1);
}

uint64_t perk_plan_chunks(const perk_plan *plan) {
    uint64_t most = 0;
    for (int w = 0; w < plan->device.worker_count; w++) {
        uint64_t chunks = 0;
        for (int i = plan->worker_begin[w]; i < plan->worker_begin[w + 1]; i++)
            chunks += plan->streams_kv && plan->stages[plan->tasks[i].stage].work == PERK_WORK_PARTIAL
                          ? kv_chunks(plan, &plan->tasks[i])
                          : task_chunks(plan, &plan->tasks[i]);
        most = PERK_MAX(most, chunks);
    }
    return most;
}

perk_status perk_plan_check_many_steps(const perk_plan *plan, perk_error *err) {
    int counters[PERK_RECORD_WAITS];
    if (perk_plan_picks(plan) < 0 || perk_plan_picked_logits(plan) < 0 || plan->graph->kv_layer_count == 0)
        return perk_fail(err, PERK_UNSUPPORTED,
                         "%s: many steps a launch need a model that picks tokens by one argmax and has a KV cache",
                         plan->graph->name);
    if (perk_plan_step_end(plan, counters) < 1)
        return perk_fail(err, PERK_UNSUPPORTED, "%s: the plan does not say when a step is over", plan->graph->name);
    return PERK_OK;
}
