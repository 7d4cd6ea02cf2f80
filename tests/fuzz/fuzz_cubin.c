/* A kernel's name, 0xff, bytes as a cubin. */
#include "fuzz.h"

#include "jit/cubin_info.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_part part = fuzz_take(&data, &size, false), cubin = fuzz_take(&data, &size, true);
    char *kernel = perk_format("%.*s", (int)PERK_MIN(part.size, (size_t)256), part.data ? part.data : "");
    perk_error err = {0};
    perk_cubin_kernel_info info;
    FUZZ_CHECK(kernel);
    perk_status status = perk_cubin_info(cubin.data, cubin.size, kernel, &info, &err);
    fuzz_check_result(status, &err, status == PERK_OK);
    if (status == PERK_OK) {
        FUZZ_CHECK(info.code_bytes <= cubin.size && info.spills == (info.spill_instructions > 0));
    } else {
        static const perk_cubin_kernel_info none;
        FUZZ_CHECK(memcmp(&info, &none, sizeof info) == 0, "a refused cubin left numbers");
    }
    free(kernel);
    free(part.data);
    free(cubin.data);
    return 0;
}
