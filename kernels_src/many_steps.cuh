// Many steps of one launch. All workers run their lists again and again; between two steps warp 0 of worker 0 (the
// scheduler) takes in the tokens, makes the next batch, and opens the gate at which all workers wait. A warp that has
// nothing else to do (the clerk, of worker 0 as well) carries mail in and tokens out while steps run, so that nobody on
// the path of a step ever looks at host memory. Weight streams know no gate: rings are full when a step begins.
//
// Why one batch, and one set of activations, are enough: the gate opens only when the counters of the step's end are
// complete, and these prove that all of its tasks have signalled (the checker holds that against the plan). So nobody
// reads or writes for the step before any more.
//
// Where an executor has several programs, a launch ends when the next step is for another one of them, which goes on
// with the same schedule and page tables.
#pragma once

#include "sample.cuh"

namespace perk {

constexpr uint32_t kClerk = PERK_CONSUMER_WARPS + 2; // warp of worker 0; the one before it feeds wide linears
constexpr uint32_t kPickStride = PERK_ROW_STRIDE(1);
constexpr uint32_t kClerkPauseNs = 500, kIdlePauseNs = 500, kGatePauseNs = 100;
constexpr uint32_t kPollsBeforePause = 4096;                                         // of the gate: some milliseconds
constexpr uint32_t kGateDraws = 1, kGateEnds = 2, kGateBegins = 3, kGateMovesOn = 4; // beside 4 a step
constexpr uint32_t kNextRuns = 0, kNextEnds = 1, kNextDraws = 2, kNextMovesOn = 3;   // what is to be done now

// ---- between scheduler and clerk: a word of shared memory each way ----
// The scheduler tells the round (one more with every outbox that it has filled), the mails it has dealt with, and
// whether that was all; the clerk answers with the round that it has served, the mails that lie in the inbox, and the
// host's command.
constexpr uint32_t kRounds = 1 << 13;
constexpr uint32_t kLast = 1u << 31;
__device__ __forceinline__ uint32_t tell_word(uint32_t round, uint32_t dealt) {
    return round % kRounds << 18 | (dealt & 0xffff);
}
__device__ __forceinline__ uint32_t serve_word(uint32_t round, uint32_t command, uint32_t mailed) {
    return round % kRounds << 18 | command << 16 | (mailed & 0xffff);
}
__device__ __forceinline__ uint32_t round_of(uint32_t word) { return word >> 18 & (kRounds - 1); }
__device__ __forceinline__ uint32_t command_of(uint32_t word) { return word >> 16 & 3; }
__device__ __forceinline__ uint32_t mails_of(uint32_t word) { return word & 0xffff; }

__device__ __forceinline__ uint32_t load_told(const Worker &w) { return load_shared4(w.shared + SharedMap::told); }
__device__ __forceinline__ uint32_t load_served(const Worker &w) { return load_shared4(w.shared + SharedMap::served); }

// ---- the clerk ----

// Words of host memory to device memory.
__device__ __forceinline__ void fetch_words(const Worker &w, void *to, const void *from, uint32_t words) {
    uint32_t lane = w.lane;
    forget(lane); // as below
#pragma unroll 4
    for (uint32_t i = lane; i < words; i += 32)
        static_cast<uint32_t *>(to)[i] = load_host4(static_cast<const uint32_t *>(from) + i);
}

// A request that the host has put into a slot. Its prompt first: the slot says how long that is.
__device__ __forceinline__ void fetch_request(const Worker &w, uint32_t slot) {
    const perk_many_args &many = w.args.many;
    const perk_slot *from = many.host_slots + slot;
    const uint64_t tokens = uint64_t(slot) * program::max_seq_length,
                   pages = uint64_t(slot) * program::pages_per_request;
    const uint32_t length = load_host4(&from->prompt_length), hashes = load_host4(&from->hash_count);
    fetch_words(w, many.tokens + tokens, many.host_tokens + tokens, min(length, program::max_seq_length));
    const uint32_t biases = load_host4(&from->rule.bias_count);
    fetch_words(w, many.hashes + pages, many.host_hashes + pages, 4 * min(hashes, program::pages_per_request));
    fetch_words(w, many.biases + uint64_t(slot) * PERK_DRAW_BIASES,
                many.host_biases + uint64_t(slot) * PERK_DRAW_BIASES,
                min(biases, uint32_t(PERK_DRAW_BIASES)) * sizeof(perk_draw_bias) / 4);
    fetch_words(w, many.slots + slot, from, sizeof(perk_slot) / 4);
}

// Copies the mails from number `mailed` on into the inbox, with what belongs to them.
__device__ __forceinline__ uint32_t fetch_mail(const Worker &w, uint32_t mailed, uint32_t posted) {
    const perk_many_args &many = w.args.many;
    fence_system(); // the host wrote them before it counted them
    for (; mailed != posted; mailed++) {
        const perk_mail *mail = many.mails + (mailed & many.mail_mask);
        const int32_t kind = load_host4(&mail->kind), slot = load_host4(&mail->slot);
        if (kind == PERK_MAIL_ARRIVAL) fetch_request(w, slot);
        if (w.lane == 0) many.inbox[mailed & many.mail_mask] = {kind, slot};
    }
    return mailed;
}

// What belongs to records of the outbox: of its first ones, a record a row of logits.
__device__ __forceinline__ void send_details(const Worker &w, uint32_t written, uint32_t count) {
    const perk_many_args &many = w.args.many;
    constexpr uint32_t kPieces = sizeof(perk_draw_record) / 16;
    const perk_draw_record *drawn = many.drawn + load_coherent4(&many.desk->outbox_step) % 2 * program::max_logit_rows;
    uint32_t lane = w.lane;
    forget(lane); // as below
#pragma unroll 1
    for (uint32_t i = 0; i < min(count, program::max_logit_rows); i++) {
        const uint32_t ending = load_coherent4(reinterpret_cast<const uint32_t *>(many.outbox + i) + 2);
        if ((ending >> 8 & 0xff) == 0 || lane >= kPieces) continue;
        perk_draw_record *to = many.details + ((written + i) & many.record_mask);
        reinterpret_cast<Vec16 *>(to)[lane] = load_coherent16(reinterpret_cast<const Vec16 *>(drawn + i) + lane);
    }
}

// How requests and pages stand. The scheduler may be at work on it again, if the clerk is late: then words are of
// different steps.
__device__ __forceinline__ void send_standing(const Worker &w) {
    static_assert(sizeof(perk_standing) <= 32 * 4, "a word a lane");
    uint32_t lane = w.lane;
    forget(lane); // or addresses would be kept over the clerk's rounds, who has few registers
    if (lane < sizeof(perk_standing) / 4)
        reinterpret_cast<uint32_t *>(&w.args.many.post->standing)[lane] =
            load_coherent4(reinterpret_cast<const uint32_t *>(w.args.many.schedule) + lane);
}

// The outbox to the host's ring; counted when all of it is there.
__device__ __forceinline__ uint32_t send_records(const Worker &w, uint32_t written) {
    const perk_many_args &many = w.args.many;
    const uint32_t count = many.desk->outbox_count;
    if (count == 0) return written;
    for (uint32_t i = w.lane; i < count; i += 32)
        *reinterpret_cast<Vec16 *>(many.records + ((written + i) & many.record_mask)) =
            load_coherent16(many.outbox + i);
    send_details(w, written, count);
    fence_system();
    __syncwarp();
    if (w.lane == 0) store_release_system(&many.post->written, written + count);
    return written + count;
}

__device__ __forceinline__ void serve(const Worker &w) {
    const perk_many_args &many = w.args.many;
    uint32_t round = 0, written = many.written, mailed = many.dealt, dealt = many.dealt, told;
    do {
        told = __shfl_sync(0xffffffffu, load_told(w), 0);
        fence_block();
        if (round_of(told) != round) {
            send_standing(w);
            written = send_records(w, written);
        }
        round = round_of(told);
        const Vec16 wanted = load_host16(many.post); // posted, read, command
        // All lanes fetch the same mails, whatever was posted between their loads: a slot is copied by all of them.
        mailed = fetch_mail(w, mailed, __shfl_sync(0xffffffffu, wanted.x, 0));
        const bool is_full = many.record_mask + 1 - (written - wanted.y) < 2 * program::outbox_records;
        const uint32_t command = is_full ? uint32_t(PERK_COMMAND_FULL) : wanted.z & 3;
        fence_block();
        __syncwarp();
        if (w.lane == 0) {
            store_shared4(w.shared + SharedMap::served, serve_word(round, command, mailed));
            const uint32_t dealt_now = mailed - ((mailed - told) & 0xffff);
            if (dealt_now != dealt) store_release_system(&many.post->dealt, dealt_now);
            dealt = dealt_now;
        }
        pause(kClerkPauseNs);
    } while (!(told & kLast) && load_coherent4(w.args.hang_claim) == 0);
}

// ---- the scheduler: lane 0, but for what all lanes do faster ----

constexpr perk_schedule_limits kLimits = {program::slots,          program::max_tokens,     program::max_requests,
                                          program::max_logit_rows, program::max_seq_length, program::page_size,
                                          program::max_num_pages};

// The batch lies where the workers read it; only what they do not need is the schedule's own.
__device__ __forceinline__ void bind_schedule(const Worker &w, perk_schedule &s) {
    int32_t *batch = w.args.many.batch;
    perk_schedule_bind(&s, &kLimits, w.args.many.schedule);
    s.most_rows = w.args.many.most_rows;
    s.batch.token_ids = batch + program::batch_token_ids;
    s.batch.positions = batch + program::batch_positions;
    s.batch.token_request = batch + program::batch_token_request;
    s.batch.logit_rows = batch + program::batch_logit_rows;
    s.batch.page_table = batch + program::batch_page_table;
}

// What attention needs of the batch, and how large all of it is.
__device__ __forceinline__ void finish_batch(const Worker &w, const perk_batch &batch) {
    int32_t *words = w.args.many.batch;
    perk_attention_cut cut{};
    if constexpr (program::max_attention_items > 0) {
        cut.tokens_per_tile = program::tokens_per_query_tile;
#if PERK_WIDE
        cut.prompt_slice = program::prompt_tokens;
#endif
        cut.max_items = program::max_attention_items;
        cut.warps = program::attention_warps;
        cut.pieces = program::attention_pieces;
        cut.max_positions = program::max_seq_length;
        cut.tiles = reinterpret_cast<perk_query_tile *>(words + program::batch_query_tiles);
        cut.items = reinterpret_cast<perk_attention_item *>(words + program::batch_attention_items);
        cut.token_query_tile = words + program::batch_token_query_tile;
        perk_cut_attention(&batch, &cut);
        w.args.many.desk->piece = cut.piece;
    }
    words[PERK_BATCH_NUM_TOKENS] = batch.num_tokens;
    words[PERK_BATCH_NUM_LOGIT_ROWS] = batch.num_logit_rows;
    words[PERK_BATCH_NUM_ATTENTION_ITEMS] = cut.item_count;
}

struct Outbox {
    perk_token_record *records;
    uint32_t count;
    // The record of a request that goes on.
    static __device__ __forceinline__ Vec16 of(int32_t slot, int32_t token, bool has_details) {
        return {uint32_t(slot), uint32_t(token), uint32_t(has_details) << 8, 0};
    }
    __device__ __forceinline__ void put(int32_t slot, int32_t token, const perk_slot &r, bool has_details = false) {
        Vec16 record = of(slot, token, has_details);
        record.z |= uint32_t(r.end);
        if (r.end != PERK_END_NONE) {
            record.z |= uint32_t(perk_lesser(r.set_backs, 0xffff)) << 16;
            record.w = uint32_t(r.found);
        }
        *reinterpret_cast<Vec16 *>(records + count++) = record;
    }
};

__device__ __forceinline__ bool has_details(const perk_slot &r) { return r.rule.samples != 0 && r.rule.logprobs != 0; }

// Takes in the step that is done, of which `picks` are the tokens.
__device__ __forceinline__ void commit_step(const Worker &w, perk_schedule &s, const int32_t *picks, Outbox &outbox) {
    s.batch.num_tokens = w.num_tokens();
    s.batch.num_logit_rows = w.num_logit_rows();
    perk_schedule_commit(&s, picks);
    for (int32_t row = 0; row < s.batch.num_logit_rows; row++) {
        const int32_t slot = s.logit_slots[row];
        const perk_slot &r = s.slots[slot];
        outbox.put(slot, picks[row], r, has_details(r));
    }
}

__device__ __forceinline__ uint32_t deal_with_mail(const Worker &w, perk_schedule &s, uint32_t dealt, uint32_t mailed,
                                                   Outbox &outbox) {
    for (; dealt != mailed; dealt = (dealt + 1) & 0xffff) {
        const perk_mail mail = w.args.many.inbox[dealt & w.args.many.mail_mask];
        const int32_t state = s.slots[mail.slot].state;
        if (mail.kind == PERK_MAIL_ARRIVAL) {
            perk_schedule_arrive(&s, mail.slot);
        } else if (state == PERK_SLOT_WAITING || state == PERK_SLOT_RUNNING) { // else it has ended before
            perk_schedule_cancel(&s, mail.slot);
            outbox.put(mail.slot, -1, s.slots[mail.slot]);
        }
    }
    return dealt;
}

// Says of those that run for the first time that they do. Before the step, `running` did.
__device__ __forceinline__ void tell_starts(const perk_schedule &s, int32_t running, Outbox &outbox) {
    for (int32_t place = running; place < s.state->running; place++)
        if (s.slots[s.order[place]].set_backs == 0) outbox.put(s.order[place], -1, s.slots[s.order[place]]);
}

// Hands the outbox to the clerk. `last`: kLast with the last one.
__device__ __forceinline__ void tell(const Worker &w, uint32_t round, uint32_t dealt, const Outbox &outbox,
                                     uint32_t last) {
    w.args.many.desk->outbox_count = outbox.count;
    w.args.many.desk->outbox_step = w.step(); // the one that was taken in
    fence_block();
    store_shared4(w.shared + SharedMap::told, tell_word(round, dealt) | last);
}

// Until the clerk has served the round: its outbox is free, and the post has been looked at since.
__device__ __forceinline__ uint32_t await_clerk(const Worker &w, uint32_t round) {
    uint32_t served;
    while (round_of(served = load_served(w)) != round % kRounds && load_coherent4(w.args.hang_claim) == 0) pause(20);
    fence_block();
    return served;
}

// With nothing to do, until there is mail, a command, or the limit.
__device__ __forceinline__ void await_mail(const Worker &w, uint32_t dealt) {
    const uint64_t start = global_timer();
    for (;;) {
        const uint32_t served = load_served(w);
        if (mails_of(served) != dealt || command_of(served) != PERK_COMMAND_NONE) return;
        if (global_timer() - start > w.args.many.idle_limit_ns) return;
        pause(kIdlePauseNs);
    }
}

// Why the launch ends here, or PERK_LAUNCH_RUNS. `has_waited`: for mail, in vain.
__device__ __forceinline__ uint32_t judge(const Worker &w, const perk_schedule &s, uint32_t command, uint32_t step,
                                          bool has_waited) {
    if (command == PERK_COMMAND_FULL) return PERK_LAUNCH_FULL;
    if (command == PERK_COMMAND_STOP) return PERK_LAUNCH_STOPPED;
    if (s.state->unfinished == 0 && (has_waited || command == PERK_COMMAND_DRAIN)) return PERK_LAUNCH_IDLE;
    return step == w.args.many.max_steps ? PERK_LAUNCH_STEPS : PERK_LAUNCH_RUNS;
}

// The next step, and why the launch ends where it is not for this program.
__device__ __forceinline__ uint32_t fill_step(const Worker &w, perk_schedule &s) {
    perk_schedule_fill(&s);
    if (s.batch.num_tokens == 0) return PERK_LAUNCH_STUCK;
    const int32_t size = perk_schedule_judge_size(&s, w.args.many.smaller_tokens, &w.args.many.desk->spare);
    return size == PERK_SIZE_FITS     ? PERK_LAUNCH_RUNS
           : size == PERK_SIZE_LARGER ? PERK_LAUNCH_LARGER
                                      : PERK_LAUNCH_SMALLER;
}

__device__ __forceinline__ void end_launch(const Worker &w, perk_schedule &s, uint32_t why, uint32_t step) {
    perk_post *post = w.args.many.post;
    if (why == PERK_LAUNCH_LARGER || why == PERK_LAUNCH_SMALLER) {
        perk_schedule_drop(&s);
        post->wanted = why == PERK_LAUNCH_LARGER ? perk_schedule_demand(&s) : w.args.many.desk->spare.most;
    }
    post->steps = step;
    post->unfinished = s.state->unfinished;
    post->end = why;
}

// Makes the batch of step `step` of the launch, after the one before was taken in; waits for work where there is none.
// Returns false when the launch ends.
__device__ __forceinline__ bool prepare_step(const Worker &w, const int32_t *picks, bool is_bad, uint32_t step) {
    perk_schedule s;
    bind_schedule(w, s);
    Outbox outbox{w.args.many.outbox, 0};
    uint32_t told = load_told(w), round = round_of(told), dealt = mails_of(told), why = PERK_LAUNCH_RUNS;
    uint32_t served = await_clerk(w, round);
    int32_t running = program::max_requests;
    if (step > 0 && !is_bad) commit_step(w, s, picks, outbox);
    for (bool has_waited = false;; has_waited = true) {
        const bool has_mail = mails_of(served) != dealt;
        dealt = deal_with_mail(w, s, dealt, mails_of(served), outbox);
        why = is_bad ? uint32_t(PERK_LAUNCH_TOKEN) : judge(w, s, command_of(served), step, has_waited && !has_mail);
        if (why == PERK_LAUNCH_RUNS && s.state->unfinished > 0) {
            running = s.state->running;
            why = fill_step(w, s);
        }
        if (why != PERK_LAUNCH_RUNS || s.state->unfinished > 0) break;
        tell(w, ++round, dealt, outbox, 0); // tokens do not wait for the next request
        outbox.count = 0;
        await_clerk(w, round);
        await_mail(w, dealt);
        served = load_served(w);
        fence_block();
    }
    const bool runs = why == PERK_LAUNCH_RUNS;
    if (runs)
        finish_batch(w, s.batch);
    else
        end_launch(w, s, why, step);
    store_release_gpu(&w.args.many.desk->gate, 4 * step + (runs ? kGateBegins : kGateEnds));
    tell_starts(s, running, outbox);
    tell(w, round + 1, dealt, outbox, runs ? 0 : kLast);
    return runs;
}

// ---- tokens that are drawn ----
// Where argmax has left the bit that says so, the scheduler calls all workers to draw before it takes the tokens in:
// the gate is at a step of its own. Nobody is at work on the step any more, and nobody begins the next one before all
// tokens are there, so that logits stay as they are. The workers are dealt to the rows in groups.

// Whether the row's token is drawn, and not just the largest logit's. Known since the step began.
template <uint32_t kVocabulary>
__device__ __forceinline__ bool is_to_draw(const Worker &w, uint32_t row) {
    const perk_many_args &many = w.args.many;
    if (many.post == nullptr || row >= w.num_logit_rows()) return false;
    const uint32_t slot = load_coherent4(many.logit_slots + row);
    return load_coherent4(&many.slots[slot].rule.samples) != 0;
}

// Of so many rows, how many are drawn at a time, by how many workers each.
struct Dealt {
    uint32_t groups, members;
    __device__ __forceinline__ explicit Dealt(uint32_t rows)
        : groups(min(rows, gridDim.x)), members(min(gridDim.x / max(groups, 1u), uint32_t(PERK_DRAW_BINS))) {}
};

// A row of logits, and the request that it is for.
struct DrawInput {
    static constexpr uint32_t kStride = PERK_ROW_STRIDE(program::vocab_size);
    const Worker &w;
    const perk_draw_call call;

    __device__ __forceinline__ const perk_many_args &many() const { return w.args.many; }
    __device__ __forceinline__ const perk_slot *request() const { return many().slots + call.slot; }
    __device__ __forceinline__ uint32_t row() const { return call.row; }
    __device__ __forceinline__ const float *logits() const { return many().logits + uint64_t(row()) * kStride; }
    __device__ __forceinline__ const perk_draw_rule *rule() const { return &request()->rule; }
    __device__ __forceinline__ uint32_t length() const { return load_coherent4(&request()->length); }
    __device__ __forceinline__ uint32_t prompt_length() const { return load_coherent4(&request()->prompt_length); }
    __device__ __forceinline__ const int32_t *tokens() const {
        return many().tokens + uint64_t(call.slot) * program::max_seq_length;
    }
    __device__ __forceinline__ const perk_draw_bias *biases() const {
        return many().biases + uint64_t(call.slot) * PERK_DRAW_BIASES;
    }
    __device__ __forceinline__ float *adjusted() const { return many().adjusted + uint64_t(row()) * kStride; }
    __device__ __forceinline__ uint32_t *seen() const { return many().seen + uint64_t(row()) * kStride; }
    __device__ __forceinline__ perk_draw_room *room() const { return many().rooms + row(); }
    __device__ __forceinline__ perk_draw_record *record() const {
        return many().drawn + w.step() % 2 * program::max_logit_rows + row();
    }
};

// By all consumers of a worker that was called: the rows of its group. Every row's first worker keeps the token.
__device__ __forceinline__ void draw_rows(const Worker &w) {
    const perk_many_args &many = w.args.many;
#pragma unroll 1
    for (uint32_t turn = 0;; turn++) {
        Vec16 call = load_coherent16(many.calls); // mostly the only one; how many there are, anew: nothing is kept
        const Dealt dealt(call.w);
        const uint32_t group = w.index() / dealt.members, i = group + turn * dealt.groups;
        if (group >= dealt.groups || i >= call.w) return;
        if (i > 0) call = load_coherent16(many.calls + i);
        const DrawInput in{w, {int32_t(call.x), int32_t(call.y), int32_t(call.z), 0}};
        uint32_t token = call.z;
        Draw<program::vocab_size, DrawInput> draw(w, in, {group * dealt.members, dealt.members});
        if (!draw.run(token) || w.thread != 0) continue;
        in.room()->token = token;
        if (w.index() != 0 && !load_shared4(w.shared + SharedMap::given_up)) add_release_gpu(&many.desk->drawn, 1);
    }
}

// Until all are there that were called for.
__device__ __forceinline__ void await_drawn(const Worker &w) {
    const perk_many_args &many = w.args.many;
    const uint32_t rows = load_coherent4(&many.calls->count), groups = Dealt(rows).groups;
    const uint32_t own = (rows + groups - 1) / groups; // worker 0 has drawn these
    if (w.lane == 0 && rows > own) await_word(w, &many.desk->drawn, rows - own, PERK_ROLE_DRAWN, 0);
    __syncwarp();
}

// ---- a step moved on ----
// Most steps are the one before with a token more for each request: no mail, nobody ends, no page to be had. Then the
// scheduler opens the gate with the tokens alone, and keeps its books while the step runs; every worker moves its own
// copy of the batch on. All that can be known before the tokens are there is found out while the step before ends, by a
// lane a request.

constexpr bool kMovesOn = program::batch_shared_bytes > 0 && program::max_attention_items > 0;
constexpr uint32_t kStopsKept = 4; // ids that end a request, of those that it has: mostly there are one or two

struct Foreseen {
    bool moves_on; // if no token ends its request; the rest is worth nothing where it does not
    bool has_details;
    int32_t slot, length, cached; // of the lane's request, before the step is taken in
    int32_t stop_count, stops[kStopsKept];
    uint64_t steps, step_tokens, answer_tokens; // of the schedule
};

// Whether the attention of the batch, a token a request, stays cut as it is. The shortest pieces that give few enough
// items stay so where the items stay as many; how many those may be depends on the sum of the lengths.
__device__ __forceinline__ bool keeps_cut(const Worker &w, bool has_row) {
    constexpr uint32_t kShort = program::attention_pieces * PERK_CUT_SHORT_UNITS * PERK_KV_UNIT;
    const uint32_t tile = program::batch_query_tiles + w.lane * (sizeof(perk_query_tile) / 4);
    const uint32_t cached = has_row ? w.batch_word(tile + PERK_QUERY_TILE_FRESH_POSITION) : 0;
    const uint32_t piece = max(w.args.many.desk->piece, 1);
    uint32_t sum = cached;
    for (uint32_t offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    const bool needs_item = has_row && cached % piece == 0;
    return !__any_sync(0xffffffffu, needs_item) && (sum <= kShort) == (sum + w.num_tokens() <= kShort);
}

// Whether the lane's request goes on.
__device__ __forceinline__ bool foresee_request(const perk_slot &r, Foreseen &f) {
    f.length = r.length;
    f.cached = r.cached;
    f.has_details = has_details(r);
    f.stop_count = r.stop_count;
    for (uint32_t i = 0; i < kStopsKept; i++) f.stops[i] = r.stop_ids[i];
    return perk_slot_goes_on(&r, program::page_size);
}

// By all lanes, before step `step` of the launch.
__device__ __forceinline__ Foreseen foresee(const Worker &w, uint32_t step) {
    const perk_many_args &many = w.args.many;
    const uint32_t count = w.num_tokens();
    Foreseen f{};
    if (!kMovesOn || count > PERK_MOVED_TOKENS || count != w.num_logit_rows() || count <= many.smaller_tokens) return f;
    perk_schedule s;
    bind_schedule(w, s);
    f.steps = s.state->steps;
    f.step_tokens = s.state->step_tokens;
    f.answer_tokens = s.state->answer_tokens;
    const bool has_row = w.lane < count;
    if (has_row) f.slot = load_coherent4(many.logit_slots + w.lane);
    const bool gets_token = !has_row || foresee_request(s.slots[f.slot], f);
    f.moves_on = __all_sync(0xffffffffu, gets_token) && keeps_cut(w, has_row) && step != many.max_steps &&
                 uint32_t(s.state->running) == count && !perk_schedule_may_admit(&s);
    return f;
}

__device__ __forceinline__ bool is_stop(const perk_slot &r, const Foreseen &f, int32_t token) {
    bool stops = false;
    for (uint32_t i = 0; i < kStopsKept; i++) stops |= int32_t(i) < f.stop_count && f.stops[i] == token;
#pragma unroll 1
    for (int32_t i = kStopsKept; i < f.stop_count; i++) stops |= r.stop_ids[i] == token;
    return stops;
}

// The step before is taken in, as commit_step does it: every request has got a token that is not its last.
__device__ __forceinline__ void keep_books(const Worker &w, const Foreseen &f, int32_t token, uint32_t told) {
    const perk_many_args &many = w.args.many;
    const uint32_t count = w.num_tokens();
    perk_slot &r = many.slots[f.slot];
    if (w.lane < count) {
        r.cached = f.cached + 1;
        r.length = f.length + 1;
        many.tokens[uint64_t(f.slot) * program::max_seq_length + f.length] = token;
        *reinterpret_cast<Vec16 *>(many.outbox + w.lane) = Outbox::of(f.slot, token, f.has_details);
    }
    if (w.lane == 0) {
        perk_schedule s;
        bind_schedule(w, s);
        s.state->steps = f.steps + 1;
        s.state->step_tokens = f.step_tokens + count;
        s.state->answer_tokens = f.answer_tokens + count;
    }
    __syncwarp();
    if (w.lane == 0) tell(w, round_of(told) + 1, mails_of(told), {many.outbox, count}, 0);
}

// By all lanes: opens the gate of step `step` of the launch, if it moves on the one before.
__device__ __forceinline__ bool move_on(const Worker &w, const Foreseen &f, const int32_t *picks, uint32_t step) {
    const perk_many_args &many = w.args.many;
    if (!f.moves_on) return false;
    const uint32_t told = load_told(w), served = __shfl_sync(0xffffffffu, load_served(w), 0);
    const bool is_quiet = round_of(served) == round_of(told) && mails_of(served) == mails_of(told) &&
                          command_of(served) <= PERK_COMMAND_DRAIN; // which is about a launch without requests
    const bool has_row = w.lane < w.num_tokens();
    const int32_t token = has_row ? picks[w.lane] : 0;
    const bool stops = has_row && is_stop(many.slots[f.slot], f, token);
    if (__any_sync(0xffffffffu, stops || !is_quiet)) return false;
    if (has_row) many.desk->moved_tokens[(w.step() + 1) % 2][w.lane] = token;
    __syncwarp();
    if (w.lane == 0) store_release_gpu(&many.desk->gate, 4 * step + kGateMovesOn);
    keep_books(w, f, token, told);
    return true;
}

// By all consumers of a worker, in its copy of the batch: a token more for each request, which nobody has read yet.
__device__ __forceinline__ void move_batch_on(const Worker &w) {
    constexpr uint32_t kTileWords = sizeof(perk_query_tile) / 4, kItemWords = sizeof(perk_attention_item) / 4;
    const uint32_t i = w.thread, words = w.shared + SharedMap::batch;
    if (i >= w.num_tokens()) return;
    const auto step_on = [&](uint32_t word) { store_shared4(words + word * 4, load_shared4(words + word * 4) + 1); };
    const uint32_t token =
        load_coherent4(reinterpret_cast<const uint32_t *>(&w.args.many.desk->moved_tokens[w.step() % 2][i]));
    const uint32_t tile = program::batch_query_tiles + i * kTileWords; // each token has its own
    const uint32_t last =
        w.batch_word(tile + PERK_QUERY_TILE_FIRST_ITEM) + w.batch_word(tile + PERK_QUERY_TILE_ITEM_COUNT) - 1;
    const uint32_t fresh = w.batch_word(tile + PERK_QUERY_TILE_FRESH_ITEM);
    step_on(program::batch_positions + i);
    step_on(tile + PERK_QUERY_TILE_FRESH_POSITION);
    step_on(program::batch_attention_items + last * kItemWords + PERK_ITEM_END);
    step_on(program::batch_attention_items + fresh * kItemWords + PERK_ITEM_BEGIN);
    step_on(program::batch_attention_items + fresh * kItemWords + PERK_ITEM_END);
    store_shared4(words + (program::batch_token_ids + i) * 4, token);
}

// ---- between two steps ----

constexpr uint32_t kNoPick = 0xffffffffu; // where no logit is a number

// The step is over when its last stages are: all lanes wait.
__device__ __forceinline__ void await_step_end(const Worker &w) {
    const perk_many_args &many = w.args.many;
    const uint32_t i = w.lane % PERK_RECORD_WAITS, per_step = many.end_per_step[i];
    if (w.lane < PERK_RECORD_WAITS && per_step != 0)
        wait_counter(w, many.end_counter[i], (w.step() + 1) * per_step, PERK_ROLE_STEP_END);
    __syncwarp();
}

// Brings the step's tokens. Those that are still to be drawn are called for instead: then it returns true.
__device__ __forceinline__ bool take_picks(const Worker &w, int32_t *picks, bool has_drawn, bool &is_bad) {
    const perk_many_args &many = w.args.many;
    uint32_t called = 0;
    for (uint32_t begin = 0; begin < w.num_logit_rows(); begin += 32) {
        const uint32_t row = min(begin + w.lane, w.num_logit_rows() - 1);
        uint32_t pick = load_coherent4(many.picks + row * kPickStride);
        const int32_t slot = load_coherent4(many.logit_slots + row);
        const uint32_t drawn = has_drawn ? load_coherent4(&many.rooms[row].token) : 0;
        const bool draws = pick != kNoPick && (pick & kToDraw) != 0 && row == begin + w.lane;
        const uint32_t calls = __ballot_sync(0xffffffffu, draws && !has_drawn);
        if (draws && has_drawn) pick = drawn;
        if (draws && !has_drawn) {
            const uint32_t place = called + __popc(calls & ((1u << w.lane) - 1));
            pick &= ~kToDraw;
            many.calls[place] = {int32_t(row), slot, int32_t(pick), 0};
        }
        called += __popc(calls);
        if (row != begin + w.lane) continue;
        is_bad |= pick >= program::vocab_size;
        picks[row] = int32_t(pick);
    }
    __syncwarp(); // all picks are there
    if (called > 0 && w.lane == 0) {
        many.calls->count = called;
        many.desk->drawn = 0;
    }
    __syncwarp();
    is_bad = __any_sync(0xffffffffu, is_bad);
    return called > 0;
}

// What opens the gate of step `step` of the launch; returns what is to be done now. `has_drawn`: it was called before.
__device__ __forceinline__ uint32_t schedule(const Worker &w, uint32_t step, bool has_drawn) {
    static_assert(program::max_logit_rows * 4 <= program::reduction_bytes, "picks do not fit the scratch");
    int32_t *picks = reinterpret_cast<int32_t *>(shared_pointer(w.reduction()));
    bool is_bad = false, draws = false;
    Foreseen foreseen{};
    if (step > 0) {
        if (w.args.many.post != nullptr) foreseen = foresee(w, step);
        if (has_drawn)
            await_drawn(w);
        else
            await_step_end(w);
        draws = take_picks(w, picks, has_drawn, is_bad);
    }
    if (load_shared4(w.shared + SharedMap::given_up) != 0) return kNextEnds;
    uint32_t *const gate = &w.args.many.desk->gate;
    if (draws && !is_bad) {
        if (w.lane == 0) store_release_gpu(gate, 4 * step + kGateDraws);
        return kNextDraws;
    }
    if (!is_bad && move_on(w, foreseen, picks, step)) return kNextMovesOn;
    if (w.lane != 0) return kNextRuns; // lane 0 says whether it does
    if (w.args.many.post != nullptr) return prepare_step(w, picks, is_bad, step) ? kNextRuns : kNextEnds;
    store_release_gpu(gate, 4 * step + (step == 0 ? kGateBegins : kGateEnds));
    return step == 0 ? kNextRuns : kNextEnds;
}

// ---- all workers ----

// Until the step may begin, or the worker is called to draw. There is no limit: the scheduler may idle, and what it
// waits for has limits of its own.
__device__ __forceinline__ uint32_t pass_gate(const Worker &w, uint32_t step, bool has_drawn) {
    const uint32_t wanted = 4 * step + (has_drawn ? kGateEnds : kGateDraws); // or more
    uint32_t seen, polls = 0;
    while (static_cast<int32_t>((seen = load_acquire_gpu(&w.args.many.desk->gate)) - wanted) < 0) {
        if (++polls % kPollsPerClockRead == 0 && load_coherent4(w.args.hang_claim) != 0) return kNextEnds;
        if (polls > kPollsBeforePause) pause(kGatePauseNs);
    }
    const uint32_t at = seen - 4 * step;
    return at == kGateDraws ? kNextDraws : at == kGateEnds ? kNextEnds : at == kGateMovesOn ? kNextMovesOn : kNextRuns;
}

// By warp 0: waits for what is to be done now, and tells the others.
__device__ __forceinline__ void await_next(const Worker &w, bool has_drawn) {
    const uint32_t number = w.step() + 1, step = number - w.args.step;
    uint32_t next = kNextRuns;
    if (w.index() == 0)
        next = schedule(w, step, has_drawn);
    else if (w.lane == 0)
        next = pass_gate(w, step, has_drawn);
    __syncwarp();
    if (w.lane == 0) {
        fence_block(); // the feeder reads the batch once it sees the step's number
        store_shared4(w.shared + SharedMap::next, next);
        if (next == kNextRuns || next == kNextMovesOn) store_shared4(w.shared + SharedMap::step, number);
        if (next == kNextEnds) store_shared4(w.shared + SharedMap::given_up, kEnded);
    }
    __syncwarp();
}

__device__ __forceinline__ void bring_batch(const Worker &w) {
    const uint8_t *batch = reinterpret_cast<const uint8_t *>(w.args.batch);
    for (uint32_t offset = w.thread * 16; offset < program::batch_shared_bytes; offset += PERK_CONSUMER_THREADS * 16)
        store_shared16(w.shared + SharedMap::batch + offset, load_coherent16(batch + offset));
}

// By all consumers, with the step before behind them: draws its tokens if they are to be, waits until there is a batch,
// and brings it. False: the launch has ended.
__device__ __forceinline__ bool begin_step(Worker &w) {
    uint32_t next;
#pragma unroll 1
    for (bool has_drawn = false;; has_drawn = true) {
        w.forget_coordinates();
        if (w.warp == 0) await_next(w, has_drawn);
        named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS);
        next = load_shared4(w.shared + SharedMap::next);
        if (next == kNextEnds) return false;
        if (next != kNextDraws) break;
        draw_rows(w);
        named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS); // the next word is written after all have read this one
    }
    fetch_record(w, 0);
    if constexpr (kMovesOn)
        if (next == kNextMovesOn) move_batch_on(w);
    if constexpr (program::batch_shared_bytes > 0)
        if (next != kNextMovesOn) bring_batch(w);
    await_record();
    named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS);
    if (w.thread == 0) {
        fence_block(); // the producer reads the batch once it sees the step's number
        store_shared4(w.shared + SharedMap::begun, w.step());
    }
    return true;
}

// The stream of all steps; a worker without weights has none. Ends when the last step has, or on the way (await_room).
__device__ __forceinline__ void produce_steps(Worker &w) {
    const uint32_t laps = w.shared + SharedMap::laps;
    uint32_t chunk = 0;
    w.ahead = {0, 0}; // from here on it knows no end of a step
    do {
        chunk = produce(w, chunk);
        if (w.lane == 0) store_shared4(laps, load_shared4(laps) % kHasBegun + 1);
        __syncwarp();
    } while (chunk != 0 && !has_ended(w));
    land_chunks(w, chunk);
}

#if PERK_WIDE
// Inputs of all steps. A step's are wanted once the consumers have begun it: before, there is nothing to bring, and how
// many tokens it has is not known.
__device__ __forceinline__ void feed_steps(Worker &w) {
    for (uint32_t number = w.args.step;; number++) {
        while (__any_sync(0xffffffffu, static_cast<int32_t>(w.step() - number) < 0)) {
            if (has_ended(w)) return;
            pause(kStepPauseNs);
        }
        fence_block(); // what the consumers saw when they passed the gate
        feed(w);
    }
}
#endif

__device__ __forceinline__ void init_steps(const Worker &w) {
    if (w.thread != 0) return;
    store_shared4(w.shared + SharedMap::laps, 0);
    store_shared4(w.shared + SharedMap::step, w.args.step - 1);
    store_shared4(w.shared + SharedMap::begun, w.args.step - 1);
    store_shared4(w.shared + SharedMap::told, tell_word(1, w.args.many.dealt)); // with an empty outbox
    store_shared4(w.shared + SharedMap::served, serve_word(0, PERK_COMMAND_NONE, w.args.many.dealt));
}

template <class RunTask>
__device__ __forceinline__ void many_steps_main(const perk_kernel_args &args, RunTask run_task) {
    Worker w{args, threadIdx.x / 32, threadIdx.x % 32, threadIdx.x, dynamic_shared(), 0};
    init_steps(w);
    init_ring(w); // with a barrier of the whole block
    // One number for all lanes: else the compiler takes it that a warp's lanes may part at their roles, and every loop
    // behind is guarded against lanes that come alone.
    const uint32_t role = __shfl_sync(0xffffffffu, w.warp, 0);
    if (role < PERK_CONSUMER_WARPS) {
        take_registers<PERK_CONSUMER_REGISTERS>();
        for (uint32_t chunk = 0; begin_step(w);) chunk = consume(w, run_task, chunk);
    } else {
        give_registers<PERK_PRODUCER_REGISTERS>();
        if (role == PERK_CONSUMER_WARPS) produce_steps(w);
#if PERK_WIDE
        else if (role == PERK_CONSUMER_WARPS + 1)
            feed_steps(w);
#endif
        else if (role == kClerk && w.index() == 0 && args.many.post != nullptr)
            serve(w);
    }
}

} // namespace perk
