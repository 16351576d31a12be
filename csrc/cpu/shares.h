// Who works on which share of a list. Cores don't take equally long for the same bytes: what one of them has just
// written, another behind a different cache reads at 40 GB/s instead of 100, and any of them may be busy otherwise.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace fusedclip::cpu {

enum class Order { kForwards, kBackwards };

// Hands each of `count` shares to one thread of a team: first those of its own row, then what the others have left.
class Shares {
 public:
  Shares(int64_t count, int threads) : count_(count), rows_(threads) {}

  int64_t count() const { return count_; }

  // Calls body(share) for every share that falls to `thread`.
  template <class Body>
  void each(int thread, Order order, const Body& body) {
    const int64_t rows = static_cast<int64_t>(rows_.size());
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = (thread + i) % rows;
      const int64_t begin = count_ * row / rows, end = count_ * (row + 1) / rows;
      for (int64_t taken; (taken = rows_[row].taken.fetch_add(1, std::memory_order_relaxed)) < end - begin;)
        body(order == Order::kForwards ? begin + taken : end - 1 - taken);
    }
  }

 private:
  struct alignas(128) Row {  // two cache lines, which processors fetch together: no thread slows another's counter
    std::atomic<int64_t> taken{0};
  };

  int64_t count_;
  std::vector<Row> rows_;
};

}  // namespace fusedclip::cpu
