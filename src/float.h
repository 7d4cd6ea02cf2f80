/* bf16 and fp16 as bit patterns in uint16_t, to and from float. Narrowing rounds to nearest, ties to even, as the GPU
 * does; NaN stays NaN, overflow becomes infinity, subnormals are kept. */
#ifndef PERK_SRC_FLOAT_H
#define PERK_SRC_FLOAT_H

#include <stdint.h>
#include <string.h>

static inline uint32_t perk_f32_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float perk_f32_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float perk_bf16_to_f32(uint16_t bits) { return perk_f32_from_bits((uint32_t)bits << 16); }

static inline uint16_t perk_f32_to_bf16(float value) {
    uint32_t bits = perk_f32_bits(value);
    /* Rounding could carry a NaN's payload into infinity or zero; a quiet NaN of the same sign cannot. */
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x0040u);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* What a float becomes when it is stored as bf16. */
static inline float perk_round_bf16(float value) { return perk_bf16_to_f32(perk_f32_to_bf16(value)); }

static inline float perk_f16_to_f32(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000u) << 16;
    uint32_t magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00u) { /* infinity and NaN; a NaN is made quiet, as hardware makes it */
        uint32_t quiet = magnitude > 0x7c00u ? 0x00400000u : 0;
        return perk_f32_from_bits(sign | 0x7f800000u | quiet | (magnitude << 13));
    }
    if (magnitude < 0x0400u) { /* zero and subnormals are whole multiples of 2^-24 */
        float value = (float)magnitude * 0x1p-24f;
        return sign ? -value : value;
    }
    return perk_f32_from_bits(sign | ((magnitude << 13) + ((127u - 15u) << 23)));
}

static inline uint16_t perk_f32_to_f16(float value) {
    uint32_t bits = perk_f32_bits(value);
    uint32_t sign = (bits >> 16) & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | ((magnitude >> 13) & 0x01ffu));
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and above round to infinity */
    if (magnitude < 0x38800000u) { /* below 2^-14: adding 0.5 makes the float adder round to a multiple of 2^-24 */
        float aligned = perk_f32_from_bits(magnitude) + 0.5f;
        return (uint16_t)(sign | (perk_f32_bits(aligned) - 0x3f000000u));
    }
    magnitude += 0xfffu + ((magnitude >> 13) & 1u);
    return (uint16_t)(sign | ((magnitude - ((127u - 15u) << 23)) >> 13));
}

#endif
