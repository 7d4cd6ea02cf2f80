#include "plan_trace.h"

#include <jansson.h>
#include <stdio.h>

enum { PROCESS = 1, STEP_THREAD = 0, FIRST_WORKER_THREAD = 1, GAP_NS = 10000 };

/* A time in microseconds, exact. */
typedef struct us_text {
    char text[32];
} us_text;

static us_text us_of(uint64_t ns) {
    us_text us;
    snprintf(us.text, sizeof us.text, "%llu.%03u", (unsigned long long)(ns / 1000), (unsigned)(ns % 1000));
    return us;
}

/* A name as JSON has it, quotes included; freed with free(). NULL when it is not UTF-8, or out of memory. */
static char *quoted(const char *name) {
    json_t *text = json_string(name);
    char *quote = text ? json_dumps(text, JSON_ENCODE_ANY) : NULL;
    json_decref(text);
    return quote;
}

static perk_status fail_name(perk_error *err, const char *name) {
    return perk_fail(err, PERK_OUT_OF_MEMORY, "the trace: out of host memory, or \"%s\" is not valid UTF-8", name);
}

static void print_name(const char *what, int thread, const char *name, perk_buffer *out) {
    perk_buffer_printf(out, "{\"ph\":\"M\",\"pid\":%d,\"tid\":%d,\"name\":\"%s\",\"args\":{\"name\":\"%s\"}},\n",
                       PROCESS, thread, what, name);
}

static void print_names(const perk_plan *plan, perk_buffer *out) {
    print_name("process_name", STEP_THREAD, "GPU", out);
    print_name("thread_name", STEP_THREAD, "steps", out);
    for (int thread = FIRST_WORKER_THREAD; thread < FIRST_WORKER_THREAD + plan->device.worker_count; thread++) {
        char name[32];
        snprintf(name, sizeof name, "worker %d", thread - FIRST_WORKER_THREAD);
        print_name("thread_name", thread, name, out);
        perk_buffer_printf(
            out, "{\"ph\":\"M\",\"pid\":%d,\"tid\":%d,\"name\":\"thread_sort_index\",\"args\":{\"sort_index\":%d}},\n",
            PROCESS, thread, thread);
    }
}

static void print_event(const char *quoted_name, const char *category, int thread, uint64_t from, uint64_t to,
                        perk_buffer *out) {
    perk_buffer_printf(out, "{\"ph\":\"X\",\"pid\":%d,\"tid\":%d,\"name\":%s,\"cat\":\"%s\",\"ts\":%s,\"dur\":%s",
                       PROCESS, thread, quoted_name, category, us_of(from).text, us_of(to - from).text);
}

/* `offset`: from the GPU's clock to the trace's. */
static void print_task(const perk_plan *plan, int index, const perk_task_time *time, uint64_t offset,
                       const char *quoted_name, perk_buffer *out) {
    const perk_task *task = &plan->tasks[index];
    int thread = FIRST_WORKER_THREAD + task->worker;
    uint64_t reached = time->ns[PERK_STAMP_REACHED] + offset, ready = time->ns[PERK_STAMP_READY] + offset;
    if (ready > reached) {
        print_event("\"wait\"", "wait", thread, reached, ready, out);
        perk_buffer_printf(out, ",\"args\":{\"for\":%s,\"task\":%d}},\n", quoted_name, index);
    }
    print_event(quoted_name, "task", thread, ready, time->ns[PERK_STAMP_DONE] + offset, out);
    perk_buffer_printf(
        out, ",\"args\":{\"stage\":%d,\"task\":%d,\"first\":%d,\"stride\":%d,\"units\":%d,\"stream_bytes\":%llu}},\n",
        (int)task->stage, index, (int)task->first, (int)task->stride, (int)task->count,
        (unsigned long long)task->stream_bytes);
}

static perk_status print_step(const perk_plan *plan, const perk_trace_step *step, char *const *names, uint64_t begin,
                              uint64_t length, perk_buffer *out, perk_error *err) {
    char *name = quoted(step->name);
    if (!name) return fail_name(err, step->name);
    uint64_t offset = begin - perk_plan_first_ns(plan, step->tasks);
    print_event(name, "step", STEP_THREAD, begin, begin + length, out);
    perk_buffer_printf(out, "},\n");
    for (int i = 0; i < plan->task_count; i++)
        print_task(plan, i, &step->tasks[i], offset, names[plan->tasks[i].stage], out);
    free(name);
    return PERK_OK;
}

perk_status perk_plan_trace(const perk_plan *plan, const perk_trace_step *steps, int step_count, perk_buffer *out,
                            perk_error *err) {
    perk_status status = PERK_OK;
    uint64_t begin = 0;
    char **names = perk_calloc((size_t)plan->stage_count, sizeof *names);
    if (!names) return perk_fail_memory(err, "the trace");
    for (int s = 0; s < plan->stage_count && status == PERK_OK; s++) {
        names[s] = quoted(plan->stages[s].name);
        if (!names[s]) status = fail_name(err, plan->stages[s].name);
    }
    perk_buffer_printf(out, "{\"displayTimeUnit\":\"ns\",\"traceEvents\":[\n");
    print_names(plan, out);
    for (int i = 0; i < step_count && status == PERK_OK; i++) {
        uint64_t length = perk_plan_step_ns(plan, steps[i].tasks);
        status = print_step(plan, &steps[i], names, begin, length, out, err);
        begin += length + GAP_NS;
    }
    if (!out->failed) out->size -= 2; /* the last comma; there is at least the process's name */
    perk_buffer_printf(out, "\n]}\n");
    for (int s = 0; s < plan->stage_count; s++) free(names[s]);
    free(names);
    if (status == PERK_OK && out->failed) status = perk_fail_memory(err, "the trace");
    return status;
}
