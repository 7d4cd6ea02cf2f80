#include "page_hash.h"

#include <errno.h>
#include <sys/random.h>

perk_status perk_page_secret_draw(perk_page_secret *out, perk_error *err) {
    ssize_t got;
    while ((got = getrandom(out, sizeof *out, 0)) < 0 && errno == EINTR) continue;
    if (got == (ssize_t)sizeof *out) return PERK_OK;
    return perk_fail(err, PERK_IO, "no random numbers from the system for a secret (getrandom): %s",
                     got < 0 ? strerror(errno) : "fewer than asked for");
}

/* ---- SipHash-2-4 with 128 bits ---- */

typedef struct sip_state {
    uint64_t a, b, c, d;
} sip_state;

static uint64_t rotate(uint64_t word, int bits) { return word << bits | word >> (64 - bits); }

static void mix(sip_state *s, int rounds) {
    while (rounds-- > 0) {
        s->a += s->b;
        s->c += s->d;
        s->b = rotate(s->b, 13) ^ s->a;
        s->d = rotate(s->d, 16) ^ s->c;
        s->a = rotate(s->a, 32);
        s->c += s->b;
        s->a += s->d;
        s->b = rotate(s->b, 17) ^ s->c;
        s->d = rotate(s->d, 21) ^ s->a;
        s->c = rotate(s->c, 32);
    }
}

static void absorb(sip_state *s, uint64_t word) {
    s->d ^= word;
    mix(s, 2);
    s->a ^= word;
}

static uint64_t give_half(sip_state *s) {
    mix(s, 4);
    return s->a ^ s->b ^ s->c ^ s->d;
}

perk_page_hash perk_hash_page(const perk_page_secret *secret, const int32_t *tokens, int32_t page_size,
                              perk_page_hash before) {
    /* The constants are the algorithm's own; a third of them is for 128 bits. */
    sip_state s = {secret->words[0] ^ UINT64_C(0x736f6d6570736575),
                   secret->words[1] ^ UINT64_C(0x646f72616e646f6d) ^ 0xee,
                   secret->words[0] ^ UINT64_C(0x6c7967656e657261), secret->words[1] ^ UINT64_C(0x7465646279746573)};
    absorb(&s, before.low);
    absorb(&s, before.high);
    for (int32_t i = 0; i + 1 < page_size; i += 2)
        absorb(&s, (uint32_t)tokens[i] | (uint64_t)(uint32_t)tokens[i + 1] << 32);
    uint64_t rest = page_size % 2 ? (uint32_t)tokens[page_size - 1] : 0, bytes = 16 + 4 * (uint64_t)page_size;
    absorb(&s, rest | bytes << 56);
    s.c ^= 0xee;
    uint64_t low = give_half(&s);
    s.b ^= 0xdd;
    return (perk_page_hash){low, give_half(&s)};
}

int32_t perk_hash_pages(const perk_page_secret *secret, const int32_t *tokens, int32_t page_size,
                        perk_page_hash *hashes, int32_t known, int32_t full_pages) {
    for (; known < full_pages; known++)
        hashes[known] = perk_hash_page(secret, tokens + known * page_size, page_size,
                                       known ? hashes[known - 1] : PERK_NO_PAGE_HASH);
    return known;
}
