/* The pool of KV pages: which are free, which are taken. A page is a number from 0; what it holds is the executor's. */
#ifndef PERK_SRC_PAGES_H
#define PERK_SRC_PAGES_H

#include "base.h"

typedef struct perk_pages perk_pages;

perk_status perk_pages_create(perk_pages **out, int32_t count, perk_error *err);
void perk_pages_free(perk_pages *pages);

int32_t perk_pages_count(const perk_pages *pages); /* of the pool */
int32_t perk_pages_available(const perk_pages *pages);

/* Takes `count` pages into `out`, or none at all: false when fewer are free. */
bool perk_pages_take(perk_pages *pages, int32_t count, int32_t *out);
/* Gives pages back. False, and that page is left alone, where one was not taken: a bug of the caller. */
bool perk_pages_give(perk_pages *pages, const int32_t *list, int32_t count);

#endif
