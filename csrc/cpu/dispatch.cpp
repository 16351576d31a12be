// Which of the compiled instruction sets this processor can run.
#include <atomic>

#include "kernels.h"

namespace fusedclip::cpu {

namespace baseline {
extern const Kernels table;
}
#ifdef FUSEDCLIP_X86_SETS
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#ifdef FUSEDCLIP_AVX512_BF16
namespace avx512_bf16 {
extern const Kernels table;
}
#endif
#endif

std::vector<const Kernels*> kernel_sets() {
  std::vector<const Kernels*> sets;
#ifdef FUSEDCLIP_X86_SETS
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
#ifdef FUSEDCLIP_AVX512_BF16
    if (__builtin_cpu_supports("avx512bf16")) sets.push_back(&avx512_bf16::table);
#endif
    sets.push_back(&avx512::table);
  }
  // Every processor with AVX2 has F16C, which GCC before 11 can't be asked about.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back(&avx2::table);
#endif
  sets.push_back(&baseline::table);
  return sets;
}

namespace {
std::atomic<const Kernels*> in_use{nullptr};
}

const Kernels& kernels() {
  const Kernels* set = in_use.load(std::memory_order_relaxed);
  if (!set) {
    set = kernel_sets().front();
    in_use.store(set, std::memory_order_relaxed);
  }
  return *set;
}

void use_kernels(const Kernels& set) { in_use.store(&set, std::memory_order_relaxed); }

}  // namespace fusedclip::cpu
