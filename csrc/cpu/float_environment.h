// Subnormal numbers count, whatever the thread was told: torch.set_flush_denormal(True) reaches some threads of a pool
// and not others, so that without this the result would hang on who reads which tile.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fusedclip::cpu {

// The bits that flush, in the processor's floating-point control register of the calling thread.
#if defined(__x86_64__)
constexpr uint64_t kFlush = 0x8040;  // flush to zero, and subnormals are zeros, in MXCSR
inline uint64_t float_control() { return _mm_getcsr(); }
inline void set_float_control(uint64_t bits) { _mm_setcsr(static_cast<uint32_t>(bits)); }
#elif defined(__aarch64__)
constexpr uint64_t kFlush = (1u << 24) | (1u << 19);  // FZ and FZ16 in FPCR
inline uint64_t float_control() {
  uint64_t bits;
  asm volatile("mrs %0, fpcr" : "=r"(bits));
  return bits;
}
inline void set_float_control(uint64_t bits) { asm volatile("msr fpcr, %0" : : "r"(bits)); }
#else
constexpr uint64_t kFlush = 0;
inline uint64_t float_control() { return 0; }
inline void set_float_control(uint64_t) {}
#endif

// While it lives, this thread neither reads nor writes subnormals as zeros.
class GradualUnderflow {
 public:
  GradualUnderflow() : before_(float_control()) { set_float_control(before_ & ~kFlush); }
  ~GradualUnderflow() { set_float_control(before_); }
  GradualUnderflow(const GradualUnderflow&) = delete;
  GradualUnderflow& operator=(const GradualUnderflow&) = delete;

 private:
  uint64_t before_;
};

}  // namespace fusedclip::cpu
