/* The tests' few helpers. A test is a program: it returns 0 when everything held, 77 when it was skipped. */
#ifndef PERK_TESTS_TEST_H
#define PERK_TESTS_TEST_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TEST_SKIP 77

/* Fails the test program at once, with the place and the condition; more text may follow: CHECK(x == 3, "x=%d", x). */
#define CHECK(condition, ...)                                                                                          \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: CHECK failed: %s  ", __FILE__, __LINE__, #condition);                              \
            fprintf(stderr, " " __VA_ARGS__);                                                                          \
            fputc('\n', stderr);                                                                                       \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

/* The call must succeed; shows the error otherwise. Needs a `perk_error err` in scope. */
#define CHECK_OK(call)                                                                                                 \
    do {                                                                                                               \
        perk_status check_status = (call);                                                                             \
        CHECK(check_status == PERK_OK, "-> %s: %s", perk_status_text(check_status), err.message);                      \
    } while (0)

/* The call must fail with `expected` and an error message that contains `text`. */
#define CHECK_FAILS(call, expected, text)                                                                              \
    do {                                                                                                               \
        memset(&err, 0, sizeof err);                                                                                   \
        perk_status check_status = (call);                                                                             \
        CHECK(check_status == (expected), "-> %s: %s", perk_status_text(check_status), err.message);                   \
        CHECK(strstr(err.message, (text)) != NULL, "message lacks '%s': %s", (text), err.message);                     \
    } while (0)

#endif
