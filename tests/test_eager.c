/* Eager values: which stages signal without a fence, and that the checker refuses plans in which a vacant place, or
 * what an earlier step left there, could be taken for a value. */
#include "src/device.h"
#include "src/model.h"
#include "src/plan.h"
#include "test.h"

#define TINY PERK_SOURCE_DIR "/examples/tiny"
#define LARGE PERK_SOURCE_DIR "/bench/configs/qwen3-8b/config.json"

static perk_error err;

static perk_plan *make_plan(const perk_model *model, const char *arch, int workers, int tokens) {
    perk_device_desc device;
    perk_config config = {.max_num_batched_tokens = tokens, .max_seq_length = 64};
    perk_plan *plan;
    CHECK_OK(perk_device_describe_arch(arch, &device, &err));
    CHECK_OK(perk_config_resolve(&config, 0, &err));
    if (workers) device.worker_count = workers;
    CHECK_OK(perk_plan_create(&plan, model->graph, &device, &config, &err));
    return plan;
}

static perk_stage *find_stage(perk_plan *plan, const char *name) {
    for (int s = 0; s < plan->stage_count; s++)
        if (!strcmp(plan->stages[s].name, name)) return &plan->stages[s];
    CHECK(0, "no stage %s", name);
    return NULL;
}

static perk_plan_tensor *output_of(perk_plan *plan, const char *stage) {
    return &plan->tensors[find_stage(plan, stage)->operands[1]];
}

static void expect_stages(perk_plan *plan, bool eager, const char *const *names, size_t count) {
    for (size_t i = 0; i < count; i++)
        CHECK(find_stage(plan, names[i])->eager == eager, "%s, %d tokens", names[i],
              plan->config.max_num_batched_tokens);
}

/* The cache is for later steps, logits are read back, rows of the last layer are selected, and what 8 tokens of 8B have
 * for the down projection is too much to be staged. */
static void test_choice(void) {
    static const char *const always[] = {"layers.0.qkv", "layers.0.attention.partial", "layers.1.attention",
                                         "layers.2.attention_residual", "layers.3.mlp_residual"},
                             *const never[] = {"embedding",
                                               "layers.0.attention.append",
                                               "layers.35.mlp_residual",
                                               "last_hidden",
                                               "logits",
                                               "next_token"},
                             *const staged[] = {"layers.0.gate_up"};
    perk_model *model;
    CHECK_OK(perk_model_describe(&model, LARGE, &err));
    for (int tokens = 1; tokens <= 8; tokens += 7) {
        perk_plan *plan = make_plan(model, "sm_90a", 0, tokens);
        expect_stages(plan, true, always, PERK_COUNT(always));
        expect_stages(plan, false, never, PERK_COUNT(never));
        expect_stages(plan, tokens == 1, staged, PERK_COUNT(staged));
        CHECK_OK(perk_plan_check(plan, &err));
        perk_plan_free(plan);
    }
    perk_model_free(model);
}

/* Wide linears, GPUs whose attention reads the cache by itself, vocabularies with fewer tiles than workers. */
static void test_others(void) {
    static const struct {
        const char *arch;
        int workers, tokens;
    } cases[] = {{"sm_90a", 4, 16}, {"sm_80", 4, 1}, {"sm_120a", 4, 1}, {"sm_90a", 1000, 1}};
    perk_model *model;
    CHECK_OK(perk_model_describe(&model, TINY, &err));
    for (size_t i = 0; i < PERK_COUNT(cases); i++) {
        perk_plan *plan = make_plan(model, cases[i].arch, cases[i].workers, cases[i].tokens);
        CHECK(plan->eager_bytes == 0, "%s, %d workers, %d tokens", cases[i].arch, cases[i].workers, cases[i].tokens);
        CHECK_OK(perk_plan_check(plan, &err));
        perk_plan_free(plan);
    }
    perk_model_free(model);
}

/* ---- plans that are wrong ---- */

static void mark_embedding(perk_plan *plan) { find_stage(plan, "embedding")->eager = true; }
static void mark_selected(perk_plan *plan) {
    perk_stage *stage = find_stage(plan, "layers.5.mlp_residual");
    stage->eager = plan->tensors[stage->operands[1]].eager = true;
}
static void move_out(perk_plan *plan) { output_of(plan, "layers.0.qkv")->offset = 0; }
static void move_in(perk_plan *plan) { output_of(plan, "embedding")->offset = plan->eager_begin; }
static void share_place(perk_plan *plan) {
    output_of(plan, "layers.1.qkv")->offset = output_of(plan, "layers.0.qkv")->offset;
}
static void drop_copy(perk_plan *plan) { plan->space_bytes[PERK_SPACE_ACTIVATIONS] -= plan->eager_bytes; }
static void forget_clearing(perk_plan *plan) { find_stage(plan, "logits")->is_vocabulary = false; }
static void signal_early(perk_plan *plan) { find_stage(plan, "logits")->eager = true; }
static void forget_staging(perk_plan *plan) { plan->staging_bytes = 0; }
static void swap_scratches(perk_plan *plan) {
    perk_stage *stage = find_stage(plan, "layers.2.attention.partial");
    int made = stage->operands[1];
    stage->operands[1] = stage->operands[5];
    stage->operands[5] = made;
}
static void move_pieces(perk_plan *plan) {
    perk_stage *stage = find_stage(plan, "layers.1.attention.partial");
    for (int i = 0; i < plan->task_count; i++)
        if (&plan->stages[plan->tasks[i].stage] == stage) plan->tasks[i].stride = 2;
}
static void forget_pieces(perk_plan *plan) { find_stage(plan, "layers.1.attention.partial")->eager = false; }

static void test_bad(void) {
    static const struct {
        void (*change)(perk_plan *);
        const char *says;
    } cases[] = {{mark_embedding, "embedding signals eagerly"},
                 {mark_selected, "its place is not among theirs"},
                 {move_out, "shares its bytes"},
                 {move_in, "shares its bytes"},
                 {share_place, "share a place"},
                 {drop_copy, "two copies of"},
                 {forget_clearing, "nobody makes"},
                 {signal_early, "logits signals eagerly"},
                 {forget_staging, "not all who write and read it"},
                 {swap_scratches, "nobody makes the scratch"},
                 {move_pieces, "makes other pieces"},
                 {forget_pieces, "layers.1.attention.partial uses"}};
    perk_model *model;
    CHECK_OK(perk_model_describe(&model, TINY, &err));
    for (size_t i = 0; i < PERK_COUNT(cases); i++) {
        perk_plan *plan = make_plan(model, "sm_90a", 4, 1);
        CHECK(plan->eager_bytes > 0);
        CHECK_OK(perk_plan_check(plan, &err));
        cases[i].change(plan);
        CHECK(perk_plan_check(plan, &err) == PERK_UNSAFE_PLAN, "case %zu", i);
        CHECK(strstr(err.message, cases[i].says), "case %zu: %s", i, err.message);
        perk_plan_free(plan);
    }
    perk_model_free(model);
}

int main(void) {
    test_choice();
    test_others();
    test_bad();
    return 0;
}
