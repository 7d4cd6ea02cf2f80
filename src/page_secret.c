#include "page_secret.h"

#include <errno.h>
#include <sys/random.h>

perk_status perk_page_secret_draw(perk_page_secret *out, perk_error *err) {
    ssize_t got;
    while ((got = getrandom(out, sizeof *out, 0)) < 0 && errno == EINTR) continue;
    if (got == (ssize_t)sizeof *out) return PERK_OK;
    return perk_fail(err, PERK_IO, "no random numbers from the system for a secret (getrandom): %s",
                     got < 0 ? strerror(errno) : "fewer than asked for");
}
