/* Model folders: the committed Qwen3 fixtures (see fixtures/make_checkpoints.py) element by element, single and
 * sharded, and folders that are incomplete or wrong. */
#include "src/checkpoint.h"
#include "src/config.h"
#include "src/float.h"
#include "temp.h"

#define FIXTURES PERK_SOURCE_DIR "/tests/fixtures/checkpoints"

static temp_folder folder;

static perk_checkpoint *open_ok(const char *path) {
    perk_error err;
    perk_checkpoint *checkpoint;
    CHECK_OK(perk_checkpoint_open(&checkpoint, path, &err));
    return checkpoint;
}

/* ---- the fixtures -------------------------------------------------------------------------------------------------
 */

static void check_tensor(const perk_checkpoint *checkpoint, const char *name, const json_t *expected) {
    perk_error err;
    const perk_checkpoint_tensor *tensor;
    int64_t dims[2] = {0}, sum = 0;
    const json_t *shape = json_object_get(expected, "shape");
    int ndim = (int)json_array_size(shape);
    CHECK(ndim >= 1 && ndim <= 2);
    for (int i = 0; i < ndim; i++) dims[i] = json_integer_value(json_array_get(shape, (size_t)i));
    CHECK_OK(perk_checkpoint_require(checkpoint, name, ndim, dims, &tensor, &err));
    CHECK(tensor->dtype == PERK_BF16 && strcmp(tensor->name, name) == 0);
    size_t count = (size_t)tensor->bytes / 2;
    perk_checkpoint_will_read(tensor);
    const uint16_t *bits = tensor->data;
    for (size_t i = 0; i < count; i++) sum += bits[i];
    perk_checkpoint_done_reading(tensor);
    CHECK(sum == json_integer_value(json_object_get(expected, "sum_of_bits")), "%s", name);
    for (size_t i = 0; i < 4; i++) { /* and the data are still there after done_reading */
        const json_t *first = json_array_get(json_object_get(expected, "first_bits"), i);
        const json_t *last = json_array_get(json_object_get(expected, "last_bits"), i);
        const json_t *value = json_array_get(json_object_get(expected, "first"), i);
        CHECK(bits[i] == json_integer_value(first) && bits[count - 4 + i] == json_integer_value(last), "%s", name);
        CHECK((double)perk_bf16_to_f32(bits[i]) == json_number_value(value), "%s", name);
    }
}

static void check_fixture(const char *path, size_t file_count) {
    perk_error err;
    char *text;
    size_t size;
    const char *name;
    json_t *entry;
    CHECK_OK(perk_read_file(FIXTURES "/expected.json", 1 << 20, &text, &size, &err));
    json_t *expected = json_loadb(text, size, 0, NULL);
    free(text);
    perk_checkpoint *checkpoint = open_ok(path);
    CHECK(expected && json_object_size(expected) == perk_checkpoint_count(checkpoint));
    CHECK(perk_checkpoint_has_weights(checkpoint) && perk_checkpoint_file_count(checkpoint) == file_count);
    CHECK(!perk_checkpoint_file_path(checkpoint, file_count));
    json_object_foreach(expected, name, entry) check_tensor(checkpoint, name, entry);
    uint64_t bytes = 0;
    for (size_t i = 0; i < perk_checkpoint_count(checkpoint); i++) {
        const perk_checkpoint_tensor *tensor = perk_checkpoint_at(checkpoint, i), *before = NULL;
        CHECK(perk_checkpoint_find(checkpoint, tensor->name) == tensor && (size_t)tensor->file < file_count);
        if (i > 0) before = perk_checkpoint_at(checkpoint, i - 1);
        CHECK(!before || before->file < tensor->file || before->offset < tensor->offset, "order of reading");
        bytes += tensor->bytes;
    }
    CHECK(bytes == perk_checkpoint_bytes(checkpoint) && bytes == 156416);
    CHECK(!perk_checkpoint_at(checkpoint, perk_checkpoint_count(checkpoint)));
    perk_checkpoint_free(checkpoint);
    json_decref(expected);
}

static void check_configs(void) {
    perk_error err;
    perk_generation_defaults generation;
    int64_t layers;
    perk_checkpoint *checkpoint = open_ok(FIXTURES "/single//");
    CHECK(strcmp(perk_checkpoint_folder(checkpoint), FIXTURES "/single") == 0);
    CHECK(strcmp(perk_checkpoint_config_path(checkpoint), FIXTURES "/single/config.json") == 0);
    const json_t *config = perk_checkpoint_config(checkpoint);
    CHECK_OK(perk_config_i64(config, "num_hidden_layers", PERK_CONFIG_REQUIRED, 1, 1000, &layers, &err));
    CHECK(layers == 2);
    CHECK_OK(perk_generation_defaults_read(perk_checkpoint_generation_config(checkpoint), config, &generation, &err));
    CHECK(generation.eos_count == 2 && generation.eos[1] == 3 && generation.do_sample && generation.top_k == 20);
    perk_checkpoint_free(checkpoint);

    checkpoint = open_ok(FIXTURES "/single/config.json");
    CHECK(!perk_checkpoint_has_weights(checkpoint) && perk_checkpoint_count(checkpoint) == 0);
    CHECK(perk_checkpoint_bytes(checkpoint) == 0 && !perk_checkpoint_find(checkpoint, "x"));
    CHECK(!perk_checkpoint_generation_config(checkpoint));
    CHECK(strcmp(perk_checkpoint_folder(checkpoint), FIXTURES "/single") == 0);
    const perk_checkpoint_tensor *tensor;
    CHECK_FAILS(perk_checkpoint_require(checkpoint, "x", 0, NULL, &tensor, &err), PERK_NOT_FOUND, "without weights");
    perk_checkpoint_free(checkpoint);
    perk_checkpoint_free(NULL);
}

static void check_require_errors(void) {
    perk_error err;
    const perk_checkpoint_tensor *tensor;
    const int64_t transposed[2] = {64, 128}, right[2] = {128, 64};
    perk_checkpoint *checkpoint = open_ok(FIXTURES "/single");
    CHECK_FAILS(perk_checkpoint_require(checkpoint, "model.embed_token.weight", 2, right, &tensor, &err),
                PERK_NOT_FOUND, "\"model.embed_token.weight\" is missing");
    CHECK(!tensor && strstr(err.message, "nearest: \"model.embed_tokens.weight\""), "%s", err.message);
    CHECK_FAILS(perk_checkpoint_require(checkpoint, "model.layers.7.mlp.up_proj.weight", 2, right, &tensor, &err),
                PERK_NOT_FOUND, "nearest: \"model.layers.");
    CHECK_FAILS(perk_checkpoint_require(checkpoint, "zzz", 2, right, &tensor, &err), PERK_NOT_FOUND, "missing");
    CHECK(!strstr(err.message, "nearest"), "%s", err.message);
    CHECK_FAILS(perk_checkpoint_require(checkpoint, "", 2, right, &tensor, &err), PERK_NOT_FOUND, "missing");
    char longest[2000];
    memset(longest, 'a', sizeof longest - 1);
    longest[sizeof longest - 1] = '\0';
    CHECK_FAILS(perk_checkpoint_require(checkpoint, longest, 2, right, &tensor, &err), PERK_NOT_FOUND, "missing");
    CHECK_FAILS(perk_checkpoint_require(checkpoint, "lm_head.weight", 2, transposed, &tensor, &err), PERK_BAD_FORMAT,
                "has shape [128, 64], but config.json asks for [64, 128]");
    CHECK_FAILS(perk_checkpoint_require(checkpoint, "lm_head.weight", 1, right, &tensor, &err), PERK_BAD_FORMAT,
                "asks for [128]");
    CHECK(perk_checkpoint_require(checkpoint, "zzz", 2, right, &tensor, NULL) == PERK_NOT_FOUND, "err may be NULL");
    perk_checkpoint_free(checkpoint);
}

/* ---- made folders -------------------------------------------------------------------------------------------------
 */

#define INDEX_NAME "model.safetensors.index.json"

/* A file of one tensor of two elements. */
static void write_shard(const char *file, const char *tensor, const char *dtype, size_t element_bytes) {
    char bytes[512] = {0};
    int length =
        snprintf(bytes + 8, sizeof bytes - 8, "{\"%s\":{\"dtype\":\"%s\",\"shape\":[2],\"data_offsets\":[0,%zu]}}",
                 tensor, dtype, 2 * element_bytes);
    CHECK(length > 0 && length < 256);
    bytes[0] = (char)length;
    temp_write(&folder, file, bytes, 8 + (size_t)length + 2 * element_bytes);
}

static void check_incomplete(void) {
    perk_error err;
    perk_checkpoint *checkpoint;
    CHECK_FAILS(perk_checkpoint_open(&checkpoint, "/nonexistent/model", &err), PERK_NOT_FOUND, "/nonexistent/model");
    CHECK(!checkpoint);
    CHECK_FAILS(perk_checkpoint_open(&checkpoint, "", &err), PERK_NOT_FOUND, "model folder");
    CHECK_FAILS(perk_checkpoint_open(&checkpoint, folder.path, &err), PERK_NOT_FOUND, "no config.json");
    temp_write_text(&folder, "config.json", "{\"a\": 1,}");
    CHECK_FAILS(perk_checkpoint_open(&checkpoint, folder.path, &err), PERK_BAD_FORMAT, "config.json: line 1");
    temp_write_text(&folder, "config.json", "{\"a\": 1, \"a\": 2}");
    CHECK_FAILS(perk_checkpoint_open(&checkpoint, folder.path, &err), PERK_BAD_FORMAT, "duplicate");
    temp_write_text(&folder, "config.json", "[]");
    CHECK_FAILS(perk_checkpoint_open(&checkpoint, folder.path, &err), PERK_BAD_FORMAT, "JSON object");
    temp_write_text(&folder, "config.json", "");
    CHECK_FAILS(perk_checkpoint_open(&checkpoint, folder.path, &err), PERK_BAD_FORMAT, "config.json");
    temp_write_text(&folder, "config.json", "{}");
    CHECK_FAILS(perk_checkpoint_open(&checkpoint, folder.path, &err), PERK_NOT_FOUND,
                "neither model.safetensors nor model.safetensors.index.json");
    CHECK(!strstr(err.message, "PyTorch"), "%s", err.message);
    temp_write_text(&folder, "pytorch_model.bin", "x");
    CHECK_FAILS(perk_checkpoint_open(&checkpoint, folder.path, &err), PERK_NOT_FOUND, "PyTorch");
    temp_write_text(&folder, "generation_config.json", "{");
    CHECK_FAILS(perk_checkpoint_open(&checkpoint, folder.path, &err), PERK_BAD_FORMAT, "generation_config.json");
    temp_write_text(&folder, "generation_config.json", "{}");
    write_shard("model.safetensors", "w", "I64", 8);
    checkpoint = open_ok(folder.path);
    const perk_checkpoint_tensor *tensor;
    CHECK(perk_checkpoint_find(checkpoint, "w"));
    CHECK_FAILS(perk_checkpoint_require(checkpoint, "w", 1, &(int64_t){2}, &tensor, &err), PERK_UNSUPPORTED,
                "\"w\" is stored as I64; perk reads BF16, F16 and F32");
    perk_checkpoint_free(checkpoint);
    temp_write_text(&folder, "model.safetensors", "{}");
    CHECK_FAILS(perk_checkpoint_open(&checkpoint, folder.path, &err), PERK_BAD_FORMAT, "model.safetensors");
    temp_remove(&folder);
    folder = temp_make();
}

typedef struct bad_index {
    const char *index, *message;
    perk_status status;
} bad_index;

/* Beside a.safetensors, which holds "a", and b.safetensors, which holds "b". */
static const bad_index bad_indexes[] = {
    {"", INDEX_NAME, PERK_BAD_FORMAT},
    {"{}", "\"weight_map\" must be", PERK_BAD_FORMAT},
    {"{\"weight_map\": {}}", "\"weight_map\" must be", PERK_BAD_FORMAT},
    {"{\"weight_map\": [\"a.safetensors\"]}", "\"weight_map\" must be", PERK_BAD_FORMAT},
    {"{\"weight_map\": {\"a\": 1}}", "the shard of \"a\"", PERK_BAD_FORMAT},
    {"{\"weight_map\": {\"a\": \"\"}}", "the shard of \"a\"", PERK_BAD_FORMAT},
    {"{\"weight_map\": {\"a\": \"..\"}}", "the shard of \"a\"", PERK_BAD_FORMAT},
    {"{\"weight_map\": {\"a\": \"../a.safetensors\"}}", "the shard of \"a\"", PERK_BAD_FORMAT},
    {"{\"weight_map\": {\"a\": \"/etc/passwd\"}}", "the shard of \"a\"", PERK_BAD_FORMAT},
    {"{\"weight_map\": {\"a\": \"a.safetensors\", \"a\": \"b.safetensors\"}}", "duplicate", PERK_BAD_FORMAT},
    {"{\"weight_map\": {\"a\": \"a.safetensors\", \"c\": \"c.safetensors\"}}", "1 of 2 shards are missing",
     PERK_NOT_FOUND},
    {"{\"weight_map\": {\"a\": \"a.safetensors\", \"c\": \"c.safetensors\"}}", "c.safetensors", PERK_NOT_FOUND},
    {"{\"weight_map\": {\"a\": \"b.safetensors\"}}", "\"a\" is not in b.safetensors", PERK_BAD_FORMAT},
    {"{\"weight_map\": {\"a\": \"a.safetensors\", \"x\": \"b.safetensors\"}}", "\"x\" is not in b.safetensors",
     PERK_BAD_FORMAT},
    {"{\"weight_map\": {\"a\": \"config.json\"}}", "config.json", PERK_BAD_FORMAT},
};

static void check_sharding(void) {
    perk_error err;
    perk_checkpoint *checkpoint;
    temp_write_text(&folder, "config.json", "{}");
    write_shard("a.safetensors", "a", "F32", 4);
    write_shard("b.safetensors", "b", "F16", 2);
    for (size_t i = 0; i < PERK_COUNT(bad_indexes); i++) {
        temp_write_text(&folder, INDEX_NAME, bad_indexes[i].index);
        CHECK_FAILS(perk_checkpoint_open(&checkpoint, folder.path, &err), bad_indexes[i].status,
                    bad_indexes[i].message);
        CHECK(!checkpoint && strstr(err.message, INDEX_NAME), "%s", err.message);
    }
    temp_write_text(&folder, INDEX_NAME, "{\"weight_map\": {\"b\": \"b.safetensors\", \"a\": \"a.safetensors\"}}");
    checkpoint = open_ok(folder.path);
    CHECK(perk_checkpoint_count(checkpoint) == 2 && perk_checkpoint_bytes(checkpoint) == 12);
    CHECK(perk_checkpoint_find(checkpoint, "b")->file == 1 && !perk_checkpoint_find(checkpoint, "c"));
    perk_checkpoint_free(checkpoint);
    temp_write_text(&folder, INDEX_NAME,
                    "{\"weight_map\": {\"b\": \"b.safetensors\"}}"); /* a's shard is not asked for */
    checkpoint = open_ok(folder.path);
    CHECK(perk_checkpoint_count(checkpoint) == 1 && perk_checkpoint_file_count(checkpoint) == 1);
    perk_checkpoint_free(checkpoint);
}

int main(void) {
    folder = temp_make();
    check_fixture(FIXTURES "/single", 1);
    check_fixture(FIXTURES "/sharded", 3);
    check_configs();
    check_require_errors();
    check_incomplete();
    check_sharding();
    temp_remove(&folder);
    return 0;
}
