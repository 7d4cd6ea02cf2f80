/* The secret under which pages are hashed (kernels_src/page_hash.h). */
#ifndef PERK_SRC_PAGE_SECRET_H
#define PERK_SRC_PAGE_SECRET_H

#include "base.h"
#include "kernels_src/page_hash.h"

/* From the system's random numbers. */
perk_status perk_page_secret_draw(perk_page_secret *out, perk_error *err);

#endif
