/* perk, the program: every command once, what it prints and how it exits. */
#include "src/base.h"
#include "temp.h"

#include <jansson.h>
#include <math.h>
#include <stdarg.h>
#include <sys/wait.h>

#define FOLDER PERK_SOURCE_DIR "/tests/fixtures/checkpoints/single" /* Qwen3, vocabulary 128, no tokenizer */
#define TINY PERK_SOURCE_DIR "/examples/tiny"

static perk_error err;
static temp_folder temp;

/* ---- running it ---- */

typedef struct outcome {
    int code;
    char *out, *errors; /* stdout and stderr */
    size_t out_size;
} outcome;

static void outcome_free(outcome *result) {
    free(result->out);
    free(result->errors);
}

/* Runs "perk ARGUMENTS" by the shell, with `input` as stdin. No GPU is used, even where there is one. */
static outcome run_perk(const char *input, const char *format, ...) {
    char arguments[2048], command[4096];
    va_list list;
    va_start(list, format);
    vsnprintf(arguments, sizeof arguments, format, list);
    va_end(list);
    const char *binary = getenv("PERK_TEST_CLI");
    temp_write_text(&temp, "in", input ? input : "");
    snprintf(command, sizeof command,
             "cd '%s' && PERK_LIBCUDA=/nonexistent PERK_CACHE_DIR='%s/cache' '%s' %s < in > out 2> errors", temp.path,
             temp.path, binary ? binary : PERK_BINARY_DIR "/bin/perk", arguments);
    outcome result = {0};
    size_t size;
    int code = system(command);
    CHECK(WIFEXITED(code), "perk %s: died", arguments);
    result.code = WEXITSTATUS(code);
    result.out = temp_read(&temp, "out", &result.out_size);
    result.errors = temp_read(&temp, "errors", &size);
    CHECK(result.code != 0 || strstr(result.errors, "perk: warning") == NULL, "perk %s: %s", arguments, result.errors);
    return result;
}

#define CHECK_CODE(result, expected)                                                                                   \
    CHECK((result).code == (expected), "exit code %d: %s", (result).code, (result).errors)

/* stderr must be one message of perk's own that contains `text`. */
static void expect_failure(int code, const char *text, const char *arguments) {
    outcome result = run_perk(NULL, "%s", arguments);
    CHECK(result.code == code, "perk %s: exit code %d: %s", arguments, result.code, result.errors);
    CHECK(strncmp(result.errors, "perk: ", 6) == 0 && strstr(result.errors, text), "perk %s: %s", arguments,
          result.errors);
    CHECK(result.out_size == 0, "perk %s wrote to stdout: %s", arguments, result.out);
    outcome_free(&result);
}

static json_t *run_json(const char *input, const char *arguments) {
    outcome result = run_perk(input, "%s", arguments);
    CHECK_CODE(result, 0);
    json_error_t json_err;
    json_t *json = json_loads(result.out, JSON_DECODE_ANY, &json_err);
    CHECK(json, "perk %s: %s: %s", arguments, json_err.text, result.out);
    outcome_free(&result);
    return json;
}

static void expect_output(const char *input, const char *expected, const char *arguments) {
    outcome result = run_perk(input, "%s", arguments);
    CHECK_CODE(result, 0);
    CHECK(strcmp(result.out, expected) == 0, "perk %s: %s", arguments, result.out);
    outcome_free(&result);
}

/* ---- help and usage ---- */

static void test_help(void) {
    static const char *const names[] = {"run",   "tokenize", "logits", "compile", "plan",
                                        "cache", "doctor",   "bench",  "test-op"};
    expect_output(NULL, "perk 0.1.0\n", "--version");
    outcome all = run_perk(NULL, "--help");
    CHECK_CODE(all, 0);
    CHECK(strstr(all.out, "Exit codes"));
    for (size_t i = 0; i < PERK_COUNT(names); i++) {
        CHECK(strstr(all.out, names[i]));
        outcome one = run_perk(NULL, "%s --help", names[i]);
        CHECK_CODE(one, 0);
        CHECK(strstr(one.out, "Examples:") && strstr(one.out, "--json"), "%s: %s", names[i], one.out);
        outcome_free(&one);
    }
    outcome_free(&all);
    outcome none = run_perk(NULL, " ");
    CHECK_CODE(none, 2);
    outcome_free(&none);
}

static void test_usage(void) {
    expect_failure(2, "did you mean \"run\"", "rum");
    expect_failure(2, "did you mean --max-tokens", "run --max-token 3");
    expect_failure(2, "unknown option --frobnicate", "run --frobnicate");
    expect_failure(2, "--seed needs a value", "run --seed");
    expect_failure(2, "--temperature must be a number", "run --temperature warm");
    expect_failure(2, "from 0 to 1", "run --top-p 1.5");
    expect_failure(2, "auto|gpu|reference", "run --backend tpu");
    expect_failure(2, "takes no value", "run --json=1");
    expect_failure(2, "unexpected argument \"x\"", "run x");
    expect_failure(2, "--model is missing", "run --prompt x");
    expect_failure(2, "nothing to run", "run --model " FOLDER);
    expect_failure(2, "--system needs --chat", "run --prompt x --system y");
    expect_failure(2, "--ids is missing", "logits --model " FOLDER);
    expect_failure(2, "list, verify, prune or clear", "cache");
    expect_failure(2, "prune needs --max-bytes", "cache prune");
    expect_failure(2, "two dashes", "run -p x");
    expect_failure(2, "--model is missing", "tokenize x");
    expect_failure(2, "--model is missing", "plan");
    expect_failure(2, "--model is missing", "compile");
    expect_failure(2, "name one op, or give --all", "test-op");
    expect_failure(2, "name one op, or give --all", "test-op linear --all");
    expect_failure(2, "did you mean \"linear\"", "test-op lineal");
    expect_failure(2, "--head-dim must be a whole number", "test-op attention --head-dim 0");
}

/* ---- commands ---- */

static void test_run(void) {
    json_t *json = run_json(NULL, "run --model " FOLDER " --tokens 1,2,3 --max-tokens 5 --ignore-eos --json");
    CHECK(json_array_size(json_object_get(json, "tokens")) == 5);
    CHECK(json_integer_value(json_object_get(json, "prompt_tokens")) == 3);
    CHECK(strcmp(json_string_value(json_object_get(json, "finish")), "length") == 0);
    CHECK(json_is_object(json_object_get(json, "times")) && json_is_string(json_object_get(json, "text")));
    json_t *start = json_object_get(json, "start");
    CHECK(strcmp(json_string_value(json_object_get(start, "backend")), "reference") == 0);
    perk_buffer line = {0};
    for (size_t i = 0; i < 5; i++)
        perk_buffer_printf(&line, "%s%d", i ? " " : "",
                           (int)json_integer_value(json_array_get(json_object_get(json, "tokens"), i)));
    perk_buffer_printf(&line, "\n");
    expect_output(NULL, line.data, "run --model " FOLDER " --tokens '1 2 3' --max-tokens 5 --ignore-eos");
    perk_buffer_free(&line);
    json_decref(json);

    json = run_json(NULL, "run --model " FOLDER "/config.json --random-weights --tokens 1 --max-tokens 2 --json "
                          "--backend=reference --max-seq-length 32 --page-size 16 --threads 1");
    CHECK(json_array_size(json_object_get(json, "tokens")) <= 2);
    json_decref(json);

    expect_failure(1, "tokenizer", "run --model " FOLDER " --prompt Hello");
    expect_failure(1, "tokenizer", "run --model " FOLDER " --chat --prompt Hello");
    expect_failure(1, "max_seq_length 2", "run --model " FOLDER " --tokens 1,2,3,4 --max-seq-length 2");
    expect_failure(1, "vocabulary", "run --model " FOLDER " --tokens 1,128");
    expect_failure(1, "\"x\" is not a token id", "run --model " FOLDER " --tokens 1,x");
    expect_failure(1, "page_size", "run --model " FOLDER " --tokens 1 --page-size 17");
    expect_failure(1, "/nonexistent", "run --model /nonexistent --tokens 1");
    expect_failure(1, "config.json", "run --model . --tokens 1");
    expect_failure(1, "driver", "run --model " FOLDER " --tokens 1 --backend gpu");
}

static void test_run_text(void) {
    if (access(TINY "/model.safetensors", R_OK) != 0) {
        fprintf(stderr, "examples/tiny is not there: text is not tested\n");
        return;
    }
    outcome text = run_perk(NULL, "run --model %s --prompt 'Once upon a time' --max-tokens 12", TINY);
    CHECK_CODE(text, 0);
    json_t *json = run_json(NULL, "run --model " TINY " --prompt 'Once upon a time' --max-tokens 12 --json");
    size_t length = json_string_length(json_object_get(json, "text"));
    CHECK(text.out_size == length + 1 && text.out[length] == '\n');
    CHECK(memcmp(text.out, json_string_value(json_object_get(json, "text")), length) == 0);
    json_decref(json);
    outcome_free(&text);

    /* A stop string ends the text in front of it, streamed or not. */
    text = run_perk(NULL, "run --model %s --prompt 'Once upon a time' --max-tokens 12 --stop ' a'", TINY);
    CHECK_CODE(text, 0);
    json = run_json("{\"prompt\": \"Once upon a time\", \"stop\": [\"no such\", \" a\"]}\n",
                    "run --model " TINY " --prompts - --max-tokens 12");
    CHECK(strcmp(json_string_value(json_object_get(json, "finish")), "stop") == 0);
    length = json_string_length(json_object_get(json, "text"));
    CHECK(text.out_size == length + 1 && !strstr(text.out, " a"), "%s", text.out);
    CHECK(memcmp(text.out, json_string_value(json_object_get(json, "text")), length) == 0, "%s", text.out);
    json_decref(json);
    outcome_free(&text);

    outcome chat = run_perk("Hello!\n\nHow are you?\n", "run --model %s --chat --system Short. --max-tokens 4", TINY);
    CHECK_CODE(chat, 0);
    int lines = 0;
    for (const char *c = chat.out; *c; c++) lines += *c == '\n';
    CHECK(lines >= 2, "two turns, two answers: %s", chat.out);
    outcome_free(&chat);
    /* The second turn finds what the first one has computed, its answer as well. */
    chat = run_perk("Tell me about the boat.\nAnd then?\n",
                    "run --model %s --chat --max-tokens 40 --page-size 16 --verbose --backend reference", TINY);
    CHECK_CODE(chat, 0);
    int prompt = 0, found = 0, made = 0;
    const char *first = strstr(chat.errors, "perk: prompt "),
               *second = first ? strstr(first + 1, "perk: prompt ") : NULL;
    CHECK(second && sscanf(first, "perk: prompt %d tokens, 0 of them known, in %*f ms; then %d", &prompt, &made) == 2,
          "%s", chat.errors);
    CHECK(sscanf(second, "perk: prompt %*d tokens, %d", &found) == 1 && found >= (prompt + made - 17) / 16 * 16, "%s",
          chat.errors);
    outcome_free(&chat);
    json = run_json(NULL, "run --model " TINY " --chat --prompt Hi --max-tokens 3 --json --temperature 1 --seed 4");
    json_t *again =
        run_json(NULL, "run --model " TINY " --chat --prompt Hi --max-tokens 3 --json --temperature 1 --seed 4");
    CHECK(json_equal(json_object_get(json, "tokens"), json_object_get(again, "tokens")), "same seed, same tokens");
    json_decref(json);
    json_decref(again);
}

/* The lines of an answer, as a list of JSON values. */
static json_t *lines_of(const outcome *result) {
    json_t *list = json_array();
    json_error_t json_err;
    for (const char *line = result->out, *end; *line; line = end + 1) {
        end = strchr(line, '\n');
        CHECK(end, "a line without an end: %s", line);
        json_t *value = json_loadb(line, (size_t)(end - line), 0, &json_err);
        CHECK(value, "%s: %s", json_err.text, line);
        json_array_append_new(list, value);
    }
    return list;
}

/* The answers come in the order of the requests, and each is what its request gets alone. */
static void test_prompts(void) {
    static const char alone[] = "run --model " FOLDER " --tokens 1,2,3 --max-tokens 5 --ignore-eos --json";
    static const char sampled[] = "run --model " FOLDER " --tokens 9,8 --max-tokens 40 --ignore-eos --temperature 1.5 "
                                  "--top-k 20 --seed 3 --repetition-penalty 1.2 --frequency-penalty 0.5 --json";
    static const char requests[] =
        "{\"tokens\": [9, 8], \"max_tokens\": 40, \"temperature\": 1.5, \"top_k\": 20, \"seed\": 3, \"id\": \"long\","
        " \"repetition_penalty\": 1.2, \"frequency_penalty\": 0.5}\n"
        "\n  \r\n"
        "{\"tokens\": [1, 2, 3], \"max_tokens\": 5}\n"
        "{\"tokens\": [4], \"max_tokens\": 9, \"logit_bias\": {\"77\": 100}, \"stop_tokens\": [77]}\n"
        "{\"tokens\": [4], \"max_tokens\": 2, \"logprobs\": true, \"top_logprobs\": 3, \"presence_penalty\": 1}";
    const json_t *item;
    outcome result = run_perk(requests, "run --model %s --prompts - --ignore-eos --max-tokens 1", FOLDER);
    CHECK_CODE(result, 0);
    json_t *answers = lines_of(&result), *first = run_json(NULL, sampled), *second = run_json(NULL, alone);
    CHECK(json_array_size(answers) == 4, "%s", result.out);
    item = json_array_get(answers, 0);
    CHECK(json_equal(json_object_get(item, "tokens"), json_object_get(first, "tokens")), "%s", result.out);
    CHECK(strcmp(json_string_value(json_object_get(item, "id")), "long") == 0);
    CHECK(json_number_value(json_object_get(json_object_get(item, "times"), "prefill_ms")) > 0);
    item = json_array_get(answers, 1);
    CHECK(json_equal(json_object_get(item, "tokens"), json_object_get(second, "tokens")), "%s", result.out);
    CHECK(json_integer_value(json_object_get(item, "prompt_tokens")) == 3 && !json_object_get(item, "logprobs"));
    item = json_array_get(answers, 2); /* ends at a token of its own although end tokens are ignored */
    CHECK(strcmp(json_string_value(json_object_get(item, "finish")), "stop") == 0);
    CHECK(json_array_size(json_object_get(item, "tokens")) == 1);
    json_t *single =
        run_json(NULL, "run --model " FOLDER " --tokens 4 --max-tokens 2 --ignore-eos --presence-penalty 1 "
                       "--logprobs --top-logprobs 3 --json");
    const json_t *logprobs = json_object_get(json_array_get(answers, 3), "logprobs");
    CHECK(json_equal(json_object_get(single, "logprobs"), logprobs), "%s", result.out);
    CHECK(json_is_integer(json_object_get(single, "found_tokens")));
    const json_t *place = json_array_get(logprobs, 1), *top = json_object_get(place, "top");
    CHECK(json_array_size(logprobs) == 2 && json_array_size(top) == 3, "%s", result.out);
    CHECK(json_number_value(json_object_get(json_array_get(top, 0), "logprob")) >=
          json_number_value(json_object_get(json_array_get(top, 2), "logprob")));
    json_decref(answers);
    json_decref(single);
    json_decref(first);
    json_decref(second);
    outcome_free(&result);
}

/* A wrong line gets an answer that says so, in its place; the others are answered. */
static void test_wrong_prompts(void) {
    static const struct {
        const char *line, *error;
    } cases[] = {
        {"{\"tokens\": [1], \"max_tokens\": 1}", NULL},
        {"nonsense", "not JSON"},
        {"[1]", "not a JSON object"},
        {"{}", "needs a \"prompt\""},
        {"{\"tokens\": []}", "needs a \"prompt\""},
        {"{\"tokens\": [1], \"tokens\": [2]}", "not JSON: duplicate"},
        {"{\"tokens\": [1], \"prompt\": \"a\"}", "beside another prompt"},
        {"{\"prompt\": \"a\"}", "tokenizer"},
        {"{\"tokens\": [128]}", "vocabulary"},
        {"{\"tokens\": [1], \"max_token\": 3}", "\"max_token\""},
        {"{\"tokens\": [1], \"max_tokens\": 1.5}", "\"max_tokens\" is not a whole number"},
        {"{\"tokens\": [1], \"seed\": -1}", "\"seed\""},
        {"{\"tokens\": [1], \"top_p\": 2}", "top_p 2"},
        {"{\"tokens\": [1], \"temperature\": 1e300}", "temperature"},
        {"{\"tokens\": [1], \"logprobs\": 1}", "\"logprobs\" is not true or false"},
        {"{\"tokens\": [1], \"logit_bias\": {\"x\": 1}}", "logit_bias"},
        {"{\"tokens\": [1], \"logit_bias\": {\"500\": 1}}", "bias 0 is id 500"},
        {"{\"tokens\": [1], \"stop_tokens\": 3}", "stop_tokens"},
        {"{\"tokens\": [1], \"stop\": 3}", "\"stop\" is neither"},
        {"{\"tokens\": [1], \"stop\": [\"a\", null]}", "\"stop\" is neither"},
        {"{\"tokens\": [1], \"stop\": \"a\\u0000b\"}", "\"stop\" is neither"},
        {"{\"tokens\": [1], \"stop\": \"\"}", "stop_strings 0: must be UTF-8 of 1 to 256"},
        {"{\"tokens\": [1], \"stop\": \"a\"}", "tokenizer.json to find them in"},
        {"{\"tokens\": [1], \"stop\": [\"1\",\"2\",\"3\",\"4\",\"5\",\"6\",\"7\",\"8\",\"9\"]}", "more than 8"},
        {"{\"tokens\": [2], \"max_tokens\": 1}", NULL},
    };
    perk_buffer file = {0};
    for (size_t i = 0; i < PERK_COUNT(cases); i++) perk_buffer_printf(&file, "%s\n", cases[i].line);
    outcome result = run_perk(file.data, "run --model %s --prompts -", FOLDER);
    CHECK_CODE(result, 1);
    CHECK(strstr(result.errors, "23 of 25 requests failed"), "%s", result.errors);
    json_t *answers = lines_of(&result);
    CHECK(json_array_size(answers) == PERK_COUNT(cases), "%s", result.out);
    for (size_t i = 0; i < PERK_COUNT(cases); i++) {
        const char *error = json_string_value(json_object_get(json_array_get(answers, i), "error"));
        CHECK(cases[i].error ? error && strstr(error, cases[i].error) : !error, "%s: %s", cases[i].line, error);
    }
    json_decref(answers);
    outcome_free(&result);
    perk_buffer_free(&file);
    expect_failure(1, "nowhere.jsonl", "run --model " FOLDER " --prompts nowhere.jsonl");
    expect_failure(2, "goes with none", "run --model " FOLDER " --prompts x --tokens 1");
    expect_failure(2, "needs --json or --prompts", "run --model " FOLDER " --tokens 1 --logprobs");
    expect_failure(2, "needs --logprobs", "run --model " FOLDER " --tokens 1 --json --top-logprobs 2");
    expect_failure(2, "top-logprobs", "run --model " FOLDER " --tokens 1 --json --logprobs --top-logprobs 21");
    expect_output("\n", "", "run --model " FOLDER " --prompts -");
}

static void test_tokenize(void) {
    temp_folder folder = temp_make();
    char *data;
    size_t size;
    CHECK_OK(perk_read_file(PERK_SOURCE_DIR "/tests/fixtures/tokenizer_small.json", 1 << 24, &data, &size, &err));
    temp_write(&folder, "tokenizer.json", data, size);
    free(data);
    char arguments[1024];
    snprintf(arguments, sizeof arguments, "tokenize --model %s 'Hello there'", folder.path);
    outcome ids = run_perk(NULL, "%s", arguments);
    CHECK_CODE(ids, 0);
    snprintf(arguments, sizeof arguments, "tokenize --model %s", folder.path);
    expect_output("Hello there", ids.out, arguments);
    snprintf(arguments, sizeof arguments, "tokenize --model %s --decode --skip-special", folder.path);
    expect_output(ids.out, "Hello there\n", arguments);
    outcome_free(&ids);

    snprintf(arguments, sizeof arguments, "tokenize --model %s --jsonl --no-special", folder.path);
    outcome lines = run_perk("\"a\\u0000b\"\n\n\"\xc3\xa9\\ud83d\\ude00\"\n\"\"\n", "%s", arguments);
    CHECK_CODE(lines, 0);
    CHECK(strncmp(lines.out, "{\"ids\": [", 9) == 0, "%s", lines.out);
    snprintf(arguments, sizeof arguments, "tokenize --model %s --jsonl --decode", folder.path);
    expect_output(lines.out, "\"a\\u0000b\"\n\"\xc3\xa9\xf0\x9f\x98\x80\"\n\"\"\n", arguments);
    outcome_free(&lines);
    expect_output("[]\n", "\"\"\n", arguments);
    outcome bad = run_perk("[1]\n{\"ids\": [-1]}\n", "%s", arguments);
    CHECK(bad.code == 1 && strstr(bad.errors, "line 2"), "%s", bad.errors);
    outcome_free(&bad);
    bad = run_perk("oops\n", "%s", arguments);
    CHECK(bad.code == 1 && strstr(bad.errors, "line 1: not JSON"), "%s", bad.errors);
    outcome_free(&bad);
    snprintf(arguments, sizeof arguments, "tokenize --model %s --jsonl --chat", folder.path);
    bad = run_perk("[{\"role\": \"user\"}]\n", "%s", arguments);
    CHECK(bad.code == 1 && strstr(bad.errors, "message 0"), "%s", bad.errors);
    outcome_free(&bad);
    temp_remove(&folder);
}

/* What every op made: an index, and a file each; the logits among them are those of --out. */
static void test_dump(void) {
    temp_folder folder = temp_make();
    char path[1024];
    temp_write_text(&temp, "ids.json", "[[1, 2, 3, 4, 5], [7, 8]]");
    outcome result = run_perk(NULL, "logits --model %s --ids ids.json --out x.npy --dump-activations %s --dump-step 1",
                              FOLDER, folder.path);
    CHECK_CODE(result, 0);
    outcome_free(&result);
    json_t *index = json_load_file(temp_path(&folder, "index.json", path, sizeof path), 0, NULL);
    const json_t *list = json_object_get(index, "activations"), *line = NULL;
    CHECK(json_integer_value(json_object_get(index, "step")) == 1);
    CHECK(json_array_size(json_object_get(index, "tokens")) == 2, "a whole list is one step");
    bool found = false;
    for (size_t i = 0; i < json_array_size(list); i++) {
        line = json_array_get(list, i);
        const char *name = json_string_value(json_object_get(line, "name"));
        CHECK(json_is_null(json_object_get(line, "layer")) == (strncmp(name, "layers.", 7) != 0), "%s", name);
        CHECK(access(temp_path(&folder, json_string_value(json_object_get(line, "file")), path, sizeof path), R_OK) ==
                  0,
              "%s", path);
        if (strcmp(name, "logits") != 0) continue;
        found = true;
        size_t size, whole_size;
        char *logits = temp_read(&folder, json_string_value(json_object_get(line, "file")), &size);
        char *whole = temp_read(&temp, "x.npy", &whole_size);
        size_t bytes = 2 * 128 * sizeof(float);
        CHECK(size > bytes && memcmp(logits + size - bytes, whole + whole_size - bytes, bytes) == 0);
        free(logits);
        free(whole);
    }
    CHECK(found);
    json_decref(index);
    temp_remove(&folder);

    expect_failure(1, "there were 2 steps",
                   "logits --model " FOLDER " --ids ids.json --dump-activations . --dump-step 2");
    expect_failure(1, "cannot create", "logits --model " FOLDER " --ids ids.json --dump-activations no/such/folder");
    folder = temp_make();
    result = run_perk(NULL, "run --model %s --tokens 1,2,3 --max-tokens 2 --dump-activations %s --dump-step 1", FOLDER,
                      folder.path);
    CHECK_CODE(result, 0);
    outcome_free(&result);
    index = json_load_file(temp_path(&folder, "index.json", path, sizeof path), 0, NULL);
    CHECK(json_integer_value(json_array_get(json_object_get(index, "positions"), 0)) == 3, "the prompt is step 0");
    json_decref(index);
    temp_remove(&folder);
}

static void test_logits(void) {
    temp_write_text(&temp, "ids.json", "[[1, 2, 3, 4, 5], [7], []]");
    outcome result = run_perk(NULL, "logits --model %s --ids ids.json --out x.npy --backend reference", FOLDER);
    CHECK_CODE(result, 0);
    outcome_free(&result);
    size_t size;
    char *npy = temp_read(&temp, "x.npy", &size);
    CHECK(memcmp(npy, "\x93NUMPY\1\0", 8) == 0);
    size_t header = 10 + (unsigned char)npy[8] + 256 * (size_t)(unsigned char)npy[9];
    CHECK(header % 64 == 0 && npy[header - 1] == '\n');
    CHECK(strstr(npy + 10, "'shape': (6, 128)") && strstr(npy + 10, "'<f4'"));
    CHECK(size == header + 6 * 128 * sizeof(float));

    /* The perplexity is that of these logits. */
    double loss = 0;
    for (int row = 0; row < 4; row++) {
        float logits[128];
        double sum = 0;
        memcpy(logits, npy + header + (size_t)row * sizeof logits, sizeof logits);
        for (int i = 0; i < 128; i++) sum += exp((double)logits[i]);
        loss += log(sum) - (double)logits[row + 2];
    }
    free(npy);
    json_t *json =
        run_json(NULL, "logits --model " FOLDER " --ids ids.json --perplexity --json --max-batched-tokens 2");
    CHECK(json_integer_value(json_object_get(json, "tokens")) == 4);
    double perplexity = json_number_value(json_object_get(json, "perplexity"));
    CHECK(fabs(perplexity / exp(loss / 4) - 1) < 1e-4, "%g, not %g", perplexity, exp(loss / 4));
    json_decref(json);

    expect_failure(1, "cannot create", "logits --model " FOLDER " --ids ids.json --out no/such/folder.npy");
    expect_failure(1, "nofile.json", "logits --model " FOLDER " --ids nofile.json --perplexity");
    temp_write_text(&temp, "ids.json", "[[1, 2], [3, 128]]");
    expect_failure(1, "list 1", "logits --model " FOLDER " --ids ids.json --out broken.npy");
    char path[1024];
    CHECK(access(temp_path(&temp, "broken.npy", path, sizeof path), F_OK) != 0, "half a result was left behind");
    temp_write_text(&temp, "ids.json", "[[1, \"x\"]]");
    expect_failure(1, "list 0", "logits --model " FOLDER " --ids ids.json --perplexity");
    temp_write_text(&temp, "ids.json", "{}");
    expect_failure(1, "list of lists", "logits --model " FOLDER " --ids ids.json --perplexity");
    result = run_perk(NULL, "logits --model %s --ids ids.json --out /dev/full", FOLDER);
    CHECK_CODE(result, 1);
    outcome_free(&result);
}

static void test_machine(void) {
    json_t *json = run_json(NULL, "doctor --json");
    CHECK(json_is_false(json_object_get(json, "gpu_ready")));
    CHECK(json_is_false(json_object_get(json_object_get(json, "driver"), "ok")));
    CHECK(strstr(json_string_value(json_object_get(json_object_get(json, "driver"), "problem")), "PERK_LIBCUDA"));
    CHECK(json_is_true(json_object_get(json_object_get(json, "cache"), "ok")));
    json_decref(json);
    outcome result = run_perk(NULL, "doctor");
    CHECK_CODE(result, 0);
    CHECK(strstr(result.out, "reference executor"));
    outcome_free(&result);
    result = run_perk(NULL, "doctor --require-gpu");
    CHECK_CODE(result, 1);
    outcome_free(&result);

    json = run_json(NULL, "cache list --json");
    CHECK(json_array_size(json_object_get(json, "entries")) == 0);
    json_decref(json);
    static const char *const actions[] = {"list", "verify", "prune --max-bytes 1M", "clear", "verify --json"};
    for (size_t i = 0; i < PERK_COUNT(actions); i++) {
        result = run_perk(NULL, "cache %s", actions[i]);
        CHECK_CODE(result, 0);
        outcome_free(&result);
    }
}

/* An op by the tasks of its plan, with no GPU there; a self-test cannot do without. */
static void test_ops_alone(void) {
    json_t *json = run_json(NULL, "test-op linear --rows 3 --in 72 --out 100 --bias --seed 5 --json");
    const json_t *one = json_array_get(json_object_get(json, "cases"), 0);
    CHECK(json_integer_value(json_object_get(json, "passed")) == 1);
    CHECK(strcmp(json_string_value(json_object_get(one, "shape")), "3 x 72 -> 100, bias") == 0);
    CHECK(strcmp(json_string_value(json_object_get(one, "backend")), "simulator") == 0);
    CHECK(strcmp(json_string_value(json_object_get(one, "verdict")), "ok") == 0);
    CHECK(json_integer_value(json_object_get(one, "seed")) == 5);
    CHECK(json_number_value(json_object_get(one, "worst")) <= 1 && json_is_real(json_object_get(one, "relative")));
    json_decref(json);
    outcome result = run_perk(NULL, "test-op attention --rows 2 --requests 2 --context 20 --window 7 --portable");
    CHECK_CODE(result, 0);
    CHECK(strstr(result.out, "2 requests, context 20, window 7") && strstr(result.out, "1 passed, 0 failed"));
    outcome_free(&result);
    result = run_perk(NULL, "test-op attention --rows 2 --heads 64 --kv-heads 1");
    CHECK_CODE(result, 1);
    CHECK(strstr(result.out, "not run") && strstr(result.out, "at most 8 query heads"), "%s", result.out);
    outcome_free(&result);
    result = run_perk(NULL, "test-op decoder --backend reference");
    CHECK_CODE(result, 0);
    CHECK(strstr(result.out, "compared with nothing"));
    outcome_free(&result);

    result = run_perk(NULL, "doctor --selftest");
    CHECK_CODE(result, 1);
    CHECK(strstr(result.out, "cannot run: there is no GPU"));
    outcome_free(&result);
    result = run_perk(NULL, "doctor --selftest --json");
    CHECK_CODE(result, 1);
    CHECK(strstr(result.out, "\"selftest\": {\"ok\": false"));
    outcome_free(&result);
}

/* Planning needs neither weights nor GPU; compiling needs NVRTC. */
static void test_plan_and_compile(void) {
    temp_write_text(
        &temp, "config.json",
        "{\"architectures\": [\"Qwen3ForCausalLM\"], \"hidden_size\": 128, \"intermediate_size\": 256, "
        "\"num_hidden_layers\": 2, \"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"head_dim\": 64, "
        "\"rms_norm_eps\": 1e-6, \"rope_theta\": 1e4, \"vocab_size\": 512, \"hidden_act\": \"silu\", "
        "\"max_position_embeddings\": 512, \"tie_word_embeddings\": true}");
    outcome result = run_perk(NULL, "plan --model config.json --source");
    CHECK_CODE(result, 0);
    CHECK(strstr(result.out, "__global__"));
    outcome_free(&result);
    static const char *const forms[] = {"plan --model config.json --arch sm_86",
                                        "plan --model config.json --json --arch sm_120a --workers 20"};
    for (size_t i = 0; i < PERK_COUNT(forms); i++) {
        result = run_perk(NULL, "%s", forms[i]);
        if (result.code == 1 && strstr(result.errors, "not built yet")) {
            fprintf(stderr, "perk %s: not built yet, not tested\n", forms[i]);
        } else {
            CHECK_CODE(result, 0);
            CHECK(result.out_size > 100);
        }
        outcome_free(&result);
    }
    json_t *json;
    expect_failure(1, "sm_120", "plan --model config.json --arch sm_777");
    expect_failure(1, "8.0", "plan --model config.json --arch sm_75");
    expect_failure(1, "page_size", "plan --model config.json --page-size 5");
    expect_failure(1, "/nonexistent", "plan --model /nonexistent");

    json_t *doctor = run_json(NULL, "doctor --json");
    if (json_is_true(json_object_get(json_object_get(doctor, "nvrtc"), "ok"))) {
        size_t size;
        json = run_json(NULL, "compile --model config.json --arch sm_90a --out x.cubin --json");
        char *cubin = temp_read(&temp, "x.cubin", &size);
        CHECK(memcmp(cubin,
                     "\x7f"
                     "ELF",
                     4) == 0);
        CHECK(json_integer_value(json_object_get(json, "cubin_bytes")) == (json_int_t)size);
        CHECK(json_integer_value(json_object_get(json, "registers")) > 0);
        CHECK(json_number_value(json_object_get(json_object_get(json, "ms"), "compile")) > 0);
        json_decref(json);
        free(cubin);
    } else {
        fprintf(stderr, "no NVRTC: perk compile is not tested\n");
    }
    json_decref(doctor);
}

int main(void) {
    temp = temp_make();
    test_help();
    test_usage();
    test_run();
    test_run_text();
    test_prompts();
    test_wrong_prompts();
    test_tokenize();
    test_logits();
    test_dump();
    test_machine();
    test_ops_alone();
    test_plan_and_compile();
    char command[1024]; /* the cache's folder has folders below */
    snprintf(command, sizeof command, "rm -r '%s'", temp.path);
    CHECK(system(command) == 0);
    return 0;
}
