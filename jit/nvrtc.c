#include "jit/nvrtc.h"

#include <ctype.h>
#include <glob.h>
#include <stdio.h>
#include <sys/stat.h>

static const char *const NEWEST_FIRST[] = {"libnvrtc.so.13", "libnvrtc.so.12", NULL};
static const char *const TWELVE_FIRST[] = {"libnvrtc.so.12", "libnvrtc.so.13", NULL};
static const char *const PIP_FOLDERS[] = {"nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib", NULL};

static perk_library_spec nvrtc_spec(int driver_version) {
    bool old_driver = driver_version > 0 && driver_version < 13000;
    return (perk_library_spec){
        .title = "NVRTC, the run-time compiler of CUDA",
        .override = "PERK_LIBNVRTC",
        .names = old_driver ? TWELVE_FIRST : NEWEST_FIRST,
        .pip_folders = PIP_FOLDERS,
        .missing = PERK_NO_COMPILER,
        .advice = "Install a CUDA toolkit 12 or 13 or the pip package nvidia-cuda-nvrtc, or set PERK_LIBNVRTC to the "
                  "path of libnvrtc.so; with a cubin cache that holds this program none is needed.",
    };
}

/* ---- identity ----------------------------------------------------------------------------------- */

/* "libnvrtc.so.13.0.88" -> "13.0.88"; a library that is called libnvrtc.so.13 is told apart by its neighbour. */
static void guess_version(perk_nvrtc_identity *identity) {
    char *real = realpath(identity->path, NULL);
    if (!real) return;
    char *base = strrchr(real, '/') + 1;
    const char *suffix = strstr(base, ".so.");
    const char *version = suffix ? suffix + strlen(".so.") : "";
    snprintf(identity->version, sizeof identity->version, "%.20s", version);
    if (version[0] && !strchr(version, '.')) {
        char pattern[PERK_LIBRARY_PATH_SIZE];
        glob_t matches = {0};
        int length = snprintf(pattern, sizeof pattern, "%.*s/libnvrtc-builtins.so.%s.*[0-9]", (int)(base - 1 - real),
                              real, version);
        bool fits = length > 0 && (size_t)length < sizeof pattern;
        if (fits && glob(pattern, 0, NULL, &matches) == 0 && matches.gl_pathc == 1) {
            const char *neighbour = strstr(strrchr(matches.gl_pathv[0], '/'), ".so.") + strlen(".so.");
            snprintf(identity->version, sizeof identity->version, "%.20s", neighbour);
        }
        globfree(&matches);
    }
    free(real);
}

/* A library without a build-id is told apart by size and time: a changed time costs a compile, never a wrong hit. */
static perk_status identify_by_file(perk_nvrtc_identity *identity, perk_error *err) {
    struct stat info;
    if (stat(identity->path, &info) != 0) return perk_fail(err, PERK_NO_COMPILER, "%s: cannot be read", identity->path);
    snprintf(identity->build_id, sizeof identity->build_id, "file-%llx-%llx.%lx", (unsigned long long)info.st_size,
             (unsigned long long)info.st_mtim.tv_sec, (unsigned long)info.st_mtim.tv_nsec);
    return PERK_OK;
}

perk_status perk_nvrtc_identify(int driver_version, perk_nvrtc_identity *out, perk_error *err) {
    perk_library_spec spec = nvrtc_spec(driver_version);
    *out = (perk_nvrtc_identity){0};
    perk_status status = perk_library_find(&spec, out->path, err);
    if (status == PERK_OK && perk_file_build_id(out->path, out->build_id, NULL) != PERK_OK)
        status = identify_by_file(out, err);
    if (status == PERK_OK) {
        out->found = true;
        guess_version(out);
    } else {
        *out = (perk_nvrtc_identity){.build_id = PERK_NVRTC_ANY};
    }
    return status;
}

/* ---- opening ------------------------------------------------------------------------------------ */

static perk_status load_functions(perk_nvrtc *nvrtc, perk_error *err) {
    const char *missing = NULL;
#define LOAD_FUNCTION(name)                                                                                            \
    if (!perk_library_symbol(&nvrtc->library, #name, &nvrtc->name)) missing = #name;
    PERK_NVRTC_FUNCTIONS(LOAD_FUNCTION)
#undef LOAD_FUNCTION
    if (!missing) return PERK_OK;
    return perk_fail(err, PERK_NO_COMPILER, "%s: lacks %s, so it is no NVRTC 12 or newer; set PERK_LIBNVRTC to one",
                     nvrtc->library.path, missing);
}

static perk_status check_build(const perk_nvrtc *nvrtc, perk_error *err) {
    char loaded[PERK_BUILD_ID_SIZE];
    if (perk_library_build_id(&nvrtc->library, loaded, NULL) != PERK_OK) return PERK_OK; /* told apart by its file */
    if (strcmp(loaded, nvrtc->identity.build_id) == 0) return PERK_OK;
    return perk_fail(err, PERK_NO_COMPILER,
                     "%s: the NVRTC on disk (build %s) is not the one in this process (build %s): it was exchanged "
                     "while the process ran; restart the process",
                     nvrtc->identity.path, nvrtc->identity.build_id, loaded);
}

/* NVRTC opens its builtins by bare name on the first compile, which finds them only in the loader's folders. One that
 * is already loaded is taken, so the neighbour of a library from elsewhere is loaded here. Its absence is no error yet:
 * the loader may still find it. */
static void open_builtins(perk_nvrtc *nvrtc) {
    char *real = realpath(nvrtc->library.path, NULL);
    char path[PERK_LIBRARY_PATH_SIZE];
    if (!real) return;
    char *slash = strrchr(real, '/');
    int length = snprintf(path, sizeof path, "%.*s/libnvrtc-builtins%s.so.%d.%d", (int)(slash - real), real,
                          strstr(slash, ".alt.") ? ".alt" : "", nvrtc->major, nvrtc->minor);
    perk_library_spec spec = nvrtc_spec(0);
    if (length > 0 && (size_t)length < sizeof path) perk_library_open_path(&nvrtc->builtins, &spec, path, NULL);
    free(real);
}

static perk_status query(perk_nvrtc *nvrtc, perk_error *err) {
    int count = 0;
    if (nvrtc->nvrtcVersion(&nvrtc->major, &nvrtc->minor) != NVRTC_SUCCESS || nvrtc->major < 12)
        return perk_fail(err, PERK_NO_COMPILER, "%s: NVRTC %d.%d is too old: 12.0 or newer is needed",
                         nvrtc->library.path, nvrtc->major, nvrtc->minor);
    if (nvrtc->nvrtcGetNumSupportedArchs(&count) != NVRTC_SUCCESS || count < 1 ||
        (size_t)count > PERK_COUNT(nvrtc->archs) || nvrtc->nvrtcGetSupportedArchs(nvrtc->archs) != NVRTC_SUCCESS)
        return perk_fail(err, PERK_NO_COMPILER, "%s: does not say which GPUs it compiles for", nvrtc->library.path);
    nvrtc->arch_count = (size_t)count;
    snprintf(nvrtc->identity.version, sizeof nvrtc->identity.version, "%d.%d", nvrtc->major, nvrtc->minor);
    return PERK_OK;
}

perk_status perk_nvrtc_open(perk_nvrtc **out, const perk_nvrtc_identity *identity, perk_error *err) {
    *out = NULL;
    perk_nvrtc *nvrtc = perk_calloc(1, sizeof *nvrtc);
    if (!nvrtc) return perk_fail_memory(err, "NVRTC");
    perk_library_spec spec = nvrtc_spec(0);
    perk_status status = PERK_OK;
    if (identity && identity->found)
        nvrtc->identity = *identity;
    else
        status = perk_nvrtc_identify(0, &nvrtc->identity, err);
    if (status == PERK_OK) status = perk_library_open_path(&nvrtc->library, &spec, nvrtc->identity.path, err);
    if (status == PERK_OK) status = load_functions(nvrtc, err);
    if (status == PERK_OK) status = check_build(nvrtc, err);
    if (status == PERK_OK) status = query(nvrtc, err);
    if (status != PERK_OK) {
        perk_nvrtc_free(nvrtc);
        return status;
    }
    open_builtins(nvrtc);
    *out = nvrtc;
    return PERK_OK;
}

void perk_nvrtc_free(perk_nvrtc *nvrtc) {
    if (!nvrtc) return;
    perk_library_close(&nvrtc->builtins);
    perk_library_close(&nvrtc->library);
    free(nvrtc);
}

/* ---- architectures ------------------------------------------------------------------------------ */

/* "sm_90a" -> 90; 0 when it is not of that form. */
static int capability_of(const char *arch) {
    int value = 0;
    if (strncmp(arch, "sm_", 3) != 0) return 0;
    for (arch += 3; isdigit((unsigned char)*arch) && value < 1000; arch++) value = value * 10 + (*arch - '0');
    if (*arch == 'a' || *arch == 'f') arch++;
    return *arch ? 0 : value;
}

perk_status perk_nvrtc_check_arch(const perk_nvrtc *nvrtc, const char *arch, perk_error *err) {
    int wanted = arch ? capability_of(arch) : 0;
    if (wanted == 0)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "'%s' is not an architecture; write sm_80 or sm_90a",
                         arch ? arch : "");
    char list[256] = "";
    for (size_t i = 0, used = 0; i < nvrtc->arch_count; i++) {
        if (nvrtc->archs[i] == wanted) return PERK_OK;
        if (used < sizeof list) used += (size_t)snprintf(list + used, sizeof list - used, " %d", nvrtc->archs[i]);
    }
    return perk_fail(err, PERK_UNSUPPORTED,
                     "NVRTC %d.%d (%s) does not compile for %s; it knows the capabilities%s. Another version can be "
                     "chosen with PERK_LIBNVRTC",
                     nvrtc->major, nvrtc->minor, nvrtc->identity.path, arch, list);
}
