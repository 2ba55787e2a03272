// What the dense slices and attention work on: plain pointers, owned by Python's tensors.
#pragma once
#include <stdint.h>

#include <vector>

namespace hocket {

struct Matrix {
  const void* data;  // packed, see gemm.h
  int num_columns;
  int depth;
};

struct LlamaLayer {
  Matrix qkv;      // q, k, v; the two halves of each head of q and k interleaved
  Matrix out;
  Matrix gate_up;  // 16 of gate, 16 of up, 16 of gate, ...
  Matrix down;
  const float* attention_norm;
  const float* mlp_norm;
};

struct Llama {
  int hidden_size;        // E, a multiple of 16, as are F and D
  int intermediate_size;  // F
  int num_heads;          // H
  int num_kv_heads;       // G
  int head_dim;           // D
  int vocab_size;         // V
  float norm_eps;
  const void* embedding;  // [V, E], W
  const float* cos;       // [positions, D / 2]
  const float* sin;
  const float* norm;
  Matrix head;
  std::vector<LlamaLayer> layers;
};

// The numbers of one batch on their way through the slices, each row-major [tokens, width].
struct Buffers {
  int64_t* token_ids;
  int64_t* positions;
  float* residual;  // E
  void* hidden;     // E, A: normalised, for the next product
  void* qkv;        // (H + 2 G) D, A
  void* mlp;        // F, A
};

// Where keys and values lie: W, [block][layer][k|v][kv head][packed slots], see attention.h.
struct Cache {
  void* data;
  int64_t block_stride;  // in numbers, as the others
  int64_t layer_stride;
  int64_t value_offset;
  int64_t head_stride;
};

// Some query tokens of one request and key head, and the parts of the keys they look at.
struct AttentionItem {
  int row;
  int token;       // first
  int num_tokens;
  int position;    // of the first
  int head;        // of keys
  int first_part;
  int num_parts;
  int64_t partial;  // where in the scratch its parts' results go, or -1: straight to the output
};

// Parts computed as items of their own, to be merged: those of one token and key head.
struct AttentionMerge {
  int token;
  int head;
  int num_parts;
  int64_t partial;  // of the first part
};

struct PreparedAttention {
  int num_tokens;
  int num_rows;
  int table_width;
  bool are_single;  // every row computes one token
  std::vector<int32_t> table;   // [row][table_width], block numbers
  std::vector<int64_t> slots;   // of each token: block * 16 + offset
  std::vector<AttentionItem> items;
  std::vector<AttentionMerge> merges;
  int64_t partial_size;         // floats of scratch
};

// Arguments of the stages, which travel to the threads by value. How many items a loop has must
// follow from them, and from what lives as long as the pool.
struct DenseArgs {
  const Llama* model;
  Buffers buffers;
  int layer;            // the one to project
  int num_tokens;
  const int64_t* rows;  // last: which tokens are sampled
  float* logits;        // last: [num_tokens, V]
  Buffers sampled;      // last: where the sampled tokens go on
  const void* attended;  // A, [tokens, H D]
};

struct AttentionArgs {
  const PreparedAttention* prepared;  // for items only: a straggler may come when it is gone
  int num_tokens;                     // the following four are its
  int num_items;
  int num_merges;
  bool are_single;
  Cache cache;
  int layer;
  int num_heads;     // H
  int num_kv_heads;  // G
  int head_dim;      // D
  float scale;
  const void* query;  // A, [tokens, stride], as the next two
  const void* key;
  const void* value;
  int64_t stride;
  void* out;         // A, [tokens, H D]
  float* lse;        // [tokens, H] or null: log-sum-exp of the scaled scores
  float* partial;    // scratch of items that are parts
};

struct ArgmaxArgs {
  const float* logits;  // [num_rows, size]
  int num_rows;
  int size;
  float* peaks;         // NaN or infinite if any logit is
  int64_t* ids;         // the lowest id of a tie
};

struct ReadArgs {
  const float* data;
  int64_t num_floats;
  float* sink;  // hardly ever written to, so that the sums are not left out
};

// How one row draws its token; the fields of SamplingParams.
struct DrawRow {
  int64_t index;  // of the row of logits, and of the id
  int64_t seed;
  int64_t choice;
  int64_t position;
  int64_t top_k;  // 0 or less: off
  float temperature;
  float top_p;
  float min_p;
};

struct DrawArgs {
  const float* logits;  // [rows, size]
  int size;
  int num_rows;         // that draw
  const DrawRow* rows;
  int64_t* ids;
  float* scratch;       // of each thread, two stretches of the size rounded up to 64
  int64_t scratch_stride;
};

}  // namespace hocket
