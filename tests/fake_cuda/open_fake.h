/* The fake driver and compiler in place of the real ones, for tests that know where they lie (FAKE_CUDA). */
#ifndef PERK_TESTS_OPEN_FAKE_H
#define PERK_TESTS_OPEN_FAKE_H

#include "fake_cuda.h"
#include "test.h"

#include <dlfcn.h>
#include <stdlib.h>

/* Their state, and the calls of fake_cuda.h. */
typedef struct opened_fake {
    fake_cuda *driver;
    fake_nvrtc *compiler;
    void (*reset_driver)(void), (*reset_compiler)(void);
    CUcontext (*current_context)(void);
    void (*make_current)(CUcontext context);
} opened_fake;

static inline void *fake_symbol(void *library, const char *name) {
    void *address = dlsym(library, name);
    CHECK(address, "%s", name);
    return address;
}

static inline opened_fake open_fake(void) {
    setenv("PERK_LIBCUDA", FAKE_CUDA, 1);
    setenv("PERK_LIBNVRTC", FAKE_CUDA, 1);
    void *library = dlopen(FAKE_CUDA, RTLD_NOW | RTLD_LOCAL);
    CHECK(library, "%s", dlerror());
    opened_fake fake;
    fake_cuda *(*driver_state)(void);
    fake_nvrtc *(*compiler_state)(void);
    *(void **)&driver_state = fake_symbol(library, "fake_cuda_state");
    *(void **)&compiler_state = fake_symbol(library, "fake_nvrtc_state");
    *(void **)&fake.reset_driver = fake_symbol(library, "fake_cuda_reset");
    *(void **)&fake.reset_compiler = fake_symbol(library, "fake_nvrtc_reset");
    *(void **)&fake.current_context = fake_symbol(library, "fake_cuda_current");
    *(void **)&fake.make_current = fake_symbol(library, "fake_cuda_make_current");
    fake.driver = driver_state();
    fake.compiler = compiler_state();
    return fake;
}

#endif
