#include "sampling.h"

#include "tokenizer/utf8.h"

#include <math.h>

/* ---- checks ---- */

static perk_status check_number(const char *field, float value, float low, float high, perk_error *err) {
    if (value >= low && value <= high) return PERK_OK;
    return perk_fail(err, PERK_INVALID_ARGUMENT, "%s %g: must be between %g and %g", field, (double)value, (double)low,
                     (double)high);
}

static perk_status check_count(const char *field, int32_t count, int32_t most, const void *items, perk_error *err) {
    if (count < 0 || count > most)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "%s %d: must be from 0 to %d", field, count, most);
    return count && !items ? perk_fail(err, PERK_INVALID_ARGUMENT, "%s %d, and no list", field, count) : PERK_OK;
}

static perk_status check_id(const char *field, int32_t index, int32_t token, int32_t vocab_size, perk_error *err) {
    if (token >= 0 && token < vocab_size) return PERK_OK;
    return perk_fail(err, PERK_INVALID_ARGUMENT, "%s %d is id %d: outside the model's vocabulary of %d", field, index,
                     token, vocab_size);
}

static perk_status check_filters(const perk_sampling *sampling, perk_error *err) {
    if (!(sampling->temperature >= 0) || !isfinite(sampling->temperature))
        return perk_fail(err, PERK_INVALID_ARGUMENT, "temperature %g: must be 0 (greedy) or a positive number",
                         (double)sampling->temperature);
    if (sampling->top_k < 0)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "top_k %d: must be 0 (all) or positive", sampling->top_k);
    if (sampling->max_tokens < 0)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "max_tokens %d: must be 0 (as many as fit) or positive",
                         sampling->max_tokens);
    perk_status status = check_number("top_p", sampling->top_p, 0, 1, err);
    return status ? status : check_number("min_p", sampling->min_p, 0, 1, err);
}

static perk_status check_penalties(const perk_sampling *sampling, perk_error *err) {
    perk_status status = check_number("repetition_penalty", sampling->repetition_penalty, 0, 100, err);
    if (!status) status = check_number("presence_penalty", sampling->presence_penalty, -2, 2, err);
    return status ? status : check_number("frequency_penalty", sampling->frequency_penalty, -2, 2, err);
}

static perk_status check_lists(const perk_sampling *sampling, int32_t vocab_size, perk_error *err) {
    perk_status status =
        check_count("stop_token_count", sampling->stop_token_count, PERK_MAX_STOP_TOKENS, sampling->stop_tokens, err);
    if (!status) status = check_count("bias_count", sampling->bias_count, PERK_MAX_LOGIT_BIAS, sampling->bias, err);
    if (status) return status;
    for (int32_t i = 0; i < sampling->stop_token_count && !status; i++)
        status = check_id("stop_tokens", i, sampling->stop_tokens[i], vocab_size, err);
    for (int32_t i = 0; i < sampling->bias_count && !status; i++) {
        status = check_id("bias", i, sampling->bias[i].token, vocab_size, err);
        if (!status) status = check_number("bias", sampling->bias[i].bias, -100, 100, err);
    }
    return status;
}

static perk_status check_stop_strings(const perk_sampling *sampling, perk_error *err) {
    perk_status status = check_count("stop_string_count", sampling->stop_string_count, PERK_MAX_STOP_STRINGS,
                                     sampling->stop_strings, err);
    for (int32_t i = 0; i < sampling->stop_string_count && !status; i++) {
        const char *text = sampling->stop_strings[i];
        size_t size = text ? strnlen(text, PERK_MAX_STOP_STRING + 1) : 0;
        if (size < 1 || size > PERK_MAX_STOP_STRING || !perk_utf8_valid(text, size))
            status = perk_fail(err, PERK_INVALID_ARGUMENT, "stop_strings %d: must be UTF-8 of 1 to %d bytes", i,
                               (int)PERK_MAX_STOP_STRING);
    }
    return status;
}

perk_status perk_sampling_check(const perk_sampling *sampling, int32_t vocab_size, perk_error *err) {
    perk_status status = check_filters(sampling, err);
    if (!status) status = check_penalties(sampling, err);
    if (!status) status = check_lists(sampling, vocab_size, err);
    if (!status) status = check_stop_strings(sampling, err);
    if (!status) status = check_count("top_logprobs", sampling->top_logprobs, PERK_MAX_TOP_LOGPROBS, sampling, err);
    if (!status && sampling->top_logprobs && !sampling->logprobs)
        status = perk_fail(err, PERK_INVALID_ARGUMENT, "top_logprobs %d without logprobs", sampling->top_logprobs);
    return status;
}

/* ---- copies ---- */

/* Those of a token that is named twice are added in the order in which they stand. */
int32_t perk_sampling_biases(const perk_sampling *sampling, perk_logit_bias *biases) {
    int32_t count = 0;
    for (int32_t i = 0; i < sampling->bias_count; i++) {
        const perk_logit_bias *next = &sampling->bias[i];
        int32_t low = 0, high = count;
        while (low < high) {
            int32_t middle = low + (high - low) / 2;
            *(biases[middle].token < next->token ? &low : &high) =
                biases[middle].token < next->token ? middle + 1 : middle;
        }
        if (low < count && biases[low].token == next->token) {
            biases[low].bias += next->bias;
            continue;
        }
        memmove(biases + low + 1, biases + low, (size_t)(count++ - low) * sizeof *biases);
        biases[low] = (perk_logit_bias){next->token, next->bias};
    }
    return count;
}

/* The list and its strings in one piece of memory. NULL: there is none. */
static char **copy_strings(const char *const *strings, int32_t count) {
    size_t list = (size_t)count * sizeof *strings, size = list;
    for (int32_t i = 0; i < count; i++) size += strlen(strings[i]) + 1;
    char **copy = malloc(size);
    if (!copy) return NULL;
    for (char *next = (char *)copy + list, **place = copy; place < copy + count; strings++) {
        *place++ = next;
        next = stpcpy(next, *strings) + 1;
    }
    return copy;
}

perk_status perk_sampling_copy(perk_sampling *copy, const perk_sampling *sampling, perk_error *err) {
    size_t bias_size = (size_t)sampling->bias_count * sizeof *sampling->bias;
    size_t stop_size = (size_t)sampling->stop_token_count * sizeof *sampling->stop_tokens;
    perk_logit_bias *bias = bias_size ? malloc(bias_size) : NULL;
    int32_t *stop_tokens = stop_size ? malloc(stop_size) : NULL;
    char **stop_strings =
        sampling->stop_string_count ? copy_strings(sampling->stop_strings, sampling->stop_string_count) : NULL;
    if ((bias_size && !bias) || (stop_size && !stop_tokens) || (sampling->stop_string_count && !stop_strings)) {
        free(bias);
        free(stop_tokens);
        free(stop_strings);
        return perk_fail_memory(err, "a request's sampling");
    }
    *copy = *sampling;
    if (bias) copy->bias_count = perk_sampling_biases(sampling, bias);
    if (stop_tokens) memcpy(stop_tokens, sampling->stop_tokens, stop_size);
    copy->bias = bias;
    copy->stop_tokens = stop_tokens;
    copy->stop_strings = (const char *const *)stop_strings;
    return PERK_OK;
}

void perk_sampling_free(perk_sampling *sampling) {
    free((void *)sampling->bias);
    free((void *)sampling->stop_tokens);
    free((void *)sampling->stop_strings);
    sampling->bias = NULL;
    sampling->stop_tokens = NULL;
    sampling->stop_strings = NULL;
}

/* ---- questions ---- */

bool perk_sampling_penalizes(const perk_sampling *sampling) {
    bool repetition = sampling->repetition_penalty > 0 && sampling->repetition_penalty != 1;
    return repetition || sampling->presence_penalty != 0 || sampling->frequency_penalty != 0;
}

bool perk_sampling_adjusts(const perk_sampling *sampling) {
    return perk_sampling_penalizes(sampling) || sampling->bias_count;
}

bool perk_sampling_needs_logits(const perk_sampling *sampling) {
    return sampling->temperature > 0 || sampling->logprobs || perk_sampling_adjusts(sampling);
}

bool perk_sampling_stops(const perk_sampling *sampling, int32_t token) {
    for (int32_t i = 0; i < sampling->stop_token_count; i++)
        if (sampling->stop_tokens[i] == token) return true;
    return false;
}

int32_t perk_sampling_logprob_count(const perk_sampling *sampling) {
    return sampling->logprobs ? 1 + sampling->top_logprobs : 0;
}
