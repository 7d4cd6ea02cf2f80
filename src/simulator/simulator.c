/* The simulator as an executor: steps in the order of stages and in others, and what the host sees of them. */
#include "simulator/simulator.h"

#include "gpu_batch.h"
#include "simulator/machine.h"

#include <xxhash.h>

static perk_simulator *from_executor(perk_executor *self) { return (perk_simulator *)self; }
static const perk_simulator *from_const(const perk_executor *self) { return (const perk_simulator *)self; }

/* ---- plans ---- */

perk_status perk_simulator_set_plan(perk_executor *executor, const perk_plan *plan, perk_error *err) {
    return perk_sim_set_plan(from_executor(executor), plan, err);
}

const perk_plan *perk_simulator_plan(const perk_executor *executor) { return from_const(executor)->plan; }

/* ---- steps in the order of stages ---- */

static perk_status fail_idle(perk_error *err) {
    return perk_fail(err, PERK_INVALID_ARGUMENT, "the simulator has no plan, or no steps have begun");
}

static perk_status reserve_steps(perk_simulator *sim, int count, perk_error *err) {
    if (count < 1 || count > 1024 ||
        (int64_t)(sim->steps_before + sim->steps + count) * sim->plan->task_count >= INT32_MAX)
        return perk_fail(err, PERK_LIMIT, "%d steps at once, after %d others: more than the simulator can number",
                         count, sim->steps_before + sim->steps);
    size_t tasks = (size_t)count * (size_t)sim->plan->task_count;
    if (tasks > sim->trace.task_capacity) {
        void *bigger = perk_realloc_array(sim->trace.tasks, tasks, sizeof *sim->trace.tasks);
        if (!bigger) return perk_fail_memory(err, "the simulator");
        sim->trace.tasks = bigger;
        sim->trace.task_capacity = tasks;
    }
    if (count <= sim->step_capacity) return PERK_OK;
    int32_t *words = perk_realloc_array(sim->words, (size_t)count * (size_t)sim->layout.words, sizeof *words);
    if (words) sim->words = words;
    uint8_t **results = perk_realloc_array(sim->results, (size_t)count, sizeof *results);
    if (results) sim->results = results;
    if (!words || !results) return perk_fail_memory(err, "the simulator");
    for (; sim->step_capacity < count; sim->step_capacity++)
        if (!(results[sim->step_capacity] = perk_calloc(1, sim->activation_bytes)))
            return perk_fail_memory(err, "the simulator");
    return PERK_OK;
}

static perk_status check_batch(const perk_simulator *sim, const perk_batch *batch, perk_error *err) {
    const perk_config *config = &sim->config;
    if (batch->num_tokens >= 1 && batch->num_tokens <= config->max_num_batched_tokens &&
        batch->num_requests <= config->max_num_batched_requests && batch->num_logit_rows <= config->max_num_logit_rows)
        return PERK_OK;
    return perk_fail(err, PERK_INVALID_ARGUMENT,
                     "a batch of %d tokens, %d requests and %d rows of logits: must be 1 to %d, up to %d and up to %d",
                     batch->num_tokens, batch->num_requests, batch->num_logit_rows, config->max_num_batched_tokens,
                     config->max_num_batched_requests, config->max_num_logit_rows);
}

/* Which row of the step each of its tokens' KV cells has: for the regions of what later tasks read there. */
static void note_slots(perk_simulator *sim, const perk_batch *batch) {
    int page_size = sim->config.page_size;
    for (int i = 0; i < batch->num_tokens; i++) {
        int entry = batch->token_request[i] * batch->pages_per_request + batch->positions[i] / page_size;
        sim->slot_rows[batch->page_table[entry] * page_size + batch->positions[i] % page_size] = i;
    }
}

static perk_status record_task(perk_simulator *sim, int step, int index, perk_error *err) {
    perk_sim_trace *trace = &sim->trace;
    struct perk_sim_task_trace *own = &trace->tasks[(size_t)step * (size_t)sim->plan->task_count + (size_t)index];
    own->read_begin = (uint32_t)trace->reads.count;
    own->write_begin = (uint32_t)trace->writes.count;
    perk_status status = perk_sim_compute_task(sim, step, index, true, &sim->truth, &sim->pendings[0], err);
    if (status) return status;
    own->read_end = (uint32_t)trace->reads.count;
    own->write_end = (uint32_t)trace->writes.count;
    perk_sim_commit(sim, step, &sim->truth, &sim->pendings[0]);
    int32_t version = 1 + (sim->steps_before + step) * sim->plan->task_count + index;
    for (uint32_t i = own->write_begin; i < own->write_end; i++) {
        const perk_sim_span *span = &trace->writes.items[i];
        for (uint32_t g = span->begin; g < span->begin + span->count; g++) sim->truth.versions[g] = version;
    }
    return PERK_OK;
}

perk_status perk_simulator_begin(perk_executor *executor, const perk_batch *const *batches, int count,
                                 perk_error *err) {
    perk_simulator *sim = from_executor(executor);
    if (!sim->plan) return fail_idle(err);
    perk_status status = reserve_steps(sim, count, err);
    for (int step = 0; step < count && !status; step++) status = check_batch(sim, batches[step], err);
    if (status) return status;
    sim->steps_before += sim->steps;
    sim->steps = count;
    sim->trace.reads.count = sim->trace.writes.count = sim->trace.version_count = 0;
    sim->undeclared = (perk_error){0};
    memcpy(sim->before.bytes, sim->truth.bytes, sim->bytes);
    memcpy(sim->before.versions, sim->truth.versions, sim->granules * sizeof *sim->truth.versions);
    for (int step = 0; step < count && !status; step++) {
        perk_gpu_batch_write(sim->plan, &sim->layout, batches[step],
                             sim->words + (size_t)step * (size_t)sim->layout.words);
        note_slots(sim, batches[step]);
        memset(sim->results[step], 0xff, sim->activation_bytes);
        for (int i = 0; i < sim->plan->task_count && !status; i++)
            status = record_task(sim, step, sim->by_stage[i], err);
    }
    if (status) sim->steps = 0; /* what there is of the trace is of no use */
    return status;
}

perk_status perk_simulator_try(perk_executor *executor, const perk_simulator_order *order, perk_error *err) {
    perk_simulator *sim = from_executor(executor);
    return sim->steps ? perk_sim_run_order(sim, order, false, err) : fail_idle(err);
}

perk_status perk_simulator_compute(perk_executor *executor, const perk_simulator_order *order, perk_error *err) {
    perk_simulator *sim = from_executor(executor);
    return sim->steps ? perk_sim_run_order(sim, order, true, err) : fail_idle(err);
}

const perk_error *perk_simulator_undeclared(const perk_executor *executor) {
    const perk_simulator *sim = from_const(executor);
    return sim->undeclared.status ? &sim->undeclared : NULL;
}

uint64_t perk_simulator_kv_digest(const perk_executor *executor) {
    const perk_simulator *sim = from_const(executor);
    return XXH3_64bits(sim->run.bytes + sim->activation_bytes, sim->bytes - sim->activation_bytes);
}

/* ---- what the host sees ---- */

static perk_status find_place(const perk_simulator *sim, const perk_tensor *tensor, int64_t rows,
                              const perk_plan_tensor **out, perk_error *err) {
    if (!sim->plan) return fail_idle(err);
    *out = NULL;
    for (int i = 0; i < sim->plan->tensor_count && !*out; i++)
        if (sim->plan->tensors[i].graph_tensor == tensor->index &&
            sim->plan->tensors[i].space == PERK_SPACE_ACTIVATIONS)
            *out = &sim->plan->tensors[i];
    if (!*out || tensor->graph != sim->graph)
        return perk_fail(err, PERK_NOT_FOUND, "%s has no memory of its own in the plan; keep it (perk_keep)",
                         tensor->name);
    if (rows >= 0 && rows <= (*out)->rows) return PERK_OK;
    return perk_fail(err, PERK_INVALID_ARGUMENT, "%s has %d rows, not %lld", tensor->name, (*out)->rows,
                     (long long)rows);
}

static float element_at(const perk_plan_tensor *t, const uint8_t *bytes, int64_t row, int64_t col) {
    const uint8_t *at = bytes + t->offset + (size_t)(row * t->row_stride + col) * perk_dtype_size(t->dtype);
    int32_t integer;
    float number;
    uint16_t half;
    memcpy(&half, at, sizeof half);
    if (t->dtype == PERK_BF16) return perk_bf16_to_f32(half);
    memcpy(&integer, at, sizeof integer);
    memcpy(&number, at, sizeof number);
    return t->dtype == PERK_F32 ? number : (float)integer;
}

perk_status perk_simulator_read(const perk_executor *executor, int step, const perk_tensor *tensor, float *values,
                                int64_t rows, perk_error *err) {
    const perk_simulator *sim = from_const(executor);
    const perk_plan_tensor *t;
    perk_status status = find_place(sim, tensor, rows, &t, err);
    if (status) return status;
    if (step < 0 || step >= sim->steps)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "there is no step %d of %d", step, sim->steps);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t col = 0; col < t->cols; col++) *values++ = element_at(t, sim->results[step], row, col);
    return PERK_OK;
}

static perk_status simulator_read(perk_executor *self, const perk_tensor *tensor, float *values, int64_t rows,
                                  perk_error *err) {
    return perk_simulator_read(self, from_executor(self)->steps - 1, tensor, values, rows, err);
}

static perk_status simulator_write(perk_executor *self, const perk_tensor *input, const float *values, int64_t rows,
                                   perk_error *err) {
    perk_simulator *sim = from_executor(self);
    const perk_plan_tensor *t;
    perk_status status = find_place(sim, input, rows, &t, err);
    if (status) return status;
    if (!t->external_input || t->dtype != PERK_BF16)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "%s is not for the host to write", input->name);
    for (int64_t row = 0; row < rows; row++) {
        uint16_t *out = (uint16_t *)(void *)(sim->truth.bytes + t->offset) + row * t->row_stride;
        for (int64_t col = 0; col < t->cols; col++) out[col] = perk_f32_to_bf16(*values++);
    }
    return PERK_OK;
}

static perk_status collect_result(perk_simulator *sim, const perk_batch *batch, bool want_logits,
                                  perk_step_result *result, perk_error *err) {
    perk_status status = PERK_OK;
    for (int i = 0; i < sim->graph->op_count && !status; i++) {
        const perk_op *op = sim->graph->ops[i];
        bool is_argmax = op->type == &perk_op_argmax;
        if (!is_argmax && !(want_logits && op->output->dtype == PERK_F32)) continue;
        void *bigger = perk_realloc_array(is_argmax ? (void *)sim->argmax : sim->logits,
                                          (size_t)sim->config.max_num_logit_rows * (size_t)op->output->cols, 4);
        if (!bigger) return perk_fail_memory(err, "the step's results");
        status = simulator_read(&sim->base, op->output, bigger, batch->num_logit_rows, err);
        if (!is_argmax) {
            result->logits = sim->logits = bigger;
            continue;
        }
        result->argmax = sim->argmax = bigger;
        for (int row = 0; row < batch->num_logit_rows; row++) sim->argmax[row] = (int32_t)((float *)bigger)[row];
    }
    return status;
}

static perk_status simulator_step(perk_executor *self, const perk_batch *batch, bool want_logits,
                                  perk_step_result *result, perk_error *err) {
    perk_simulator *sim = from_executor(self);
    *result = (perk_step_result){0};
    perk_status status = perk_simulator_begin(self, &batch, 1, err);
    if (!status && sim->undeclared.status) {
        if (err) *err = sim->undeclared;
        status = sim->undeclared.status;
    }
    if (!status) status = perk_simulator_compute(self, &sim->order, err);
    sim->order.seed++;
    if (!status) status = collect_result(sim, batch, want_logits, result, err);
    return status;
}

static void simulator_free(perk_executor *self) {
    perk_simulator *sim = from_executor(self);
    if (!sim) return;
    perk_sim_drop_plan(sim);
    for (int i = 0; sim->matrices && i < sim->graph->tensor_count; i++) free(sim->matrices[i].values);
    free(sim->matrices);
    free(sim->constants);
    free(sim->trace.reads.items);
    free(sim->trace.writes.items);
    free(sim->trace.versions);
    free(sim->trace.tasks);
    free(sim->scratch);
    free(sim->argmax);
    free(sim->logits);
    perk_plan_free(sim->owned_plan);
    free(sim);
}

static const perk_executor_type simulator_type = {"simulator",    simulator_step, simulator_write,
                                                  simulator_read, simulator_free, NULL};

perk_status perk_simulator_create(perk_executor **out, const perk_graph *graph, const perk_checkpoint *checkpoint,
                                  const perk_config *config, const perk_simulator_options *options, perk_error *err) {
    *out = NULL;
    perk_simulator *sim = perk_calloc(1, sizeof *sim);
    if (!sim) return perk_fail_memory(err, "the simulator");
    sim->base.type = &simulator_type;
    sim->graph = graph;
    sim->config = *config;
    sim->order = options->order;
    perk_status status = perk_graph_check(graph, err);
    if (!status) status = perk_config_resolve(&sim->config, 0, err);
    if (!status && !options->plan)
        status = perk_plan_create(&sim->owned_plan, graph, &options->device, &sim->config, err);
    if (!status) status = perk_sim_load_weights(sim, checkpoint, err);
    if (!status) status = perk_simulator_set_plan(&sim->base, options->plan ? options->plan : sim->owned_plan, err);
    if (status) {
        simulator_free(&sim->base);
        return status;
    }
    *out = &sim->base;
    return PERK_OK;
}
