/* Tests an op alone against the reference executor: cc test_op.c $(pkg-config --cflags --libs perk) && ./a.out */
#include <perk/test.h>

#include <stdio.h>

int main(void) {
    perk_test_options options = {.rows = 8, .seed = 1};
    perk_test_difference difference = {0};
    perk_error err = {0};
    perk_test *test;
    perk_status status = perk_test_create(&test, &options, &err);
    if (status == PERK_OK) {
        perk_graph *graph = perk_test_graph(test);
        perk_tensor *x = perk_input(graph, "x", 512), *w = perk_attach_matrix(graph, "w", 1000, 512);
        perk_tensor *y = perk_linear(graph, "y", x, w, NULL); /* the layer call that is tested */
        status = perk_test_run(test, &err);
        if (status == PERK_OK) status = perk_test_compare(test, y, NULL, 0, &difference, &err);
    }
    if (status == PERK_OK)
        printf("%s: worst error %.2f units of bf16 rounding, relative %.1e\n", perk_test_report(test)->executor,
               difference.worst, difference.relative);
    else
        fprintf(stderr, "%s\n", err.message);
    perk_test_free(test);
    return status == PERK_OK && difference.worst <= 1 ? 0 : 1;
}
