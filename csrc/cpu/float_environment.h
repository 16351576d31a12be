// Subnormal numbers count, whatever the thread was told: torch.set_flush_denormal(True) reaches some threads of a pool
// and not others, so that without this the result would hang on who reads which tile.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fusedclip::cpu {

// While it lives, this thread neither reads nor writes subnormals as zeros.
class GradualUnderflow {
 public:
  GradualUnderflow() : before_(control()) { set_control(before_ & ~kFlush); }
  ~GradualUnderflow() { set_control(before_); }
  GradualUnderflow(const GradualUnderflow&) = delete;
  GradualUnderflow& operator=(const GradualUnderflow&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr uint64_t kFlush = 0x8040;  // flush to zero, and subnormals are zeros, in MXCSR
  static uint64_t control() { return _mm_getcsr(); }
  static void set_control(uint64_t bits) { _mm_setcsr(static_cast<uint32_t>(bits)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kFlush = (1u << 24) | (1u << 19);  // FZ and FZ16 in FPCR
  static uint64_t control() {
    uint64_t bits;
    asm volatile("mrs %0, fpcr" : "=r"(bits));
    return bits;
  }
  static void set_control(uint64_t bits) { asm volatile("msr fpcr, %0" : : "r"(bits)); }
#else
  static constexpr uint64_t kFlush = 0;
  static uint64_t control() { return 0; }
  static void set_control(uint64_t) {}
#endif

  uint64_t before_;
};

}  // namespace fusedclip::cpu
