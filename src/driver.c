#include "driver.h"

#include <stdarg.h>
#include <stdio.h>

static const char *const NAMES[] = {"libcuda.so.1", NULL};

static const perk_library_spec DRIVER_SPEC = {
    .title = "the NVIDIA driver's libcuda",
    .override = "PERK_LIBCUDA",
    .names = NAMES,
    .missing = PERK_NO_DRIVER,
    .advice = "Install the NVIDIA driver (525 or newer), run a container with its GPUs enabled, or set PERK_LIBCUDA to "
              "the path of libcuda.so.1.",
    .ask_loader = true,
};

static const char *error_name(const perk_driver *driver, CUresult result) {
    const char *name = NULL;
    return driver->cuGetErrorName(result, &name) == CUDA_SUCCESS && name ? name : "an unknown error";
}

static const char *error_text(const perk_driver *driver, CUresult result) {
    const char *text = NULL;
    return driver->cuGetErrorString(result, &text) == CUDA_SUCCESS && text ? text : "no description";
}

perk_status perk_driver_check(const perk_driver *driver, CUresult result, perk_error *err, const char *doing, ...) {
    if (result == CUDA_SUCCESS) return PERK_OK;
    char what[512];
    va_list args;
    va_start(args, doing);
    vsnprintf(what, sizeof what, doing, args);
    va_end(args);
    perk_status status = result == CUDA_ERROR_OUT_OF_MEMORY ? PERK_DEVICE_MEMORY : PERK_DRIVER;
    return perk_fail(err, status, "%s: the driver says %s (%d): %s", what, error_name(driver, result), (int)result,
                     error_text(driver, result));
}

/* ---- opening ------------------------------------------------------------------------------------ */

static perk_status load_functions(perk_driver *driver, perk_error *err) {
    const char *missing = NULL;
#define LOAD_FUNCTION(name, symbol, required)                                                                          \
    if (!perk_library_symbol(&driver->library, symbol, &driver->name) && (required) && !missing) missing = symbol;
    PERK_DRIVER_FUNCTIONS(LOAD_FUNCTION)
#undef LOAD_FUNCTION
    if (!missing) return PERK_OK;
    return perk_fail(err, PERK_NO_DRIVER, "%s: lacks %s, so it is no libcuda of CUDA 12 or newer; update the driver",
                     driver->library.path, missing);
}

/* Before the other functions are asked for: an old driver should be called old, not incomplete. */
static perk_status check_version(perk_driver *driver, perk_error *err) {
    if (!perk_library_symbol(&driver->library, "cuDriverGetVersion", &driver->cuDriverGetVersion) ||
        driver->cuDriverGetVersion(&driver->version) != CUDA_SUCCESS)
        return perk_fail(err, PERK_NO_DRIVER, "%s: does not tell its version, so it is no usable libcuda",
                         driver->library.path);
    if (driver->version >= PERK_DRIVER_OLDEST) return PERK_OK;
    return perk_fail(err, PERK_NO_DRIVER,
                     "%s: the driver supports CUDA %d.%d, perk needs %d.%d or newer; update the NVIDIA driver (525 or "
                     "newer)",
                     driver->library.path, driver->version / 1000, driver->version % 1000 / 10,
                     PERK_DRIVER_OLDEST / 1000, PERK_DRIVER_OLDEST % 1000 / 10);
}

static perk_status initialise(const perk_driver *driver, perk_error *err) {
    CUresult result = driver->cuInit(0);
    if (result == CUDA_SUCCESS) return PERK_OK;
    if (result == CUDA_ERROR_NO_DEVICE) {
        const char *visible = secure_getenv("CUDA_VISIBLE_DEVICES");
        return perk_fail(err, PERK_NO_DEVICE, "%s: the driver sees no GPU (CUDA_VISIBLE_DEVICES is %s%s%s)",
                         driver->library.path, visible ? "'" : "not set", visible ? visible : "", visible ? "'" : "");
    }
    return perk_fail(err, PERK_NO_DRIVER,
                     "%s: the driver does not start: %s (%d): %s. nvidia-smi shows whether its kernel module is loaded "
                     "and of the same version",
                     driver->library.path, error_name(driver, result), (int)result, error_text(driver, result));
}

perk_status perk_driver_open(perk_driver **out, perk_error *err) {
    *out = NULL;
    perk_driver *driver = perk_calloc(1, sizeof *driver);
    if (!driver) return perk_fail_memory(err, "the driver's table");
    perk_status status = perk_library_open(&driver->library, &DRIVER_SPEC, err);
    if (status == PERK_OK) status = check_version(driver, err);
    if (status == PERK_OK) status = load_functions(driver, err);
    if (status == PERK_OK) status = initialise(driver, err);
    if (status != PERK_OK) {
        perk_driver_free(driver);
        return status;
    }
    *out = driver;
    return PERK_OK;
}

void perk_driver_free(perk_driver *driver) {
    if (!driver) return;
    perk_library_close(&driver->library);
    free(driver);
}

/* ---- devices ------------------------------------------------------------------------------------ */

perk_status perk_driver_device_count(const perk_driver *driver, int *count, perk_error *err) {
    *count = 0;
    return perk_driver_check(driver, driver->cuDeviceGetCount(count), err, "counting the GPUs");
}

/* 0 for what this driver does not know. */
static int attribute(const perk_driver *driver, CUdevice device, CUdevice_attribute which) {
    int value = 0;
    return driver->cuDeviceGetAttribute(&value, which, device) == CUDA_SUCCESS && value > 0 ? value : 0;
}

/* What perk needs to know: here a failure is one. */
static perk_status read_needed(const perk_driver *driver, perk_device_info *info, perk_error *err) {
    int shared = 0, cooperative = 0;
    const struct {
        CUdevice_attribute which;
        int *value;
        const char *what;
    } needed[] = {
        {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, &info->cc_major, "compute capability"},
        {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, &info->cc_minor, "compute capability"},
        {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, &info->sm_count, "number of SMs"},
        {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, &shared, "shared memory"},
        {CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH, &cooperative, "cooperative launches"},
    };
    for (size_t i = 0; i < PERK_COUNT(needed); i++) {
        CUresult result = driver->cuDeviceGetAttribute(needed[i].value, needed[i].which, info->device);
        perk_status status =
            perk_driver_check(driver, result, err, "asking GPU %d for its %s", info->ordinal, needed[i].what);
        if (status != PERK_OK) return status;
    }
    info->shared_per_block_optin = (size_t)PERK_MAX(shared, 0);
    info->cooperative_launch = cooperative != 0;
    if (info->cc_major > 0 && info->sm_count > 0) return PERK_OK;
    return perk_fail(err, PERK_DRIVER, "GPU %d (%s): the driver does not tell its capability or size", info->ordinal,
                     info->name);
}

static void read_rest(const perk_driver *driver, perk_device_info *info) {
    CUdevice device = info->device;
    CUuuid uuid = {{0}};
    if (driver->cuDeviceGetUuid && driver->cuDeviceGetUuid(&uuid, device) == CUDA_SUCCESS)
        memcpy(info->uuid, uuid.bytes, sizeof info->uuid);
    info->shared_per_sm = (size_t)attribute(driver, device, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR);
    info->l2_bytes = (size_t)attribute(driver, device, CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
    info->memory_clock_khz = attribute(driver, device, CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE);
    info->memory_bus_bits = attribute(driver, device, CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH);
}

perk_status perk_driver_device_info(const perk_driver *driver, int ordinal, perk_device_info *info, perk_error *err) {
    *info = (perk_device_info){.ordinal = ordinal, .driver_version = driver->version};
    int count;
    perk_status status = perk_driver_device_count(driver, &count, err);
    if (status != PERK_OK) return status;
    if (ordinal < 0 || ordinal >= count)
        return perk_fail(err, PERK_NO_DEVICE, "there is no GPU %d: the driver sees %d, counted from 0", ordinal, count);
    status = perk_driver_check(driver, driver->cuDeviceGet(&info->device, ordinal), err, "opening GPU %d", ordinal);
    if (status != PERK_OK) return status;
    CUresult named = driver->cuDeviceGetName(info->name, (int)sizeof info->name, info->device);
    status = perk_driver_check(driver, named, err, "asking GPU %d for its name", ordinal);
    if (status != PERK_OK) return status;
    CUresult sized = driver->cuDeviceTotalMem(&info->total_memory, info->device);
    status = perk_driver_check(driver, sized, err, "asking GPU %d for its memory", ordinal);
    if (status != PERK_OK) return status;
    status = read_needed(driver, info, err);
    if (status == PERK_OK) read_rest(driver, info);
    return status;
}
