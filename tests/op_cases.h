/* Cases of ops that several tests run: see perk_op_case in src/test_ops.h. */
#ifndef PERK_TESTS_OP_CASES_H
#define PERK_TESTS_OP_CASES_H

#include "test_ops.h"

/* Two layers in which no width is a multiple of anything, three requests. */
#define ODD_DECODER(row_count, live_rows)                                                                              \
    {                                                                                                                  \
        .op = "decoder", .rows = (row_count), .live = (live_rows), .in = 72, .out = 100, .heads = 3, .kv_heads = 1,    \
        .head_dim = 32, .context = 40, .requests = 3                                                                   \
    }

#endif
