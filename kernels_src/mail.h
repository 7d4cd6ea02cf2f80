/* What a launch of many steps shares with the host while it runs: mail in, tokens out. Both sides count monotonically,
 * modulo 2^32, and each word has one writer.
 *
 * The host deals out slots. Into a free one it writes a request (perk_slot, as perk_schedule_open leaves it and filled
 * in; prompt; hashes), posts a mail that it has arrived, and leaves the slot alone until the record of its end is there
 * and all mails about it have been dealt with. */
#ifndef PERK_MAIL_H
#define PERK_MAIL_H

#include "schedule.h"

enum { PERK_MAIL_ARRIVAL, PERK_MAIL_CANCEL };

typedef struct perk_mail {
    int32_t kind, slot;
} perk_mail;

/* A token of an answer, and with the last one why it is the last, and what became of the request. */
typedef struct perk_token_record {
    int32_t slot, token;      /* token -1: none; the request begins to run, or with an end, was cancelled */
    uint8_t end, has_details; /* PERK_END_*; not 0: log probabilities lie in the ring beside it */
    uint16_t set_backs;       /* how often it was set back, as far as 16 bits count */
    int32_t found;            /* positions that it found in pages of others */
} perk_token_record;

/* What the host wants of the launch; the larger counts. FULL is the kernel's own: no room for the next step's tokens.
 */
enum { PERK_COMMAND_NONE, PERK_COMMAND_DRAIN, PERK_COMMAND_STOP, PERK_COMMAND_FULL };

/* Why a launch ended. */
enum {
    PERK_LAUNCH_RUNS,
    PERK_LAUNCH_IDLE,    /* nothing unfinished for as long as the idle limit */
    PERK_LAUNCH_STEPS,   /* max_steps are done */
    PERK_LAUNCH_STOPPED, /* PERK_COMMAND_STOP */
    PERK_LAUNCH_FULL,    /* the host has not read its tokens */
    PERK_LAUNCH_TOKEN,   /* the model picked a token that its vocabulary does not have */
    PERK_LAUNCH_STUCK,   /* unfinished requests, and no work among them: cannot be */
    PERK_LAUNCH_LARGER,  /* the next step is for a program of larger ones, */
    PERK_LAUNCH_SMALLER, /* or has been for one of smaller ones for a while */
};

/* In mapped host memory. */
typedef struct perk_post {
    uint32_t posted;  /* mails so far: the host's, as the two below */
    uint32_t read;    /* records read so far */
    uint32_t command; /* PERK_COMMAND_* */
    uint32_t reserved[29];
    uint32_t written;                /* records so far: the kernel's, as all below */
    uint32_t dealt;                  /* mails dealt with so far */
    uint32_t end, steps, unfinished; /* of the launch, once it has ended: PERK_LAUNCH_*; steps done */
    perk_step_size wanted;           /* with LARGER and SMALLER: about what the next steps must have room for */
    uint32_t reserved_too[25];
    perk_standing standing; /* no older than the records that `written` counts */
} perk_post;

/* A step of more tokens is never the one before moved on: a lane of the scheduler looks after each. */
enum { PERK_MOVED_TOKENS = 32 };

/* In device memory; zeros when a launch begins. */
typedef struct perk_desk {
    uint32_t gate;         /* step n of the launch: 4 n + 1 tokens of the one before are to be drawn, 4 n + 2 the launch
                              ends before it, 4 n + 3 it may begin, 4 n + 4 it may, and is the one before moved on */
    uint32_t reserved[31]; /* the gate has a line of its own: all workers poll it */
    uint32_t outbox_count; /* records of the last step in the outbox, */
    uint32_t outbox_step;  /* and that step */
    uint32_t drawn;        /* rows that others than worker 0 have drawn, of those that it called for */
    perk_spare spare;      /* the scheduler's */
    int32_t piece;         /* positions of the cache an item of attention, at most, in the batch that lies there */
    int32_t moved_tokens[2][PERK_MOVED_TOKENS]; /* of steps that are moved on, in turn */
} perk_desk;

/* A row whose token is to be drawn. */
typedef struct perk_draw_call {
    int32_t row, slot;
    int32_t best;  /* the argmax of its logits */
    int32_t count; /* in the first call: of all */
} perk_draw_call;

#endif
