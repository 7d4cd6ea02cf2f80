/* Bytes as a safetensors file. */
#include "fuzz_json.h"

#include "src/safetensors.h"

static fuzz_file file;

/* Reading the data's ends in place shows that they are there. */
static uint64_t check_tensor(const perk_safetensors_tensor *tensor, size_t file_size) {
    const unsigned char *bytes = tensor->data;
    FUZZ_CHECK(tensor->name && tensor->stored && tensor->ndim >= 0 && tensor->ndim <= PERK_SAFETENSORS_MAX_DIMS);
    FUZZ_CHECK(tensor->offset <= file_size && tensor->bytes <= file_size - tensor->offset);
    if (tensor->usable) FUZZ_CHECK((uintptr_t)tensor->data % perk_dtype_size(tensor->dtype) == 0);
    volatile unsigned char seen;
    if (tensor->bytes) seen = bytes[0], seen = bytes[tensor->bytes - 1];
    (void)seen;
    return tensor->bytes;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    perk_error err = {0};
    perk_safetensors *opened = NULL;
    perk_status status = perk_safetensors_open(&opened, fuzz_file_fill(&file, data, size), 7, &err);
    fuzz_check_result(status, &err, opened != NULL);
    uint64_t bytes = 0;
    for (size_t i = 0; opened && i < perk_safetensors_count(opened); i++)
        bytes += check_tensor(perk_safetensors_at(opened, i), size);
    FUZZ_CHECK(bytes <= size);
    perk_safetensors_free(opened);
    return 0;
}

/* The header's length follows its edits. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed) {
    uint64_t length = 0, random = seed * 0x9e3779b97f4a7c15u | 1;
    char edited[4096];
    if (size >= sizeof length) memcpy(&length, data, sizeof length);
    bool has_header = size >= sizeof length && length <= size - sizeof length;
    if (!has_header || fuzz_draw(&random, 2)) return LLVMFuzzerMutate(data, size, max_size);
    uint8_t *header = data + sizeof length;
    size_t rest = size - sizeof length - (size_t)length,
           room = PERK_MIN(max_size - sizeof length - rest, sizeof edited);
    uint64_t written = fuzz_edit_json(header, (size_t)length, edited, room, &random);
    if (!written) return LLVMFuzzerMutate(data, size, max_size);
    memmove(header + written, header + length, rest);
    memcpy(header, edited, (size_t)written);
    memcpy(data, &written, sizeof written);
    return sizeof written + (size_t)written + rest;
}
