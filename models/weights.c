/* Weights by a family's table. */
#include "weights.h"

#include <stdio.h>

enum { NAME_BYTES = 112 }; /* more than a graph takes */

/* The name for one layer. */
static const char *expand(const char *pattern, int64_t layer, char *text) {
    const char *mark = strchr(pattern, '#');
    if (mark)
        snprintf(text, NAME_BYTES, "%.*s%lld%s", (int)(mark - pattern), pattern, (long long)layer, mark + 1);
    else
        snprintf(text, NAME_BYTES, "%s", pattern);
    return text;
}

static perk_tensor *attach(const perk_weight_map *map, const perk_weight_row *row, int64_t layer) {
    char name[NAME_BYTES];
    int64_t rows = map->sizes[row->rows], cols = map->sizes[row->cols];
    expand(row->stored, layer, name);
    if (strchr(name, '*')) return perk_attach_experts(map->graph, name, map->sizes[PERK_SIZE_EXPERTS], rows, cols);
    if (row->rows == PERK_SIZE_NONE) return perk_attach_vector(map->graph, name, cols);
    return perk_attach_matrix(map->graph, name, rows, cols);
}

perk_tensor *perk_weight_find(const perk_weight_map *map, const char *target, int64_t layer) {
    perk_tensor *parts[PERK_STACK_MAX];
    char name[NAME_BYTES];
    int count = 0;
    bool is_known = false;
    for (size_t i = 0; i < map->table->count; i++) {
        const perk_weight_row *row = &map->table->rows[i];
        if (!row->target || strcmp(row->target, target) != 0) continue;
        is_known = true;
        if (row->needs & ~map->features) continue;
        if (count == PERK_STACK_MAX)
            perk_graph_fail(map->graph, PERK_INTERNAL, "%s has more than %d rows", target, count);
        else
            parts[count++] = attach(map, row, layer);
    }
    if (!is_known) perk_graph_fail(map->graph, PERK_INTERNAL, "%s is in no table of weights", target);
    if (count == 0) return NULL;
    return count == 1 ? parts[0] : perk_stack(map->graph, expand(target, layer, name), parts, count);
}

/* '#' stands for a number. */
static bool matches(const char *pattern, const char *name) {
    for (; *pattern; pattern++) {
        if (*pattern != '#') {
            if (*name++ != *pattern) return false;
            continue;
        }
        size_t digits = strspn(name, "0123456789");
        if (digits == 0) return false;
        name += digits;
    }
    return !*name;
}

bool perk_weight_may_be_left(const perk_weight_table *table, const char *stored) {
    for (size_t i = 0; i < table->count; i++)
        if (table->rows[i].may_be_left && matches(table->rows[i].stored, stored)) return true;
    return false;
}
