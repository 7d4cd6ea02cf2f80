#include "fake_emulate.h"
#include "fake_cuda.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "jit/emit.h"

extern char **environ;

enum { PATH_BYTES = 512 };

/* Which kernels a source has: those of the file that it includes, or a model's program. */
static const struct {
    const char *mark, *kernels[4];
} contents[] = {
    {"#include \"pack.cuh\"", {"perk_pack_tiles", "perk_pack_rows", "perk_fill_rope"}},
    {"#include \"sync.cuh\"", {"perk_sync"}},
    {PERK_KERNEL_NAME "(", {PERK_KERNEL_NAME}},
};

static bool put_text(const char *folder, const char *name, const char *text, size_t size) {
    char path[PATH_BYTES];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "wb");
    bool written = file && fwrite(text, 1, size, file) == size;
    return file && fclose(file) == 0 && written;
}

/* One edit; frees `text`. An edit that changes nothing ends the process: its test would show nothing. */
static char *edit_text(char *text, const fake_edit *edit) {
    char *whole = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&whole, &size);
    const char *at = text;
    for (const char *hit; out && (hit = strstr(at, edit->from)); at = hit + strlen(edit->from))
        fprintf(out, "%.*s%s", (int)(hit - at), at, edit->to);
    if (out) fputs(at, out);
    if (out) fclose(out);
    if (at == text) _exit(FAKE_EDIT_MISSES);
    free(text);
    return whole;
}

static bool put_header(const char *folder, const fake_source *s, int index) {
    const char *name = s->header_names[index];
    if (strcmp(name, "ptx.cuh") == 0) return true; /* the emulator has its own */
    char *text = strdup(s->headers[index]);
    for (int i = 0; i < FAKE_EDITS && text; i++)
        if (s->edits[i].file && strcmp(s->edits[i].file, name) == 0) text = edit_text(text, &s->edits[i]);
    bool done = text && put_text(folder, name, text, strlen(text));
    free(text);
    return done;
}

static bool put_source(const char *folder, const fake_source *s) {
    char *whole = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&whole, &size);
    if (!out) return false;
    fprintf(out, "%s\n", s->text);
    if (strstr(s->text, "#include \"worker.cuh\"") || strstr(s->text, "#include \"sync.cuh\""))
        fputs("EMULATE_FLAGS(perk::SharedMap::given_up, perk::SharedMap::barriers);\n", out);
    for (size_t i = 0; i < sizeof contents / sizeof contents[0]; i++)
        for (int k = 0; strstr(s->text, contents[i].mark) && k < 4 && contents[i].kernels[k]; k++)
            fprintf(out, "EMULATE(%s)\n", contents[i].kernels[k]);
    bool done = fclose(out) == 0 && put_text(folder, "program.cpp", whole, size);
    free(whole);
    for (int i = 0; i < s->header_count && done; i++) done = put_header(folder, s, i);
    return done;
}

static void *read_whole(const char *folder, const char *name, size_t *size) {
    char path[PATH_BYTES];
    struct stat info;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    char *data = NULL;
    if (fd >= 0 && fstat(fd, &info) == 0 && (data = malloc((size_t)info.st_size + 1))) {
        ssize_t got = read(fd, data, (size_t)info.st_size);
        *size = got > 0 ? (size_t)got : 0;
        data[*size] = '\0';
    }
    if (fd >= 0) close(fd);
    return data;
}

static bool run_compiler(const char *folder, int capability) {
    char arch[64], include[PATH_BYTES], source[PATH_BYTES], library[PATH_BYTES], log[PATH_BYTES];
    char *arguments[] = {EMULATOR_CXX,
                         "-std=c++17",
                         "-O2",
                         "-g",
                         "-fPIC",
                         "-shared",
                         "-w",
                         arch,
                         "-include",
                         EMULATOR_FOLDER "/emulator.h",
                         "-I" EMULATOR_FOLDER,
                         include,
                         "-o",
                         library,
                         source,
                         NULL};
    snprintf(arch, sizeof arch, "-D__CUDA_ARCH__=%d", capability * 10);
    snprintf(include, sizeof include, "-I%s", folder);
    snprintf(source, sizeof source, "%s/program.cpp", folder);
    snprintf(library, sizeof library, "%s/program.so", folder);
    snprintf(log, sizeof log, "%s/log", folder);
    posix_spawn_file_actions_t actions;
    pid_t child;
    int status = -1;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, log, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (posix_spawnp(&child, EMULATOR_CXX, &actions, NULL, arguments, environ) == 0) waitpid(child, &status, 0);
    posix_spawn_file_actions_destroy(&actions);
    return status == 0;
}

static void remove_folder(const char *folder, const fake_source *s) {
    static const char *const own[] = {"program.cpp", "program.so", "log"};
    char path[PATH_BYTES];
    for (size_t i = 0; i < sizeof own / sizeof own[0]; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, own[i]);
        unlink(path);
    }
    for (int i = 0; i < s->header_count; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, s->header_names[i]);
        unlink(path);
    }
    rmdir(folder);
}

bool fake_emulate_compile(const fake_source *source, void **library, size_t *size, char *log, size_t log_size) {
    char folder[] = "/tmp/perk-emulate-XXXXXX";
    *library = NULL;
    if (!mkdtemp(folder)) return false;
    if (put_source(folder, source) && run_compiler(folder, source->capability))
        *library = read_whole(folder, "program.so", size);
    size_t said_size = 0;
    char *said = *library ? NULL : read_whole(folder, "log", &said_size);
    snprintf(log, log_size, "%s",
             *library ? "ptxas info: 0 bytes stack frame, 0 bytes spill stores\n"
             : said   ? said
                      : "no compiler");
    free(said);
    remove_folder(folder, source);
    if (!*library && source->edits[0].file) _exit(FAKE_EDIT_MISSES); /* what no compiler takes shows nothing */
    return *library != NULL;
}

/* Under a name of its own, since the loader knows an opened library by its name. */
void *fake_emulate_open(const void *library, size_t size) {
    char path[] = "/tmp/perk-emulated-XXXXXX";
    int fd = mkstemp(path);
    if (fd < 0) return NULL;
    void *opened = write(fd, library, size) == (ssize_t)size ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
    if (!opened) fprintf(stderr, "the emulated program cannot be opened: %s\n", dlerror());
    close(fd);
    unlink(path);
    return opened;
}

fake_emulate_entry *fake_emulate_find(void *opened, const char *kernel) {
    char name[128];
    fake_emulate_entry *entry;
    snprintf(name, sizeof name, "emulate_%s", kernel);
    *(void **)&entry = dlsym(opened, name);
    return entry;
}

void fake_emulate_close(void *opened) { dlclose(opened); }
