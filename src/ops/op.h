/* An op: its layer call and shape check (the public function, in src/ops/<op>.c), its reference in plain C, and its
 * lowering to stages of tasks with the instantiation of its device code. One table row an op; registry:
 * src/ops/ops.def.
 */
#ifndef PERK_SRC_OPS_OP_H
#define PERK_SRC_OPS_OP_H

#include "graph.h"

struct perk_reference;
struct perk_lowering;

struct perk_op_type {
    const char *name; /* of the layer call, "rmsnorm" */
    /* Computes the op's output for the current step of the reference executor (src/reference.h). */
    perk_status (*reference)(struct perk_reference *reference, const perk_op *op, perk_error *err);
    /* Adds the op's stages to the plan (src/lower.h). */
    perk_status (*lower)(struct perk_lowering *lowering, const perk_op *op, perk_error *err);
    /* The same of stages that nothing else in the step waits for: they come when workers have time. NULL: none. */
    perk_status (*lower_later)(struct perk_lowering *lowering, const perk_op *op, perk_error *err);
};

#define PERK_OP(name) extern const perk_op_type perk_op_##name;
#include "ops/ops.def"
#undef PERK_OP

#endif
