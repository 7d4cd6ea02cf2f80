/* Device code on the CPU: a program's source is compiled by the host's C++ compiler behind tests/emulator/, into a
 * shared library that the fake driver opens and calls. */
#ifndef PERK_TESTS_FAKE_EMULATE_H
#define PERK_TESTS_FAKE_EMULATE_H

#include <stdbool.h>
#include <stddef.h>

typedef struct fake_source {
    const char *text;
    const char *const *header_names, *const *headers;
    int header_count;
    int capability;                /* 90 for sm_90 */
    const struct fake_edit *edits; /* [FAKE_EDITS] */
} fake_source;

/* Compiles; *library is malloc'd. False: `log` says why. */
bool fake_emulate_compile(const fake_source *source, void **library, size_t *size, char *log, size_t log_size);

/* Runs a kernel of a library that fake_emulate_open gave; launches of other numbers run in other orders. */
typedef void fake_emulate_entry(unsigned grid, unsigned block, unsigned shared, void **params, int cooperative,
                                unsigned number);

/* NULL: it could not be opened. */
void *fake_emulate_open(const void *library, size_t size);
fake_emulate_entry *fake_emulate_find(void *opened, const char *kernel);
void fake_emulate_close(void *opened);

#endif
