/* Defaults and ranges of a configuration. */
#include "base.h"
#include "plan.h"

enum {
    MAX_TOKENS = 65536,
    MIN_PAGE = 16,
    MAX_PAGE = 4096,
    MAX_POSITIONS = 1 << 24, /* the rotation's angles hold positions as fp32, exact up to here */
};

static perk_status check_range(const char *field, int64_t value, int64_t min, int64_t max, perk_error *err) {
    if (value >= min && value <= max) return PERK_OK;
    return perk_fail(err, PERK_INVALID_ARGUMENT, "%s must be between %lld and %lld, found %lld", field, (long long)min,
                     (long long)max, (long long)value);
}

static void use_default(int32_t *field, int64_t value) {
    if (*field == 0) *field = (int32_t)value;
}

static perk_status resolve_batch(perk_config *config, perk_error *err) {
    use_default(&config->max_num_batched_tokens, 16);
    perk_status status = check_range("max_num_batched_tokens", config->max_num_batched_tokens, 1, MAX_TOKENS, err);
    if (status) return status;
    int32_t tokens = config->max_num_batched_tokens;
    use_default(&config->max_num_batched_requests, PERK_MIN(8, tokens));
    status = check_range("max_num_batched_requests", config->max_num_batched_requests, 1, tokens, err);
    if (status) return status;
    use_default(&config->max_num_logit_rows, config->max_num_batched_requests);
    return check_range("max_num_logit_rows", config->max_num_logit_rows, 1, tokens, err);
}

static perk_status resolve_positions(perk_config *config, int32_t model_max_positions, perk_error *err) {
    int32_t most = model_max_positions > 0 ? PERK_MIN(model_max_positions, MAX_POSITIONS) : MAX_POSITIONS;
    use_default(&config->max_seq_length, PERK_MIN(4096, most));
    if (model_max_positions > 0 && config->max_seq_length > model_max_positions)
        return perk_fail(err, PERK_LIMIT, "max_seq_length is %d, but the model was made for %d positions at most",
                         config->max_seq_length, model_max_positions);
    return check_range("max_seq_length", config->max_seq_length, 1, most, err);
}

static perk_status resolve_pages(perk_config *config, perk_error *err) {
    use_default(&config->page_size, 64);
    int32_t page = config->page_size;
    if (page < MIN_PAGE || page > MAX_PAGE || (page & (page - 1)) != 0)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "page_size must be a power of two between %d and %d, found %d",
                         MIN_PAGE, MAX_PAGE, page);
    int64_t most = INT32_MAX / page; /* positions of the pool are counted in int32 */
    int64_t each = (int64_t)perk_ceil_div((uint64_t)config->max_seq_length, (uint64_t)page);
    int64_t all = each * config->max_num_batched_requests;
    if (config->max_num_pages == 0 && all > most)
        return perk_fail(err, PERK_LIMIT,
                         "%d requests of max_seq_length %d need %lld pages of %d, more than the %lld that a pool may "
                         "have; lower one of them or set max_num_pages",
                         config->max_num_batched_requests, config->max_seq_length, (long long)all, page,
                         (long long)most);
    use_default(&config->max_num_pages, all);
    return check_range("max_num_pages", config->max_num_pages, 1, most, err);
}

perk_status perk_config_resolve(perk_config *config, int32_t model_max_positions, perk_error *err) {
    perk_config resolved = *config;
    perk_status status = resolve_batch(&resolved, err);
    if (!status) status = resolve_positions(&resolved, model_max_positions, err);
    if (!status) status = resolve_pages(&resolved, err);
    if (!status) *config = resolved;
    return status;
}

perk_config perk_config_for_steps(const perk_config *config, int32_t tokens) {
    perk_config smaller = *config;
    smaller.max_num_batched_tokens = PERK_MIN(tokens, config->max_num_batched_tokens);
    smaller.max_num_batched_requests = PERK_MIN(tokens, config->max_num_batched_requests);
    smaller.max_num_logit_rows = PERK_MIN(tokens, config->max_num_logit_rows);
    return smaller;
}
