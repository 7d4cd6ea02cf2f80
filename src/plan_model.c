#include "plan_model.h"

#include "lower.h"
#include "ops/op.h"

/* Microseconds, and bytes a microsecond of one worker, where no other unit is given. */
static const struct {
    double begin;       /* from a task's end to the next, when nothing is waited for */
    double signal;      /* from the last signal until who waits for it goes on */
    double latency;     /* of a read from device memory */
    double chunk;       /* a linear's products with one chunk, up to 8 rows */
    double column_tile; /* the same, for each further 8 rows */
    double tile;        /* finishing a tile of outputs */
    double norm;        /* an rmsnorm that is folded into a linear */
    double routing;     /* until a producer knows whose tiles it streams: trips to L2, the picks of a token */
    double input;       /* bytes: activations, from L2 */
    double slice; /* wide linears, not measured: 64 columns of four row tiles by 256 tokens, at 60 % of the peak */
    double slice_input;   /* bytes, the same: slices from L2, which all workers share */
    double batched;       /* batched linears, not measured: the products of a chunk with 8 tokens */
    double batched_input; /* bytes, the same: slices from L2, beside the stream of weights */
    double kv_share; /* the part of its share of the bandwidth at which a task of attention reads keys and values */
} machine = {.begin = 0.4,
             .signal = 0.63,
             .latency = 0.8,
             .chunk = 0.3,
             .column_tile = 0.1,
             .tile = 0.15,
             .norm = 1.3,
             .routing = 1.2,
             .input = 13e3,
             .slice = 0.5,
             .slice_input = 45e3,
             .batched = 0.05,
             .batched_input = 33e3,
             .kv_share = 0.67};

/* The fixed part of a task, by its op and by the end of its stage's name. The first row that fits. */
static const struct {
    const perk_op_type *type;
    const char *suffix;
    double us;
} fixed_costs[] = {
    {&perk_op_linear, "", 1.4},
    {&perk_op_attention, ".append", 1.5},
    {&perk_op_attention, ".partial", 3.2},
    {&perk_op_attention, "", 1.6},
    {&perk_op_embed, "", 2.7},
    {&perk_op_rmsnorm, "", 2.7},
    {&perk_op_select_rows, "", 1.3},
    {&perk_op_argmax, "", 5.9},
    {&perk_op_gate_mul, "", 1.5},
    {&perk_op_moe_route, "", 3.0}, /* these three are estimates */
    {&perk_op_moe_linear, "", 2.0},
    {&perk_op_moe_sum, "", 1.7},
};

/* Data sheets, TB/s. Of a data sheet's bandwidth a kernel that only reads gets about 94 %: measured on the H100. */
static const struct {
    int capability;
    double peak;
} memories[] = {
    {80, 2.04}, {86, 0.70}, {87, 0.20},  {89, 0.86},  {90, 3.35},
    {100, 8.0}, {103, 8.0}, {110, 0.27}, {120, 1.79}, {121, 0.27},
};

static double usual_bandwidth(const perk_device_desc *device) {
    double peak = memories[0].peak;
    for (size_t i = 0; i < PERK_COUNT(memories); i++)
        if (memories[i].capability <= device->capability) peak = memories[i].peak;
    return peak * 0.94e12;
}

/* A worker: what its consumers do, and what its stream has brought. Times in microseconds. */
typedef struct worker {
    int next, end;   /* tasks */
    double now;      /* the consumers' time */
    double landed;   /* when the last chunk of the stream was there */
    uint64_t chunks; /* taken from the ring */
    double *slots;   /* [ring_slots] when the slot's last chunk was read */
    bool runs;       /* its task ends at `now`; else it waits for counters */
} worker;

typedef struct machine_run {
    const perk_plan *plan;
    perk_plan_load load;
    double stream; /* a worker's share of the bandwidth, bytes a microsecond */
    worker *workers;
    double *slots; /* all workers' */
    int32_t *counters;
    double *signalled; /* [counters] when the last signal came */
    perk_task_time *times;
} machine_run;

static bool ends_with(const char *text, const char *end) {
    size_t length = strlen(text), wanted = strlen(end);
    return length >= wanted && strcmp(text + length - wanted, end) == 0;
}

static double fixed_cost(const perk_plan *plan, const perk_stage *stage) {
    for (size_t i = 0; i < PERK_COUNT(fixed_costs); i++)
        if (fixed_costs[i].type == plan->graph->ops[stage->op]->type && ends_with(stage->name, fixed_costs[i].suffix))
            return fixed_costs[i].us;
    return 2.0;
}

/* Keys and values that a task of attention's first stage reads: those of its stage, in equal parts. Workers that take a
 * prompt together read the same ones, from L2. */
static double attention_time(const machine_run *run, const perk_stage *stage) {
    const perk_plan *plan = run->plan;
    bool is_prompt = plan->prompt_slice > 0 && run->load.tokens >= PERK_PROMPT_TOKENS;
    int per_tile = PERK_MAX(1, is_prompt ? plan->prompt_slice : plan->tokens_per_query_tile);
    double positions = (double)plan->config.max_num_pages * plan->config.page_size;
    double tiles = run->load.requests * (double)perk_ceil_div((uint64_t)run->load.tokens, (uint64_t)per_tile);
    double bytes = tiles * (run->load.context + run->load.tokens) * (double)plan->kv_layer_bytes / positions;
    return bytes / stage->task_count / (is_prompt ? machine.slice_input : run->stream * machine.kv_share);
}

/* One chunk: when it is there, and the consumers, too, they take it. */
static void take_chunk(const machine_run *run, worker *w, double bytes, double cost) {
    double *slot = &w->slots[w->chunks % (uint64_t)run->plan->ring_slots];
    w->landed = PERK_MAX(w->landed, *slot + machine.latency) + bytes / run->stream;
    w->now = PERK_MAX(w->now, w->landed) + cost;
    *slot = w->now;
    w->chunks++;
}

/* Tiles of experts that a task multiplies by, when so many experts are hit. */
static int units_of_hits(const perk_stage *stage, const perk_task *task, int hits) {
    if (stage->stream.deal == PERK_DEAL_TILES) return task->count * hits;
    int all = hits * stage->stream.tile_count;
    return PERK_MIN(task->count, (all - task->first + task->stride - 1) / task->stride);
}

static void run_linear(const machine_run *run, worker *w, const perk_stage *stage, const perk_task *task) {
    const perk_op *op = run->plan->graph->ops[stage->op];
    const perk_tensor *x = op->inputs[PERK_IN_X];
    bool has_norm = x->producer && x->producer->type == &perk_op_rmsnorm && stage->operands[0] >= 0 &&
                    run->plan->tensors[stage->operands[0]].graph_tensor != x->index;
    int tokens = run->load.requests * run->load.tokens;
    int rows = (int)perk_tensor_rows(x, tokens, run->load.requests);
    bool is_staged = perk_linear_staged_bytes(rows, x->cols) <= run->plan->staging_bytes;
    double input = (double)rows * (double)x->cols * 2 / machine.input;
    int count = task->count;
    if (stage->stream.deal != PERK_DEAL_NONE) {
        int hits = (int)PERK_MIN((int64_t)tokens * op->inputs[PERK_IN_EXPERTS]->cols, stage->stream.experts);
        count = units_of_hits(stage, task, hits);
        rows = (tokens * (int)op->inputs[PERK_IN_EXPERTS]->cols + hits - 1) / hits; /* of an expert */
        if (!is_staged) input = (double)rows * (double)x->cols * 2 / machine.input;
        double routed = run->signalled[stage->stream.routed.counter] + machine.signal + machine.routing;
        w->landed = PERK_MAX(w->landed, routed + machine.latency);
    }
    int blocks = stage->stream.blocks_per_tile, chunks = (blocks + PERK_CHUNK_BLOCKS - 1) / PERK_CHUNK_BLOCKS;
    int further_tiles = (rows - 1) / 8;
    double cost = machine.chunk + machine.column_tile * further_tiles;
    if (has_norm) w->now += machine.norm;
    if (is_staged)
        w->now += input;
    else
        cost += input / PERK_MAX(1, chunks); /* read again for every tile */
    for (int i = 0; i < count; i++) {
        for (int block = 0; block < blocks; block += PERK_CHUNK_BLOCKS)
            take_chunk(run, w, PERK_MIN(PERK_CHUNK_BLOCKS, blocks - block) * (double)PERK_WEIGHT_BLOCK_BYTES, cost);
        w->now += machine.tile;
    }
}

/* Groups of tiles, chunk by chunk of each: the same, where x is read once a group. */
static void run_batched_linear(const machine_run *run, worker *w, const perk_stage *stage, const perk_task *task,
                               int rows) {
    int blocks = stage->stream.blocks_per_tile, together = stage->stream.together;
    double products = machine.batched * run->plan->wide_tokens / 8;
    for (int first = 0; first < task->count; first += together) {
        int tiles = PERK_MIN(together, task->count - first);
        for (int block = 0; block < blocks; block += PERK_CHUNK_BLOCKS) {
            int count = PERK_MIN(PERK_CHUNK_BLOCKS, blocks - block);
            double slices = (double)perk_ceil_div((uint64_t)count, PERK_SLICE_BLOCKS);
            double input = slices * rows * PERK_SLICE_ROW_BYTES / machine.batched_input / tiles;
            for (int i = 0; i < tiles; i++)
                take_chunk(run, w, (double)count * PERK_WEIGHT_BLOCK_BYTES, PERK_MAX(products, input));
        }
        w->now += machine.tile * tiles;
    }
}

/* Groups of tiles, slice by slice: whatever takes longest of products, input and stream. */
static void run_wide_linear(const machine_run *run, worker *w, const perk_stage *stage, const perk_task *task) {
    const perk_plan *plan = run->plan;
    int blocks = stage->stream.blocks_per_tile, together = stage->stream.together;
    bool is_of_tokens = plan->graph->ops[stage->op]->output->row_kind == PERK_ROWS_TOKENS;
    int share_tokens = stage->stream.share_tokens, begin = task->first / stage->stream.tile_count * share_tokens;
    int rows = PERK_MIN(run->load.requests * (is_of_tokens ? run->load.tokens : 1) - begin, share_tokens);
    if (begin > 0 && rows <= 0) return; /* as the device code does */
    if (perk_plan_is_batched(plan)) {
        run_batched_linear(run, w, stage, task, rows);
        return;
    }
    double input = (double)rows * PERK_SLICE_ROW_BYTES / machine.slice_input;
    for (int first = 0; first < task->count; first += together) {
        int tiles = PERK_MIN(together, task->count - first), slot_blocks = PERK_WIDE_SLOT_BLOCKS(tiles);
        double products = machine.slice * plan->wide_tokens / 256 *
                          (share_tokens == plan->wide_tokens && tiles > PERK_WIDE_TILES / 2 ? 2 : 1);
        for (int block = 0; block < blocks; block += slot_blocks) {
            int count = PERK_MIN(slot_blocks, blocks - block);
            double slices = (double)perk_ceil_div((uint64_t)count, PERK_SLICE_BLOCKS);
            take_chunk(run, w, (double)tiles * count * PERK_WEIGHT_BLOCK_BYTES, slices * PERK_MAX(products, input));
        }
        w->now += machine.tile * tiles;
    }
}

static void set_time(perk_task_time *time, int which, double us) { time->ns[which] = (uint64_t)(us * 1e3 + 0.5); }

/* Begins the worker's next task if its counters allow that: its end is then w->now. */
static void try_next(machine_run *run, worker *w) {
    const perk_plan *plan = run->plan;
    const perk_task *task = &plan->tasks[w->next];
    const perk_stage *stage = &plan->stages[task->stage];
    perk_task_time *time = &run->times[w->next];
    double ready = w->now + machine.begin;
    for (int i = task->wait_begin; i < task->wait_end; i++) {
        const perk_wait *wait = &plan->waits[i];
        if (run->counters[wait->counter] < wait->needed) return;
        if (wait->needed > 0) ready = PERK_MAX(ready, run->signalled[wait->counter] + machine.signal);
    }
    set_time(time, PERK_STAMP_REACHED, w->now);
    set_time(time, PERK_STAMP_READY, ready);
    w->now = ready + fixed_cost(plan, stage);
    if (stage->stream.together > 0)
        run_wide_linear(run, w, stage, task);
    else if (stage->stream.tensor >= 0)
        run_linear(run, w, stage, task);
    else if (plan->graph->ops[stage->op]->type == &perk_op_attention && ends_with(stage->name, ".partial"))
        w->now += attention_time(run, stage);
    set_time(time, PERK_STAMP_DONE, w->now);
    w->runs = true;
}

/* The worker whose running task ends first; NULL when none runs. */
static worker *first_to_end(machine_run *run) {
    worker *first = NULL;
    for (int w = 0; w < run->plan->device.worker_count; w++) {
        worker *candidate = &run->workers[w];
        if (candidate->runs && (!first || candidate->now < first->now)) first = candidate;
    }
    return first;
}

static void end_task(machine_run *run, worker *w) {
    const perk_plan *plan = run->plan;
    const perk_task *task = &plan->tasks[w->next];
    for (int i = task->signal_begin; i < task->signal_end; i++) {
        const perk_signal *signal = &plan->signals[i];
        run->counters[signal->counter] += signal->amount;
        run->signalled[signal->counter] = w->now;
    }
    w->next++;
    w->runs = false;
}

/* From event to event: tasks end in the order of time, and each end may let others begin. */
static perk_status run_step(machine_run *run, perk_error *err) {
    const perk_plan *plan = run->plan;
    int workers = plan->device.worker_count, done = 0;
    for (worker *ended = NULL; done < plan->task_count; done++) {
        for (int w = 0; w < workers; w++) {
            worker *candidate = &run->workers[w];
            if (!candidate->runs && candidate->next < candidate->end) try_next(run, candidate);
        }
        ended = first_to_end(run);
        if (!ended) break;
        end_task(run, ended);
    }
    if (done == plan->task_count) return PERK_OK;
    return perk_fail(err, PERK_UNSAFE_PLAN, "%d of %d tasks wait for what never comes; perk_plan_check says which",
                     plan->task_count - done, plan->task_count);
}

static void place_workers(machine_run *run) {
    const perk_plan *plan = run->plan;
    for (int w = 0; w < plan->device.worker_count; w++)
        run->workers[w] = (worker){.next = plan->worker_begin[w],
                                   .end = plan->worker_begin[w + 1],
                                   .slots = run->slots + (size_t)w * (size_t)plan->ring_slots};
}

perk_plan_load perk_plan_load_resolve(const perk_plan *plan, const perk_plan_load *load) {
    perk_plan_load resolved = *load;
    if (resolved.bandwidth <= 0) resolved.bandwidth = usual_bandwidth(&plan->device);
    if (resolved.requests <= 0) resolved.requests = plan->config.max_num_batched_requests;
    resolved.tokens = PERK_MAX(1, resolved.tokens);
    resolved.context = PERK_MAX(0, PERK_MIN(resolved.context, plan->config.max_seq_length - resolved.tokens));
    return resolved;
}

perk_status perk_plan_expect(const perk_plan *plan, const perk_plan_load *load, perk_task_time *times,
                             perk_error *err) {
    machine_run run = {.plan = plan, .load = perk_plan_load_resolve(plan, load), .times = times};
    size_t workers = (size_t)plan->device.worker_count;
    run.stream = run.load.bandwidth * 1e-6 / (double)workers;
    run.workers = perk_calloc(workers, sizeof *run.workers);
    run.slots = perk_calloc(workers * (size_t)PERK_MAX(1, plan->ring_slots), sizeof *run.slots);
    run.counters = perk_calloc((size_t)plan->counter_count, sizeof *run.counters);
    run.signalled = perk_calloc((size_t)plan->counter_count, sizeof *run.signalled);
    perk_status status = PERK_OK;
    if (!run.workers || !run.slots || !run.counters || !run.signalled)
        status = perk_fail_memory(err, "the expected times");
    if (!status) {
        place_workers(&run);
        status = run_step(&run, err);
    }
    free(run.workers);
    free(run.slots);
    free(run.counters);
    free(run.signalled);
    return status;
}
