/* A generation_config.json, 0xff, a config.json: what they say about sampling and ends. */
#include "fuzz_json.h"

#include "src/config.h"

/* As the checkpoint reads it: an object, or there is none. */
static json_t *read_object(fuzz_part part) {
    json_t *value = json_loadb(part.data, part.size, JSON_REJECT_DUPLICATES, NULL);
    if (json_is_object(value)) return value;
    json_decref(value);
    return NULL;
}

static void check_values(const perk_generation_defaults *read) {
    FUZZ_CHECK(read->eos_count <= PERK_GENERATION_MAX_EOS);
    for (size_t i = 0; i < read->eos_count; i++) {
        FUZZ_CHECK(read->eos[i] >= 0 && read->eos[i] <= INT32_MAX);
        for (size_t j = 0; j < i; j++) FUZZ_CHECK(read->eos[i] != read->eos[j]);
    }
    FUZZ_CHECK(read->bos >= -1 && read->bos <= INT32_MAX && read->pad >= -1 && read->pad <= INT32_MAX);
    FUZZ_CHECK(read->temperature >= 0 && read->temperature <= 1e6);
    FUZZ_CHECK(read->top_p >= 0 && read->top_p <= 1 && read->min_p >= 0 && read->min_p <= 1);
    FUZZ_CHECK(read->repetition_penalty > 0 && read->top_k >= 0 && read->top_k <= INT32_MAX);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_part first = fuzz_take(&data, &size, false), second = fuzz_take(&data, &size, true);
    json_t *generation = read_object(first), *config = read_object(second);
    perk_error err = {0};
    perk_generation_defaults read;
    perk_status status = perk_generation_defaults_read(generation, config, &read, &err);
    fuzz_check_result(status, &err, status == PERK_OK);
    if (status == PERK_OK) check_values(&read);
    json_decref(generation);
    json_decref(config);
    free(first.data);
    free(second.data);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed) {
    return fuzz_mutate_json(data, size, max_size, seed, 0);
}
