// Lists of gradients to run the kernels on, and an oracle in fp64 that shares nothing with them but the dtypes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/engine.h"
#include "cuda_runtime.h"

namespace fusedclip {

#define CHECK(condition)                                                 \
  do {                                                                   \
    if (!(condition)) {                                                  \
      std::printf("FAILED %s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                      \
    }                                                                    \
  } while (false)

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
constexpr double kNorms[] = {0, 1, 2, 3, -1, HUGE_VAL, -HUGE_VAL};

// One gradient in a buffer of exactly its size, `misaligned` elements after a 16-byte boundary.
class Tensor {
 public:
  Tensor(DType dtype, int64_t count, int misaligned = 0)
      : dtype_(dtype),
        count_(count),
        offset_(misaligned * size_of(dtype)),
        bytes_(new char[offset_ + count * size_of(dtype)]) {}

  Segment segment() const { return {data(), count_, dtype_}; }
  int64_t count() const { return count_; }
  double get(int64_t i) const {
    return with_dtype(dtype_, [&](auto t) { return double(widen(at<decltype(t)>(i))); });
  }
  void set(int64_t i, double x) {
    with_dtype(dtype_, [&](auto t) { at<decltype(t)>(i) = narrow<decltype(t)>(Wide<decltype(t)>(x)); });
  }
  // x * y as the dtype's arithmetic has it.
  double product(double x, double y) const {
    Tensor one(dtype_, 1);
    one.set(0, dtype_ == DType::kFloat64 ? x * y : double(float(x) * float(y)));
    return one.get(0);
  }

 private:
  char* data() const { return bytes_.get() + offset_; }
  template <class T>
  T& at(int64_t i) const {
    return reinterpret_cast<T*>(data())[i];
  }

  DType dtype_;
  int64_t count_, offset_;
  std::unique_ptr<char[]> bytes_;
};

struct List {
  std::vector<Tensor> tensors;

  void add(DType dtype, int64_t count, int misaligned, const std::function<double()>& value) {
    tensors.emplace_back(dtype, count, misaligned);
    for (int64_t i = 0; i < count; ++i) tensors.back().set(i, value());
  }
  std::vector<Segment> segments() const {
    std::vector<Segment> segments;
    for (const Tensor& t : tensors) segments.push_back(t.segment());
    return segments;
  }
  std::vector<std::vector<double>> values() const {
    std::vector<std::vector<double>> values;
    for (const Tensor& t : tensors) {
      values.emplace_back();
      for (int64_t i = 0; i < t.count(); ++i) values.back().push_back(t.get(i));
    }
    return values;
  }
};

inline double oracle_lifted(const Tensor& tensor, double p) {
  double lifted = p == -HUGE_VAL ? HUGE_VAL : 0;
  for (int64_t i = 0; i < tensor.count(); ++i) {
    const double x = std::fabs(tensor.get(i));
    if (std::isnan(x) && p != 0) return x;
    if (p == HUGE_VAL)
      lifted = std::max(lifted, x);
    else if (p == -HUGE_VAL)
      lifted = std::min(lifted, x);
    else
      lifted += p == 0 ? double(x != 0) : std::pow(x, p);
  }
  return lifted;
}

inline double oracle_norm(const List& list, double p) {
  double total = p == -HUGE_VAL ? HUGE_VAL : 0;
  for (const Tensor& t : list.tensors) {
    const double lifted = oracle_lifted(t, p);
    if (std::isnan(lifted) || std::isnan(total))
      total = NAN;
    else if (p == HUGE_VAL)
      total = std::max(total, lifted);
    else if (p == -HUGE_VAL)
      total = std::min(total, lifted);
    else
      total += lifted;
  }
  return std::isinf(p) || p == 0 ? total : std::pow(total, 1 / p);
}

inline bool close(double a, double b, double relative) {
  const bool both_nan = std::isnan(a) && std::isnan(b);
  if (both_nan || a == b || std::fabs(a - b) <= relative * std::max(std::fabs(a), std::fabs(b))) return true;
  std::printf("%.17g is not %.17g\n", a, b);
  return false;
}

inline std::function<double()> normal(unsigned seed, double scale = 1) {
  return [generator = std::mt19937(seed), distribution = std::normal_distribution<double>(), scale]() mutable {
    return scale * distribution(generator);
  };
}

// Every hazard of the layout at once: mixed dtypes, misaligned, empty at the ends and in the middle, a few elements, a
// few tiles (a tile is 1 KiB here), and counts around a pack and a tile.
inline List mixed(unsigned seed, int copies = 1) {
  List list;
  const auto value = normal(seed);
  list.add(DType::kFloat32, 0, 0, value);
  for (int copy = 0; copy < copies; ++copy)
    for (const DType dtype : kDTypes) {
      const int64_t tile = 1024 / size_of(dtype);
      list.add(dtype, 2 * tile + 3, 0, value);
      list.add(dtype, 1, 1, value);
      list.add(dtype, tile - 1, int(8 / size_of(dtype)), value);
      list.add(dtype, 0, 0, value);
      list.add(dtype, 5, 1, value);
    }
  list.add(DType::kBFloat16, 0, 0, value);
  return list;
}

}  // namespace fusedclip
