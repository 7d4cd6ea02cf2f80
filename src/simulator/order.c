/* The steps in any order that the workers' lists and counters allow. A task starts (reads, spoils what it will write)
 * and later ends (writes, signals); between the two anything else may happen. What it has read must be the same at both
 * ends, and what the order of stages says; what it has spoiled must still be its own when it writes. */
#include "check.h"
#include "simulator/machine.h"

#include <stdio.h>

typedef struct walk {
    perk_simulator *sim;
    const perk_plan *plan;
    const perk_simulator_order *order;
    bool computes;
    uint64_t random;
    perk_error *err;
} walk;

static int random_below(walk *w, int bound) {
    w->random += 0x9e3779b97f4a7c15u; /* splitmix64 */
    uint64_t z = (w->random ^ (w->random >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (int)((uint32_t)(z >> 32) % (uint32_t)bound);
}

/* ---- faults ---- */

/* "layers.3.o (worker 7, position 14) of step 2" */
static perk_sim_text version_text(const perk_simulator *sim, int32_t version) {
    perk_sim_text out;
    int32_t id = (version < 0 ? -version : version) - 1;
    if (version == 0)
        snprintf(out.text, sizeof out.text, "nobody");
    else
        snprintf(out.text, sizeof out.text, "%.120s of step %d",
                 perk_check_task_text(sim->plan, id % sim->plan->task_count).text, id / sim->plan->task_count);
    return out;
}

static perk_status fail_read(const walk *w, int32_t own, const perk_sim_span *span, uint32_t at, bool at_end) {
    const perk_simulator *sim = w->sim;
    int32_t found = sim->run.versions[span->begin + at], expected = sim->trace.versions[span->expected + at];
    perk_sim_text where = perk_sim_place_text(sim, span->tensor, (uint64_t)(span->begin + at) * PERK_SIM_GRANULE);
    if (found < 0 || at_end)
        return perk_fail(w->err, PERK_UNSAFE_PLAN, "%s reads %s while %s writes it", version_text(sim, own).text,
                         where.text, version_text(sim, found).text);
    return perk_fail(w->err, PERK_UNSAFE_PLAN, "%s reads %s and finds what %s has written, not %s",
                     version_text(sim, own).text, where.text, version_text(sim, found).text,
                     version_text(sim, expected).text);
}

static perk_status fail_stuck(const walk *w) {
    const perk_simulator *sim = w->sim;
    char text[1200] = "";
    size_t used = 0;
    for (int worker = 0; worker < w->plan->device.worker_count && used < 900; worker++) {
        int begin = w->plan->worker_begin[worker], length = w->plan->worker_begin[worker + 1] - begin;
        if (!length || sim->done[worker] == length * sim->steps) continue;
        int step = sim->done[worker] / length, index = begin + sim->done[worker] % length;
        const perk_task *task = &w->plan->tasks[index];
        for (int i = task->wait_begin; i < task->wait_end; i++) {
            const perk_wait *wait = &w->plan->waits[i];
            int64_t wanted = (int64_t)step * w->plan->counter_per_step[wait->counter] + wait->needed;
            if (sim->counters[wait->counter] >= wanted) continue;
            used += (size_t)snprintf(
                text + used, sizeof text - used, "%s%.120s waits for %lld of %.100s, which is %lld", used ? "; " : "",
                perk_check_task_text(w->plan, index).text, (long long)wanted,
                perk_check_counter_text(w->plan, wait->counter).text, (long long)sim->counters[wait->counter]);
            break;
        }
    }
    return perk_fail(w->err, PERK_HANG, "nobody can go on: %s", text);
}

/* ---- starts and ends ---- */

static perk_status check_reads(const walk *w, const struct perk_sim_task_trace *trace, int32_t own, bool at_end) {
    const perk_simulator *sim = w->sim;
    for (uint32_t i = trace->read_begin; i < trace->read_end; i++) {
        const perk_sim_span *span = &sim->trace.reads.items[i];
        const int32_t *found = sim->run.versions + span->begin, *expected = sim->trace.versions + span->expected;
        if (!memcmp(found, expected, span->count * sizeof *found)) continue;
        for (uint32_t at = 0; at < span->count; at++) /* what is read in place is spoiled by the task itself */
            if (found[at] != expected[at] && !(at_end && found[at] == -own)) return fail_read(w, own, span, at, at_end);
    }
    return PERK_OK;
}

static void mark_writes(const walk *w, const struct perk_sim_task_trace *trace, int32_t version) {
    for (uint32_t i = trace->write_begin; i < trace->write_end; i++) {
        const perk_sim_span *span = &w->sim->trace.writes.items[i];
        int32_t *versions = w->sim->run.versions + span->begin;
        for (uint32_t at = 0; at < span->count; at++) versions[at] = version;
    }
}

static perk_status check_spoiled(const walk *w, const struct perk_sim_task_trace *trace, int32_t own) {
    const perk_simulator *sim = w->sim;
    for (uint32_t i = trace->write_begin; i < trace->write_end; i++) {
        const perk_sim_span *span = &sim->trace.writes.items[i];
        for (uint32_t g = span->begin; g < span->begin + span->count; g++)
            if (sim->run.versions[g] != -own)
                return perk_fail(w->err, PERK_UNSAFE_PLAN, "%s and %s write %s at once", version_text(sim, own).text,
                                 version_text(sim, sim->run.versions[g]).text,
                                 perk_sim_place_text(sim, span->tensor, (uint64_t)g * PERK_SIM_GRANULE).text);
    }
    return PERK_OK;
}

static perk_status start_task(walk *w, int worker, int step, int index) {
    perk_simulator *sim = w->sim;
    const struct perk_sim_task_trace *trace =
        &sim->trace.tasks[(size_t)step * (size_t)w->plan->task_count + (size_t)index];
    int32_t own = 1 + (sim->steps_before + step) * w->plan->task_count + index;
    perk_status status = check_reads(w, trace, own, false);
    if (!status && w->computes) {
        status = perk_sim_compute_task(sim, step, index, false, &sim->run, &sim->pendings[worker], w->err);
        perk_sim_spoil(&sim->run, &sim->pendings[worker]);
    }
    mark_writes(w, trace, -own);
    return status;
}

static perk_status end_task(walk *w, int worker, int step, int index) {
    perk_simulator *sim = w->sim;
    const perk_task *task = &w->plan->tasks[index];
    const struct perk_sim_task_trace *trace =
        &sim->trace.tasks[(size_t)step * (size_t)w->plan->task_count + (size_t)index];
    int32_t own = 1 + (sim->steps_before + step) * w->plan->task_count + index;
    perk_status status = check_reads(w, trace, own, true);
    if (!status) status = check_spoiled(w, trace, own);
    if (status) return status;
    mark_writes(w, trace, own);
    if (w->computes) perk_sim_commit(sim, step, &sim->run, &sim->pendings[worker]);
    for (int i = task->signal_begin; i < task->signal_end; i++)
        sim->counters[w->plan->signals[i].counter] += w->plan->signals[i].amount;
    return PERK_OK;
}

/* ---- who is next ---- */

static bool can_start(const walk *w, int step, const perk_task *task) {
    for (int i = task->wait_begin; i < task->wait_end; i++) {
        const perk_wait *wait = &w->plan->waits[i];
        if (w->sim->counters[wait->counter] < (int64_t)step * w->plan->counter_per_step[wait->counter] + wait->needed)
            return false;
    }
    return true;
}

static bool is_held(const perk_simulator_order *order, int step, int task, bool started) {
    return order->hold != PERK_HOLD_NOTHING && order->task == task && order->step == step &&
           (order->hold == PERK_HOLD_END) == started;
}

static void draw_ranking(walk *w) {
    int *ranking = w->sim->ranking, workers = w->plan->device.worker_count;
    for (int i = 0; i < workers; i++) {
        int j = random_below(w, i + 1);
        ranking[i] = ranking[j];
        ranking[j] = i;
    }
}

enum { FINISHED = -1, STUCK = -2 };

static int choose_worker(walk *w) {
    const perk_simulator *sim = w->sim;
    int count = 0, held = STUCK;
    bool finished = true;
    for (int worker = 0; worker < w->plan->device.worker_count; worker++) {
        int begin = w->plan->worker_begin[worker], length = w->plan->worker_begin[worker + 1] - begin;
        if (sim->done[worker] == length * sim->steps) continue;
        finished = false;
        int step = sim->done[worker] / length, index = begin + sim->done[worker] % length;
        if (!sim->started[worker] && !can_start(w, step, &w->plan->tasks[index])) continue;
        if (is_held(w->order, step, index, sim->started[worker]))
            held = worker;
        else
            sim->choices[count++] = worker;
    }
    if (finished) return FINISHED;
    if (!count) return held;
    if (!w->order->skewed) return sim->choices[random_below(w, count)];
    int first = sim->choices[0];
    for (int i = 1; i < count; i++)
        if (sim->ranking[sim->choices[i]] < sim->ranking[first]) first = sim->choices[i];
    return first;
}

static void reset(const walk *w) {
    perk_simulator *sim = w->sim;
    memcpy(sim->run.versions, sim->before.versions, sim->granules * sizeof *sim->run.versions);
    memset(sim->counters, 0, (size_t)w->plan->counter_count * sizeof *sim->counters);
    memset(sim->done, 0, (size_t)w->plan->device.worker_count * sizeof *sim->done);
    memset(sim->started, 0, (size_t)w->plan->device.worker_count * sizeof *sim->started);
    if (!w->computes) return;
    memcpy(sim->run.bytes, sim->before.bytes, sim->bytes);
    for (int step = 0; step < sim->steps; step++) memset(sim->results[step], 0xff, sim->activation_bytes);
}

perk_status perk_sim_run_order(perk_simulator *sim, const perk_simulator_order *order, bool computes, perk_error *err) {
    walk w = {.sim = sim, .plan = sim->plan, .order = order, .computes = computes, .random = order->seed, .err = err};
    reset(&w);
    draw_ranking(&w);
    for (int worker; (worker = choose_worker(&w)) != FINISHED;) {
        if (worker == STUCK) return fail_stuck(&w);
        int begin = w.plan->worker_begin[worker], length = w.plan->worker_begin[worker + 1] - begin;
        int step = sim->done[worker] / length, index = begin + sim->done[worker] % length;
        perk_status status =
            sim->started[worker] ? end_task(&w, worker, step, index) : start_task(&w, worker, step, index);
        if (status) return status;
        sim->done[worker] += sim->started[worker];
        sim->started[worker] = !sim->started[worker];
    }
    return PERK_OK;
}
