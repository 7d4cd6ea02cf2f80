/* Descriptions of devices for the plan: of a real one, or of a named architecture where no GPU is at hand. */
#ifndef PERK_SRC_DEVICE_H
#define PERK_SRC_DEVICE_H

#include "driver.h"
#include "plan.h"

/* The card that programs for `arch` ("sm_90a", "90") are planned for when none is there. PERK_UNSUPPORTED for an
 * architecture older than sm_80, or that perk does not know. */
perk_status perk_device_describe_arch(const char *arch, perk_device_desc *desc, perk_error *err);

/* A real device. */
perk_status perk_device_describe(const perk_device_info *info, perk_device_desc *desc, perk_error *err);

/* Restricts a description to sm_80 instructions. */
void perk_device_make_portable(perk_device_desc *desc);

#endif
