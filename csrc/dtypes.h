// The dtypes that the engines read and write, and how one element becomes a number. Host and device.
#pragma once

#include <cstdint>
#include <cstring>

// Always inline on the host: cpu/kernels.cpp is compiled for several instruction sets, and an out-of-line copy from
// the widest one must not be the copy that the linker keeps for all.
#ifdef __CUDACC__
#define FUSEDCLIP_HD __host__ __device__
#else
#define FUSEDCLIP_HD __attribute__((always_inline))
#endif

namespace fusedclip {

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Storage only: arithmetic on 16-bit floats is done in float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FUSEDCLIP_HD constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

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

// Exact, without touching a subnormal float on the way, so that a thread that flushes subnormals gets the same answer.
FUSEDCLIP_HD inline float widen(Float16 x) {
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

}  // namespace fusedclip
