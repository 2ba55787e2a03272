// A team of threads that runs one stage at a time, each stage a sequence of loops.
//
// A loop's items are dealt out in contiguous ranges, one a thread, and a thread that has finished
// its own takes from the others'. A loop is over when its items are done, not when all threads have
// arrived: one that was preempted holds up the rest by the item in its hands, and no more. When it
// comes back it finds every item taken, or a later stage begun, and catches up.
//
// Waiting is a bounded spin, then a futex: a core that has nothing to do is left to others.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include <atomic>
#include <thread>
#include <vector>

#define HOCKET_INLINE inline __attribute__((always_inline))

namespace hocket {

class Pool;

// One thread's place in a stage. All members of a stage call the same loops in the same order.
struct Member {
  Pool* pool;
  int id;
  uint32_t loop;    // number of the loop last entered; counts over all stages
  uint32_t stage;
  uint64_t target;  // items of all loops up to that one

  // Calls f(i) for each i in [0, n), spread over the threads; returns when all are done. False if
  // the stage ended without this thread: then it must return at once.
  template <class F>
  HOCKET_INLINE bool each(int n, F&& f);

  // The first and the last of `n` items that this thread takes unless others are slow.
  HOCKET_INLINE int first_of(int n) const;
  HOCKET_INLINE int last_of(int n) const;
};

class Pool {
 public:
  using Job = void (*)(Member&, const void* args);
  static constexpr int kMaxArgs = 320;  // bytes; arguments are copied, as stragglers read them late

  explicit Pool(int num_threads, int spin_us = 50);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int num_threads() const { return num_threads_; }

  // Runs job(member, args) on every thread, this one included; returns when its loops are done.
  // Outside of its loops a job changes nothing that others see. Only one thread may call this.
  void run(Job job, const void* args, int num_bytes);

  // Returns when no thread is in any stage: what stages refer to may then be freed.
  void settle();

 private:
  friend struct Member;
  static constexpr int kRing = 64;  // stages whose arguments are kept

  struct alignas(64) Range {
    std::atomic<uint64_t> next{0};  // loop number, then the next item of this thread's range
  };
  struct alignas(64) Entry {
    Job job;
    uint32_t loop;
    uint64_t target;
    unsigned char args[kMaxArgs];
  };

  HOCKET_INLINE int claim(int owner, uint32_t loop, int begin, int end) {
    std::atomic<uint64_t>& word = ranges_[owner].next;
    uint64_t seen = word.load(std::memory_order_relaxed);
    for (;;) {
      const int32_t age = static_cast<int32_t>(static_cast<uint32_t>(seen >> 32) - loop);
      if (age > 0) return -1;  // a later loop has begun, so this one is over
      const int next = age == 0 ? static_cast<int>(static_cast<uint32_t>(seen)) : begin;
      if (next >= end) return -1;
      const uint64_t taken = static_cast<uint64_t>(loop) << 32 | static_cast<uint32_t>(next + 1);
      if (word.compare_exchange_weak(seen, taken, std::memory_order_acq_rel)) return next;
    }
  }

  HOCKET_INLINE void finish(int num_items, uint64_t target) {
    const uint64_t done = done_.fetch_add(num_items, std::memory_order_seq_cst) + num_items;
    if (done == target && num_parked_.load(std::memory_order_seq_cst)) wake();
  }

  HOCKET_INLINE bool wait(uint64_t target, uint32_t stage) {
    if (done_.load(std::memory_order_acquire) >= target) return true;
    return wait_long(target, stage);
  }

  bool wait_long(uint64_t target, uint32_t stage);
  uint32_t wait_stage(uint32_t last);
  template <class Ready>
  void wait_until(const Ready& is_ready);
  void wake();
  void work(int id);

  const int num_threads_;
  const int spin_us_;
  std::vector<Range> ranges_;
  std::vector<Entry> ring_;
  std::vector<std::thread> threads_;
  uint32_t loop_ = 0;     // the caller's, between stages
  uint64_t target_ = 0;
  alignas(64) std::atomic<uint64_t> done_{0};   // items of all loops ever
  alignas(64) std::atomic<uint32_t> stage_{0};
  alignas(64) std::atomic<uint32_t> num_parked_{0};
  std::atomic<uint32_t> num_inside_{0};  // workers that may be in a stage
  std::atomic<uint32_t> futex_{0};
  std::atomic<bool> stopping_{false};
};

HOCKET_INLINE int start_of(int n, int id, int num_threads) {
  return static_cast<int>(static_cast<int64_t>(n) * id / num_threads);
}

HOCKET_INLINE int Member::first_of(int n) const { return start_of(n, id, pool->num_threads_); }

HOCKET_INLINE int Member::last_of(int n) const {
  return start_of(n, id + 1, pool->num_threads_) - 1;
}

template <class F>
HOCKET_INLINE bool Member::each(int n, F&& f) {
  loop++;
  target += n;
  const int num = pool->num_threads_;
  int num_done = 0;
  for (int k = 0, owner = id; k < num; k++, owner = owner + 1 == num ? 0 : owner + 1) {
    const int begin = start_of(n, owner, num), end = start_of(n, owner + 1, num);
    for (int i; (i = pool->claim(owner, loop, begin, end)) >= 0; num_done++) f(i);
  }
  if (num_done) pool->finish(num_done, target);
  return pool->wait(target, stage);
}

}  // namespace hocket
