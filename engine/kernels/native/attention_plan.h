#pragma once
#include "types.h"

namespace hocket {

// Row r computes the tokens [query_start[r], query_start[r + 1]), the last of its seq_len[r].
struct BatchShape {
  int num_rows;
  int table_width;
  const int64_t* query_start;
  const int64_t* seq_len;
  const int64_t* slots;
  const int32_t* table;  // [num_rows][table_width]
};

PreparedAttention plan_attention(const BatchShape& batch, int num_heads, int num_kv_heads,
                                 int head_dim, int num_threads);

}  // namespace hocket
