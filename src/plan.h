/* The plan: a graph lowered for one device and one configuration. Read by the checker, the emitter, the printers and
 * the GPU executor; made by src/lower.c.
 *
 * A plan is a list of stages (one lowered op, or a part of one) in topological order. A stage is cut into tasks, and
 * every worker (a thread block that stays on its SM) walks its own static list of tasks, in order. A task first waits
 * for counters, then reads and writes regions of plan tensors, then signals counters. Counters are monotonic over the
 * life of a program: in step s (from 0) a wait is satisfied when
 *     counter value >= s * per_step(counter) + needed
 * where per_step is the sum of all signals to it in one step; needed <= 0 therefore refers to earlier steps, and
 * needed == 0 means "everything of the step before has signalled".
 */
#ifndef PERK_SRC_PLAN_H
#define PERK_SRC_PLAN_H

#include "graph.h"
#include "kernels_src/abi.h"
#include "perk/config.h"

typedef struct perk_device_desc {
    char arch[16];     /* what NVRTC is asked for: "sm_90a" */
    int capability;    /* 90 */
    int worker_count;  /* SMs: one worker an SM */
    int shared_memory; /* bytes of shared memory that one block may have */
    bool portable;     /* use nothing newer than sm_80 instructions */
} perk_device_desc;

/* The part of device memory a plan tensor lies in. */
typedef enum perk_space {
    PERK_SPACE_ACTIVATIONS, /* the arena; tensors may share bytes over time */
    PERK_SPACE_KV,          /* the paged KV cache: persistent over steps */
    PERK_SPACE_CONSTANTS,   /* norm weights, biases, rope tables, embedding tables: written at load only */
    PERK_SPACE_WEIGHTS,     /* matrices packed in stream order: written at load only */
    PERK_SPACE_COUNT
} perk_space;

/* How a tensor lies in memory, for the weight loader. */
typedef enum perk_layout {
    PERK_LAYOUT_ROWS,         /* row-major, rows row_stride apart */
    PERK_LAYOUT_TILES,        /* packed in stream order (kernels_src/abi.h) */
    PERK_LAYOUT_PAIRED_TILES, /* the same, a tile holding 8 rows of the upper half, then the 8 of the lower half that
                                 belong to them (gate and up) */
    PERK_LAYOUT_WIDE_INPUT,   /* activations in slices, as wide linears take them (kernels_src/abi.h); rows and columns
                                 name elements as in row-major */
    PERK_LAYOUT_ROPE,         /* [positions][head_dim / 2] cos, sin in fp32, of the op `rope_op` */
} perk_layout;

/* A tensor as the plan sees it: [rows, cols] of elements, rows `row_stride` elements apart. */
typedef struct perk_plan_tensor {
    char name[96];
    int graph_tensor; /* index in the graph, -1 for the plan's own (attention partials, ...) */
    perk_space space;
    perk_layout layout;
    int rope_op;     /* PERK_LAYOUT_ROPE: the attention op whose frequencies it holds */
    uint64_t offset; /* bytes in its space; a multiple of 256 */
    uint64_t bytes;
    int32_t rows, cols, row_stride;
    perk_dtype dtype;
    bool external_input; /* written by the host before the step */
    bool eager;          /* its values tell by themselves whether they are there (kernels_src/abi.h) */
    bool of_pieces;      /* the same, of attention's pieces: vacant until a layer's are made in it */
} perk_plan_tensor;

/* Rows [row_begin, row_end) times the columns of `repeat` intervals
 * [col_begin + i * col_stride, col_begin + i * col_stride + col_count), i = 0 ... repeat - 1. */
typedef struct perk_region {
    int32_t tensor; /* in plan->tensors */
    int32_t row_begin, row_end;
    int32_t col_begin, col_count, col_stride, repeat;
} perk_region;

typedef struct perk_wait {
    int32_t counter, needed;
} perk_wait;

typedef struct perk_signal {
    int32_t counter, amount; /* amount >= 1 */
} perk_signal;

typedef struct perk_task {
    int32_t stage, worker;
    int32_t first, stride, count;     /* the units (row tiles, heads, ...) first, first + stride, ... of its stage */
    int32_t wait_begin, wait_end;     /* in plan->waits */
    int32_t signal_begin, signal_end; /* in plan->signals */
    int32_t read_begin, read_end;     /* in plan->regions */
    int32_t write_begin, write_end;   /* in plan->regions */
    uint64_t stream_bytes;            /* packed weights that this task consumes */
} perk_task;

/* The weights of a stage in the packed stream: see kernels_src/abi.h for the layout.
 *
 * Where they are those of experts, the step's routing says which are needed. PERK_DEAL_TILES: the stage sums up what
 * experts make; a task has tiles of the output, and streams each of them of every expert that is hit. PERK_DEAL_UNITS:
 * a unit is a tile of one hit expert; which tasks have which of them, and how many there are, is data. A task's units
 * are then the most that it may get. Its write region is a share of the output that is its alone, not the place that it
 * writes: the tasks' shares make up the whole, and all other stages must declare the whole (src/check.c holds plans to
 * that). */
typedef enum perk_deal { PERK_DEAL_NONE, PERK_DEAL_UNITS, PERK_DEAL_TILES } perk_deal;

typedef struct perk_stream {
    int tensor;          /* plan tensor of the packed weights; -1: the stage streams none */
    int tile_count;      /* row tiles; of one expert */
    int blocks_per_tile; /* 1 KB blocks of 16 rows x 32 columns */
    int together;        /* wide linears: a worker's tiles that are streamed side by side, at most; 0: one by one */
    int shares;          /* wide linears: the step's tokens are cut in so many shares of share_tokens, and each tile is
                            streamed once a share: unit share * tile_count + tile; else 0 */
    int share_tokens;
    perk_deal deal;   /* of experts' weights; else PERK_DEAL_NONE, and the rest means nothing */
    int experts;      /* matrices */
    int most_hits;    /* of them, in a step */
    int own_slots;    /* steps of one token: experts that it goes to, which every task picks by itself; else 0 */
    int routing;      /* plan tensor of the routing (kernels_src/abi.h), which one task writes; with own_slots, of the
                         router's logits */
    perk_wait routed; /* what the producer waits for before it reads that */
} perk_stream;

/* Which function of kernels_src/ a stage's tasks are instances of. The emitter has the statement in `kinds`; the
 * simulator does the same in C. */
typedef enum perk_stage_work {
    PERK_WORK_NONE, /* plans made by hand */
    PERK_WORK_GATHER,
    PERK_WORK_RMSNORM,
    PERK_WORK_GATE_MUL,
    PERK_WORK_ARGMAX,
    PERK_WORK_LINEAR,
    PERK_WORK_ARRANGE, /* wide linears: their input from rows */
    PERK_WORK_PARTIAL, /* attention: partial, merge, append */
    PERK_WORK_MERGE,
    PERK_WORK_APPEND,
    PERK_WORK_MOE_ROUTE,
    PERK_WORK_MOE_LINEAR,
    PERK_WORK_MOE_SUM,
} perk_stage_work;

typedef struct perk_stage {
    char name[96]; /* "layers.3.attention.partial" */
    int op;        /* in the graph */
    int kind;      /* which instantiation of the program runs it */
    perk_stage_work work;
    int counter; /* what its tasks signal */
    int task_count, unit_count;
    int operands[PERK_RECORD_OPERANDS]; /* plan tensors whose addresses the device code gets, by role; -1: none */
    int scalar;                         /* one number for the device code (the layer in the KV cache) */
    bool takes_inputs;                  /* its tasks use the slots of wide linears' inputs as they like */
    bool is_vocabulary;                 /* leaves candidates for argmax, and makes places of eager values vacant */
    bool eager;                         /* signals without a fence: all that it writes is eager */
    perk_stream stream;
} perk_stage;

typedef struct perk_plan {
    const perk_graph *graph; /* borrowed */
    perk_device_desc device;
    perk_config config;

    perk_plan_tensor *tensors;
    int tensor_count;
    uint64_t space_bytes[PERK_SPACE_COUNT];

    perk_stage *stages;
    int stage_count;

    char **kinds; /* distinct instantiations: the C++ statement that runs a task */
    int kind_count;

    int counter_count;
    int32_t *counter_per_step; /* [counter_count] sum of all signals in a step */

    perk_task *tasks; /* by worker, then in the order of execution */
    int task_count;
    int32_t *worker_begin; /* [worker_count + 1] in tasks */
    perk_wait *waits;
    perk_signal *signals;
    perk_region *regions;
    int wait_count, signal_count, region_count;

    /* set before emission */
    bool profiled;        /* the program stamps its tasks */
    bool unlimited_waits; /* the program's waits never give up: to measure what the limit costs */
    bool for_racecheck;   /* all lanes of a warp arrive where else one does for them */
    bool many_steps;      /* a launch runs many of them: src/plan_steps.h */

    /* shared memory of a block */
    int ring_slots, staging_bytes, reduction_bytes, shared_bytes;
    /* wide linears, where a step may have more than 8 tokens: the columns that shared memory has room for (0: there are
     * none), and the slots of it for slices of their inputs */
    int wide_tokens, input_slots;
    /* attention; all 0 in a graph without any. The KV tensors of the plan have a row for each token of a step, for the
     * checker: which cells of which page a token takes is data, but no two tokens share one. */
    int attention_parts;       /* workers that share a KV head */
    int attention_pieces;      /* long ones of the cache, for a KV head: not every warp of theirs has one */
    int kv_heads, kv_head_dim; /* of every layer */
    bool streams_kv;           /* what is read of the KV cache comes through the ring, in the order of the stream */
    int append_slices;         /* of the step's tokens: a task of append takes one of one KV head */
    int max_attention_items, max_query_tiles, tokens_per_query_tile;
    bool eager_pieces;       /* layers have scratches of pieces in turn, each made vacant by the layer before */
    int prompt_slice;        /* tokens of the step that a worker takes together where they are a prompt's (wide programs
                                alone; 0: it does not) */
    uint64_t kv_layer_bytes; /* of one layer, all pages */

    /* Among the activations: where eager tensors begin, and how long they are. Their second copy follows; the offsets
     * of tensors are those in the first. */
    uint64_t eager_begin, eager_bytes;
} perk_plan;

/* `config` (resolved) for steps of up to `tokens`, with all that other programs over the same memory must agree on. */
perk_config perk_config_for_steps(const perk_config *config, int32_t tokens);

/* Lowers `graph` (borrowed: it must outlive the plan). `config` must be resolved. */
perk_status perk_plan_create(perk_plan **out, const perk_graph *graph, const perk_device_desc *device,
                             const perk_config *config, perk_error *err);
void perk_plan_free(perk_plan *plan);

/* Whether wide linears are those of kernels_src/batched.cuh, for at most 64 rows of tokens or logits; else they are
 * those of kernels_src/wide.cuh, over tokens alone. */
static inline bool perk_plan_is_batched(const perk_plan *plan) {
    return plan->wide_tokens > 0 && plan->wide_tokens <= PERK_BATCHED_TOKENS;
}

/* Where the arrays of the step's batch lie in device memory; the part of a block's shared memory that a copy of it
 * takes (0: it is too large for one); the pages that a request of max_seq_length has. */
perk_batch_layout perk_plan_batch_layout(const perk_plan *plan);
int perk_plan_batch_shared_bytes(const perk_plan *plan);
int perk_plan_pages_per_request(const perk_config *config);
/* Attention items that a step may have: over the cache, one for each warp of a KV head, or each query tile; and one for
 * each unit of what the step adds to a tile's request. */
int perk_plan_attention_items(const perk_plan *plan);

/* The checker (src/check.c): proves that every pair of conflicting accesses is ordered by the plan's own lists and
 * counters, within a step and between a step and the next, that every read sees the tensor it means, that nothing waits
 * for what cannot come, and that all regions lie inside their tensors. PERK_UNSAFE_PLAN with the first violation. */
perk_status perk_plan_check(const perk_plan *plan, perk_error *err);

#endif
