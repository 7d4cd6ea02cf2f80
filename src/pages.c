#include "pages.h"

struct perk_pages {
    int32_t count, free_count;
    int32_t *free_list; /* [count], a stack: the page given back last is warm and taken first */
    bool *taken;        /* [count] */
};

perk_status perk_pages_create(perk_pages **out, int32_t count, perk_error *err) {
    *out = NULL;
    if (count < 1) return perk_fail(err, PERK_INVALID_ARGUMENT, "a pool of %d KV pages: at least 1 is needed", count);
    perk_pages *pages = perk_calloc(1, sizeof *pages);
    if (!pages) return perk_fail_memory(err, "the page pool");
    pages->free_list = perk_calloc((size_t)count, sizeof *pages->free_list);
    pages->taken = perk_calloc((size_t)count, sizeof *pages->taken);
    if (!pages->free_list || !pages->taken) {
        perk_pages_free(pages);
        return perk_fail_memory(err, "the page pool");
    }
    pages->count = pages->free_count = count;
    for (int32_t i = 0; i < count; i++) pages->free_list[i] = count - 1 - i;
    *out = pages;
    return PERK_OK;
}

void perk_pages_free(perk_pages *pages) {
    if (!pages) return;
    free(pages->free_list);
    free(pages->taken);
    free(pages);
}

int32_t perk_pages_count(const perk_pages *pages) { return pages->count; }

int32_t perk_pages_available(const perk_pages *pages) { return pages->free_count; }

bool perk_pages_take(perk_pages *pages, int32_t count, int32_t *out) {
    if (count < 0 || count > pages->free_count) return false;
    for (int32_t i = 0; i < count; i++) {
        out[i] = pages->free_list[--pages->free_count];
        pages->taken[out[i]] = true;
    }
    return true;
}

bool perk_pages_give(perk_pages *pages, const int32_t *list, int32_t count) {
    bool all_were_taken = true;
    for (int32_t i = count - 1; i >= 0; i--) {
        int32_t page = list[i];
        if (page < 0 || page >= pages->count || !pages->taken[page]) {
            all_were_taken = false;
            continue;
        }
        pages->taken[page] = false;
        pages->free_list[pages->free_count++] = page;
    }
    return all_were_taken;
}
