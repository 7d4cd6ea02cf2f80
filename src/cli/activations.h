/* What every op of one step made, as files: for the search of the first one that is wrong. */
#ifndef PERK_SRC_CLI_ACTIVATIONS_H
#define PERK_SRC_CLI_ACTIVATIONS_H

#include "cli.h"

typedef struct perk_cli_dump {
    const char *folder; /* NULL: nothing is written */
    int32_t step;       /* which, from 0 */
    int32_t seen;       /* steps so far */
} perk_cli_dump;

void perk_cli_add_dump(perk_cli_options *options, perk_cli_dump *dump);
/* From here on the engine's steps are counted, and the one that was asked for is written. `dump` must live as long as
 * the engine runs. Fails with PERK_UNSUPPORTED where the backend keeps no activations. */
perk_status perk_cli_dump_begin(perk_cli_dump *dump, perk_engine *engine, perk_error *err);
/* Fails when the step never came. */
perk_status perk_cli_dump_end(const perk_cli_dump *dump, perk_error *err);

#endif
