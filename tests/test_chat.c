/* Chat formats against what the families' published templates give (fixtures/tokenizer_chat.json, made by
 * fixtures/tokenizer_make.py) and against ../shared/data/tokenizers/chat_cases.json. */
#include "base.h"
#include "perk/tokenizer.h"
#include "test.h"

#include <jansson.h>
#include <unistd.h>

static perk_error err;

static perk_chat_family family_of(const char *name) {
    if (strncmp(name, "qwen3", 5) == 0) return PERK_CHAT_QWEN3;
    if (strncmp(name, "llama3", 6) == 0) return PERK_CHAT_LLAMA3;
    return strncmp(name, "deepseek", 8) == 0 ? PERK_CHAT_DEEPSEEK : PERK_CHAT_NONE;
}

static void check_case(const char *family, const json_t *list, int prompt, const json_t *wanted) {
    perk_chat_message messages[8];
    size_t count = json_array_size(list);
    CHECK(count <= PERK_COUNT(messages), "%zu messages", count);
    for (size_t i = 0; i < count; i++) {
        messages[i].role = json_string_value(json_object_get(json_array_get(list, i), "role"));
        messages[i].content = json_string_value(json_object_get(json_array_get(list, i), "content"));
    }
    char *text = NULL;
    CHECK_OK(perk_chat_format_as(family_of(family), messages, count, prompt, &text, &err));
    CHECK(strcmp(text, json_string_value(wanted)) == 0, "%s: got\n%s\nwanted\n%s", family, text,
          json_string_value(wanted));
    free(text);
}

static void test_fixture(void) {
    json_t *cases = json_load_file(PERK_SOURCE_DIR "/tests/fixtures/tokenizer_chat.json", 0, NULL), *item;
    size_t i;
    CHECK(json_array_size(cases) >= 60, "the fixture is missing or short");
    json_array_foreach(cases, i, item)
        check_case(json_string_value(json_object_get(item, "family")), json_object_get(item, "messages"),
                   json_is_true(json_object_get(item, "prompt")), json_object_get(item, "text"));
    json_decref(cases);
}

/* As the template of Mistral-7B-Instruct-v0.3 has it. */
static void test_mistral(void) {
    static const perk_chat_message messages[] = {
        {"system", "Be terse."}, {"user", " Hi "}, {"assistant", " Hello.\n"}, {"user", "Why?"}};
    static const struct {
        size_t from, count;
        const char *text;
    } cases[] = {
        {0, 0, ""},
        {1, 1, "<s>[INST]  Hi [/INST]"},
        {0, 2, "<s>[INST] Be terse.\n\n Hi [/INST]"},
        {0, 3, "<s>[INST]  Hi [/INST] Hello.</s>"},
        {0, 4, "<s>[INST]  Hi [/INST] Hello.</s>[INST] Be terse.\n\nWhy?[/INST]"},
    };
    char *text = NULL;
    for (size_t i = 0; i < PERK_COUNT(cases); i++) {
        CHECK_OK(perk_chat_format_as(PERK_CHAT_MISTRAL, messages + cases[i].from, cases[i].count, 1, &text, &err));
        CHECK(strcmp(text, cases[i].text) == 0, "case %zu: %s", i, text);
        free(text);
    }
    CHECK_FAILS(perk_chat_format_as(PERK_CHAT_MISTRAL, messages + 2, 2, 1, &text, &err), PERK_UNSUPPORTED, "in turns");
    const perk_chat_message tool[] = {{"user", "a"}, {"tool", "b"}};
    CHECK_FAILS(perk_chat_format_as(PERK_CHAT_MISTRAL, tool, 2, 1, &text, &err), PERK_UNSUPPORTED, "tool");
}

static void test_shared_cases(void) {
    json_t *cases = json_load_file(PERK_SOURCE_DIR "/../shared/data/tokenizers/chat_cases.json", 0, NULL), *item;
    const char *name;
    if (!cases) fprintf(stderr, "no ../shared/data/tokenizers/chat_cases.json: that part is skipped\n");
    json_object_foreach(cases, name, item)
        check_case(name, json_object_get(item, "messages"), 1, json_object_get(item, "text"));
    json_decref(cases);
}

/* A small tokenizer, byte-level or SentencePiece's kind, and the given added tokens. */
static perk_tokenizer *tokenizer_with(bool marks, const char *first, const char *second) {
    json_t *root = json_load_file(marks ? PERK_SOURCE_DIR "/tests/fixtures/tokenizer_sentencepiece.json"
                                        : PERK_SOURCE_DIR "/tests/fixtures/tokenizer_small.json",
                                  0, NULL);
    CHECK(root != NULL, "the fixture is missing");
    json_object_set_new(root, "added_tokens",
                        json_pack("[{s:i,s:s},{s:i,s:s}]", "id", 600, "content", first, "id", 601, "content", second));
    char *text = json_dumps(root, 0);
    perk_tokenizer *tokenizer = NULL;
    CHECK_OK(perk_tokenizer_load_buffer(&tokenizer, text, strlen(text), &err));
    free(text);
    json_decref(root);
    return tokenizer;
}

static void test_detect(void) {
    const struct {
        const char *first, *second;
        perk_chat_family family;
        bool marks;
    } cases[] = {
        {"<|im_start|>", "<|im_end|>", PERK_CHAT_QWEN3, false},
        {"<|start_header_id|>", "<|eot_id|>", PERK_CHAT_LLAMA3, false},
        {"<｜User｜>", "<｜Assistant｜>", PERK_CHAT_DEEPSEEK, false},
        {"<|im_start|>", "<|eot_id|>", PERK_CHAT_NONE, false},
        {"[INST]", "[/INST]", PERK_CHAT_MISTRAL, true},
        {"[INST]", "[/INST]", PERK_CHAT_NONE, false},
    };
    const perk_chat_message hello = {"user", "Hello!"};
    for (size_t i = 0; i < PERK_COUNT(cases); i++) {
        perk_tokenizer *tokenizer = tokenizer_with(cases[i].marks, cases[i].first, cases[i].second);
        char *text = NULL;
        CHECK(perk_chat_detect(tokenizer) == cases[i].family, "case %zu", i);
        if (cases[i].family == PERK_CHAT_NONE) {
            CHECK_FAILS(perk_chat_format(tokenizer, &hello, 1, 1, &text, &err), PERK_UNSUPPORTED,
                        "no known chat format");
            CHECK(text == NULL, "nothing to free");
        } else {
            CHECK_OK(perk_chat_format(tokenizer, &hello, 1, 1, &text, &err));
            CHECK(strstr(text, "Hello!") && strstr(text, cases[i].first), "%s", text);
        }
        free(text);
        perk_tokenizer_free(tokenizer);
    }
}

static void test_refusals(void) {
    char *text = NULL;
    const perk_chat_message strange = {"critic", "no"}, empty = {"user", NULL}, ill_formed = {"user", "\xFF"};
    CHECK_FAILS(perk_chat_format_as(PERK_CHAT_QWEN3, &strange, 1, 1, &text, &err), PERK_UNSUPPORTED, "critic");
    CHECK_FAILS(perk_chat_format_as(PERK_CHAT_DEEPSEEK, &strange, 1, 1, &text, &err), PERK_UNSUPPORTED, "critic");
    CHECK_FAILS(perk_chat_format_as(PERK_CHAT_LLAMA3, &empty, 1, 1, &text, &err), PERK_INVALID_ARGUMENT, "content");
    CHECK_FAILS(perk_chat_format_as(PERK_CHAT_LLAMA3, &ill_formed, 1, 1, &text, &err), PERK_INVALID_ARGUMENT, "UTF-8");
    CHECK_FAILS(perk_chat_format_as(PERK_CHAT_NONE, &strange, 1, 1, &text, &err), PERK_UNSUPPORTED, "chat format");
    CHECK(text == NULL, "nothing to free");
    CHECK_OK(perk_chat_format_as(PERK_CHAT_LLAMA3, NULL, 0, 0, &text, &err));
    CHECK(text && !text[0], "an empty conversation");
    free(text);
}

int main(void) {
    test_fixture();
    test_mistral();
    test_shared_cases();
    test_detect();
    test_refusals();
    return 0;
}
