/* From plan to source and tables. */
#include "jit/emit.h"

#include <stdio.h>

#include "jit/embedded.h"
#include "src/plan_steps.h"

/* Copies of 16 KB that a worker has under way: 2 cover the bandwidth-latency product of an H100, and more would queue
 * up in front of the loads on the critical path; 4 for a worker that has fallen behind (docs/performance.md). */
enum { CHUNKS_IN_FLIGHT = 2, CHUNKS_IN_FLIGHT_BEHIND = 4 };

/* Chunks behind a full ring that are brought to L2: 26 MB of all workers of an H100, half of its L2. 20 gave no more.
 * And the cycles from one to the next: about what memory takes for one of every worker, and more in steps of several
 * tokens, where loads of activations and the cache come between. */
enum { CHUNKS_AHEAD = 12, CYCLES_PER_CHUNK = 1200, CYCLES_PER_CHUNK_OF_SEVERAL = 1700 };

static int longest_list(const perk_plan *plan) {
    int longest = 0;
    for (int w = 0; w < plan->device.worker_count; w++)
        longest = PERK_MAX(longest, plan->worker_begin[w + 1] - plan->worker_begin[w]);
    return longest;
}

/* What happens between two steps of a launch. */
static void emit_schedule_constants(const perk_plan *plan, perk_buffer *out) {
    perk_schedule_limits limits = perk_plan_schedule_limits(plan);
    struct {
        const char *name;
        int64_t value;
    } constants[] = {
        {"slots", limits.slots},
        {"outbox_records", perk_plan_outbox_records(plan)},
        {"max_requests", limits.requests},
        {"max_logit_rows", limits.logit_rows},
        {"max_seq_length", limits.positions},
        {"tokens_per_query_tile", plan->tokens_per_query_tile},
        {"attention_warps", plan->attention_parts * PERK_CONSUMER_WARPS},
        {"attention_pieces", plan->attention_pieces},
        {"vocab_size", perk_plan_vocab_size(plan)},
    };
    for (size_t i = 0; i < PERK_COUNT(constants); i++)
        perk_buffer_printf(out, "constexpr uint32_t %s = %lld;\n", constants[i].name, (long long)constants[i].value);
}

/* Which experts come next is not known before their routing; wide linears over prompts wait for tensor cores, not for
 * memory, and batched ones are better off without: Qwen3-8B at batch 32 6.78 ms with, 6.69 without. */
static int chunks_ahead(const perk_plan *plan) {
    for (int i = 0; i < plan->stage_count; i++)
        if (plan->stages[i].stream.deal != PERK_DEAL_NONE) return 0;
    if (plan->wide_tokens > 0) return 0;
    return plan->device.portable ? 0 : CHUNKS_AHEAD;
}

static void emit_constants(const perk_plan *plan, perk_buffer *out) {
    perk_batch_layout batch = perk_plan_batch_layout(plan);
    struct {
        const char *name;
        int64_t value;
    } constants[] = {
        {"max_tokens", plan->config.max_num_batched_tokens},
        {"page_size", plan->config.page_size},
        {"max_num_pages", plan->config.max_num_pages},
        {"pages_per_request", perk_plan_pages_per_request(&plan->config)},
        {"max_attention_items", plan->max_attention_items},
        {"tasks_per_worker", longest_list(plan) + 1},
        {"ring_slots", plan->ring_slots},
        {"chunks_in_flight", CHUNKS_IN_FLIGHT},
        {"chunks_in_flight_behind", CHUNKS_IN_FLIGHT_BEHIND},
        {"chunks_ahead", chunks_ahead(plan)},
        {"cycles_per_chunk", plan->config.max_num_batched_tokens > 1 ? CYCLES_PER_CHUNK_OF_SEVERAL : CYCLES_PER_CHUNK},
        {"staging_bytes", plan->staging_bytes},
        {"reduction_bytes", plan->reduction_bytes},
        {"shared_bytes", plan->shared_bytes},
        {"batch_shared_bytes", perk_plan_batch_shared_bytes(plan)},
        {"batch_token_ids", batch.token_ids},
        {"batch_positions", batch.positions},
        {"batch_token_request", batch.token_request},
        {"batch_token_query_tile", batch.token_query_tile},
        {"batch_logit_rows", batch.logit_rows},
        {"batch_page_table", batch.page_table},
        {"batch_query_tiles", batch.query_tiles},
        {"batch_attention_items", batch.attention_items},
    };
    bool has_experts = false;
    int own_experts = 1, own_slots = 0;
    for (int i = 0; i < plan->stage_count; i++) {
        const perk_stream *stream = &plan->stages[i].stream;
        has_experts |= stream->deal != PERK_DEAL_NONE;
        if (stream->deal == PERK_DEAL_NONE || !stream->own_slots) continue;
        own_experts = stream->experts;
        own_slots = stream->own_slots;
    }
    perk_buffer_printf(out, "namespace program {\n");
    for (size_t i = 0; i < PERK_COUNT(constants); i++)
        perk_buffer_printf(out, "constexpr uint32_t %s = %lld;\n", constants[i].name, (long long)constants[i].value);
    if (plan->wide_tokens > 0)
        perk_buffer_printf(out,
                           "constexpr uint32_t wide_tokens = %d, input_slots = %d;\n"
                           "[[maybe_unused]] constexpr uint32_t prompt_tokens = %d;\n",
                           plan->wide_tokens, plan->input_slots, plan->prompt_slice);
    perk_buffer_printf(
        out, "[[maybe_unused]] constexpr bool waits_are_limited = %s, has_experts = %s, many_steps = %s;\n",
        plan->unlimited_waits ? "false" : "true", has_experts ? "true" : "false", plan->many_steps ? "true" : "false");
    perk_buffer_printf(out, "[[maybe_unused]] constexpr uint32_t own_experts = %d, own_slots = %d;\n", own_experts,
                       own_slots);
    perk_buffer_printf(out,
                       "[[maybe_unused]] constexpr uint32_t eager_place = %llu;\n[[maybe_unused]] constexpr uint64_t "
                       "eager_bytes = %llu;\n",
                       (unsigned long long)(plan->eager_begin / 256), (unsigned long long)plan->eager_bytes);
    perk_buffer_printf(out, "[[maybe_unused]] constexpr bool eager_pieces = %s;\n",
                       plan->eager_pieces ? "true" : "false");
    if (plan->streams_kv)
        perk_buffer_printf(out, "constexpr uint32_t kv_heads = %d, kv_head_dim = %d, kv_parts = %d;\n", plan->kv_heads,
                           plan->kv_head_dim, plan->attention_parts);
    if (plan->many_steps) emit_schedule_constants(plan, out);
    perk_buffer_printf(out, "} // namespace program\n\n");
}

static void emit_switch(const perk_plan *plan, perk_buffer *out) {
    perk_buffer_printf(out, "namespace perk {\n"
                            "// Runs one task; `chunk` is the number of the next chunk of the weight ring.\n"
                            "__device__ __forceinline__ uint32_t run_task(Worker &worker, const TaskView &task, "
                            "uint32_t chunk) {\n"
                            "    switch (task.kind()) {\n");
    for (int kind = 0; kind < plan->kind_count; kind++) {
        const perk_stage *first = NULL;
        for (int s = plan->stage_count - 1; s >= 0; s--)
            if (plan->stages[s].kind == kind) first = &plan->stages[s];
        perk_buffer_printf(out, "    case %d: // %s ...\n        %s\n        break;\n", kind,
                           first ? first->name : "unused", plan->kinds[kind]);
    }
    perk_buffer_printf(out, "    }\n    return chunk;\n}\n} // namespace perk\n\n");
}

perk_status perk_emit_source(const perk_plan *plan, perk_buffer *source, perk_error *err) {
    perk_buffer_printf(source, "// A perk program: %s for %s, %d workers%s.\n", plan->graph->name, plan->device.arch,
                       plan->device.worker_count, plan->device.portable ? ", portable" : "");
    perk_buffer_printf(source,
                       "#define PERK_PORTABLE %d\n#define PERK_PROFILE %d\n#define PERK_WIDE %d\n"
                       "#define PERK_STREAMS_KV %d\n#define PERK_FOR_RACECHECK %d\n#include \"abi.h\"\n\n",
                       plan->device.portable, plan->profiled, plan->wide_tokens > 0, plan->streams_kv,
                       plan->for_racecheck);
    emit_constants(plan, source);
    perk_buffer_printf(source,
                       "#include \"ptx.cuh\"\n#include \"routing.cuh\"\n#include \"worker.cuh\"\n"
                       "#include \"kv_stream.cuh\"\n#include \"rows.cuh\"\n"
                       "#include \"linear.cuh\"\n%s%s#include \"attention.cuh\"\n%s#include \"moe.cuh\"\n%s\n",
                       plan->wide_tokens > 0 ? "#include \"wide.cuh\"\n" : "",
                       perk_plan_is_batched(plan) ? "#include \"batched.cuh\"\n" : "",
                       plan->prompt_slice > 0 ? "#include \"prompt_attention.cuh\"\n" : "",
                       plan->many_steps ? "#include \"mail.h\"\n#include \"many_steps.cuh\"\n" : "");
    emit_switch(plan, source);
    perk_buffer_printf(source,
                       "extern \"C\" __global__ void __launch_bounds__(PERK_BLOCK_THREADS, 1)\n" PERK_KERNEL_NAME
                       "(const __grid_constant__ perk_kernel_args args) {\n"
                       "    perk::%s(args, [](perk::Worker &worker, const perk::TaskView &task, uint32_t "
                       "chunk) __attribute__((always_inline)) { return perk::run_task(worker, task, chunk); });\n"
                       "}\n",
                       plan->many_steps ? "many_steps_main" : "worker_main");
    return source->failed ? perk_fail_memory(err, "the program's source") : PERK_OK;
}

perk_status perk_emit_headers(perk_compile_header **headers, size_t *count, perk_error *err) {
    *headers = NULL;
    *count = 0;
    size_t files = 0;
    while (perk_embedded_files[files].name) files++;
    perk_compile_header *list = perk_calloc(files, sizeof *list);
    if (!list) return perk_fail_memory(err, "the device code");
    for (size_t i = 0; i < files; i++) {
        const perk_embedded_file *file = &perk_embedded_files[i];
        list[i].name = file->name;
        list[i].text = perk_format("#line 1 \"kernels_src/%s\"\n%s", file->name, file->text);
        if (!list[i].text) {
            perk_emit_headers_free(list, i);
            return perk_fail_memory(err, "the device code");
        }
    }
    *headers = list;
    *count = files;
    return PERK_OK;
}

void perk_emit_headers_free(perk_compile_header *headers, size_t count) {
    for (size_t i = 0; i < count; i++) free((void *)(uintptr_t)headers[i].text);
    free(headers);
}

/* ---- tables ---- */

static perk_task_record make_record(const perk_plan *plan, int index) {
    const perk_task *task = &plan->tasks[index];
    const perk_stage *stage = &plan->stages[task->stage];
    perk_task_record record = {.kind = (uint32_t)stage->kind,
                               .task = (uint32_t)index,
                               .first = (uint32_t)task->first,
                               .stride = (uint32_t)task->stride,
                               .count = (uint32_t)task->count,
                               .signal_counter = (uint16_t)plan->signals[task->signal_begin].counter,
                               .signals_eagerly = stage->eager,
                               .scalar = (uint32_t)stage->scalar,
                               .takes_inputs = stage->takes_inputs};
    for (int i = 0; i < task->wait_end - task->wait_begin; i++) {
        const perk_wait *wait = &plan->waits[task->wait_begin + i];
        record.wait_counter[i] = (uint32_t)wait->counter;
        record.wait_per_step[i] = (uint32_t)plan->counter_per_step[wait->counter];
        record.wait_needed[i] = (uint32_t)wait->needed;
    }
    for (int i = 0; i < PERK_RECORD_OPERANDS; i++)
        if (stage->operands[i] >= 0) record.operand[i] = (uint32_t)(plan->tensors[stage->operands[i]].offset / 256);
    if (stage->stream.tensor >= 0) {
        record.stream_base = (uint32_t)(plan->tensors[stage->stream.tensor].offset / PERK_WEIGHT_BLOCK_BYTES);
        record.stream_tiles = (uint32_t)stage->stream.tile_count;
        record.stream_blocks = (uint32_t)stage->stream.blocks_per_tile;
        record.stream_together = (uint32_t)stage->stream.together;
        record.share_tokens = (uint32_t)stage->stream.share_tokens;
        bool is_of_tokens = plan->graph->ops[stage->op]->output->row_kind == PERK_ROWS_TOKENS;
        record.rows_word = is_of_tokens ? PERK_BATCH_NUM_TOKENS : PERK_BATCH_NUM_LOGIT_ROWS;
    }
    if (stage->work == PERK_WORK_PARTIAL && plan->streams_kv) {
        record.stream_base = (uint32_t)stage->scalar;
        record.stream_blocks = PERK_STREAM_KV;
    }
    if (stage->stream.tensor >= 0 && stage->stream.deal != PERK_DEAL_NONE) {
        record.routing_experts =
            (uint32_t)stage->stream.experts | (stage->stream.deal == PERK_DEAL_TILES ? PERK_ROUTING_OF_TILES : 0u);
        record.routing_most_hits = (uint16_t)stage->stream.most_hits;
        record.routing_signals = (uint16_t)stage->stream.routed.needed;
        record.routing_counter = (uint32_t)stage->stream.routed.counter;
        record.routing = (uint32_t)(plan->tensors[stage->stream.routing].offset / 256);
    }
    return record;
}

/* A record has room for so much; the lowering makes no more. */
static perk_status check_task_fits(const perk_plan *plan, int index, perk_error *err) {
    const perk_task *task = &plan->tasks[index];
    int waits = task->wait_end - task->wait_begin, signals = task->signal_end - task->signal_begin;
    if (waits <= PERK_RECORD_WAITS && signals == 1 && plan->signals[task->signal_begin].amount == 1 &&
        plan->counter_count <= UINT16_MAX)
        return PERK_OK;
    return perk_fail(
        err, PERK_UNSUPPORTED,
        "task %d of %s has %d waits and %d signals, the plan %d counters: a record holds %d and one of 1, a "
        "plan has %d at most",
        index, plan->stages[task->stage].name, waits, signals, plan->counter_count, (int)PERK_RECORD_WAITS, UINT16_MAX);
}

perk_status perk_emit_records(const perk_plan *plan, perk_task_record **records, int *per_worker, perk_error *err) {
    *records = NULL;
    for (int i = 0; i < plan->task_count; i++)
        if (check_task_fits(plan, i, err) != PERK_OK) return PERK_UNSUPPORTED;
    *per_worker = longest_list(plan) + 1;
    *records = perk_calloc((size_t)plan->device.worker_count * (size_t)*per_worker, sizeof **records);
    if (!*records) return perk_fail_memory(err, "the task table");
    for (int w = 0; w < plan->device.worker_count; w++) {
        perk_task_record *list = *records + (size_t)w * (size_t)*per_worker;
        int count = plan->worker_begin[w + 1] - plan->worker_begin[w];
        for (int i = 0; i < *per_worker; i++) {
            if (i < count)
                list[i] = make_record(plan, plan->worker_begin[w] + i);
            else
                list[i].kind = PERK_TASK_END;
        }
    }
    return PERK_OK;
}
