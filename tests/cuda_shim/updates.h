// An optimizer's step on the kernels, against its rule applied to one element after the other.
#pragma once

#include <cstring>

#include "calls.h"
#include "cuda/update.h"
#include "norm_ops.h"
#include "updates.h"

namespace fusedclip {

struct PlainMath {
  template <class A>
  static A sqrt(A x) {
    return std::sqrt(x);
  }
  template <class A>
  static A max(A a, A b) {
    return a > b || a != a ? a : b;
  }
};

// A parameter with what is beside it: gradient, states, and by `kept` a master.
struct Moved {
  std::vector<Tensor> streams;  // parameter, gradient, states
  std::vector<float> whole;
  std::vector<uint16_t> remainders;
  float step = 2;
  Master kept;
  int row;

  Moved(const std::vector<DType>& types, int64_t count, int misaligned, Master kept, int row, unsigned seed)
      : whole(size_t(kept == Master::kFloat32 ? count : 0)),
        remainders(size_t(kept == Master::kSplit ? count : 0)),
        kept(kept),
        row(row) {
    const auto value = normal(seed);
    for (const DType type : types) {
      streams.emplace_back(type, count, misaligned);
      for (int64_t i = 0; i < count; ++i) streams.back().set(i, streams.size() > 2 ? std::fabs(value()) : value());
    }
    for (int64_t i = 0; i < count; ++i) {
      if (kept == Master::kFloat32) whole[size_t(i)] = float(streams[0].get(i));
      if (kept == Master::kSplit) remainders[size_t(i)] = uint16_t(i * 40503);
    }
  }

  int64_t count() const { return streams[0].count(); }
  double value(int64_t i) const {
    if (kept == Master::kFloat32) return whole[size_t(i)];
    const double x = streams[0].get(i);
    if (kept == Master::kNone) return x;
    return join({uint16_t(bit_cast<uint32_t>(float(x)) >> 16)}, remainders[size_t(i)]);
  }
  UpdateSegment segment() {
    UpdateSegment s{};
    s.count = count(), s.row = row, s.kept = kept, s.step = &step;
    s.parameter = streams[0].segment().data, s.parameter_type = streams[0].segment().dtype;
    s.gradient = streams[1].segment().data, s.gradient_type = streams[1].segment().dtype;
    for (size_t k = 2; k < streams.size(); ++k)
      s.states[k - 2] = streams[k].segment().data, s.state_types[k - 2] = streams[k].segment().dtype;
    s.master = kept == Master::kFloat32 ? static_cast<void*>(whole.data())
               : kept == Master::kSplit ? static_cast<void*>(remainders.data())
                                        : nullptr;
    return s;
  }
};

template <class U, class A>
double next_value(const Moved& m, const UpdateRow& row, double coef, int64_t i) {
  const auto c = U::template constants<A>(row.options, row.options[0], m.step + 1);
  A states[U::kStates + 1];
  for (int k = 0; k < U::kStates; ++k) states[k] = A(m.streams[size_t(k) + 2].get(i));
  const A g = A(m.streams[1].get(i)) * A(row.maximize ? -coef : coef);
  return U::template move<PlainMath>(A(m.value(i)), g, states, c);
}

template <class U>
void moves(Update rule, bool skip) {
  const UpdateRow rows[] = {{{0.01, 0.9, 0.99, 1e-8, 0.1}, nullptr, false}, {{0.02, 0.5, 0.9, 1e-6, 0}, nullptr, true}};
  const double coefs[] = {0.5, 1};
  std::vector<std::unique_ptr<Moved>> all;
  unsigned seed = 0;
  const auto add = [&](std::vector<DType> types, int64_t count, int misaligned, Master kept = Master::kNone) {
    types.resize(2 + U::kStates, types.back());
    all.push_back(std::make_unique<Moved>(types, count, misaligned, kept, int(seed % 2), seed));
    ++seed;
  };
  for (const int64_t count : {0, 1, 127, 128, 131, 2000})
    for (const DType type : kDTypes) add({type}, count, count == 131);
  add({DType::kFloat32, DType::kFloat32, DType::kBFloat16}, 9000, 0);
  add({DType::kFloat32, DType::kFloat64}, 300, 0);
  add({DType::kFloat64, DType::kBFloat16, DType::kFloat32}, 300, 1);
  for (const int misaligned : {0, 1}) {
    add({DType::kBFloat16, DType::kFloat32}, 5000, misaligned, Master::kSplit);
    add({DType::kFloat16, DType::kFloat16, DType::kFloat32}, 700, misaligned, Master::kFloat32);
  }
  for (int more = 0; more < 30; ++more) add({DType::kFloat32}, 200, 0);  // more than a small table has room for
  std::vector<std::vector<double>> wanted;
  for (const auto& m : all) {
    wanted.emplace_back();
    const bool in_double = m->streams[0].segment().dtype == DType::kFloat64;
    for (int64_t i = 0; i < m->count(); ++i) {
      const double next = in_double ? next_value<U, double>(*m, rows[m->row], coefs[m->row], i)
                                    : next_value<U, float>(*m, rows[m->row], coefs[m->row], i);
      wanted.back().push_back(skip ? m->value(i) : next);
    }
  }
  std::vector<UpdateSegment> segments;
  for (const auto& m : all) segments.push_back(m->segment());
  const float flag = skip;
  const std::vector<UpdateRow> rules(std::begin(rows), std::end(rows));
  const std::vector<Segment> none;
  std::vector<double> scratch(segments.size() * cuda::kPreparedDoubles, NAN);
  cuda::update({segments, rule, rules, coefs, &flag}, {none, 0, nullptr}, scratch.data());
  for (size_t s = 0; s < all.size(); ++s) {
    CHECK(all[s]->step == (skip ? 2 : 3));
    Tensor rounded(all[s]->streams[0].segment().dtype, 1);
    for (int64_t i = 0; i < all[s]->count(); ++i) {
      double expected = wanted[s][size_t(i)];
      if (all[s]->kept == Master::kNone) rounded.set(0, expected), expected = rounded.get(0);
      CHECK(all[s]->value(i) == expected);
    }
  }
}

inline void updates_in_any_mixture() {
  for (const bool skip : {false, true}) {
#define FUSEDCLIP_MOVES(name, ...) moves<__VA_ARGS__>(Update::name, skip);
    FUSEDCLIP_UPDATES(FUSEDCLIP_MOVES)
#undef FUSEDCLIP_MOVES
  }
}

}  // namespace fusedclip
