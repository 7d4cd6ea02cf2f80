/* bf16 and fp16 conversions: every 16-bit pattern there and back, and rounding checked against its definition. */
#include "perk/dtype.h"
#include "src/float.h"
#include "test.h"

#include <math.h>
#include <stdbool.h>

typedef float widen_fn(uint16_t bits);
typedef uint16_t narrow_fn(float value);

typedef struct half_type {
    const char *name;
    widen_fn *widen;
    narrow_fn *narrow;
    uint16_t infinity; /* patterns below it are the finite positive numbers, in order */
    uint16_t quiet;    /* the bit that makes a NaN quiet */
} half_type;

static const half_type types[] = {
    {"bf16", perk_bf16_to_f32, perk_f32_to_bf16, 0x7f80, 0x0040},
    {"f16", perk_f16_to_f32, perk_f32_to_f16, 0x7c00, 0x0200},
};

static void check_round_trip(const half_type *type) {
    for (uint32_t bits = 0; bits < 0x10000; bits++) {
        float value = type->widen((uint16_t)bits);
        uint16_t back = type->narrow(value);
        if ((bits & 0x7fff) > type->infinity)
            CHECK(isnan(value) && back == (bits | type->quiet), "%s %04x -> %04x", type->name, bits, back);
        else
            CHECK(back == bits, "%s %04x -> %g -> %04x", type->name, bits, (double)value, back);
    }
}

/* Where infinity stands in for the next number up, as rounding sees it. */
static double position(const half_type *type, uint16_t magnitude) {
    if (magnitude < type->infinity) return (double)type->widen(magnitude);
    double last = (double)type->widen((uint16_t)(type->infinity - 1));
    return last + (last - (double)type->widen((uint16_t)(type->infinity - 2)));
}

/* The nearest magnitude, the even pattern in a tie; by bisection over the ordered patterns. */
static uint16_t nearest(const half_type *type, double value) {
    uint16_t low = 0, high = type->infinity;
    if (value >= position(type, high)) return high;
    while (high - low > 1) {
        uint16_t middle = (uint16_t)((low + high) / 2);
        if (position(type, middle) <= value)
            low = middle;
        else
            high = middle;
    }
    double below = value - position(type, low), above = position(type, high) - value;
    if (below != above) return below < above ? low : high;
    return low % 2 == 0 ? low : high;
}

static void check_rounding(const half_type *type, uint32_t bits) {
    float value = perk_f32_from_bits(bits);
    uint16_t narrow = type->narrow(value);
    if (isnan(value)) {
        CHECK((narrow & 0x7fff) > type->infinity, "%s: NaN %08x -> %04x", type->name, bits, narrow);
        return;
    }
    uint16_t expected = (uint16_t)(nearest(type, fabs((double)value)) | (bits >> 31 << 15));
    CHECK(narrow == expected, "%s: %08x -> %04x, not %04x", type->name, bits, narrow, expected);
}

int main(void) {
    for (size_t t = 0; t < sizeof types / sizeof types[0]; t++) {
        uint32_t random = 1;
        check_round_trip(&types[t]);
        for (uint32_t i = 0; i < 300000; i++) check_rounding(&types[t], random = random * 1664525u + 1013904223u);
        for (uint32_t i = 0; i < 0x10000; i++) { /* ties and their neighbours, at both types' lengths */
            uint32_t tie = perk_f32_bits(types[t].widen((uint16_t)i)) + (t == 0 ? 0x8000u : 0x1000u);
            for (uint32_t step = 0; step < 3; step++) check_rounding(&types[t], tie + step - 1);
        }
    }
    CHECK(perk_round_bf16(1.00390625f) == 1.0f, "a tie goes to even");
    CHECK(perk_f16_to_f32(0x3555) == 0.333251953125f, "a third");
    CHECK(perk_dtype_size(PERK_BF16) == 2 && perk_dtype_size(PERK_F16) == 2 && perk_dtype_size(PERK_F32) == 4 &&
          perk_dtype_size(PERK_I32) == 4 && perk_dtype_size((perk_dtype)9) == 0);
    CHECK(strcmp(perk_dtype_name(PERK_BF16), "bf16") == 0 && strcmp(perk_dtype_name((perk_dtype)9), "unknown") == 0);
    return 0;
}
