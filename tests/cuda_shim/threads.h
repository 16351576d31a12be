// CUDA threads as std::threads, kept from launch to launch. They meet at the beginning and at the end of each run and
// are otherwise unordered.
#pragma once

#include <barrier>
#include <functional>
#include <thread>
#include <vector>

namespace shim {

struct Barrier : std::barrier<> {
  using barrier::barrier;
};

class Workers {
 public:
  explicit Workers(uint32_t count) : barrier_(count + 1) {
    for (uint32_t t = 0; t < count; ++t) threads_.emplace_back([this, t] { serve(t); });
  }
  ~Workers() {
    stop_ = true;
    barrier_.arrive_and_wait();
    for (std::thread& thread : threads_) thread.join();
  }

  void run(const std::function<void(uint32_t)>& work) {
    work_ = &work;
    barrier_.arrive_and_wait();
    barrier_.arrive_and_wait();
  }

 private:
  void serve(uint32_t t) {
    for (;;) {
      barrier_.arrive_and_wait();
      if (stop_) return;
      (*work_)(t);
      barrier_.arrive_and_wait();
    }
  }

  std::barrier<> barrier_;
  bool stop_ = false;
  const std::function<void(uint32_t)>* work_;
  std::vector<std::thread> threads_;  // last: they use the others
};

}  // namespace shim
