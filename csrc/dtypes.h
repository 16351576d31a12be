// The dtypes that the engines read and write, and how one element becomes a number. Host and device.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

// Always inline on the host: cpu/kernels.cpp is compiled for several instruction sets, and an out-of-line copy from
// the widest one must not be the copy that the linker keeps for all.
#ifdef __CUDACC__
#define FUSEDCLIP_HD __host__ __device__
#else
#define FUSEDCLIP_HD __attribute__((always_inline))
#endif

namespace fusedclip {

// Storage only: arithmetic on 16-bit floats is done in float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// All there are, with torch's names and DLPack's codes: everything here, in the bindings and in the engines that goes
// by dtype is made from this list. Each has a sign bit in front of a magnitude whose bits order like the numbers, with
// NaN above all others; and a widen() and a narrow() below.
#define FUSEDCLIP_DTYPES(DTYPE)                     \
  DTYPE(kFloat32, "float32", float, kDLFloat)       \
  DTYPE(kFloat64, "float64", double, kDLFloat)      \
  DTYPE(kBFloat16, "bfloat16", BFloat16, kDLBfloat) \
  DTYPE(kFloat16, "float16", Float16, kDLFloat)

enum class DType : uint8_t {
#define FUSEDCLIP_NAME_OF(name, of_torch, type, code) name,
  FUSEDCLIP_DTYPES(FUSEDCLIP_NAME_OF)
#undef FUSEDCLIP_NAME_OF
};

// f(element type{}), for a dtype that is known at run time. Nothing is ever read as what it is not: the host throws for
// a dtype that is not in the list, before it launches anything (a trap in a kernel would cost it registers).
#ifdef __CUDACC__
#pragma nv_exec_check_disable  // f may be for one side alone
#endif
template <class F>
FUSEDCLIP_HD inline auto with_dtype(DType dtype, F f) {
  switch (dtype) {
#define FUSEDCLIP_CASE(name, of_torch, type, code) \
  case DType::name: return f(type{});
    FUSEDCLIP_DTYPES(FUSEDCLIP_CASE)
#undef FUSEDCLIP_CASE
  }
#ifdef __CUDA_ARCH__
  __builtin_unreachable();
#else
  throw std::invalid_argument("a dtype that is not in FUSEDCLIP_DTYPES");
#endif
}

// Written out, and held against the list: what is made from it takes kernels more registers than they have (a shift by
// a table has the read kernel for sm_120 spill).
FUSEDCLIP_HD constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}
#define FUSEDCLIP_SIZE(name, of_torch, type, code) \
  static_assert(size_of(DType::name) == sizeof(type), "size_of knows " #type);
FUSEDCLIP_DTYPES(FUSEDCLIP_SIZE)
#undef FUSEDCLIP_SIZE

template <class To, class From>
FUSEDCLIP_HD inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

FUSEDCLIP_HD inline double widen(double x) { return x; }
FUSEDCLIP_HD inline float widen(float x) { return x; }
FUSEDCLIP_HD inline float widen(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

// On the host exact, without touching a subnormal float on the way, so that a thread that flushes subnormals gets the
// same answer. On a device one instruction: with ten, reading would no longer be bound by memory.
FUSEDCLIP_HD inline float widen(Float16 x) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#endif
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1fu, mantissa = x.bits & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = float(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t biased = exponent == 31 ? 255 : exponent + 112;
  return bit_cast<float>(sign | biased << 23 | mantissa << 13);
}

// Round to nearest even; keeps subnormals; NaN stays a (quiet) NaN.
FUSEDCLIP_HD inline BFloat16 to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {uint16_t(bits >> 16 | 0x40u)};
  return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

FUSEDCLIP_HD inline Float16 to_float16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // 65520 and up round to inf
  if (magnitude < 0x38800000u) {
    // Below 2^-14 the unit in the last place is 2^-24, which is that of 0.5f: adding 0.5f rounds there, to even.
    const uint32_t shifted = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f);
    return {uint16_t(sign | (shifted - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return {uint16_t(sign | ((rounded - 0x38000000u) >> 13))};
}

// What an element of T widens to.
template <class T>
using Wide = decltype(widen(T{}));

// Back to T: round to nearest even.
template <class T>
FUSEDCLIP_HD inline T narrow(Wide<T> x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
#ifdef __CUDA_ARCH__
    T y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#else
    return to_bfloat16(x);
#endif
  } else if constexpr (std::is_same_v<T, Float16>) {
#ifdef __CUDA_ARCH__
    T y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#else
    return to_float16(x);
#endif
  } else {
    return x;
  }
}

// The nearest number that T has: what a clamped element becomes, so that clamping again changes nothing.
template <class T>
FUSEDCLIP_HD inline Wide<T> rounded_to(double x) {
  return widen(narrow<T>(Wide<T>(x)));
}

}  // namespace fusedclip
