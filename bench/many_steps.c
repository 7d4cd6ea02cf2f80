/* Many steps of one launch against one step a launch, on a GPU:
 *     bench/many_steps MODEL [BATCH [CONTEXT [STEPS]]]
 * BATCH requests of CONTEXT random tokens each (default 1 and 512), random weights in the model's shapes, greedy; a
 * line of JSON with the milliseconds of a step in which all of them decode, by the host's clock: of STEPS (default 200)
 * single steps, and of as many in one launch, and whether both gave the same tokens. Where PERK_BENCH_WEIGHTS is set,
 * the checkpoint's own weights are used. */
#include "gpu_many.h"
#include "model.h"
#include "sampler.h"
#include "scheduler.h"

#include <stdio.h>

typedef struct many_bench {
    perk_model *model;
    perk_config config;
    int32_t batch, context, steps;
    int32_t answer;     /* room for what the first request makes while the others' prompts enter, and then */
    int32_t *prompts;   /* [batch][context] */
    int32_t *tokens[2]; /* [batch][answer] by single steps, by many */
    double ms[2];
} many_bench;

static perk_error err;

static perk_executor *open_executor(const many_bench *b, bool many_steps) {
    perk_executor *gpu = NULL;
    const perk_gpu_options options = {.many_steps = many_steps};
    perk_gpu_create(&gpu, b->model->graph, b->model->checkpoint, &b->config, &options, NULL, &err);
    return gpu;
}

static void draw_prompts(const many_bench *b) {
    for (int64_t i = 0; i < (int64_t)b->batch * b->context; i++)
        b->prompts[i] = (int32_t)(perk_uniform(7, (uint64_t)i) * b->model->vocab_size) % b->model->vocab_size;
}

/* Until every request has its first token; then the steps that count. */
static perk_status run_single(many_bench *b, perk_executor *gpu, perk_scheduler *scheduler, perk_request **handles) {
    const perk_sampling sampling = {.max_tokens = b->answer, .ignore_eos = 1};
    perk_status status = PERK_OK;
    double begin = 0;
    for (int32_t i = 0; i < b->batch && !status; i++)
        status = perk_scheduler_submit(scheduler, b->prompts + (size_t)i * (size_t)b->context, (size_t)b->context,
                                       &sampling, &handles[i], &err);
    for (int32_t decoded = 0; !status && decoded <= b->steps;) {
        const perk_batch *batch;
        bool want_logits;
        perk_step_result result;
        status = perk_scheduler_fill(scheduler, &batch, &want_logits, &err);
        if (batch->num_logit_rows == b->batch && decoded++ == 0) begin = perk_now();
        if (decoded > b->steps) break;
        if (!status) status = gpu->type->step(gpu, batch, false, &result, &err);
        if (!status) status = perk_scheduler_commit(scheduler, &result, &err);
        b->ms[0] = (perk_now() - begin) * 1e3 / b->steps;
    }
    return status;
}

static perk_status measure_single(many_bench *b) {
    perk_request *handles[64];
    perk_scheduler *scheduler = NULL;
    perk_executor *gpu = open_executor(b, false);
    perk_status status = gpu ? PERK_OK : err.status;
    if (!status) status = perk_scheduler_create(&scheduler, &b->config, b->model->vocab_size, NULL, 0, false, &err);
    if (!status) status = run_single(b, gpu, scheduler, handles);
    for (int32_t i = 0; i < b->batch && !status; i++) {
        size_t count;
        const int32_t *tokens = perk_request_tokens(handles[i], &count);
        memcpy(b->tokens[0] + (size_t)i * (size_t)b->answer, tokens, count * sizeof *tokens);
    }
    perk_scheduler_free(scheduler);
    if (gpu) gpu->type->free(gpu);
    return status;
}

/* Slots are dealt in order, so a slot's number is the request's. Returns how many tokens came. */
static int64_t read_tokens(many_bench *b, perk_executor *gpu, int32_t *counts) {
    perk_token_record records[256];
    int64_t total = 0;
    for (size_t got; (got = perk_gpu_many_read(gpu, records, NULL, PERK_COUNT(records))) > 0; total += (int64_t)got)
        for (size_t i = 0; i < got; i++)
            if (records[i].token >= 0)
                b->tokens[1][(size_t)records[i].slot * (size_t)b->answer + (size_t)counts[records[i].slot]++] =
                    records[i].token;
    return total;
}

static perk_status run_many(many_bench *b, perk_executor *gpu) {
    int32_t counts[64] = {0};
    perk_launch_options options = {.max_steps = 1};
    perk_gpu_many_result result;
    perk_status status = PERK_OK;
    for (int32_t i = 0; i < b->batch && !status; i++) {
        int32_t slot;
        const perk_gpu_arrival arrival = {.prompt = b->prompts + (size_t)i * (size_t)b->context,
                                          .prompt_length = b->context,
                                          .limit = b->context + b->answer};
        status = perk_gpu_many_submit(gpu, &arrival, &slot, &err);
    }
    while (!status && counts[b->batch - 1] == 0) {
        status = perk_gpu_many_run(gpu, &options, &result, &err);
        read_tokens(b, gpu, counts);
    }
    double begin = perk_now();
    options.max_steps = (uint32_t)b->steps;
    if (!status) status = perk_gpu_many_run(gpu, &options, &result, &err);
    b->ms[1] = (perk_now() - begin) * 1e3 / b->steps;
    read_tokens(b, gpu, counts);
    return status;
}

static perk_status measure_many(many_bench *b) {
    perk_executor *gpu = open_executor(b, true);
    perk_status status = gpu ? run_many(b, gpu) : err.status;
    if (gpu) gpu->type->free(gpu);
    return status;
}

/* As far as both got. */
static bool have_same_tokens(const many_bench *b) {
    for (size_t i = 0; i < (size_t)b->batch * (size_t)b->answer; i++)
        if (b->tokens[0][i] != b->tokens[1][i] && b->tokens[0][i] >= 0 && b->tokens[1][i] >= 0) return false;
    return true;
}

int main(int argc, char **argv) {
    many_bench b = {.batch = argc > 2 ? atoi(argv[2]) : 1,
                    .context = argc > 3 ? atoi(argv[3]) : 512,
                    .steps = argc > 4 ? atoi(argv[4]) : 200};
    if (argc < 2 || b.batch < 1 || b.batch > 64 || b.context < 1 || b.steps < 1) {
        fprintf(stderr, "usage: %s MODEL [BATCH [CONTEXT [STEPS]]]\n", argv[0]);
        return 2;
    }
    b.answer = b.steps + 16;
    for (int32_t room = b.batch; room > 0; room--) b.answer += b.context / room + 1;
    size_t answer = (size_t)b.batch * (size_t)b.answer;
    b.config = (perk_config){
        .max_num_batched_tokens = b.batch, .max_num_batched_requests = b.batch, .max_seq_length = b.context + b.answer};
    b.prompts = perk_calloc((size_t)b.batch * (size_t)b.context, sizeof *b.prompts);
    b.tokens[0] = perk_calloc(answer, sizeof(int32_t));
    b.tokens[1] = perk_calloc(answer, sizeof(int32_t));
    perk_status status = b.prompts && b.tokens[0] && b.tokens[1] ? PERK_OK : perk_fail_memory(&err, "tokens");
    if (!status) memset(b.tokens[0], -1, answer * sizeof(int32_t)), memset(b.tokens[1], -1, answer * sizeof(int32_t));
    if (!status) status = perk_model_open(&b.model, argv[1], !getenv("PERK_BENCH_WEIGHTS"), 1, &err);
    if (!status) status = perk_config_resolve(&b.config, b.model->max_positions, &err);
    if (!status) draw_prompts(&b);
    if (!status) status = measure_single(&b);
    if (!status) status = measure_many(&b);
    if (status)
        fprintf(stderr, "%s\n", err.message);
    else
        printf("{\"model\": \"%s\", \"batch\": %d, \"context\": %d, \"steps\": %d, \"single_ms\": %.4f, \"many_ms\": "
               "%.4f, \"same_tokens\": %s}\n",
               argv[1], b.batch, b.context, b.steps, b.ms[0], b.ms[1], have_same_tokens(&b) ? "true" : "false");
    free(b.prompts);
    free(b.tokens[0]);
    free(b.tokens[1]);
    perk_model_free(b.model);
    return status ? 1 : 0;
}
