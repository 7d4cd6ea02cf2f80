#include "jit/cubin_info.h"

#include <elf.h>

/* Records of .nv.info: format, attribute, then 16 bits that are the value or, in format SIZED, the payload's size. */
enum { FORMAT_SIZED = 4 };
enum {
    ATTRIBUTE_MAX_THREADS = 0x05,
    ATTRIBUTE_FRAME = 0x11,
    ATTRIBUTE_STACK = 0x12,
    ATTRIBUTE_REGISTERS = 0x2f,
    ATTRIBUTE_SPILLS = 0x55, /* 8 bytes a spill instruction */
};
enum { MACHINE_CUDA = 190, ABI_OF_CUDA_13 = 8, RESERVED_SHARED = 1024, SPILL_RECORD = 8 };

typedef struct cubin_file {
    const unsigned char *bytes;
    size_t size;
    Elf64_Ehdr header;
    Elf64_Shdr names;                 /* of sections */
    Elf64_Shdr symbols, symbol_names; /* zeroed when there are none */
} cubin_file;

typedef struct bytes_view {
    const unsigned char *at;
    size_t size;
} bytes_view;

static bool copy_from(const cubin_file *file, uint64_t offset, void *to, size_t size) {
    if (offset > file->size || size > file->size - offset) return false;
    memcpy(to, file->bytes + offset, size);
    return true;
}

static bool read_section(const cubin_file *file, size_t index, Elf64_Shdr *section) {
    if (index >= file->header.e_shnum || file->header.e_shoff > file->size) return false;
    return copy_from(file, file->header.e_shoff + index * sizeof *section, section, sizeof *section);
}

static bool section_bytes(const cubin_file *file, const Elf64_Shdr *section, bytes_view *view) {
    if (section->sh_type == SHT_NOBITS || section->sh_offset > file->size ||
        section->sh_size > file->size - section->sh_offset)
        return false;
    *view = (bytes_view){file->bytes + section->sh_offset, (size_t)section->sh_size};
    return true;
}

/* The NUL-terminated string at `offset` of a string table; NULL when it leaves the table. */
static const char *string_at(const cubin_file *file, const Elf64_Shdr *table, uint64_t offset) {
    bytes_view strings;
    if (!section_bytes(file, table, &strings) || offset >= strings.size) return NULL;
    const char *text = (const char *)strings.at + offset;
    return memchr(text, '\0', strings.size - (size_t)offset) ? text : NULL;
}

/* By type: NVRTC 12.0 does not link .nv.info to its symbols. */
static void find_symbols(cubin_file *file) {
    Elf64_Shdr section;
    for (size_t i = 1; read_section(file, i, &section); i++) {
        if (section.sh_type != SHT_SYMTAB) continue;
        if (read_section(file, section.sh_link, &file->symbol_names)) file->symbols = section;
        return;
    }
}

static bool open_cubin(cubin_file *file, const void *cubin, size_t size) {
    *file = (cubin_file){.bytes = cubin, .size = size};
    const Elf64_Ehdr *header = &file->header;
    bool is_cubin = cubin && copy_from(file, 0, &file->header, sizeof file->header) &&
                    memcmp(header->e_ident, ELFMAG, SELFMAG) == 0 && header->e_ident[EI_CLASS] == ELFCLASS64 &&
                    header->e_ident[EI_DATA] == ELFDATA2LSB && header->e_machine == MACHINE_CUDA &&
                    header->e_shentsize == sizeof(Elf64_Shdr) && read_section(file, header->e_shstrndx, &file->names);
    if (is_cubin) find_symbols(file);
    return is_cubin;
}

/* Finds the section called prefix + kernel; returns its index, or 0, which is never a named section. */
static size_t find_section(const cubin_file *file, const char *prefix, const char *kernel, Elf64_Shdr *section) {
    size_t prefix_length = strlen(prefix);
    for (size_t i = 1; i < file->header.e_shnum; i++) {
        if (!read_section(file, i, section)) return 0;
        const char *name = string_at(file, &file->names, section->sh_name);
        if (name && strncmp(name, prefix, prefix_length) == 0 && strcmp(name + prefix_length, kernel) == 0) return i;
    }
    return 0;
}

/* Whether symbol `index` is the kernel: the function of that name. */
static bool is_kernel_symbol(const cubin_file *file, uint32_t index, const char *kernel) {
    Elf64_Sym symbol;
    const Elf64_Shdr *table = &file->symbols;
    if (index >= table->sh_size / sizeof symbol || table->sh_offset > file->size ||
        !copy_from(file, table->sh_offset + index * sizeof symbol, &symbol, sizeof symbol))
        return false;
    const char *name = string_at(file, &file->symbol_names, symbol.st_name);
    return ELF64_ST_TYPE(symbol.st_info) == STT_FUNC && name && strcmp(name, kernel) == 0;
}

typedef struct nv_record {
    unsigned attribute;
    bytes_view payload;
} nv_record;

/* Takes the next record off `rest`; false at the end and, with *damaged set, at a record that leaves the section. */
static bool next_record(bytes_view *rest, nv_record *record, bool *damaged) {
    if (rest->size == 0) return false;
    if (rest->size < 4) return !(*damaged = true);
    size_t payload = rest->at[0] == FORMAT_SIZED ? (size_t)rest->at[2] | (size_t)rest->at[3] << 8 : 0;
    if (payload > rest->size - 4) return !(*damaged = true);
    *record = (nv_record){rest->at[1], {rest->at + 4, payload}};
    rest->at += 4 + payload;
    rest->size -= 4 + payload;
    return true;
}

static uint32_t word_of(const nv_record *record, size_t index) {
    uint32_t value = 0;
    if (record->payload.size >= 4 * (index + 1)) memcpy(&value, record->payload.at + 4 * index, sizeof value);
    return value;
}

/* .nv.info: records {symbol, value} of all functions. */
static bool read_shared_records(const cubin_file *file, const char *kernel, perk_cubin_kernel_info *info) {
    Elf64_Shdr section;
    bytes_view rest;
    nv_record record;
    bool damaged = false, found = false;
    if (!find_section(file, ".nv.info", "", &section) || !section_bytes(file, &section, &rest)) return false;
    while (next_record(&rest, &record, &damaged)) {
        if (record.payload.size != 8 || !is_kernel_symbol(file, word_of(&record, 0), kernel)) continue;
        uint32_t value = word_of(&record, 1);
        if (record.attribute == ATTRIBUTE_REGISTERS) info->registers = value, found = true;
        if (record.attribute == ATTRIBUTE_FRAME) info->frame_bytes = value;
        if (record.attribute == ATTRIBUTE_STACK) info->stack_bytes = value;
    }
    return found && !damaged;
}

/* .nv.info.<kernel>: records of this kernel alone. A kernel without parameters may have none. */
static bool read_own_records(const cubin_file *file, const char *kernel, perk_cubin_kernel_info *info) {
    Elf64_Shdr section;
    bytes_view rest;
    nv_record record;
    bool damaged = false;
    if (!find_section(file, ".nv.info.", kernel, &section)) return true;
    if (!section_bytes(file, &section, &rest)) return false;
    while (next_record(&rest, &record, &damaged)) {
        if (record.attribute == ATTRIBUTE_SPILLS)
            info->spill_instructions += (uint32_t)(record.payload.size / SPILL_RECORD);
        if (record.attribute == ATTRIBUTE_MAX_THREADS && record.payload.size == 12)
            info->max_threads = word_of(&record, 0) * word_of(&record, 1) * word_of(&record, 2);
    }
    info->spills = info->spill_instructions > 0;
    return !damaged;
}

static void read_shared_memory(const cubin_file *file, const char *kernel, perk_cubin_kernel_info *info) {
    Elf64_Shdr section;
    if (!find_section(file, ".nv.shared.", kernel, &section)) return;
    uint64_t size = PERK_MIN(section.sh_size, (uint64_t)UINT32_MAX);
    info->reserved_shared_bytes = info->capability >= 90 && size >= RESERVED_SHARED ? RESERVED_SHARED : 0;
    info->shared_bytes = (uint32_t)size - info->reserved_shared_bytes;
}

perk_status perk_cubin_info(const void *cubin, size_t size, const char *kernel, perk_cubin_kernel_info *info,
                            perk_error *err) {
    *info = (perk_cubin_kernel_info){0};
    cubin_file file;
    Elf64_Shdr code;
    if (!open_cubin(&file, cubin, size))
        return perk_fail(err, PERK_BAD_FORMAT, "the cubin of %zu bytes is damaged: no ELF file of CUDA code", size);
    if (!find_section(&file, ".text.", kernel, &code))
        return perk_fail(err, PERK_NOT_FOUND, "the cubin of %zu bytes holds no kernel '%s'", size, kernel);
    bool new_flags = file.header.e_ident[EI_ABIVERSION] >= ABI_OF_CUDA_13;
    info->capability = (int)(file.header.e_flags >> (new_flags ? 8 : 0) & 0xff);
    info->code_bytes = code.sh_size;
    bytes_view whole;
    if (!section_bytes(&file, &code, &whole) || !read_shared_records(&file, kernel, info) ||
        !read_own_records(&file, kernel, info)) {
        *info = (perk_cubin_kernel_info){0};
        return perk_fail(err, PERK_BAD_FORMAT, "the cubin of %zu bytes is damaged: the records of kernel '%s' are cut",
                         size, kernel);
    }
    read_shared_memory(&file, kernel, info);
    return PERK_OK;
}
