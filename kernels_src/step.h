/* What one step works on: the batch, and its attention cut into pieces of nearly equal length. */
#ifndef PERK_STEP_H
#define PERK_STEP_H

#include "shared_code.h"

/* Tokens of one request are neighbouring rows with rising positions. A request may have no tokens: it runs, but found
 * no place in this step. The arrays are sized by the configuration, and whoever made the batch owns them. */
typedef struct perk_batch {
    int32_t num_tokens, num_requests, num_logit_rows;
    int32_t pages_per_request; /* the width of page_table: ceil(max_seq_length / page_size) */
    int32_t *token_ids;        /* [tokens] */
    int32_t *positions;        /* [tokens] position of the token in its request, from 0 */
    int32_t *token_request;    /* [tokens] row of `first_token`, ... and page_table */
    int32_t *logit_rows;       /* [logit rows] the token row whose logits are wanted */
    int32_t *first_token;      /* [requests] its first token row in this step, where it has one */
    int32_t *token_count;      /* [requests] its tokens in this step */
    int32_t *kv_length;        /* [requests] positions in its cache once this step is done */
    int32_t *page_table;       /* [requests][pages_per_request] page of positions i * page_size ... */
} perk_batch;

/* Appends `count` tokens of request `request`, from `position` on; logits are wanted of the last `logits` of them. All
 * of it fits, and the request's row of page_table is somebody else's work. */
PERK_SHARED_CODE void perk_batch_put(perk_batch *batch, int32_t request, const int32_t *token_ids, int32_t count,
                                     int32_t position, int32_t logits) {
    int32_t first = batch->num_tokens;
    for (int32_t i = 0; i < count; i++) {
        batch->token_ids[first + i] = token_ids[i];
        batch->positions[first + i] = position + i;
        batch->token_request[first + i] = request;
    }
    for (int32_t i = count - logits; i < count; i++) batch->logit_rows[batch->num_logit_rows++] = first + i;
    batch->first_token[request] = first;
    batch->token_count[request] = count;
    batch->kv_length[request] = position + count;
    batch->num_tokens = first + count;
    if (request >= batch->num_requests) batch->num_requests = request + 1;
}

/* ---- attention ---- */

typedef struct perk_attention_cut {
    int32_t tokens_per_tile, max_items, max_positions; /* of the program */
    int32_t warps, pieces;  /* the same: that share a KV head; long pieces into which the cache is cut for them */
    int32_t prompt_slice;   /* the same: a prompt's tiles lie in so many of the step's tokens each; 0: no such tiles */
    perk_query_tile *tiles; /* filled, and the two below */
    perk_attention_item *items; /* [max_items] */
    int32_t *token_query_tile;  /* [tokens] */
    int32_t tile_count, item_count;
    int32_t piece; /* positions of the cache an item, at most */
} perk_attention_cut;

/* Cuts every request's tokens into query tiles; a prompt's end where slices of the step's tokens end. */
PERK_SHARED_CODE void perk_cut_query_tiles(const perk_batch *batch, perk_attention_cut *cut) {
    cut->tile_count = 0;
    for (int32_t first = 0, end; first < batch->num_tokens; first = end) {
        int32_t request = batch->token_request[first];
        end = first + batch->token_count[request];
        int32_t is_prompt = cut->prompt_slice > 0 && end - first >= PERK_PROMPT_TOKENS;
        for (int32_t token = first, next; token < end; token = next) {
            perk_query_tile *tile = &cut->tiles[cut->tile_count];
            next = token + (is_prompt ? cut->prompt_slice - token % cut->prompt_slice : cut->tokens_per_tile);
            next = perk_lesser(next, end);
            tile->request = request;
            tile->first_token = token;
            tile->token_count = next - token;
            tile->fresh_token = first;
            tile->fresh_position = batch->positions[first];
            tile->first_fresh_item = is_prompt ? -1 : 0;
            for (int32_t i = token; i < next; i++) cut->token_query_tile[i] = cut->tile_count;
            cut->tile_count++;
        }
    }
}

/* The positions that a tile's tokens see together: up to that of its last token. */
PERK_SHARED_CODE int32_t perk_query_tile_length(const perk_batch *batch, const perk_query_tile *tile) {
    return batch->positions[tile->first_token + tile->token_count - 1] + 1;
}

/* A tile's items over what the step adds: one a KV unit. */
PERK_SHARED_CODE int32_t perk_query_tile_fresh_items(const perk_query_tile *tile) {
    if (tile->first_fresh_item < 0) return 0;
    return perk_pieces(tile->first_token + tile->token_count - tile->fresh_token, PERK_KV_UNIT);
}

/* Whether the cache, cut into pieces of `units` KV units, gives at most `most` items. */
PERK_SHARED_CODE int perk_cut_fits(const perk_attention_cut *cut, int32_t units, int64_t most) {
    int64_t count = 0;
    for (int32_t i = 0; i < cut->tile_count && count <= most; i++)
        if (cut->tiles[i].first_fresh_item >= 0)
            count += perk_pieces(cut->tiles[i].fresh_position, units * PERK_KV_UNIT);
    return count <= most;
}

/* KV units a piece so that `positions`, cut without any rounding, give `items` pieces; at most `high`. */
PERK_SHARED_CODE int32_t perk_cut_bound(int64_t positions, int64_t items, int32_t high) {
    if (items <= 0) return high;
    int64_t units = (positions + items * PERK_KV_UNIT - 1) / (items * PERK_KV_UNIT);
    return units < 1 ? 1 : units < high ? (int32_t)units : high;
}

/* Pieces that would be no longer than so many units are cut for all warps, whatever it costs to put them together; but
 * for those warps that what the step adds is for: two items one after the other take longer than a long one. */
enum { PERK_CUT_SHORT_UNITS = 4 };

/* The shortest pieces of the cache, in KV units, that give no more items than there are to be, or one for each tile.
 * The sum of the lengths bounds the answer closely from both sides: for a lone request there is nothing left to search.
 */
PERK_SHARED_CODE int32_t perk_cut_choose_piece(const perk_attention_cut *cut) {
    int64_t cached = 0, fresh = 0, most;
    for (int32_t i = 0; i < cut->tile_count; i++) {
        if (cut->tiles[i].first_fresh_item >= 0) cached += cut->tiles[i].fresh_position;
        fresh += perk_query_tile_fresh_items(&cut->tiles[i]);
    }
    most = cached <= cut->pieces * (PERK_CUT_SHORT_UNITS * (int64_t)PERK_KV_UNIT)
               ? perk_greater(cut->warps - (int32_t)fresh, cut->pieces)
               : cut->pieces;
    if (most < cut->tile_count) most = cut->tile_count;
    int32_t high = perk_pieces(cut->max_positions, PERK_KV_UNIT);
    int32_t low = perk_cut_bound(cached, most, high);
    if (perk_cut_fits(cut, low, most)) return low;
    high = perk_cut_bound(cached, most - cut->tile_count, high); /* rounding up adds at most one item a tile */
    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        if (perk_cut_fits(cut, middle, most))
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

/* Adds the pieces of positions [begin, end). */
PERK_SHARED_CODE void perk_cut_add_items(perk_attention_cut *cut, int32_t tile, int32_t begin, int32_t end,
                                         int32_t piece) {
    for (; begin < end; begin += piece) {
        perk_attention_item *item = &cut->items[cut->item_count++];
        item->query_tile = tile;
        item->kv_begin = begin;
        item->kv_end = perk_lesser(begin + piece, end);
        item->reserved = 0;
    }
}

/* Fills tiles, items and token_query_tile. The batch fits the program. Items are dealt to the workers in turn: those of
 * the cache, which are long, come first, so that everybody gets as many of them. */
PERK_SHARED_CODE void perk_cut_attention(const perk_batch *batch, perk_attention_cut *cut) {
    perk_cut_query_tiles(batch, cut);
    const int32_t piece = cut->piece = perk_cut_choose_piece(cut) * PERK_KV_UNIT;
    cut->item_count = 0;
    for (int32_t i = 0; i < cut->tile_count; i++) {
        perk_query_tile *tile = &cut->tiles[i];
        tile->first_item = cut->item_count;
        if (tile->first_fresh_item >= 0) perk_cut_add_items(cut, i, 0, tile->fresh_position, piece);
        tile->item_count = cut->item_count - tile->first_item;
    }
    for (int32_t i = 0; i < cut->tile_count; i++) {
        perk_query_tile *tile = &cut->tiles[i];
        if (tile->first_fresh_item < 0) continue;
        tile->first_fresh_item = cut->item_count;
        perk_cut_add_items(cut, i, tile->fresh_position, perk_query_tile_length(batch, tile), PERK_KV_UNIT);
    }
}

#endif
