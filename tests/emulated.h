/* What tests on the emulator share: the emulator in place of driver and compiler, and a model that it runs
 * in little time. After test_cache.h's make_scratch. */
#ifndef PERK_TESTS_EMULATED_H
#define PERK_TESTS_EMULATED_H

#include "fake_cuda/open_fake.h"
#include "test_cache.h"

static inline opened_fake open_emulator(int workers) {
    opened_fake fake = open_fake();
    fake.driver->device.sm_count = workers;
    fake.compiler->emulates = true;
    return fake;
}

/* The shipped model with two of its six layers: as sure of its tokens as the whole, and faster to emulate. `root` is
 * the repository's. */
static inline path_text make_small_model(const char *root) {
    static char text[4096];
    path_text folder = path_in(scratch, "model");
    char *whole_root = realpath(root, NULL); /* links lead there */
    CHECK(whole_root, "%s", root);
    path_text tiny = path_in(whole_root, "examples/tiny");
    free(whole_root);
    FILE *file = fopen(path_in(tiny.text, "config.json").text, "rb");
    CHECK(file && fread(text, 1, sizeof text - 1, file) > 0 && fclose(file) == 0, "%s", tiny.text);
    char *layers = strstr(text, "\"num_hidden_layers\": 6");
    CHECK(layers && mkdir(folder.text, 0700) == 0);
    layers[strlen("\"num_hidden_layers\": ")] = '2';
    file = fopen(path_in(folder.text, "config.json").text, "wb");
    CHECK(file && fputs(text, file) >= 0 && fclose(file) == 0);
    CHECK(symlink(path_in(tiny.text, "model.safetensors").text, path_in(folder.text, "model.safetensors").text) == 0);
    return folder;
}

#endif
