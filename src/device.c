/* What the plan needs to know of a device. */
#include "device.h"

#include <stdio.h>

#include "jit/compile.h"

enum { OLDEST_CAPABILITY = 80 }; /* bf16 mma, cp.async and mbarriers begin there */
enum { BULK_COPY_CAPABILITY = 90 };

/* A typical card of each capability: SMs, and the shared memory that a block may ask for (CUDA C++ Programming Guide,
 * "Technical Specifications per Compute Capability"). */
static const struct {
    int capability, sm_count, shared_kb;
    const char *card;
} cards[] = {
    {80, 108, 163, "A100"},         {86, 84, 99, "A40"},     {87, 16, 163, "Orin"},   {89, 142, 99, "L40S"},
    {90, 132, 227, "H100"},         {100, 148, 227, "B200"}, {103, 148, 227, "B300"}, {110, 20, 227, "Thor"},
    {120, 188, 99, "RTX PRO 6000"}, {121, 48, 99, "GB10"},
};

static perk_status describe(int capability, int sm_count, int shared_bytes, perk_device_desc *desc, perk_error *err) {
    if (capability < OLDEST_CAPABILITY)
        return perk_fail(err, PERK_UNSUPPORTED,
                         "compute capability %d.%d: perk needs 8.0 (A100) or newer, for bf16 tensor cores and "
                         "asynchronous copies",
                         capability / 10, capability % 10);
    *desc = (perk_device_desc){.capability = capability,
                               .worker_count = sm_count,
                               .shared_memory = shared_bytes,
                               .portable = capability < BULK_COPY_CAPABILITY};
    perk_arch_of_capability(capability / 10, capability % 10, desc->arch);
    return PERK_OK;
}

perk_status perk_device_describe_arch(const char *arch, perk_device_desc *desc, perk_error *err) {
    const char *digits = !strncmp(arch, "sm_", 3) ? arch + 3 : arch;
    char *end;
    long capability = strtol(digits, &end, 10);
    bool suffix_ok = *end == '\0' || (!end[1] && (*end == 'a' || *end == 'f'));
    for (size_t i = 0; i < PERK_COUNT(cards) && suffix_ok; i++)
        if (cards[i].capability == capability)
            return describe((int)capability, cards[i].sm_count, cards[i].shared_kb * 1024, desc, err);
    if (suffix_ok && end != digits && capability > 0 && capability < OLDEST_CAPABILITY)
        return describe((int)capability, 1, 0, desc, err);
    perk_buffer known = {0};
    for (size_t i = 0; i < PERK_COUNT(cards); i++) perk_buffer_printf(&known, " sm_%d", cards[i].capability);
    perk_status status = perk_fail(err, PERK_UNSUPPORTED, "architecture \"%s\" is not one that perk knows:%s", arch,
                                   known.data ? known.data : "");
    perk_buffer_free(&known);
    return status;
}

perk_status perk_device_describe(const perk_device_info *info, perk_device_desc *desc, perk_error *err) {
    return describe(info->cc_major * 10 + info->cc_minor, info->sm_count, (int)info->shared_per_block_optin, desc, err);
}

void perk_device_make_portable(perk_device_desc *desc) { desc->portable = true; }
