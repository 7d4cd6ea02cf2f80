/* One task: from its stage to the function that computes it, and what becomes of its writes. */
#include "simulator/machine.h"

static void (*const families[])(perk_sim_task *) = {
    [PERK_WORK_GATHER] = perk_sim_gather,     [PERK_WORK_RMSNORM] = perk_sim_rmsnorm,
    [PERK_WORK_GATE_MUL] = perk_sim_gate_mul, [PERK_WORK_ARGMAX] = perk_sim_argmax,
    [PERK_WORK_LINEAR] = perk_sim_linear,     [PERK_WORK_APPEND] = perk_sim_append,
    [PERK_WORK_PARTIAL] = perk_sim_partial,   [PERK_WORK_MERGE] = perk_sim_merge,
    [PERK_WORK_ARRANGE] = perk_sim_arrange,
};

perk_status perk_sim_compute_task(perk_simulator *sim, int step, int index, bool records, const perk_sim_memory *memory,
                                  perk_sim_pending *pending, perk_error *err) {
    const perk_plan *plan = sim->plan;
    const perk_stage *stage = &plan->stages[plan->tasks[index].stage];
    perk_sim_task t = {.sim = sim,
                       .step = step,
                       .index = index,
                       .task = &plan->tasks[index],
                       .stage = stage,
                       .op = sim->graph->ops[stage->op],
                       .words = sim->words + (size_t)step * (size_t)sim->layout.words,
                       .memory = memory,
                       .pending = pending,
                       .records = records,
                       .err = err};
    pending->piece_count = pending->byte_count = 0;
    sim->mark += records;
    families[stage->work](&t);
    return t.status;
}

void perk_sim_spoil(const perk_sim_memory *memory, const perk_sim_pending *pending) {
    for (size_t i = 0; i < pending->piece_count; i++)
        memset(memory->bytes + pending->pieces[i].place, 0xff, pending->pieces[i].bytes);
}

void perk_sim_commit(perk_simulator *sim, int step, const perk_sim_memory *memory, const perk_sim_pending *pending) {
    for (size_t i = 0; i < pending->piece_count; i++) {
        const perk_sim_piece *piece = &pending->pieces[i];
        memcpy(memory->bytes + piece->place, pending->bytes + piece->at, piece->bytes);
        if (piece->place < sim->activation_bytes)
            memcpy(sim->results[step] + piece->place, pending->bytes + piece->at, piece->bytes);
    }
}
