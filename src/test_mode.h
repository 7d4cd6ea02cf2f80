/* Test mode's inner face, for tests that run a step more than once. */
#ifndef PERK_SRC_TEST_MODE_H
#define PERK_SRC_TEST_MODE_H

#include "executor.h"
#include "perk/test.h"

/* Poisons the activations and runs the one step again on the same inputs and the same history. After a run that went
 * well. */
perk_status perk_test_repeat(perk_test *test, perk_error *err);

/* What runs the program; the test's own. NULL before the run. */
perk_executor *perk_test_executor(perk_test *test);

/* perk_test_measure with a fixed unit; 0: that of bf16. */
void perk_test_measure_by(const float *got, const float *wanted, size_t rows, size_t cols, double unit,
                          perk_test_difference *out);

#endif
