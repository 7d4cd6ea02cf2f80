/* The plan checker: its entry, the texts of its messages, and the check of the plan's arrays. */
#include "check.h"
#include "plan_eager.h"

#include <stdio.h>

#define UNSAFE(err, ...) perk_fail(err, PERK_UNSAFE_PLAN, __VA_ARGS__)

/* Names come from the plan's fixed arrays, which need not end in a NUL. */
enum { NAME_LENGTH = sizeof((perk_stage *)0)->name - 1 };

perk_check_text perk_check_task_text(const perk_plan *plan, int task) {
    perk_check_text out;
    int worker = plan->tasks[task].worker;
    snprintf(out.text, sizeof out.text, "%.*s (worker %d, position %d)", NAME_LENGTH,
             plan->stages[plan->tasks[task].stage].name, worker, task - plan->worker_begin[worker]);
    return out;
}

perk_check_text perk_check_counter_text(const perk_plan *plan, int counter) {
    perk_check_text out;
    snprintf(out.text, sizeof out.text, "counter %d", counter);
    for (int i = 0; i < plan->stage_count; i++)
        if (plan->stages[i].counter == counter) {
            snprintf(out.text, sizeof out.text, "counter %d (%.*s)", counter, NAME_LENGTH, plan->stages[i].name);
            break;
        }
    return out;
}

perk_check_text perk_check_region_text(const perk_plan *plan, const perk_region *region) {
    perk_check_text out;
    const char *name = plan->tensors[region->tensor].name;
    int used = snprintf(out.text, sizeof out.text, "%.*s[%d:%d, %d:%d", NAME_LENGTH, name, region->row_begin,
                        region->row_end, region->col_begin, region->col_begin + region->col_count);
    if (region->repeat > 1)
        used += snprintf(out.text + used, sizeof out.text - (size_t)used, " and %d more, %d apart", region->repeat - 1,
                         region->col_stride);
    snprintf(out.text + used, sizeof out.text - (size_t)used, "]");
    return out;
}

static perk_status check_counts(const perk_plan *plan, perk_error *err) {
    int workers = plan->device.worker_count;
    if (workers < 1 || workers > PERK_CHECK_MAX_WORKERS)
        return UNSAFE(err, "the plan has %d workers; 1 to %d are possible", workers, PERK_CHECK_MAX_WORKERS);
    const struct {
        const char *what;
        int count;
        const void *array;
    } arrays[] = {
        {"tensors", plan->tensor_count, plan->tensors},   {"stages", plan->stage_count, plan->stages},
        {"kinds", plan->kind_count, plan->kinds},         {"counters", plan->counter_count, plan->counter_per_step},
        {"tasks", plan->task_count, plan->tasks},         {"waits", plan->wait_count, plan->waits},
        {"signals", plan->signal_count, plan->signals},   {"regions", plan->region_count, plan->regions},
        {"worker lists", workers + 1, plan->worker_begin}};
    for (size_t i = 0; i < PERK_COUNT(arrays); i++)
        if (arrays[i].count < 0 || arrays[i].count > PERK_CHECK_MAX_PIECES || (arrays[i].count && !arrays[i].array))
            return UNSAFE(err, "the plan's array of %s has %d entries%s", arrays[i].what, arrays[i].count,
                          arrays[i].array ? "" : " and no memory");
    return PERK_OK;
}

static perk_status check_tensor(const perk_plan *plan, int index, perk_error *err) {
    const perk_plan_tensor *t = &plan->tensors[index];
    uint64_t element = perk_dtype_size(t->dtype);
    if ((int)t->space < 0 || (int)t->space >= PERK_SPACE_COUNT)
        return UNSAFE(err, "tensor %.*s: %d is no memory space", NAME_LENGTH, t->name, (int)t->space);
    if (!element) return UNSAFE(err, "tensor %.*s: %d is no dtype", NAME_LENGTH, t->name, (int)t->dtype);
    if (plan->graph && (t->graph_tensor < -1 || t->graph_tensor >= plan->graph->tensor_count))
        return UNSAFE(err, "tensor %.*s: the graph has no tensor %d", NAME_LENGTH, t->name, t->graph_tensor);
    if (t->rows < 1 || t->cols < 1 || t->row_stride < t->cols)
        return UNSAFE(err, "tensor %.*s: %d rows of %d columns, %d elements apart, is no shape", NAME_LENGTH, t->name,
                      t->rows, t->cols, t->row_stride);
    /* rows and row_stride are below 2^31 and positive, so the product of the two is below 2^62 */
    uint64_t elements = (uint64_t)t->rows * (uint64_t)t->row_stride;
    if (elements > t->bytes / element)
        return UNSAFE(err, "tensor %.*s: %llu elements of %s do not fit in its %llu bytes", NAME_LENGTH, t->name,
                      (unsigned long long)elements, perk_dtype_name(t->dtype), (unsigned long long)t->bytes);
    uint64_t space = plan->space_bytes[t->space];
    if (t->offset % 256 || t->offset > space || t->bytes > space - t->offset)
        return UNSAFE(err, "tensor %.*s: %llu bytes at %llu are not in its space of %llu bytes, or not aligned to 256",
                      NAME_LENGTH, t->name, (unsigned long long)t->bytes, (unsigned long long)t->offset,
                      (unsigned long long)space);
    return PERK_OK;
}

/* What deals the units of a stage over experts, apart from what its tasks do: see check_routing. */
static perk_status check_routed_units(const perk_plan *plan, const perk_stage *stage, perk_error *err) {
    const perk_stream *stream = &stage->stream;
    if (stream->routing < 0 || stream->routing >= plan->tensor_count)
        return UNSAFE(err, "stage %.*s: its units are dealt by tensor %d of %d", NAME_LENGTH, stage->name,
                      stream->routing, plan->tensor_count);
    if (stream->routed.counter < 0 || stream->routed.counter >= plan->counter_count)
        return UNSAFE(err, "stage %.*s: its weights wait for counter %d of %d", NAME_LENGTH, stage->name,
                      stream->routed.counter, plan->counter_count);
    int hits = stream->deal == PERK_DEAL_TILES ? 1 : stream->most_hits;
    bool is_deal = stream->deal == PERK_DEAL_TILES || stream->deal == PERK_DEAL_UNITS;
    if (stream->own_slots &&
        (plan->config.max_num_batched_tokens != 1 || stream->own_slots != stream->most_hits ||
         plan->tensors[stream->routing].cols != stream->experts || plan->tensors[stream->routing].dtype != PERK_F32))
        return UNSAFE(err, "stage %.*s: its tasks cannot pick %d of %d experts by %.*s", NAME_LENGTH, stage->name,
                      stream->own_slots, stream->experts, NAME_LENGTH, plan->tensors[stream->routing].name);
    if (!is_deal || stream->most_hits < 1 || stream->most_hits > stream->experts ||
        stage->unit_count != (int64_t)hits * stream->tile_count)
        return UNSAFE(err, "stage %.*s: %d units are not the %d tiles of up to %d of %d experts", NAME_LENGTH,
                      stage->name, stage->unit_count, stream->tile_count, stream->most_hits, stream->experts);
    return PERK_OK;
}

static perk_status check_stream(const perk_plan *plan, const perk_stage *stage, perk_error *err) {
    const perk_stream *stream = &stage->stream;
    if (stream->together < 0 || stream->together > PERK_WIDE_TILES || (stream->together > 0 && plan->wide_tokens == 0))
        return UNSAFE(err, "stage %.*s: %d tiles cannot be streamed side by side", NAME_LENGTH, stage->name,
                      stream->together);
    if ((stream->shares > 0) != (stream->together > 0) || stream->shares < 0 || stream->share_tokens < 0 ||
        (stream->shares > 0 && (int64_t)stream->shares * stream->share_tokens < plan->config.max_num_batched_tokens))
        return UNSAFE(err, "stage %.*s: %d shares of %d tokens", NAME_LENGTH, stage->name, stream->shares,
                      stream->share_tokens);
    if (stream->tensor == -1 && stream->together == 0) return PERK_OK;
    if (stream->tensor < 0 || stream->tensor >= plan->tensor_count)
        return UNSAFE(err, "stage %.*s: it streams tensor %d of %d", NAME_LENGTH, stage->name, stream->tensor,
                      plan->tensor_count);
    const perk_plan_tensor *t = &plan->tensors[stream->tensor];
    uint64_t matrices = stream->deal == PERK_DEAL_NONE ? 1 : (uint64_t)PERK_MAX(1, stream->experts),
             blocks = t->bytes / PERK_WEIGHT_BLOCK_BYTES;
    if (t->space != PERK_SPACE_WEIGHTS || stream->tile_count < 0 || stream->blocks_per_tile < 0 ||
        blocks % matrices != 0 || (uint64_t)stream->tile_count * (uint64_t)stream->blocks_per_tile != blocks / matrices)
        return UNSAFE(err, "stage %.*s: %d tiles of %d blocks of 1 KB are not the %llu bytes of weights of %.*s",
                      NAME_LENGTH, stage->name, stream->tile_count, stream->blocks_per_tile,
                      (unsigned long long)t->bytes, NAME_LENGTH, t->name);
    if (stream->deal != PERK_DEAL_NONE) return check_routed_units(plan, stage, err);
    if ((int64_t)stream->tile_count * PERK_MAX(1, stream->shares) != stage->unit_count)
        return UNSAFE(err, "stage %.*s: it streams %d tiles for %d units: its tasks would wait for weights forever",
                      NAME_LENGTH, stage->name, stream->tile_count, stage->unit_count);
    return PERK_OK;
}

static perk_status check_stage(const perk_plan *plan, int index, perk_error *err) {
    const perk_stage *stage = &plan->stages[index];
    if (stage->kind < 0 || stage->kind >= plan->kind_count)
        return UNSAFE(err, "stage %.*s: kind %d of %d", NAME_LENGTH, stage->name, stage->kind, plan->kind_count);
    if (plan->graph && (stage->op < 0 || stage->op >= plan->graph->op_count))
        return UNSAFE(err, "stage %.*s: op %d of %d", NAME_LENGTH, stage->name, stage->op, plan->graph->op_count);
    if (stage->counter < -1 || stage->counter >= plan->counter_count)
        return UNSAFE(err, "stage %.*s: counter %d of %d", NAME_LENGTH, stage->name, stage->counter,
                      plan->counter_count);
    if (stage->unit_count < 0) return UNSAFE(err, "stage %.*s: %d units", NAME_LENGTH, stage->name, stage->unit_count);
    for (int i = 0; i < PERK_RECORD_OPERANDS; i++)
        if (stage->operands[i] < -1 || stage->operands[i] >= plan->tensor_count)
            return UNSAFE(err, "stage %.*s: operand %d is tensor %d of %d", NAME_LENGTH, stage->name, i,
                          stage->operands[i], plan->tensor_count);
    return check_stream(plan, stage, err);
}

static bool is_whole(const perk_plan *plan, const perk_region *r) {
    const perk_plan_tensor *t = &plan->tensors[r->tensor];
    return r->row_begin == 0 && r->row_end == t->rows && r->col_begin == 0 && r->repeat == 1 && r->col_count == t->cols;
}

static perk_status check_region(const perk_plan *plan, int index, perk_error *err) {
    const perk_region *r = &plan->regions[index];
    if (r->tensor < 0 || r->tensor >= plan->tensor_count)
        return UNSAFE(err, "region %d: tensor %d of %d", index, r->tensor, plan->tensor_count);
    const perk_plan_tensor *t = &plan->tensors[r->tensor];
    bool is_region = r->row_begin >= 0 && r->row_begin < r->row_end && r->col_begin >= 0 && r->col_count >= 1 &&
                     r->repeat >= 1 && (r->repeat == 1 || r->col_stride >= r->col_count);
    if (!is_region)
        return UNSAFE(err,
                      "region %d of %.*s: rows [%d, %d), %d intervals of %d columns from %d, %d apart, is empty or "
                      "overlaps itself",
                      index, NAME_LENGTH, t->name, r->row_begin, r->row_end, r->repeat, r->col_count, r->col_begin,
                      r->col_stride);
    int64_t col_end = r->col_begin + (int64_t)r->col_count + (int64_t)(r->repeat - 1) * r->col_stride * (r->repeat > 1);
    if (r->row_end > t->rows || col_end > t->cols)
        return UNSAFE(err, "region %d reaches beyond its tensor: rows up to %d and columns up to %lld of %.*s [%d, %d]",
                      index, r->row_end, (long long)col_end, NAME_LENGTH, t->name, t->rows, t->cols);
    return PERK_OK;
}

static bool is_range(int32_t begin, int32_t end, int count) { return 0 <= begin && begin <= end && end <= count; }

static perk_status check_task(const perk_plan *plan, int index, int worker, perk_error *err) {
    const perk_task *task = &plan->tasks[index];
    if (task->worker != worker)
        return UNSAFE(err, "task %d is in the list of worker %d but says worker %d", index, worker, task->worker);
    if (task->stage < 0 || task->stage >= plan->stage_count)
        return UNSAFE(err, "task %d: stage %d of %d", index, task->stage, plan->stage_count);
    if (!is_range(task->wait_begin, task->wait_end, plan->wait_count) ||
        !is_range(task->signal_begin, task->signal_end, plan->signal_count) ||
        !is_range(task->read_begin, task->read_end, plan->region_count) ||
        !is_range(task->write_begin, task->write_end, plan->region_count))
        return UNSAFE(err, "%s: its waits, signals, reads or writes are no range of the plan's arrays",
                      perk_check_task_text(plan, index).text);
    const perk_stage *stage = &plan->stages[task->stage];
    int64_t last = task->first + ((int64_t)task->count - 1) * task->stride;
    if (task->first < 0 || task->count < 1 || task->stride < (task->count > 1) || last >= stage->unit_count)
        return UNSAFE(err, "%s: units %d, step %d, %d of them, are not among the stage's %d",
                      perk_check_task_text(plan, index).text, task->first, task->stride, task->count,
                      stage->unit_count);
    if (stage->stream.shares > 1 && task->first / stage->stream.tile_count != last / stage->stream.tile_count)
        return UNSAFE(err, "%s: its tiles are for different shares of the tokens",
                      perk_check_task_text(plan, index).text);
    uint64_t blocks = stage->stream.tensor < 0 ? 0 : (uint64_t)stage->stream.blocks_per_tile * (uint64_t)task->count;
    if (stage->stream.tensor >= 0 && stage->stream.deal == PERK_DEAL_TILES) blocks *= (uint64_t)stage->stream.most_hits;
    if (task->stream_bytes != blocks * PERK_WEIGHT_BLOCK_BYTES)
        return UNSAFE(err, "%s: it consumes %llu bytes of weights, its units are %llu bytes of the stream",
                      perk_check_task_text(plan, index).text, (unsigned long long)task->stream_bytes,
                      (unsigned long long)(blocks * PERK_WEIGHT_BLOCK_BYTES));
    for (int i = task->write_begin; i < task->write_end; i++) {
        const perk_plan_tensor *t = &plan->tensors[plan->regions[i].tensor];
        const char *reason = t->space == PERK_SPACE_CONSTANTS || t->space == PERK_SPACE_WEIGHTS ? "written at load only"
                             : t->external_input                                                ? "the host's to write"
                                                                                                : NULL;
        if (reason)
            return UNSAFE(err, "%s writes %s, which is %s", perk_check_task_text(plan, index).text,
                          perk_check_region_text(plan, &plan->regions[i]).text, reason);
    }
    return PERK_OK;
}

static perk_status check_worker_lists(const perk_plan *plan, perk_error *err) {
    int workers = plan->device.worker_count;
    if (plan->worker_begin[0] != 0 || plan->worker_begin[workers] != plan->task_count)
        return UNSAFE(err, "the workers' lists hold tasks [%d, %d), the plan has %d", plan->worker_begin[0],
                      plan->worker_begin[workers], plan->task_count);
    for (int worker = 0; worker < workers; worker++)
        if (plan->worker_begin[worker] > plan->worker_begin[worker + 1])
            return UNSAFE(err, "the list of worker %d begins at task %d and ends at %d", worker,
                          plan->worker_begin[worker], plan->worker_begin[worker + 1]);
    for (int worker = 0; worker < workers; worker++)
        for (int task = plan->worker_begin[worker]; task < plan->worker_begin[worker + 1]; task++)
            if (check_task(plan, task, worker, err)) return PERK_UNSAFE_PLAN;
    return PERK_OK;
}

/* Tasks may share ranges, so the uses may be far more than the entries. */
static perk_status check_uses(const perk_plan *plan, perk_error *err) {
    int64_t uses = 0;
    for (int i = 0; i < plan->task_count; i++) {
        const perk_task *task = &plan->tasks[i];
        uses += (int64_t)(task->wait_end - task->wait_begin) + (task->signal_end - task->signal_begin) +
                (task->read_end - task->read_begin) + (task->write_end - task->write_begin);
    }
    if (uses > PERK_CHECK_MAX_PIECES)
        return perk_fail(err, PERK_LIMIT, "the plan uses waits, signals and regions %lld times; %d can be checked",
                         (long long)uses, PERK_CHECK_MAX_PIECES);
    return PERK_OK;
}

static perk_status check_sums(const perk_plan *plan, perk_error *err) {
    perk_status status = PERK_OK;
    int64_t *sums = perk_calloc((size_t)plan->counter_count, sizeof *sums);
    int *tasks = perk_calloc((size_t)plan->stage_count, sizeof *tasks);
    if (!sums || !tasks) {
        status = perk_fail_memory(err, "the plan checker");
        goto out;
    }
    for (int i = 0; i < plan->task_count; i++) {
        const perk_task *task = &plan->tasks[i];
        tasks[task->stage]++;
        for (int j = task->signal_begin; j < task->signal_end; j++)
            sums[plan->signals[j].counter] += plan->signals[j].amount;
    }
    for (int c = 0; c < plan->counter_count; c++)
        if (sums[c] != plan->counter_per_step[c]) {
            status = UNSAFE(err, "%s gets %lld in signals a step, the plan says %d: a signal is missing or superfluous",
                            perk_check_counter_text(plan, c).text, (long long)sums[c], plan->counter_per_step[c]);
            goto out;
        }
    for (int s = 0; s < plan->stage_count; s++)
        if (tasks[s] != plan->stages[s].task_count) {
            status = UNSAFE(err, "stage %.*s has %d tasks in the workers' lists, the plan says %d", NAME_LENGTH,
                            plan->stages[s].name, tasks[s], plan->stages[s].task_count);
            goto out;
        }
out:
    free(sums);
    free(tasks);
    return status;
}

/* After the sums: per_step is then what can be reached. */
static perk_status check_thresholds(const perk_plan *plan, perk_error *err) {
    for (int i = 0; i < plan->task_count; i++)
        for (int j = plan->tasks[i].wait_begin; j < plan->tasks[i].wait_end; j++) {
            const perk_wait *wait = &plan->waits[j];
            if (wait->needed > plan->counter_per_step[wait->counter])
                return UNSAFE(err, "%s waits for %d on %s, which gets only %d a step: it would wait forever",
                              perk_check_task_text(plan, i).text, wait->needed,
                              perk_check_counter_text(plan, wait->counter).text, plan->counter_per_step[wait->counter]);
        }
    return PERK_OK;
}

/* ---- stages over experts ---- */

/* The routing is there when the producers of the stage go on: one task writes it (of the logits that tasks pick by
 * themselves, some), and they wait for all that its
 * counter gets in a step, which is that task's alone. That the task comes before those of the stage, so that nobody
 * waits for ever, and that none of them is over when the next step's routing is written, follows from their reading it,
 * as everything else does: a task ends after its producer has streamed for it. */
static perk_status check_routing(const perk_plan *plan, const perk_stage *stage, perk_error *err) {
    const perk_stream *stream = &stage->stream;
    int writers = 0, signals = 0;
    for (int i = 0; i < plan->task_count; i++) {
        const perk_task *task = &plan->tasks[i];
        bool writes = false, tells = false;
        for (int j = task->write_begin; j < task->write_end; j++) writes |= plan->regions[j].tensor == stream->routing;
        for (int j = task->signal_begin; j < task->signal_end && writes; j++)
            if (plan->signals[j].counter == stream->routed.counter) {
                signals += plan->signals[j].amount;
                tells = true;
            }
        writers += writes && (tells || !stream->own_slots);
        if (writes && !tells) signals = -plan->task_count; /* nobody would know of it */
    }
    if ((writers == 1 || (writers > 1 && stream->own_slots)) && signals == stream->routed.needed &&
        signals == plan->counter_per_step[stream->routed.counter])
        return PERK_OK;
    return UNSAFE(err, "stage %.*s: its weights wait for %d on %s, which does not prove that %s %.*s", NAME_LENGTH,
                  stage->name, stream->routed.needed, perk_check_counter_text(plan, stream->routed.counter).text,
                  stream->own_slots ? "all have written" : "one task has written", NAME_LENGTH,
                  plan->tensors[stream->routing].name);
}

/* The same task stands for every n-th unit on both sides of the ring. */
static perk_status check_deal(const perk_plan *plan, int index, perk_error *err) {
    const perk_task *task = &plan->tasks[index];
    const perk_stage *stage = &plan->stages[task->stage];
    int count = (stage->unit_count - task->first + stage->task_count - 1) / stage->task_count;
    bool reads = false;
    for (int j = task->read_begin; j < task->read_end; j++)
        reads |= plan->regions[j].tensor == stage->stream.routing && is_whole(plan, &plan->regions[j]);
    bool is_nth = task->stride == stage->task_count && task->first < stage->task_count && task->count == count;
    if (reads && (is_nth || stage->stream.deal == PERK_DEAL_TILES)) return PERK_OK;
    return UNSAFE(err,
                  "%s: units %d, step %d, up to %d of them, are not every %d-th of its stage, or it does not read "
                  "%.*s, which deals them",
                  perk_check_task_text(plan, index).text, task->first, task->stride, task->count, stage->task_count,
                  NAME_LENGTH, plan->tensors[stage->stream.routing].name);
}

/* Where a stage over experts writes is data; its tasks declare shares of the tensor. So whoever else uses it must mean
 * all of it. */
static perk_status check_shares(const perk_plan *plan, const int *dealt_by, perk_error *err) {
    for (int i = 0; i < plan->task_count; i++) {
        const perk_task *task = &plan->tasks[i];
        for (int pass = 0; pass < 2; pass++)
            for (int j = pass ? task->write_begin : task->read_begin; j < (pass ? task->write_end : task->read_end);
                 j++) {
                int stage = dealt_by[plan->regions[j].tensor];
                if (stage < 0 || is_whole(plan, &plan->regions[j]) || (pass == 1 && stage == task->stage)) continue;
                return UNSAFE(err, "%s uses %s: which part of it tasks of %.*s write is known in the step alone",
                              perk_check_task_text(plan, i).text, perk_check_region_text(plan, &plan->regions[j]).text,
                              NAME_LENGTH, plan->stages[stage].name);
            }
    }
    return PERK_OK;
}

static perk_status check_experts(const perk_plan *plan, perk_error *err) {
    int *dealt_by = perk_calloc((size_t)plan->tensor_count, sizeof *dealt_by);
    perk_status status = PERK_OK;
    if (!dealt_by) return perk_fail_memory(err, "the plan checker");
    for (int i = 0; i < plan->tensor_count; i++) dealt_by[i] = -1;
    bool has_experts = false;
    for (int i = 0; i < plan->stage_count && !status; i++) {
        const perk_stream *stream = &plan->stages[i].stream;
        if (stream->tensor < 0 || stream->deal == PERK_DEAL_NONE) continue;
        has_experts = true;
        status = check_routing(plan, &plan->stages[i], err);
    }
    for (int i = 0; i < plan->task_count && has_experts && !status; i++) {
        const perk_task *task = &plan->tasks[i];
        const perk_stream *stream = &plan->stages[task->stage].stream;
        if (stream->tensor < 0 || stream->deal == PERK_DEAL_NONE) continue;
        status = check_deal(plan, i, err);
        for (int j = task->write_begin; j < task->write_end && stream->deal == PERK_DEAL_UNITS; j++)
            dealt_by[plan->regions[j].tensor] = task->stage;
    }
    if (has_experts && !status) status = check_shares(plan, dealt_by, err);
    free(dealt_by);
    return status;
}

perk_status perk_check_structure(const perk_plan *plan, perk_error *err) {
    if (check_counts(plan, err)) return PERK_UNSAFE_PLAN;
    for (int i = 0; i < plan->tensor_count; i++)
        if (check_tensor(plan, i, err)) return PERK_UNSAFE_PLAN;
    for (int i = 0; i < plan->stage_count; i++)
        if (check_stage(plan, i, err)) return PERK_UNSAFE_PLAN;
    for (int i = 0; i < plan->region_count; i++)
        if (check_region(plan, i, err)) return PERK_UNSAFE_PLAN;
    for (int i = 0; i < plan->wait_count; i++)
        if (plan->waits[i].counter < 0 || plan->waits[i].counter >= plan->counter_count)
            return UNSAFE(err, "wait %d: counter %d of %d", i, plan->waits[i].counter, plan->counter_count);
    for (int i = 0; i < plan->signal_count; i++)
        if (plan->signals[i].counter < 0 || plan->signals[i].counter >= plan->counter_count ||
            plan->signals[i].amount < 1)
            return UNSAFE(err, "signal %d: %d to counter %d of %d", i, plan->signals[i].amount,
                          plan->signals[i].counter, plan->counter_count);
    if (check_worker_lists(plan, err)) return PERK_UNSAFE_PLAN;
    perk_status status = check_uses(plan, err);
    if (!status) status = check_sums(plan, err);
    if (!status) status = check_thresholds(plan, err);
    if (!status) status = check_experts(plan, err);
    return status;
}

perk_status perk_plan_check(const perk_plan *plan, perk_error *err) {
    perk_check_memory *memory = NULL;
    perk_status status = perk_check_structure(plan, err);
    if (!status) status = perk_check_memory_create(&memory, plan, err);
    if (!status) status = perk_check_order(plan, memory, err);
    if (!status) status = perk_check_eager(plan, err);
    perk_check_memory_free(memory);
    return status;
}
