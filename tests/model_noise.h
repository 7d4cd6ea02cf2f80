/* How far a model on the GPU may be from the reference executor, and how that is measured. */
#ifndef PERK_TESTS_MODEL_NOISE_H
#define PERK_TESTS_MODEL_NOISE_H

#include "perk/engine.h"
#include "test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Limits: of relative_error, and of worst_choice as a part of the largest logit. */
#define LOGITS_NOISE 2e-2
#define CHOICE_NOISE 4e-2

static inline void some_ids(int32_t *ids, int count, int vocab, int salt) {
    for (int i = 0; i < count; i++) ids[i] = (i * 37 + salt * 101 + i * i * 3 + 11) % vocab;
}

static inline double relative_error(const float *got, const float *want, size_t count) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < count; i++) {
        CHECK(isfinite(got[i]), "logit %zu is %g", i, (double)got[i]);
        difference += ((double)got[i] - (double)want[i]) * ((double)got[i] - (double)want[i]);
        norm += (double)want[i] * (double)want[i];
    }
    return sqrt(difference / fmax(norm, 1e-30));
}

/* Every token that a request chose must be within `noise` of the best by the reference's own logits. */
static inline double worst_choice(perk_engine *reference, const int32_t *prompt, int prompt_count,
                                  const int32_t *tokens, int count) {
    int vocab = perk_engine_vocab_size(reference), total = prompt_count + count;
    int32_t *ids = malloc((size_t)total * sizeof *ids);
    float *logits = malloc((size_t)total * (size_t)vocab * sizeof *logits);
    perk_error err = {0};
    CHECK(ids && logits);
    memcpy(ids, prompt, (size_t)prompt_count * sizeof *ids);
    memcpy(ids + prompt_count, tokens, (size_t)count * sizeof *ids);
    CHECK_OK(perk_engine_logits(reference, ids, (size_t)total, logits, &err));
    double worst = 0;
    for (int i = 0; i < count; i++) {
        const float *row = logits + (size_t)(prompt_count + i - 1) * (size_t)vocab;
        float best = row[0];
        for (int v = 1; v < vocab; v++) best = row[v] > best ? row[v] : best;
        worst = fmax(worst, (double)(best - row[tokens[i]]));
    }
    free(ids);
    free(logits);
    return worst;
}

#endif
