/* What the host and the kernel agree on: task records, kernel arguments, the step's batch, the packed weight layout,
 * the hang report. C and device C++ both compile this file, so sizes cannot drift. NVRTC has no headers of its own,
 * hence the types.
 */
#ifndef PERK_ABI_H
#define PERK_ABI_H

#ifdef __CUDACC_RTC__
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif

/* ---- the block: 8 warps compute, one streams weights, three only bring registers ----
 * Registers are dealt to warpgroups of 4 warps: 65,536 / 384 threads = 168 each at the launch, of which the third
 * warpgroup keeps 40, so that the other two get 168 + (168 - 40) / 2 = 232. */
enum {
    PERK_CONSUMER_WARPS = 8,
    PERK_CONSUMER_THREADS = 256,
    PERK_BLOCK_THREADS = 384,
    PERK_CONSUMER_REGISTERS = 232,
    PERK_PRODUCER_REGISTERS = 40,
};

/* ---- packed weights ----
 * A matrix W [rows, cols] is cut into row tiles of 16 rows; a tile into blocks of 16 rows x 32 columns = 1 KB, padded
 * with zeros. A block holds two fragments of 512 bytes: what the 32 lanes of a warp need as the left operand of
 * mma.m16n8k16, 16 bytes a lane, so that a lane reads its registers with one load. The columns of a block are dealt to
 * the lanes so that the right operand is read in natural order, too: lane 4g+q works on columns 8q .. 8q+7 of the
 * block, fragment 0 on the first four and fragment 1 on the last four of them. In a fragment a lane holds, in order,
 * the pairs
 *
 *     (row g, first pair) (row g+8, first pair) (row g, second pair) (row g+8, second pair).
 *
 * Chunks of up to 16 blocks of one tile are the unit of the stream. Tile t of a stage belongs to worker
 * (t + rotation) % workers; the tiles of one round (t / workers) are interleaved chunk by chunk, so that at any time
 * the workers read neighbouring memory.
 */
enum {
    PERK_TILE_ROWS = 16,
    PERK_BLOCK_COLS = 32,
    PERK_WEIGHT_BLOCK_BYTES = 1024,
    PERK_CHUNK_BLOCKS = 16,
    PERK_CHUNK_BYTES = 16384,
};

/* Rows of activations start every 128 bytes (bf16), so that blocks of 32 columns may be read whole: what lies between
 * the width and the stride is zero from the start and never written. */
#define PERK_ROW_STRIDE(columns) (((columns) + 63) / 64 * 64)

/* The weights of experts: the experts' packed matrices follow each other, and in each of them the tiles, whole. Which
 * of them a step needs is known when its tokens have been routed. */

/* ---- the routing of a step: 32-bit words ----
 * Pairs of a token and a slot, numbered token * slots + slot, in the order of their experts. Experts that got a pair
 * are hit; a token picks an expert at most once. After the header:
 *
 *     hit experts, rising | the place of each one's first pair in the order, and the end | pairs in that order |
 *     their shares, fp32
 *
 * Tasks of a stage over experts take either every n-th of its units, which are the tiles of the first hit expert, then
 * those of the next; or, where they sum up what experts made, tiles like those of any linear, of all hit experts.
 *
 * A program for one token needs no such list: its hits are the token's slots by rising experts, a pair each. There
 * every worker follows the router's logits by itself. */
enum { PERK_ROUTING_HITS = 0, PERK_ROUTING_HEADER = 4 };
#define PERK_ROUTING_OF_TILES 0x80000000u /* in a record: tiles of all hit experts */
#define PERK_ROUTING_WORDS(hits, pairs)                                                                                \
    (PERK_ROUTING_HEADER + 2 * (hits) + 1 + 2 * (pairs)) /* at most so many of each */

/* ---- inputs of wide linears ----
 * Programs for more than 8 tokens a step multiply whole slices of 64 columns of their linears' inputs, as wgmma takes
 * them, on GPUs that have it (those for at most 64 tokens multiply them with mma). Such an input lies in memory as it
 * will lie in shared memory, so that one copy brings a slice: slice after slice, in a slice a row of 128 bytes for each
 * of the program's tokens. Columns of a block of 32 are dealt as those of the weights are: lane q's j-th pair is the
 * q-th word of the j-th 16 bytes of the block's 64. Of the eight 16 bytes of a row, number i stands at i ^ row % 8: the
 * 128-byte swizzle, which keeps the banks of shared memory apart.
 */
enum {
    PERK_SLICE_COLS = 64,
    PERK_SLICE_BLOCKS = 2,
    PERK_SLICE_ROW_BYTES = 128,
    PERK_WIDE_TILES = 8,      /* row tiles that a worker may work on at once: one a consumer warp */
    PERK_BATCHED_TOKENS = 64, /* of a step, at most, in programs whose wide linears are batched ones */
};
/* Tiles that are worked on at once share ring slots: so many blocks of each are in one. */
#define PERK_WIDE_SLOT_BLOCKS(tiles) ((tiles) > 4 ? 2 : (tiles) > 2 ? 4 : (tiles) > 1 ? 8 : 16)

/* ---- attention ---- */
enum {
    PERK_QUERY_ROWS = 8,   /* rows of a query tile */
    PERK_KV_UNIT = 16,     /* positions that a warp works on at a time */
    PERK_PROMPT_ROWS = 64, /* rows of a query tile of a prompt (kernels_src/prompt_attention.cuh): in wide programs, */
    PERK_PROMPT_TOKENS = 16, /* of requests with that many tokens in the step */
};

/* ---- eager values ----
 * A signal is held back by a fence until what it tells of is there for all to see, which takes as long as the rest of
 * the way from worker to worker. A stage may signal eagerly, without it, where its values tell by themselves whether
 * they are there: bf16, or the router's fp32, in places that were vacant before, and every reader looks again until
 * none is. PERK_VACANT is a NaN that no arithmetic makes (theirs is 0x7fff).
 *
 * Such a tensor has a place of its own among the eager ones, in which one stage writes once a step. There are two
 * copies of all these places, for steps in turn. While a step works on one, the vocabulary projection, where every
 * worker has a task, makes the other vacant; it signals behind a fence, as the stages do that end a step. */
#define PERK_VACANT 0xffffu
/* Pieces of attention are fp32, and too many to have two copies for a step. Layers have two scratches for them in turn,
 * or three; whoever makes a piece makes its place in the next layer's scratch vacant. It is the same worker's there. */
#define PERK_VACANT_WORD 0xffffffffu

/* ---- tasks ---- */
#define PERK_TASK_END 0xffffffffu  /* kind of the record after a worker's last task */
#define PERK_STREAM_KV 0xffffffffu /* instead of a number of blocks */
enum {
    PERK_RECORD_WAITS = 4,
    PERK_RECORD_OPERANDS = 6,
    PERK_RECORD_WORDS = 32,
};

#define PERK_TASK_SLOTS_BYTES                                                                                          \
    (2 * PERK_RECORD_WORDS * 4 + 32) /* of shared memory: this task's record, the next, eight words of worker.cuh */

/* Chunks of weights behind those that are copied, which the producer finds out a lane each (look_ahead in worker.cuh):
 * a word for each (28 bits for its first block are 256 GB), and four more. Qwen3-8B has 64 bytes for them at batch 1,
 * or a slot of the ring less. */
enum { PERK_FOUND_CHUNKS = 12, PERK_FOUND_BYTES = PERK_FOUND_CHUNKS * 4 + 16 };

/* One task of one worker, 128 bytes: a warp reads it with one load, a word a lane. */
typedef struct perk_task_record {
    uint32_t kind;                             /* which instantiation runs it; PERK_TASK_END */
    uint32_t task;                             /* index in the plan, for reports */
    uint32_t first, stride, count;             /* its units: first, first + stride, ... */
    uint32_t wait_counter[PERK_RECORD_WAITS];  /* value >= step * per_step + needed */
    uint32_t wait_per_step[PERK_RECORD_WAITS]; /* 0: no wait */
    uint32_t wait_needed[PERK_RECORD_WAITS];
    uint16_t signal_counter;                /* += 1 when the task is done */
    uint16_t signals_eagerly;               /* 1: its values tell by themselves whether they are there */
    uint32_t operand[PERK_RECORD_OPERANDS]; /* byte offset / 256 in the operand's space */
    uint32_t scalar;
    uint32_t stream_base;   /* packed weights of the stage: byte offset / 1024 */
    uint32_t stream_tiles;  /* row tiles of the stage; 0: it has no weights */
    uint32_t stream_blocks; /* blocks a tile; PERK_STREAM_KV: streams what attention reads of the KV cache, of the layer
                               `stream_base` */
    union {                 /* a program has wide linears or experts, never both */
        struct {
            uint32_t stream_together; /* wide linears: tiles that are streamed side by side, at most; 0: one after the
                                         other */
            uint32_t share_tokens;    /* wide linears: unit u is row tile u % stream_tiles for the tokens from
                                         u / stream_tiles * share_tokens on, so many of them */
            uint32_t rows_word;       /* linears: which word of the batch has the number of rows */
            uint32_t takes_inputs;    /* 1: the task has the slots of wide linears' inputs for itself */
        };
        /* Where the weights are those of experts: stream_tiles are those of one expert, and the step's routing says
         * whose the task's units are. */
        struct {
            uint32_t routing_experts;   /* matrices of the stage; 0: no experts; | PERK_ROUTING_OF_TILES */
            uint16_t routing_most_hits; /* of them */
            uint16_t routing_signals;   /* a step, of the counter: */
            uint32_t routing_counter;   /* says when the routing is there, or the logits that it follows from */
            uint32_t routing;           /* or the logits: byte offset / 256 among the activations */
        };
    };
} perk_task_record;

/* ---- the batch of a step, as it lies in device memory: 32-bit words ----
 * A header, then arrays whose places are constants of the program (perk_batch_layout). */
typedef struct perk_batch_header {
    int32_t num_tokens, num_requests, num_logit_rows, num_attention_items;
    int32_t num_query_tiles;
    int32_t reserved[11];
} perk_batch_header;

/* Places of the header's fields, in words. */
enum { PERK_BATCH_NUM_TOKENS = 0, PERK_BATCH_NUM_LOGIT_ROWS = 2, PERK_BATCH_NUM_ATTENTION_ITEMS = 3 };

/* Places in a query tile and in an item of attention, in words. */
enum {
    PERK_QUERY_TILE_FIRST_ITEM = 3,
    PERK_QUERY_TILE_ITEM_COUNT = 4,
    PERK_QUERY_TILE_FRESH_POSITION = 6,
    PERK_QUERY_TILE_FRESH_ITEM = 7,
    PERK_ITEM_BEGIN = 1,
    PERK_ITEM_END = 2,
};

/* A batch of up to this size is copied to shared memory at the start of a launch. */
#define PERK_BATCH_SHARED_MAX 8192

/* A query tile: up to 8 rows (token, query head of the group) of one request that share a KV head. A prompt's has up to
 * 64, and no items: a worker takes it over the whole KV range. */
typedef struct perk_query_tile {
    int32_t request, first_token, token_count;
    int32_t first_item, item_count;      /* its splits over the cache */
    int32_t fresh_token, fresh_position; /* the request's first token in this step, and its position: keys and values
                                            from there on are not in the cache yet */
    int32_t first_fresh_item; /* its splits over what the step adds: as many as there are units; -1: a prompt's */
} perk_query_tile;

/* One warp's piece of attention: a query tile against KV positions [kv_begin, kv_end), all in the cache, or all fresh
 * and at most PERK_KV_UNIT. */
typedef struct perk_attention_item {
    int32_t query_tile, kv_begin, kv_end, reserved;
} perk_attention_item;

/* Word offsets of the arrays, from the program's maxima. */
typedef struct perk_batch_layout {
    int32_t token_ids, positions, token_request, token_query_tile, logit_rows, query_tiles, attention_items, page_table,
        words;
} perk_batch_layout;

/* ---- a wait that exceeded its limit ---- */
typedef struct perk_hang_report {
    uint32_t worker;
    uint32_t position, role;        /* position: of the task in the worker's list; role: PERK_ROLE_* */
    uint32_t counter, seen, wanted; /* of the ring: counter is the number of the chunk in the worker's stream */
    uint32_t step, complete;        /* complete: all other fields are written */
} perk_hang_report;

enum {
    PERK_ROLE_COUNTER = 1,
    PERK_ROLE_RING_FULL = 2,
    PERK_ROLE_RING_EMPTY = 3,
    PERK_ROLE_INPUT_FULL = 4, /* counter: the number of the slice among the worker's */
    PERK_ROLE_INPUT_EMPTY = 5,
    PERK_ROLE_STEP_END = 6,
    PERK_ROLE_DRAW = 7,  /* counter: the row of logits; seen, wanted: arrivals at meetings of those who draw it */
    PERK_ROLE_DRAWN = 8, /* counter: 0; seen, wanted: rows that others draw */
};

/* ---- profiling: when a worker reached a task, had what it waited for, and had signalled. Of a linear also when its
 * first warp had read its input, had multiplied the last tile, and had that tile's sums of all warps; else 0. ---- */
enum {
    PERK_STAMP_REACHED,
    PERK_STAMP_READY,
    PERK_STAMP_READ,
    PERK_STAMP_MULTIPLIED,
    PERK_STAMP_SHARED,
    PERK_STAMP_DONE,
    PERK_STAMPS
};

/* ---- many steps of one launch: mail.h has the types ---- */
struct perk_post;
struct perk_mail;
struct perk_slot;
struct perk_token_record;
struct perk_draw_bias;
struct perk_draw_record;
struct perk_page_hash;
struct perk_draw_room;
struct perk_draw_call;
struct perk_desk;

typedef struct perk_many_args {
    /* mapped host memory; post null: one step, over the batch that is there */
    struct perk_post *post;
    const struct perk_mail *mails;            /* [mail_mask + 1] */
    const struct perk_slot *host_slots;       /* [slots] */
    const int32_t *host_tokens;               /* [slots][positions] */
    const struct perk_page_hash *host_hashes; /* [slots][pages_per_request] */
    struct perk_token_record *records;        /* [record_mask + 1] */
    struct perk_draw_record *details;         /* [record_mask + 1] of records that say so */
    const struct perk_draw_bias *host_biases; /* [slots][PERK_DRAW_BIASES] */
    /* device memory */
    struct perk_desk *desk;
    uint64_t *schedule;      /* the block of perk_schedule_lay_out */
    struct perk_slot *slots; /* in that block, and the four below */
    int32_t *tokens;
    struct perk_page_hash *hashes;
    struct perk_draw_bias *biases;
    const int32_t *logit_slots;
    struct perk_mail *inbox;          /* [mail_mask + 1] */
    struct perk_token_record *outbox; /* [logit rows + slots] */
    struct perk_draw_record *drawn;   /* [2][logit rows] steps take turns */
    float *adjusted;                  /* [logit rows][PERK_ROW_STRIDE(vocabulary)], as the next */
    uint32_t *seen;                   /* zeros between two draws */
    struct perk_draw_room *rooms;     /* [logit rows] the same */
    struct perk_draw_call *calls;     /* [logit rows] what is to be drawn of the step */
    int32_t *batch;                   /* that of the arguments, to write */
    const int32_t *picks;             /* [logit rows], PERK_ROW_STRIDE(1) words apart */
    const float *logits;              /* [logit rows][PERK_ROW_STRIDE(vocabulary)] that they were picked from */
    uint64_t idle_limit_ns;
    uint32_t mail_mask, record_mask; /* lengths of rings, powers of two, less 1 */
    uint32_t dealt, written;         /* of the post when the launch began */
    uint32_t max_steps;
    uint16_t smaller_tokens; /* of a step of the next smaller program of the executor; 0: there is none */
    uint16_t most_rows;      /* rows of logits of a step of its largest; 0: this is the largest */
    uint32_t end_counter[PERK_RECORD_WAITS];  /* a step is over when these have all their signals */
    uint32_t end_per_step[PERK_RECORD_WAITS]; /* 0: no counter */
} perk_many_args;

/* ---- kernel arguments ---- */
typedef struct perk_kernel_args {
    const perk_task_record *tasks; /* [workers][tasks_per_worker] */
    const uint8_t *weights;        /* the packed stream */
    const uint8_t *constants;      /* norm weights, biases, tables */
    uint8_t *activations;
    uint8_t *kv;
    const int32_t *batch;
    uint32_t *counters;
    uint32_t *hang_claim;   /* device memory; whoever moves it from 0 writes the report; then all leave */
    perk_hang_report *hang; /* mapped host memory */
    uint64_t *stamps;       /* a profiled program: [workers][tasks_per_worker][PERK_STAMPS], global timer, ns */
    uint64_t wait_limit_ns;
    uint32_t step; /* steps that this program has completed before */
    uint32_t reserved;
    perk_many_args many; /* of a program of many steps */
} perk_kernel_args;

#endif
