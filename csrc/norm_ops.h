// The algebra that every engine speaks: lift each element, combine lifted values, finish once at the very end.
//
//   lift     x       -> |x|^p         (|x| for p = inf and -inf, x != 0 for p = 0): norms.h, with all that differs
//   combine  partial -> sum           (or a max or min that keeps NaN)
//   finish   lifted  -> norm          (the p-th root)
//   settle   lifted  -> norm and coef = min(1, max_norm / (norm + eps))
//
// Host and device. fusedclip/norms.py is the same page in Python.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "norms.h"

namespace fusedclip {

FUSEDCLIP_HD inline double identity(Combining combining) { return combining == Combining::kMin ? HUGE_VAL : 0.0; }

FUSEDCLIP_HD inline double combine(Combining combining, double a, double b) {
  // Comparisons with NaN are false, so each order of the operands is asked for a NaN explicitly.
  if (combining == Combining::kMax) return a != a || a > b ? a : b;
  if (combining == Combining::kMin) return a != a || a < b ? a : b;
  return a + b;
}

// What one tensor's lifted value adds to the list's. torch takes the norm of the tensors' norms; for p = 0 that
// counts the tensors that have any non-zero element.
FUSEDCLIP_HD inline double of_tensor(const NormEnd& norm, double lifted) {
  return norm.counts ? double(lifted != 0) : lifted;
}

FUSEDCLIP_HD inline double finish(const NormEnd& norm, double lifted) {
  if (norm.root == Root::kSquare) return sqrt(lifted);
  if (norm.root == Root::kOfOrder) return pow(lifted, 1.0 / norm.p);
  return lifted;
}

// Magnitudes of floats order like their bits read as integers, with every NaN above inf: a largest that keeps NaN for
// free. A least of bits would lose NaN, so that it goes with the largest.
template <size_t bytes>
using Size = std::integral_constant<size_t, bytes>;
int64_t int_of(Size<8>);
int32_t int_of(Size<4>);
int16_t int_of(Size<2>);
int8_t int_of(Size<1>);
template <class T>
using Bits = decltype(int_of(Size<sizeof(T)>{}));
template <class T>
constexpr Bits<T> kMagnitude = std::numeric_limits<Bits<T>>::max();  // all but the sign bit

template <class T>
FUSEDCLIP_HD inline double value_of(Bits<T> magnitude) {
  return widen(bit_cast<T>(magnitude));
}

template <class T>
FUSEDCLIP_HD inline double extreme(Combining combining, Bits<T> most, Bits<T> least) {
  const double top = value_of<T>(most);
  return combining == Combining::kMax || top != top ? top : value_of<T>(least);
}

// A sum of up to 8,192 lifted values in float, or of such sums: whether it may be taken as it is, or has to be taken
// again in double. Above the bound it has lost less than 1e-7 of itself to squares that vanished, even where subnormals
// are flushed to zero (8192 * FLT_MIN = 2^-113); beyond FLT_MAX, or as NaN, it may have overflowed on the way.
template <class A>
FUSEDCLIP_HD inline bool is_trusted(A sum) {
  return sum >= A(0x1p-90) && sum <= A(FLT_MAX);
}

// What one read tells of some elements beside the sum of their squares; each member is a row of fusedclip/norms.py.
struct Stats {
  double squares, magnitudes, zeros, nonfinite;  // sums; an element counts as 1
  double largest;                                // magnitude
};
constexpr int kStats = 5;

FUSEDCLIP_HD inline double row_of(const Stats& stats, int row) {
  return row == 0   ? stats.squares
         : row == 1 ? stats.magnitudes
         : row == 2 ? stats.zeros
         : row == 3 ? stats.nonfinite
                    : stats.largest;
}

FUSEDCLIP_HD inline Stats combine(const Stats& a, const Stats& b) {
  return {a.squares + b.squares, a.magnitudes + b.magnitudes, a.zeros + b.zeros, a.nonfinite + b.nonfinite,
          combine(Combining::kMax, a.largest, b.largest)};
}

// The magnitude from which on an element is not finite.
template <class T>
FUSEDCLIP_HD inline Bits<T> infinite() {
  return bit_cast<Bits<T>>(narrow<T>(Wide<T>(HUGE_VAL)));
}

struct ClipRule {
  double max_norm;      // inf measures: the coefficient is 1 whatever the norm
  double eps;           // in the denominator, as in torch
  bool zero_nonfinite;  // a norm that is not finite asks for zeros instead of spreading
};

FUSEDCLIP_HD inline double coefficient(double norm, const ClipRule& rule) {
  if (rule.max_norm == HUGE_VAL) return 1.0;
  if (rule.zero_nonfinite && !(norm - norm == 0)) return 0.0;
  const double ratio = rule.max_norm / (norm + rule.eps);
  return ratio >= 1.0 ? 1.0 : ratio;  // NaN stays NaN
}

// What comes of a clip: the norm, and what every element is multiplied by unless it is 1.
struct Clipped {
  double norm;
  double coef;
};

// Norm and rule are those of the elements times `multiplier`, which the coefficient contains. A count stays what it is.
FUSEDCLIP_HD inline Clipped settle(const NormEnd& norm, double lifted, const ClipRule& rule, double multiplier) {
  const double value = finish(norm, lifted) * (norm.counts ? 1 : multiplier);
  return {value, coefficient(value, rule) * multiplier};
}

// A coefficient as A's arithmetic applies it: x * rest * power, in this order. Close to the ends of float's range and
// beyond, it would lose bits or vanish by itself, although the product need not (2^127 * 2^-260 is a bfloat16). `power`
// is a power of two, so that multiplying by it rounds nothing but a subnormal result.
template <class A>
struct Factors {
  A rest, power;
};

template <class A>
FUSEDCLIP_HD inline Factors<A> factors_of(double coef) {
  constexpr float kLeast = 0x1p-149f;  // of all floats
  if (std::is_same_v<A, double> || !(coef > 0)) return {A(coef), 1};
  if (coef < 0x1p-298) return {kLeast, kLeast};  // takes every element to 0, and leaves inf
  if (coef < 0x1p-190) return {float(coef * 0x1p149), kLeast};
  if (coef < 0x1p-64) return {float(coef * 0x1p64), 0x1p-64f};
  if (coef > 0x1p100) return {float(coef * 0x1p-100), 0x1p100f};
  return {A(coef), 1};
}

}  // namespace fusedclip
