#include "dynlib.h"

#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <limits.h>
#include <link.h>
#include <stdio.h>
#include <unistd.h>

#if defined(__aarch64__)
#define NATIVE_MACHINE EM_AARCH64
#else
#define NATIVE_MACHINE EM_X86_64
#endif

enum { MAX_NOTE_BYTES = 4 * 1024, MAX_LOADER_CONF = 64 * 1024, MAX_CONF_DEPTH = 4, MAX_REPORT = 760 };

/* ---- ELF: is it ours to load, and which build is it --------------------------------------------- */

static bool read_at(int fd, void *to, size_t size, uint64_t offset) {
    if (offset > INT64_MAX) return false;
    for (size_t used = 0; used < size;) {
        ssize_t got = pread(fd, (char *)to + used, size - used, (off_t)(offset + used));
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return false;
        used += (size_t)got;
    }
    return true;
}

static bool read_native_header(int fd, Elf64_Ehdr *header) {
    return read_at(fd, header, sizeof *header, 0) && memcmp(header->e_ident, ELFMAG, SELFMAG) == 0 &&
           header->e_ident[EI_CLASS] == ELFCLASS64 && header->e_ident[EI_DATA] == ELFDATA2LSB &&
           header->e_type == ET_DYN && header->e_machine == NATIVE_MACHINE && header->e_phentsize == sizeof(Elf64_Phdr);
}

/* Finds the build-id in the notes of one segment. */
static bool find_build_id(const unsigned char *notes, size_t size, size_t align, char hex[PERK_BUILD_ID_SIZE]) {
    align = align == 8 ? 8 : 4;
    while (size >= sizeof(Elf64_Nhdr)) {
        Elf64_Nhdr note;
        memcpy(&note, notes, sizeof note);
        uint64_t name_end = sizeof note + perk_round_up(note.n_namesz, align);
        uint64_t end = name_end + perk_round_up(note.n_descsz, align);
        if (name_end + note.n_descsz > size) return false;
        if (note.n_type == NT_GNU_BUILD_ID && note.n_namesz == 4 && memcmp(notes + sizeof note, "GNU", 4) == 0 &&
            note.n_descsz > 0 && note.n_descsz <= (PERK_BUILD_ID_SIZE - 1) / 2) {
            for (size_t i = 0; i < note.n_descsz; i++) snprintf(hex + 2 * i, 3, "%02x", notes[name_end + i]);
            return true;
        }
        if (end >= size) return false;
        notes += end;
        size -= end;
    }
    return false;
}

static bool read_build_id(int fd, const Elf64_Ehdr *header, char hex[PERK_BUILD_ID_SIZE]) {
    bool found = false;
    unsigned char notes[MAX_NOTE_BYTES]; /* not allocated: a lack of memory must not look like a lack of a build-id */
    for (size_t i = 0; !found && i < header->e_phnum; i++) {
        Elf64_Phdr segment;
        if (header->e_phoff > INT64_MAX || !read_at(fd, &segment, sizeof segment, header->e_phoff + i * sizeof segment))
            break;
        size_t size = (size_t)PERK_MIN(segment.p_filesz, (uint64_t)MAX_NOTE_BYTES);
        if (segment.p_type == PT_NOTE && read_at(fd, notes, size, segment.p_offset))
            found = find_build_id(notes, size, (size_t)segment.p_align, hex);
    }
    return found;
}

perk_status perk_file_build_id(const char *path, char hex[PERK_BUILD_ID_SIZE], perk_error *err) {
    hex[0] = '\0';
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return perk_fail(err, errno == ENOENT ? PERK_NOT_FOUND : PERK_IO, "%s: cannot open: %s", path, strerror(errno));
    perk_status status = PERK_OK;
    Elf64_Ehdr header;
    if (!read_native_header(fd, &header))
        status = perk_fail(err, PERK_BAD_FORMAT, "%s: not a 64-bit shared library for this processor", path);
    else if (!read_build_id(fd, &header, hex))
        status = perk_fail(err, PERK_NOT_FOUND, "%s: the file has no GNU build-id", path);
    close(fd);
    return status;
}

typedef struct loaded_search {
    ElfW(Addr) base;
    char *hex;
    bool found;
} loaded_search;

static int check_loaded(struct dl_phdr_info *info, size_t size, void *user) {
    (void)size;
    loaded_search *search = user;
    if (info->dlpi_addr != search->base) return 0;
    for (size_t i = 0; i < info->dlpi_phnum && !search->found; i++) {
        const ElfW(Phdr) *segment = &info->dlpi_phdr[i];
        if (segment->p_type != PT_NOTE) continue;
        const unsigned char *notes = (const unsigned char *)(info->dlpi_addr + segment->p_vaddr);
        search->found = find_build_id(notes, segment->p_memsz, segment->p_align, search->hex);
    }
    return 1;
}

perk_status perk_library_build_id(const perk_library *library, char hex[PERK_BUILD_ID_SIZE], perk_error *err) {
    struct link_map *map = NULL;
    hex[0] = '\0';
    if (dlinfo(library->handle, RTLD_DI_LINKMAP, &map) == 0 && map) {
        loaded_search search = {.base = map->l_addr, .hex = hex};
        dl_iterate_phdr(check_loaded, &search);
        if (search.found) return PERK_OK;
    }
    return perk_fail(err, PERK_NOT_FOUND, "%s: the loaded library has no GNU build-id", library->path);
}

/* ---- one file ----------------------------------------------------------------------------------- */

/* Why this file must not be used; NULL when it may. */
static const char *reason_against(const char *path) {
    char *real = realpath(path, NULL);
    if (!real) return strerror(errno);
    bool stub = strstr(real, "/stubs/") != NULL;
    free(real);
    if (stub) return "a stub for linking, not the library";
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return strerror(errno);
    Elf64_Ehdr header;
    bool native = read_native_header(fd, &header);
    close(fd);
    return native ? NULL : "not a 64-bit shared library for this processor";
}

/* dlopen of a path or a bare name; NULL on success, else the reason. */
static const char *load(perk_library *out, const char *name) {
    struct link_map *map = NULL;
    out->handle = dlopen(name, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (!out->handle) {
        const char *reason = dlerror();
        return reason ? reason : "unknown loader error";
    }
    const char *path = dlinfo(out->handle, RTLD_DI_LINKMAP, &map) == 0 && map && map->l_name[0] ? map->l_name : name;
    const char *against = strchr(path, '/') ? reason_against(path) : NULL;
    if (!against) {
        snprintf(out->path, sizeof out->path, "%s", path);
        return NULL;
    }
    perk_library_close(out);
    return against;
}

void perk_library_close(perk_library *library) {
    if (library->handle) dlclose(library->handle);
    *library = (perk_library){0};
}

bool perk_library_symbol(const perk_library *library, const char *symbol, void *slot) {
    void *address = dlsym(library->handle, symbol);
    memcpy(slot, &address, sizeof address); /* ISO C has no cast from an object to a function pointer */
    return address != NULL;
}

/* ---- the search --------------------------------------------------------------------------------- */

typedef struct search {
    const perk_library_spec *spec;
    const char *name; /* the soname being looked for, one of the spec's (at most two, as messages say) */
    bool load;        /* open what is found, or only find it */
    perk_library found;
    char places[MAX_REPORT], failures[MAX_REPORT]; /* for the error message */
} search;

/* Appends an item to a report; what does not fit becomes "...". */
static void report(char text[MAX_REPORT], const char *separator, const char *item, const char *reason) {
    size_t used = strlen(text), left = MAX_REPORT - used;
    if (used >= 3 && strcmp(text + used - 3, "...") == 0) return;
    int length =
        snprintf(text + used, left, "%s%s%s%s", used ? separator : "", item, reason ? ": " : "", reason ? reason : "");
    if (length < 0 || (size_t)length + 8 < left) return;
    snprintf(text + PERK_MIN(used, (size_t)MAX_REPORT - 8), 8, "%s...", separator);
}

/* Each of the functions below returns true when the search has succeeded. */

static bool try_file(search *s, const char *path) {
    if (access(path, F_OK) != 0) return false;
    const char *reason = reason_against(path);
    if (!reason && s->load) reason = load(&s->found, path);
    if (reason)
        report(s->failures, "\n  ", path, reason);
    else
        snprintf(s->found.path, sizeof s->found.path, "%s", path);
    return !reason;
}

static bool try_folder(search *s, const char *folder) {
    char path[PERK_LIBRARY_PATH_SIZE];
    int length = snprintf(path, sizeof path, "%s/%s", folder, s->name);
    return length > 0 && (size_t)length < sizeof path && try_file(s, path);
}

/* Each place once, although several ways lead there and every name is looked for in all. */
static void note_place(search *s, const char *place) {
    size_t length = strlen(place);
    for (const char *at = s->places; (at = strstr(at, place)); at += length) {
        bool starts = at == s->places || at[-1] == ' ', ends = at[length] == '\0' || at[length] == ',';
        if ((starts && ends) || length == 0) return;
    }
    report(s->places, ", ", place, NULL);
}

static int newest_first(const void *left, const void *right) {
    return strverscmp(*(char *const *)right, *(char *const *)left);
}

/* All folders that match a pattern, highest version first. */
static bool try_pattern(search *s, const char *pattern) {
    glob_t matches = {0};
    bool done = false;
    note_place(s, pattern);
    if (glob(pattern, GLOB_NOSORT, NULL, &matches) == 0) {
        qsort(matches.gl_pathv, matches.gl_pathc, sizeof *matches.gl_pathv, newest_first);
        for (size_t i = 0; i < matches.gl_pathc && !done; i++) done = try_folder(s, matches.gl_pathv[i]);
    }
    globfree(&matches);
    return done;
}

static bool try_below(search *s, const char *root, const char *sub) {
    char pattern[PERK_LIBRARY_PATH_SIZE];
    int length = snprintf(pattern, sizeof pattern, "%s/%s", root, sub);
    return length > 0 && (size_t)length < sizeof pattern && try_pattern(s, pattern);
}

/* The folders that the loader would search for a dlopen of this program, as it tells itself. */
static bool try_program_folders(search *s) {
    Dl_serinfo size, *info = NULL;
    bool done = false;
    void *program = dlopen(NULL, RTLD_LAZY);
    if (!program) return false;
    if (dlinfo(program, RTLD_DI_SERINFOSIZE, &size) == 0) info = calloc(1, size.dls_size);
    if (info && dlinfo(program, RTLD_DI_SERINFOSIZE, info) == 0 && dlinfo(program, RTLD_DI_SERINFO, info) == 0) {
        for (unsigned i = 0; i < info->dls_cnt && !done; i++) {
            note_place(s, info->dls_serpath[i].dls_name);
            done = try_folder(s, info->dls_serpath[i].dls_name);
        }
    }
    free(info);
    dlclose(program);
    return done;
}

static bool try_loader_conf(search *s, const char *path, int depth);

static bool try_included_conf(search *s, const char *pattern, int depth) {
    glob_t matches = {0};
    bool done = false;
    if (depth < MAX_CONF_DEPTH && glob(pattern, 0, NULL, &matches) == 0)
        for (size_t i = 0; i < matches.gl_pathc && !done; i++)
            done = try_loader_conf(s, matches.gl_pathv[i], depth + 1);
    globfree(&matches);
    return done;
}

/* /etc/ld.so.conf rather than ld.so.cache: a text format that is documented and says the same. */
static bool try_loader_conf(search *s, const char *path, int depth) {
    char *text = NULL, *rest = NULL;
    size_t size;
    bool done = false;
    if (perk_read_file(path, MAX_LOADER_CONF, &text, &size, NULL) != PERK_OK) return false;
    for (char *line = strtok_r(text, "\n", &rest); line && !done; line = strtok_r(NULL, "\n", &rest)) {
        line[strcspn(line, "#")] = '\0';
        char *word_rest = NULL, *word = strtok_r(line, " \t,:", &word_rest);
        if (word && strcmp(word, "include") == 0) {
            while (!done && (word = strtok_r(NULL, " \t", &word_rest))) done = try_included_conf(s, word, depth);
        } else if (word && word[0] == '/') {
            note_place(s, word);
            done = try_folder(s, word);
        }
    }
    free(text);
    return done;
}

static bool try_toolkits(search *s) {
    static const char *const variables[] = {"CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX"};
    static const char *const roots[] = {"/usr/local/cuda", "/usr/local/cuda-[0-9]*", "/opt/cuda"};
    static const char *const subs[] = {"lib64", "lib", "targets/*/lib"};
    static const char *const others[] = {"/usr/lib/*-linux-gnu", "/usr/lib64", "/usr/lib/wsl/lib",
                                         "/run/opengl-driver/lib"};
    for (size_t i = 0; i < PERK_COUNT(variables); i++) {
        const char *root = secure_getenv(variables[i]);
        for (size_t j = 0; root && root[0] == '/' && j < PERK_COUNT(subs); j++)
            if (try_below(s, root, subs[j])) return true;
    }
    for (size_t i = 0; i < PERK_COUNT(roots); i++)
        for (size_t j = 0; j < PERK_COUNT(subs); j++)
            if (try_below(s, roots[i], subs[j])) return true;
    for (size_t i = 0; i < PERK_COUNT(others); i++)
        if (try_pattern(s, others[i])) return true;
    return false;
}

static bool try_site_packages(search *s, const char *root, const char *packages) {
    char folder[PERK_LIBRARY_PATH_SIZE];
    int length = snprintf(folder, sizeof folder, "%s/%s", root, packages);
    if (length < 0 || (size_t)length >= sizeof folder) return false;
    for (size_t i = 0; s->spec->pip_folders[i]; i++)
        if (try_below(s, folder, s->spec->pip_folders[i])) return true;
    return false;
}

static bool try_python(search *s) {
    static const struct {
        const char *variable, *packages;
    } homes[] = {{"VIRTUAL_ENV", "lib/python3*/site-packages"},
                 {"CONDA_PREFIX", "lib/python3*/site-packages"},
                 {"HOME", ".local/lib/python3*/site-packages"}};
    if (!s->spec->pip_folders) return false;
    for (size_t i = 0; i < PERK_COUNT(homes); i++) {
        const char *root = secure_getenv(homes[i].variable);
        if (root && root[0] == '/' && try_site_packages(s, root, homes[i].packages)) return true;
    }
    return try_site_packages(s, "/usr/local/lib", "python3*/site-packages") ||
           try_site_packages(s, "/usr/local/lib", "python3*/dist-packages") ||
           try_site_packages(s, "/usr/lib", "python3*/dist-packages");
}

static bool try_loader(search *s) {
    const char *reason = load(&s->found, s->name);
    if (reason) report(s->failures, "\n  ", "the loader", reason);
    return !reason;
}

static bool try_override(search *s, const char *path) {
    char local[PERK_LIBRARY_PATH_SIZE];
    bool bare = strchr(path, '/') == NULL; /* a file here, not a name for the loader */
    int length = snprintf(local, sizeof local, "%s%s", bare ? "./" : "", path);
    if (length > 0 && (size_t)length < sizeof local && access(local, F_OK) == 0) return try_file(s, local);
    report(s->failures, "\n  ", path, "no such file, or its path is too long");
    return false;
}

static perk_status run_search(search *s, perk_error *err) {
    const perk_library_spec *spec = s->spec;
    const char *override = secure_getenv(spec->override);
    if (override && override[0]) {
        if (try_override(s, override)) return PERK_OK;
        return perk_fail(err, spec->missing, "%s cannot be used: %s names it, so nothing else was tried:\n  %s\n%s",
                         spec->title, spec->override, s->failures, spec->advice);
    }
    for (size_t i = 0; spec->names[i]; i++) {
        s->name = spec->names[i];
        if (s->load && spec->ask_loader && try_loader(s)) return PERK_OK;
        if (try_program_folders(s) || try_loader_conf(s, "/etc/ld.so.conf", 0) || try_toolkits(s) || try_python(s))
            return PERK_OK;
    }
    const char *second = spec->names[1];
    return perk_fail(err, spec->missing, "%s not found. Tried:\n  %s%s%s%s%s in %s\n%s", spec->title, s->failures,
                     s->failures[0] ? "\n  " : "", spec->names[0], second ? " and " : "", second ? second : "",
                     s->places, spec->advice);
}

perk_status perk_library_find(const perk_library_spec *spec, char path[PERK_LIBRARY_PATH_SIZE], perk_error *err) {
    search s = {.spec = spec};
    perk_status status = run_search(&s, err);
    memcpy(path, s.found.path, PERK_LIBRARY_PATH_SIZE);
    return status;
}

perk_status perk_library_open(perk_library *out, const perk_library_spec *spec, perk_error *err) {
    search s = {.spec = spec, .load = true};
    perk_status status = run_search(&s, err);
    *out = s.found;
    return status;
}

perk_status perk_library_open_path(perk_library *out, const perk_library_spec *spec, const char *path,
                                   perk_error *err) {
    *out = (perk_library){0};
    const char *reason = load(out, path);
    if (!reason) {
        snprintf(out->path, sizeof out->path, "%s", path); /* the loader may know the same file by another name */
        return PERK_OK;
    }
    return perk_fail(err, spec->missing, "%s cannot be opened: %s: %s\n%s", spec->title, path, reason, spec->advice);
}
