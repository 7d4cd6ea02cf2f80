/* perk bench: measurements. */
#include "cli.h"

int perk_cli_bench(const perk_cli_command *self, int argc, char **argv) {
    int json = 0;
    const perk_cli_option items[] = {PERK_CLI_OPTION_FLAG("json", &json, "the result as one JSON object")};
    perk_cli_options options = {0};
    perk_cli_add(&options, items, (int)PERK_COUNT(items));
    int code = perk_cli_parse(self, &options, argc, argv, 0, NULL);
    if (code != PERK_EXIT_GO_ON) return code;
    perk_cli_error("bench: not built yet");
    return PERK_EXIT_FAILURE;
}
