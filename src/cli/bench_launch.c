/* Decode steps that follow each other in one launch. The requests begin with their context in the cache, as the prefill
 * has left it; every token must be the one that the same program picks with a launch a step. */
#include "bench_model.h"

#include "kernels_src/mail.h"
#include "src/plan_steps.h"

enum { RECORDS = 1024, READS_PER_POLL = 1024 };

typedef struct bench_launch {
    perk_bench *bench;
    uint64_t *block; /* of the schedule */
    perk_schedule schedule;
    perk_token_record *records; /* [RECORDS] */
    double *arrived;            /* [steps] when the last token of a step came */
    int32_t *slot_request;      /* [slots] */
    int64_t steps, came;        /* tokens so far */
} bench_launch;

static perk_status allocate(bench_launch *l, perk_bench *b, perk_error *err) {
    const perk_schedule_limits limits = perk_plan_schedule_limits(perk_gpu_plan(b->gpu));
    const perk_schedule_layout layout = perk_schedule_lay_out(&limits);
    *l = (bench_launch){.bench = b, .steps = perk_bench_step_count(b)};
    l->block = perk_calloc(layout.words, sizeof *l->block);
    l->records = perk_calloc(RECORDS, sizeof *l->records);
    l->arrived = perk_calloc((size_t)l->steps, sizeof *l->arrived);
    l->slot_request = perk_calloc((size_t)limits.slots, sizeof *l->slot_request);
    if (!l->block || !l->records || !l->arrived || !l->slot_request) return perk_fail_memory(err, "a launch");
    perk_schedule_bind(&l->schedule, &limits, l->block);
    perk_schedule_begin(&l->schedule);
    return PERK_OK;
}

/* A request that runs, with the pages that the prefill has written, and one token that is not in them. */
static perk_status add_request(bench_launch *l, int32_t request, perk_error *err) {
    perk_schedule *s = &l->schedule;
    const perk_bench *b = l->bench;
    int32_t context = b->options->context, slot = perk_schedule_open(s), per_request = s->batch.pages_per_request;
    if (slot < 0) return perk_fail(err, PERK_INTERNAL, "there is no slot for request %d", request);
    perk_slot *r = &s->slots[slot];
    r->prompt_length = context + 1;
    r->limit = r->prompt_length + (int32_t)l->steps;
    for (int32_t i = 0; i <= context; i++) perk_slot_tokens(s, slot)[i] = perk_bench_token(b, request, i);
    perk_schedule_arrive(s, slot);
    if (!perk_schedule_admit(s)) return perk_fail(err, PERK_INTERNAL, "request %d finds no pages", request);
    for (; r->page_count < per_request; r->page_count++) {
        int32_t page = perk_pool_take(&s->pool);
        if (page != request * per_request + r->page_count)
            return perk_fail(err, PERK_INTERNAL, "page %d of request %d is %d of the pool", r->page_count, request,
                             page);
        perk_slot_pages(s, r)[r->page_count] = page;
    }
    r->cached = context;
    l->slot_request[slot] = request;
    return PERK_OK;
}

static perk_status take_token(bench_launch *l, const perk_token_record *record, perk_error *err) {
    const perk_bench *b = l->bench;
    if (record->token < 0) return PERK_OK; /* it has begun to run */
    int64_t step = l->came / b->options->batch;
    int32_t request = l->slot_request[record->slot];
    if (step >= l->steps) return perk_fail(err, PERK_INTERNAL, "the launch made more than %lld steps", (long long)step);
    int32_t wanted = b->chosen[step * b->options->batch + request];
    if (record->token != wanted)
        return perk_fail(err, PERK_INTERNAL,
                         "request %d, step %lld: token %d in a launch of many steps, and %d with a launch a step",
                         request, (long long)step, record->token, wanted);
    l->came++;
    if (l->came % b->options->batch == 0) l->arrived[step] = perk_now();
    return PERK_OK;
}

/* Until the launch has ended, and all that it sent was read. */
static perk_status follow(bench_launch *l, perk_error *err) {
    perk_executor *gpu = l->bench->gpu;
    perk_status status = PERK_OK;
    bool has_ended = false;
    for (uint32_t reads = 0; !status;) {
        size_t count = gpu->type->online->read(gpu, l->records, NULL, RECORDS);
        for (size_t i = 0; i < count && !status; i++) status = take_token(l, &l->records[i], err);
        if (count > 0) continue;
        if (has_ended) break;
        if (!status && ++reads % READS_PER_POLL == 0) status = gpu->type->online->poll(gpu, &has_ended, err);
    }
    int64_t wanted = l->steps * l->bench->options->batch;
    if (!status && l->came != wanted)
        status = perk_fail(err, PERK_INTERNAL, "the launch ended after %lld of %lld tokens", (long long)l->came,
                           (long long)wanted);
    return status;
}

static perk_status run(bench_launch *l, perk_error *err) {
    perk_bench *b = l->bench;
    const perk_launch_options options = {0};
    perk_status status = PERK_OK;
    for (int32_t request = 0; request < b->options->batch && !status; request++) status = add_request(l, request, err);
    if (!status) status = b->gpu->type->online->launch(b->gpu, &l->schedule, &options, err);
    if (!status) status = follow(l, err);
    int64_t first = l->steps - b->options->steps; /* those before are to warm up */
    for (int64_t step = first; step < l->steps && !status; step++)
        b->wall_ms[step - first] = (l->arrived[step] - l->arrived[step - 1]) * 1e3;
    return status;
}

perk_status perk_bench_launch(perk_bench *b, perk_error *err) {
    bench_launch launch;
    perk_status status = allocate(&launch, b, err);
    if (!status) status = run(&launch, err);
    free(launch.block);
    free(launch.records);
    free(launch.arrived);
    free(launch.slot_request);
    return status;
}
