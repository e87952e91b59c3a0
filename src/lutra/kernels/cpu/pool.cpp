#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define LUTRA_FORKS 1
#endif

namespace lutra {
namespace {

#if defined(__x86_64__) || defined(__i386__)
inline void relax() { __builtin_ia32_pause(); }
#elif defined(__aarch64__)
inline void relax() { asm volatile("yield"); }
#else
inline void relax() {}
#endif

// Longer than the gap between two layers of a model in Python, shorter than a scheduler's slice.
constexpr std::chrono::microseconds kSpin{60};

struct alignas(64) Range {
  std::atomic<int> next{0};
  int end = 0;
};

class Pool {
 public:
  void run(int items, int threads, Work work, void* context) {
    if (!caller_.try_lock()) {
      for (int i = 0; i < items; i++) work(context, i, 0);
      return;
    }
    std::lock_guard<std::mutex> unlock(caller_, std::adopt_lock);
    threads_ = grow(threads), work_ = work, context_ = context;
    for (int t = 0; t < threads_; t++) {
      const int begin = (int)((long long)items * t / threads_);
      ranges_[t].next.store(begin, std::memory_order_relaxed);
      ranges_[t].end = (int)((long long)items * (t + 1) / threads_);
    }
    const uint64_t job = state_.load(std::memory_order_relaxed) / kJob + 1;
    state_.store(job * kJob | kOpen, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) {
      { std::lock_guard<std::mutex> lock(sleep_); }
      wake_.notify_all();
    }
    take(0);
    // Nobody joins a closed job; only workers that did are waited for, not one that slept or had
    // no core all the while.
    state_.fetch_and(~kOpen, std::memory_order_acq_rel);
    for (int spins = 0; (state_.load(std::memory_order_acquire) & (kOpen - 1)) != 0; spins++)
      if (spins < 4096)
        relax();
      else
        std::this_thread::yield();
  }

 private:
  // state_: the number of jobs so far in the upper half, whether the last one is open, and the
  // number of workers inside it.
  static constexpr uint64_t kJob = uint64_t(1) << 32, kOpen = uint64_t(1) << 31;

  int grow(int threads) {
    if (threads > kMaxThreads) threads = kMaxThreads;
    while (workers_ + 1 < threads) {
      const int id = workers_ + 1;
      try {
        std::thread([this, id] { serve(id); }).detach();
      } catch (const std::system_error&) {
        break;  // the system gives no more threads: fewer do the work
      }
      workers_++;
    }
    return threads < workers_ + 1 ? threads : workers_ + 1;
  }

  void take(int self) {
    for (int k = 0; k < threads_; k++) {
      Range& range = ranges_[(self + k) % threads_];
      for (;;) {
        const int item = range.next.fetch_add(1, std::memory_order_relaxed);
        if (item >= range.end) break;
        work_(context_, item, self);
      }
    }
  }

  void serve(int id) {
    uint64_t seen = state_.load(std::memory_order_acquire) / kJob;
    for (;;) {
      uint64_t state = await_job(seen);
      seen = state / kJob;
      while ((state & kOpen) && state / kJob == seen)
        if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) {
          if (id < threads_) take(id);
          state_.fetch_sub(1, std::memory_order_acq_rel);
          break;
        }
    }
  }

  // Spins, then sleeps, until the number of jobs is not `seen`.
  uint64_t await_job(uint64_t seen) {
    uint64_t state = state_.load(std::memory_order_acquire);
    if (state / kJob != seen) return state;
    const auto until = std::chrono::steady_clock::now() + kSpin;
    for (int spins = 1;; spins++) {
      relax();
      state = state_.load(std::memory_order_acquire);
      if (state / kJob != seen) return state;
      if (spins % 64 == 0 && std::chrono::steady_clock::now() > until) break;
    }
    std::unique_lock<std::mutex> lock(sleep_);
    sleeping_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock, [&] {
      state = state_.load(std::memory_order_seq_cst);
      return state / kJob != seen;
    });
    sleeping_.fetch_sub(1, std::memory_order_seq_cst);
    return state;
  }

  std::mutex caller_;
  std::atomic<uint64_t> state_{0};
  std::atomic<int> sleeping_{0};
  std::mutex sleep_;
  std::condition_variable wake_;
  int workers_ = 0, threads_ = 0;
  Work work_ = nullptr;
  void* context_ = nullptr;
  Range ranges_[kMaxThreads];
};

// Never destroyed: its threads outlive static destructors. A forked child has none of the threads
// and perhaps a locked mutex, so it starts a new pool.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
  Pool* existing = the_pool.load(std::memory_order_acquire);
  if (existing) return *existing;
#ifdef LUTRA_FORKS
  static std::once_flag once;
  std::call_once(once, [] {
    pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr, std::memory_order_release); });
  });
#endif
  Pool* fresh = new Pool;
  if (the_pool.compare_exchange_strong(existing, fresh, std::memory_order_acq_rel)) return *fresh;
  delete fresh;
  return *existing;
}

}  // namespace

void run_parallel(int items, int threads, Work work, void* context) {
  if (threads <= 1 || items <= 1) {
    for (int i = 0; i < items; i++) work(context, i, 0);
    return;
  }
  pool().run(items, threads < items ? threads : items, work, context);
}

}  // namespace lutra
