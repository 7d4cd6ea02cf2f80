/* What jit/cubin_info reads from cubins, compared with what ptxas said when it made them; and damaged cubins. */
#include "jit/compile.h"
#include "jit/cubin_info.h"
#include "spilling_kernel.h"
#include "test.h"

static const char SOURCE[] = "extern \"C\" __global__ void __launch_bounds__(128, 1) lean(float *p, int n) {\n"
                             "    __shared__ float s[64];\n"
                             "    s[threadIdx.x & 63] = p[threadIdx.x];\n"
                             "    __syncthreads();\n"
                             "    p[n] = s[(threadIdx.x + 1) & 63];\n"
                             "}\n"
                             "extern \"C\" __global__ void indexed(float *p, int n) {\n"
                             "    float a[32];\n"
                             "    for (int i = 0; i < 32; i++) a[i] = p[i];\n"
                             "    for (int i = 0; i < n; i++) a[(i * 7) & 31] += a[i & 31];\n"
                             "    p[0] = a[n & 31];\n"
                             "}\n" SPILLING_KERNEL "extern \"C\" __global__ void empty() {}\n";

static const char *const KERNELS[] = {"lean", "indexed", "crowded", "empty"};

/* The number before `unit` in the part of the log that is about the kernel; 0 when ptxas does not mention it. */
static unsigned said(const char *log, const char *kernel, const char *unit) {
    char heading[64];
    snprintf(heading, sizeof heading, "Compiling entry function '%s'", kernel);
    const char *from = strstr(log, heading);
    CHECK(from, "the log has no '%s': %s", heading, log);
    const char *until = strstr(from + 1, "Compiling entry function"), *at = strstr(from, unit);
    if (!at || (until && at > until)) return 0;
    while (at > from && at[-1] >= '0' && at[-1] <= '9') at--;
    return (unsigned)strtoul(at, NULL, 10);
}

static void compare_with_log(const perk_nvrtc *nvrtc, const perk_compile_result *compiled, const char *kernel,
                             const char *arch) {
    perk_error err = {0};
    perk_cubin_kernel_info info;
    CHECK_OK(perk_cubin_info(compiled->cubin, compiled->cubin_size, kernel, &info, &err));
    unsigned registers = said(compiled->log, kernel, " registers"), frame = said(compiled->log, kernel, " bytes stack"),
             shared = said(compiled->log, kernel, " bytes smem"), spilled = said(compiled->log, kernel, " bytes spill");
    CHECK(info.registers == registers, "%s %s: %u, not %u", arch, kernel, info.registers, registers);
    CHECK(info.frame_bytes == frame, "%s %s: %u, not %u", arch, kernel, info.frame_bytes, frame);
    CHECK(info.stack_bytes >= frame, "%s %s: %u", arch, kernel, info.stack_bytes);
    CHECK(info.shared_bytes == shared, "%s %s: %u, not %u", arch, kernel, info.shared_bytes, shared);
    CHECK(info.capability == (int)strtol(arch + 3, NULL, 10), "%s: %d", arch, info.capability);
    CHECK(info.code_bytes >= 64 && info.code_bytes % 16 == 0 && info.code_bytes < compiled->cubin_size);
    bool records_spills = nvrtc->major > 12 || nvrtc->minor >= 9;
    CHECK(!records_spills || info.spills == (spilled > 0), "%s %s: %u bytes", arch, kernel, spilled);
    if (strcmp(kernel, "lean") == 0) CHECK(info.max_threads == 128 && shared == 256 && frame == 0);
    if (strcmp(kernel, "indexed") == 0) CHECK(frame >= 128 && !info.spills && info.max_threads == 0);
    if (strcmp(kernel, "crowded") == 0) CHECK(frame > 0 && spilled > 0 && info.max_threads == 1024);
}

/* A copy of exactly the size, so that a sanitizer sees a read behind the end. */
static perk_status info_of_copy(const unsigned char *bytes, size_t size, const char *kernel) {
    perk_cubin_kernel_info info;
    unsigned char *copy = malloc(size ? size : 1);
    CHECK(copy);
    if (size) memcpy(copy, bytes, size);
    perk_status status = perk_cubin_info(copy, size, kernel, &info, NULL);
    CHECK(status == PERK_OK || status == PERK_BAD_FORMAT || status == PERK_NOT_FOUND);
    free(copy);
    return status;
}

static void test_damaged(const perk_compile_result *compiled) {
    perk_error err;
    perk_cubin_kernel_info info;
    size_t accepted = 0;
    for (size_t size = 0; size < compiled->cubin_size; size++)
        accepted += info_of_copy(compiled->cubin, size, "lean") == PERK_OK;
    CHECK(accepted < compiled->cubin_size / 2, "%zu of %zu lengths", accepted, compiled->cubin_size);
    for (size_t at = 0; at < compiled->cubin_size; at++) {
        compiled->cubin[at] ^= 0xff;
        info_of_copy(compiled->cubin, compiled->cubin_size, "crowded");
        compiled->cubin[at] ^= 0xff;
    }
    CHECK_FAILS(perk_cubin_info(compiled->cubin, compiled->cubin_size, "nobody", &info, &err), PERK_NOT_FOUND,
                "no kernel 'nobody'");
    CHECK_FAILS(perk_cubin_info(compiled->cubin, 100, "lean", &info, &err), PERK_BAD_FORMAT, "damaged");
    CHECK_FAILS(perk_cubin_info(NULL, 0, "lean", &info, &err), PERK_BAD_FORMAT, "damaged");
}

int main(void) {
    static const char *const archs[] = {"sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120a"};
    perk_error err = {0};
    perk_nvrtc *nvrtc;
    if (perk_nvrtc_open(&nvrtc, NULL, &err) != PERK_OK) {
        fprintf(stderr, "skipped: %s\n", err.message);
        return TEST_SKIP;
    }
    for (size_t i = 0; i < PERK_COUNT(archs); i++) {
        if (perk_nvrtc_check_arch(nvrtc, archs[i], &err) == PERK_UNSUPPORTED) {
            fprintf(stderr, "skipped %s: NVRTC %d.%d does not know it\n", archs[i], nvrtc->major, nvrtc->minor);
            continue;
        }
        perk_compile_request request = {.source = SOURCE, .arch = archs[i]};
        perk_compile_result compiled;
        CHECK_OK(perk_compile(nvrtc, &request, &compiled, &err));
        for (size_t k = 0; k < PERK_COUNT(KERNELS); k++) compare_with_log(nvrtc, &compiled, KERNELS[k], archs[i]);
        if (i == 0 || i == 3 || i == 6) test_damaged(&compiled);
        perk_compile_result_free(&compiled);
    }
    perk_nvrtc_free(nvrtc);
    return 0;
}
