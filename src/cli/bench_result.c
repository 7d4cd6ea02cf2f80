/* perk bench: what all results share. */
#include "bench.h"

#include <time.h>

perk_bench_spread perk_bench_spread_of(double *values, int32_t count) {
    return (perk_bench_spread){.median = perk_bench_quantile(values, count, 0.5),
                               .p10 = perk_bench_quantile(values, count, 0.1),
                               .p90 = perk_bench_quantile(values, count, 0.9)};
}

json_t *perk_bench_result(const char *what, const char *model, const char *device) {
    char date[32];
    time_t now = time(NULL);
    struct tm utc;
    strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &utc));
    json_t *json =
        json_pack("{s:s, s:s, s:s, s:s}", "what", what, "device", device, "date", date, "perk", perk_version());
    if (model) json_object_set_new(json, "model", json_string(model));
    return json;
}

void perk_bench_put_spread(json_t *json, const char *name, perk_bench_spread spread) {
    const struct {
        const char *suffix;
        double value;
    } parts[] = {{"", spread.median}, {"_p10", spread.p10}, {"_p90", spread.p90}};
    for (size_t i = 0; i < PERK_COUNT(parts); i++) {
        char key[64];
        snprintf(key, sizeof key, "%s%s", name, parts[i].suffix);
        json_object_set_new(json, key, json_real(parts[i].value));
    }
}

void perk_bench_put_check(json_t *json, double error) {
    json_object_set_new(json, "check_relative_error", error < 0 ? json_null() : json_real(error));
}

const char *perk_bench_check_text(double error, char *text, size_t size) {
    if (error < 0)
        snprintf(text, size, "not made");
    else
        snprintf(text, size, "%.1e", error);
    return text;
}

json_t *perk_bench_join(json_t *json, json_t *more) {
    bool joined = json && more && json_object_update(json, more) == 0;
    json_decref(more);
    if (joined) return json;
    json_decref(json);
    return NULL;
}
