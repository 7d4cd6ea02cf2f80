/* Tests of ops, run one after the other and shown: what perk test-op and perk doctor --selftest share. */
#ifndef PERK_SRC_CLI_TEST_OP_H
#define PERK_SRC_CLI_TEST_OP_H

#include "cli.h"

#include "src/test_ops.h"

typedef struct perk_cli_test_output {
    json_t *list; /* gets an object for each case */
    bool print;   /* a row for each case, or, with failed_only, for those that failed */
    bool failed_only;
} perk_cli_test_output;

typedef struct perk_cli_test_tally {
    int passed, failed; /* failed: wrong, or could not run */
    int uncompared;     /* among passed: the reference ran alone */
} perk_cli_test_tally;

/* Runs `count` cases and adds them to the tally. */
void perk_cli_run_op_cases(const perk_op_case *cases, size_t count, const perk_test_options *options,
                           const perk_cli_test_output *output, perk_cli_test_tally *tally);

#endif
