/* A kernel whose live values are more than 64 registers hold: it spills on every architecture. */
#ifndef PERK_TESTS_SPILLING_KERNEL_H
#define PERK_TESTS_SPILLING_KERNEL_H

#define SPILLING_KERNEL                                                                                                \
    "extern \"C\" __global__ void __launch_bounds__(1024, 1) crowded(float *p, int n) {\n"                             \
    "    float a[96];\n"                                                                                               \
    "    for (int i = 0; i < 96; i++) a[i] = p[i * 1024 + threadIdx.x];\n"                                             \
    "    for (int r = 0; r < n; r++) {\n"                                                                              \
    "        float t = a[0];\n"                                                                                        \
    "        for (int i = 0; i < 95; i++) a[i] = a[i] * a[i + 1] + t;\n"                                               \
    "        a[95] = t * a[95];\n"                                                                                     \
    "    }\n"                                                                                                          \
    "    for (int i = 0; i < 96; i++) p[i * 1024 + threadIdx.x] = a[i];\n"                                             \
    "}\n"

#endif
