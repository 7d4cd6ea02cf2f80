/* perk bench serve: one thread submits what arrives, whether earlier requests are done or not, and another waits for
 * the descriptor and reads answers. The service tells of every token twice, to its callback and to the reader, and the
 * two must agree before a request is released. */
#include "bench_serve.h"

#include <errno.h>
#include <math.h>
#include <poll.h>
#include <pthread.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum { TOKENS_A_POLL = 64, NEWS_A_CALL = 64, LONGEST_SLEEP_MS = 50, LONGEST_SILENCE_S = 300 };

/* What one of the two listeners got of a request. */
typedef struct heard_tokens {
    uint64_t hash;
    int32_t count;
    perk_finish finish;
} heard_tokens;

typedef struct serve_track {
    uint64_t id; /* the service's number; 0: a free place */
    size_t request;
    heard_tokens heard, read; /* by the callback, and by the reader */
    double last;              /* when the reader got its last token */
    bool cancelled;
} serve_track;

struct perk_serve_run {
    perk_serve_plan *plan;
    perk_service *service;
    int32_t vocab;
    bool may_refuse;
    int32_t *prompt;      /* [longest_prompt] of the submitter */
    pthread_mutex_t lock; /* guards all below. Taken before the service's own, which does not hold its own for us */
    serve_track *tracks;  /* [places] open addressing by id; nothing is removed */
    size_t places;
    size_t open; /* requests that are not settled */
    bool all_submitted;
    double begin, end; /* perk_now(): of the first arrival, at the last token */
    double service_cpu, reader_cpu;
    perk_serve_result *result;
    perk_error failure;
};

/* ---- times ---- */

static const double BUCKET = 0.001998002662673056; /* log(1.002): the step from one bucket to the next */

static void add_time(perk_serve_times *times, double ms) {
    double bucket = log(fmax(ms * 1e3, 1)) / BUCKET;
    times->counts[(size_t)fmin(bucket, PERK_SERVE_BUCKETS - 1)]++;
    times->total++;
}

double perk_serve_quantile(const perk_serve_times *times, double part) {
    uint64_t below = 0, wanted = (uint64_t)((double)times->total * part);
    if (times->total == 0) return 0;
    size_t bucket = 0;
    while (bucket < PERK_SERVE_BUCKETS - 1 && (below += times->counts[bucket]) <= wanted) bucket++;
    return exp(((double)bucket + 0.5) * BUCKET) * 1e-3;
}

static double thread_cpu(void) {
    struct timespec time = {0};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static double process_cpu(void) {
    struct rusage usage = {0};
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6;
}

/* Bytes that the process has in memory; 0 when the system does not tell. The second number of the line, in pages. */
static uint64_t resident_bytes(void) {
    char line[128] = "", *second = line;
    FILE *file = fopen("/proc/self/statm", "re");
    if (!file) return 0;
    if (fgets(line, sizeof line, file)) second += strcspn(line, " ");
    fclose(file);
    return strtoull(second, NULL, 10) * (uint64_t)sysconf(_SC_PAGESIZE);
}

/* ---- tracks, with the lock ---- */

/* Finds the request's place, or a free one: there are twice as many as requests. */
static serve_track *track_of(perk_serve_run *run, uint64_t id) {
    size_t place = (size_t)((id * 0x9e3779b97f4a7c15u) >> 20) & (run->places - 1);
    while (run->tracks[place].id && run->tracks[place].id != id) place = (place + 1) & (run->places - 1);
    return &run->tracks[place];
}

static void fail(perk_serve_run *run, const perk_error *err) {
    if (!run->failure.status) run->failure = *err;
}

static void hear(heard_tokens *heard, const int32_t *tokens, size_t count, perk_finish finish) {
    for (size_t i = 0; i < count; i++) heard->hash = (heard->hash ^ (uint64_t)(uint32_t)tokens[i]) * 0x100000001b3u;
    heard->count += (int32_t)count;
    if (finish) heard->finish = finish;
}

static perk_status compare(const perk_serve_run *run, const serve_track *track, perk_error *err) {
    const perk_serve_request *request = &run->plan->requests[track->request];
    const heard_tokens *heard = &track->heard, *read = &track->read;
    if (heard->count != read->count || heard->hash != read->hash || heard->finish != read->finish)
        return perk_fail(err, PERK_INTERNAL,
                         "request %zu: the callback saw %d tokens (finish %s), and polling gave %d others (finish %s)",
                         track->request, heard->count, perk_cli_finish_name(heard->finish), read->count,
                         perk_cli_finish_name(read->finish));
    bool all = read->finish == PERK_FINISH_LENGTH && read->count == request->answer_tokens;
    bool part = read->finish == PERK_FINISH_CANCELLED && track->cancelled && read->count <= request->answer_tokens;
    if (all || part) return PERK_OK;
    return perk_fail(err, PERK_INTERNAL, "request %zu: %d of %d tokens came, with finish %s", track->request,
                     read->count, request->answer_tokens, perk_cli_finish_name(read->finish));
}

/* Lets go of a request once both listeners know that it has ended. */
static void settle(perk_serve_run *run, const serve_track *track) {
    perk_error err = {0};
    if (!track->heard.finish || !track->read.finish) return;
    perk_status status = compare(run, track, &err);
    if (!status) status = perk_service_release(run->service, track->id, &err);
    if (status) fail(run, &err);
    if (track->read.finish == PERK_FINISH_CANCELLED) run->result->cancelled++;
    run->open--;
}

/* ---- the callback ---- */

static void on_news(void *user, uint64_t id, const int32_t *tokens, size_t count, perk_finish finish) {
    perk_serve_run *run = user;
    pthread_mutex_lock(&run->lock);
    serve_track *track = track_of(run, id);
    if (track->id && !track->heard.finish) { /* else the service has failed, or tells of an end twice */
        hear(&track->heard, tokens, count, finish);
        if (finish) settle(run, track);
    } else if (track->id) {
        perk_error err = {0};
        perk_fail(&err, PERK_INTERNAL, "request %zu: the callback was told of its end twice", track->request);
        fail(run, &err);
    }
    run->service_cpu = thread_cpu();
    pthread_mutex_unlock(&run->lock);
}

/* ---- the reader ---- */

static void keep_sample(perk_serve_run *run, const serve_track *track, const int32_t *tokens, size_t count) {
    const perk_serve_request *request = &run->plan->requests[track->request];
    if (request->sample < 0) return;
    perk_serve_sample *sample = &run->plan->samples[request->sample];
    size_t room = (size_t)request->answer_tokens - sample->read_count; /* too many are a failure of their own */
    memcpy(sample->read + sample->read_count, tokens, PERK_MIN(count, room) * sizeof *tokens);
    sample->read_count += PERK_MIN(count, room);
}

/* Of tokens that come together, the first has waited, and the others have not. */
static void take_times(perk_serve_run *run, serve_track *track, size_t count) {
    double now = perk_now(), since = track->last;
    bool is_first = track->read.count == 0;
    if (is_first) since = run->begin + run->plan->requests[track->request].arrival;
    for (size_t i = 0; i < count; i++)
        add_time(is_first && i == 0 ? &run->result->first_token : &run->result->next_token,
                 i == 0 ? (now - since) * 1e3 : 0);
    run->result->tokens += count;
    track->last = run->end = now;
}

/* Reads what a request has, with the lock. */
static perk_status read_request(perk_serve_run *run, uint64_t id, perk_error *err) {
    int32_t tokens[TOKENS_A_POLL];
    perk_answer answer = {.count = TOKENS_A_POLL};
    serve_track *track = track_of(run, id);
    if (!track->id || track->read.finish) return PERK_OK; /* released meanwhile, by the callback */
    const perk_serve_request *request = &run->plan->requests[track->request];
    while (answer.count == TOKENS_A_POLL && !answer.finish) {
        perk_status status = perk_service_poll(run->service, id, tokens, TOKENS_A_POLL, &answer, err);
        if (status) return status;
        if (answer.count) take_times(run, track, answer.count);
        keep_sample(run, track, tokens, answer.count);
        hear(&track->read, tokens, answer.count, answer.finish);
    }
    if (answer.finish) {
        if (track->read.count) add_time(&run->result->queue, answer.stats.queue_ms);
        settle(run, track);
    } else if (request->cancel_after > 0 && track->read.count >= request->cancel_after && !track->cancelled) {
        track->cancelled = true;
        return perk_service_cancel(run->service, id, err);
    }
    return PERK_OK;
}

static bool goes_on(perk_serve_run *run) {
    pthread_mutex_lock(&run->lock);
    bool on = !run->failure.status && (run->open > 0 || !run->all_submitted);
    pthread_mutex_unlock(&run->lock);
    return on;
}

/* Nothing has come since `since`: a request that nobody will ever answer must end the run. */
static double check_silence(perk_serve_run *run, double since) {
    perk_error err = {0};
    double now = perk_now();
    pthread_mutex_lock(&run->lock);
    if (run->open == 0) since = now;
    if (now - since > LONGEST_SILENCE_S) {
        perk_fail(&err, PERK_HANG, "%zu requests are unfinished, and no news of them came for %d s", run->open,
                  (int)LONGEST_SILENCE_S);
        fail(run, &err);
    }
    pthread_mutex_unlock(&run->lock);
    return since;
}

static void *read_answers(void *argument) {
    perk_serve_run *run = argument;
    double heard = perk_now();
    struct pollfd news = {.fd = perk_service_fd(run->service), .events = POLLIN};
    while (goes_on(run)) {
        uint64_t ids[NEWS_A_CALL];
        size_t count;
        perk_error err = {0};
        if (poll(&news, 1, LONGEST_SLEEP_MS) <= 0) { /* nothing yet, or a signal */
            heard = check_silence(run, heard);
            continue;
        }
        heard = perk_now();
        perk_status status = perk_service_news(run->service, ids, NEWS_A_CALL, &count, &err);
        pthread_mutex_lock(&run->lock);
        for (size_t i = 0; i < count && !status; i++) status = read_request(run, ids[i], &err);
        if (status) fail(run, &err);
        pthread_mutex_unlock(&run->lock);
    }
    run->reader_cpu = thread_cpu();
    return NULL;
}

/* ---- the submitter ---- */

/* False: the run has failed meanwhile. */
static bool sleep_until(perk_serve_run *run, double time) {
    for (double left; (left = time - perk_now()) > 0;) {
        double seconds = fmin(left, LONGEST_SLEEP_MS * 1e-3);
        const struct timespec pause = {.tv_nsec = (long)(seconds * 1e9)};
        nanosleep(&pause, NULL);
        if (left > seconds && !goes_on(run)) return false;
    }
    return true;
}

/* With the lock, so that nobody hears of the request before it has a place. */
static perk_status submit(perk_serve_run *run, size_t number, perk_error *err) {
    const perk_serve_request *request = &run->plan->requests[number];
    const perk_sampling sampling = perk_serve_sampling(request);
    uint64_t id;
    perk_status status =
        perk_service_submit(run->service, run->prompt, (size_t)request->prompt_tokens, &sampling, &id, err);
    if (status == PERK_LIMIT && run->may_refuse) return run->result->refused++, PERK_OK;
    if (status) return perk_fail_prefix(err, status, "request %zu", number);
    *track_of(run, id) = (serve_track){.id = id, .request = number, .cancelled = request->cancel_after == 0};
    perk_serve_sample_taken(run->plan, number);
    run->result->submitted++;
    run->open++;
    run->result->most_unfinished = PERK_MAX(run->result->most_unfinished, (int32_t)run->open);
    return request->cancel_after == 0 ? perk_service_cancel(run->service, id, err) : PERK_OK;
}

static void submit_all(perk_serve_run *run) {
    const perk_serve_plan *plan = run->plan;
    for (size_t i = 0; i < plan->count; i++) {
        perk_error err = {0};
        perk_serve_prompt(plan, i, run->vocab, run->prompt);
        if (!sleep_until(run, run->begin + plan->requests[i].arrival)) break;
        pthread_mutex_lock(&run->lock);
        if (i == plan->count / 2) run->result->rss_middle = resident_bytes();
        if (submit(run, i, &err)) fail(run, &err);
        bool failed = run->failure.status != PERK_OK;
        pthread_mutex_unlock(&run->lock);
        if (failed) break;
    }
    pthread_mutex_lock(&run->lock);
    run->all_submitted = true;
    pthread_mutex_unlock(&run->lock);
}

/* ---- the whole ---- */

/* All requests have ended: nothing may be left of them. */
static perk_status check_end(const perk_serve_result *r, perk_error *err) {
    const perk_engine_stats *stats = &r->stats;
    if (stats->waiting || stats->running || stats->pages_in_use)
        return perk_fail(err, PERK_INTERNAL,
                         "after the last answer %d requests wait, %d run, and %d of %d pages are in use",
                         stats->waiting, stats->running, stats->pages_in_use, stats->pages);
    if (stats->submitted != r->submitted || stats->finished != r->submitted || stats->answer_tokens != r->tokens)
        return perk_fail(err, PERK_INTERNAL,
                         "of %llu requests with %llu tokens read, the engine took %llu, finished %llu and made %llu "
                         "tokens",
                         (unsigned long long)r->submitted, (unsigned long long)r->tokens,
                         (unsigned long long)stats->submitted, (unsigned long long)stats->finished,
                         (unsigned long long)stats->answer_tokens);
    return PERK_OK;
}

perk_status perk_serve_run_all(perk_serve_run *run, perk_serve_result *result, perk_error *err) {
    pthread_t reader;
    run->result = result;
    result->rss_begin = resident_bytes();
    double cpu = process_cpu(), own_cpu = thread_cpu();
    run->begin = run->end = perk_now();
    int failure = pthread_create(&reader, NULL, read_answers, run);
    if (failure) return perk_fail(err, PERK_INTERNAL, "the reader's thread did not start: %s", strerror(failure));
    submit_all(run);
    result->submitter_cpu = thread_cpu() - own_cpu;
    pthread_join(reader, NULL);
    result->process_cpu = process_cpu() - cpu;
    result->rss_end = resident_bytes();
    pthread_mutex_lock(&run->lock);
    perk_error failed = run->failure;
    result->service_cpu = run->service_cpu;
    result->reader_cpu = run->reader_cpu;
    result->seconds = run->end - run->begin - run->plan->requests[0].arrival;
    pthread_mutex_unlock(&run->lock);
    if (failed.status) {
        *err = failed;
        return failed.status;
    }
    perk_status status = perk_service_drain(run->service, err);
    if (status) return status;
    perk_service_statistics(run->service, &result->stats);
    return check_end(result, err);
}

perk_status perk_serve_run_open(perk_serve_run **out, perk_serve_plan *plan, perk_engine *engine,
                                int32_t max_unfinished, perk_error *err) {
    perk_serve_run *run = *out = perk_calloc(1, sizeof *run);
    size_t places = 16;
    while (places < plan->count * 2) places *= 2;
    if (run) {
        *run = (perk_serve_run){.plan = plan, .places = places, .may_refuse = max_unfinished > 0};
        pthread_mutex_init(&run->lock, NULL);
        run->tracks = perk_calloc(places, sizeof *run->tracks);
        run->prompt = perk_calloc((size_t)plan->longest_prompt, sizeof *run->prompt);
    }
    if (!run || !run->tracks || !run->prompt) {
        perk_engine_free(engine);
        return perk_fail_memory(err, "the requests");
    }
    /* Pages that are touched during the run only would look like a leak. */
    for (size_t i = 0; i < places; i++) run->tracks[i].request = SIZE_MAX;
    run->vocab = perk_engine_vocab_size(engine);
    const perk_service_options options = {.max_unfinished = max_unfinished, .on_news = on_news, .user = run};
    return perk_service_open(&run->service, engine, &options, err);
}

void perk_serve_run_free(perk_serve_run *run) {
    if (!run) return;
    perk_service_free(run->service);
    pthread_mutex_destroy(&run->lock);
    free(run->tracks);
    free(run->prompt);
    free(run);
}
