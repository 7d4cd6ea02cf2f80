/* Hashes under which full pages of the KV cache are found again. Who finds a page reads what another request wrote, so
 * two texts must never have one hash, whoever made them: it is SipHash-2-4 with 128 bits, under a secret that is drawn
 * at random (src/page_secret.h). Without the secret, a collision cannot be constructed, nor known when it is there. */
#ifndef PERK_PAGE_HASH_H
#define PERK_PAGE_HASH_H

#include "shared_code.h"

/* Of all tokens up to the end of a page; zeros: of no page. */
typedef struct perk_page_hash {
    uint64_t low, high;
} perk_page_hash;

/* Never shown, never kept. */
typedef struct perk_page_secret {
    uint64_t words[2];
} perk_page_secret;

PERK_SHARED_CODE int perk_page_hash_equal(perk_page_hash a, perk_page_hash b) {
    return a.low == b.low && a.high == b.high;
}

typedef struct perk_sip {
    uint64_t a, b, c, d;
} perk_sip;

PERK_SHARED_CODE uint64_t perk_rotate(uint64_t word, int bits) { return word << bits | word >> (64 - bits); }

PERK_SHARED_CODE void perk_sip_mix(perk_sip *s, int rounds) {
    while (rounds-- > 0) {
        s->a += s->b;
        s->c += s->d;
        s->b = perk_rotate(s->b, 13) ^ s->a;
        s->d = perk_rotate(s->d, 16) ^ s->c;
        s->a = perk_rotate(s->a, 32);
        s->c += s->b;
        s->a += s->d;
        s->b = perk_rotate(s->b, 17) ^ s->c;
        s->d = perk_rotate(s->d, 21) ^ s->a;
        s->c = perk_rotate(s->c, 32);
    }
}

PERK_SHARED_CODE void perk_sip_absorb(perk_sip *s, uint64_t word) {
    s->d ^= word;
    perk_sip_mix(s, 2);
    s->a ^= word;
}

PERK_SHARED_CODE uint64_t perk_sip_give_half(perk_sip *s) {
    perk_sip_mix(s, 4);
    return s->a ^ s->b ^ s->c ^ s->d;
}

PERK_SHARED_CODE uint64_t perk_token_pair(const int32_t *tokens) {
    return (uint32_t)tokens[0] | (uint64_t)(uint32_t)tokens[1] << 32;
}

enum { PERK_HASHED_PAIRS = 4 }; /* are loaded together */

PERK_SHARED_CODE void perk_load_pairs(uint64_t *pairs, const int32_t *tokens) {
    for (int k = 0; k < PERK_HASHED_PAIRS; k++) pairs[k] = perk_token_pair(tokens + 2 * k);
}

/* All of a page's tokens. A thread that is alone waits for memory once: the next ones are under way while it works. */
PERK_SHARED_CODE void perk_sip_absorb_tokens(perk_sip *s, const int32_t *tokens, int32_t count) {
    const int32_t step = 2 * PERK_HASHED_PAIRS;
    uint64_t next[PERK_HASHED_PAIRS] = {0};
    int32_t i = 0;
    if (step <= count) perk_load_pairs(next, tokens);
    for (; i + step <= count; i += step) {
        uint64_t now[PERK_HASHED_PAIRS];
        for (int k = 0; k < PERK_HASHED_PAIRS; k++) now[k] = next[k];
        if (i + 2 * step <= count) perk_load_pairs(next, tokens + i + step);
        for (int k = 0; k < PERK_HASHED_PAIRS; k++) perk_sip_absorb(s, now[k]);
    }
    for (; i + 2 <= count; i += 2) perk_sip_absorb(s, perk_token_pair(tokens + i));
    /* The algorithm's end: what is left, and the number of bytes with those of the hash before. */
    perk_sip_absorb(s, (i < count ? (uint32_t)tokens[i] : 0) | (16 + 4 * (uint64_t)count) << 56);
}

/* Of a full page: over its tokens and all before, of which `before` is the hash of the page before (zeros: there is
 * none). */
PERK_SHARED_CODE perk_page_hash perk_hash_page(const perk_page_secret *secret, const int32_t *tokens, int32_t page_size,
                                               perk_page_hash before) {
    perk_sip s;
    perk_page_hash hash;
    /* The constants are the algorithm's own; a third of them is for 128 bits. */
    s.a = secret->words[0] ^ 0x736f6d6570736575u;
    s.b = secret->words[1] ^ 0x646f72616e646f6du ^ 0xee;
    s.c = secret->words[0] ^ 0x6c7967656e657261u;
    s.d = secret->words[1] ^ 0x7465646279746573u;
    perk_sip_absorb(&s, before.low);
    perk_sip_absorb(&s, before.high);
    perk_sip_absorb_tokens(&s, tokens, page_size);
    s.c ^= 0xee;
    hash.low = perk_sip_give_half(&s);
    s.b ^= 0xdd;
    hash.high = perk_sip_give_half(&s);
    return hash;
}

/* The first `full_pages` of a text, of which `known` are there already; returns how many are then. */
PERK_SHARED_CODE int32_t perk_hash_pages(const perk_page_secret *secret, const int32_t *tokens, int32_t page_size,
                                         perk_page_hash *hashes, int32_t known, int32_t full_pages) {
    perk_page_hash before = {0, 0};
    if (known > 0) before = hashes[known - 1];
    for (; known < full_pages; known++)
        hashes[known] = before =
            perk_hash_page(secret, tokens + (uint64_t)known * (uint64_t)page_size, page_size, before);
    return known;
}

#endif
