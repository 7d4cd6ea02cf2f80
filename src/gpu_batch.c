/* Query tiles and attention items of a step. */
#include "gpu_batch.h"

typedef struct batch_words {
    perk_batch_header *header;
    perk_query_tile *tiles;
    perk_attention_item *items;
    int32_t *token_query_tile;
} batch_words;

/* Cuts every request's tokens into query tiles. */
static void cut_query_tiles(const perk_plan *plan, const perk_batch *batch, batch_words *out) {
    int32_t per_tile = plan->tokens_per_query_tile, count = 0;
    for (int32_t r = 0; r < batch->num_requests; r++)
        for (int32_t done = 0; done < batch->token_count[r]; done += per_tile) {
            perk_query_tile *tile = &out->tiles[count];
            *tile = (perk_query_tile){.request = r,
                                      .first_token = batch->first_token[r] + done,
                                      .token_count = PERK_MIN(per_tile, batch->token_count[r] - done),
                                      .fresh_token = batch->first_token[r],
                                      .fresh_position = batch->positions[batch->first_token[r]]};
            for (int32_t i = 0; i < tile->token_count; i++) out->token_query_tile[tile->first_token + i] = count;
            count++;
        }
    out->header->num_query_tiles = count;
}

/* The positions that a tile's tokens see together: up to that of its last token. */
static int32_t tile_length(const perk_batch *batch, const perk_query_tile *tile) {
    return batch->positions[tile->first_token + tile->token_count - 1] + 1;
}

static int64_t count_items(const perk_batch *batch, const batch_words *w, int32_t units) {
    int64_t total = 0;
    for (int32_t i = 0; i < w->header->num_query_tiles; i++) {
        int32_t fresh = w->tiles[i].fresh_position;
        total += (int64_t)perk_ceil_div((uint64_t)fresh, (uint64_t)units * PERK_KV_UNIT);
        total += (int64_t)perk_ceil_div((uint64_t)(tile_length(batch, &w->tiles[i]) - fresh), PERK_KV_UNIT);
    }
    return total;
}

/* The shortest pieces of the cache, in KV units, that give no more items than there are warps for a KV head. */
static int32_t choose_piece(const perk_plan *plan, const perk_batch *batch, const batch_words *w) {
    int32_t low = 1, high = (int32_t)perk_ceil_div((uint64_t)plan->config.max_seq_length, PERK_KV_UNIT);
    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        if (count_items(batch, w, middle) <= plan->max_attention_items)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

/* Adds the pieces of positions [begin, end). */
static void add_items(batch_words *out, int32_t tile, int32_t begin, int32_t end, int32_t piece) {
    for (; begin < end; begin += piece)
        out->items[out->header->num_attention_items++] =
            (perk_attention_item){.query_tile = tile, .kv_begin = begin, .kv_end = PERK_MIN(begin + piece, end)};
}

static void cut_items(const perk_plan *plan, const perk_batch *batch, batch_words *out) {
    int32_t piece = choose_piece(plan, batch, out) * PERK_KV_UNIT;
    for (int32_t i = 0; i < out->header->num_query_tiles; i++) {
        perk_query_tile *tile = &out->tiles[i];
        tile->first_item = out->header->num_attention_items;
        add_items(out, i, 0, tile->fresh_position, piece);
        add_items(out, i, tile->fresh_position, tile_length(batch, tile), PERK_KV_UNIT);
        tile->item_count = out->header->num_attention_items - tile->first_item;
    }
}

void perk_gpu_batch_write(const perk_plan *plan, const perk_batch_layout *layout, const perk_batch *batch,
                          int32_t *words) {
    batch_words out = {.header = (perk_batch_header *)words,
                       .tiles = (perk_query_tile *)(words + layout->query_tiles),
                       .items = (perk_attention_item *)(words + layout->attention_items),
                       .token_query_tile = words + layout->token_query_tile};
    size_t tokens = (size_t)batch->num_tokens * sizeof(int32_t);
    *out.header = (perk_batch_header){
        .num_tokens = batch->num_tokens, .num_requests = batch->num_requests, .num_logit_rows = batch->num_logit_rows};
    memcpy(words + layout->token_ids, batch->token_ids, tokens);
    memcpy(words + layout->positions, batch->positions, tokens);
    memcpy(words + layout->token_request, batch->token_request, tokens);
    memcpy(words + layout->logit_rows, batch->logit_rows, (size_t)batch->num_logit_rows * sizeof(int32_t));
    memcpy(words + layout->page_table, batch->page_table,
           (size_t)batch->num_requests * (size_t)batch->pages_per_request * sizeof(int32_t));
    if (plan->max_query_tiles > 0) {
        cut_query_tiles(plan, batch, &out);
        cut_items(plan, batch, &out);
    }
}
