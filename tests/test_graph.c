/* The graph API refuses what makes no sense. */
#include "graph_checks.h"
#include "ops/op.h"

static perk_error err;

/* ---- layer calls ---- */

static void test_good_graph(void) {
    perk_graph *g = new_graph();
    perk_tensor *table = perk_attach_matrix(g, "table", 50, 8);
    perk_tensor *x = perk_embed(g, "x", table);
    perk_tensor *y = perk_rmsnorm(g, "y", x, perk_attach_vector(g, "norm", 8), 1e-6f);
    perk_tensor *logits = perk_logits(g, "logits", perk_select_rows(g, "rows", y), table);
    perk_tensor *token = perk_argmax(g, "token", logits);
    CHECK_OK(perk_graph_check(g, &err));
    CHECK(g->op_count == 5 && logits->dtype == PERK_F32 && logits->cols == 50 && token->dtype == PERK_I32);
    CHECK(x->row_kind == PERK_ROWS_TOKENS && logits->row_kind == PERK_ROWS_LOGITS);
    CHECK(perk_graph_find(g, "y") == y && !perk_graph_find(g, "z") && y->producer == g->ops[1]);
    CHECK(perk_attach_matrix(g, "table", 50, 8) == table, "a tied weight is one tensor");
    CHECK(perk_stack(g, "none", (perk_tensor *[]){NULL, NULL}, 2) == NULL);
    perk_keep(g, y);
    CHECK(y->kept);
    CHECK_OK(perk_graph_check(g, &err));
    for (int i = 0; i < g->op_count; i++) CHECK(g->ops[i]->type->reference && g->ops[i]->index == i);
    perk_graph_free(g);
    perk_graph_free(NULL);
}

static void test_stack(void) {
    perk_graph *g = new_graph();
    perk_tensor *a = perk_attach_matrix(g, "a", 3, 8), *b = perk_attach_matrix(g, "b", 5, 8);
    perk_tensor *ab = perk_stack(g, "ab", (perk_tensor *[]){a, b}, 2);
    CHECK(ab && ab->rows == 8 && ab->cols == 8 && ab->part_count == 2);
    perk_stack(g, "abc", (perk_tensor *[]){a, perk_attach_matrix(g, "c", 3, 9)}, 2);
    check_refused(g, "stack abc");
    g = new_graph();
    a = perk_attach_matrix(g, "a", 3, 8);
    perk_stack(g, "half", (perk_tensor *[]){a, NULL}, 2);
    check_refused(g, "half");
    g = new_graph();
    a = perk_attach_matrix(g, "a", 3, 8);
    perk_stack(g, "five", (perk_tensor *[]){a, a, a, a, a}, 5);
    check_refused(g, "5 parts");
}

static void test_refusals(void) {
    perk_graph *g = new_graph();
    perk_rmsnorm(g, "n", perk_input(g, "x", 8), perk_attach_vector(g, "w", 9), 1e-6f);
    perk_input(g, "later", 8);
    CHECK(!perk_graph_find(g, "later"), "calls after the first failure do nothing");
    check_refused(g, "rmsnorm n");
    g = new_graph();
    perk_linear(g, "l", perk_input(g, "x", 8), perk_attach_matrix(g, "w", 4, 7), NULL);
    check_refused(g, "linear l");
    g = new_graph();
    perk_linear(g, "l", perk_input(g, "x", 8), perk_attach_matrix(g, "w", 4, 8), perk_attach_vector(g, "b", 5));
    check_refused(g, "bias b");
    g = new_graph();
    perk_linear_residual(g, "l", perk_input(g, "x", 8), perk_attach_matrix(g, "w", 4, 8), NULL, perk_input(g, "r", 5));
    check_refused(g, "residual r");
    g = new_graph();
    perk_silu_mul(g, "s", perk_input(g, "x", 7));
    check_refused(g, "silu_mul s: needs an activation of even");
    g = new_graph();
    perk_gelu_mul(g, "s", perk_input(g, "x", 7));
    check_refused(g, "gelu_mul s: needs an activation of even");
    g = new_graph();
    perk_argmax(g, "a", perk_input(g, "x", 8));
    check_refused(g, "fp32");
    g = new_graph();
    perk_input(g, "x", 8);
    perk_input(g, "x", 8);
    check_refused(g, "already");
    g = new_graph();
    perk_attach_matrix(g, "w", 0, 8);
    check_refused(g, "not a shape");
    g = new_graph();
    perk_rmsnorm(g, "n", NULL, perk_attach_vector(g, "w", 9), 1e-6f);
    check_refused(g, "NULL");
    g = new_graph();
    perk_graph *other = new_graph();
    perk_silu_mul(g, "s", perk_input(other, "x", 8));
    perk_graph_free(other);
    check_refused(g, "another graph");
}

static void test_attention_refusals(void) {
    const float frequencies[4] = {1, 1, 1, 1};
    const perk_attention_params good = {
        .num_heads = 4, .num_kv_heads = 2, .head_dim = 8, .scale = 1, .inv_freq = frequencies, .rope_scale = 1};
    for (int i = 0; i < 6; i++) {
        perk_graph *g = new_graph();
        perk_tensor *qkv = perk_input(g, "qkv", i == 5 ? 63 : 64);
        perk_attention_params p = good;
        if (i == 1) p.num_kv_heads = 3;
        if (i == 2) p.head_dim = 7;
        if (i == 3) p.inv_freq = NULL;
        if (i == 4) p.q_norm = perk_attach_vector(g, "q_norm", 9);
        perk_tensor *out = perk_attention(g, "a", qkv, &p);
        if (i) {
            check_refused(g, "attention a");
            continue;
        }
        CHECK_OK(perk_graph_check(g, &err));
        CHECK(out->cols == 32 && g->kv_layer_count == 1 && g->ops[0]->attention.inv_freq != frequencies);
        perk_graph_free(g);
    }
}

int main(void) {
    test_good_graph();
    test_stack();
    test_refusals();
    test_attention_refusals();
    return 0;
}
