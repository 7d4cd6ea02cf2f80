/* Eager values (kernels_src/abi.h): which stages of a plan signal without a fence, since their values tell by
 * themselves whether they are there. */
#ifndef PERK_SRC_PLAN_EAGER_H
#define PERK_SRC_PLAN_EAGER_H

#include "plan.h"

/* Marks tensors and stages of a plan whose tasks and shared memory are made. Tensors get their places later. */
perk_status perk_plan_choose_eager(perk_plan *plan, perk_error *err);

/* The checker's part: PERK_UNSAFE_PLAN where somebody could take a vacant place, or what an earlier step left there,
 * for a value. The plan's arrays have been checked, and its regions. */
perk_status perk_check_eager(const perk_plan *plan, perk_error *err);

#endif
