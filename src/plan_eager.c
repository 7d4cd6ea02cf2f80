#include "plan_eager.h"

#include "lower.h"

/* The stage in which every worker has a task, makes the other step's places vacant, and signals behind a fence; -1:
 * there is none. Only programs whose linears are narrow have the code for it. */
static int find_clearing_stage(const perk_plan *plan) {
    if (plan->device.portable || plan->device.capability < 90 || plan->wide_tokens > 0 || !plan->streams_kv) return -1;
    for (int s = 0; s < plan->stage_count; s++)
        if (plan->stages[s].is_vocabulary && plan->stages[s].task_count == plan->device.worker_count) return s;
    return -1;
}

/* A tensor's bytes are all values, and nobody outside of the step looks at them. */
static bool can_be_vacant(const perk_plan *plan, const perk_plan_tensor *tensor) {
    bool is_kept = tensor->graph_tensor >= 0 && plan->graph->tensors[tensor->graph_tensor]->kept;
    bool is_value = tensor->dtype == PERK_BF16 || tensor->dtype == PERK_F32;
    return tensor->space == PERK_SPACE_ACTIVATIONS && tensor->layout == PERK_LAYOUT_ROWS && is_value &&
           tensor->cols == tensor->row_stride && !tensor->external_input && !is_kept;
}

/* Whether a stage's device code stores such values with one access each, to its operand 1. */
static bool writes_eagerly(const perk_stage *stage, int tensor) {
    bool can = stage->work == PERK_WORK_LINEAR || stage->work == PERK_WORK_MOE_LINEAR || stage->work == PERK_WORK_MERGE;
    return can && stage->operands[1] == tensor;
}

/* Whether it looks again at what is vacant. Linears do where the whole input fits in their staging: what comes from L2
 * with every product is taken as it is. */
static bool reads_eagerly(const perk_plan *plan, const perk_stage *stage, int tensor) {
    const perk_plan_tensor *t = &plan->tensors[tensor];
    bool is_staged = perk_linear_staged_bytes(t->rows, t->cols) <= plan->staging_bytes;
    switch (stage->work) {
    case PERK_WORK_PARTIAL:
    case PERK_WORK_APPEND: return stage->operands[0] == tensor;
    case PERK_WORK_MOE_LINEAR:
        if (stage->operands[2] == tensor) return stage->stream.own_slots > 0; /* the router's logits */
        return stage->operands[0] != tensor || is_staged;                     /* else it is the residual */
    case PERK_WORK_LINEAR: return stage->operands[0] != tensor || is_staged;
    default: return false;
    }
}

enum { NOBODY = -1, SEVERAL = -2 };

typedef struct tensor_uses {
    int writer; /* a stage, NOBODY, SEVERAL */
    bool is_read, is_read_eagerly;
} tensor_uses;

static tensor_uses *find_uses(const perk_plan *plan) {
    tensor_uses *uses = perk_calloc((size_t)plan->tensor_count, sizeof *uses);
    for (int t = 0; uses && t < plan->tensor_count; t++) uses[t] = (tensor_uses){NOBODY, false, true};
    for (int i = 0; uses && i < plan->task_count; i++) {
        const perk_task *task = &plan->tasks[i];
        for (int r = task->read_begin; r < task->write_end; r++) {
            tensor_uses *use = &uses[plan->regions[r].tensor];
            if (r < task->write_begin) {
                use->is_read = true;
                use->is_read_eagerly &= reads_eagerly(plan, &plan->stages[task->stage], plan->regions[r].tensor);
            } else if (use->writer != task->stage) {
                use->writer = use->writer == NOBODY ? task->stage : SEVERAL;
            }
        }
    }
    return uses;
}

static bool can_be_eager(const perk_plan *plan, int tensor, const tensor_uses *uses) {
    return can_be_vacant(plan, &plan->tensors[tensor]) && uses[tensor].writer >= 0 && uses[tensor].is_read &&
           uses[tensor].is_read_eagerly && writes_eagerly(&plan->stages[uses[tensor].writer], tensor);
}

perk_status perk_plan_choose_eager(perk_plan *plan, perk_error *err) {
    if (find_clearing_stage(plan) < 0) return PERK_OK;
    tensor_uses *uses = find_uses(plan);
    if (!uses) return perk_fail_memory(err, "the plan");
    for (int t = 0; t < plan->tensor_count; t++) {
        if (!can_be_eager(plan, t, uses)) continue;
        plan->tensors[t].eager = plan->stages[uses[t].writer].eager = true;
        plan->eager_bytes += plan->tensors[t].bytes;
    }
    free(uses);
    return PERK_OK;
}

/* ---- the check ---- */

#define UNSAFE(err, ...) perk_fail(err, PERK_UNSAFE_PLAN, __VA_ARGS__)

/* Eager tensors have the first copy for themselves, nobody has the second. */
static perk_status check_places(const perk_plan *plan, perk_error *err) {
    uint64_t begin = plan->eager_begin, end = begin + plan->eager_bytes,
             space = plan->space_bytes[PERK_SPACE_ACTIVATIONS];
    if (begin % 256 || plan->eager_bytes % 256 || end < begin || end > space || plan->eager_bytes > space - end)
        return UNSAFE(err, "two copies of %llu bytes at %llu are not among the activations",
                      (unsigned long long)plan->eager_bytes, (unsigned long long)begin);
    for (int t = 0; t < plan->tensor_count; t++) {
        const perk_plan_tensor *tensor = &plan->tensors[t];
        if (tensor->space != PERK_SPACE_ACTIVATIONS) continue;
        bool is_inside = tensor->offset >= begin && tensor->offset + tensor->bytes <= end;
        bool is_outside = tensor->offset + tensor->bytes <= begin;
        if (!(tensor->eager ? is_inside : is_outside))
            return UNSAFE(err, "%.95s is %s, but its place is not among theirs", tensor->name,
                          tensor->eager ? "eager" : "none of the eager tensors");
        for (int other = 0; tensor->eager && other < t; other++) {
            const perk_plan_tensor *o = &plan->tensors[other];
            if (o->eager && o->offset < tensor->offset + tensor->bytes && tensor->offset < o->offset + o->bytes)
                return UNSAFE(err, "%.95s and %.95s are eager and share a place", o->name, tensor->name);
        }
    }
    return PERK_OK;
}

/* Whether a stage of attention's pieces writes its own scratch and the next such stage's, and nothing else. */
static bool writes_pieces(const perk_plan *plan, const perk_stage *stage, int tensor) {
    bool is_one = tensor == stage->operands[1] || tensor == stage->operands[5];
    return stage->work == PERK_WORK_PARTIAL && is_one && plan->tensors[tensor].of_pieces;
}

static perk_status check_stages(const perk_plan *plan, const tensor_uses *uses, perk_error *err) {
    for (int t = 0; t < plan->tensor_count; t++)
        if (plan->tensors[t].eager && !can_be_eager(plan, t, uses))
            return UNSAFE(err, "%.95s is eager, but not all who write and read it are made for that",
                          plan->tensors[t].name);
    for (int i = 0; i < plan->task_count; i++) {
        const perk_task *task = &plan->tasks[i];
        if (!plan->stages[task->stage].eager) continue;
        for (int r = task->write_begin; r < task->write_end; r++)
            if (!plan->tensors[plan->regions[r].tensor].eager &&
                !writes_pieces(plan, &plan->stages[task->stage], plan->regions[r].tensor))
                return UNSAFE(err, "%.95s signals eagerly, but writes %.95s", plan->stages[task->stage].name,
                              plan->tensors[plan->regions[r].tensor].name);
    }
    return PERK_OK;
}

/* Every worker ends a step behind its last eager access with a fenced signal, of the stage that makes places vacant. */
static perk_status check_clearing(const perk_plan *plan, perk_error *err) {
    int clearing = find_clearing_stage(plan);
    if (clearing < 0 || plan->stages[clearing].eager)
        return UNSAFE(err, "nobody makes the places of the next step's eager values vacant");
    for (int w = 0; w < plan->device.worker_count; w++) {
        bool has_cleared = false;
        for (int i = plan->worker_begin[w]; i < plan->worker_begin[w + 1]; i++) {
            const perk_task *task = &plan->tasks[i];
            if (task->stage == clearing &&
                (task->first >= plan->device.worker_count || task->stride != plan->device.worker_count))
                return UNSAFE(err, "worker %d has no share in making places vacant", w);
            has_cleared |= task->stage == clearing;
            for (int r = task->read_begin; r < task->write_end; r++)
                if (has_cleared && plan->tensors[plan->regions[r].tensor].eager)
                    return UNSAFE(err, "worker %d uses %.95s behind the step's last fence", w,
                                  plan->tensors[plan->regions[r].tensor].name);
        }
        if (!has_cleared) return UNSAFE(err, "worker %d has no share in making places vacant", w);
    }
    return PERK_OK;
}

/* ---- the check of attention's pieces ---- */

/* Who writes scratches of pieces makes them, or makes them vacant for the stage that does so next; who reads them
 * merges them, and looks. */
static perk_status check_scratch_uses(const perk_plan *plan, perk_error *err) {
    for (int i = 0; i < plan->task_count; i++) {
        const perk_task *task = &plan->tasks[i];
        const perk_stage *stage = &plan->stages[task->stage];
        for (int r = task->read_begin; r < task->write_end; r++) {
            int tensor = plan->regions[r].tensor;
            if (!plan->tensors[tensor].of_pieces) continue;
            bool merges = stage->work == PERK_WORK_MERGE && stage->operands[0] == tensor;
            bool writes = stage->eager && writes_pieces(plan, stage, tensor);
            if (r < task->write_begin ? !merges : !writes)
                return UNSAFE(err, "%.95s uses %.95s, whose values tell by themselves whether they are there",
                              stage->name, plan->tensors[tensor].name);
        }
    }
    return PERK_OK;
}

/* The stages that make pieces follow each other, the first the last: each in the scratch that the one before has made
 * vacant, not in its own. */
static perk_status check_turns(const perk_plan *plan, perk_error *err) {
    const perk_stage *first = NULL, *before = NULL;
    for (int s = 0; s < plan->stage_count; s++) {
        const perk_stage *stage = &plan->stages[s];
        if (stage->work != PERK_WORK_PARTIAL || !stage->eager) continue;
        if (stage->operands[1] == stage->operands[5] || (before && before->operands[5] != stage->operands[1]))
            return UNSAFE(err, "nobody makes the scratch of %.95s vacant", stage->name);
        if (!first) first = stage;
        before = stage;
    }
    if (before && before->operands[5] != first->operands[1])
        return UNSAFE(err, "nobody makes the scratch of %.95s vacant", first->name);
    return PERK_OK;
}

/* A piece is made by the worker that made its place vacant: only its own stores come in their order. */
static perk_status check_makers(const perk_plan *plan, perk_error *err) {
    int stages = 0;
    int32_t *units = perk_calloc((size_t)plan->device.worker_count * 2, sizeof *units); /* first, count */
    if (!units) return perk_fail_memory(err, "the check");
    perk_status status = PERK_OK;
    for (int s = 0; s < plan->stage_count && status == PERK_OK; s++) {
        const perk_stage *stage = &plan->stages[s];
        if (stage->work != PERK_WORK_PARTIAL || !stage->eager) continue;
        for (int i = 0; i < plan->task_count && status == PERK_OK; i++) {
            const perk_task *task = &plan->tasks[i];
            int32_t *mine = units + 2 * (size_t)task->worker;
            if (task->stage != s) continue;
            if (stages == 0 && mine[1] == 0) {
                mine[0] = task->first;
                mine[1] = task->count;
            }
            if (mine[0] != task->first || mine[1] != task->count || task->stride != 1)
                status = UNSAFE(err, "worker %d makes other pieces in %.95s than in the layers before", task->worker,
                                stage->name);
        }
        stages++;
    }
    free(units);
    return status;
}

static perk_status check_pieces(const perk_plan *plan, perk_error *err) {
    perk_status status = check_scratch_uses(plan, err);
    if (status == PERK_OK) status = check_turns(plan, err);
    if (status == PERK_OK) status = check_makers(plan, err);
    return status;
}

perk_status perk_check_eager(const perk_plan *plan, perk_error *err) {
    bool any = plan->eager_bytes > 0;
    for (int t = 0; t < plan->tensor_count; t++) any |= plan->tensors[t].eager;
    for (int s = 0; s < plan->stage_count; s++) any |= plan->stages[s].eager;
    for (int t = 0; t < plan->tensor_count; t++) any |= plan->tensors[t].of_pieces;
    if (!any) return PERK_OK;
    tensor_uses *uses = find_uses(plan);
    if (!uses) return perk_fail_memory(err, "the check");
    perk_status status = check_places(plan, err);
    if (status == PERK_OK) status = check_stages(plan, uses, err);
    if (status == PERK_OK && plan->eager_bytes > 0) status = check_clearing(plan, err);
    if (status == PERK_OK) status = check_pieces(plan, err);
    free(uses);
    return status;
}
