// What Python sees. Addresses are those of tensors that its side keeps alive; it has checked their
// shapes and types. Every stage runs without the interpreter's lock.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <stdlib.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include "attention_plan.h"
#include "level.h"
#include "types.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace hocket {
namespace {

using Address = uint64_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
using Array = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;

constexpr int kPanel = 32;  // as in gemm.h

// The levels this machine can run, the best last.
std::vector<const Level*> usable_levels() {
  std::vector<const Level*> levels;
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return levels;
  levels.push_back(&kAvx2);
  const bool is_wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!is_wide) return levels;
  const bool has_bf16 = __builtin_cpu_supports("avx512bf16");
  // Intel's cores take a product of bf16 pairs every second cycle, and two of fp32 in each: measured
  // on a fifth-generation Xeon, 80 and 157 GFLOP/s a core. AMD's take one of either, so pairs win.
  const bool is_slow = __builtin_cpu_is("intel");
  if (has_bf16 && is_slow) levels.push_back(&kAvx512Bf16);
  levels.push_back(&kAvx512);
  if (has_bf16 && !is_slow) levels.push_back(&kAvx512Bf16);
  return levels;
}

std::vector<std::string> level_names() {
  std::vector<std::string> names;
  for (const Level* level : usable_levels()) names.push_back(level->name);
  return names;
}

struct SpoiledArgs {
  const void* numbers;
  int num_rows, size, number_bytes;
  bool* out;
};

// All bits of the exponent are set in NaN and infinities, and in nothing else.
template <class Bits>
bool is_spoiled(const Bits* numbers, int size, Bits exponent) {
  Bits found = 0;
  for (int i = 0; i < size; i++) found |= (numbers[i] & exponent) == exponent;
  return found;
}

void spoiled_job(Member& me, const void* args) {
  const SpoiledArgs& a = *static_cast<const SpoiledArgs*>(args);
  me.each(a.num_rows, [&](int row) {
    const int64_t at = static_cast<int64_t>(row) * a.size;
    a.out[row] |= a.number_bytes == 4
        ? is_spoiled(static_cast<const uint32_t*>(a.numbers) + at, a.size, 0x7f800000u)
        : is_spoiled(static_cast<const uint16_t*>(a.numbers) + at, a.size, uint16_t{0x7f80});
  });
}

// Threads and the level of instructions that all stages of one engine use.
class Machine {
 public:
  Machine(const std::string& level, int num_threads, bool is_bf16) : pool(num_threads) {
    for (const Level* usable : usable_levels()) {
      if (usable->name == level) level_ = usable;
    }
    if (!level_) throw std::invalid_argument("this machine has no level " + level);
    stages = is_bf16 ? &level_->bfloat16 : &level_->float32;
    number_bytes = is_bf16 ? 2 : 4;
  }

  void argmax(Address logits, int num_rows, int size, Address peaks, Address ids) {
    const ArgmaxArgs args{at<float>(logits), num_rows, size, at<float>(peaks), at<int64_t>(ids)};
    pool.run(level_->argmax, &args, sizeof(args));
  }

  // Draws a token for each of `rows`, arrays of one length; writes ids[rows[i]].
  void draw(Address logits, int size, Array<int64_t> rows, Array<float> temperature,
            Array<float> top_p, Array<int64_t> top_k, Array<float> min_p, Array<int64_t> seed,
            Array<int64_t> choice, Array<int64_t> position, Address ids) {
    std::vector<DrawRow> draws;
    for (size_t i = 0; i < rows.size(); i++) {
      const int64_t row = rows.data()[i];
      draws.push_back({row, seed.data()[row], choice.data()[row], position.data()[row],
                       top_k.data()[row], temperature.data()[row], top_p.data()[row],
                       min_p.data()[row]});
    }
    const int64_t stride = 2 * ((static_cast<int64_t>(size) + 63) / 64 * 64);
    scratch_.resize(std::max<size_t>(scratch_.size(), stride * pool.num_threads()));
    const DrawArgs args{at<float>(logits), size, static_cast<int>(draws.size()), draws.data(),
                        at<int64_t>(ids), scratch_.data(), stride};
    nb::gil_scoped_release unlocked;
    pool.run(level_->draw, &args, sizeof(args));
  }

  // Reads memory once and forgets it: whole pieces of 256 KiB.
  void read(Address data, int64_t num_bytes) {
    float sink;
    const ReadArgs args{at<float>(data), num_bytes / 4, &sink};
    pool.run(level_->read, &args, sizeof(args));
  }

  // Ors into `out` whether a row of numbers, of 4 or 2 bytes, has NaN or an infinity.
  void find_spoiled(Address numbers, int num_rows, int size, int number_bytes, Address out) {
    const SpoiledArgs args{at<void>(numbers), num_rows, size, number_bytes, at<bool>(out)};
    pool.run(&spoiled_job, &args, sizeof(args));
  }

  Pool pool;
  const Stages* stages;
  int number_bytes;

 private:
  const Level* level_ = nullptr;
  std::vector<float> scratch_;
};

class PagedAttention {
 public:
  PagedAttention(std::shared_ptr<Machine> machine, Address cache, int64_t block_stride,
                 int64_t layer_stride, int64_t value_offset, int64_t head_stride, int num_heads,
                 int num_kv_heads, int head_dim)
      : machine_(std::move(machine)),
        cache_{at<void>(cache), block_stride, layer_stride, value_offset, head_stride},
        num_heads_(num_heads),
        num_kv_heads_(num_kv_heads),
        head_dim_(head_dim) {}

  PreparedAttention prepare(Array<int64_t> query_start, Array<int64_t> seq_len,
                            Array<int64_t> slots, Array<int32_t> table) {
    const BatchShape batch{static_cast<int>(seq_len.size()), static_cast<int>(table.shape(1)),
                           query_start.data(), seq_len.data(), slots.data(), table.data()};
    if (query_start.size() != seq_len.size() + 1 || table.shape(0) != seq_len.size() ||
        slots.size() != static_cast<size_t>(query_start.data()[batch.num_rows])) {
      throw std::invalid_argument("the arrays of a batch do not fit each other");
    }
    PreparedAttention plan = plan_attention(batch, num_heads_, num_kv_heads_, head_dim_,
                                            machine_->pool.num_threads());
    if (partial_.size() < static_cast<size_t>(plan.partial_size)) partial_.resize(plan.partial_size);
    return plan;
  }

  void attend(int layer, const PreparedAttention& prepared, Address query, Address key,
              Address value, int64_t stride, Address out, Address lse) {
    const AttentionArgs args{&prepared,
                             prepared.num_tokens,
                             static_cast<int>(prepared.items.size()),
                             static_cast<int>(prepared.merges.size()),
                             prepared.are_single,
                             cache_,
                             layer,
                             num_heads_,
                             num_kv_heads_,
                             head_dim_,
                             1.f / __builtin_sqrtf(static_cast<float>(head_dim_)),
                             at<void>(query),
                             at<void>(key),
                             at<void>(value),
                             stride,
                             at<void>(out),
                             at<float>(lse),
                             partial_.data()};
    machine_->pool.run(machine_->stages->attend, &args, sizeof(args));
  }

 private:
  std::shared_ptr<Machine> machine_;
  Cache cache_;
  int num_heads_, num_kv_heads_, head_dim_;
  std::vector<float> partial_;  // of the stage that runs
};

struct FreeMemory {
  void operator()(void* memory) const { free(memory); }
};

struct PackArgs {
  const Stages* stages;
  const void* matrix;
  int num_columns, depth;
  void* packed;
};

class LlamaModel {
 public:
  LlamaModel(const LlamaModel&) = delete;
  ~LlamaModel() { machine_->pool.settle(); }
  LlamaModel(std::shared_ptr<Machine> machine, int hidden_size, int intermediate_size,
             int num_heads, int num_kv_heads, int head_dim, int vocab_size, float norm_eps,
             Address embedding, Address cos, Address sin)
      : machine_(std::move(machine)) {
    model_.hidden_size = hidden_size;
    model_.intermediate_size = intermediate_size;
    model_.num_heads = num_heads;
    model_.num_kv_heads = num_kv_heads;
    model_.head_dim = head_dim;
    model_.vocab_size = vocab_size;
    model_.norm_eps = norm_eps;
    model_.embedding = at<void>(embedding);
    model_.cos = at<float>(cos);
    model_.sin = at<float>(sin);
  }

  void add_layer(Address attention_norm, Address qkv, Address out, Address mlp_norm,
                 Address gate_up, Address down) {
    const int width = model_.num_heads * model_.head_dim;
    const int kv_width = model_.num_kv_heads * model_.head_dim;
    const int size = model_.hidden_size, inner = model_.intermediate_size;
    model_.layers.push_back({pack(qkv, width + 2 * kv_width, size), pack(out, size, width),
                             pack(gate_up, 2 * inner, size), pack(down, size, inner),
                             at<float>(attention_norm), at<float>(mlp_norm)});
  }

  void set_head(Address norm, Address head) {
    model_.norm = at<float>(norm);
    model_.head = pack(head, model_.vocab_size, model_.hidden_size);
  }

  void first(const Buffers& buffers, int num_tokens) {
    run(machine_->stages->first, {&model_, buffers, 0, num_tokens, nullptr, nullptr, {}, nullptr});
  }

  void middle(int layer, const Buffers& buffers, Address attended, int num_tokens) {
    run(machine_->stages->middle,
        {&model_, buffers, layer, num_tokens, nullptr, nullptr, {}, at<void>(attended)});
  }

  // `first`, and every `middle`, with the attention between them and the last layer's.
  void forward(const Buffers& buffers, int num_tokens, PagedAttention& attention,
               const PreparedAttention& prepared, Address attended) {
    const Address query = reinterpret_cast<Address>(buffers.qkv);
    const int64_t size = machine_->stages->activation_bytes * model_.head_dim;
    const Address key = query + model_.num_heads * size, value = key + model_.num_kv_heads * size;
    const int64_t stride = (model_.num_heads + 2 * model_.num_kv_heads) * model_.head_dim;
    first(buffers, num_tokens);
    for (int layer = 0, num = static_cast<int>(model_.layers.size()); layer < num; layer++) {
      if (layer) middle(layer, buffers, attended, num_tokens);
      attention.attend(layer, prepared, query, key, value, stride, attended, 0);
    }
  }

  void last(const Buffers& buffers, Address attended, const Buffers& sampled, Address rows,
            int num_rows, Address logits) {
    run(machine_->stages->last,
        {&model_, buffers, 0, num_rows, at<int64_t>(rows), at<float>(logits), sampled,
         at<void>(attended)});
  }

 private:
  void run(Pool::Job job, const DenseArgs& args) { machine_->pool.run(job, &args, sizeof(args)); }

  Matrix pack(Address matrix, int num_columns, int depth) {
    const int panels = (num_columns + kPanel - 1) / kPanel;
    const int64_t num_bytes = static_cast<int64_t>(panels) * kPanel * depth * machine_->number_bytes;
    const int64_t padded = (num_bytes + 4095) / 4096 * 4096;
    void* memory = aligned_alloc(4096, padded);
    if (!memory) throw std::bad_alloc();
    memory_.emplace_back(memory);
    const PackArgs args{machine_->stages, at<void>(matrix), num_columns, depth, memory};
    machine_->pool.run(&pack_job, &args, sizeof(args));
    return {memory, num_columns, depth};
  }

  static void pack_job(Member& me, const void* args) {
    const PackArgs& a = *static_cast<const PackArgs*>(args);
    me.each((a.num_columns + kPanel - 1) / kPanel, [&](int panel) {
      a.stages->pack_panel(a.matrix, a.num_columns, a.depth, panel, a.packed);
    });
  }

  std::shared_ptr<Machine> machine_;
  Llama model_;
  std::vector<std::unique_ptr<void, FreeMemory>> memory_;
};

}  // namespace
}  // namespace hocket

NB_MODULE(_native, m) {
  using namespace hocket;
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  nb::set_leak_warnings(false);
  m.def("levels", &level_names);
  nb::class_<Machine>(m, "Machine")
      .def(nb::init<const std::string&, int, bool>(), "level"_a, "num_threads"_a, "is_bf16"_a)
      .def_prop_ro("activation_bytes", [](const Machine& self) { return self.stages->activation_bytes; })
      .def("argmax", &Machine::argmax, Unlocked())
      .def("draw", &Machine::draw)
      .def("read", &Machine::read, Unlocked())
      .def("find_spoiled", &Machine::find_spoiled, Unlocked());
  nb::class_<Buffers>(m, "Buffers")
      .def("__init__",
           [](Buffers* self, Address token_ids, Address positions,
              Address residual, Address hidden, Address qkv, Address mlp) {
             new (self) Buffers{at<int64_t>(token_ids), at<int64_t>(positions),
                                at<float>(residual), at<void>(hidden), at<void>(qkv), at<void>(mlp)};
           });
  nb::class_<PreparedAttention>(m, "PreparedAttention");
  nb::class_<PagedAttention>(m, "PagedAttention")
      .def(nb::init<std::shared_ptr<Machine>, Address, int64_t, int64_t, int64_t, int64_t, int, int, int>())
      .def("prepare", &PagedAttention::prepare)
      .def("attend", &PagedAttention::attend, Unlocked());
  nb::class_<LlamaModel>(m, "LlamaModel")
      .def(nb::init<std::shared_ptr<Machine>, int, int, int, int, int, int, float, Address, Address, Address>())
      .def("add_layer", &LlamaModel::add_layer, Unlocked())
      .def("set_head", &LlamaModel::set_head, Unlocked())
      .def("first", &LlamaModel::first, Unlocked())
      .def("middle", &LlamaModel::middle, Unlocked())
      .def("forward", &LlamaModel::forward, Unlocked())
      .def("last", &LlamaModel::last, Unlocked());
}
