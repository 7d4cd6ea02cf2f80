#include "activation.h"

#include <math.h>

const char *perk_activation_name(perk_activation activation) {
    static const char *const names[] = {"none", "silu", "gelu_tanh"};
    return names[activation];
}

float perk_activate(perk_activation activation, float value) {
    /* gelu's (1 + tanh(u)) / 2 is sigmoid(2 u), which does not cancel where tanh is near -1; 2 u below is
     * 2 sqrt(2 / pi) (value + 0.044715 value^3). */
    switch (activation) {
    case PERK_ACTIVATION_SILU: return value / (1 + expf(-value));
    case PERK_ACTIVATION_GELU_TANH: return value / (1 + expf(-value * (1.5957691f + 0.07135481f * value * value)));
    default: return value;
    }
}
