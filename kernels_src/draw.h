/* The arithmetic of sampling, once for the host and the kernel: src/sampler.h says what it is for. Both get the same
 * tokens, bit by bit, in whatever order they add: weights are integers, and a weight is a fixed sequence of fp32
 * operations, each rounded by itself. */
#ifndef PERK_DRAW_H
#define PERK_DRAW_H

#include "shared_code.h"

/* What a request's sampling comes to; all zero: the largest logit. */
typedef struct perk_draw_rule {
    uint64_t seed;
    uint64_t top_p;      /* 2^64 times it; 0: all */
    uint64_t min_weight; /* 0: none */
    float scale;         /* log2(e) / temperature; 0: greedy */
    float repetition;    /* penalties; repetition 1 and the others 0: none */
    float presence, frequency;
    int32_t top_k; /* 0: all */
    int32_t bias_count;
    int32_t has_penalties;
    int32_t logprobs; /* 1 + how many of the likeliest are wanted; 0: none */
    int32_t samples;  /* 0: the argmax of the logits as they are, and nothing more */
    int32_t reserved;
} perk_draw_rule;

typedef struct perk_draw_bias {
    int32_t token; /* each once */
    float bias;
} perk_draw_bias;

enum { PERK_DRAW_TOP = 20, PERK_DRAW_BIASES = 4096, PERK_DRAW_BINS = 256 }; /* biases: of a request */

/* What log probabilities are made of. */
typedef struct perk_draw_record {
    uint64_t sum;          /* of the weights at temperature 1 */
    float largest, chosen; /* logits */
    int32_t count, reserved;
    struct perk_draw_top {
        int32_t token;
        float logit;
    } top[PERK_DRAW_TOP];  /* [count] the likeliest, in any order */
    uint64_t reserved_too; /* whole pieces of 16 bytes */
} perk_draw_record;

/* Where the workers that draw a row's token together meet; two of what is written again before all have read it. */
typedef struct perk_draw_room {
    uint32_t arrived;  /* at all meetings */
    uint32_t listed;   /* in all lists */
    uint32_t recorded; /* in the record's top */
    uint32_t token;    /* that was drawn: not zero before */
    uint32_t reserved[28];
    uint32_t counts[2][PERK_DRAW_BINS]; /* histograms */
    uint64_t weights[2][PERK_DRAW_BINS];
    uint64_t keys[2][PERK_DRAW_BINS];    /* lists */
    uint64_t numbers[2][PERK_DRAW_BINS]; /* [workers] */
} perk_draw_room;

/* The weight of the largest logit: so many of the largest vocabulary (2^22) add up without overflow. */
#define PERK_WEIGHT_ONE_SHIFT 40
#define PERK_LOG2_E 1.44269504f

/* ---- fp32, no two operations in one ---- */

#ifdef __CUDACC_RTC__
PERK_SHARED_CODE float perk_sum(float a, float b) { return __fadd_rn(a, b); }
PERK_SHARED_CODE float perk_product(float a, float b) { return __fmul_rn(a, b); }
PERK_SHARED_CODE float perk_quotient(float a, float b) { return __fdiv_rn(a, b); }
PERK_SHARED_CODE uint32_t perk_float_bits(float a) { return __float_as_uint(a); }
PERK_SHARED_CODE float perk_float_of(uint32_t bits) { return __uint_as_float(bits); }
#else
/* Files that include this are compiled with -ffp-contract=off. */
PERK_SHARED_CODE float perk_sum(float a, float b) { return a + b; }
PERK_SHARED_CODE float perk_product(float a, float b) { return a * b; }
PERK_SHARED_CODE float perk_quotient(float a, float b) { return a / b; }
PERK_SHARED_CODE uint32_t perk_float_bits(float a) {
    uint32_t bits;
    __builtin_memcpy(&bits, &a, sizeof bits);
    return bits;
}
PERK_SHARED_CODE float perk_float_of(uint32_t bits) {
    float a;
    __builtin_memcpy(&a, &bits, sizeof a);
    return a;
}
#endif

/* ---- ranking ---- */

enum { PERK_RANK_NONE = 0 };           /* NaN and -inf: never picked */
#define PERK_RANK_INFINITE 0xff800000u /* +inf, and nothing above it */

/* Rises with the logit; equal for equal ones. */
PERK_SHARED_CODE uint32_t perk_rank(float logit) {
    uint32_t bits = perk_float_bits(perk_sum(logit, 0.0f)); /* -0 becomes 0 */
    uint32_t rank = bits >> 31 ? ~bits : bits | 0x80000000u;
    return rank > PERK_RANK_INFINITE || rank <= 0x007fffffu ? (uint32_t)PERK_RANK_NONE : rank;
}

/* The logit of a rank that is not PERK_RANK_NONE. */
PERK_SHARED_CODE float perk_rank_logit(uint32_t rank) { return perk_float_of(rank >> 31 ? rank & 0x7fffffffu : ~rank); }

/* ---- weights ---- */

/* exp((logit - largest) / temperature) in units of 2^-40, to 2e-7 of itself and one unit; 0 for NaN and -inf.
 * `largest` is finite. 2^-y = 2^-n 2^-g, with n the integer next to y and g in [-0.5, 0.5]. */
PERK_SHARED_CODE uint64_t perk_weight(float logit, float largest, float scale) {
    const float rounder = 12582912.0f; /* 1.5 * 2^23: what is added to it is rounded to an integer */
    float y = perk_product(perk_sum(largest, -logit), scale);
    y = y < 48.0f ? y : 48.0f; /* also where it is NaN: nothing is left of it */
    float n = perk_sum(y, rounder);
    float g = perk_sum(y, -perk_sum(n, -rounder)); /* exact */
    float p = perk_sum(perk_product(g, -0x1.5bba12p-10f), 0x1.3cea88p-7f);
    p = perk_sum(perk_product(p, g), -0x1.c6b752p-5f);
    p = perk_sum(perk_product(p, g), 0x1.ebf9bcp-3f);
    p = perk_sum(perk_product(p, g), -0x1.62e42ap-1f);
    p = perk_sum(perk_product(p, g), 1.0f);
    uint32_t mantissa = (uint32_t)(int32_t)perk_product(p, 0x1p24f);
    return (uint64_t)mantissa << (PERK_WEIGHT_ONE_SHIFT - 24) >> (perk_float_bits(n) - perk_float_bits(rounder));
}

/* floor(a b / 2^64) */
PERK_SHARED_CODE uint64_t perk_high_product(uint64_t a, uint64_t b) {
    uint64_t a0 = (uint32_t)a, a1 = a >> 32, b0 = (uint32_t)b, b1 = b >> 32;
    uint64_t low = (a0 * b0 >> 32) + (uint32_t)(a0 * b1);
    uint64_t middle = low + (uint32_t)(a1 * b0);
    return a1 * b1 + (a0 * b1 >> 32) + (a1 * b0 >> 32) + (middle >> 32);
}

/* The weight that the kept tokens must reach, of `sum` for all: at least 1, so that one is kept. */
PERK_SHARED_CODE uint64_t perk_nucleus(uint64_t top_p, uint64_t sum) {
    uint64_t wanted = perk_high_product(top_p, sum);
    return wanted ? wanted : 1;
}

/* ---- bias and penalties ---- */

/* Of a token that is in the prompt or in the answer; `times`: in the answer. */
PERK_SHARED_CODE float perk_penalize(float logit, const perk_draw_rule *rule, int32_t times) {
    logit = logit > 0.0f ? perk_quotient(logit, rule->repetition) : perk_product(logit, rule->repetition);
    logit = perk_sum(logit, -perk_product(rule->frequency, (float)times));
    return times ? perk_sum(logit, -rule->presence) : logit;
}

/* ---- randomness ---- */

/* A bijection of 64-bit numbers in which every input bit reaches every output bit (the finaliser of splitmix64). */
PERK_SHARED_CODE uint64_t perk_scramble(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* 64 random bits of the token at `place` of an answer. No state: any place can be drawn at any time. */
PERK_SHARED_CODE uint64_t perk_random_bits(uint64_t seed, uint64_t place) {
    const uint64_t golden = 0x9e3779b97f4a7c15u; /* 2^64 / golden ratio */
    return perk_scramble(perk_scramble(seed + golden) + golden * (place + 1));
}

#endif
