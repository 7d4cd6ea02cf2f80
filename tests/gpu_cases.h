/* Cases of the GPU tests: each in a process of its own, so that a hang or a fault costs one case; a few at a time,
 * since most of a case is compiling. */
#ifndef PERK_TESTS_GPU_CASES_H
#define PERK_TESTS_GPU_CASES_H

#include "driver.h"
#include "test.h"

#include <sys/wait.h>
#include <unistd.h>

enum { GPU_CASES_AT_ONCE = 4, GPU_CASE_SECONDS = 90 };

typedef struct gpu_cases {
    struct {
        pid_t process; /* 0: free */
        char name[160];
    } running[GPU_CASES_AT_ONCE];
    int passed, failed;
} gpu_cases;

/* Whether there is a driver; asked in a process of its own, because the driver does not survive the forks of the cases.
 * Says why not. */
static inline int gpu_cases_has_driver(void) {
    int result = 1;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        perk_driver *driver;
        perk_error err = {0};
        perk_status status = perk_driver_open(&driver, &err);
        if (status != PERK_OK) fprintf(stderr, "skipped, no GPU: %s\n", err.message);
        _exit(status == PERK_OK ? 0 : 1);
    }
    waitpid(child, &result, 0);
    return result == 0;
}

/* Waits for one running case to end. */
static void gpu_cases_reap(gpu_cases *cases) {
    int result = 1;
    pid_t process = wait(&result);
    for (int i = 0; i < GPU_CASES_AT_ONCE; i++) {
        if (process <= 0 || cases->running[i].process != process) continue;
        cases->running[i].process = 0;
        if (result == 0)
            cases->passed++;
        else
            cases->failed++;
        if (result != 0) printf("FAILED (%d): %s\n", result, cases->running[i].name);
    }
}

static int gpu_cases_place(const gpu_cases *cases) {
    for (int i = 0; i < GPU_CASES_AT_ONCE; i++)
        if (cases->running[i].process == 0) return i;
    return -1;
}

/* Forks. True in the child, which runs the case and calls gpu_case_end. */
static int gpu_case_begin(gpu_cases *cases, const char *name) {
    int place;
    while ((place = gpu_cases_place(cases)) < 0) gpu_cases_reap(cases);
    fflush(stdout);
    pid_t process = fork();
    if (process == 0) {
        alarm(GPU_CASE_SECONDS);
        return 1;
    }
    CHECK(process > 0, "cannot fork");
    cases->running[place].process = process;
    snprintf(cases->running[place].name, sizeof cases->running[place].name, "%s", name);
    return 0;
}

static void gpu_case_end(void) {
    fflush(stdout);
    _exit(0);
}

/* Waits for the rest and prints the closing line; returns main's exit code. */
static int gpu_cases_finish(gpu_cases *cases) {
    for (int i = 0; i < GPU_CASES_AT_ONCE; i++)
        while (cases->running[i].process != 0) gpu_cases_reap(cases);
    printf("%d passed, %d failed\n", cases->passed, cases->failed);
    return cases->failed ? 1 : 0;
}

#endif
