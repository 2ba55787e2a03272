// The stages as one level of instructions has them: a table of functions for each.
#pragma once
#include <stdint.h>

#include "pool.h"

namespace hocket {

struct Stages {
  Pool::Job first, middle, last;  // of DenseArgs
  Pool::Job attend;               // of AttentionArgs
  void (*pack_panel)(const void* matrix, int num_columns, int depth, int panel, void* packed);
  int activation_bytes;           // 4: fp32, 2: bf16
};

struct Level {
  const char* name;
  Stages float32, bfloat16;
  Pool::Job argmax;               // of ArgmaxArgs
  Pool::Job draw;                 // of DrawArgs
  Pool::Job read;                 // of ReadArgs
};

extern const Level kAvx2, kAvx512, kAvx512Bf16;

}  // namespace hocket
