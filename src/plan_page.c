/* The page itself is in page/; here its data are written. A plan has tens of thousands of tasks, so these are
 * columns of numbers, and what tasks have in common (waits, signals, regions) is written once and referred to. */
#include "plan_page.h"

#include "jit/embedded.h"
#include "plan_print.h"

#include <jansson.h>
#include <stdio.h>

/* ---- lists that are written once ---- */

/* JSON texts in the order of their first use. */
typedef struct once {
    json_t *places; /* text -> index */
    perk_buffer items;
    int count;
    bool failed;
} once;

static int once_add(once *list, const perk_buffer *text) {
    if (text->failed) return 0;
    json_t *place = json_object_get(list->places, text->data);
    if (place) return (int)json_integer_value(place);
    if (json_object_set_new(list->places, text->data, json_integer(list->count)) != 0) list->failed = true;
    perk_buffer_printf(&list->items, "%s%s", list->count ? "," : "", text->data);
    return list->count++;
}

/* ---- tasks ---- */

enum { STAGE, FIRST, STRIDE, COUNT, BYTES, WAITS, SIGNALS, READ_TENSORS, READS, WRITE_TENSORS, WRITES, COLUMNS };
enum { PAIRS, TENSORS, REGIONS, LISTS };

/* Regions are split from their tensors: those of all layers are the same. */
typedef struct task_columns {
    perk_buffer text[COLUMNS];
    once lists[LISTS];
    perk_buffer scratch;
} task_columns;

static void begin_list(perk_buffer *text) {
    text->size = 0;
    perk_buffer_append(text, "[", 1);
}

/* Ends a list whose items each end with a comma. */
static void end_list(perk_buffer *text) {
    if (text->size > 1 && text->data[text->size - 1] == ',') text->size--;
    perk_buffer_append(text, "]", 1);
}

static int add_waits(task_columns *c, const perk_plan *plan, const perk_task *task) {
    begin_list(&c->scratch);
    for (int i = task->wait_begin; i < task->wait_end; i++)
        perk_buffer_printf(&c->scratch, "%d,%d,", plan->waits[i].counter, plan->waits[i].needed);
    end_list(&c->scratch);
    return once_add(&c->lists[PAIRS], &c->scratch);
}

static int add_signals(task_columns *c, const perk_plan *plan, const perk_task *task) {
    begin_list(&c->scratch);
    for (int i = task->signal_begin; i < task->signal_end; i++)
        perk_buffer_printf(&c->scratch, "%d,%d,", plan->signals[i].counter, plan->signals[i].amount);
    end_list(&c->scratch);
    return once_add(&c->lists[PAIRS], &c->scratch);
}

static int add_tensors(task_columns *c, const perk_plan *plan, int begin, int end) {
    begin_list(&c->scratch);
    for (int i = begin; i < end; i++) perk_buffer_printf(&c->scratch, "%d,", plan->regions[i].tensor);
    end_list(&c->scratch);
    return once_add(&c->lists[TENSORS], &c->scratch);
}

static int add_regions(task_columns *c, const perk_plan *plan, int begin, int end) {
    begin_list(&c->scratch);
    for (int i = begin; i < end; i++) {
        const perk_region *r = &plan->regions[i];
        perk_buffer_printf(&c->scratch, "%d,%d,%d,%d,%d,%d,", r->row_begin, r->row_end, r->col_begin, r->col_count,
                           r->col_stride, r->repeat);
    }
    end_list(&c->scratch);
    return once_add(&c->lists[REGIONS], &c->scratch);
}

static void add_task(task_columns *c, const perk_plan *plan, int index) {
    const perk_task *task = &plan->tasks[index];
    const long long values[COLUMNS] = {
        [STAGE] = task->stage,
        [FIRST] = task->first,
        [STRIDE] = task->stride,
        [COUNT] = task->count,
        [BYTES] = (long long)task->stream_bytes,
        [WAITS] = add_waits(c, plan, task),
        [SIGNALS] = add_signals(c, plan, task),
        [READ_TENSORS] = add_tensors(c, plan, task->read_begin, task->read_end),
        [READS] = add_regions(c, plan, task->read_begin, task->read_end),
        [WRITE_TENSORS] = add_tensors(c, plan, task->write_begin, task->write_end),
        [WRITES] = add_regions(c, plan, task->write_begin, task->write_end),
    };
    for (int i = 0; i < COLUMNS; i++) perk_buffer_printf(&c->text[i], "%s%lld", index ? "," : "", values[i]);
}

static void print_columns(const task_columns *c, const perk_plan *plan, perk_buffer *out) {
    static const char *const columns[COLUMNS] = {"stage",   "first",       "stride", "count",        "bytes", "waits",
                                                 "signals", "readTensors", "reads",  "writeTensors", "writes"};
    static const char *const lists[LISTS] = {"pairs", "tensors", "regions"};
    perk_buffer_printf(out, "\"tasks\":{\"workerBegin\":[");
    for (int w = 0; w <= plan->device.worker_count; w++)
        perk_buffer_printf(out, "%s%d", w ? "," : "", plan->worker_begin[w]);
    perk_buffer_printf(out, "]");
    for (int i = 0; i < COLUMNS; i++)
        perk_buffer_printf(out, ",\"%s\":[%s]", columns[i], c->text[i].data ? c->text[i].data : "");
    for (int i = 0; i < LISTS; i++)
        perk_buffer_printf(out, ",\"%s\":[%s]", lists[i], c->lists[i].items.data ? c->lists[i].items.data : "");
    perk_buffer_printf(out, "}");
}

static perk_status print_tasks(const perk_plan *plan, perk_buffer *out, perk_error *err) {
    task_columns columns = {0};
    bool failed = false;
    for (int i = 0; i < LISTS; i++) {
        columns.lists[i].places = json_object();
        failed = failed || !columns.lists[i].places;
    }
    for (int i = 0; i < plan->task_count && !failed && !columns.scratch.failed; i++) add_task(&columns, plan, i);
    for (int i = 0; i < COLUMNS; i++) failed = failed || columns.text[i].failed;
    for (int i = 0; i < LISTS; i++) failed = failed || columns.lists[i].failed || columns.lists[i].items.failed;
    if (!failed && !columns.scratch.failed) print_columns(&columns, plan, out);
    failed = failed || columns.scratch.failed;
    for (int i = 0; i < COLUMNS; i++) perk_buffer_free(&columns.text[i]);
    for (int i = 0; i < LISTS; i++) {
        json_decref(columns.lists[i].places);
        perk_buffer_free(&columns.lists[i].items);
    }
    perk_buffer_free(&columns.scratch);
    return failed ? perk_fail_memory(err, "the page's tasks") : PERK_OK;
}

/* ---- times ---- */

/* A task's three numbers, ns: from the end of the task before it (of the step's first moment), for its counters, its
 * work. Differences are short, and there are as many as stamps. */
static void print_stamps(const perk_plan *plan, const perk_task_time *tasks, perk_buffer *out) {
    uint64_t first = perk_plan_first_ns(plan, tasks);
    for (int w = 0; w < plan->device.worker_count; w++) {
        uint64_t before = first;
        for (int i = plan->worker_begin[w]; i < plan->worker_begin[w + 1]; i++) {
            const uint64_t *ns = tasks[i].ns;
            perk_buffer_printf(out, "%s%lld,%lld,%lld", i ? "," : "", (long long)(ns[PERK_STAMP_REACHED] - before),
                               (long long)(ns[PERK_STAMP_READY] - ns[PERK_STAMP_REACHED]),
                               (long long)(ns[PERK_STAMP_DONE] - ns[PERK_STAMP_READY]));
            before = ns[PERK_STAMP_DONE];
        }
    }
}

static int append_dump(const char *data, size_t size, void *out) {
    perk_buffer_append(out, data, size);
    return 0;
}

/* A JSON object without its closing brace, so that members too large for jansson's trees may follow. */
static perk_status print_open(json_t *object, perk_buffer *out, perk_error *err) {
    bool dumped = object && json_dump_callback(object, append_dump, out, JSON_REAL_PRECISION(10) | JSON_COMPACT) == 0;
    json_decref(object);
    if (!dumped)
        return perk_fail(err, PERK_OUT_OF_MEMORY, "the page: out of host memory, or a name is not valid UTF-8");
    if (!out->failed) out->size--;
    return PERK_OK;
}

static perk_status print_expected(const perk_plan *plan, const perk_plan_load *load, perk_buffer *out,
                                  perk_error *err) {
    perk_task_time *times = perk_calloc((size_t)plan->task_count, sizeof *times);
    perk_status status = times ? perk_plan_expect(plan, load, times, err) : perk_fail_memory(err, "expected times");
    if (status == PERK_OK) print_stamps(plan, times, out);
    free(times);
    return status;
}

static perk_status print_step(const perk_plan *plan, const perk_page_step *step, perk_buffer *out, perk_error *err) {
    perk_plan_load load = perk_plan_load_resolve(plan, &step->load);
    json_t *head = json_pack("{s:s, s:f, s:i, s:i, s:i}", "name", step->name, "bandwidth", load.bandwidth, "requests",
                             (int)load.requests, "tokens", (int)load.tokens, "context", (int)load.context);
    perk_status status = print_open(head, out, err);
    perk_buffer_printf(out, ",\"expected\":[");
    if (status == PERK_OK) status = print_expected(plan, &load, out, err);
    perk_buffer_printf(out, "]");
    if (step->measured) {
        perk_buffer_printf(out, ",\"measured\":[");
        print_stamps(plan, step->measured, out);
        perk_buffer_printf(out, "]");
    }
    perk_buffer_printf(out, "}");
    return status;
}

/* ---- the whole ---- */

static perk_status print_data(const perk_plan *plan, const char *title, const perk_page_step *steps, int step_count,
                              perk_buffer *out, perk_error *err) {
    perk_status status = print_open(json_pack("{s:s}", "title", title), out, err);
    perk_buffer_printf(out, ",\n\"plan\":");
    if (status == PERK_OK) status = perk_plan_print(plan, PERK_PLAN_JSON, out, err);
    perk_buffer_printf(out, ",");
    if (status == PERK_OK) status = print_tasks(plan, out, err);
    perk_buffer_printf(out, ",\n\"steps\":[");
    for (int i = 0; i < step_count && status == PERK_OK; i++) {
        perk_buffer_printf(out, "%s", i ? ",\n" : "");
        status = print_step(plan, &steps[i], out, err);
    }
    perk_buffer_printf(out, "]}\n");
    if (status == PERK_OK && out->failed) status = perk_fail_memory(err, "the page");
    return status;
}

/* In a script element a "<" could end it, or begin a comment; in JSON it stands in texts alone, where it can be spelt
 * otherwise. */
static void append_in_script(perk_buffer *out, const char *json, size_t size) {
    for (const char *end = json + size; json < end;) {
        const char *angle = memchr(json, '<', (size_t)(end - json));
        size_t length = (size_t)((angle ? angle : end) - json);
        perk_buffer_append(out, json, length);
        if (angle) perk_buffer_append(out, "\\u003c", 6);
        json += length + (angle != NULL);
    }
}

static const perk_embedded_file *find_file(const char *name, size_t length) {
    const perk_embedded_file *file = perk_embedded_pages;
    while (file->name && (strlen(file->name) != length || memcmp(file->name, name, length) != 0)) file++;
    return file;
}

/* plan.html says where the other files of page/ go, as {{plan.css}}; {{plan}} is where the data go. */
static void join(const perk_buffer *data, perk_buffer *out) {
    const char *at = find_file("plan.html", strlen("plan.html"))->text;
    for (const char *mark; (mark = strstr(at, "{{"));) {
        const char *name = mark + 2, *end = strstr(name, "}}");
        const perk_embedded_file *file = find_file(name, (size_t)(end - name));
        perk_buffer_append(out, at, (size_t)(mark - at));
        if (file->name)
            perk_buffer_append(out, file->text, file->size);
        else
            append_in_script(out, data->data, data->size);
        at = end + 2;
    }
    perk_buffer_append(out, at, strlen(at));
}

perk_status perk_plan_page(const perk_plan *plan, const char *title, const perk_page_step *steps, int step_count,
                           perk_buffer *out, perk_error *err) {
    perk_buffer data = {0};
    perk_status status = print_data(plan, title, steps, step_count, &data, err);
    if (status == PERK_OK) join(&data, out);
    if (status == PERK_OK && out->failed) status = perk_fail_memory(err, "the page");
    perk_buffer_free(&data);
    return status;
}
