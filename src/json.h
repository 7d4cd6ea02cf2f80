/* What all readers of JSON share. */
#ifndef PERK_SRC_JSON_H
#define PERK_SRC_JSON_H

#include "base.h"

#include <jansson.h>

/* The status of a failed parse. Where memory ends before it has begun, jansson sets no code and no place. */
static inline perk_status perk_json_status(const json_error_t *error) {
    bool no_memory = json_error_code(error) == json_error_out_of_memory || error->text[0] == '\0';
    return no_memory ? PERK_OUT_OF_MEMORY : PERK_BAD_FORMAT;
}

#endif
