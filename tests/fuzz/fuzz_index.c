/* Bytes as a model.safetensors.index.json beside the shards of tests/fixtures/checkpoints/sharded. */
#include "fuzz_json.h"

#include "src/checkpoint.h"

#include <fcntl.h>

static char folder[] = "/tmp/perk-fuzz-XXXXXX", index_path[64];

static void link_fixture(const char *name) {
    char from[1024], to[256];
    snprintf(from, sizeof from, PERK_SOURCE_DIR "/tests/fixtures/checkpoints/sharded/%s", name);
    snprintf(to, sizeof to, "%s/%s", folder, name);
    FUZZ_CHECK(symlink(from, to) == 0, "%s", to);
}

static const char *const linked[] = {"config.json", "generation_config.json", "model-00001-of-00003.safetensors",
                                     "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"};

static void remove_folder(void) {
    char path[256];
    for (size_t i = 0; i < PERK_COUNT(linked); i++) {
        snprintf(path, sizeof path, "%s/%s", folder, linked[i]);
        unlink(path);
    }
    unlink(index_path);
    rmdir(folder);
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    FUZZ_CHECK(mkdtemp(folder));
    snprintf(index_path, sizeof index_path, "%s/model.safetensors.index.json", folder);
    for (size_t i = 0; i < PERK_COUNT(linked); i++) link_fixture(linked[i]);
    atexit(remove_folder);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    int fd = open(index_path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    FUZZ_CHECK(fd >= 0 && write(fd, data, size) == (ssize_t)size && close(fd) == 0);
    perk_error err = {0};
    perk_checkpoint *checkpoint = NULL;
    perk_status status = perk_checkpoint_open(&checkpoint, folder, &err);
    fuzz_check_result(status, &err, checkpoint != NULL);
    for (size_t i = 0; checkpoint && i < perk_checkpoint_count(checkpoint); i++) {
        const perk_checkpoint_tensor *tensor = perk_checkpoint_at(checkpoint, i);
        FUZZ_CHECK(perk_checkpoint_find(checkpoint, tensor->name) == tensor, "%s", tensor->name);
        FUZZ_CHECK(perk_checkpoint_file_path(checkpoint, (size_t)tensor->file));
    }
    perk_checkpoint_free(checkpoint);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed) {
    return fuzz_mutate_json(data, size, max_size, seed, 0);
}
