#include "gpu_batch.h"

/* Query tiles and attention items of the step. */
static void write_attention(const perk_plan *plan, const perk_batch_layout *layout, const perk_batch *batch,
                            int32_t *words) {
    perk_batch_header *header = (perk_batch_header *)words;
    perk_attention_cut cut = {.tokens_per_tile = plan->tokens_per_query_tile,
                              .prompt_slice = plan->prompt_slice,
                              .max_items = plan->max_attention_items,
                              .warps = plan->attention_parts * PERK_CONSUMER_WARPS,
                              .pieces = plan->attention_pieces,
                              .max_positions = plan->config.max_seq_length,
                              .tiles = (perk_query_tile *)(words + layout->query_tiles),
                              .items = (perk_attention_item *)(words + layout->attention_items),
                              .token_query_tile = words + layout->token_query_tile};
    perk_cut_attention(batch, &cut);
    header->num_query_tiles = cut.tile_count;
    header->num_attention_items = cut.item_count;
}

void perk_gpu_batch_write(const perk_plan *plan, const perk_batch_layout *layout, const perk_batch *batch,
                          int32_t *words) {
    size_t tokens = (size_t)batch->num_tokens * sizeof(int32_t);
    *(perk_batch_header *)words = (perk_batch_header){
        .num_tokens = batch->num_tokens, .num_requests = batch->num_requests, .num_logit_rows = batch->num_logit_rows};
    memcpy(words + layout->token_ids, batch->token_ids, tokens);
    memcpy(words + layout->positions, batch->positions, tokens);
    memcpy(words + layout->token_request, batch->token_request, tokens);
    memcpy(words + layout->logit_rows, batch->logit_rows, (size_t)batch->num_logit_rows * sizeof(int32_t));
    memcpy(words + layout->page_table, batch->page_table,
           (size_t)batch->num_requests * (size_t)batch->pages_per_request * sizeof(int32_t));
    if (plan->max_query_tiles > 0) write_attention(plan, layout, batch, words);
}
