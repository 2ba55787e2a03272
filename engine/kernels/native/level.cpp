// Compiled once for each level, with HOCKET_LEVEL its namespace and HOCKET_TABLE its table.
#include "level.h"

#include "argmax.h"
#include "attention.h"
#include "dense.h"
#include "limits.h"
#include "sampling.h"

namespace hocket {
namespace HOCKET_LEVEL {

template <void (*stage)(Member&, const DenseArgs&)>
static void dense_job(Member& me, const void* args) {
  stage(me, *static_cast<const DenseArgs*>(args));
}

template <class Num>
static void attend_job(Member& me, const void* args) {
  attend<Num>(me, *static_cast<const AttentionArgs*>(args));
}

static void argmax_job(Member& me, const void* args) {
  argmax(me, *static_cast<const ArgmaxArgs*>(args));
}

static void draw_job(Member& me, const void* args) {
  draw_rows(me, *static_cast<const DrawArgs*>(args));
}

static void read_job(Member& me, const void* args) {
  read_memory(me, *static_cast<const ReadArgs*>(args));
}

template <class Num>
static void pack(const void* matrix, int num_columns, int depth, int panel, void* to) {
  using W = typename Num::W;
  pack_panel<Num>(static_cast<const W*>(matrix), num_columns, depth, panel, static_cast<W*>(to));
}

template <class Num>
constexpr Stages stages() {
  return {dense_job<first<Num>>, dense_job<middle<Num>>, dense_job<last<Num>>,
          attend_job<Num>,       pack<Num>,              static_cast<int>(sizeof(typename Num::A))};
}

}  // namespace HOCKET_LEVEL

#define HOCKET_TEXT(x) #x
#define HOCKET_NAME(x) HOCKET_TEXT(x)
const Level HOCKET_TABLE = {HOCKET_NAME(HOCKET_LEVEL), HOCKET_LEVEL::stages<HOCKET_LEVEL::Float32>(),
                            HOCKET_LEVEL::stages<HOCKET_LEVEL::BFloat16>(), HOCKET_LEVEL::argmax_job,
                            HOCKET_LEVEL::draw_job,
                            HOCKET_LEVEL::read_job};

}  // namespace hocket
