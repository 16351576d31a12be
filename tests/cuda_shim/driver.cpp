// Runs the CUDA engine on the host and holds it against the oracle: `driver`, or `driver quick` for a smaller set.
#include <cstring>

#include "calls.h"
#include "refusals.h"
#include "updates.h"

using namespace fusedclip;
using cuda::Form;

namespace {

bool quick = false;

void lifted_values() {
  const List list = mixed(1, quick ? 1 : 3);
  for (const double p : kNorms) {
    const auto lifted = lift(list, p);
    for (size_t s = 0; s < lifted.size(); ++s) CHECK(close(lifted[s], oracle_lifted(list.tensors[s], p), 3e-7));
  }
}

void statistics() {
  List list = mixed(12, quick ? 1 : 2);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  int64_t next = 0;
  for (Tensor& tensor : list.tensors)
    for (int64_t i = 0; i < tensor.count(); ++i, ++next) {
      if (next % 5 == 0) tensor.set(i, next % 10 == 0 ? 0.0 : -0.0);
      if (next % 997 == 3) tensor.set(i, next % 2 == 0 ? nan : -HUGE_VAL);
    }
  shim::machine.launches = 0;
  const auto rows = stats(list);
  CHECK(shim::machine.launches == 2);
  const size_t count = list.tensors.size();
  const auto values = list.values();
  for (size_t s = 0; s < count; ++s) {
    double zeros = 0, nonfinite = 0;
    for (const double x : values[s]) zeros += x == 0, nonfinite += !std::isfinite(x);
    const Tensor& t = list.tensors[s];
    const double wanted[] = {oracle_lifted(t, 2), oracle_lifted(t, 1), zeros, nonfinite, oracle_lifted(t, HUGE_VAL)};
    for (int row = 0; row < kStats; ++row) CHECK(close(rows[row * count + s], wanted[row], row < 2 ? 3e-7 : 0));
  }
}

void norms_without_a_write() {
  const List list = mixed(2);
  const auto segments = list.segments();
  const cuda::Work work{segments, 0, nullptr};
  for (const double p : kNorms) {
    if (p == 0) continue;  // counts tensors: lift's
    auto scratch = scratch_for(work);
    float norm = -1;
    cuda::norm(work, p, scratch.data(), {&norm, false, nullptr});
    CHECK(close(norm, oracle_norm(list, p), 3e-7));
  }
}

void clips_in_both_forms() {
  for (const double p : kNorms)
    for (const Form form : {Form::kTwoLaunches, Form::kOnChip})
      for (const double fraction : {0.5, 2.0}) {
        if (p == 0 || (form == Form::kOnChip && std::isfinite(p) && p != 1 && p != 2)) continue;
        List list = mixed(3, form == Form::kOnChip ? 1 : 2);
        const auto before = list.values();
        const double norm = oracle_norm(list, p), wanted = std::min(1.0, fraction * norm / (norm + 1e-6));
        const Outcome outcome = clip(list, p, at_most(fraction * norm), form);
        CHECK(close(outcome.norm, norm, 3e-7) && close(outcome.coef, wanted, 3e-7));
        CHECK((outcome.coef == 1) == (fraction > 1));
        check_scaled(list, before, outcome.coef);
      }
}

void auto_form_keeps_on_chip_what_fits() {
  for (const int64_t tiles : {1, 2, 6, 7, 16, 24, 25, 70}) {  // each of 2 blocks keeps 12
    List list;
    list.add(DType::kFloat32, tiles * 256, 0, normal(4));
    const auto before = list.values();
    const double norm = oracle_norm(list, 2);
    shim::machine.launches = shim::machine.cooperative_launches = 0;
    const Outcome outcome = clip(list, 2, at_most(1), Form::kAuto);
    CHECK(shim::machine.cooperative_launches == (tiles <= 24) && shim::machine.launches == (tiles <= 24 ? 1 : 2));
    CHECK(close(outcome.norm, norm, 3e-7));
    check_scaled(list, before, outcome.coef);
  }
}

void more_tensors_than_one_launch_takes() {
  for (const int count : {184, 185, 513, 1537}) {
    if (quick && count != 185) continue;
    List list;
    const auto value = normal(5);
    for (int i = 0; i < count; ++i) list.add(kDTypes[i % 4], i % 7 == 0 ? 0 : 1 + i % 40, i % 3, value);
    const auto before = list.values();
    const auto lifted = lift(list, 2);
    for (int s = 0; s < count; ++s) CHECK(close(lifted[s], oracle_lifted(list.tensors[s], 2), 3e-7));
    const auto rows = stats(list);
    for (int s = 0; s < count; ++s) CHECK(close(rows[s], lifted[s], 3e-7));
    for (int s = 0; s < count; ++s) CHECK(rows[4 * count + s] == oracle_lifted(list.tensors[s], HUGE_VAL));
    const double norm = oracle_norm(list, 2);
    const Outcome outcome = clip(list, 2, at_most(1), Form::kAuto);
    CHECK(close(outcome.norm, norm, 3e-7));
    check_scaled(list, before, outcome.coef);
  }
}

void empty_lists() {
  for (const int count : {1, 2, 200}) {
    List list;
    for (int i = 0; i < count; ++i) list.add(DType::kFloat32, 0, 0, normal(6));
    for (const double p : kNorms) {
      for (const double value : lift(list, p)) CHECK(value == (p == -HUGE_VAL ? HUGE_VAL : 0));
      if (p == 0) continue;
      const Outcome outcome = clip(list, p, at_most(1), Form::kAuto);
      CHECK(close(outcome.norm, p == -HUGE_VAL || p == -1 ? HUGE_VAL : 0, 0));
    }
  }
}

void constants_and_extremes_keep_their_precision() {
  for (const double value : {0.1, 3e38, 1e-25, 1e-40, 0.0})
    for (const Form form : {Form::kTwoLaunches, Form::kOnChip}) {
      List list;
      list.add(DType::kFloat32, 4000, 0, [&] { return value; });
      list.add(DType::kBFloat16, 33, 1, [&] { return value; });
      for (const double p : {1.0, 2.0}) {
        List copy;
        copy.add(DType::kFloat32, 4000, 0, [&] { return value; });
        copy.add(DType::kBFloat16, 33, 1, [&] { return value; });
        const Outcome outcome = clip(copy, p, at_most(HUGE_VAL), form);
        CHECK(close(outcome.norm, oracle_norm(list, p), 3e-7) && outcome.coef == 1);
      }
    }
}

void nonfinite_values_spread_or_become_zeros() {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const double bad : {nan, -HUGE_VAL})
    for (const double p : {2.0, 3.0, HUGE_VAL, -HUGE_VAL})
      for (const bool zero : {false, true})
        for (const Form form : {Form::kTwoLaunches, Form::kAuto}) {
          List list = mixed(7);
          const size_t place = list.tensors.size() / 2;
          list.tensors[place].set(0, bad);
          const auto before = list.values();
          const double norm = oracle_norm(list, p);
          const Outcome outcome = clip(list, p, at_most(1e-3, zero), form);
          CHECK(close(outcome.norm, norm, 3e-7));
          if (!std::isfinite(outcome.norm)) CHECK(zero ? outcome.coef == 0 : !(outcome.coef > 0));
          if (zero && outcome.coef == 0)
            for (auto& tensor : list.values())
              for (const double x : tensor) CHECK(x == 0);
          else
            check_scaled(list, before, outcome.coef);
        }
}

void limits_on_the_device() {
  for (const Form form : {Form::kTwoLaunches, Form::kOnChip})
    for (const double multiplier : {0.25, 1.0, 4.0}) {
      List list = mixed(8);
      const auto before = list.values();
      const double norm = oracle_norm(list, 2) * multiplier, max_norm = norm / 2;
      const Outcome outcome = clip(list, 2, {{-1, 1e-6, false}, &max_norm, &multiplier}, form);
      CHECK(close(outcome.norm, norm, 3e-7) && close(outcome.coef, multiplier * max_norm / (norm + 1e-6), 3e-7));
      check_scaled(list, before, outcome.coef);

      List measured = mixed(8);
      const double any = HUGE_VAL;
      CHECK(clip(measured, 2, {{1, 1e-6, false}, &any, &multiplier}, form).coef == multiplier);
      check_scaled(measured, before, multiplier);
    }
}

void coefficients_per_tensor() {
  List list = mixed(9, 2);
  list.tensors[3].set(0, HUGE_VAL);
  const auto before = list.values();
  std::vector<double> coefs;
  for (size_t s = 0; s < before.size(); ++s) coefs.push_back(s % 3 == 0 ? 0 : s % 3 == 1 ? 1 : 0.37);
  const auto segments = list.segments();
  cuda::scale({segments, 0, nullptr}, coefs.data(), 1, true);
  for (size_t s = 0; s < before.size(); ++s)
    for (size_t i = 0; i < before[s].size(); ++i) {
      const double wanted = coefs[s] == 0   ? 0
                            : coefs[s] == 1 ? before[s][i]
                                            : list.tensors[s].product(before[s][i], coefs[s]);
      CHECK(list.tensors[s].get(i) == wanted);
    }
}

// Down to where the largest elements become the least ones, and up to where the least become the largest.
void coefficients_beyond_the_range_of_float() {
  for (const double coef : {0x1p-126, 0x1p-140, 0x1p-213, 0x1p-240, 0x1p-253, 0x1p+200}) {
    const double element = coef < 1 ? 0x1.8p+126 : 0x1p-130;
    List list;
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) list.add(dtype, 70, 1, [&] { return element; });
    const auto segments = list.segments();
    cuda::scale({segments, 0, nullptr}, &coef, 0, false);
    for (const Tensor& tensor : list.tensors)
      for (int64_t i = 0; i < tensor.count(); ++i) CHECK(tensor.get(i) == element * coef);
  }
}

// A one and then terms that vanish beside it, in the four lanes of every thread's batch.
void small_elements_beside_large_ones() {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32})
    for (const double p : {1.0, 2.0})
      for (const int width : {1, 4, 8}) {
        List list;
        int64_t i = 0;
        const double tiny = p == 1 ? 0x1p-24 : 0x1p-12;
        list.add(dtype, 8192, 0, [&] { return i++ % 2048 < 512 && i % 8 < width ? 1.0 : tiny; });
        CHECK(close(lift(list, p)[0], oracle_lifted(list.tensors[0], p), 5.4e-7));
      }
}

// Written in one order: ThreadSanitizer would see blocks that write the same memory side by side.
void segments_that_share_memory() {
  for (const Form form : {Form::kAuto, Form::kTwoLaunches}) {
    List buffer;
    buffer.add(DType::kFloat64, 3000, 0, normal(13));
    const auto before = buffer.values()[0];
    char* const data = static_cast<char*>(buffer.segments()[0].data);
    const std::vector<Segment> segments = {{data + 8 * 100, 2000, DType::kFloat64},
                                           {data + 8 * 2050, 950, DType::kFloat64},
                                           {data, 1500, DType::kFloat64}};
    const auto times = [](int64_t i) { return (i >= 100 && i < 2100) + (i >= 2050) + (i < 1500); };
    const cuda::Work work{segments, 0, nullptr};
    CHECK(!cuda::fits_on_chip(work, 2));
    auto scratch = scratch_for(work);
    Outcome outcome{};
    cuda::clip(work, 2, at_most(0.5), scratch.data(), {&outcome.norm, true, &outcome.coef}, form);
    double sum = 0;
    for (int64_t i = 0; i < 3000; ++i) sum += times(i) * before[i] * before[i];
    CHECK(close(outcome.norm, std::sqrt(sum), 1e-12));
    const double coefs[] = {0.5, 0.25, 2};
    cuda::scale(work, coefs, 1, false);
    for (int64_t i = 0; i < 3000; ++i) {
      double wanted = before[i];
      for (int time = 0; time < times(i); ++time) wanted *= outcome.coef;
      wanted *= (i >= 100 && i < 2100 ? 0.5 : 1) * (i >= 2050 ? 0.25 : 1) * (i < 1500 ? 2 : 1);
      CHECK(buffer.tensors[0].get(i) == wanted);
    }
    cuda::clamp(work, 1e-6);
    for (int64_t i = 0; i < 3000; ++i) CHECK(std::fabs(buffer.tensors[0].get(i)) <= 1e-6);
  }
}

void clamps() {
  List list = mixed(10, 2);
  list.tensors[1].set(0, std::numeric_limits<double>::quiet_NaN());
  list.tensors[1].set(1, HUGE_VAL);
  const auto before = list.values();
  const auto segments = list.segments();
  cuda::clamp({segments, 0, nullptr}, 0.3);
  for (size_t s = 0; s < before.size(); ++s)
    for (size_t i = 0; i < before[s].size(); ++i) {
      const double x = before[s][i], bound = list.tensors[s].product(0.3, 1);  // rounded to the dtype
      CHECK(close(list.tensors[s].get(i), std::isnan(x) ? x : std::clamp(x, -bound, bound), 0));
    }
}

void same_bits_every_time() {
  std::vector<double> norms;
  for (int run = 0; run < (quick ? 2 : 5); ++run) {
    List list = mixed(11, 3);
    norms.push_back(clip(list, 2, at_most(1), Form::kTwoLaunches).norm);
    CHECK(norms.back() == norms.front());
  }
}

// Shares of segments that no memory could hold: every element is in exactly one stretch.
void shares_of_huge_segments() {
  auto table = std::make_unique<cuda::LargeTable>();
  const int64_t counts[] = {0, (int64_t(1) << 33) + 5, 7, 0, int64_t(3) << 31, 1, (int64_t(1) << 35) - 1, 0};
  table->size = 8;
  uint32_t tiles = 0;
  for (int s = 0; s < 8; ++s) {
    table->data[s] = reinterpret_cast<void*>(int64_t(s + 1) << 40);
    table->count[s] = counts[s];
    table->dtype[s] = kDTypes[s % 4];
    table->first_tile[s] = tiles;
    tiles += uint32_t((counts[s] * size_of(kDTypes[s % 4]) + 8191) / 8192);
  }
  table->first_tile[8] = tiles;
  for (const uint32_t blocks : {1u, 2u, 7u, 264u, 1000u}) {
    std::vector<int64_t> seen(8, 0);
    uint32_t slot = 0;
    for (uint32_t b = 0; b < blocks; ++b) {
      const cuda::Share share = cuda::share_of(*table, b, blocks);
      CHECK(b + uint32_t(share.first) == slot);
      slot = b + uint32_t(share.last) + 1;
      for (int s = share.first; s <= share.last; ++s) {
        const cuda::Stretch stretch = cuda::stretch_of(*table, share, s, 8192);
        CHECK(stretch.count >= 0 &&
              reinterpret_cast<int64_t>(stretch.data) == (int64_t(s + 1) << 40) + seen[s] * size_of(stretch.dtype));
        CHECK(b + uint32_t(s) >= cuda::slot_begin(*table, s, blocks) &&
              b + uint32_t(s) < cuda::slot_begin(*table, s + 1, blocks));
        seen[s] += stretch.count;
      }
    }
    CHECK(slot == blocks + 7 && cuda::slot_begin(*table, 8, blocks) == slot);
    for (int s = 0; s < 8; ++s) CHECK(seen[s] == counts[s]);
  }
}

struct Test {
  const char* name;
  void (*run)();
};
const Test kTests[] = {{"lifted values", lifted_values},
                       {"statistics", statistics},
                       {"norms without a write", norms_without_a_write},
                       {"clips in both forms", clips_in_both_forms},
                       {"the form that is chosen", auto_form_keeps_on_chip_what_fits},
                       {"more tensors than one launch takes", more_tensors_than_one_launch_takes},
                       {"empty lists", empty_lists},
                       {"constants and extremes", constants_and_extremes_keep_their_precision},
                       {"NaN and inf", nonfinite_values_spread_or_become_zeros},
                       {"limits on the device", limits_on_the_device},
                       {"a coefficient per tensor", coefficients_per_tensor},
                       {"coefficients beyond the range of float", coefficients_beyond_the_range_of_float},
                       {"small elements beside large ones", small_elements_beside_large_ones},
                       {"segments that share memory", segments_that_share_memory},
                       {"clamp", clamps},
                       {"same bits every time", same_bits_every_time},
                       {"shares of huge segments", shares_of_huge_segments},
                       {"updates in any mixture of dtypes", updates_in_any_mixture},
                       {"unknown dtypes", a_dtype_that_is_not_known_is_not_launched},
                       {"a refused cooperative launch", a_refused_cooperative_launch_becomes_two},
                       {"failing calls", failing_calls_say_what_and_why}};

// Too slow under ThreadSanitizer for what they add there.
bool is_slow(const std::string& name) {
  return name == "NaN and inf" || name == "constants and extremes" || name == "empty lists" ||
         name == "small elements beside large ones";
}

}  // namespace

// Arguments: "quick"; "drop=N", for the N-th __syncthreads of every thread to be left out (-1: the grid's barrier).
int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    quick |= std::strcmp(argv[i], "quick") == 0;
    if (std::strncmp(argv[i], "drop=", 5) == 0) shim::machine.dropped_barrier = std::atoi(argv[i] + 5);
  }
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  for (const Test& test : kTests) {
    if (quick && is_slow(test.name)) continue;
    test.run();
    std::printf("passed: %s\n", test.name);
  }
}
