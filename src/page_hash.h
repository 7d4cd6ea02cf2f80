/* Hashes under which full pages of the KV cache are found again. Who finds a page reads what another request wrote, so
 * two texts must never have one hash, whoever made them: it is SipHash-2-4 with 128 bits, under a secret that is drawn
 * at random and known to nobody. Without the secret, a collision cannot be constructed, nor known when it is there. */
#ifndef PERK_SRC_PAGE_HASH_H
#define PERK_SRC_PAGE_HASH_H

#include "base.h"
#include "kernels_src/pages.h"

/* The hash of no page. */
#define PERK_NO_PAGE_HASH ((perk_page_hash){0, 0})

/* Never shown, never kept. */
typedef struct perk_page_secret {
    uint64_t words[2];
} perk_page_secret;

/* From the system's random numbers. */
perk_status perk_page_secret_draw(perk_page_secret *out, perk_error *err);

/* Of a full page: over its tokens and all before, of which `before` is the hash of the page before (PERK_NO_PAGE_HASH:
 * there is none). */
perk_page_hash perk_hash_page(const perk_page_secret *secret, const int32_t *tokens, int32_t page_size,
                              perk_page_hash before);
/* The first `full_pages` of a text, of which `known` are there already; returns how many are then. */
int32_t perk_hash_pages(const perk_page_secret *secret, const int32_t *tokens, int32_t page_size,
                        perk_page_hash *hashes, int32_t known, int32_t full_pages);

#endif
