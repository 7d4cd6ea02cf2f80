/* The engine: a model folder on one device, requests in, tokens out.
 *
 *     perk_engine *engine;
 *     perk_engine_open(&engine, "folder", NULL, &err);
 *     perk_engine_generate_text(engine, "Once upon a time", NULL, print_piece, NULL, NULL, &err);
 *     perk_engine_free(engine);
 *
 * An engine is used by one thread at a time. Its tokenizer may be used by any thread. A thread's current CUDA context
 * is the same after every call as before.
 */
#ifndef PERK_ENGINE_H
#define PERK_ENGINE_H
#include "perk/base.h"
#include "perk/config.h"
#include "perk/tokenizer.h"
#ifdef __cplusplus
extern "C" {
#endif

typedef struct perk_engine perk_engine;
typedef struct perk_request perk_request;

typedef enum perk_backend {
    PERK_BACKEND_AUTO = 0,      /* the GPU where there is one, else the reference executor */
    PERK_BACKEND_GPU = 1,       /* fails where there is no usable GPU */
    PERK_BACKEND_REFERENCE = 2, /* plain C on the CPU */
} perk_backend;

enum { PERK_MAX_PROGRAMS = 8 };

/* Who fills steps, and how they follow each other on a GPU; the reference executor knows single ones alone. In
 * completion and online the kernel batches, picks (by all that perk_sampling says) and ends by itself, in launches of
 * many steps; where the next steps are for another of the programs, a launch of that follows by itself. A model for
 * which there is no such kernel is refused. */
typedef enum perk_mode {
    PERK_MODE_SINGLE = 0,     /* a launch a step: who calls perk_engine_step owns the loop */
    PERK_MODE_COMPLETION = 1, /* a launch until nothing is unfinished, or of steps_a_launch steps */
    PERK_MODE_ONLINE = 2,     /* the kernel stays: requests go to it, and tokens come from it, while it runs. It ends by
                                 itself when nothing was unfinished for idle_limit_ms; the next request brings it back */
    PERK_MODE_CALLER = 3,     /* a launch a step, which the caller fills, its pages included: perk_step_run of step.h.
                                 The engine takes no requests */
} perk_mode;

typedef struct perk_engine_options {
    perk_backend backend;
    int32_t device;           /* ordinal of the CUDA device */
    perk_config config;       /* zero: defaults */
    int32_t threads;          /* of the reference executor and of loading; 0: all cores */
    int32_t portable;         /* 1: emit nothing newer than sm_80 instructions */
    int32_t unchecked;        /* 1: launch without running the plan checker */
    int32_t random_weights;   /* 1: the path may be a lone config.json; weights are drawn from `seed` */
    uint64_t seed;            /* of random weights */
    int32_t precision;        /* of the reference executor: 0 as the checkpoint asks, 1 bf16 as on the GPU, 2 fp32 */
    const char *cache_folder; /* NULL: PERK_CACHE_DIR, then XDG, then HOME */
    int32_t no_cache;
    perk_log log;
    perk_progress progress;
    int32_t no_prefix_sharing; /* 1: requests that begin alike share no pages of the KV cache */
    perk_mode mode;
    int32_t steps_a_launch; /* PERK_MODE_COMPLETION: at most; 0: no limit */
    int32_t idle_limit_ms;  /* PERK_MODE_ONLINE; 0: 100 */
    /* Programs of the GPU, by the tokens of a step that each is for, in any order; zeros are skipped. Of those that a
     * step fits, the smallest runs it. The program for max_num_batched_tokens is always there; when that is 0, it is
     * the largest number here. { max_num_batched_tokens } is one program alone. All 0: 1 and 8 as well, where
     * they are no more than half of max_num_batched_tokens: a step of one request then pays for nothing that others
     * need, and 8 tokens are what one product of the tensor cores takes. Of these defaults, those that cannot be had
     * (no compiler, and not in the cache) are left out. In completion and online, some steps run in a larger program
     * than they need, for a change costs a launch. */
    int32_t program_tokens[PERK_MAX_PROGRAMS];
} perk_engine_options;

/* One of the programs that an engine holds. */
typedef struct perk_program_report {
    int32_t tokens;    /* of the largest step that it runs */
    int32_t cache_hit; /* the cubin came from the cache */
    double plan_ms, check_ms, emit_ms, compile_ms, module_ms;
    int32_t registers, spill_bytes, shared_bytes, cubin_bytes;
    uint64_t memory_bytes; /* on the device, of its own: activations, task lists, batch, counters */
} perk_program_report;

/* How the start went, in milliseconds; phases that did not happen are 0. */
typedef struct perk_start_report {
    perk_backend backend;
    char device[128], arch[16];
    int32_t cache_hit; /* the cubins of all programs came from the cache */
    double open_ms;    /* config, graph, tokenizer, checkpoint headers */
    double driver_ms;  /* opening the driver and finding the device */
    double context_ms; /* making the context; runs beside plan, check, emit and compile */
    /* Plan, check, emit and compile run side by side for all programs: the longest counts. Modules are loaded one after
     * the other. */
    double plan_ms, check_ms, emit_ms, compile_ms, module_ms;
    double weights_ms;
    uint64_t weights_bytes;
    double total_ms;
    int32_t registers, spill_bytes, shared_bytes, cubin_bytes; /* of the program for the largest steps */
    int32_t program_count;                                     /* 0 on the reference executor */
    perk_program_report programs[PERK_MAX_PROGRAMS];           /* by rising tokens */
} perk_start_report;

typedef struct perk_logit_bias {
    int32_t token;
    float bias; /* -100 to 100, added to the token's logit; biases of a token named twice add up */
} perk_logit_bias;

enum { PERK_MAX_STOP_TOKENS = 16, PERK_MAX_LOGIT_BIAS = 4096, PERK_MAX_TOP_LOGPROBS = 20 };
enum { PERK_MAX_STOP_STRINGS = 8, PERK_MAX_STOP_STRING = 256 /* bytes of one */ };

/* Zero-initialised is right everywhere: greedy, until the model's end tokens or max_seq_length.
 *
 * A token's logit l goes through, in this order:
 *   l += bias
 *   l = l > 0 ? l / repetition_penalty : l * repetition_penalty   if the token is in the prompt or the answer
 *   l -= frequency_penalty * (times that it is in the answer)
 *   l -= presence_penalty                                         if it is in the answer
 * then temperature, top_k, top_p, min_p (src/sampler.h has the exact distribution); greedy takes the largest l. The
 * repetition penalty is that of CTRL (arXiv 1909.05858) as transformers' RepetitionPenaltyLogitsProcessor and vLLM have
 * it; bias, frequency and presence are those of OpenAI's API reference, and vLLM's SamplingParams counts them alike. */
typedef struct perk_sampling {
    float temperature;           /* 0: greedy */
    int32_t top_k;               /* 0: all */
    float top_p;                 /* 0 or 1: all */
    float min_p;                 /* 0: none */
    uint64_t seed;               /* same seed, same tokens */
    int32_t max_tokens;          /* 0: as many as fit */
    int32_t ignore_eos;          /* 1: the model's end tokens do not end the request */
    float repetition_penalty;    /* above 0, at most 100; 0 or 1: none */
    float presence_penalty;      /* -2 to 2; 0: none */
    float frequency_penalty;     /* -2 to 2; 0: none */
    const perk_logit_bias *bias; /* [bias_count], copied by the call that takes the sampling */
    int32_t bias_count;          /* at most PERK_MAX_LOGIT_BIAS */
    const int32_t *stop_tokens;  /* [stop_token_count], copied: they end the request as the model's end tokens do, */
    int32_t stop_token_count;    /* also with ignore_eos; at most PERK_MAX_STOP_TOKENS */
    int32_t logprobs;            /* 1: log probabilities of the tokens, see perk_request_logprobs, */
    int32_t top_logprobs;        /* and of so many of the likeliest at each place; at most PERK_MAX_TOP_LOGPROBS */
    /* [stop_string_count], copied: UTF-8 that ends the request with the token that completes it in the answer's text,
     * as an end token would. The tokens are all there; text that perk makes of them ends before it. */
    const char *const *stop_strings;
    int32_t stop_string_count; /* at most PERK_MAX_STOP_STRINGS; only with a tokenizer */
} perk_sampling;

typedef struct perk_logprob {
    int32_t token;
    float logprob; /* natural logarithm, of the model's own distribution: before bias, penalties and temperature */
} perk_logprob;

typedef enum perk_finish {
    PERK_FINISH_NONE = 0,   /* still running */
    PERK_FINISH_STOP = 1,   /* an end token or a stop string */
    PERK_FINISH_LENGTH = 2, /* max_tokens or max_seq_length */
    PERK_FINISH_CANCELLED = 3,
} perk_finish;

/* Opens a model folder on a device. `options` may be NULL. The pool must hold one request of max_seq_length:
 * where max_num_pages does not, a max_seq_length of 0 becomes what it holds, and any other is refused with PERK_LIMIT.
 * With PERK_BACKEND_AUTO a machine without driver or device gets the reference executor; any other failure of the GPU
 * is an error. */
PERK_API perk_status perk_engine_open(perk_engine **out, const char *model_folder, const perk_engine_options *options,
                                      perk_error *err);
/* Frees the engine and all its requests. */
PERK_API void perk_engine_free(perk_engine *engine);

PERK_API const perk_start_report *perk_engine_report(const perk_engine *engine);
PERK_API const perk_config *perk_engine_config(const perk_engine *engine);
/* NULL when the folder has no tokenizer.json. Owned by the engine. */
PERK_API const perk_tokenizer *perk_engine_tokenizer(const perk_engine *engine);
PERK_API int32_t perk_engine_vocab_size(const perk_engine *engine);

/* ---- requests: submit, step until finished, read the tokens ---- */

/* Queues a request; `prompt` (1 or more ids) is copied; `sampling` may be NULL. Prompt and answer together have at
 * most max_seq_length tokens. Fails with PERK_LIMIT when the prompt leaves no room for an answer, with
 * PERK_INVALID_ARGUMENT for an id outside the vocabulary or sampling numbers out of range, and with PERK_NOT_FOUND for
 * stop strings without a tokenizer. */
PERK_API perk_status perk_engine_submit(perk_engine *engine, const int32_t *prompt, size_t prompt_length,
                                        const perk_sampling *sampling, perk_request **out, perk_error *err);
/* Runs one step over the running requests, the oldest first; with PERK_MODE_COMPLETION, one launch; with
 * PERK_MODE_ONLINE, returns when some request has new tokens or has ended, and the kernel goes on meanwhile. *running:
 * how many are unfinished after it; 0 also when there was nothing to do. A step that fails closes the engine: every
 * later call on it fails in the same way. */
PERK_API perk_status perk_engine_step(perk_engine *engine, int32_t *running, perk_error *err);
/* Ends a kernel that stays, after the step that it is at: the GPU is free for others until the next perk_engine_step,
 * with which all goes on. Nothing happens where none runs. */
PERK_API perk_status perk_engine_pause(perk_engine *engine, perk_error *err);
/* The tokens made so far (the end token included); valid until the request is freed, and more follow in place. */
PERK_API const int32_t *perk_request_tokens(const perk_request *request, size_t *count);
PERK_API perk_finish perk_request_finish(const perk_request *request);
/* The log probabilities at place `place` of the answer: first the token that was chosen, then the likeliest
 * top_logprobs, the best first, ties by the lower id. `*count` (may be NULL) is how many; NULL and 0 when the request
 * did not ask for them or the place has no token yet. Valid until the request is freed. */
PERK_API const perk_logprob *perk_request_logprobs(const perk_request *request, size_t place, size_t *count);
/* Ends the request if it runs and gives back its pages; its tokens stay readable. */
PERK_API void perk_request_cancel(perk_request *request);
/* Cancels the request if it runs, and frees it. */
PERK_API void perk_request_free(perk_request *request);

/* Times in milliseconds; a phase that has not begun is 0, one under way counts up to now. */
typedef struct perk_request_stats {
    int32_t prompt_tokens, answer_tokens;
    int32_t found_tokens;     /* positions found in pages that others, or it before it was set back, had written */
    int32_t set_backs;        /* how often older requests needed its pages, so that it was computed again */
    double queue_ms;          /* from submission to the first step that worked on it */
    double prefill_ms;        /* from there to the first token */
    double decode_ms;         /* from there to the end */
    double tokens_per_second; /* of the answer after its first token; 0 as long as there is no second one */
} perk_request_stats;

PERK_API void perk_request_statistics(const perk_request *request, perk_request_stats *out);

typedef struct perk_engine_stats {
    /* since the engine was opened */
    uint64_t submitted, finished; /* requests; finished: cancelled ones, too */
    uint64_t steps, step_tokens;  /* steps for requests, and the tokens that they computed */
    uint64_t answer_tokens;
    uint64_t found_tokens; /* not computed, because their pages were found */
    uint64_t set_backs;    /* requests that lost their pages to older ones */
    uint64_t evictions;    /* pages kept to be found again whose room was needed */
    double batch_fill;     /* step_tokens / (steps * max_num_batched_tokens); 0 before the first step */
    uint64_t program_steps[PERK_MAX_PROGRAMS];    /* that each of the report's programs ran; those of logits, too */
    uint64_t program_launches[PERK_MAX_PROGRAMS]; /* its launches; with single steps, as many */
    /* now */
    int32_t waiting, running; /* unfinished requests without and with pages */
    int32_t pages, pages_in_use;
    int32_t pages_kept; /* in use by nobody, and kept to be found again */
} perk_engine_stats;

PERK_API void perk_engine_statistics(const perk_engine *engine, perk_engine_stats *out);

/* ---- conveniences over the above ---- */

/* Called with each new token, and with the complete UTF-8 text that it adds (may be empty, always is without a
 * tokenizer; NUL-terminated; valid during the call). Special tokens add no text, and what a stop string may begin with
 * waits for the token that decides it. Non-zero stops. */
typedef int (*perk_on_token)(void *user, int32_t token, const char *text, size_t size);

typedef struct perk_generation {
    int32_t prompt_tokens, tokens;
    perk_finish finish;
    double prefill_ms, decode_ms; /* until the first token; after it */
} perk_generation;

/* Runs steps until this one request is finished; others that were submitted run along. `sampling`, `on_token` and
 * `generation` may be NULL. */
PERK_API perk_status perk_engine_generate(perk_engine *engine, const int32_t *prompt, size_t prompt_length,
                                          const perk_sampling *sampling, perk_on_token on_token, void *user,
                                          perk_generation *generation, perk_error *err);
/* The same from text, encoded as Hugging Face does by default: special tokens in it are recognised. PERK_NOT_FOUND when
 * the folder has no tokenizer. */
PERK_API perk_status perk_engine_generate_text(perk_engine *engine, const char *prompt, const perk_sampling *sampling,
                                               perk_on_token on_token, void *user, perk_generation *generation,
                                               perk_error *err);
/* Teacher-forced logits: `out` [count][vocab] fp32, row i after reading ids[0..i]. Runs alone, in chunks of the smaller
 * of max_num_batched_tokens and max_num_logit_rows, all through the program for the largest steps; requests under way
 * may be set back for it (their caches are computed again) but lose nothing. */
PERK_API perk_status perk_engine_logits(perk_engine *engine, const int32_t *ids, size_t count, float *out,
                                        perk_error *err);

#ifdef __cplusplus
}
#endif
#endif
