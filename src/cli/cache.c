/* perk cache: list, verify, prune, clear. */
#include "cli.h"

#include "perk/cache.h"

#include <time.h>

typedef struct cache_options {
    const char *folder;
    uint64_t max_bytes;
    int remove, json;
} cache_options;

typedef struct list_state {
    json_t *entries; /* NULL: print lines */
    uint64_t count, bytes;
} list_state;

static int list_entry(void *user, const perk_cache_entry *entry) {
    list_state *listing = user;
    char hex[PERK_CACHE_KEY_HEX_SIZE], date[32] = "?";
    perk_cache_key_hex(&entry->key, hex);
    listing->count++;
    listing->bytes += entry->size;
    if (listing->entries) {
        json_t *json = json_pack("{s:s, s:I, s:I, s:b, s:b, s:s, s:s?}", "key", hex, "bytes", (json_int_t)entry->size,
                                 "last_use", (json_int_t)entry->last_use, "valid", entry->valid, "read_only",
                                 entry->read_only, "folder", entry->folder, "problem", entry->problem);
        return json_array_append_new(listing->entries, json) != 0;
    }
    time_t last_use = (time_t)entry->last_use;
    struct tm parts;
    if (localtime_r(&last_use, &parts)) strftime(date, sizeof date, "%Y-%m-%d %H:%M:%S", &parts);
    printf("%s %10llu  %s  %s%s%s\n", hex, (unsigned long long)entry->size, date, entry->read_only ? "read-only " : "",
           entry->valid ? "good" : "bad: ", entry->valid ? "" : entry->problem);
    return 0;
}

static int list(perk_cache *cache, const cache_options *options) {
    perk_error err = {0};
    list_state listing = {.entries = options->json ? json_array() : NULL};
    const char *folder = perk_cache_folder(cache);
    if (perk_cache_list(cache, list_entry, &listing, &err)) {
        json_decref(listing.entries);
        return perk_cli_fail(&err);
    }
    if (options->json) {
        json_t *json = json_pack("{s:s?, s:o, s:I}", "folder", folder, "entries", listing.entries, "bytes",
                                 (json_int_t)listing.bytes);
        return perk_cli_print_json(json) ? PERK_EXIT_OK : PERK_EXIT_FAILURE;
    }
    printf("%llu entries, %llu bytes; %s\n", (unsigned long long)listing.count, (unsigned long long)listing.bytes,
           folder ? folder : "no writable folder");
    return PERK_EXIT_OK;
}

static int print_report(const perk_cache_report *report, const cache_options *options) {
    if (options->json) {
        json_t *json = json_pack("{s:I, s:I, s:I, s:I, s:I}", "entries", (json_int_t)report->entries, "bytes",
                                 (json_int_t)report->bytes, "bad", (json_int_t)report->bad, "removed",
                                 (json_int_t)report->removed, "removed_bytes", (json_int_t)report->removed_bytes);
        return perk_cli_print_json(json) ? PERK_EXIT_OK : PERK_EXIT_FAILURE;
    }
    printf("%llu entries (%llu bytes) looked at, %llu bad, %llu removed (%llu bytes)\n",
           (unsigned long long)report->entries, (unsigned long long)report->bytes, (unsigned long long)report->bad,
           (unsigned long long)report->removed, (unsigned long long)report->removed_bytes);
    return PERK_EXIT_OK;
}

static int verify(perk_cache *cache, const cache_options *options) {
    perk_error err = {0};
    perk_cache_report report = {0};
    if (perk_cache_verify(cache, options->remove, &report, &err)) return perk_cli_fail(&err);
    int code = print_report(&report, options);
    return code == PERK_EXIT_OK && report.bad > report.removed ? PERK_EXIT_FAILURE : code;
}

static int prune(perk_cache *cache, const cache_options *options) {
    perk_error err = {0};
    perk_cache_report report = {0};
    if (perk_cache_prune(cache, options->max_bytes, &report, &err)) return perk_cli_fail(&err);
    return print_report(&report, options);
}

static int clear(perk_cache *cache, const cache_options *options) {
    perk_error err = {0};
    perk_cache_report report = {0};
    if (perk_cache_clear(cache, &report, &err)) return perk_cli_fail(&err);
    return print_report(&report, options);
}

int perk_cli_cache(const perk_cli_command *self, int argc, char **argv) {
    static const struct {
        const char *name;
        int (*run)(perk_cache *cache, const cache_options *options);
    } actions[] = {{"list", list}, {"verify", verify}, {"prune", prune}, {"clear", clear}};
    cache_options cli = {.max_bytes = UINT64_MAX};
    const perk_cli_option items[] = {
        PERK_CLI_OPTION_TEXT("cache-dir", &cli.folder, "DIR", "another folder"),
        PERK_CLI_OPTION_BYTES("max-bytes", &cli.max_bytes, "prune: what may stay (256M, 2G, ...)"),
        PERK_CLI_OPTION_FLAG("remove", &cli.remove, "verify: remove bad entries"),
        PERK_CLI_OPTION_FLAG("json", &cli.json, "the result as one JSON object"),
    };
    perk_cli_options options = {0};
    perk_cli_add(&options, items, (int)PERK_COUNT(items));
    perk_cli_arguments arguments;
    int code = perk_cli_parse(self, &options, argc, argv, 1, &arguments);
    if (code != PERK_EXIT_GO_ON) return code;
    if (arguments.count == 0) return perk_cli_usage(self, "what to do? list, verify, prune or clear");
    size_t action = 0;
    while (action < PERK_COUNT(actions) && strcmp(actions[action].name, arguments.items[0]) != 0) action++;
    if (action == PERK_COUNT(actions))
        return perk_cli_usage(self, "\"%s\" is not list, verify, prune or clear", arguments.items[0]);
    if (actions[action].run == prune && cli.max_bytes == UINT64_MAX)
        return perk_cli_usage(self, "prune needs --max-bytes");

    perk_error err = {0};
    perk_cache *cache;
    perk_cache_options place = {.folder = cli.folder, .log = perk_cli_log(0)};
    if (perk_cache_open(&cache, &place, &err)) return perk_cli_fail(&err);
    code = actions[action].run(cache, &cli);
    perk_cache_free(cache);
    return code;
}
