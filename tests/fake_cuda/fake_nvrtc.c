/* An NVRTC for tests, beside the driver in the same library: it takes any source and gives a small ELF file in which
 * perk finds its kernels. The file carries a hash of itself and of all that it was made from, so that the driver can
 * tell whether what it is given is whole, and whose it is. Where it emulates, a library of the program for the CPU
 * follows the file. */
#include "fake_cuda.h"

#include <elf.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fake_emulate.h"
#include "jit/emit.h"
#include "jit/nvrtc.h"

#define EXPORT __attribute__((visibility("default")))
#define EXPORT_CALL(name) extern __typeof__(name) name EXPORT;
PERK_NVRTC_FUNCTIONS(EXPORT_CALL)
#undef EXPORT_CALL

/* ---- the file ---- */

enum { KERNELS = 6, SECTIONS = 5 + KERNELS, SYMBOLS = 1 + KERNELS, CODE_BYTES = 64, NAME_BYTES = 512 };
static const char *const kernels[KERNELS] = {PERK_KERNEL_NAME, "perk_pack_tiles",   "perk_pack_rows",
                                             "perk_fill_rope", "perk_read_ceiling", "perk_sync"};

typedef struct nv_record {
    uint8_t format, attribute;
    uint16_t size;
    uint32_t symbol, value;
} nv_record;

typedef struct image {
    Elf64_Ehdr header;
    uint64_t hash; /* of the file, with 0 in this place */
    uint64_t made_from, library_size;
    Elf64_Shdr sections[SECTIONS];
    Elf64_Sym symbols[SYMBOLS];
    nv_record records[KERNELS]; /* registers */
    char names[NAME_BYTES];
    char code[KERNELS][CODE_BYTES];
} image;

static uint64_t hash_bytes(uint64_t hash, const void *data, size_t size) {
    for (size_t i = 0; i < size; i++) hash = (hash ^ ((const uint8_t *)data)[i]) * 0x100000001b3u;
    return hash;
}

static uint64_t hash_text(uint64_t hash, const char *text) { return hash_bytes(hash, text, strlen(text) + 1); }

static uint64_t hash_image(const image *file) {
    image copy = *file;
    copy.hash = 0;
    return hash_bytes(0xcbf29ce484222325u, &copy, sizeof copy);
}

bool fake_nvrtc_is_whole(const void *bytes) {
    image file;
    memcpy(&file, bytes, sizeof file);
    return file.hash == hash_image(&file);
}

static uint32_t add_name(image *file, size_t *used, const char *prefix, const char *name) {
    size_t at = *used;
    *used += (size_t)snprintf(file->names + at, NAME_BYTES - at, "%s%s", prefix, name) + 1;
    return (uint32_t)at;
}

static void add_section(image *file, int index, uint32_t type, uint32_t name, const void *begin, size_t size) {
    file->sections[index] = (Elf64_Shdr){
        .sh_name = name, .sh_type = type, .sh_offset = (size_t)((const char *)begin - (char *)file), .sh_size = size};
}

static void fill_image(image *file, int capability, uint64_t made_from, size_t library_size) {
    size_t used = 1;
    memset(file, 0, sizeof *file);
    memcpy(file->header.e_ident, ELFMAG, SELFMAG);
    file->header.e_ident[EI_CLASS] = ELFCLASS64;
    file->header.e_ident[EI_DATA] = ELFDATA2LSB;
    file->header.e_ident[EI_ABIVERSION] = 8;
    file->header.e_machine = 190;
    file->header.e_flags = (uint32_t)capability << 8;
    file->header.e_shoff = offsetof(image, sections);
    file->header.e_shentsize = sizeof(Elf64_Shdr);
    file->header.e_shnum = SECTIONS;
    file->header.e_shstrndx = 1;
    file->made_from = made_from;
    file->library_size = library_size;
    add_section(file, 1, SHT_STRTAB, add_name(file, &used, ".shstrtab", ""), file->names, NAME_BYTES);
    add_section(file, 2, SHT_SYMTAB, add_name(file, &used, ".symtab", ""), file->symbols, sizeof file->symbols);
    add_section(file, 3, SHT_STRTAB, add_name(file, &used, ".strtab", ""), file->names, NAME_BYTES);
    add_section(file, 4, SHT_PROGBITS, add_name(file, &used, ".nv.info", ""), file->records, sizeof file->records);
    file->sections[2].sh_link = 3;
    for (int k = 0; k < KERNELS; k++) {
        add_section(file, 5 + k, SHT_PROGBITS, add_name(file, &used, ".text.", kernels[k]), file->code[k], CODE_BYTES);
        file->symbols[1 + k].st_name = add_name(file, &used, "", kernels[k]);
        file->symbols[1 + k].st_info = ELF64_ST_INFO(STB_GLOBAL, STT_FUNC);
        file->records[k] = (nv_record){4, 0x2f, 8, (uint32_t)(1 + k), 96};
        for (int i = 0; i < CODE_BYTES; i++) file->code[k][i] = (char)(made_from >> (8 * (i % 8)));
    }
    file->hash = hash_image(file);
}

const void *fake_nvrtc_library(const void *bytes, size_t *size) {
    image file;
    memcpy(&file, bytes, sizeof file);
    *size = file.library_size;
    return file.library_size ? (const char *)bytes + sizeof file : NULL;
}

/* ---- the calls ---- */

struct _nvrtcProgram {
    uint64_t made_from;
    bool compiled;
    char log[4096];
    fake_source source; /* with its own copies of all texts, where it emulates */
    void *library;
    image file;
};

/* The caller's texts need not outlive nvrtcCreateProgram. */
static void copy_source(fake_source *to, const char *text, int count, const char *const *headers,
                        const char *const *names) {
    const char **list = calloc(2 * (size_t)count + 1, sizeof *list);
    if (!list) abort();
    for (int i = 0; i < count; i++) {
        list[i] = strdup(names[i]);
        list[count + i] = strdup(headers[i]);
    }
    *to = (fake_source){.text = strdup(text), .header_names = list, .headers = list + count, .header_count = count};
}

static void free_source(fake_source *source) {
    for (int i = 0; i < 2 * source->header_count; i++) free((void *)(uintptr_t)source->header_names[i]);
    free((void *)(uintptr_t)source->header_names);
    free((void *)(uintptr_t)source->text);
}

static fake_nvrtc state;
static pthread_mutex_t state_lock = PTHREAD_MUTEX_INITIALIZER; /* guards what it counts */

EXPORT fake_nvrtc *fake_nvrtc_state(void) { return &state; }

EXPORT void fake_nvrtc_reset(void) {
    const char *emulates = getenv("FAKE_CUDA_EMULATES");
    state = (fake_nvrtc){.major = 13, .emulates = emulates && *emulates};
}

__attribute__((constructor)) static void load(void) { fake_nvrtc_reset(); }

static nvrtcResult begin(const char *function) {
    pthread_mutex_lock(&state_lock);
    bool fails = ++state.calls == state.failing_call;
    if (fails) state.failed = function;
    pthread_mutex_unlock(&state_lock);
    return fails ? (nvrtcResult)state.result : NVRTC_SUCCESS;
}

static void add_to(long *counter, long by) {
    pthread_mutex_lock(&state_lock);
    *counter += by;
    pthread_mutex_unlock(&state_lock);
}

#define BEGIN(name)                                                                                                    \
    nvrtcResult result = begin(#name);                                                                                 \
    if (result != NVRTC_SUCCESS) return result;

nvrtcResult nvrtcVersion(int *major, int *minor) {
    BEGIN(nvrtcVersion)
    *major = state.major;
    *minor = 0;
    return NVRTC_SUCCESS;
}

const char *nvrtcGetErrorString(nvrtcResult error) { return error ? "FAKE_NVRTC_ERROR" : "NVRTC_SUCCESS"; }

static const int archs[] = {80, 86, 89, 90};

nvrtcResult nvrtcGetNumSupportedArchs(int *count) {
    BEGIN(nvrtcGetNumSupportedArchs)
    *count = sizeof archs / sizeof archs[0];
    return NVRTC_SUCCESS;
}

nvrtcResult nvrtcGetSupportedArchs(int *list) {
    BEGIN(nvrtcGetSupportedArchs)
    memcpy(list, archs, sizeof archs);
    return NVRTC_SUCCESS;
}

nvrtcResult nvrtcCreateProgram(nvrtcProgram *out, const char *source, const char *name, int header_count,
                               const char *const *headers, const char *const *names) {
    BEGIN(nvrtcCreateProgram)
    nvrtcProgram program = calloc(1, sizeof *program);
    if (!program) return NVRTC_ERROR_OUT_OF_MEMORY;
    program->made_from = hash_text(hash_text(0, source), name);
    for (int i = 0; i < header_count; i++)
        program->made_from = hash_text(hash_text(program->made_from, names[i]), headers[i]);
    if (state.emulates) copy_source(&program->source, source, header_count, headers, names);
    add_to(&state.programs, 1);
    *out = program;
    return NVRTC_SUCCESS;
}

nvrtcResult nvrtcDestroyProgram(nvrtcProgram *program) {
    nvrtcResult result = begin("nvrtcDestroyProgram");
    free_source(&(*program)->source);
    free((*program)->library);
    free(*program);
    *program = NULL;
    add_to(&state.programs, -1);
    return result;
}

/* Says it to other processes, too. */
static void count_compile(void) {
    const char *tally = getenv("FAKE_NVRTC_TALLY");
    int fd = tally ? open(tally, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
    add_to(&state.compiles, 1);
    if (fd < 0) return;
    if (write(fd, "x", 1) != 1) abort();
    close(fd);
}

nvrtcResult nvrtcCompileProgram(nvrtcProgram program, int count, const char *const *options) {
    static const char arch[] = "--gpu-architecture=sm_";
    int capability = 0;
    nvrtcResult result = begin("nvrtcCompileProgram");
    if (result != NVRTC_SUCCESS) snprintf(program->log, sizeof program->log, "perk.cu(3): error: as the test asked\n");
    if (result != NVRTC_SUCCESS) return result;
    for (int i = 0; i < count; i++) {
        program->made_from = hash_text(program->made_from, options[i]);
        if (strncmp(options[i], arch, sizeof arch - 1) == 0) capability = atoi(options[i] + sizeof arch - 1);
    }
    size_t library_size = 0;
    program->source.capability = capability;
    program->source.edits = state.edits;
    snprintf(program->log, sizeof program->log, "ptxas info: 0 bytes stack frame, 0 bytes spill stores\n");
    if (state.emulates &&
        !fake_emulate_compile(&program->source, &program->library, &library_size, program->log, sizeof program->log))
        return NVRTC_ERROR_COMPILATION;
    fill_image(&program->file, capability, program->made_from, library_size);
    program->compiled = true;
    count_compile();
    if (state.milliseconds) usleep((unsigned)state.milliseconds * 1000);
    return NVRTC_SUCCESS;
}

nvrtcResult nvrtcGetCUBINSize(nvrtcProgram program, size_t *size) {
    BEGIN(nvrtcGetCUBINSize)
    *size = program->compiled ? sizeof program->file + program->file.library_size : 0;
    return NVRTC_SUCCESS;
}

nvrtcResult nvrtcGetCUBIN(nvrtcProgram program, char *cubin) {
    BEGIN(nvrtcGetCUBIN)
    memcpy(cubin, &program->file, sizeof program->file);
    if (program->library) memcpy(cubin + sizeof program->file, program->library, program->file.library_size);
    return NVRTC_SUCCESS;
}

nvrtcResult nvrtcGetPTXSize(nvrtcProgram program, size_t *size) {
    (void)program;
    BEGIN(nvrtcGetPTXSize)
    *size = 0;
    return NVRTC_SUCCESS;
}

nvrtcResult nvrtcGetPTX(nvrtcProgram program, char *ptx) {
    (void)program, (void)ptx;
    BEGIN(nvrtcGetPTX)
    return NVRTC_SUCCESS;
}

nvrtcResult nvrtcGetProgramLogSize(nvrtcProgram program, size_t *size) {
    BEGIN(nvrtcGetProgramLogSize)
    *size = strlen(program->log) + 1;
    return NVRTC_SUCCESS;
}

nvrtcResult nvrtcGetProgramLog(nvrtcProgram program, char *log) {
    BEGIN(nvrtcGetProgramLog)
    strcpy(log, program->log);
    return NVRTC_SUCCESS;
}
