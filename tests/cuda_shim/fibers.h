// CUDA threads as fibers, all in the thread that launches: each runs until it waits at a barrier, then the next does.
// No race shows here, and none is looked for; a launch costs a tenth of what waking hundreds of threads does.
#pragma once

#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

namespace shim {

class Workers {
 public:
  explicit Workers(uint32_t count) : fibers_(count) {}

  void run(const std::function<void(uint32_t)>& work) {
    running_ = this, work_ = &work;
    for (Fiber& fiber : fibers_) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &launcher_;
      fiber.done = false;
      makecontext(&fiber.context, serve, 0);
    }
    for (size_t left = fibers_.size(); left;)
      for (Fiber& fiber : fibers_)
        if (!fiber.done) {
          now_ = &fiber;
          swapcontext(&launcher_, &fiber.context);
          left -= fiber.done;
        }
  }

  // Lets the others run.
  static void yield() {
    const auto thread = threadIdx, in_block = blockIdx;
    Block* const mine = block;
    const int met = barriers_met;
    swapcontext(&running_->now_->context, &running_->launcher_);
    threadIdx = thread, blockIdx = in_block, block = mine, barriers_met = met;
  }

 private:
  static constexpr size_t kStack = 256 << 10;
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool done;
  };

  static void serve() {
    Workers& all = *running_;
    (*all.work_)(uint32_t(all.now_ - all.fibers_.data()));
    all.now_->done = true;
  }

  static inline Workers* running_;  // one launch at a time
  const std::function<void(uint32_t)>* work_;
  ucontext_t launcher_;
  std::vector<Fiber> fibers_;
  Fiber* now_;
};

struct Barrier {
  explicit Barrier(uint32_t count) : threads(count) {}

  void arrive_and_wait() {
    const int mine = phase;
    if (++arrived == threads) arrived = 0, ++phase;
    while (phase == mine) Workers::yield();
  }

  uint32_t threads, arrived = 0;
  int phase = 0;
};

}  // namespace shim
