#include "npy.h"

#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the rows are written as they lie in memory, and the header says little-endian"
#endif

static perk_status fail(const perk_npy *npy, perk_error *err) {
    return perk_fail(err, PERK_IO, "%s: cannot write: %s", npy->path, strerror(errno));
}

/* Magic, version, length of the text, then a Python dictionary, padded so that the data begin at a multiple of 64. */
static perk_status write_header(perk_npy *npy, uint64_t rows, perk_error *err) {
    char text[192];
    int length = snprintf(text, sizeof text, "{'descr': '<f4', 'fortran_order': False, 'shape': (%llu, %llu), }",
                          (unsigned long long)rows, (unsigned long long)npy->cols);
    const size_t preamble = 10; /* magic 6, version 2, length 2 */
    size_t padded = (size_t)perk_round_up(preamble + (size_t)length + 1, 64) - preamble;
    unsigned char start[] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, (unsigned char)padded, (unsigned char)(padded >> 8)};
    memset(text + length, ' ', padded - (size_t)length);
    text[padded - 1] = '\n';
    if (fwrite(start, sizeof start, 1, npy->file) != 1 || fwrite(text, padded, 1, npy->file) != 1)
        return fail(npy, err);
    return PERK_OK;
}

perk_status perk_npy_create(perk_npy *npy, const char *path, uint64_t rows, uint64_t cols, perk_error *err) {
    *npy = (perk_npy){.path = path, .cols = cols};
    npy->file = fopen(path, "wbe");
    if (!npy->file) return perk_fail(err, PERK_IO, "%s: cannot create: %s", path, strerror(errno));
    perk_status status = write_header(npy, rows, err);
    if (status) perk_npy_close(npy, false, NULL);
    return status;
}

perk_status perk_npy_write(perk_npy *npy, const float *values, size_t rows, perk_error *err) {
    size_t count = rows * (size_t)npy->cols;
    return fwrite(values, sizeof *values, count, npy->file) == count ? PERK_OK : fail(npy, err);
}

perk_status perk_npy_close(perk_npy *npy, bool keep, perk_error *err) {
    if (!npy->file) return PERK_OK;
    struct stat info;
    bool regular = fstat(fileno(npy->file), &info) == 0 && S_ISREG(info.st_mode);
    perk_status status = fclose(npy->file) == 0 ? PERK_OK : fail(npy, err);
    npy->file = NULL;
    if ((!keep || status) && regular) unlink(npy->path);
    return status;
}
