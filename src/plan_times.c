#include "plan_times.h"

uint64_t perk_plan_first_ns(const perk_plan *plan, const perk_task_time *tasks) {
    uint64_t first = plan->task_count > 0 ? tasks[0].ns[PERK_STAMP_REACHED] : 0;
    for (int i = 1; i < plan->task_count; i++) first = PERK_MIN(first, tasks[i].ns[PERK_STAMP_REACHED]);
    return first;
}

uint64_t perk_plan_step_ns(const perk_plan *plan, const perk_task_time *tasks) {
    uint64_t last = 0;
    for (int i = 0; i < plan->task_count; i++) last = PERK_MAX(last, tasks[i].ns[PERK_STAMP_DONE]);
    return last - perk_plan_first_ns(plan, tasks);
}

static double mean_us(uint64_t begin, uint64_t end, int tasks) { return (double)(end - begin) * 1e-3 / tasks; }

static void add_parts(const uint64_t *ns, int tasks, perk_stage_time *stage) {
    stage->read += mean_us(ns[PERK_STAMP_READY], ns[PERK_STAMP_READ], tasks);
    stage->multiply += mean_us(ns[PERK_STAMP_READ], ns[PERK_STAMP_MULTIPLIED], tasks);
    stage->share += mean_us(ns[PERK_STAMP_MULTIPLIED], ns[PERK_STAMP_SHARED], tasks);
    stage->finish += mean_us(ns[PERK_STAMP_SHARED], ns[PERK_STAMP_DONE], tasks);
}

perk_status perk_plan_stage_times(const perk_plan *plan, const perk_task_time *tasks, perk_stage_time *stages,
                                  perk_error *err) {
    uint64_t end = perk_plan_first_ns(plan, tasks);
    uint64_t *last = perk_calloc((size_t)plan->stage_count, sizeof *last);
    if (!last) return perk_fail_memory(err, "the stages' times");
    memset(stages, 0, (size_t)plan->stage_count * sizeof *stages);
    for (int i = 0; i < plan->task_count; i++) {
        const uint64_t *ns = tasks[i].ns;
        int s = plan->tasks[i].stage;
        double run = (double)(ns[PERK_STAMP_DONE] - ns[PERK_STAMP_READY]) * 1e-3;
        stages[s].run += run / plan->stages[s].task_count;
        stages[s].worst = PERK_MAX(stages[s].worst, run);
        if (ns[PERK_STAMP_SHARED] > ns[PERK_STAMP_READY]) add_parts(ns, plan->stages[s].task_count, &stages[s]);
        stages[s].wait += (double)(ns[PERK_STAMP_READY] - ns[PERK_STAMP_REACHED]) * 1e-3 / plan->stages[s].task_count;
        last[s] = PERK_MAX(last[s], ns[PERK_STAMP_DONE]);
    }
    for (int s = 0; s < plan->stage_count; s++) {
        stages[s].chain = last[s] > end ? (double)(last[s] - end) * 1e-3 : 0;
        end = PERK_MAX(end, last[s]);
    }
    free(last);
    return PERK_OK;
}
