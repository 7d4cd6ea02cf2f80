/* The batch logic (kernels_src/schedule.h) over a fake model whose next token is a hash of the whole text, read back
 * through the pages: every cell of a page holds the hash of all that came before it and of its own token, so that a
 * wrong, stale or doubly owned page shows as a wrong token. Then the pool, the cut of attention, and NVRTC. */
#include "jit/compile.h"
#include "schedule_checks.h"

enum { VOCAB = 50, JOBS = 24, MAX_POSITIONS = 160, SIZES = 3 };

static perk_error err;

/* ---- the fake model ---- */

static uint64_t extend(uint64_t hash, int32_t token) {
    hash = (hash ^ (uint64_t)(token + 1)) * UINT64_C(0x9e3779b97f4a7c15);
    return hash ^ (hash >> 29);
}

static int32_t next_token(uint64_t hash) { return (int32_t)((hash >> 20) % VOCAB); }

typedef struct fake_model {
    perk_schedule s;
    uint64_t *block;
    uint64_t *cells; /* [pages][page_size] */
    int32_t *picks;
    perk_page_hash halves; /* what is left of both halves of hashes, as a mask; not all: the test makes them */
    uint64_t computed;     /* tokens */
    /* Steps of several sizes, which take turns. */
    perk_schedule_limits sizes[SIZES]; /* by rising tokens; the last: of the block */
    int size_count, size;
    perk_spare spare;
    uint64_t larger, smaller, in_vain; /* how often to which; larger ones that had no more to do then */
    uint64_t moved_on;                 /* steps that were foreseen to be the ones before with a token more */
} fake_model;

static void fake_open(fake_model *fake, const perk_schedule_limits *limits) {
    uint64_t words = perk_schedule_lay_out(limits).words;
    *fake = (fake_model){.halves = {UINT64_MAX, UINT64_MAX}};
    fake->block = calloc(words, sizeof *fake->block);
    fake->cells = calloc((size_t)limits->page_count * (size_t)limits->page_size, sizeof *fake->cells);
    fake->picks = calloc((size_t)limits->logit_rows, sizeof *fake->picks);
    CHECK(fake->block && fake->cells && fake->picks);
    fake->sizes[0] = *limits;
    fake->size_count = 1;
    perk_schedule_bind(&fake->s, limits, fake->block);
    perk_schedule_begin(&fake->s);
    *fake->s.secret = (perk_page_secret){{(uint64_t)limits->positions, 5}};
}

static bool is_weak(const fake_model *fake) { return (fake->halves.low & fake->halves.high) != UINT64_MAX; }

static void bind_size(fake_model *fake, int size) {
    int last = fake->size_count - 1;
    perk_schedule_bind(&fake->s, &fake->sizes[size], fake->block);
    fake->s.most_rows = size < last ? fake->sizes[last].logit_rows : 0;
    fake->size = size;
    fake->spare = (perk_spare){0};
}

/* Up to two smaller sizes. */
static void add_sizes(fake_model *fake, random_draws *dice) {
    perk_schedule_limits whole = fake->sizes[0];
    int32_t one = roll(dice, 1, whole.tokens), other = roll(dice, 1, whole.tokens);
    const int32_t tokens[] = {one < other ? one : other, one < other ? other : one, whole.tokens};
    fake->size_count = 0;
    for (int i = 0; i < SIZES; i++) {
        if (i > 0 && tokens[i] == tokens[i - 1]) continue;
        perk_schedule_limits *limits = &fake->sizes[fake->size_count++];
        *limits = whole;
        limits->tokens = tokens[i];
        limits->logit_rows = perk_lesser(tokens[i], whole.logit_rows);
    }
    bind_size(fake, roll(dice, 0, fake->size_count - 1));
}

static void fake_close(fake_model *fake) {
    free(fake->block);
    free(fake->cells);
    free(fake->picks);
}

/* The state moves to another address: nothing in it may know where it was. */
static void fake_move(fake_model *fake) {
    uint64_t words = perk_schedule_lay_out(&fake->sizes[fake->size_count - 1]).words;
    uint64_t *block = malloc(words * sizeof *block);
    perk_spare spare = fake->spare;
    CHECK(block);
    memcpy(block, fake->block, words * sizeof *block);
    memset(fake->block, 0xa5, words * sizeof *block);
    free(fake->block);
    fake->block = block;
    memset(&fake->s, 0xa5, sizeof fake->s);
    bind_size(fake, fake->size);
    fake->spare = spare;
}

static int32_t page_of(const fake_model *fake, int32_t request, int32_t position) {
    const perk_batch *batch = &fake->s.batch;
    int32_t page = batch->page_table[request * batch->pages_per_request + position / fake->s.limits.page_size];
    CHECK(page >= 0 && page < fake->s.limits.page_count);
    return page;
}

static uint64_t *cell_of(const fake_model *fake, int32_t request, int32_t position) {
    int32_t size = fake->s.limits.page_size;
    return &fake->cells[page_of(fake, request, position) * size + position % size];
}

static void compute_token(fake_model *fake, int32_t t) {
    const perk_batch *batch = &fake->s.batch;
    int32_t request = batch->token_request[t], position = batch->positions[t];
    const perk_page *page = &fake->s.pool.pages[page_of(fake, request, position)];
    CHECK(page->owners == 1 && !page->listed, "a shared page is written");
    CHECK(t >= batch->first_token[request] && t < batch->first_token[request] + batch->token_count[request]);
    uint64_t before = position ? *cell_of(fake, request, position - 1) : 1;
    *cell_of(fake, request, position) = extend(before, batch->token_ids[t]);
    fake->computed++;
}

static void compute(fake_model *fake) {
    const perk_batch *batch = &fake->s.batch;
    CHECK(batch->num_tokens <= fake->s.limits.tokens && batch->num_logit_rows <= fake->s.limits.logit_rows);
    for (int32_t t = 0; t < batch->num_tokens; t++) compute_token(fake, t);
    for (int32_t row = 0; row < batch->num_logit_rows; row++) {
        int32_t t = batch->logit_rows[row], request = batch->token_request[t];
        CHECK(batch->positions[t] + 1 == batch->kv_length[request]);
        fake->picks[row] = next_token(*cell_of(fake, request, batch->positions[t]));
    }
}

/* A copy of the state, for steps of so many; to be freed. */
static uint64_t *copy_state(const fake_model *fake, const perk_schedule_limits *limits, perk_schedule *s) {
    uint64_t words = perk_schedule_lay_out(&fake->sizes[fake->size_count - 1]).words;
    uint64_t *block = malloc(words * sizeof *block);
    CHECK(block);
    memcpy(block, fake->block, words * sizeof *block);
    perk_schedule_bind(s, limits, block);
    return block;
}

/* What the largest step would have in place of the one that was filled: in a copy. */
static int32_t tokens_of_largest(const fake_model *fake) {
    perk_schedule s;
    uint64_t *block = copy_state(fake, &fake->sizes[fake->size_count - 1], &s);
    perk_schedule_drop(&s);
    check_schedule(&s, 0);
    perk_schedule_fill(&s);
    int32_t tokens = s.batch.num_tokens;
    free(block);
    return tokens;
}

/* If the batch is for steps of another size, hands the schedule to them: as launches of several programs do. `is_sure`:
 * fill would do the same again, because it took no page that a request was to find. */
static bool hand_over(fake_model *fake, bool is_sure) {
    perk_schedule *s = &fake->s;
    int last = fake->size_count - 1, before = fake->size, size = 0;
    int32_t most = tokens_of_largest(fake), tokens = s->batch.num_tokens;
    CHECK(!is_sure || (s->is_short ? most >= tokens && before < last : most == tokens),
          "%d tokens, and %d of the largest", tokens, most);
    fake->in_vain += is_sure && s->is_short && most == tokens;
    int32_t verdict = perk_schedule_judge_size(s, before ? fake->sizes[before - 1].tokens : 0, &fake->spare);
    if (verdict == PERK_SIZE_FITS) return false;
    perk_schedule_drop(s);
    perk_step_size wanted = verdict == PERK_SIZE_LARGER ? perk_schedule_demand(s) : fake->spare.most;
    if (verdict == PERK_SIZE_LARGER) size = before + 1;
    while (size < last &&
           !perk_step_fits(wanted, (perk_step_size){fake->sizes[size].tokens, fake->sizes[size].logit_rows}))
        size++;
    CHECK(verdict == PERK_SIZE_LARGER ? size > before : size < before);
    fake->larger += size > before;
    fake->smaller += size < before;
    bind_size(fake, size);
    return true;
}

static void fill(fake_model *fake) {
    const perk_schedule *schedule = &fake->s;
    int32_t running;
    uint64_t evictions;
    do {
        running = schedule->state->running;
        evictions = schedule->pool.state->evictions;
        perk_schedule_fill(&fake->s);
    } while (fake->size_count > 1 && schedule->state->unfinished &&
             hand_over(fake, schedule->pool.state->evictions == evictions));
    check_schedule(schedule, 0);
    if (schedule->state->unfinished == 0)
        CHECK(schedule->batch.num_tokens == 0);
    else
        CHECK(schedule->slots[schedule->order[0]].scheduled > 0, "the oldest request does not proceed");
    if (schedule->state->running <= running) return;
    const perk_slot *newest = &schedule->slots[schedule->order[schedule->state->running - 1]];
    CHECK(perk_pieces(newest->length, schedule->limits.page_size) - newest->page_count <= schedule->pool.state->unused,
          "a request was admitted whose pages cannot be had");
}

/* Whether the next step is foreseen to be this one moved on, as kernels_src/many_steps.cuh does it. (Weak hashes are
 * offered though their requests share nothing.) */
static bool moves_on(const fake_model *fake) {
    const perk_schedule *s = &fake->s;
    int32_t running = s->state->running;
    bool moves = !is_weak(fake) && s->batch.num_tokens == running && s->batch.num_logit_rows == running &&
                 !perk_schedule_may_admit(s);
    for (int32_t place = 0; moves && place < running; place++)
        moves = perk_slot_goes_on(&s->slots[s->order[place]], s->limits.page_size);
    return moves;
}

/* That it is, in a copy. */
static void check_moved_on(const fake_model *fake) {
    const perk_batch *old = &fake->s.batch;
    perk_schedule s;
    uint64_t *block = copy_state(fake, &fake->s.limits, &s);
    s.most_rows = fake->s.most_rows;
    perk_schedule_fill(&s);
    size_t table_words = (size_t)s.limits.requests * (size_t)s.batch.pages_per_request;
    CHECK(s.batch.num_tokens == old->num_tokens && s.batch.num_logit_rows == old->num_logit_rows);
    CHECK(memcmp(s.batch.page_table, old->page_table, table_words * sizeof(int32_t)) == 0);
    for (int32_t t = 0; t < old->num_tokens; t++)
        CHECK(s.batch.token_request[t] == old->token_request[t] && s.batch.positions[t] == old->positions[t] + 1 &&
                  s.batch.token_ids[t] == fake->picks[t] && s.batch.logit_rows[t] == old->logit_rows[t],
              "token %d", t);
    free(block);
}

static void commit(fake_model *fake) {
    uint64_t finished = fake->s.state->finished;
    bool moves = moves_on(fake);
    perk_schedule_commit(&fake->s, fake->picks);
    check_schedule(&fake->s, 0);
    if (!moves || fake->s.state->finished != finished) return;
    check_moved_on(fake);
    fake->moved_on++;
}

static void step(fake_model *fake) {
    fill(fake);
    compute(fake);
    commit(fake);
}

/* ---- requests ---- */

typedef struct test_job {
    int32_t prompt[MAX_POSITIONS], answer[MAX_POSITIONS]; /* answer: what it gets alone */
    int32_t prompt_length, answer_length, limit, stop;
    int32_t slot, end;
    bool is_alone, is_late; /* it shares no pages; nobody hashes its prompt when it arrives */
    bool cancelled, done;
} test_job;

/* What the request gets alone. */
static void expect_answer(test_job *job) {
    uint64_t hash = 1;
    for (int32_t i = 0; i < job->prompt_length; i++) hash = extend(hash, job->prompt[i]);
    job->end = PERK_END_LENGTH;
    for (job->answer_length = 0; job->prompt_length + job->answer_length < job->limit;) {
        int32_t token = next_token(hash);
        job->answer[job->answer_length++] = token;
        hash = extend(hash, token);
        if (token != job->stop) continue;
        job->end = PERK_END_STOP;
        break;
    }
}

/* Hashes that the schedule does not make by itself: of all tokens that are known by now. */
static void extend_weak_hashes(fake_model *fake, const test_job *job) {
    perk_slot *r = &fake->s.slots[job->slot];
    perk_page_hash *hashes = perk_slot_hashes(&fake->s, job->slot);
    int32_t size = fake->s.limits.page_size;
    if (!is_weak(fake) || job->is_alone) return;
    for (; r->hash_count < r->length / size; r->hash_count++) {
        uint64_t hash = r->hash_count ? hashes[r->hash_count - 1].low | hashes[r->hash_count - 1].high : 77;
        for (int32_t i = 0; i < size; i++)
            hash = extend(hash, perk_slot_tokens(&fake->s, job->slot)[r->hash_count * size + i]);
        hashes[r->hash_count] = (perk_page_hash){hash & fake->halves.low, hash & fake->halves.high};
    }
}

/* Every page that the request has written was hashed, and as one hashes it alone. */
static void check_hashes(const fake_model *fake, const test_job *job) {
    const perk_slot *r = &fake->s.slots[job->slot];
    perk_page_hash hashes[MAX_POSITIONS];
    int32_t size = fake->s.limits.page_size;
    if (is_weak(fake)) return;
    CHECK(job->is_alone ? r->hash_count == 0 : job->cancelled || r->hash_count >= (r->length - 1) / size);
    perk_hash_pages(fake->s.secret, perk_slot_tokens(&fake->s, job->slot), size, hashes, 0, r->hash_count);
    CHECK(memcmp(hashes, perk_slot_hashes(&fake->s, job->slot), (size_t)r->hash_count * sizeof *hashes) == 0);
}

static bool arrive(fake_model *fake, test_job *job) {
    job->slot = perk_schedule_open(&fake->s);
    if (job->slot < 0) return false;
    perk_slot *r = &fake->s.slots[job->slot];
    r->prompt_length = job->prompt_length;
    r->limit = job->limit;
    if (job->stop >= 0) r->stop_ids[r->stop_count++] = VOCAB + 1;
    if (job->stop >= 0) r->stop_ids[r->stop_count++] = job->stop;
    memcpy(perk_slot_tokens(&fake->s, job->slot), job->prompt, (size_t)job->prompt_length * sizeof(int32_t));
    r->shares = !is_weak(fake) && !job->is_alone;
    if (!job->is_late) perk_slot_hash(&fake->s, job->slot, job->prompt_length / fake->s.limits.page_size);
    perk_schedule_arrive(&fake->s, job->slot);
    extend_weak_hashes(fake, job);
    return true;
}

/* Half of the prompts go on from what another request said or was asked. */
static void make_job(test_job *job, const test_job *others, int count, int32_t positions, random_draws *dice) {
    const test_job *like = count && roll(dice, 0, 1) ? &others[roll(dice, 0, count - 1)] : NULL;
    int32_t most = positions - 1 < 90 ? positions - 1 : 90;
    *job = (test_job){
        .slot = -1, .stop = roll(dice, 0, 2) ? -1 : roll(dice, 0, VOCAB - 1), .is_late = roll(dice, 0, 9) == 0};
    job->prompt_length = roll(dice, 1, most);
    for (int32_t i = 0; i < job->prompt_length; i++) job->prompt[i] = roll(dice, 0, VOCAB - 1);
    if (like) {
        int32_t alike = roll(dice, 0, like->prompt_length + like->answer_length);
        if (roll(dice, 0, 2) == 0) job->prompt_length = alike < 1 ? 1 : alike < most ? alike : most;
        for (int32_t i = 0; i < alike && i < job->prompt_length; i++)
            job->prompt[i] = i < like->prompt_length ? like->prompt[i] : like->answer[i - like->prompt_length];
    }
    int32_t room = positions - job->prompt_length;
    job->limit = job->prompt_length + roll(dice, 1, roll(dice, 0, 1) && room > 20 ? 20 : room);
    expect_answer(job);
}

static void finish_job(fake_model *fake, test_job *job) {
    const perk_slot *r = &fake->s.slots[job->slot];
    const int32_t *answer = perk_slot_tokens(&fake->s, job->slot) + job->prompt_length;
    int32_t count = r->length - job->prompt_length;
    CHECK(r->state == PERK_SLOT_FINISHED && r->end == (job->cancelled ? PERK_END_CANCELLED : job->end), "end %d",
          r->end);
    CHECK(job->cancelled ? count <= job->answer_length : count == job->answer_length, "%d tokens", count);
    CHECK(memcmp(answer, job->answer, (size_t)count * sizeof *answer) == 0, "a wrong token");
    check_hashes(fake, job);
    perk_schedule_close(&fake->s, job->slot);
    job->done = true;
}

/* ---- random runs ---- */

typedef struct test_totals {
    uint64_t steps, tokens, found, set_backs, evictions, cancelled, larger, smaller, in_vain, moved_on;
} test_totals;

static perk_schedule_limits random_limits(random_draws *dice) {
    perk_schedule_limits limits = {.page_size = 1 << roll(dice, 0, 6)};
    limits.tokens = roll(dice, 1, roll(dice, 0, 1) ? 8 : 70);
    limits.requests = roll(dice, 1, limits.tokens < 8 ? limits.tokens : 8);
    limits.logit_rows = roll(dice, 1, limits.requests);
    limits.slots = limits.requests + roll(dice, 0, 6);
    limits.positions = roll(dice, 2, MAX_POSITIONS);
    int32_t each = perk_pieces(limits.positions, limits.page_size);
    limits.page_count = each + roll(dice, 0, each * (roll(dice, 0, 2) ? 1 : 4));
    return limits;
}

static void disturb(fake_model *fake, test_job *jobs, int arrived, random_draws *dice) {
    test_job *job = arrived ? &jobs[roll(dice, 0, arrived - 1)] : NULL;
    if (job && !job->done && fake->s.slots[job->slot].state != PERK_SLOT_FINISHED && roll(dice, 0, 50) == 0) {
        job->cancelled = true;
        perk_schedule_cancel(&fake->s, job->slot);
    }
    if (roll(dice, 0, 40) == 0) {
        int32_t pages[5 * MAX_POSITIONS], count = roll(dice, 0, fake->s.limits.page_count);
        CHECK(perk_schedule_borrow(&fake->s, count, pages));
        check_schedule(&fake->s, count);
        perk_schedule_return(&fake->s, pages, count);
    }
    check_schedule(&fake->s, 0);
}

static void run_random(uint64_t seed, test_totals *totals) {
    random_draws dice = {.seed = seed};
    perk_schedule_limits limits = random_limits(&dice);
    fake_model fake;
    fake_open(&fake, &limits);
    if (seed % 8 == 1) fake.halves.low = 3; /* many texts share one half of their hashes, and it must not be enough */
    if (seed % 8 == 2) fake.halves.high = 0;
    if (seed % 3 == 2) add_sizes(&fake, &dice);
    static test_job jobs[JOBS];
    int arrived = 0, done = 0, made = 0, haste = roll(&dice, 0, 4);
    for (int steps = 0; done < JOBS; steps++) {
        CHECK(steps < 100000, "no end");
        while (arrived < JOBS && roll(&dice, 0, haste) == 0) {
            if (made == arrived) make_job(&jobs[made], jobs, made, limits.positions, &dice), made++;
            jobs[arrived].is_alone = seed % 16 == 0;
            if (!arrive(&fake, &jobs[arrived])) break;
            arrived++;
        }
        disturb(&fake, jobs, arrived, &dice);
        fill(&fake);
        compute(&fake);
        if (roll(&dice, 0, 9) == 0) disturb(&fake, jobs, arrived, &dice);
        commit(&fake);
        for (int i = 0; i < arrived; i++) {
            if (jobs[i].done) continue;
            if (roll(&dice, 0, 9)) extend_weak_hashes(&fake, &jobs[i]); /* late at times */
            if (fake.s.slots[jobs[i].slot].state == PERK_SLOT_FINISHED) {
                finish_job(&fake, &jobs[i]);
                totals->cancelled += jobs[i].cancelled;
                done++;
            }
        }
        if (roll(&dice, 0, 30) == 0) fake_move(&fake);
    }
    CHECK(fake.s.state->unfinished == 0 && fake.s.pool.state->unused == limits.page_count);
    totals->steps += fake.s.state->steps;
    totals->tokens += fake.computed;
    totals->found += fake.s.state->found_tokens;
    totals->set_backs += fake.s.state->set_backs;
    totals->evictions += fake.s.pool.state->evictions;
    totals->larger += fake.larger;
    totals->smaller += fake.smaller;
    totals->in_vain += fake.in_vain;
    totals->moved_on += fake.moved_on;
    fake_close(&fake);
}

static void test_random(void) {
    const char *text = getenv("PERK_TEST_RUNS");
    uint64_t runs = text ? strtoull(text, NULL, 10) : 2000;
    test_totals t = {0};
    for (uint64_t seed = 0; seed < runs; seed++) run_random(seed, &t);
    fprintf(stderr,
            "%llu runs: %llu steps (%llu moved on), %llu tokens computed, %llu found, %llu set back, %llu evicted, "
            "%llu cancelled; %llu times to larger steps (%llu in vain), %llu to smaller ones\n",
            (unsigned long long)runs, (unsigned long long)t.steps, (unsigned long long)t.moved_on,
            (unsigned long long)t.tokens, (unsigned long long)t.found, (unsigned long long)t.set_backs,
            (unsigned long long)t.evictions, (unsigned long long)t.cancelled, (unsigned long long)t.larger,
            (unsigned long long)t.in_vain, (unsigned long long)t.smaller);
    CHECK(runs < 100 || (t.found && t.set_backs && t.evictions && t.cancelled && t.larger && t.smaller && t.moved_on),
          "the runs were too tame");
    CHECK(t.in_vain * 20 <= t.larger, "larger steps have nothing more to do");
}

/* ---- sharing, step by step ---- */

static const perk_schedule_limits SMALL = {
    .slots = 4, .tokens = 16, .requests = 4, .logit_rows = 4, .positions = 64, .page_size = 8, .page_count = 24};

/* A prompt of 0, 1, 2, ... that answers `answer` tokens. */
static test_job counting_job(int32_t prompt, int32_t answer) {
    test_job job = {.prompt_length = prompt, .limit = prompt + answer, .stop = -1};
    for (int32_t i = 0; i < prompt; i++) job.prompt[i] = i % VOCAB;
    expect_answer(&job);
    return job;
}

/* Runs until all is finished, and returns how many tokens were computed. */
static uint64_t run_job(fake_model *fake, test_job *job) {
    uint64_t before = fake->computed;
    CHECK(arrive(fake, job));
    while (fake->s.state->unfinished) {
        step(fake);
        extend_weak_hashes(fake, job);
    }
    finish_job(fake, job);
    return fake->computed - before;
}

static void test_sharing(void) {
    fake_model fake;
    fake_open(&fake, &SMALL);
    test_job first = counting_job(32, 4), again = first, longer = counting_job(40, 4), off = counting_job(32, 4);
    CHECK(run_job(&fake, &first) == 35); /* the last token of an answer is never read */
    CHECK(fake.s.pool.state->listed == 4);
    /* All four pages of the prompt are there, and the last one is computed nevertheless: its logits are wanted. */
    CHECK(run_job(&fake, &again) == 8 + 3);
    CHECK(run_job(&fake, &longer) == 8 + 3);
    off.prompt[9]++; /* differs in the second page */
    expect_answer(&off);
    CHECK(run_job(&fake, &off) == 24 + 3);
    CHECK(fake.s.state->found_tokens == 24 + 32 + 8);
    /* The answer is shared as well: a conversation goes on where it was. */
    test_job talk = counting_job(30, 20), next = {.stop = -1};
    run_job(&fake, &talk);
    memcpy(next.prompt, talk.prompt, 30 * sizeof(int32_t));
    memcpy(next.prompt + 30, talk.answer, 20 * sizeof(int32_t));
    next.prompt[50] = next.prompt[51] = 3;
    next.prompt_length = 52;
    next.limit = 54;
    expect_answer(&next);
    CHECK(run_job(&fake, &next) == 52 - 48 + 1);
    fake_close(&fake);
}

/* Texts whose hashes are alike in one half, as somebody may construct them for a hash of 64 bits: neither finds the
 * pages of the other. */
static void test_collisions(void) {
    static const perk_page_hash halves[] = {{0, UINT64_MAX}, {UINT64_MAX, 0}};
    for (int i = 0; i < 2; i++) {
        fake_model fake;
        fake_open(&fake, &SMALL);
        fake.halves = halves[i];
        test_job first = counting_job(32, 4), other = first, again = first;
        for (int t = 0; t < 32; t++) other.prompt[t] = 49 - t;
        expect_answer(&other);
        CHECK(run_job(&fake, &first) == 35 && run_job(&fake, &other) == 35);
        CHECK(fake.s.pool.state->listed == 8 && fake.s.state->found_tokens == 0);
        CHECK(run_job(&fake, &again) == 8 + 3);
        fake_close(&fake);
    }
}

/* Four with the same prompt, at once: it is computed once, but for what is not a full page. */
static void test_sharing_at_once(void) {
    fake_model fake;
    fake_open(&fake, &SMALL);
    test_job jobs[4];
    for (int i = 0; i < 4; i++) {
        jobs[i] = counting_job(45, 6);
        CHECK(arrive(&fake, &jobs[i]));
    }
    while (fake.s.state->unfinished) step(&fake);
    for (int i = 0; i < 4; i++) finish_job(&fake, &jobs[i]);
    CHECK(fake.computed <= 45 + 3 * 8 + 3 * 5 + 4 * 5, "%d tokens computed", (int)fake.computed);
    fake_close(&fake);
}

/* What begins a text outlives what follows it; what was used long ago goes first. */
static void test_eviction(void) {
    perk_schedule_limits limits = SMALL;
    limits.page_count = 9;
    fake_model fake;
    fake_open(&fake, &limits);
    test_job old = counting_job(32, 1), other = counting_job(33, 1), big = counting_job(24, 1);
    for (int i = 0; i < 33; i++) other.prompt[i] = 49 - i;
    for (int i = 0; i < 24; i++) big.prompt[i] = 7;
    expect_answer(&other);
    expect_answer(&big);
    CHECK(run_job(&fake, &old) == 32 && run_job(&fake, &other) == 33);
    CHECK(fake.s.pool.state->evictions == 0 && fake.s.pool.state->listed == 8);
    CHECK(run_job(&fake, &big) == 24); /* the empty page, then the end of the oldest text */
    CHECK(fake.s.pool.state->evictions == 2);
    test_job again = counting_job(32, 1);
    CHECK(run_job(&fake, &again) == 32 - 16);
    fake_close(&fake);
}

/* Two that fit together only while they are short: the newer one is set back, and finds its pages again. */
static void test_set_back(void) {
    perk_schedule_limits limits = SMALL;
    limits.page_count = 11;
    fake_model fake;
    fake_open(&fake, &limits);
    test_job older = counting_job(20, 40), newer = counting_job(20, 30);
    for (int i = 0; i < 20; i++) newer.prompt[i] = 30;
    expect_answer(&newer);
    CHECK(arrive(&fake, &older) && arrive(&fake, &newer));
    while (fake.s.state->unfinished) step(&fake);
    CHECK(fake.s.state->set_backs > 0 && fake.s.slots[older.slot].set_backs == 0);
    CHECK(fake.s.slots[newer.slot].found > 16, "of its answer, it found nothing");
    finish_job(&fake, &older);
    finish_job(&fake, &newer);
    fake_close(&fake);
}

/* There is no room for a second one, until the first has written what both begin with. */
static void test_room_by_sharing(void) {
    perk_schedule_limits limits = SMALL;
    limits.page_count = 8;
    fake_model fake;
    fake_open(&fake, &limits);
    test_job first = counting_job(41, 7), second = counting_job(53, 3);
    CHECK(arrive(&fake, &first) && arrive(&fake, &second));
    for (int steps = 0; steps < 3; steps++) step(&fake);
    CHECK(fake.s.state->running == 1 && fake.s.batch.num_tokens < 16, "the second one was to be refused");
    step(&fake);
    CHECK(fake.s.state->running == 2 && fake.s.slots[second.slot].found == 40);
    while (fake.s.state->unfinished) step(&fake);
    finish_job(&fake, &first);
    finish_job(&fake, &second);
    CHECK(fake.s.state->set_backs == 0);
    fake_close(&fake);
}

static void test_slots(void) {
    fake_model fake;
    fake_open(&fake, &SMALL);
    test_job jobs[5];
    for (int i = 0; i < 5; i++) jobs[i] = counting_job(3, 9);
    for (int i = 0; i < 4; i++) CHECK(arrive(&fake, &jobs[i]));
    CHECK(!arrive(&fake, &jobs[4]));
    step(&fake);
    perk_schedule_cancel(&fake.s, jobs[2].slot);
    perk_schedule_close(&fake.s, jobs[2].slot);
    CHECK(arrive(&fake, &jobs[4]));
    while (fake.s.state->unfinished) step(&fake);
    CHECK(fake.s.state->finished == 5 && perk_schedule_borrow(&fake.s, -1, NULL) == 0);
    CHECK(!perk_schedule_borrow(&fake.s, 25, NULL));
    fake_close(&fake);
}

/* ---- the pool: a table as full as it gets, with hashes that collide ---- */

static void test_pool(void) {
    enum { PAGES = 13, ROUNDS = 20000 };
    perk_page pages[PAGES] = {{.owners = 0}};
    perk_pool_state state = {0};
    int32_t table[32] = {0}, held[PAGES] = {0}, taken = 0;
    perk_pool pool = {&state, pages, table, PAGES, (int32_t)perk_pool_table_size(PAGES) - 1};
    random_draws dice = {.seed = 5};
    CHECK(pool.table_mask == 31);
    perk_pool_begin(&pool);
    for (int32_t page = 0; page < PAGES; page++) CHECK(perk_pool_take(&pool) == page);
    CHECK(perk_pool_take(&pool) == -1);
    for (int32_t page = 0; page < PAGES; page++) CHECK(perk_pool_give(&pool, page));
    CHECK(!perk_pool_give(&pool, 3) && !perk_pool_give(&pool, -1) && !perk_pool_give(&pool, PAGES));
    for (int round = 0; round < ROUNDS; round++) {
        perk_page_hash hash = {(uint64_t)roll(&dice, 29, 33), (uint64_t)roll(&dice, 0, 40)};
        int32_t page = perk_pool_find(&pool, hash);
        if (page >= 0) CHECK(pages[page].listed && perk_page_hash_equal(pages[page].hash, hash));
        if (page >= 0 && roll(&dice, 0, 1)) {
            perk_pool_share(&pool, page);
            taken += held[page]++ == 0;
        } else if (roll(&dice, 0, 1) && (page = perk_pool_take(&pool)) >= 0) {
            CHECK(held[page] == 0 && !pages[page].listed);
            taken += held[page]++ == 0;
            if (roll(&dice, 0, 3)) CHECK(perk_pool_list(&pool, page, hash) == pages[page].listed);
        }
        page = roll(&dice, 0, PAGES - 1);
        CHECK(perk_pool_give(&pool, page) == (held[page] > 0));
        if (held[page] > 0) taken -= --held[page] == 0;
        CHECK(state.unused == PAGES - taken);
        for (int32_t p = 0; p < PAGES; p++) {
            CHECK(pages[p].owners == held[p]);
            if (pages[p].listed) CHECK(perk_pool_find(&pool, pages[p].hash) == p, "page %d cannot be found", p);
        }
    }
    CHECK(state.evictions > 100);
}

/* ---- the cut of attention ---- */

/* As simple as can be: lengthen the pieces until there are few enough. */
static int32_t expected_piece(const perk_attention_cut *cut) {
    int64_t cached = 0;
    int64_t most = cut->warps; /* but those that have what the step adds */
    for (int32_t i = 0; i < cut->tile_count; i++) {
        if (cut->tiles[i].first_fresh_item >= 0) cached += cut->tiles[i].fresh_position;
        most -= perk_query_tile_fresh_items(&cut->tiles[i]);
    }
    if (cached > 4 * PERK_KV_UNIT * cut->pieces || most < cut->pieces) most = cut->pieces;
    for (int32_t units = 1;; units++) {
        int64_t items = 0;
        for (int32_t i = 0; i < cut->tile_count; i++)
            if (cut->tiles[i].first_fresh_item >= 0)
                items += perk_pieces(cut->tiles[i].fresh_position, units * PERK_KV_UNIT);
        if (items <= most || items <= cut->tile_count || units * PERK_KV_UNIT >= cut->max_positions)
            return units * PERK_KV_UNIT;
    }
}

static void random_batch(perk_batch *batch, int32_t max_requests, int32_t max_positions, random_draws *dice) {
    int32_t ids[16] = {0};
    batch->num_tokens = batch->num_requests = batch->num_logit_rows = 0;
    for (int32_t request = roll(dice, 0, max_requests - 1); request >= 0; request--) { /* any order of rows */
        int32_t count = roll(dice, 0, 2) ? 1 : roll(dice, 1, 16);
        int32_t position = roll(dice, 0, roll(dice, 0, 1) ? max_positions - count : 40);
        if (batch->num_tokens + count <= 64) perk_batch_put(batch, request, ids, count, position, 1);
    }
}

static void test_attention(void) {
    enum { TOKENS = 64, REQUESTS = 20, POSITIONS = 9000, ITEMS = 64 * 5 + 200, SLICE = 16 };
    int32_t words[4][TOKENS], requests[3][REQUESTS], tile_of[TOKENS];
    static perk_query_tile tiles[TOKENS];
    static perk_attention_item items[ITEMS];
    perk_batch batch = {.token_ids = words[0],
                        .positions = words[1],
                        .token_request = words[2],
                        .logit_rows = words[3],
                        .first_token = requests[0],
                        .token_count = requests[1],
                        .kv_length = requests[2]};
    random_draws dice = {.seed = 9};
    for (int run = 0; run < 3000; run++) {
        random_batch(&batch, REQUESTS, POSITIONS, &dice);
        perk_attention_cut cut = {.tokens_per_tile = roll(&dice, 1, 8),
                                  .max_positions = POSITIONS,
                                  .prompt_slice = run % 2 ? SLICE : 0,
                                  .warps = roll(&dice, 50, 200),
                                  .pieces = roll(&dice, 1, 50),
                                  .max_items = ITEMS,
                                  .tiles = tiles,
                                  .items = items,
                                  .token_query_tile = tile_of};
        perk_cut_attention(&batch, &cut);
        CHECK(cut.item_count <= cut.max_items, "%d items", cut.item_count);
        int32_t piece = expected_piece(&cut), item = 0, fresh_item = 0;
        for (int32_t i = 0; i < cut.tile_count; i++) fresh_item += tiles[i].item_count;
        for (int32_t i = 0; i < cut.tile_count; i++) {
            const perk_query_tile *tile = &tiles[i];
            int32_t end = perk_query_tile_length(&batch, tile), last_token = tile->first_token + tile->token_count - 1;
            bool is_prompt = run % 2 && batch.token_count[tile->request] >= PERK_PROMPT_TOKENS;
            CHECK(tile->first_item == item && (tile->first_fresh_item < 0) == is_prompt);
            CHECK(is_prompt ? tile->first_token / SLICE == last_token / SLICE
                            : tile->token_count <= cut.tokens_per_tile && tile->first_fresh_item == fresh_item);
            int32_t begin = is_prompt ? end : 0;
            for (int32_t j = 0; j < tile->item_count; j++, item++) {
                CHECK(items[item].query_tile == i && items[item].kv_begin == begin);
                begin = perk_lesser(begin + piece, tile->fresh_position);
                CHECK(items[item].kv_end == begin, "a piece of %d instead of %d", items[item].kv_end, begin);
            }
            CHECK(is_prompt || begin == tile->fresh_position);
            for (int32_t j = 0; j < perk_query_tile_fresh_items(tile); j++, fresh_item++) {
                CHECK(items[fresh_item].query_tile == i && items[fresh_item].kv_begin == begin);
                begin = perk_lesser(begin + PERK_KV_UNIT, end);
                CHECK(items[fresh_item].kv_end == begin);
            }
            CHECK(begin == end && batch.token_request[tile->first_token] == tile->request);
            CHECK(tile->fresh_token == batch.first_token[tile->request]);
            CHECK(tile->fresh_position == batch.positions[tile->fresh_token]);
        }
        CHECK(fresh_item == cut.item_count);
        for (int32_t t = 0; t < batch.num_tokens; t++)
            CHECK(t >= tiles[tile_of[t]].first_token &&
                  t < tiles[tile_of[t]].first_token + tiles[tile_of[t]].token_count);
    }
}

/* ---- as device code ---- */

static const char DEVICE_SOURCE[] =
    "#include \"schedule.h\"\n"
    "extern \"C\" __global__ void between_steps(perk_schedule_limits limits, uint64_t *block, const int32_t *picks,\n"
    "                                         perk_attention_cut cut, int32_t *pages) {\n"
    "    perk_schedule s;\n"
    "    perk_schedule_bind(&s, &limits, block);\n"
    "    if (pages[0] == 0) perk_schedule_begin(&s);\n"
    "    int32_t slot = perk_schedule_open(&s);\n"
    "    if (slot >= 0) perk_schedule_arrive(&s, slot);\n"
    "    perk_schedule_commit(&s, picks);\n"
    "    perk_schedule_cancel(&s, pages[1]);\n"
    "    perk_schedule_close(&s, pages[1]);\n"
    "    if (perk_schedule_borrow(&s, 2, pages)) perk_schedule_return(&s, pages, 2);\n"
    "    perk_schedule_fill(&s);\n"
    "    perk_cut_attention(&s.batch, &cut);\n"
    "    pages[2] = cut.item_count;\n"
    "}\n";

static void test_nvrtc(void) {
    static const char *const names[] = {"abi.h",   "shared_code.h", "draw.h",    "page_hash.h",
                                        "pages.h", "step.h",        "schedule.h"};
    perk_compile_header headers[PERK_COUNT(names)];
    perk_nvrtc *nvrtc;
    if (perk_nvrtc_open(&nvrtc, NULL, &err) != PERK_OK) {
        fprintf(stderr, "not compiled as device code: %s\n", err.message);
        return;
    }
    for (size_t i = 0; i < PERK_COUNT(names); i++) {
        char path[600], *text;
        size_t size;
        snprintf(path, sizeof path, "%s/kernels_src/%s", PERK_SOURCE_DIR, names[i]);
        CHECK_OK(perk_read_file(path, 1 << 20, &text, &size, &err));
        headers[i] = (perk_compile_header){names[i], text};
    }
    perk_compile_request request = {.source = DEVICE_SOURCE,
                                    .name = "schedule.cu",
                                    .headers = headers,
                                    .header_count = PERK_COUNT(headers),
                                    .arch = "sm_90a"};
    perk_compile_result result;
    CHECK_OK(perk_compile(nvrtc, &request, &result, &err));
    fprintf(stderr, "as device code: %zu bytes for sm_90a, %.0f ms\n", result.cubin_size, result.milliseconds);
    CHECK(result.cubin_size > 1000);
    perk_compile_result_free(&result);
    for (size_t i = 0; i < PERK_COUNT(names); i++) free((void *)(uintptr_t)headers[i].text);
    perk_nvrtc_free(nvrtc);
}

int main(void) {
    test_pool();
    test_attention();
    test_slots();
    test_sharing();
    test_collisions();
    test_sharing_at_once();
    test_eviction();
    test_set_back();
    test_room_by_sharing();
    test_random();
    test_nvrtc();
    return 0;
}
