/* Whether two plans of one graph may run over the same weights, constants and KV pages. */
#ifndef PERK_SRC_PLAN_SHARED_H
#define PERK_SRC_PLAN_SHARED_H

#include "plan.h"

/* What both plans read from, or keep in, must lie in the same places: the stored tensors one by one, the sizes of their
 * spaces, the pages and which layer of them an op uses, and the workers that weights are dealt out to. Activations,
 * counters, tasks and batch are a plan's own. PERK_UNSUPPORTED with the first difference. */
perk_status perk_plan_check_shared(const perk_plan *plan, const perk_plan *other, perk_error *err);

#endif
