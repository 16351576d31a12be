// |x|^p for vectors of doubles: exp2(p * log2 x), for finite x > 0 that are normal numbers. About 1e-13 relative error
// for the exponents and ranges of gradients, 8 elements at a time, where libm's pow takes one.
// Included by kernels.cpp only, inside its instruction set's namespace.
#pragma once

#include "vectors.h"

using Longs = Vector<int64_t>;

// log2 of a normal x > 0. With x = 2^e m, m in [sqrt(1/2), sqrt(2)) and s = (m - 1) / (m + 1):
// ln m = 2 (s + s^3/3 + s^5/5 + ...), |s| < 0.172, so that the terms up to s^17 leave 2e-16.
inline Doubles log2_of(Doubles x) {
  constexpr int64_t kHalfRoot = 0x3fe6a09e667f3bcd;  // the bits of sqrt(1/2)
  const Longs shifted = (Longs)x - kHalfRoot;
  const Longs exponent = shifted >> 52;
  const Doubles m = (Doubles)((Longs)x - (exponent << 52));
  const Doubles s = (m - 1) / (m + 1), t = s * s;
  Doubles series = t * (1.0 / 17) + 1.0 / 15;
  constexpr double kOdd[] = {1.0 / 13, 1.0 / 11, 1.0 / 9, 1.0 / 7, 1.0 / 5, 1.0 / 3, 1.0};
  for (const double c : kOdd) series = series * t + c;
  // 3 * 2^51 + e in the bits of a double: an int64 to double conversion that SSE2 and AVX2 have no instruction for.
  const Doubles magic = Doubles{} + 0x1.8p52;
  const Doubles e = (Doubles)((Longs)magic + exponent) - magic;
  return e + series * s * 2.885390081777926815;  // 2 / ln 2
}

// 2^y. The fraction in [-1/2, 1/2] goes through the series of e^(f ln 2) up to the 13th power (4e-18 left).
inline Doubles exp2_of(Doubles y) {
  y = y > 1025.0 ? Doubles{} + 1025.0 : y;
  y = y < -1080.0 ? Doubles{} - 1080.0 : y;
  const Doubles magic = Doubles{} + 0x1.8p52;
  const Doubles shifted = y + magic;  // rounds to an integer, which the low bits then hold
  const Doubles f = (y - (shifted - magic)) * 0.693147180559945309417;
  Doubles series = Doubles{} + 1.0 / 6227020800;
  constexpr double kInverseFactorials[] = {
      1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
      1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
  for (const double c : kInverseFactorials) series = series * f + c;
  const Longs n = (Longs)shifted - (Longs)magic;
  // In two steps, so that results near the ends of the range come out as inf, subnormal or 0 by themselves.
  const Longs half = n >> 1;
  const auto two_to = [](Longs k) { return (Doubles)((k + 1023) << 52); };
  return series * two_to(half) * two_to(n - half);
}

inline Doubles power_of(Doubles magnitude, double p) {
  const Doubles ordinary = exp2_of(log2_of(magnitude) * p);
  const Doubles at_zero = Doubles{} + (p > 0 ? 0.0 : HUGE_VAL), at_inf = Doubles{} + (p > 0 ? HUGE_VAL : 0.0);
  const Doubles result = magnitude == 0 ? at_zero : magnitude == HUGE_VAL ? at_inf : ordinary;
  return magnitude == magnitude ? result : magnitude;
}
