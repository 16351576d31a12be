// One team of threads per call, from the OpenMP runtime that torch has already loaded: linking a second one would let
// two pools spin against each other. That is why this is compiled with -fopenmp and linked without.
#pragma once

#include "float_environment.h"

#ifdef _OPENMP
// Declared here: Apple's compiler has the pragmas but no omp.h. Weak: null if no runtime has been loaded.
extern "C" __attribute__((weak)) int omp_get_thread_num();
extern "C" __attribute__((weak)) int omp_get_num_threads();
#endif

namespace fusedclip::cpu {

// Calls body(thread, threads) on each thread of a team; the runtime may give fewer threads than asked for.
template <class Body>
void in_parallel(int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && omp_get_thread_num) {
#pragma omp parallel num_threads(threads)
    {
      const GradualUnderflow exact;
      body(omp_get_thread_num(), omp_get_num_threads());
    }
    return;
  }
#endif
  const GradualUnderflow exact;
  body(0, 1);
}

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
