/* perk tokenize: text to ids and back, whole or line by line as JSON. */
#include "cli.h"

typedef struct tokenize_options {
    const char *model;
    int decode, jsonl, chat, no_special, skip_special;
} tokenize_options;

static int parse(const perk_cli_command *command, tokenize_options *tokenize, int argc, char **argv,
                 perk_cli_arguments *arguments) {
    const perk_cli_option items[] = {
        PERK_CLI_OPTION_TEXT("model", &tokenize->model, "DIR", "a folder with a tokenizer.json"),
        PERK_CLI_OPTION_FLAG("decode", &tokenize->decode, "ids to text"),
        PERK_CLI_OPTION_FLAG("jsonl", &tokenize->jsonl, "one JSON value a line, in and out"),
        PERK_CLI_OPTION_FLAG("chat", &tokenize->chat, "lines are lists of chat messages"),
        PERK_CLI_OPTION_FLAG("no-special", &tokenize->no_special, "do not add the tokenizer's special tokens"),
        PERK_CLI_OPTION_FLAG("skip-special", &tokenize->skip_special, "leave special tokens out of decoded text"),
    };
    perk_cli_options options = {0};
    perk_cli_add(&options, items, (int)PERK_COUNT(items));
    int code = perk_cli_parse(command, &options, argc, argv, INT32_MAX, arguments);
    if (code != PERK_EXIT_GO_ON) return code;
    if (!tokenize->model) return perk_cli_usage(command, "--model is missing");
    if (tokenize->chat && (!tokenize->jsonl || tokenize->decode))
        return perk_cli_usage(command, "--chat goes with --jsonl, and not with --decode");
    if (tokenize->jsonl && arguments->count) return perk_cli_usage(command, "--jsonl reads stdin, not arguments");
    if (!tokenize->decode && arguments->count > 1)
        return perk_cli_usage(command, "unexpected argument \"%s\"; put the text in quotes", arguments->items[1]);
    return PERK_EXIT_GO_ON;
}

static perk_status encode(const perk_tokenizer *tokenizer, const char *text, size_t size, int add_special_tokens,
                          perk_cli_ids *ids, perk_error *err) {
    perk_encode_options options = {.add_special_tokens = add_special_tokens, .parse_special = 1};
    return perk_tokenizer_encode(tokenizer, text, size, &options, &ids->items, &ids->count, err);
}

/* ---- whole texts ---- */

/* The arguments separated by spaces, or stdin. */
static perk_status gather_input(const perk_cli_arguments *arguments, perk_buffer *input, perk_error *err) {
    if (arguments->count == 0) return perk_cli_read_all(stdin, input, err);
    for (int i = 0; i < arguments->count; i++) perk_buffer_printf(input, "%s%s", i ? " " : "", arguments->items[i]);
    return input->failed ? perk_fail_memory(err, "the input") : PERK_OK;
}

static perk_status encode_whole(const perk_tokenizer *tokenizer, const tokenize_options *tokenize,
                                const perk_buffer *input, perk_error *err) {
    perk_cli_ids ids = {0};
    perk_status status = encode(tokenizer, input->data, input->size, !tokenize->no_special, &ids, err);
    if (status) return status;
    for (size_t i = 0; i < ids.count; i++) printf("%s%d", i ? " " : "", ids.items[i]);
    putchar('\n');
    perk_cli_ids_free(&ids);
    return PERK_OK;
}

static perk_status decode_whole(const perk_tokenizer *tokenizer, const tokenize_options *tokenize,
                                const perk_buffer *input, perk_error *err) {
    perk_cli_ids ids = {0};
    char *text = NULL;
    size_t size;
    perk_status status = perk_cli_ids_parse(&ids, input->data, err);
    if (!status)
        status = perk_tokenizer_decode(tokenizer, ids.items, ids.count, tokenize->skip_special, &text, &size, err);
    if (!status) {
        fwrite(text, 1, size, stdout);
        putchar('\n');
    }
    free(text);
    perk_cli_ids_free(&ids);
    return status;
}

/* ---- a JSON value a line ---- */

static json_t *ids_object(const perk_cli_ids *ids) {
    json_t *list = json_array();
    for (size_t i = 0; i < ids->count; i++) json_array_append_new(list, json_integer(ids->items[i]));
    return json_pack("{s:o}", "ids", list);
}

static perk_status encode_line(const perk_tokenizer *tokenizer, const tokenize_options *tokenize, const json_t *line,
                               json_t **out, perk_error *err) {
    if (!json_is_string(line)) return perk_fail(err, PERK_BAD_FORMAT, "expected a JSON string");
    perk_cli_ids ids = {0};
    perk_status status =
        encode(tokenizer, json_string_value(line), json_string_length(line), !tokenize->no_special, &ids, err);
    if (!status) *out = ids_object(&ids);
    perk_cli_ids_free(&ids);
    return status;
}

static perk_status decode_line(const perk_tokenizer *tokenizer, const tokenize_options *tokenize, const json_t *line,
                               json_t **out, perk_error *err) {
    perk_cli_ids ids = {0};
    char *text = NULL;
    size_t size;
    const json_t *list = json_is_object(line) ? json_object_get(line, "ids") : line;
    perk_status status = perk_cli_ids_from_json(&ids, list, err);
    if (!status)
        status = perk_tokenizer_decode(tokenizer, ids.items, ids.count, tokenize->skip_special, &text, &size, err);
    if (!status) *out = json_stringn(text, size);
    free(text);
    perk_cli_ids_free(&ids);
    return status;
}

static perk_status chat_line(const perk_tokenizer *tokenizer, const json_t *line, json_t **out, perk_error *err) {
    perk_cli_ids ids = {0};
    char *text = NULL;
    perk_status status = perk_cli_chat_text(tokenizer, line, &text, err);
    if (!status) status = encode(tokenizer, text, strlen(text), 0, &ids, err);
    if (!status) {
        *out = ids_object(&ids);
        json_object_set_new(*out, "text", json_string(text));
    }
    free(text);
    perk_cli_ids_free(&ids);
    return status;
}

static perk_status convert_line(const perk_tokenizer *tokenizer, const tokenize_options *tokenize, const char *text,
                                size_t size, json_t **out, perk_error *err) {
    json_error_t json_err;
    json_t *line = json_loadb(text, size, JSON_DECODE_ANY | JSON_ALLOW_NUL, &json_err);
    if (!line) return perk_fail(err, PERK_BAD_FORMAT, "not JSON: %s", json_err.text);
    perk_status status = tokenize->decode ? decode_line(tokenizer, tokenize, line, out, err)
                         : tokenize->chat ? chat_line(tokenizer, line, out, err)
                                          : encode_line(tokenizer, tokenize, line, out, err);
    json_decref(line);
    return status;
}

static int convert_lines(const perk_tokenizer *tokenizer, const tokenize_options *tokenize) {
    char *line = NULL;
    size_t capacity = 0;
    int code = PERK_EXIT_OK;
    ssize_t length;
    for (long number = 1; code == PERK_EXIT_OK && (length = getline(&line, &capacity, stdin)) >= 0; number++) {
        if (strspn(line, " \t\r\n") == (size_t)length) continue;
        json_t *out = NULL;
        perk_error err = {0};
        if (convert_line(tokenizer, tokenize, line, (size_t)length, &out, &err)) {
            perk_cli_error("line %ld: %s", number, err.message);
            code = PERK_EXIT_FAILURE;
        } else if (!perk_cli_print_json(out) || fflush(stdout)) { /* whoever writes line by line reads line by line */
            code = PERK_EXIT_FAILURE;
        }
    }
    free(line);
    return code;
}

int perk_cli_tokenize(const perk_cli_command *self, int argc, char **argv) {
    tokenize_options tokenize = {0};
    perk_cli_arguments arguments;
    int code = parse(self, &tokenize, argc, argv, &arguments);
    if (code != PERK_EXIT_GO_ON) return code;
    perk_error err = {0};
    perk_tokenizer *tokenizer = NULL;
    perk_buffer input = {0};
    perk_status status = perk_tokenizer_load(&tokenizer, tokenize.model, &err);
    if (!status && tokenize.jsonl) {
        code = convert_lines(tokenizer, &tokenize);
    } else if (!status) {
        status = gather_input(&arguments, &input, &err);
        if (!status) status = (tokenize.decode ? decode_whole : encode_whole)(tokenizer, &tokenize, &input, &err);
        code = PERK_EXIT_OK;
    }
    if (status) code = perk_cli_fail(&err);
    perk_buffer_free(&input);
    perk_tokenizer_free(tokenizer);
    return code;
}
