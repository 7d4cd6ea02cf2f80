/* The safetensors reader against files that are right, wrong in every way the format allows to be wrong, truncated at
 * every byte, and mutated at random: each is read or refused with a message, never read out of bounds. */
#include "src/float.h"
#include "src/safetensors.h"
#include "temp.h"

#define FILE_NAME "x.safetensors"

static temp_folder folder;
static char file_path[1024];

/* Writes length + header + `data_size` bytes that count up, and opens the result. */
static perk_status open_made(perk_safetensors **out, const char *header, size_t data_size, perk_error *err) {
    perk_buffer bytes = {0};
    uint64_t length = strlen(header);
    for (int i = 0; i < 8; i++) perk_buffer_append(&bytes, &(unsigned char){(unsigned char)(length >> (8 * i))}, 1);
    perk_buffer_append(&bytes, header, (size_t)length);
    for (size_t i = 0; i < data_size; i++) perk_buffer_append(&bytes, &(unsigned char){(unsigned char)i}, 1);
    CHECK(!bytes.failed);
    temp_write(&folder, FILE_NAME, bytes.data, bytes.size);
    perk_buffer_free(&bytes);
    return perk_safetensors_open(out, file_path, 0, err);
}

static const perk_safetensors_tensor *find(const perk_safetensors *file, const char *name) {
    for (size_t i = 0; i < perk_safetensors_count(file); i++)
        if (strcmp(perk_safetensors_at(file, i)->name, name) == 0) return perk_safetensors_at(file, i);
    CHECK(false, "no tensor %s", name);
    return NULL;
}

/* Reads every byte that the file's tensors claim, so that a sanitizer or the kernel objects to a wrong one. */
static unsigned touch(const perk_safetensors *file) {
    unsigned sum = 0;
    for (size_t i = 0; i < perk_safetensors_count(file); i++) {
        const perk_safetensors_tensor *tensor = perk_safetensors_at(file, i);
        for (uint64_t j = 0; j < tensor->bytes; j++) sum += ((const unsigned char *)tensor->data)[j];
    }
    return sum;
}

static const char valid_header[] =
    "{\"__metadata__\":{\"format\":\"pt\"},\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[12,20]},"
    "\"a\":{\"dtype\":\"BF16\",\"shape\":[2,3],\"data_offsets\":[0,12]},"
    "\"none\":{\"dtype\":\"F16\",\"shape\":[0,5],\"data_offsets\":[12,12]},"
    "\"ids\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[20,28]},"
    "\"small\":{\"dtype\":\"F4\",\"shape\":[4],\"data_offsets\":[28,30]}}     ";
#define VALID_DATA 30

static void check_valid(void) {
    perk_error err;
    perk_safetensors *file;
    char shape[64];
    CHECK_OK(open_made(&file, valid_header, VALID_DATA, &err));
    CHECK(perk_safetensors_count(file) == 5 && !perk_safetensors_at(file, 5));
    CHECK(strcmp(perk_safetensors_path(file), file_path) == 0);
    const perk_safetensors_tensor *a = find(file, "a"), *b = find(file, "b"), *none = find(file, "none");
    CHECK(a == perk_safetensors_at(file, 0), "order of data");
    CHECK(a->usable && a->dtype == PERK_BF16 && a->ndim == 2 && a->dims[0] == 2 && a->dims[1] == 3 && a->bytes == 12);
    CHECK(a->offset == 8 + strlen(valid_header));
    CHECK(strcmp(perk_shape_text(a->ndim, a->dims, shape, sizeof shape), "[2, 3]") == 0, "%s", shape);
    CHECK(strcmp(perk_shape_text(a->ndim, a->dims, shape, 4), "[2,") == 0, "%s", shape);
    CHECK(b->usable && b->dtype == PERK_F32 && memcmp(b->data, "\x0c\x0d\x0e\x0f\x10\x11\x12\x13", 8) == 0);
    CHECK(none->usable && none->bytes == 0 && none->dims[0] == 0);
    CHECK(!find(file, "ids")->usable && find(file, "ids")->ndim == 0 && strcmp(find(file, "ids")->stored, "I64") == 0);
    CHECK(!find(file, "small")->usable && find(file, "small")->bytes == 2);
    CHECK(touch(file) == 29 * 30 / 2);
    perk_safetensors_free(file);
    CHECK_OK(open_made(&file, "{}", 0, &err));
    CHECK(perk_safetensors_count(file) == 0);
    perk_safetensors_free(file);
    perk_safetensors_free(NULL);
}

/* The data begin at every offset modulo 8, by padding the header: all tensors are still readable as their types. */
static void check_alignment(void) {
    perk_error err;
    perk_safetensors *file;
    bool copied = false, mapped = false;
    for (int pad = 0; pad < 8; pad++) {
        char header[256];
        snprintf(header, sizeof header,
                 "{\"h\":{\"dtype\":\"F16\",\"shape\":[3],\"data_offsets\":[0,6]},"
                 "\"f\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[6,10]}}%*s",
                 pad, "");
        CHECK_OK(open_made(&file, header, 10, &err));
        const perk_safetensors_tensor *h = find(file, "h"), *f = find(file, "f");
        CHECK((uintptr_t)h->data % 2 == 0 && (uintptr_t)f->data % 4 == 0);
        CHECK(h->copied == (h->offset % 2 != 0) && f->copied == (f->offset % 4 != 0));
        CHECK(((const uint16_t *)h->data)[2] == 0x0504 && *(const uint32_t *)f->data == 0x09080706);
        copied |= f->copied;
        mapped |= !f->copied;
        perk_safetensors_free(file);
    }
    CHECK(copied && mapped);
}

#define T(fields) "{\"t\":{" fields "}}"
#define DTYPE "\"dtype\":\"F32\","
#define SHAPE "\"shape\":[2],"
#define OFFSETS "\"data_offsets\":[0,8]"

typedef struct bad_header {
    const char *header, *message;
    perk_status status;
} bad_header;

/* Each beside 8 bytes of data. */
static const bad_header bad_headers[] = {
    {"", "begin with '{'", PERK_BAD_FORMAT},
    {" {}", "begin with '{'", PERK_BAD_FORMAT},
    {"[]", "begin with '{'", PERK_BAD_FORMAT},
    {"{", "not valid JSON", PERK_BAD_FORMAT},
    {"{}x", "not valid JSON", PERK_BAD_FORMAT},
    {"{\"t\xff\":1}", "not valid JSON", PERK_BAD_FORMAT},
    {"{\"t\":1,\"t\":1}", "duplicate", PERK_BAD_FORMAT},
    {"{\"t\":1}", "\"t\": must be an object", PERK_BAD_FORMAT},
    {"{}", "8 bytes at the end belong to no tensor", PERK_BAD_FORMAT},
    {T(DTYPE SHAPE OFFSETS ",\"shape\":[2]"), "duplicate", PERK_BAD_FORMAT},
    {T(SHAPE OFFSETS), "\"dtype\" must be a string", PERK_BAD_FORMAT},
    {T("\"dtype\":32," SHAPE OFFSETS), "\"dtype\" must be a string", PERK_BAD_FORMAT},
    {T("\"dtype\":\"F33\"," SHAPE OFFSETS), "dtype \"F33\" is unknown", PERK_BAD_FORMAT},
    {T(DTYPE OFFSETS), "\"shape\" must be a list", PERK_BAD_FORMAT},
    {T(DTYPE "\"shape\":{}," OFFSETS), "\"shape\" must be a list", PERK_BAD_FORMAT},
    {T(DTYPE "\"shape\":[-2]," OFFSETS), "non-negative", PERK_BAD_FORMAT},
    {T(DTYPE "\"shape\":[2.0]," OFFSETS), "non-negative", PERK_BAD_FORMAT},
    {T(DTYPE "\"shape\":[\"2\"]," OFFSETS), "non-negative", PERK_BAD_FORMAT},
    {T(DTYPE "\"shape\":[9223372036854775807,3]," OFFSETS), "overflows", PERK_BAD_FORMAT},
    {T(DTYPE "\"shape\":[4294967296,4294967296]," OFFSETS), "overflows", PERK_BAD_FORMAT},
    {T(DTYPE "\"shape\":[99999999999999999999]," OFFSETS), "not valid JSON", PERK_BAD_FORMAT},
    {T(DTYPE "\"shape\":[1,1,1,1,1,1,1,1,2]," OFFSETS), "9 dimensions", PERK_UNSUPPORTED},
    {T("\"dtype\":\"F4\",\"shape\":[3]," OFFSETS), "ends within a byte", PERK_BAD_FORMAT},
    {T(DTYPE "\"shape\":[2]"), "\"data_offsets\" must be", PERK_BAD_FORMAT},
    {T(DTYPE SHAPE "\"data_offsets\":[0]"), "\"data_offsets\" must be", PERK_BAD_FORMAT},
    {T(DTYPE SHAPE "\"data_offsets\":[0,8,8]"), "\"data_offsets\" must be", PERK_BAD_FORMAT},
    {T(DTYPE SHAPE "\"data_offsets\":[8,0]"), "\"data_offsets\" must be", PERK_BAD_FORMAT},
    {T(DTYPE SHAPE "\"data_offsets\":[-8,0]"), "\"data_offsets\" must be", PERK_BAD_FORMAT},
    {T(DTYPE SHAPE "\"data_offsets\":[0,\"8\"]"), "\"data_offsets\" must be", PERK_BAD_FORMAT},
    {T(DTYPE SHAPE "\"data_offsets\":[1,9]"), "truncated", PERK_BAD_FORMAT},
    {T(DTYPE SHAPE "\"data_offsets\":[9223372036854775799,9223372036854775807]"), "truncated", PERK_BAD_FORMAT},
    {T(DTYPE "\"shape\":[1]," OFFSETS), "F32 of shape [1] takes 4 bytes, but data_offsets span 8", PERK_BAD_FORMAT},
    {T(DTYPE "\"shape\":[1],\"data_offsets\":[0,4]"), "4 bytes at the end", PERK_BAD_FORMAT},
    {T(DTYPE "\"shape\":[1],\"data_offsets\":[4,8]"), "4 bytes before tensor \"t\"", PERK_BAD_FORMAT},
    {"{\"t\":{" DTYPE SHAPE OFFSETS "},\"u\":{" DTYPE SHAPE OFFSETS "}}", "\"t\" and \"u\" overlap", PERK_BAD_FORMAT},
    {"{\"t\":{" DTYPE SHAPE OFFSETS "},\"u\":{" DTYPE "\"shape\":[1],\"data_offsets\":[4,8]}}", "overlap",
     PERK_BAD_FORMAT},
    {"{\"t\":{" DTYPE SHAPE OFFSETS "},\"u\":{" DTYPE "\"shape\":[0],\"data_offsets\":[4,4]}}", "overlap",
     PERK_BAD_FORMAT},
    {"{\"__metadata__\":[],\"t\":{" DTYPE SHAPE OFFSETS "}}", "__metadata__ must be an object", PERK_BAD_FORMAT},
    {"{\"__metadata__\":{\"a\":1},\"t\":{" DTYPE SHAPE OFFSETS "}}", "__metadata__: \"a\" must be", PERK_BAD_FORMAT},
};

static void check_bad_headers(void) {
    perk_error err;
    perk_safetensors *file;
    for (size_t i = 0; i < PERK_COUNT(bad_headers); i++) {
        CHECK_FAILS(open_made(&file, bad_headers[i].header, 8, &err), bad_headers[i].status, bad_headers[i].message);
        CHECK(!file && strstr(err.message, FILE_NAME), "%s", err.message);
        CHECK(open_made(&file, bad_headers[i].header, 8, NULL) == bad_headers[i].status, "err may be NULL");
    }
    CHECK_OK(open_made(&file, T(DTYPE SHAPE OFFSETS), 8, &err)); /* what the bad ones vary is good */
    perk_safetensors_free(file);
}

static void check_deep_nesting(void) {
    perk_error err;
    perk_safetensors *file;
    size_t depth = 1000000;
    char *header = perk_calloc(depth + 16, 1);
    CHECK(header);
    memcpy(header, "{\"t\":", 5);
    memset(header + 5, '[', depth);
    CHECK_FAILS(open_made(&file, header, 0, &err), PERK_BAD_FORMAT, "not valid JSON");
    free(header);
}

static void check_bad_files(void) {
    perk_error err;
    perk_safetensors *file;
    CHECK_FAILS(perk_safetensors_open(&file, "/nonexistent/x", 0, &err), PERK_NOT_FOUND, "cannot open");
    CHECK_FAILS(perk_safetensors_open(&file, folder.path, 0, &err), PERK_IO, "not a regular file");
    temp_write(&folder, FILE_NAME, "", 0);
    CHECK_FAILS(perk_safetensors_open(&file, file_path, 0, &err), PERK_BAD_FORMAT, "too few");
    temp_write(&folder, FILE_NAME, "\xff\xff\xff\xff\xff\xff\xff\xff{}", 10);
    CHECK_FAILS(perk_safetensors_open(&file, file_path, 0, &err), PERK_BAD_FORMAT, "header length");
    temp_write(&folder, FILE_NAME, "\x03\0\0\0\0\0\0\0{}", 10);
    CHECK_FAILS(perk_safetensors_open(&file, file_path, 0, &err), PERK_BAD_FORMAT, "truncated");
    temp_write_text(&folder, FILE_NAME, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n");
    CHECK_FAILS(perk_safetensors_open(&file, file_path, 0, &err), PERK_BAD_FORMAT, "git lfs pull");
    char fifo[1024];
    CHECK(mkfifo(temp_path(&folder, "fifo", fifo, sizeof fifo), 0600) == 0);
    CHECK_FAILS(perk_safetensors_open(&file, fifo, 0, &err), PERK_IO, "not a regular file");
}

static char *read_made(size_t *size) {
    perk_error err;
    char *bytes;
    CHECK_OK(perk_read_file(file_path, 1 << 20, &bytes, size, &err));
    return bytes;
}

static void check_truncation(void) {
    perk_error err;
    perk_safetensors *file;
    size_t size;
    CHECK_OK(open_made(&file, valid_header, VALID_DATA, &err));
    perk_safetensors_free(file);
    char *bytes = read_made(&size);
    for (size_t length = 0; length < size; length++) {
        temp_write(&folder, FILE_NAME, bytes, length);
        CHECK_FAILS(perk_safetensors_open(&file, file_path, 0, &err), PERK_BAD_FORMAT, FILE_NAME);
        CHECK(!file);
    }
    free(bytes);
}

static uint32_t next_random(uint32_t *state) {
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

/* One to four bytes of the length or header change: bits flip, digits and JSON marks appear. */
static void mutate(char *bytes, size_t header_end, uint32_t *random) {
    static const char marks[] = "0123456789-{}[]\",:.e \\";
    for (uint32_t changes = 1 + next_random(random) % 4; changes > 0; changes--) {
        size_t place = next_random(random) % header_end;
        if (next_random(random) % 2)
            bytes[place] = marks[next_random(random) % (sizeof marks - 1)];
        else
            bytes[place] = (char)(bytes[place] ^ (1 << next_random(random) % 8));
    }
}

static void check_mutations(void) {
    enum { mutations = 10000 };
    perk_error err;
    perk_safetensors *file;
    size_t size, read = 0;
    uint32_t random = 42;
    CHECK_OK(open_made(&file, valid_header, VALID_DATA, &err));
    perk_safetensors_free(file);
    char *bytes = read_made(&size), *mutated = perk_calloc(size, 1);
    CHECK(mutated);
    for (int i = 0; i < mutations; i++) {
        memcpy(mutated, bytes, size);
        mutate(mutated, size - VALID_DATA, &random);
        temp_write(&folder, FILE_NAME, mutated, size);
        err.message[0] = '\0';
        if (perk_safetensors_open(&file, file_path, 0, &err) == PERK_OK) {
            CHECK(touch(file) == VALID_DATA * (VALID_DATA - 1) / 2, "a readable mutation must not move data");
            perk_safetensors_free(file);
            read++;
        } else {
            CHECK(!file && err.message[0]);
        }
    }
    CHECK(read > 0 && read < mutations / 2, "%zu of %d mutations were read", read, mutations);
    free(mutated);
    free(bytes);
}

int main(void) {
    folder = temp_make();
    temp_path(&folder, FILE_NAME, file_path, sizeof file_path);
    check_valid();
    check_alignment();
    check_bad_headers();
    check_deep_nesting();
    check_bad_files();
    check_truncation();
    check_mutations();
    temp_remove(&folder);
    return 0;
}
