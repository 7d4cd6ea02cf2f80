/* Command-line options: --name value, --name=value, --flag, -- to end them, --help. */
#include "cli.h"

#include <errno.h>
#include <math.h>

void perk_cli_add(perk_cli_options *options, const perk_cli_option *items, int count) {
    for (int i = 0; i < count && options->count < PERK_CLI_MAX_OPTIONS; i++)
        options->items[options->count++] = items[i];
}

/* ---- help ---- */

static void print_help(const perk_cli_command *command, const perk_cli_options *options) {
    printf("perk %s: %s\n\nUsage:\n", command->name, command->summary);
    for (const char *line = command->usage; *line;) {
        size_t length = strcspn(line, "\n");
        printf("  perk %s %.*s\n", command->name, (int)length, line);
        line += length + (line[length] == '\n');
    }
    if (command->details) printf("\n%s\n", command->details);
    printf("\nOptions:\n");
    for (int i = 0; i < options->count; i++) {
        const perk_cli_option *option = &options->items[i];
        const char *value = option->choices ? option->choices : option->value;
        int width = printf("  --%s%s%s", option->name, value ? " " : "", value ? value : "");
        printf("%*s%s\n", width < 30 ? 30 - width : 1, "", option->help);
    }
    printf("  --help                      this text\n");
    printf("\nExamples:\n%s\n", command->examples);
}

/* ---- mistakes ---- */

/* Letters to change, insert or remove to get from a to b; names are short. */
static int edit_distance(const char *a, const char *b) {
    enum { MAX_NAME = 40 };
    size_t length_a = strlen(a), length_b = strlen(b);
    if (length_a >= MAX_NAME || length_b >= MAX_NAME) return MAX_NAME;
    int row[MAX_NAME + 1];
    for (size_t j = 0; j <= length_b; j++) row[j] = (int)j;
    for (size_t i = 1; i <= length_a; i++) {
        int diagonal = row[0];
        row[0] = (int)i;
        for (size_t j = 1; j <= length_b; j++) {
            int replaced = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            row[j] = PERK_MIN(replaced, 1 + PERK_MIN(row[j], row[j - 1]));
        }
    }
    return row[length_b];
}

const char *perk_cli_nearest(const char *wrong, const char *const *names, int count) {
    const char *best = NULL;
    int best_distance = 1 + (int)strlen(wrong) / 3;
    for (int i = 0; i < count; i++) {
        int distance = edit_distance(wrong, names[i]);
        if (distance > best_distance || (best && distance == best_distance)) continue;
        best = names[i];
        best_distance = distance;
    }
    return best;
}

static int unknown_option(const perk_cli_command *command, const perk_cli_options *options, const char *name) {
    const char *names[PERK_CLI_MAX_OPTIONS];
    for (int i = 0; i < options->count; i++) names[i] = options->items[i].name;
    const char *near = perk_cli_nearest(name, names, options->count);
    if (near) return perk_cli_usage(command, "unknown option --%s; did you mean --%s?", name, near);
    return perk_cli_usage(command, "unknown option --%s", name);
}

/* ---- values ---- */

static bool in_range(const perk_cli_option *option, double value) {
    if (isnan(value)) return false;
    return (option->min == 0 && option->max == 0) || (value >= option->min && value <= option->max);
}

static bool parse_int(const perk_cli_option *option, const char *text) {
    char *end;
    errno = 0;
    long value = strtol(text, &end, 10);
    if (errno || end == text || *end || value < INT32_MIN || value > INT32_MAX || !in_range(option, (double)value))
        return false;
    *(int32_t *)option->target = (int32_t)value;
    return true;
}

/* Sizes know K, M and G (of 1024). */
static bool parse_u64(const perk_cli_option *option, const char *text, bool is_size) {
    char *end;
    errno = 0;
    if (*text < '0' || *text > '9') return false;
    unsigned long long value = strtoull(text, &end, 0);
    if (errno) return false;
    int shift = !is_size || !*end ? 0 : *end == 'K' ? 10 : *end == 'M' ? 20 : *end == 'G' ? 30 : -1;
    if (shift < 0 || (shift && value > UINT64_MAX >> shift) || end[shift ? 1 : 0]) return false;
    *(uint64_t *)option->target = (uint64_t)value << shift;
    return true;
}

static bool parse_float(const perk_cli_option *option, const char *text) {
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || !isfinite(value) || !in_range(option, value)) return false;
    *(float *)option->target = (float)value;
    return true;
}

static bool parse_choice(const perk_cli_option *option, const char *text) {
    int index = 0;
    for (const char *choice = option->choices; choice; choice = strchr(choice, '|'), index++) {
        if (*choice == '|') choice++;
        size_t length = strcspn(choice, "|");
        if (strlen(text) == length && strncmp(choice, text, length) == 0) {
            *(int *)option->target = index;
            return true;
        }
    }
    return false;
}

static bool parse_value(const perk_cli_option *option, const char *text) {
    switch (option->kind) {
    case PERK_CLI_FLAG: *(int *)option->target = 1; return true;
    case PERK_CLI_INT: return parse_int(option, text);
    case PERK_CLI_SEED: return parse_u64(option, text, false);
    case PERK_CLI_BYTES: return parse_u64(option, text, true);
    case PERK_CLI_FLOAT: return parse_float(option, text);
    case PERK_CLI_TEXT: *(const char **)option->target = text; return true;
    case PERK_CLI_CHOICE: return parse_choice(option, text);
    }
    return false;
}

static int bad_value(const perk_cli_command *command, const perk_cli_option *option, const char *text) {
    char expected[160] = "a whole number";
    if (option->kind == PERK_CLI_BYTES) snprintf(expected, sizeof expected, "a size such as 4096, 64K, 16M or 2G");
    if (option->kind == PERK_CLI_FLOAT) snprintf(expected, sizeof expected, "a number");
    if (option->kind == PERK_CLI_CHOICE) snprintf(expected, sizeof expected, "one of %s", option->choices);
    if ((option->kind == PERK_CLI_INT || option->kind == PERK_CLI_FLOAT) && (option->min != 0 || option->max != 0)) {
        size_t used = strlen(expected);
        snprintf(expected + used, sizeof expected - used, " from %.10g to %.10g", option->min, option->max);
    }
    return perk_cli_usage(command, "--%s must be %s, not \"%s\"", option->name, expected, text);
}

/* ---- parsing ---- */

/* Parses the option at argv[*at], and moves *at to its last word. */
static int parse_option(const perk_cli_command *command, const perk_cli_options *options, int argc, char **argv,
                        int *at) {
    const char *word = argv[*at] + 2, *equals = strchr(word, '=');
    size_t length = equals ? (size_t)(equals - word) : strlen(word);
    const perk_cli_option *option = NULL;
    for (int i = 0; i < options->count && !option; i++)
        if (strlen(options->items[i].name) == length && strncmp(options->items[i].name, word, length) == 0)
            option = &options->items[i];
    if (!option) {
        char name[64];
        snprintf(name, sizeof name, "%.*s", (int)PERK_MIN(length, sizeof name), word);
        return unknown_option(command, options, name);
    }
    const char *value = equals ? equals + 1 : NULL;
    if (option->kind == PERK_CLI_FLAG) {
        if (value) return perk_cli_usage(command, "--%s takes no value", option->name);
    } else if (!value) {
        if (*at + 1 >= argc) return perk_cli_usage(command, "--%s needs a value", option->name);
        value = argv[++*at];
    }
    return parse_value(option, value) ? PERK_EXIT_GO_ON : bad_value(command, option, value);
}

int perk_cli_parse(const perk_cli_command *command, const perk_cli_options *options, int argc, char **argv,
                   int max_arguments, perk_cli_arguments *arguments) {
    perk_cli_arguments found = {.items = argv};
    bool options_ended = false;
    for (int i = 0; i < argc; i++) {
        const char *word = argv[i];
        bool is_option = !options_ended && word[0] == '-' && word[1];
        if (is_option && strcmp(word, "--") == 0) {
            options_ended = true;
        } else if (is_option && (strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0)) {
            print_help(command, options);
            return PERK_EXIT_OK;
        } else if (is_option && word[1] != '-') {
            return perk_cli_usage(command, "unknown option %s; options begin with two dashes, and -- ends them", word);
        } else if (is_option) {
            int code = parse_option(command, options, argc, argv, &i);
            if (code != PERK_EXIT_GO_ON) return code;
        } else {
            argv[found.count++] = argv[i]; /* arguments gather at the front, behind what was read already */
        }
    }
    if (found.count > max_arguments)
        return perk_cli_usage(command, "unexpected argument \"%s\"", found.items[max_arguments]);
    if (arguments) *arguments = found;
    return PERK_EXIT_GO_ON;
}
