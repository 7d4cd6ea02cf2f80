/* For the tests of layer calls: a graph, and one that must have been refused. */
#ifndef PERK_TESTS_GRAPH_CHECKS_H
#define PERK_TESTS_GRAPH_CHECKS_H

#include "graph.h"
#include "test.h"

static inline perk_graph *new_graph(void) {
    perk_graph *g;
    perk_error err;
    CHECK_OK(perk_graph_create(&g, "test", &err));
    return g;
}

/* The graph failed with `text`; frees it. */
static inline void check_refused(perk_graph *g, const char *text) {
    perk_error err;
    CHECK_FAILS(perk_graph_check(g, &err), PERK_INVALID_ARGUMENT, text);
    perk_graph_free(g);
}

#endif
