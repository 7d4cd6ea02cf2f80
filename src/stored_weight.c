#include "stored_weight.h"

#include <stdio.h>

const char *perk_weight_name(const perk_tensor *weight, int64_t expert, char *text) {
    if (!weight->experts) return weight->name;
    const char *mark = strchr(weight->name, '*');
    snprintf(text, PERK_STORED_NAME, "%.*s%lld%s", (int)(mark - weight->name), weight->name, (long long)expert,
             mark + 1);
    return text;
}

perk_status perk_weight_require(const perk_checkpoint *checkpoint, const perk_tensor *weight, int64_t expert,
                                const perk_checkpoint_tensor **out, perk_error *err) {
    char text[PERK_STORED_NAME];
    int64_t matrix[] = {weight->rows, weight->cols}, vector[] = {weight->cols};
    return perk_checkpoint_require(checkpoint, perk_weight_name(weight, expert, text), weight->is_vector ? 1 : 2,
                                   weight->is_vector ? vector : matrix, out, err);
}
