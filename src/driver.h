/* The CUDA driver, opened at run time: its functions, its errors, its devices. All of perk calls the driver through
 * this table, so that the same binary runs where there is no driver, and tests may put another library in its place. */
#ifndef PERK_SRC_DRIVER_H
#define PERK_SRC_DRIVER_H

#include "dynlib.h"

#include <cuda.h>

/* Field, symbol in the library, whether perk needs it. Fields have the types that cuda.h declares; symbols are spelled
 * out, because cuda.h renames some to versions that only newer drivers have, with the same parameters. */
#define PERK_DRIVER_FUNCTIONS(X)                                                                                       \
    X(cuDriverGetVersion, "cuDriverGetVersion", true)                                                                  \
    X(cuInit, "cuInit", true)                                                                                          \
    X(cuGetErrorName, "cuGetErrorName", true)                                                                          \
    X(cuGetErrorString, "cuGetErrorString", true)                                                                      \
    X(cuDeviceGetCount, "cuDeviceGetCount", true)                                                                      \
    X(cuDeviceGet, "cuDeviceGet", true)                                                                                \
    X(cuDeviceGetName, "cuDeviceGetName", true)                                                                        \
    X(cuDeviceGetAttribute, "cuDeviceGetAttribute", true)                                                              \
    X(cuDeviceTotalMem, "cuDeviceTotalMem_v2", true)                                                                   \
    X(cuDeviceGetUuid, "cuDeviceGetUuid_v2", false)                                                                    \
    X(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", true)                                                      \
    X(cuDevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2", true)                                                 \
    X(cuCtxPushCurrent, "cuCtxPushCurrent_v2", true)                                                                   \
    X(cuCtxPopCurrent, "cuCtxPopCurrent_v2", true)                                                                     \
    X(cuCtxSynchronize, "cuCtxSynchronize", true)                                                                      \
    X(cuMemAlloc, "cuMemAlloc_v2", true)                                                                               \
    X(cuMemFree, "cuMemFree_v2", true)                                                                                 \
    X(cuMemGetInfo, "cuMemGetInfo_v2", true)                                                                           \
    X(cuMemHostAlloc, "cuMemHostAlloc", true)                                                                          \
    X(cuMemFreeHost, "cuMemFreeHost", true)                                                                            \
    X(cuMemHostGetDevicePointer, "cuMemHostGetDevicePointer_v2", true)                                                 \
    X(cuMemcpyHtoD, "cuMemcpyHtoD_v2", true)                                                                           \
    X(cuMemcpyDtoH, "cuMemcpyDtoH_v2", true)                                                                           \
    X(cuMemcpyDtoD, "cuMemcpyDtoD_v2", true)                                                                           \
    X(cuMemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2", true)                                                                 \
    X(cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2", true)                                                                 \
    X(cuMemsetD8, "cuMemsetD8_v2", true)                                                                               \
    X(cuMemsetD8Async, "cuMemsetD8Async", true)                                                                        \
    X(cuMemsetD32, "cuMemsetD32_v2", true)                                                                             \
    X(cuModuleLoadData, "cuModuleLoadData", true)                                                                      \
    X(cuModuleUnload, "cuModuleUnload", true)                                                                          \
    X(cuModuleGetFunction, "cuModuleGetFunction", true)                                                                \
    X(cuModuleGetGlobal, "cuModuleGetGlobal_v2", true)                                                                 \
    X(cuFuncSetAttribute, "cuFuncSetAttribute", true)                                                                  \
    X(cuFuncGetAttribute, "cuFuncGetAttribute", true)                                                                  \
    X(cuOccupancyMaxActiveBlocksPerMultiprocessor, "cuOccupancyMaxActiveBlocksPerMultiprocessor", true)                \
    X(cuLaunchKernel, "cuLaunchKernel", true)                                                                          \
    X(cuLaunchCooperativeKernel, "cuLaunchCooperativeKernel", true)                                                    \
    X(cuStreamCreate, "cuStreamCreate", true)                                                                          \
    X(cuStreamDestroy, "cuStreamDestroy_v2", true)                                                                     \
    X(cuStreamSynchronize, "cuStreamSynchronize", true)                                                                \
    X(cuStreamQuery, "cuStreamQuery", true)                                                                            \
    X(cuStreamWaitEvent, "cuStreamWaitEvent", true)                                                                    \
    X(cuEventCreate, "cuEventCreate", true)                                                                            \
    X(cuEventDestroy, "cuEventDestroy_v2", true)                                                                       \
    X(cuEventRecord, "cuEventRecord", true)                                                                            \
    X(cuEventSynchronize, "cuEventSynchronize", true)                                                                  \
    X(cuEventQuery, "cuEventQuery", true)                                                                              \
    X(cuEventElapsedTime, "cuEventElapsedTime", true)

enum { PERK_DRIVER_OLDEST = 12000 }; /* as cuDriverGetVersion counts: 1000 * major + 10 * minor */

/* The open and initialised driver. Immutable after opening, so threads may share it. Include cuda.h through this header
 * wherever the fields are used: it renames some of them. */
typedef struct perk_driver {
    perk_library library;
    int version; /* of CUDA that the driver supports: 12080 */
#define PERK_DRIVER_FIELD(name, symbol, required) __typeof__(name) *name;
    PERK_DRIVER_FUNCTIONS(PERK_DRIVER_FIELD)
#undef PERK_DRIVER_FIELD
} perk_driver;

/* Opens libcuda, checks its version and initialises it. PERK_NO_DRIVER: there is none, it is too old, or it does not
 * work; PERK_NO_DEVICE: it works and sees no GPU. libcuda stays loaded after perk_driver_free. */
perk_status perk_driver_open(perk_driver **out, perk_error *err);
void perk_driver_free(perk_driver *driver);

/* PERK_OK for CUDA_SUCCESS. Otherwise PERK_DEVICE_MEMORY or PERK_DRIVER, and a message made of what was being done (the
 * printf arguments: "copying %zu bytes of weights") and the driver's name and text of the error. */
perk_status perk_driver_check(const perk_driver *driver, CUresult result, perk_error *err, const char *doing, ...)
    PERK_PRINTF(4, 5);

typedef struct perk_device_info {
    CUdevice device;
    int ordinal;
    char name[128];
    unsigned char uuid[16]; /* zeros where the driver does not tell */
    int cc_major, cc_minor;
    int sm_count;
    size_t shared_per_block_optin, shared_per_sm, l2_bytes; /* bytes */
    size_t total_memory;                                    /* bytes */
    bool cooperative_launch;
    int memory_clock_khz, memory_bus_bits; /* 0 where the driver does not tell */
    int driver_version;
} perk_device_info;

/* PERK_NO_DEVICE when `ordinal` is not one of the devices. */
perk_status perk_driver_device_count(const perk_driver *driver, int *count, perk_error *err);
perk_status perk_driver_device_info(const perk_driver *driver, int ordinal, perk_device_info *info, perk_error *err);

#endif
