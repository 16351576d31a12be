// One team of threads per call, from the OpenMP runtime that torch has already loaded: linking a second one would let
// two pools spin against each other. That is why this is compiled with -fopenmp and linked without.
#pragma once

#include <vector>

#include "float_environment.h"

#ifdef _OPENMP
// Declared here: Apple's compiler has the pragmas but no omp.h. Weak: null if no runtime has been loaded.
extern "C" __attribute__((weak)) int omp_get_thread_num();
extern "C" __attribute__((weak)) int omp_get_num_threads();
#endif

namespace fusedclip::cpu {

// Calls body(thread, threads) on each thread of a team; the runtime may give fewer threads than asked for.
template <class Body>
void on_team(int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && omp_get_thread_num) {
#pragma omp parallel num_threads(threads)
    body(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  body(0, 1);
}

// The same, and subnormal numbers count.
template <class Body>
void in_parallel(int threads, const Body& body) {
  on_team(threads, [&](int thread, int team) {
    const GradualUnderflow exact;
    body(thread, team);
  });
}

// For torch's own operations: between begin() and end() none of its threads flushes subnormals.
class TeamUnderflow {
 public:
  explicit TeamUnderflow(int threads) : before_(threads) {}
  void begin() {
    on_team(static_cast<int>(before_.size()), [&](int thread, int) {
      before_[thread] = float_control();
      set_float_control(before_[thread] & ~kFlush);
    });
  }
  void end() {
    on_team(static_cast<int>(before_.size()), [&](int thread, int) { set_float_control(before_[thread]); });
  }

 private:
  std::vector<uint64_t> before_;
};

// Waits for the whole team; for use inside a body.
inline void team_barrier() {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

constexpr bool kHasThreads =
#ifdef _OPENMP
    true;
#else
    false;
#endif

}  // namespace fusedclip::cpu
