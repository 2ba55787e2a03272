// How the attention of a step is cut into items. Any cut gives the same bits; this one spreads the
// work over the threads.
#include "attention_plan.h"

#include <algorithm>

namespace hocket {

constexpr int kPart = 256;     // as in attention.h
constexpr int kItemRows = 48;  // as in attention.h

PreparedAttention plan_attention(const BatchShape& batch, int num_heads, int num_kv_heads,
                                 int head_dim, int num_threads) {
  PreparedAttention plan;
  plan.num_tokens = static_cast<int>(batch.query_start[batch.num_rows]);
  plan.num_rows = batch.num_rows;
  plan.table_width = batch.table_width;
  plan.are_single = plan.num_tokens == batch.num_rows;
  plan.table.assign(batch.table, batch.table + static_cast<int64_t>(batch.num_rows) * batch.table_width);
  plan.slots.assign(batch.slots, batch.slots + plan.num_tokens);

  const int group = num_heads / num_kv_heads;
  const int tokens_of_item = std::max(1, kItemRows / group);
  int64_t num_keys = 0;  // seen by single tokens, all in all
  for (int row = 0; row < batch.num_rows; row++) {
    if (batch.query_start[row + 1] - batch.query_start[row] == 1) num_keys += batch.seq_len[row];
  }
  // A token alone whose keys are more than an eighth of a thread's share is cut into parts.
  const int64_t share = std::max<int64_t>(2 * kPart, num_keys / (8 * num_threads));
  int64_t num_partial_rows = 0;
  for (int row = 0; row < batch.num_rows; row++) {
    const int start = static_cast<int>(batch.query_start[row]);
    const int length = static_cast<int>(batch.query_start[row + 1]) - start;
    const int seq_len = static_cast<int>(batch.seq_len[row]);
    for (int head = 0; head < num_kv_heads; head++) {
      for (int first = 0; first < length; first += tokens_of_item) {
        AttentionItem item{};
        item.row = row;
        item.token = start + first;
        item.num_tokens = std::min(tokens_of_item, length - first);
        item.position = seq_len - length + first;
        item.head = head;
        const int num_parts = (item.position + item.num_tokens - 1) / kPart + 1;
        const int parts_of_item = static_cast<int>(share / kPart);
        if (length > 1 || num_parts <= parts_of_item) {
          item.num_parts = num_parts;
          item.partial = -1;
          plan.items.push_back(item);
          continue;
        }
        plan.merges.push_back({item.token, head, num_parts, num_partial_rows});
        for (int part = 0; part < num_parts; part += parts_of_item) {
          item.first_part = part;
          item.num_parts = std::min(parts_of_item, num_parts - part);
          item.partial = num_partial_rows + static_cast<int64_t>(part) * group;
          plan.items.push_back(item);
        }
        num_partial_rows += static_cast<int64_t>(num_parts) * group;
      }
    }
  }
  plan.partial_size = num_partial_rows * (2 + head_dim);
  return plan;
}

}  // namespace hocket
