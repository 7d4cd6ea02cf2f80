/* The host's side of many steps a launch: slots, mail, tokens. */
#include "gpu_many.h"

#include "gpu_state.h"
#include "page_secret.h"
#include "plan_steps.h"
#include "sampler.h"
#include "scheduler.h"

enum { RING_RECORDS = 1 << 14, ALIGNMENT = 256 };
/* The driver is asked now and then, in case that the kernel has ended without a word. */
static const double DRIVER_SECONDS = 0.1;

/* What the host knows of a slot. */
typedef struct slot_owner {
    bool taken, ended, cancelled;
    uint32_t last_mail; /* the number of mails with the last about it */
} slot_owner;

/* What a program has of its own. */
typedef struct many_program {
    perk_many_args args;
    uint32_t most_steps; /* of a launch */
} many_program;

struct perk_gpu_many {
    perk_schedule_limits limits; /* of the largest program */
    perk_schedule_layout layout;
    perk_gpu_memory device; /* desk, schedule, batch, inbox, outbox */
    void *host;             /* pinned and mapped: all of the following */
    perk_post *post;
    perk_mail *mails;
    perk_slot *slots;
    int32_t *tokens;
    perk_page_hash *hashes;
    perk_page_secret secret; /* of requests that are posted here */
    perk_token_record *records;
    perk_draw_record *details;
    perk_draw_bias *biases;
    slot_owner *owners; /* [slots] */
    uint32_t posted, read;
    perk_many_args args; /* what all programs have in common */
    int32_t *page_table; /* on the device */
    many_program own[PERK_MAX_PROGRAMS];
    perk_gpu_program *running;   /* of the launch under way, or the last */
    perk_launch_options options; /* less the steps that are done */
    bool launched;               /* and its end not seen yet */
    double asked;                /* when the driver was, how the launch is */
    uint64_t steps_before;       /* the launch */
};

/* Words that both sides work on at the same time. */
static uint32_t load(const uint32_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
static void store(uint32_t *word, uint32_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }

static struct perk_gpu_many *many_of(perk_executor *executor) { return ((perk_gpu *)executor)->many; }

/* ---- memory ---- */

/* Places in one allocation, one after the other. */
typedef struct cursor {
    uint64_t base, next;
} cursor;

static void *take(cursor *c, uint64_t bytes) {
    uint64_t place = c->base + c->next;
    c->next += perk_round_up(bytes, ALIGNMENT);
    return (void *)(uintptr_t)place;
}

static uint32_t mail_ring(const perk_schedule_limits *limits) {
    uint32_t size = 1;
    /* A slot has an arrival and a cancel at most, and a late cancel of who had it before. */
    while (size < 3 * (uint32_t)limits->slots) size *= 2;
    return size;
}

static uint64_t place_host(struct perk_gpu_many *many, uint64_t host, uint64_t device) {
    const perk_schedule_limits *limits = &many->limits;
    uint64_t slots = (uint64_t)limits->slots, positions = (uint64_t)limits->positions;
    uint64_t pages = perk_ceil_div(positions, (uint64_t)limits->page_size), mails = mail_ring(limits);
    perk_many_args *args = &many->args;
    cursor at[2] = {{host, 0}, {device, 0}};
    void *post[2], *mail[2], *slot[2], *token[2], *hash[2], *record[2], *detail[2], *bias[2];
    for (int side = 0; side < 2; side++) {
        post[side] = take(&at[side], sizeof(perk_post));
        mail[side] = take(&at[side], mails * sizeof(perk_mail));
        slot[side] = take(&at[side], slots * sizeof(perk_slot));
        token[side] = take(&at[side], slots * positions * sizeof(int32_t));
        hash[side] = take(&at[side], slots * pages * sizeof(perk_page_hash));
        record[side] = take(&at[side], RING_RECORDS * sizeof(perk_token_record));
        detail[side] = take(&at[side], RING_RECORDS * sizeof(perk_draw_record));
        bias[side] = take(&at[side], slots * PERK_DRAW_BIASES * sizeof(perk_draw_bias));
    }
    many->post = post[0], args->post = post[1];
    many->mails = mail[0], args->mails = mail[1];
    many->slots = slot[0], args->host_slots = slot[1];
    many->tokens = token[0], args->host_tokens = token[1];
    many->hashes = hash[0], args->host_hashes = hash[1];
    many->records = record[0], args->records = record[1];
    many->details = detail[0], args->details = detail[1];
    many->biases = bias[0], args->host_biases = bias[1];
    args->mail_mask = (uint32_t)mails - 1;
    args->record_mask = RING_RECORDS - 1;
    return at[0].next;
}

/* Page tables stay when another program runs: the batches of all lie around one. (Arrays in front of it are of whole
 * 16 bytes, so each batch is aligned.) */
static int32_t *place_page_table(const perk_gpu *gpu, cursor *at) {
    int32_t before = 0, rest = 0;
    for (int i = 0; i < gpu->program_count; i++) {
        const perk_batch_layout *layout = &gpu->programs[i].layout;
        before = PERK_MAX(before, layout->page_table);
        rest = PERK_MAX(rest, layout->words - layout->page_table);
    }
    return (int32_t *)take(at, ((uint64_t)before + (uint64_t)rest) * 4) + before;
}

static uint64_t place_device(const perk_gpu *gpu, struct perk_gpu_many *many, uint64_t base) {
    perk_many_args *args = &many->args;
    cursor at = {base, 0};
    args->desk = take(&at, sizeof(perk_desk));
    args->schedule = take(&at, many->layout.words * sizeof(uint64_t));
    many->page_table = place_page_table(gpu, &at);
    args->inbox = take(&at, mail_ring(&many->limits) * sizeof(perk_mail));
    args->outbox = take(&at, (uint64_t)perk_plan_outbox_records(gpu->largest->plan) * sizeof(perk_token_record));
    uint64_t rows = (uint64_t)many->limits.logit_rows;
    uint64_t row_words = rows * PERK_ROW_STRIDE((uint64_t)perk_plan_vocab_size(gpu->largest->plan));
    args->drawn = take(&at, 2 * rows * sizeof(perk_draw_record));
    args->adjusted = take(&at, row_words * sizeof(float));
    args->seen = take(&at, row_words * sizeof(uint32_t));
    args->rooms = take(&at, rows * sizeof(perk_draw_room));
    args->calls = take(&at, rows * sizeof(perk_draw_call));
    uint64_t schedule = (uint64_t)(uintptr_t)args->schedule;
    args->slots = (perk_slot *)(uintptr_t)(schedule + many->layout.slots * 8);
    args->tokens = (int32_t *)(uintptr_t)(schedule + many->layout.tokens * 8);
    args->hashes = (perk_page_hash *)(uintptr_t)(schedule + many->layout.hashes * 8);
    args->biases = (perk_draw_bias *)(uintptr_t)(schedule + many->layout.biases * 8);
    return at.next;
}

static perk_status allocate_host(perk_gpu *gpu, struct perk_gpu_many *many, perk_error *err) {
    uint64_t bytes = place_host(many, 0, 0);
    CUdeviceptr mapped = 0;
    perk_status status = perk_gpu_pin(gpu, &many->host, bytes, CU_MEMHOSTALLOC_DEVICEMAP, "requests", err);
    if (status) return status;
    memset(many->host, 0, bytes);
    status = perk_driver_check(gpu->driver, gpu->driver->cuMemHostGetDevicePointer(&mapped, many->host, 0), err,
                               "mapping requests");
    if (!status) place_host(many, (uint64_t)(uintptr_t)many->host, mapped);
    return status;
}

static perk_status allocate_device(perk_gpu *gpu, struct perk_gpu_many *many, perk_error *err) {
    many->device.bytes = place_device(gpu, many, 0);
    perk_status status =
        perk_driver_check(gpu->driver, gpu->driver->cuMemAlloc(&many->device.address, many->device.bytes), err,
                          "reserving %llu bytes for requests", (unsigned long long)many->device.bytes);
    if (status) return status;
    place_device(gpu, many, many->device.address);
    return perk_driver_check(gpu->driver,
                             gpu->driver->cuMemsetD8Async(many->device.address, 0, many->device.bytes, gpu->stream),
                             err, "clearing requests");
}

/* The state before anything has arrived. */
static perk_status upload_schedule(perk_gpu *gpu, struct perk_gpu_many *many, perk_error *err) {
    perk_schedule schedule;
    uint64_t *block = perk_calloc(many->layout.words, sizeof *block);
    if (!block) return perk_fail_memory(err, "the schedule");
    perk_schedule_bind(&schedule, &many->limits, block);
    perk_schedule_begin(&schedule);
    *schedule.secret = many->secret;
    perk_status status = perk_gpu_upload(gpu, (CUdeviceptr)(uintptr_t)many->args.schedule, block,
                                         many->layout.words * sizeof *block, "the schedule", err);
    free(block);
    return status;
}

static void fill_args(const perk_gpu *gpu, const struct perk_gpu_many *many, const perk_gpu_program *p,
                      perk_many_args *args) {
    const perk_plan *plan = p->plan;
    const perk_schedule_limits limits = perk_plan_schedule_limits(plan);
    int counters[PERK_RECORD_WAITS], count = perk_plan_step_end(plan, counters);
    *args = many->args;
    args->batch = many->page_table - p->layout.page_table;
    args->logit_slots = (const int32_t *)(args->schedule + perk_schedule_lay_out(&limits).logit_slots);
    args->picks = (const int32_t *)(uintptr_t)perk_gpu_address(gpu, p, &plan->tensors[perk_plan_picks(plan)]);
    args->logits = (const float *)(uintptr_t)perk_gpu_address(gpu, p, &plan->tensors[perk_plan_picked_logits(plan)]);
    for (int i = 0; i < count; i++) {
        args->end_counter[i] = (uint32_t)counters[i];
        args->end_per_step[i] = (uint32_t)plan->counter_per_step[counters[i]];
    }
    if (p > gpu->programs) args->smaller_tokens = (uint16_t)p[-1].plan->config.max_num_batched_tokens;
    if (p < gpu->largest) args->most_rows = (uint16_t)PERK_MIN(many->limits.logit_rows, (int32_t)UINT16_MAX);
}

static void fill_programs(perk_gpu *gpu, struct perk_gpu_many *many) {
    many->running = gpu->largest;
    for (int i = 0; i < gpu->program_count; i++) {
        many_program *own = &many->own[i];
        uint64_t chunks = perk_plan_chunks(gpu->programs[i].plan);
        own->most_steps = (uint32_t)((UINT64_C(1) << 31) / PERK_MAX(chunks, (uint64_t)4)); /* the ring counts chunks */
        fill_args(gpu, many, &gpu->programs[i], &own->args);
    }
}

perk_status perk_gpu_many_open(perk_gpu *gpu, perk_error *err) {
    struct perk_gpu_many *many = gpu->many = perk_calloc(1, sizeof *many);
    if (!many) return perk_fail_memory(err, "requests");
    many->limits = perk_plan_schedule_limits(gpu->largest->plan);
    many->layout = perk_schedule_lay_out(&many->limits);
    many->owners = perk_calloc((size_t)many->limits.slots, sizeof *many->owners);
    if (!many->owners) return perk_fail_memory(err, "requests");
    perk_status status = perk_page_secret_draw(&many->secret, err);
    if (!status) status = allocate_host(gpu, many, err);
    if (!status) status = allocate_device(gpu, many, err);
    if (!status) status = upload_schedule(gpu, many, err);
    if (!status) fill_programs(gpu, many);
    return status;
}

void perk_gpu_many_close(perk_gpu *gpu) {
    struct perk_gpu_many *many = gpu->many;
    if (!many) return;
    if (many->device.address) gpu->driver->cuMemFree(many->device.address);
    if (many->host) gpu->driver->cuMemFreeHost(many->host);
    free(many->owners);
    free(many);
    gpu->many = NULL;
}

perk_many_args perk_gpu_one_step(const perk_gpu *gpu, const perk_gpu_program *program) {
    perk_many_args args = gpu->many->own[program - gpu->programs].args;
    args.post = NULL;
    args.batch = NULL;
    return args;
}

/* ---- mail ---- */

static void post_mail(struct perk_gpu_many *many, int32_t kind, int32_t slot) {
    many->mails[many->posted & many->args.mail_mask] = (perk_mail){.kind = kind, .slot = slot};
    many->owners[slot].last_mail = ++many->posted;
    store(&many->post->posted, many->posted);
}

/* A slot is free again when its last record was read and the kernel has dealt with all mail about it. */
static int32_t find_slot(const struct perk_gpu_many *many) {
    uint32_t dealt = load(&many->post->dealt);
    for (int32_t slot = 0; slot < many->limits.slots; slot++) {
        const slot_owner *owner = &many->owners[slot];
        if (!owner->taken || (owner->ended && (int32_t)(dealt - owner->last_mail) >= 0)) return slot;
    }
    return -1;
}

static perk_status check_arrival(const struct perk_gpu_many *many, const perk_gpu_arrival *a, int64_t vocab_size,
                                 perk_error *err) {
    if (!a->prompt || a->prompt_length < 1 || a->limit <= a->prompt_length || a->limit > many->limits.positions)
        return perk_fail(err, PERK_INVALID_ARGUMENT,
                         "a prompt of %d tokens that ends at %d: needs at least one token, and an end behind it that "
                         "max_seq_length %d allows",
                         a->prompt_length, a->limit, many->limits.positions);
    if (a->stop_count < 0 || a->stop_count > PERK_STOP_IDS)
        return perk_fail(err, PERK_LIMIT, "%d token ids that end an answer: at most %d can be watched", a->stop_count,
                         (int)PERK_STOP_IDS);
    perk_status status = a->sampling ? perk_sampling_check(a->sampling, (int32_t)vocab_size, err) : PERK_OK;
    if (status) return status;
    for (int32_t i = 0; i < a->prompt_length; i++)
        if (a->prompt[i] < 0 || a->prompt[i] >= vocab_size)
            return perk_fail(err, PERK_INVALID_ARGUMENT,
                             "token %d of the prompt is id %d: outside the vocabulary of %lld", i, a->prompt[i],
                             (long long)vocab_size);
    return PERK_OK;
}

static void write_slot(struct perk_gpu_many *many, int32_t slot, const perk_gpu_arrival *a) {
    perk_slot *r = &many->slots[slot];
    int32_t page_size = many->limits.page_size;
    uint64_t pages = perk_ceil_div((uint64_t)many->limits.positions, (uint64_t)page_size);
    *r = (perk_slot){.state = PERK_SLOT_OPEN,
                     .prompt_length = a->prompt_length,
                     .limit = a->limit,
                     .row = -1,
                     .logit_row = -1,
                     .shares = a->share_prefix,
                     .stop_count = a->stop_count};
    if (a->sampling) {
        r->rule = perk_sampling_rule(a->sampling);
        r->rule.bias_count = perk_sampling_slot_biases(a->sampling, many->biases + (uint64_t)slot * PERK_DRAW_BIASES);
    }
    if (a->stop_count) memcpy(r->stop_ids, a->stop_ids, (size_t)a->stop_count * sizeof *a->stop_ids);
    memcpy(many->tokens + (uint64_t)slot * (uint64_t)many->limits.positions, a->prompt,
           (size_t)a->prompt_length * sizeof *a->prompt);
    if (a->share_prefix)
        r->hash_count = perk_hash_pages(&many->secret, a->prompt, page_size, many->hashes + (uint64_t)slot * pages, 0,
                                        a->prompt_length / page_size);
}

perk_status perk_gpu_many_submit(perk_executor *executor, const perk_gpu_arrival *arrival, int32_t *slot,
                                 perk_error *err) {
    struct perk_gpu_many *many = many_of(executor);
    *slot = -1;
    perk_status status = check_arrival(many, arrival, perk_plan_vocab_size(perk_gpu_plan(executor)), err);
    if (status) return status;
    int32_t found = find_slot(many);
    if (found < 0)
        return perk_fail(err, PERK_LIMIT, "all %d slots hold requests whose end was not read yet", many->limits.slots);
    write_slot(many, found, arrival);
    many->owners[found] = (slot_owner){.taken = true};
    post_mail(many, PERK_MAIL_ARRIVAL, found);
    *slot = found;
    return PERK_OK;
}

void perk_gpu_many_cancel(perk_executor *executor, int32_t slot) {
    struct perk_gpu_many *many = many_of(executor);
    slot_owner *owner = &many->owners[slot];
    if (!owner->taken || owner->ended || owner->cancelled) return;
    owner->cancelled = true;
    post_mail(many, PERK_MAIL_CANCEL, slot);
}

size_t perk_gpu_many_read(perk_executor *executor, perk_token_record *records, perk_draw_record *details, size_t room) {
    struct perk_gpu_many *many = many_of(executor);
    uint32_t written = load(&many->post->written);
    size_t count = 0;
    for (; count < room && many->read != written; count++, many->read++) {
        records[count] = many->records[many->read & many->args.record_mask];
        if (details && records[count].has_details) details[count] = many->details[many->read & many->args.record_mask];
        if (records[count].end != PERK_END_NONE) many->owners[records[count].slot].ended = true;
    }
    store(&many->post->read, many->read);
    return count;
}

void perk_gpu_many_command(perk_executor *executor, uint32_t command) {
    store(&many_of(executor)->post->command, command);
}

/* ---- launches ---- */

/* The smallest program from `first` on whose steps have room for as much. */
static perk_gpu_program *find_program(const perk_gpu *gpu, perk_gpu_program *first, perk_step_size wanted) {
    perk_gpu_program *p = first;
    wanted.logit_rows = PERK_MIN(wanted.logit_rows, gpu->many->limits.logit_rows); /* more, none has */
    for (; p < gpu->largest; p++) {
        const perk_config *config = &p->plan->config;
        if (perk_step_fits(wanted, (perk_step_size){config->max_num_batched_tokens, config->max_num_logit_rows})) break;
    }
    return p;
}

/* With the context current. */
static perk_status begin_launch(perk_gpu *gpu, perk_error *err) {
    struct perk_gpu_many *many = gpu->many;
    const many_program *own = &many->own[many->running - gpu->programs];
    perk_many_args args = own->args;
    uint32_t max_steps = many->options.max_steps;
    args.max_steps = max_steps ? PERK_MIN(max_steps, own->most_steps) : own->most_steps;
    args.idle_limit_ns = (uint64_t)many->options.idle_limit_ms * 1000000u;
    args.dealt = many->post->dealt;
    args.written = many->post->written;
    many->post->end = PERK_LAUNCH_RUNS;
    many->asked = perk_now();
    perk_status status = perk_gpu_launch(gpu, many->running, &args, err);
    many->launched = status == PERK_OK;
    return status;
}

/* Waits; with the context current. */
static perk_status end_launch(perk_gpu *gpu, perk_error *err) {
    struct perk_gpu_many *many = gpu->many;
    const perk_post *post = many->post;
    many->launched = false;
    perk_status status = perk_driver_check(gpu->driver, gpu->driver->cuStreamSynchronize(gpu->stream), err,
                                           "running steps from %u on of the program for %d tokens",
                                           many->running->steps, many->running->plan->config.max_num_batched_tokens);
    if (status || gpu->hang->complete) return status ? status : PERK_HANG;
    switch (post->end) {
    case PERK_LAUNCH_RUNS: return perk_fail(err, PERK_INTERNAL, "the launch ended and did not say why");
    case PERK_LAUNCH_STUCK:
        return perk_fail(err, PERK_INTERNAL, "the kernel found no work among %u unfinished requests", post->unfinished);
    case PERK_LAUNCH_TOKEN:
        return perk_fail(err, PERK_INTERNAL, "step %u picked a token outside the model's vocabulary",
                         many->running->steps + post->steps - 1);
    default: break;
    }
    many->running->steps += post->steps;
    many->steps_before += post->steps;
    return PERK_OK;
}

/* Whether the launch has ended only because its next steps are another program's, which then is the one to launch. */
static bool goes_on(perk_gpu *gpu) {
    struct perk_gpu_many *many = gpu->many;
    const perk_post *post = many->post;
    if (post->end != PERK_LAUNCH_LARGER && post->end != PERK_LAUNCH_SMALLER) return false;
    perk_gpu_program *first = post->end == PERK_LAUNCH_LARGER ? many->running + 1 : gpu->programs;
    many->running = find_program(gpu, PERK_MIN(first, gpu->largest), post->wanted);
    if (many->options.max_steps)
        many->options.max_steps -= post->steps; /* there are some left: that would come first */
    return true;
}

static perk_status check_alive(const perk_gpu *gpu, perk_error *err) {
    if (gpu->failed) *err = gpu->failure;
    return gpu->failed ? gpu->failure.status : PERK_OK;
}

perk_status perk_gpu_many_run(perk_executor *executor, const perk_launch_options *options, perk_gpu_many_result *result,
                              perk_error *err) {
    perk_gpu *gpu = (perk_gpu *)executor;
    perk_error local;
    if (!err) err = &local; /* what closes the executor is kept */
    *result = (perk_gpu_many_result){0};
    perk_status status = check_alive(gpu, err);
    if (status) return status;
    status = perk_gpu_enter(gpu, err);
    uint32_t steps = 0;
    const perk_post *post = gpu->many->post;
    gpu->many->options = *options;
    if (!status) {
        do {
            status = begin_launch(gpu, err);
            if (!status) status = end_launch(gpu, err);
            steps += post->steps;
        } while (!status && goes_on(gpu));
        perk_gpu_leave(gpu);
    }
    if (status) return perk_gpu_fail_step(gpu, gpu->many->running, status, err);
    *result = (perk_gpu_many_result){.end = post->end,
                                     .steps = steps,
                                     .unfinished = post->unfinished,
                                     .undealt = load(&post->posted) - load(&post->dealt)};
    return PERK_OK;
}

/* Between launches. Page tables are of the batch that the kernel makes; the host's schedule has them in its block. */
static perk_status send_schedule(perk_gpu *gpu, const uint64_t *block, perk_error *err) {
    const struct perk_gpu_many *many = gpu->many;
    CUdeviceptr page_table = (CUdeviceptr)(uintptr_t)many->page_table;
    size_t table_bytes = (size_t)many->limits.requests * (size_t)perk_plan_pages_per_request(&gpu->config) * 4;
    perk_status status = perk_gpu_upload(gpu, (CUdeviceptr)(uintptr_t)many->args.schedule, block,
                                         many->layout.words * sizeof *block, "the schedule", err);
    return status ? status
                  : perk_gpu_upload(gpu, page_table, block + many->layout.page_table, table_bytes, "page tables", err);
}

static perk_status fetch_schedule(perk_gpu *gpu, uint64_t *block, perk_error *err) {
    const struct perk_gpu_many *many = gpu->many;
    CUdeviceptr page_table = (CUdeviceptr)(uintptr_t)many->page_table;
    size_t table_bytes = (size_t)many->limits.requests * (size_t)perk_plan_pages_per_request(&gpu->config) * 4;
    CUresult result = gpu->driver->cuMemcpyDtoH(block, (CUdeviceptr)(uintptr_t)many->args.schedule,
                                                many->layout.words * sizeof *block);
    if (result == CUDA_SUCCESS)
        result = gpu->driver->cuMemcpyDtoH(block + many->layout.page_table, page_table, table_bytes);
    return perk_driver_check(gpu->driver, result, err, "copying the schedule");
}

perk_status perk_gpu_many_schedule(perk_executor *executor, uint64_t *block, perk_error *err) {
    perk_gpu *gpu = (perk_gpu *)executor;
    perk_status status = perk_gpu_enter(gpu, err);
    if (status) return status;
    status = fetch_schedule(gpu, block, err);
    perk_gpu_leave(gpu);
    return status;
}

/* ---- online, over a schedule of the host's ---- */

int perk_gpu_many_running(const perk_gpu *gpu, uint32_t *steps) {
    const struct perk_gpu_many *many = gpu->many;
    *steps = many && many->launched ? (uint32_t)(many->post->standing.state.steps - many->steps_before) : 0;
    return many ? (int)(many->running - gpu->programs) : 0;
}

static perk_status begin_online(perk_gpu *gpu, const perk_schedule *schedule, const perk_launch_options *options,
                                perk_error *err) {
    struct perk_gpu_many *many = gpu->many;
    perk_status status = PERK_OK;
    if (schedule) {
        many->post->standing = (perk_standing){*schedule->state, *schedule->pool.state};
        many->running = find_program(gpu, gpu->programs, perk_schedule_demand(schedule));
        status =
            send_schedule(gpu, (const uint64_t *)(const void *)schedule->state, err); /* stands first in the block */
    }
    many->steps_before = many->post->standing.state.steps;
    many->options = *options;
    store(&many->post->command, PERK_COMMAND_NONE);
    return status ? status : begin_launch(gpu, err);
}

static perk_status online_launch(perk_executor *self, const perk_schedule *schedule, const perk_launch_options *options,
                                 perk_error *err) {
    perk_gpu *gpu = (perk_gpu *)self;
    if (schedule && memcmp(&schedule->limits, &gpu->many->limits, sizeof schedule->limits) != 0)
        return perk_fail(err, PERK_INTERNAL, "the schedule has other limits than the program");
    perk_status status = check_alive(gpu, err);
    if (status) return status;
    status = perk_gpu_enter(gpu, err);
    if (status) return status;
    status = begin_online(gpu, schedule, options, err);
    perk_gpu_leave(gpu);
    return status ? perk_gpu_fail_step(gpu, gpu->many->running, status, err) : PERK_OK;
}

/* Whether the launch says that it has ended, or the driver does. */
static bool seems_ended(const perk_gpu *gpu) {
    struct perk_gpu_many *many = gpu->many;
    if (load(&many->post->end) != PERK_LAUNCH_RUNS || load(&gpu->hang->complete)) return true;
    if (perk_now() - many->asked < DRIVER_SECONDS) return false;
    many->asked = perk_now();
    if (perk_gpu_enter(gpu, NULL)) return true;
    CUresult result = gpu->driver->cuStreamQuery(gpu->stream);
    perk_gpu_leave(gpu);
    return result != CUDA_ERROR_NOT_READY;
}

static perk_status online_poll(perk_executor *self, bool *ended, perk_error *err) {
    perk_gpu *gpu = (perk_gpu *)self;
    *ended = !gpu->many->launched || seems_ended(gpu);
    if (!*ended || !gpu->many->launched) return PERK_OK;
    perk_status status = perk_gpu_enter(gpu, err);
    if (!status) {
        status = end_launch(gpu, err);
        *ended = status || !goes_on(gpu);
        if (!*ended) status = begin_launch(gpu, err);
        perk_gpu_leave(gpu);
    }
    return status ? perk_gpu_fail_step(gpu, gpu->many->running, status, err) : PERK_OK;
}

static void online_stop(perk_executor *self) { perk_gpu_many_command(self, PERK_COMMAND_STOP); }

static void online_arrive(perk_executor *self, const perk_schedule *schedule, int32_t slot) {
    struct perk_gpu_many *many = many_of(self);
    const perk_slot *r = &schedule->slots[slot];
    uint64_t positions = (uint64_t)many->limits.positions, pages = (uint64_t)schedule->batch.pages_per_request;
    many->slots[slot] = *r;
    memcpy(many->tokens + (uint64_t)slot * positions, perk_slot_tokens(schedule, slot),
           (size_t)r->prompt_length * sizeof *many->tokens);
    if (r->hash_count)
        memcpy(many->hashes + (uint64_t)slot * pages, perk_slot_hashes(schedule, slot),
               (size_t)r->hash_count * sizeof *many->hashes);
    if (r->rule.bias_count)
        memcpy(many->biases + (uint64_t)slot * PERK_DRAW_BIASES, perk_slot_biases(schedule, slot),
               (size_t)r->rule.bias_count * sizeof *many->biases);
    post_mail(many, PERK_MAIL_ARRIVAL, slot);
}

static void online_cancel(perk_executor *self, int32_t slot) { post_mail(many_of(self), PERK_MAIL_CANCEL, slot); }

static perk_standing online_stand(const perk_executor *self) { return ((const perk_gpu *)self)->many->post->standing; }

/* What the kernel would have done with its mail. */
static void deal_with_mail(struct perk_gpu_many *many, perk_schedule *schedule) {
    uint64_t positions = (uint64_t)many->limits.positions, pages = (uint64_t)schedule->batch.pages_per_request;
    for (; many->post->dealt != many->posted; many->post->dealt++) {
        const perk_mail *mail = &many->mails[many->post->dealt & many->args.mail_mask];
        perk_slot *r = &schedule->slots[mail->slot];
        if (mail->kind == PERK_MAIL_ARRIVAL) {
            *r = many->slots[mail->slot];
            memcpy(perk_slot_tokens(schedule, mail->slot), many->tokens + (uint64_t)mail->slot * positions,
                   (size_t)r->prompt_length * sizeof *many->tokens);
            memcpy(perk_slot_hashes(schedule, mail->slot), many->hashes + (uint64_t)mail->slot * pages,
                   (size_t)r->hash_count * sizeof *many->hashes);
            memcpy(perk_slot_biases(schedule, mail->slot), many->biases + (uint64_t)mail->slot * PERK_DRAW_BIASES,
                   (size_t)r->rule.bias_count * sizeof *many->biases);
            perk_schedule_arrive(schedule, mail->slot);
        } else if (r->state == PERK_SLOT_WAITING || r->state == PERK_SLOT_RUNNING) {
            perk_schedule_cancel(schedule, mail->slot);
        }
    }
}

/* Which slots are free is the host's alone to say. */
static perk_status online_take_back(perk_executor *self, perk_schedule *schedule, perk_error *err) {
    perk_gpu *gpu = (perk_gpu *)self;
    int32_t free_slots = schedule->state->free_slots, *kept = perk_calloc((size_t)schedule->limits.slots, sizeof *kept);
    if (!kept) return perk_fail_memory(err, "the schedule");
    memcpy(kept, schedule->free_slots, (size_t)free_slots * sizeof *kept);
    perk_status status = perk_gpu_many_schedule(self, (uint64_t *)(void *)schedule->state, err);
    if (!status) {
        schedule->state->free_slots = free_slots;
        memcpy(schedule->free_slots, kept, (size_t)free_slots * sizeof *kept);
        for (int32_t i = 0; i < free_slots; i++) schedule->slots[kept[i]].state = PERK_SLOT_FREE;
        deal_with_mail(gpu->many, schedule);
    }
    free(kept);
    return status;
}

const perk_online_type perk_gpu_online = {.launch = online_launch,
                                          .poll = online_poll,
                                          .stop = online_stop,
                                          .arrive = online_arrive,
                                          .cancel = online_cancel,
                                          .read = perk_gpu_many_read,
                                          .stand = online_stand,
                                          .take_back = online_take_back};
