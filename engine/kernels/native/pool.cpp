#include "pool.h"

#include <linux/futex.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <climits>
#include <stdexcept>

namespace hocket {

static_assert(sizeof(std::atomic<uint32_t>) == 4, "a futex is 32 bits");

static long futex(std::atomic<uint32_t>& word, int operation, uint32_t value) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation, value, nullptr, nullptr, 0);
}

Pool::Pool(int num_threads, int spin_us)
    : num_threads_(num_threads), spin_us_(spin_us), ranges_(num_threads), ring_(kRing) {
  for (int id = 1; id < num_threads; id++) threads_.emplace_back([this, id] { work(id); });
}

Pool::~Pool() {
  stopping_ = true;
  stage_.fetch_add(1);
  wake();
  for (std::thread& thread : threads_) thread.join();
}

void Pool::run(Job job, const void* args, int num_bytes) {
  if (num_bytes > kMaxArgs) throw std::logic_error("the arguments of a stage are too large");
  const uint32_t stage = stage_.load(std::memory_order_relaxed) + 1;
  Entry& entry = ring_[stage % kRing];
  entry.job = job;
  entry.loop = loop_;
  entry.target = target_;
  if (num_bytes) memcpy(entry.args, args, num_bytes);
  stage_.store(stage, std::memory_order_seq_cst);
  if (num_parked_.load(std::memory_order_seq_cst)) wake();
  Member me{this, 0, loop_, stage, target_};
  job(me, args);
  loop_ = me.loop;
  target_ = me.target;
}

void Pool::settle() {
  run([](Member&, const void*) {}, nullptr, 0);  // whoever is late finds this one
  while (num_inside_.load(std::memory_order_seq_cst)) std::this_thread::yield();
}

void Pool::work(int id) {
  for (uint32_t last = 0;;) {
    const uint32_t stage = wait_stage(last);
    if (stopping_.load()) return;
    num_inside_.fetch_add(1, std::memory_order_seq_cst);
    Entry entry;
    memcpy(&entry, &ring_[stage % kRing], sizeof(Entry));
    std::atomic_thread_fence(std::memory_order_acquire);
    // An entry is only written over when its stage is long past, and then the copy is worthless.
    if (stage_.load(std::memory_order_seq_cst) == stage) {
      last = stage;
      Member me{this, id, entry.loop, stage, entry.target};
      entry.job(me, entry.args);
    }
    num_inside_.fetch_sub(1, std::memory_order_seq_cst);
  }
}

bool Pool::wait_long(uint64_t target, uint32_t stage) {
  wait_until([&] {
    return done_.load(std::memory_order_seq_cst) >= target ||
           stage_.load(std::memory_order_seq_cst) != stage;
  });
  return done_.load(std::memory_order_acquire) >= target &&
         stage_.load(std::memory_order_acquire) == stage;
}

uint32_t Pool::wait_stage(uint32_t last) {
  wait_until([&] { return stage_.load(std::memory_order_seq_cst) != last; });
  return stage_.load(std::memory_order_acquire);
}

template <class Ready>
void Pool::wait_until(const Ready& is_ready) {
  using Clock = std::chrono::steady_clock;
  const auto until = Clock::now() + std::chrono::microseconds(spin_us_);
  do {
    for (int i = 0; i < 32; i++) {
      if (is_ready()) return;
      _mm_pause();
    }
  } while (Clock::now() < until);
  num_parked_.fetch_add(1, std::memory_order_seq_cst);
  for (;;) {
    const uint32_t seen = futex_.load(std::memory_order_seq_cst);
    if (is_ready()) break;
    futex(futex_, FUTEX_WAIT_PRIVATE, seen);
  }
  num_parked_.fetch_sub(1, std::memory_order_seq_cst);
}

void Pool::wake() {
  futex_.fetch_add(1, std::memory_order_seq_cst);
  futex(futex_, FUTEX_WAKE_PRIVATE, INT_MAX);
}

}  // namespace hocket
