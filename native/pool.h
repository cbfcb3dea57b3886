// The thread pool of XLA as the kernels' pool. The calling thread works too, and waits only for tasks that have begun, so
// that it is slower, but never stuck, if all threads of the pool are busy.
#pragma once

#include <atomic>
#include <exception>
#include <memory>
#include <thread>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace msbp {

class XlaPool final : public Pool {
 public:
  // `work` is a rough count of vector operations; below some 20 microseconds of it, waking a thread does not pay.
  XlaPool(xla::ffi::ThreadPool pool, int64_t work) : pool_(pool), threads_(pool.num_threads()) {
    if (threads_ < 1 || work < kWorthSharing) threads_ = 1;
  }

  int64_t threads() const override { return threads_; }

  void run(int64_t tasks, void (*task)(void*, int64_t), void* context) override {
    if (tasks <= 1 || threads_ == 1) {
      for (int64_t i = 0; i < tasks; ++i) task(context, i);
      return;
    }
    auto loop = std::make_shared<Loop>(tasks, task, context);
    const int64_t helpers = (threads_ < tasks ? threads_ : tasks) - 1;
    for (int64_t i = 0; i < helpers; ++i) pool_.Schedule([loop] { loop->work(); });
    loop->work();
    for (int spins = 0; loop->finished.load(std::memory_order_acquire) < tasks; ++spins) {
      if (spins > 1000) std::this_thread::yield();
    }
    if (loop->failed.load(std::memory_order_acquire)) throw std::bad_alloc();
  }

 private:
  struct Loop {
    Loop(int64_t tasks, void (*task)(void*, int64_t), void* context) : tasks(tasks), task(task), context(context) {}

    void work() {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        try {
          task(context, i);
        } catch (const std::exception&) {  // the only failure is that memory runs out
          failed.store(true, std::memory_order_release);
        }
        finished.fetch_add(1, std::memory_order_acq_rel);
      }
    }

    const int64_t tasks;
    void (*const task)(void*, int64_t);
    void* const context;
    std::atomic<int64_t> next{0}, finished{0};
    std::atomic<bool> failed{false};
  };

  static constexpr int64_t kWorthSharing = 1 << 16;

  xla::ffi::ThreadPool pool_;
  int64_t threads_;
};

}  // namespace msbp
