// The engine's calls on lists, and what they have to leave.
#pragma once

#include "cuda/table.h"
#include "lists.h"

namespace fusedclip {

using cuda::Form;

struct Outcome {
  double norm, coef;
};

inline std::vector<double> scratch_for(const cuda::Work& work, int rows = 1) {
  return std::vector<double>(cuda::scratch_doubles(work, rows), NAN);
}

inline Outcome clip(List& list, double p, const cuda::Limits& limits, Form form) {
  const auto segments = list.segments();
  const cuda::Work work{segments, 0, nullptr};
  auto scratch = scratch_for(work);
  Outcome outcome{};
  cuda::clip(work, p, limits, scratch.data(), {&outcome.norm, true, &outcome.coef}, form);
  return outcome;
}

inline cuda::Limits at_most(double max_norm, bool zero = false) { return {{max_norm, 1e-6, zero}, nullptr, nullptr}; }

inline std::vector<double> lift(const List& list, double p) {
  const auto segments = list.segments();
  const cuda::Work work{segments, 0, nullptr};
  auto scratch = scratch_for(work);
  std::vector<double> out(segments.size(), -1);
  cuda::lift(work, p, scratch.data(), out.data());
  return out;
}

// kStats rows.
inline std::vector<double> stats(const List& list) {
  const auto segments = list.segments();
  const cuda::Work work{segments, 0, nullptr};
  std::vector<double> scratch = scratch_for(work, kStats), out(kStats * segments.size(), -1);
  cuda::stats(work, scratch.data(), out.data());
  return out;
}

inline void check_scaled(const List& list, const std::vector<std::vector<double>>& before, double coef) {
  for (size_t s = 0; s < before.size(); ++s)
    for (size_t i = 0; i < before[s].size(); ++i) {
      const double wanted = coef == 1 ? before[s][i] : list.tensors[s].product(before[s][i], coef);
      CHECK(close(list.tensors[s].get(i), wanted, 0));
    }
}

}  // namespace fusedclip
