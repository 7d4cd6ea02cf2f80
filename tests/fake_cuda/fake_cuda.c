#include "fake_cuda.h"

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "driver.h"
#include "fake_emulate.h"
#include "fake_stamps.h"
#include "kernels_src/abi.h"

/* cuda.h renames some calls; here every one of them gets the name that perk asks for. */
#define EXPORT_CALL(name, symbol, required)                                                                            \
    extern __typeof__(name) name __asm__(symbol) __attribute__((visibility("default")));
PERK_DRIVER_FUNCTIONS(EXPORT_CALL)
#undef EXPORT_CALL
#define EXPORT __attribute__((visibility("default")))

typedef enum object_kind { DEVICE_MEMORY, PINNED_MEMORY, MODULE, STREAM, EVENT } object_kind;

enum { FUNCTIONS = 8 };

/* A kernel of a module. Its handle is its address. */
typedef struct kernel_function {
    char name[64];
    fake_emulate_entry *entry; /* NULL: computes nothing */
} kernel_function;

/* Anything that a caller must give back. Its handle is its address; memory has one of its own. */
typedef struct object {
    struct object *next;
    object_kind kind;
    char *data;
    size_t bytes;
    void *opened; /* a module's library for the CPU, or NULL */
    kernel_function functions[FUNCTIONS];
} object;

enum { MAX_DEPTH = 16, POISON = 0xa5, POISON_LIMIT = 1 << 14 };

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static fake_cuda state;
static object *objects;
static char primary; /* its address is the context */
static int retained;
static bool busy; /* work was started since the last wait */
static _Thread_local CUcontext stack[MAX_DEPTH];
static _Thread_local int depth;

/* A launch of many steps, which the host talks to while it runs: on a thread. Whatever would wait for it does. */
static struct {
    pthread_mutex_t waiting;
    pthread_t thread;
    bool runs, done; /* runs: and nobody has waited for it yet; done: atomic */
    fake_emulate_entry *entry;
    unsigned grid, block, shared, seed;
    perk_kernel_args args;
} background = {.waiting = PTHREAD_MUTEX_INITIALIZER};

static void *run_background(void *unused) {
    void *params[] = {&background.args};
    background.entry(background.grid, background.block, background.shared, params, true, background.seed);
    __atomic_store_n(&background.done, true, __ATOMIC_RELEASE);
    return unused;
}

static void wait_for_background(const char *function) {
    static const char *const never_wait[] = {"cuStreamQuery", "cuCtxPushCurrent", "cuCtxPopCurrent"};
    for (size_t i = 0; i < sizeof never_wait / sizeof never_wait[0]; i++)
        if (strcmp(function, never_wait[i]) == 0) return;
    pthread_mutex_lock(&background.waiting);
    if (background.runs) pthread_join(background.thread, NULL);
    background.runs = false;
    pthread_mutex_unlock(&background.waiting);
}

/* ---- the test's side ---- */

EXPORT CUcontext fake_cuda_current(void) { return depth ? stack[depth - 1] : NULL; }

EXPORT void fake_cuda_make_current(CUcontext context) {
    depth = context ? 1 : 0;
    stack[0] = context;
}

EXPORT void fake_cuda_reset(void) {
    const char *workers = getenv("FAKE_CUDA_SMS"), *seed = getenv("EMULATOR_SEED");
    state = (fake_cuda){.device = {.driver_version = 13000,
                                   .count = 1,
                                   .cc_major = 9,
                                   .sm_count = workers ? atoi(workers) : 132,
                                   .shared_bytes = 227 * 1024,
                                   .cooperative = true,
                                   .fits_sm = true,
                                   .memory = (size_t)80 << 30},
                        .seed = seed ? (unsigned)atoi(seed) * 1000000u : 0};
    busy = false;
}

__attribute__((constructor)) static void load(void) { fake_cuda_reset(); }

EXPORT fake_cuda *fake_cuda_state(void) { return &state; }

/* ---- every call begins here ---- */

static void note_misuse(const char *function, const char *what) {
    if (state.misuse) return;
    state.misuse = what;
    state.misused_in = function;
}

static bool strikes(const char *function) {
    static long matching;
    if (state.calls == 1) matching = 0;
    if (state.fault.call == 0) return false;
    if (state.failed && state.fault.lasting) return true;
    if (state.fault.function && strcmp(state.fault.function, function) != 0) return false;
    long number = state.fault.function ? ++matching : state.calls;
    return number == state.fault.call;
}

static CUresult begin(const char *function, bool needs_context) {
    CUresult result = CUDA_SUCCESS;
    wait_for_background(function);
    pthread_mutex_lock(&mutex);
    state.calls++;
    if (strikes(function)) {
        result = state.fault.result;
        if (!state.failed) state.failed_call = state.calls;
        if (!state.failed) state.failed = function;
    } else if (needs_context && (fake_cuda_current() != (CUcontext)(void *)&primary || retained == 0)) {
        note_misuse(function, "perk's context is not current");
        result = CUDA_ERROR_INVALID_CONTEXT;
    }
    pthread_mutex_unlock(&mutex);
    return result;
}

/* `name` must not be expanded on its way, or it would be cuda.h's. */
#define BEGIN(name)                                                                                                    \
    CUresult result = begin(#name, true);                                                                              \
    if (result != CUDA_SUCCESS) return result;
#define BEGIN_WITHOUT_CONTEXT(name)                                                                                    \
    CUresult result = begin(#name, false);                                                                             \
    if (result != CUDA_SUCCESS) return result;

/* ---- objects ---- */

static long *live_count(object_kind kind) {
    switch (kind) {
    case DEVICE_MEMORY: return &state.live.memory;
    case PINNED_MEMORY: return &state.live.pinned;
    case MODULE: return &state.live.modules;
    case STREAM: return &state.live.streams;
    case EVENT: break;
    }
    return &state.live.events;
}

static object *make(object_kind kind, size_t bytes) {
    object *made = calloc(1, sizeof *made);
    if (!made) return NULL;
    made->kind = kind;
    made->bytes = bytes;
    made->data = bytes ? malloc(bytes) : NULL;
    if (bytes && !made->data) {
        free(made);
        return NULL;
    }
    if (bytes) memset(made->data, POISON, bytes < POISON_LIMIT ? bytes : POISON_LIMIT);
    if (kind == DEVICE_MEMORY) state.memory_used += bytes;
    ++*live_count(kind);
    made->next = objects;
    objects = made;
    return made;
}

static void drop(object **link) {
    object *gone = *link;
    if (gone->opened) fake_emulate_close(gone->opened);
    *link = gone->next;
    --*live_count(gone->kind);
    if (gone->kind == DEVICE_MEMORY) state.memory_used -= gone->bytes;
    free(gone->data);
    free(gone);
}

static object **find(object_kind kind, const void *handle) {
    for (object **link = &objects; *link; link = &(*link)->next)
        if ((*link)->kind == kind && ((const void *)*link == handle || (handle && (*link)->data == handle)))
            return link;
    return NULL;
}

static CUresult release(const char *function, object_kind kind, const void *handle) {
    CUresult result = begin(function, true);
    object **link = find(kind, handle);
    if (!link) {
        note_misuse(function, "there is no such object");
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (busy && (kind == PINNED_MEMORY || kind == MODULE)) note_misuse(function, "work that uses it may be under way");
    drop(link);
    return result;
}

static CUresult check(const char *function, object_kind kind, const void *handle) {
    if (find(kind, handle)) return CUDA_SUCCESS;
    note_misuse(function, "there is no such object");
    return CUDA_ERROR_INVALID_HANDLE;
}

/* Host address of a range that lies in one allocation. */
static char *range(const char *function, CUdeviceptr address, size_t bytes) {
    for (const object *o = objects; o; o = o->next) {
        uintptr_t from = (uintptr_t)o->data;
        if (o->kind == DEVICE_MEMORY && address >= from && address - from <= o->bytes &&
            bytes <= o->bytes - (address - from))
            return o->data + (address - from);
    }
    note_misuse(function, "the range lies in no allocation");
    return NULL;
}

static CUresult copy(void *to, const void *from, size_t bytes) {
    if (!to || !from) return CUDA_ERROR_INVALID_VALUE;
    memmove(to, from, bytes);
    return CUDA_SUCCESS;
}

/* ---- the driver and its devices ---- */

CUresult cuDriverGetVersion(int *version) {
    BEGIN_WITHOUT_CONTEXT(cuDriverGetVersion)
    *version = state.device.driver_version;
    return CUDA_SUCCESS;
}

CUresult cuInit(unsigned flags) {
    (void)flags;
    BEGIN_WITHOUT_CONTEXT(cuInit)
    return state.device.count ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE;
}

/* Not counted: what perk asks after a fault must not move the fault. */
CUresult cuGetErrorName(CUresult error, const char **name) {
    static _Thread_local char text[32];
    snprintf(text, sizeof text, "FAKE_ERROR_%d", (int)error);
    *name = text;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    (void)error;
    *text = "as the test asked";
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
    BEGIN_WITHOUT_CONTEXT(cuDeviceGetCount)
    *count = state.device.count;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    BEGIN_WITHOUT_CONTEXT(cuDeviceGet)
    *device = ordinal;
    return ordinal < state.device.count ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
    (void)device;
    BEGIN_WITHOUT_CONTEXT(cuDeviceGetName)
    snprintf(name, (size_t)size, "Fake GPU");
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
    (void)device;
    BEGIN_WITHOUT_CONTEXT(cuDeviceGetAttribute)
    const fake_device *d = &state.device;
    switch ((int)which) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = d->cc_major; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = d->cc_minor; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = d->sm_count; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = d->shared_bytes; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = d->shared_bytes + 1024; break;
    case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH: *value = d->cooperative; break;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: *value = 50 << 20; break;
    default: *value = 0;
    }
    return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem(size_t *bytes, CUdevice device) {
    (void)device;
    BEGIN_WITHOUT_CONTEXT(cuDeviceTotalMem)
    *bytes = state.device.memory;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice device) {
    (void)device;
    BEGIN_WITHOUT_CONTEXT(cuDeviceGetUuid)
    memset(uuid, 7, sizeof *uuid);
    return CUDA_SUCCESS;
}

/* ---- the context ---- */

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    (void)device;
    BEGIN_WITHOUT_CONTEXT(cuDevicePrimaryCtxRetain)
    retained++;
    state.live.contexts++;
    *context = (CUcontext)(void *)&primary;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
    (void)device;
    CUresult result = begin("cuDevicePrimaryCtxRelease", false);
    if (retained == 0) {
        note_misuse("cuDevicePrimaryCtxRelease", "it was released before");
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    state.live.contexts--;
    if (--retained == 0)
        for (; objects; state.swept++) drop(&objects);
    return result;
}

CUresult cuCtxPushCurrent(CUcontext context) {
    BEGIN_WITHOUT_CONTEXT(cuCtxPushCurrent)
    if (depth == MAX_DEPTH) {
        note_misuse("cuCtxPushCurrent", "the stack of contexts only grows");
        return CUDA_ERROR_UNKNOWN;
    }
    stack[depth++] = context;
    return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(CUcontext *context) {
    CUresult result = begin("cuCtxPopCurrent", false);
    if (depth == 0) {
        note_misuse("cuCtxPopCurrent", "no context is current");
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    depth--;
    if (context) *context = stack[depth];
    return result;
}

CUresult cuCtxSynchronize(void) {
    busy = false;
    BEGIN(cuCtxSynchronize)
    return CUDA_SUCCESS;
}

/* ---- memory ---- */

CUresult cuMemAlloc(CUdeviceptr *address, size_t bytes) {
    BEGIN(cuMemAlloc)
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    if (bytes > state.device.memory - state.memory_used) return CUDA_ERROR_OUT_OF_MEMORY;
    object *made = make(DEVICE_MEMORY, bytes);
    if (!made) return CUDA_ERROR_OUT_OF_MEMORY;
    *address = (CUdeviceptr)(uintptr_t)made->data;
    return CUDA_SUCCESS;
}

CUresult cuMemFree(CUdeviceptr address) { return release("cuMemFree", DEVICE_MEMORY, (void *)(uintptr_t)address); }

CUresult cuMemGetInfo(size_t *available, size_t *total) {
    BEGIN(cuMemGetInfo)
    *total = state.device.memory;
    *available = state.device.memory - state.memory_used;
    return CUDA_SUCCESS;
}

CUresult cuMemHostAlloc(void **address, size_t bytes, unsigned flags) {
    (void)flags;
    BEGIN(cuMemHostAlloc)
    object *made = bytes ? make(PINNED_MEMORY, bytes) : NULL;
    if (!made) return CUDA_ERROR_OUT_OF_MEMORY;
    *address = made->data;
    return CUDA_SUCCESS;
}

CUresult cuMemFreeHost(void *address) { return release("cuMemFreeHost", PINNED_MEMORY, address); }

CUresult cuMemHostGetDevicePointer(CUdeviceptr *address, void *host, unsigned flags) {
    (void)flags;
    BEGIN(cuMemHostGetDevicePointer)
    *address = (CUdeviceptr)(uintptr_t)host;
    return check("cuMemHostGetDevicePointer", PINNED_MEMORY, host);
}

CUresult cuMemcpyHtoD(CUdeviceptr to, const void *from, size_t bytes) {
    BEGIN(cuMemcpyHtoD)
    return copy(range("cuMemcpyHtoD", to, bytes), from, bytes);
}

CUresult cuMemcpyDtoH(void *to, CUdeviceptr from, size_t bytes) {
    BEGIN(cuMemcpyDtoH)
    return copy(to, range("cuMemcpyDtoH", from, bytes), bytes);
}

CUresult cuMemcpyDtoD(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    BEGIN(cuMemcpyDtoD)
    return copy(range("cuMemcpyDtoD", to, bytes), range("cuMemcpyDtoD", from, bytes), bytes);
}

CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t bytes, CUstream stream) {
    BEGIN(cuMemcpyHtoDAsync)
    busy = true;
    result = check("cuMemcpyHtoDAsync", STREAM, stream);
    return result ? result : copy(range("cuMemcpyHtoDAsync", to, bytes), from, bytes);
}

CUresult cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t bytes, CUstream stream) {
    BEGIN(cuMemcpyDtoHAsync)
    busy = true;
    result = check("cuMemcpyDtoHAsync", STREAM, stream);
    return result ? result : copy(to, range("cuMemcpyDtoHAsync", from, bytes), bytes);
}

CUresult cuMemsetD8(CUdeviceptr at, unsigned char value, size_t bytes) {
    BEGIN(cuMemsetD8)
    char *to = range("cuMemsetD8", at, bytes);
    if (to) memset(to, value, bytes);
    return to ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemsetD8Async(CUdeviceptr at, unsigned char value, size_t bytes, CUstream stream) {
    BEGIN(cuMemsetD8Async)
    busy = true;
    result = check("cuMemsetD8Async", STREAM, stream);
    char *to = range("cuMemsetD8Async", at, bytes);
    if (to) memset(to, value, bytes);
    return to ? result : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemsetD32(CUdeviceptr at, unsigned value, size_t count) {
    BEGIN(cuMemsetD32)
    char *to = range("cuMemsetD32", at, count * 4);
    for (size_t i = 0; to && i < count; i++) memcpy(to + 4 * i, &value, 4);
    return to ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

/* ---- modules and launches ---- */

static kernel_function *find_function(const char *caller, CUfunction handle) {
    for (object *o = objects; o; o = o->next)
        for (int i = 0; o->kind == MODULE && i < FUNCTIONS; i++)
            if ((void *)handle == (void *)&o->functions[i]) return &o->functions[i];
    note_misuse(caller, "there is no such function");
    return NULL;
}

static CUresult check_function(const char *caller, CUfunction handle) {
    return find_function(caller, handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    BEGIN(cuModuleLoadData)
    if (!image || memcmp(image, "\177ELF", 4) != 0) return CUDA_ERROR_INVALID_IMAGE;
    if (state.made_by_fake && !fake_nvrtc_is_whole(image)) note_misuse("cuModuleLoadData", "a changed or foreign file");
    object *made = make(MODULE, 0);
    *module = (CUmodule)(void *)made;
    if (!made) return CUDA_ERROR_OUT_OF_MEMORY;
    size_t size = 0;
    const void *library = fake_nvrtc_state()->emulates ? fake_nvrtc_library(image, &size) : NULL;
    if (library) made->opened = fake_emulate_open(library, size);
    return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return release("cuModuleUnload", MODULE, module); }

CUresult cuModuleGetFunction(CUfunction *handle, CUmodule module, const char *name) {
    BEGIN(cuModuleGetFunction)
    object **link = find(MODULE, module);
    result = check("cuModuleGetFunction", MODULE, module);
    if (!link) return result;
    kernel_function *f = (*link)->functions;
    while (f->name[0] && strcmp(f->name, name) != 0) f++;
    snprintf(f->name, sizeof f->name, "%s", name);
    if ((*link)->opened) f->entry = fake_emulate_find((*link)->opened, name);
    *handle = (CUfunction)(void *)f;
    return (*link)->opened && !f->entry ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}

CUresult cuModuleGetGlobal(CUdeviceptr *address, size_t *bytes, CUmodule module, const char *name) {
    (void)address, (void)bytes, (void)module, (void)name;
    BEGIN(cuModuleGetGlobal)
    return CUDA_ERROR_NOT_FOUND;
}

CUresult cuFuncSetAttribute(CUfunction kernel, CUfunction_attribute which, int value) {
    (void)which;
    BEGIN(cuFuncSetAttribute)
    return value <= state.device.shared_bytes ? check_function("cuFuncSetAttribute", kernel) : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction kernel) {
    (void)which;
    BEGIN(cuFuncGetAttribute)
    *value = 0;
    return check_function("cuFuncGetAttribute", kernel);
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction kernel, int threads, size_t shared) {
    (void)threads, (void)shared;
    BEGIN(cuOccupancyMaxActiveBlocksPerMultiprocessor)
    *blocks = state.device.fits_sm;
    return check_function("cuOccupancyMaxActiveBlocksPerMultiprocessor", kernel);
}

typedef struct shape {
    unsigned grid, block, shared;
    bool cooperative;
} shape;

static CUresult launch_background(fake_emulate_entry *entry, shape s, const void *args) {
    background.entry = entry;
    background.grid = s.grid, background.block = s.block, background.shared = s.shared;
    background.seed = state.seed + (unsigned)state.launches;
    memcpy(&background.args, args, sizeof background.args);
    __atomic_store_n(&background.done, false, __ATOMIC_RELEASE);
    background.runs = pthread_create(&background.thread, NULL, run_background, NULL) == 0;
    return background.runs ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

static CUresult launch(const char *caller, CUfunction kernel, CUstream stream, shape s, void **params) {
    state.launches++;
    busy = true;
    const kernel_function *f = find_function(caller, kernel);
    CUresult result = f ? check(caller, STREAM, stream) : CUDA_ERROR_INVALID_HANDLE;
    if (!s.grid || !s.block || s.block > 1024) return CUDA_ERROR_INVALID_VALUE;
    if (result == CUDA_SUCCESS && f->entry && s.cooperative && ((const perk_kernel_args *)params[0])->many.post)
        return launch_background(f->entry, s, params[0]);
    if (result == CUDA_SUCCESS && f->entry)
        f->entry(s.grid, s.block, s.shared, params, s.cooperative, state.seed + (unsigned)state.launches);
    return result;
}

CUresult cuLaunchKernel(CUfunction kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **params,
                        void **extra) {
    (void)extra;
    BEGIN(cuLaunchKernel)
    const shape s = {grid_x * grid_y * grid_z, block_x * block_y * block_z, shared, false};
    return launch("cuLaunchKernel", kernel, stream, s, params);
}

/* What the kernel does when a wait exceeds its limit: it leaves the report, and the launch ends like any other. */
static void report_hang(perk_hang_report *hang) {
    *hang = (perk_hang_report){
        .worker = 3, .position = 2, .role = PERK_ROLE_COUNTER, .counter = 1, .seen = 4, .wanted = 5, .complete = 1};
}

/* Only a profiled program has room for them. */
static void leave_stamps(const perk_kernel_args *args, unsigned workers) {
    object **records = find(DEVICE_MEMORY, args->tasks), **stamps = find(DEVICE_MEMORY, args->stamps);
    if (!records || !stamps) return;
    size_t count = (*records)->bytes / sizeof *args->tasks;
    if ((*stamps)->bytes >= count * PERK_STAMPS * sizeof *args->stamps)
        fake_stamps_fill(args, workers, count / workers);
}

CUresult cuLaunchCooperativeKernel(CUfunction kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                                   CUstream stream, void **params) {
    BEGIN(cuLaunchCooperativeKernel)
    const shape s = {grid_x * grid_y * grid_z, block_x * block_y * block_z, shared, true};
    if (state.hang) report_hang(((const perk_kernel_args *)params[0])->hang);
    if (s.grid > (unsigned)state.device.sm_count) return CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE;
    const kernel_function *f = find_function("cuLaunchCooperativeKernel", kernel);
    if (f && !f->entry) leave_stamps((const perk_kernel_args *)params[0], s.grid);
    return launch("cuLaunchCooperativeKernel", kernel, stream, s, params);
}

/* ---- streams and events ---- */

CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
    (void)flags;
    BEGIN(cuStreamCreate)
    *stream = (CUstream)(void *)make(STREAM, 0);
    return *stream ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuStreamDestroy(CUstream stream) { return release("cuStreamDestroy", STREAM, stream); }

CUresult cuStreamSynchronize(CUstream stream) {
    busy = false;
    BEGIN(cuStreamSynchronize)
    return check("cuStreamSynchronize", STREAM, stream);
}

CUresult cuStreamQuery(CUstream stream) {
    BEGIN(cuStreamQuery)
    if (background.runs && !__atomic_load_n(&background.done, __ATOMIC_ACQUIRE)) return CUDA_ERROR_NOT_READY;
    return check("cuStreamQuery", STREAM, stream);
}

CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
    (void)flags;
    BEGIN(cuStreamWaitEvent)
    result = check("cuStreamWaitEvent", STREAM, stream);
    return result ? result : check("cuStreamWaitEvent", EVENT, event);
}

CUresult cuEventCreate(CUevent *event, unsigned flags) {
    (void)flags;
    BEGIN(cuEventCreate)
    *event = (CUevent)(void *)make(EVENT, 0);
    return *event ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuEventDestroy(CUevent event) { return release("cuEventDestroy", EVENT, event); }

CUresult cuEventRecord(CUevent event, CUstream stream) {
    BEGIN(cuEventRecord)
    result = check("cuEventRecord", EVENT, event);
    return result ? result : check("cuEventRecord", STREAM, stream);
}

CUresult cuEventSynchronize(CUevent event) {
    BEGIN(cuEventSynchronize)
    return check("cuEventSynchronize", EVENT, event);
}

CUresult cuEventQuery(CUevent event) {
    BEGIN(cuEventQuery)
    return check("cuEventQuery", EVENT, event);
}

CUresult cuEventElapsedTime(float *milliseconds, CUevent from, CUevent to) {
    BEGIN(cuEventElapsedTime)
    *milliseconds = 1.0f;
    result = check("cuEventElapsedTime", EVENT, from);
    return result ? result : check("cuEventElapsedTime", EVENT, to);
}
