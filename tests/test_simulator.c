/* The simulator, which runs a plan's tasks, against the reference executor, which runs the graph's ops: random graphs
 * in many orders, with every task held back once; the shipped model. What the lowering declares must cover what tasks
 * do.
 *
 *     test_simulator [GRAPHS [FIRST [v]]] */
#include "random_graph.h"
#include "src/model.h"
#include "src/reference.h"
#include "src/simulator/simulator.h"

static perk_error err;
static bool verbose;

/* ---- random graphs ---- */

/* What the reference executor makes of all steps: the kept tensors and the logits, one after the other. */
typedef struct expected {
    float *values[RANDOM_GRAPH_STEPS][RANDOM_GRAPH_KEPT + 1];
} expected;

/* Rounding to bf16 costs the reference this much; the simulator may differ from it by a few times that. */
enum { ROUNDINGS = 3 };

static int tensor_count(const random_graph *g) { return g->kept_count + 1; }
static const perk_tensor *tensor_at(const random_graph *g, int i) { return i < g->kept_count ? g->kept[i] : g->logits; }
static int64_t rows_of(const perk_batch *batch, const perk_tensor *tensor) {
    return perk_tensor_rows(tensor, batch->num_tokens, batch->num_logit_rows);
}
static size_t size_of(const perk_batch *batch, const perk_tensor *tensor) {
    return (size_t)rows_of(batch, tensor) * (size_t)tensor->cols;
}

static void compute_expected(const random_graph *g, perk_reference_precision precision, expected *out) {
    const perk_reference_options options = {.threads = 1, .precision = precision};
    perk_executor *reference;
    perk_step_result result;
    CHECK_OK(perk_reference_create(&reference, g->graph, g->weights, &g->config, &options, &err));
    for (int s = 0; s < g->step_count; s++) {
        CHECK_OK(reference->type->step(reference, g->batches[s], true, &result, &err));
        for (int i = 0; i < tensor_count(g); i++) {
            const perk_tensor *tensor = tensor_at(g, i);
            float *values = perk_calloc(size_of(g->batches[s], tensor), sizeof *values);
            CHECK(values);
            CHECK_OK(reference->type->read(reference, tensor, values, rows_of(g->batches[s], tensor), &err));
            out->values[s][i] = values;
        }
    }
    reference->type->free(reference);
}

static void free_expected(expected *e) {
    for (int s = 0; s < RANDOM_GRAPH_STEPS; s++)
        for (int i = 0; i <= RANDOM_GRAPH_KEPT; i++) free(e->values[s][i]);
}

static double relative_error(const float *got, const float *want, size_t count) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < count; i++) {
        if (!isfinite(got[i])) return INFINITY;
        difference += ((double)got[i] - (double)want[i]) * ((double)got[i] - (double)want[i]);
        norm += (double)want[i] * (double)want[i];
    }
    return sqrt(difference / fmax(norm, 1e-30));
}

/* The slot of a token that the expert gets. */
static size_t slot_of(const float *logits, size_t count, size_t expert) {
    size_t before = 0;
    for (size_t i = 0; i < count; i++)
        before += logits[i] > logits[expert] || (logits[i] == logits[expert] && i < expert);
    return PERK_MIN(before, (size_t)RANDOM_GRAPH_OWN_TOP);
}

/* Whether rounding sent tokens to other experts: what comes after that has another meaning. Of a step of one token the
 * router's logits tell. */
static bool routes_differ(const float *got, const float *want, const perk_tensor *tensor, size_t count) {
    if (tensor->dtype == PERK_I32) return memcmp(got, want, count * sizeof *got) != 0;
    bool differ = false;
    for (size_t i = 0; i < count && strstr(tensor->name, "router"); i++)
        differ |= slot_of(got, count, i) != slot_of(want, count, i);
    return differ;
}

static double rounding_error(const random_graph *g, const expected *rounded, const expected *exact) {
    double worst = 0;
    for (int s = 0; s < g->step_count; s++)
        for (int i = 0; i < tensor_count(g); i++)
            worst = fmax(worst, relative_error(rounded->values[s][i], exact->values[s][i],
                                               size_of(g->batches[s], tensor_at(g, i))));
    return worst;
}

/* The worst relative error over all steps and tensors; argmax must be the largest of the simulator's own logits. */
static double compare(const random_graph *g, const expected *want, perk_executor *simulator, bool *rerouted) {
    const perk_tensor *next = perk_graph_find(g->graph, "next");
    double worst = 0;
    for (int s = 0; s < g->step_count; s++)
        for (int i = 0; i < tensor_count(g); i++) {
            const perk_tensor *tensor = tensor_at(g, i);
            size_t count = size_of(g->batches[s], tensor);
            int64_t rows = rows_of(g->batches[s], tensor);
            float *got = perk_calloc(count, sizeof *got), *chosen = perk_calloc((size_t)rows, sizeof *chosen);
            CHECK(got && chosen);
            CHECK_OK(perk_simulator_read(simulator, s, tensor, got, rows, &err));
            *rerouted |= routes_differ(got, want->values[s][i], tensor, count);
            worst = fmax(worst, relative_error(got, want->values[s][i], count));
            if (tensor == g->logits) {
                CHECK_OK(perk_simulator_read(simulator, s, next, chosen, rows, &err));
                for (int64_t row = 0; row < rows; row++)
                    for (int v = 0; v < g->vocab; v++) {
                        const float *logits = got + row * g->vocab;
                        int best = (int)chosen[row];
                        CHECK(logits[v] < logits[best] || (logits[v] == logits[best] && v >= best));
                    }
            }
            free(got);
            free(chosen);
        }
    return worst;
}

/* Returns false when tokens went to other experts than in the reference. */
static bool run_in_orders(random_graph *g, const expected *want, double rounding, perk_executor *simulator, int seed) {
    const perk_plan *plan = perk_simulator_plan(simulator);
    perk_simulator_order order = {.seed = (uint64_t)seed};
    double worst = 0;
    bool rerouted = false;
    CHECK_OK(perk_plan_check(plan, &err));
    CHECK_OK(perk_simulator_begin(simulator, (const perk_batch *const *)g->batches, g->step_count, &err));
    CHECK(!perk_simulator_undeclared(simulator), "graph %d: %s", seed, perk_simulator_undeclared(simulator)->message);
    uint64_t digest = 0;
    for (int i = 0; i < 6; i++, order.seed++) {
        order.skewed = i % 2;
        order.hold = i < 2 ? PERK_HOLD_NOTHING : i < 4 ? PERK_HOLD_START : PERK_HOLD_END;
        order.step = i % g->step_count;
        order.task = (i * 7919) % plan->task_count;
        CHECK_OK(perk_simulator_compute(simulator, &order, &err));
        CHECK(i == 0 || perk_simulator_kv_digest(simulator) == digest, "graph %d: order %d", seed, i);
        digest = perk_simulator_kv_digest(simulator);
        worst = fmax(worst, compare(g, want, simulator, &rerouted));
    }
    CHECK(worst <= ROUNDINGS * rounding || rerouted, "graph %d: error %.3g, rounding %.3g", seed, worst, rounding);
    for (int task = 0; task < plan->task_count; task++)
        for (int i = 0; i < 4; i++, order.seed++) {
            order = (perk_simulator_order){.seed = order.seed,
                                           .skewed = random_graph_below(g, 2),
                                           .hold = i & 1 ? PERK_HOLD_START : PERK_HOLD_END,
                                           .step = (i / 2) % g->step_count,
                                           .task = task};
            CHECK_OK(perk_simulator_try(simulator, &order, &err));
        }
    if (verbose)
        printf("graph %d: %d stages, %d tasks, %d workers, %d steps of up to %d tokens, error %.2e, rounding %.2e\n",
               seed, plan->stage_count, plan->task_count, plan->device.worker_count, g->step_count,
               plan->config.max_num_batched_tokens, worst, rounding);
    return !rerouted;
}

static bool test_graph(int seed, int experts, bool own_routing) {
    const random_graph_limits most = {.layers = 3,
                                      .hidden = 100,
                                      .heads = 4,
                                      .workers = 12,
                                      .tokens = 16,
                                      .steps = 5,
                                      .experts = experts,
                                      .own_routing = own_routing};
    random_graph g;
    perk_executor *simulator;
    random_graph_make(&g, (uint64_t)seed, &most);
    perk_simulator_options options = {.device = g.device};
    perk_status status = perk_simulator_create(&simulator, g.graph, g.weights, &g.config, &options, &err);
    CHECK(status == PERK_OK, "graph %d: %s", seed, err.message);
    expected want = {{{NULL}}}, exact = {{{NULL}}};
    compute_expected(&g, PERK_PRECISION_BF16, &want);
    compute_expected(&g, PERK_PRECISION_FP32, &exact);
    bool is_compared = run_in_orders(&g, &want, rounding_error(&g, &want, &exact), simulator, seed);
    free_expected(&want);
    free_expected(&exact);
    simulator->type->free(simulator);
    random_graph_free(&g);
    return is_compared;
}

/* ---- broken plans ---- */

typedef struct broken {
    random_graph g;
    perk_plan *plan;
    perk_executor *simulator;
} broken;

static void open_broken(broken *b, uint64_t seed) {
    static const random_graph_limits most = {
        .layers = 1, .hidden = 64, .heads = 2, .workers = 4, .tokens = 4, .steps = 3};
    random_graph_make(&b->g, seed, &most);
    CHECK_OK(perk_plan_create(&b->plan, b->g.graph, &b->g.device, &b->g.config, &err));
    const perk_simulator_options options = {.plan = b->plan};
    CHECK_OK(perk_simulator_create(&b->simulator, b->g.graph, b->g.weights, &b->g.config, &options, &err));
}

static void close_broken(broken *b) {
    b->simulator->type->free(b->simulator);
    perk_plan_free(b->plan);
    random_graph_free(&b->g);
}

static perk_status begin_broken(broken *b) {
    perk_status status = perk_simulator_set_plan(b->simulator, b->plan, &err);
    if (status) return status;
    return perk_simulator_begin(b->simulator, (const perk_batch *const *)b->g.batches, b->g.step_count, &err);
}

/* Orders until one shows the fault. */
static perk_status try_broken(broken *b) {
    perk_status status = begin_broken(b);
    for (int i = 0; i < b->plan->task_count && !status; i++) {
        perk_simulator_order order = {.seed = (uint64_t)i, .hold = PERK_HOLD_END, .step = 1, .task = i};
        status = perk_simulator_try(b->simulator, &order, &err);
    }
    return status;
}

static perk_task *first_task_of(const perk_plan *plan, perk_stage_work work) {
    int i = 0;
    while (plan->stages[plan->tasks[i].stage].work != work) i++;
    return &plan->tasks[i];
}

/* Each way to break a plan has its own words. */
static void test_faults(void) {
    broken b;
    open_broken(&b, 12);
    CHECK_OK(try_broken(&b));
    perk_task *gather = first_task_of(b.plan, PERK_WORK_GATHER), *linear = first_task_of(b.plan, PERK_WORK_LINEAR);
    perk_wait *wait = &b.plan->waits[linear->wait_begin], sound = *wait;
    wait->needed = 0;
    CHECK_FAILS(try_broken(&b), PERK_UNSAFE_PLAN, "writes it");
    *wait = sound;
    wait = &b.plan->waits[gather->wait_begin];
    sound = *wait;
    wait->needed = b.plan->counter_per_step[wait->counter];
    CHECK_FAILS(try_broken(&b), PERK_HANG, "nobody can go on");
    *wait = sound;
    perk_region *region = &b.plan->regions[linear->read_begin], whole = *region;
    region->col_count -= 3;
    CHECK_OK(try_broken(&b));
    CHECK(perk_simulator_undeclared(b.simulator));
    CHECK(strstr(perk_simulator_undeclared(b.simulator)->message, "which its regions do not declare"));
    *region = whole;
    b.plan->stages[gather->stage].unit_count += 1000;
    gather->first += 1000;
    CHECK_FAILS(try_broken(&b), PERK_UNSAFE_PLAN, "outside it");
    close_broken(&b);
}

/* Numbers from anywhere, as far as the structure stays sound: never an access outside of memory. */
static void scramble(random_graph *g, perk_plan *plan) {
    perk_task *task = &plan->tasks[random_graph_below(g, plan->task_count)];
    perk_stage *stage = &plan->stages[random_graph_below(g, plan->stage_count)];
    perk_plan_tensor *tensor = &plan->tensors[random_graph_below(g, plan->tensor_count)];
    int32_t *fields[] = {&task->first,
                         &task->stride,
                         &task->count,
                         &task->stage,
                         &stage->unit_count,
                         &stage->scalar,
                         &stage->op,
                         &stage->operands[random_graph_below(g, PERK_RECORD_OPERANDS)],
                         &stage->stream.tensor,
                         (int32_t *)&stage->work,
                         &tensor->rows,
                         &tensor->cols,
                         &tensor->row_stride,
                         (int32_t *)&tensor->dtype,
                         (int32_t *)&tensor->space,
                         (int32_t *)&tensor->layout,
                         &tensor->graph_tensor,
                         &tensor->rope_op,
                         &plan->attention_parts,
                         &plan->append_slices,
                         &plan->max_attention_items,
                         &plan->max_query_tiles,
                         &plan->tokens_per_query_tile};
    int32_t *field = fields[random_graph_below(g, (int)PERK_COUNT(fields))];
    *field = random_graph_chance(g, 40)   ? *field + random_graph_between(g, -2, 2)
             : random_graph_chance(g, 50) ? random_graph_below(g, 8)
                                          : random_graph_between(g, -300, 300);
    if (random_graph_chance(g, 20)) tensor->offset = 256 * (uint64_t)random_graph_below(g, 64);
}

static void test_scrambled(int rounds) {
    int survived = 0;
    for (int i = 0; i < rounds; i += 50) {
        broken b;
        open_broken(&b, (uint64_t)(5000 + i));
        for (int j = 0; j < 50; j++) {
            perk_plan *sound = b.plan;
            CHECK_OK(perk_plan_create(&b.plan, b.g.graph, &b.g.device, &b.g.config, &err));
            for (int k = random_graph_between(&b.g, 1, 3); k > 0; k--) scramble(&b.g, b.plan);
            const perk_simulator_order order = {.seed = (uint64_t)j};
            if (!begin_broken(&b) && !perk_simulator_compute(b.simulator, &order, &err)) survived++;
            perk_plan_free(b.plan);
            b.plan = sound;
        }
        close_broken(&b);
    }
    CHECK(survived > rounds / 100 && survived < rounds, "%d of %d", survived, rounds);
}

/* ---- a whole model ---- */

enum { PROMPT = 9, ANSWER = 12 };

static void greedy(perk_executor *executor, const perk_config *config, int32_t *tokens) {
    perk_batch *batch;
    perk_step_result result;
    int32_t pages[16];
    for (int i = 0; i < 16; i++) pages[i] = i;
    CHECK_OK(perk_batch_create(&batch, config, &err));
    for (int i = 0; i < PROMPT; i++) tokens[i] = (i * 37 + 11) % 2000;
    for (int done = 0; done < PROMPT + ANSWER - 1;) {
        int count = done < PROMPT ? PERK_MIN(PROMPT - done, config->max_num_batched_tokens) : 1;
        perk_batch_clear(batch);
        CHECK_OK(perk_batch_add(batch, config, tokens + done, count, done, pages, 1, &err));
        CHECK_OK(executor->type->step(executor, batch, true, &result, &err));
        CHECK(result.argmax && result.logits);
        done += count;
        if (done >= PROMPT) tokens[done] = result.argmax[0];
    }
    perk_batch_free(batch);
}

static void test_model(const char *arch, int workers) {
    perk_model *model;
    perk_executor *simulator, *reference;
    int32_t got[PROMPT + ANSWER], want[PROMPT + ANSWER];
    perk_config config = {
        .max_num_batched_tokens = 4, .max_num_batched_requests = 1, .page_size = 16, .max_seq_length = 64};
    CHECK_OK(perk_config_resolve(&config, 0, &err));
    CHECK_OK(perk_model_open(&model, PERK_SOURCE_DIR "/examples/tiny", false, 0, &err));
    perk_simulator_options options = {.order = {.seed = 1, .skewed = true}};
    CHECK_OK(perk_device_describe_arch(arch, &options.device, &err));
    options.device.worker_count = workers;
    const perk_reference_options precision = {.precision = PERK_PRECISION_BF16};
    CHECK_OK(perk_simulator_create(&simulator, model->graph, model->checkpoint, &config, &options, &err));
    CHECK_OK(perk_reference_create(&reference, model->graph, model->checkpoint, &config, &precision, &err));
    greedy(simulator, &config, got);
    greedy(reference, &config, want);
    for (int i = 0; i < PROMPT + ANSWER; i++) CHECK(got[i] == want[i], "token %d: %d, not %d", i, got[i], want[i]);
    simulator->type->free(simulator);
    reference->type->free(reference);
    perk_model_free(model);
}

int main(int argc, char **argv) {
    int graphs = argc > 1 ? atoi(argv[1]) : 24, first = argc > 2 ? atoi(argv[2]) : 0;
    verbose = argc > 3;
    for (int i = first; i < first + graphs; i++) CHECK(test_graph(i, 0, false));
    int compared = 0;
    for (int i = first; i < first + graphs / 2; i++) compared += test_graph(i, 9, i % 2);
    CHECK(2 * compared >= graphs / 2, "%d of %d graphs with experts were compared", compared, graphs / 2);
    test_faults();
    test_scrambled(1000);
    test_model("sm_90a", 12);
    test_model("sm_80", 108);
    return 0;
}
