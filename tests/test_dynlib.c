/* Where run-time libraries are looked for, which file is taken, and what is said when there is none; the driver table
 * against a libcuda made for the test. */
#include "jit/nvrtc.h"
#include "src/driver.h"
#include "src/nccl.h"
#include "test.h"

#include <dlfcn.h>
#include <link.h>
#include <math.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *const NAMES[] = {"libperktest.so.2", "libperktest.so.1", NULL};
static const char *const PIP[] = {"nvidia/perktest/lib", NULL};
static const perk_library_spec SPEC = {.title = "the test library",
                                       .override = "PERK_LIBTEST",
                                       .names = NAMES,
                                       .pip_folders = PIP,
                                       .missing = PERK_NOT_FOUND,
                                       .advice = "Install it."};

static char root[] = "/tmp/perk-dynlib-XXXXXX";
static char real_library[PERK_LIBRARY_PATH_SIZE]; /* some shared library of this system: libm */

static const char *in_root(const char *path) {
    static char full[4][PERK_LIBRARY_PATH_SIZE];
    static unsigned turn;
    char *text = full[turn++ % 4];
    snprintf(text, PERK_LIBRARY_PATH_SIZE, "%s/%s", root, path);
    return text;
}

static void make_folders_of(const char *path) {
    char folder[PERK_LIBRARY_PATH_SIZE];
    snprintf(folder, sizeof folder, "%s", path);
    for (char *slash = strchr(folder + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        mkdir(folder, 0700);
        *slash = '/';
    }
}

static const char *link_library(const char *path) {
    const char *full = in_root(path);
    make_folders_of(full);
    CHECK(symlink(real_library, full) == 0, "%s", full);
    return full;
}

static void write_file(const char *path, const void *data, size_t size) {
    make_folders_of(path);
    FILE *file = fopen(path, "wb");
    CHECK(file && fwrite(data, 1, size, file) == size && fclose(file) == 0, "%s", path);
}

static void find_real_library(void) {
    struct link_map *map = NULL;
    void *handle = dlopen("libm.so.6", RTLD_LAZY);
    CHECK(handle && dlinfo(handle, RTLD_DI_LINKMAP, &map) == 0);
    CHECK(realpath(map->l_name, real_library) != NULL);
    dlclose(handle);
}

static void clear_environment(void) {
    static const char *const names[] = {"CUDA_HOME",    "CUDA_PATH",     "CONDA_PREFIX", "VIRTUAL_ENV",
                                        "PERK_LIBTEST", "PERK_LIBNVRTC", "PERK_LIBCUDA", "PERK_LIBNCCL"};
    for (size_t i = 0; i < PERK_COUNT(names); i++) unsetenv(names[i]);
    setenv("HOME", root, 1);
}

static void expect_found(const char *expected) {
    perk_error err = {0};
    char path[PERK_LIBRARY_PATH_SIZE];
    CHECK_OK(perk_library_find(&SPEC, path, &err));
    CHECK(strcmp(path, expected) == 0, "%s, not %s", path, expected);
    perk_library library;
    CHECK_OK(perk_library_open(&library, &SPEC, &err));
    CHECK(strcmp(library.path, expected) == 0, "%s, not %s", library.path, expected);
    perk_library_close(&library);
}

static void test_missing(void) {
    perk_error err;
    char path[PERK_LIBRARY_PATH_SIZE];
    clear_environment();
    setenv("VIRTUAL_ENV", in_root("venv"), 1);
    CHECK_FAILS(perk_library_find(&SPEC, path, &err), PERK_NOT_FOUND, "libperktest.so.2 and libperktest.so.1 in ");
    CHECK(path[0] == '\0');
    CHECK(strstr(err.message, "/usr/lib") && strstr(err.message, "Install it."), "%s", err.message);
    setenv("PERK_LIBTEST", in_root("nowhere.so"), 1);
    CHECK_FAILS(perk_library_find(&SPEC, path, &err), PERK_NOT_FOUND, "nowhere.so");
    CHECK(strstr(err.message, "nothing else was tried") != NULL, "%s", err.message);
}

/* From the last place to the first, so that each step must prefer the new file. */
static void test_order(void) {
    clear_environment();
    expect_found(link_library(".local/lib/python3.9/site-packages/nvidia/perktest/lib/libperktest.so.1"));
    setenv("VIRTUAL_ENV", in_root("venv"), 1);
    expect_found(link_library("venv/lib/python3.11/site-packages/nvidia/perktest/lib/libperktest.so.1"));
    setenv("CUDA_HOME", in_root("toolkit"), 1);
    expect_found(link_library("toolkit/lib/libperktest.so.1"));
    expect_found(link_library("toolkit/lib64/libperktest.so.1"));
    expect_found(link_library(".local/lib/python3.9/site-packages/nvidia/perktest/lib/libperktest.so.2"));
    expect_found(link_library("toolkit/targets/x86_64-linux/lib/libperktest.so.2"));
    const char *chosen = link_library("elsewhere/any-name.so");
    setenv("PERK_LIBTEST", chosen, 1);
    expect_found(chosen);
}

static void test_unusable_files_are_passed_over(void) {
    perk_error err;
    char path[PERK_LIBRARY_PATH_SIZE];
    clear_environment();
    write_file(in_root("broken/lib64/libperktest.so.2"), "INPUT(libperktest.so.1)\n", 24);
    setenv("CUDA_HOME", in_root("broken"), 1);
    expect_found(in_root(".local/lib/python3.9/site-packages/nvidia/perktest/lib/libperktest.so.2"));
    setenv("HOME", in_root("nobody"), 1);
    CHECK_FAILS(perk_library_find(&SPEC, path, &err), PERK_NOT_FOUND,
                "broken/lib64/libperktest.so.2: not a 64-bit shared library");

    char bytes[64 * 1024]; /* a loadable copy in a folder for stubs, and a link to it from a proper place */
    FILE *file = fopen(real_library, "rb");
    size_t size = file ? fread(bytes, 1, sizeof bytes, file) : 0;
    CHECK(size > 1024 && fclose(file) == 0);
    write_file(in_root("stubs/libperktest.so"), bytes, size);
    CHECK(mkdir(in_root("linked"), 0700) == 0 && mkdir(in_root("linked/lib"), 0700) == 0);
    CHECK(symlink(in_root("stubs/libperktest.so"), in_root("linked/lib/libperktest.so.2")) == 0);
    setenv("CUDA_HOME", in_root("linked"), 1);
    CHECK_FAILS(perk_library_find(&SPEC, path, &err), PERK_NOT_FOUND, "a stub for linking");
    setenv("PERK_LIBTEST", in_root("stubs/libperktest.so"), 1);
    CHECK_FAILS(perk_library_find(&SPEC, path, &err), PERK_NOT_FOUND, "a stub for linking");
}

/* LD_LIBRARY_PATH counts as the loader read it when the process started, hence another process. */
static void test_loader_path(const char *self) {
    clear_environment();
    const char *expected = link_library("loader/libperktest.so.2");
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        setenv("LD_LIBRARY_PATH", in_root("loader"), 1);
        execl(self, self, "expect", expected, (char *)NULL);
        _exit(127);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void test_build_id(void) {
    perk_error err = {0};
    char of_file[PERK_BUILD_ID_SIZE], of_loaded[PERK_BUILD_ID_SIZE];
    clear_environment();
    perk_library library;
    CHECK_OK(perk_library_open_path(&library, &SPEC, real_library, &err));
    CHECK_OK(perk_file_build_id(real_library, of_file, &err));
    CHECK_OK(perk_library_build_id(&library, of_loaded, &err));
    CHECK(strlen(of_file) >= 16 && strcmp(of_file, of_loaded) == 0, "%s %s", of_file, of_loaded);
    double (*cosine)(double) = NULL;
    CHECK(perk_library_symbol(&library, "cos", &cosine) && fabs(cosine(0.0) - 1.0) < 1e-12);
    CHECK(!perk_library_symbol(&library, "no_such_symbol", &cosine) && cosine == NULL);
    perk_library_close(&library);
    CHECK_FAILS(perk_file_build_id(in_root("nothing"), of_file, &err), PERK_NOT_FOUND, "nothing");
    CHECK_FAILS(perk_file_build_id(in_root("broken/lib64/libperktest.so.2"), of_file, &err), PERK_BAD_FORMAT, "not a");
}

/* Cut at every length and with every byte changed: an answer or an error, nothing worse. */
static void test_damaged_elf(void) {
    unsigned char bytes[2048];
    char hex[PERK_BUILD_ID_SIZE];
    FILE *file = fopen(real_library, "rb");
    CHECK(file && fread(bytes, 1, sizeof bytes, file) == sizeof bytes && fclose(file) == 0);
    char path[PERK_LIBRARY_PATH_SIZE];
    snprintf(path, sizeof path, "%s", in_root("damaged.so"));
    write_file(path, bytes, sizeof bytes);
    for (size_t size = sizeof bytes; size-- > 0;) {
        CHECK(truncate(path, (off_t)size) == 0);
        perk_status status = perk_file_build_id(path, hex, NULL);
        CHECK(size >= 64 || status == PERK_BAD_FORMAT, "%zu", size);
    }
    file = fopen(path, "wb");
    CHECK(file && fwrite(bytes, 1, sizeof bytes, file) == sizeof bytes && fflush(file) == 0);
    for (size_t at = 0; at < 1024; at++) {
        unsigned char changed = (unsigned char)~bytes[at];
        CHECK(pwrite(fileno(file), &changed, 1, (off_t)at) == 1);
        perk_status status = perk_file_build_id(path, hex, NULL);
        CHECK(status == PERK_OK || status == PERK_BAD_FORMAT || status == PERK_NOT_FOUND);
        CHECK(pwrite(fileno(file), &bytes[at], 1, (off_t)at) == 1);
    }
    fclose(file);
}

static void test_absent_libraries(void) {
    perk_error err;
    perk_driver *driver;
    perk_nvrtc_identity identity;
    perk_nvrtc *nvrtc;
    perk_nccl_info nccl;
    clear_environment();
    setenv("PERK_LIBCUDA", "/nonexistent/libcuda.so.1", 1);
    CHECK_FAILS(perk_driver_open(&driver, &err), PERK_NO_DRIVER, "/nonexistent/libcuda.so.1");
    CHECK(driver == NULL);
    setenv("PERK_LIBCUDA", real_library, 1);
    CHECK_FAILS(perk_driver_open(&driver, &err), PERK_NO_DRIVER, "does not tell its version");
    setenv("PERK_LIBNVRTC", "/nonexistent/libnvrtc.so", 1);
    CHECK_FAILS(perk_nvrtc_identify(0, &identity, &err), PERK_NO_COMPILER, "/nonexistent/libnvrtc.so");
    CHECK(!identity.found && strcmp(identity.build_id, PERK_NVRTC_ANY) == 0);
    CHECK_FAILS(perk_nvrtc_open(&nvrtc, NULL, &err), PERK_NO_COMPILER, "PERK_LIBNVRTC");
    CHECK(nvrtc == NULL);
    setenv("PERK_LIBNVRTC", real_library, 1);
    CHECK_FAILS(perk_nvrtc_open(&nvrtc, NULL, &err), PERK_NO_COMPILER, "lacks nvrtc");
    setenv("PERK_LIBNCCL", "/nonexistent/libnccl.so", 1);
    CHECK_FAILS(perk_nccl_probe(&nccl, &err), PERK_NOT_FOUND, "/nonexistent/libnccl.so");
    setenv("PERK_LIBNCCL", real_library, 1);
    CHECK_FAILS(perk_nccl_probe(&nccl, &err), PERK_NOT_FOUND, "no NCCL");
}

/* An older driver may refuse what a newer NVRTC makes, so the NVRTC of its own version goes first. */
static void test_nvrtc_follows_the_driver(void) {
    perk_error err = {0};
    perk_nvrtc_identity identity;
    clear_environment();
    link_library("two/lib64/libnvrtc.so.12");
    link_library("two/lib64/libnvrtc.so.13");
    setenv("CUDA_HOME", in_root("two"), 1);
    CHECK_OK(perk_nvrtc_identify(12080, &identity, &err));
    CHECK(identity.found && strstr(identity.path, "libnvrtc.so.12"), "%s", identity.path);
    CHECK_OK(perk_nvrtc_identify(13000, &identity, &err));
    CHECK(strstr(identity.path, "libnvrtc.so.13"), "%s", identity.path);
    CHECK_OK(perk_nvrtc_identify(0, &identity, &err));
    CHECK(strstr(identity.path, "libnvrtc.so.13"), "%s", identity.path);
}

/* ---- a libcuda of our own ----------------------------------------------------------------------- */

/* Every function of the table answers 0; these few do more. */
static const char FAKE[] =
    "int cuDriverGetVersion(int *v) { *v = VERSION; return 0; }\n"
    "int cuInit(unsigned f) { return f ? 1 : INIT; }\n"
    "int cuDeviceGetCount(int *n) { *n = 2; return 0; }\n"
    "int cuDeviceGet(int *d, int i) { *d = i + 40; return 0; }\n"
    "int cuDeviceGetName(char *n, int s, int d) { n[0] = 'F'; n[1] = '\\0'; return s > 2 && d >= 40 ? 0 : 1; }\n"
    "int cuDeviceTotalMem_v2(unsigned long *n, int d) { *n = 80ul << 30; return d >= 40 ? 0 : 101; }\n"
    "int cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 9 : a == 76 ? 0 : a + 1000; return d < 40; }\n"
    "int cuGetErrorName(int e, const char **s) { *s = e == 2 ? \"CUDA_ERROR_OUT_OF_MEMORY\" : \"OTHER\"; return 0; }\n"
    "int cuGetErrorString(int e, const char **s) { *s = e ? \"some text\" : \"\"; return 0; }\n";

static bool build_fake(const char *path, int version, int init, const char *skip) {
    char source[PERK_LIBRARY_PATH_SIZE], command[4 * PERK_LIBRARY_PATH_SIZE];
    snprintf(source, sizeof source, "%s", in_root("fake.c"));
    FILE *file = fopen(source, "w");
    CHECK(file);
    fprintf(file, "#define VERSION %d\n#define INIT %d\n%s", version, init, FAKE);
#define FAKE_FUNCTION(name, symbol, required)                                                                          \
    if (!strstr(FAKE, "int " symbol "(") && strcmp(symbol, skip) != 0)                                                 \
        fprintf(file, "int %s(void) { return 0; }\n", symbol);
    PERK_DRIVER_FUNCTIONS(FAKE_FUNCTION)
#undef FAKE_FUNCTION
    CHECK(fclose(file) == 0);
    snprintf(command, sizeof command, "cc -w -shared -fPIC -o %s %s", path, source);
    if (system(command) != 0) return false;
    setenv("PERK_LIBCUDA", path, 1);
    return true;
}

static void check_fake_device(const perk_driver *driver) {
    perk_error err = {0};
    perk_device_info info;
    CHECK_OK(perk_driver_device_info(driver, 1, &info, &err));
    CHECK(info.device == 41 && strcmp(info.name, "F") == 0 && info.cc_major == 9 && info.cc_minor == 0);
    CHECK(info.total_memory == (size_t)80 << 30 && info.cooperative_launch && info.driver_version == 12080);
    CHECK(info.sm_count == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT + 1000);
    CHECK_FAILS(perk_driver_device_info(driver, 2, &info, &err), PERK_NO_DEVICE, "no GPU 2");
    CHECK_FAILS(perk_driver_device_info(driver, -1, &info, &err), PERK_NO_DEVICE, "no GPU -1");
    CHECK_OK(perk_driver_check(driver, CUDA_SUCCESS, &err, "nothing"));
    CHECK_FAILS(perk_driver_check(driver, CUDA_ERROR_OUT_OF_MEMORY, &err, "allocating %d bytes", 7), PERK_DEVICE_MEMORY,
                "allocating 7 bytes: the driver says CUDA_ERROR_OUT_OF_MEMORY (2): some text");
    CHECK_FAILS(perk_driver_check(driver, CUDA_ERROR_ILLEGAL_ADDRESS, &err, "running"), PERK_DRIVER, "running");
}

static void test_fake_driver(void) {
    perk_error err = {0};
    perk_driver *driver;
    clear_environment();
    if (!build_fake(in_root("fake-good.so"), 12080, 0, "cuDeviceGetUuid_v2")) {
        fprintf(stderr, "no cc: the driver table was not tested against a libcuda made here\n");
        return;
    }
    CHECK_OK(perk_driver_open(&driver, &err));
    CHECK(driver->version == 12080 && driver->cuDeviceGetUuid == NULL && driver->cuMemAlloc != NULL);
    check_fake_device(driver);
    perk_driver_free(driver);
    CHECK(build_fake(in_root("fake-old.so"), 11040, 0, ""));
    CHECK_FAILS(perk_driver_open(&driver, &err), PERK_NO_DRIVER, "supports CUDA 11.4, perk needs 12.0");
    CHECK(build_fake(in_root("fake-none.so"), 13000, 100, ""));
    CHECK_FAILS(perk_driver_open(&driver, &err), PERK_NO_DEVICE, "sees no GPU");
    CHECK(build_fake(in_root("fake-mismatch.so"), 13000, 803, ""));
    CHECK_FAILS(perk_driver_open(&driver, &err), PERK_NO_DRIVER, "(803)");
}

/* A driver that lacks any one call is opened without it, or refused by the name of what it lacks. */
static void test_missing_symbols(void) {
    static const struct {
        const char *name;
        bool required;
    } symbols[] = {
#define SYMBOL_ROW(name, symbol, required) {symbol, required},
        PERK_DRIVER_FUNCTIONS(SYMBOL_ROW)
#undef SYMBOL_ROW
    };
    perk_error err = {0};
    perk_driver *driver;
    char name[64], text[96];
    for (size_t i = 0; i < PERK_COUNT(symbols); i++) {
        if (strstr(FAKE, symbols[i].name)) continue; /* always there */
        snprintf(name, sizeof name, "fake-lacks-%zu.so", i);
        if (!build_fake(in_root(name), 13000, 0, symbols[i].name)) return; /* no cc */
        if (symbols[i].required) {
            snprintf(text, sizeof text, "lacks %s", symbols[i].name);
            CHECK_FAILS(perk_driver_open(&driver, &err), PERK_NO_DRIVER, text);
            CHECK(driver == NULL);
        } else {
            CHECK_OK(perk_driver_open(&driver, &err));
            perk_driver_free(driver);
        }
    }
}

int main(int argc, char **argv) {
    if (argc == 3 && strcmp(argv[1], "expect") == 0) {
        expect_found(argv[2]);
        return 0;
    }
    char self[PERK_LIBRARY_PATH_SIZE] = "";
    CHECK(readlink("/proc/self/exe", self, sizeof self - 1) > 0 && mkdtemp(root));
    find_real_library();
    test_missing();
    test_order();
    test_unusable_files_are_passed_over();
    test_loader_path(self);
    test_build_id();
    test_damaged_elf();
    test_absent_libraries();
    test_nvrtc_follows_the_driver();
    test_fake_driver();
    test_missing_symbols();
    char command[64];
    snprintf(command, sizeof command, "rm -rf %s", root);
    return system(command) == 0 ? 0 : 1;
}
