// The passes as launches. Bytes moved are said in kernels.cuh.
#include "../overlap.h"
#include "engine.h"
#include "kernels.cuh"
#include "launch.h"

namespace fusedclip::cuda {
namespace {

static_assert(sizeof(LargeTable) + sizeof(Demand) + sizeof(Results) + 32 <= 32764, "the most that parameters may take");

// Powers are bound by arithmetic and gain nothing on chip; a count is of tensors, whose values blocks do not know.
template <class N>
constexpr bool kHasOnChipForm = !N::kInDouble && !N::kCounts;

template <class Kernel>
const void* address(Kernel* kernel) {
  return reinterpret_cast<const void*>(kernel);
}

const Kernels& kernels() {
  static const Kernels all = [] {
    Kernels k{address(read_kernel<Two, SmallTable>), {}};
    for_each_norm([&](auto n) {
      using N = decltype(n);
      if constexpr (kHasOnChipForm<N>) {
        k.on_chip.push_back(address(clip_on_chip_kernel<N, SmallTable>));
        k.on_chip.push_back(address(clip_on_chip_kernel<N, LargeTable>));
      }
    });
    return k;
  }();
  return all;
}

// A list on its device, which is the current one while this lives.
class Passes {
 public:
  explicit Passes(const Work& work)
      : work_(work), guard_(work.device), device_(properties_of(work.device, kernels())) {}

  const Device& device() const { return device_; }

  template <class F>
  void for_each_table(F f) const {
    cuda::for_each_table(work_, device_, f);
  }

  // For writing: what overlaps goes into launches of its own, which the stream puts into one order.
  template <class F>
  void for_each_written_table(F f) const {
    if (overlap(work_.segments))
      for_each_table_of<SmallTable>(1, work_, device_, f);
    else
      for_each_table(f);
  }

  // The lifted values of blocks to totals, or those of pairs of block and segment to slots; the number of blocks.
  template <class Table>
  int read(const Table& table, double p, double* slots, double* totals) const {
    const int blocks = blocks_for(table, device_.max_blocks);
    with_norm(norm_of(p), [&](auto n) {
      launch("read_kernel", work_, device_, {blocks}, read_kernel<decltype(n), Table>, table, p, slots, totals);
    });
    return blocks;
  }

  // The read pass over all tables into one array; how many totals that are.
  int read_totals(double p, double* totals) const {
    int count = 0;
    for_each_table([&](const auto& table, int) { count += read(table, p, nullptr, totals + count); });
    return count;
  }

  template <class Table>
  void combine_slots(const Table& table, Combining how, const double* slots, int blocks, double* out) const {
    const int warps = device_.policy.threads / kWarp;
    launch("combine_slots_kernel", work_, device_,
           {std::max(1, (table.size + warps - 1) / warps), device_.programmatic}, combine_slots_kernel<Table>, table,
           how, slots, blocks, out);
  }

  void finish_norm(const NormEnd& norm, const double* totals, int count, const Results& results) const {
    launch("norm_kernel", work_, device_, {1, device_.programmatic}, norm_kernel<>, norm, totals, count, results);
  }

  template <class Table>
  bool fits_on_chip(const Table& table, double p) const {
    return with_norm(norm_of(p), [](auto n) { return kHasOnChipForm<decltype(n)>; }) &&
           int64_t(table.tiles()) <= int64_t(device_.on_chip_blocks) * device_.on_chip_tiles;
  }

  template <class Table>
  void clip_on_chip(const Table& table, const Demand& demand, double* totals, const Results& results) const {
    const int blocks = blocks_for(table, device_.on_chip_blocks);
    const int64_t most = (int64_t(table.tiles()) + blocks - 1) / blocks;
    const int64_t shared = std::max<int64_t>(0, most - device_.policy.on_chip_packs) * tile_bytes(device_.policy);
    with_norm(norm_of(demand.norm.p), [&](auto n) {
      if constexpr (kHasOnChipForm<decltype(n)>)
        launch("clip_on_chip_kernel", work_, device_, {blocks, false, true, size_t(shared)},
               clip_on_chip_kernel<decltype(n), Table>, table, demand, totals, results);
    });
  }

  template <class Table>
  void settle_and_scale(const Table& table, const Demand& demand, const double* totals, int count,
                        const Results& results, bool first) const {
    const Results stored_once = first ? results : Results{};
    launch("settle_and_scale_kernel", work_, device_,
           {blocks_for(table, device_.max_blocks), device_.programmatic && first}, settle_and_scale_kernel<Table>,
           table, demand, totals, count, stored_once);
  }

  // One table: built once for both launches.
  template <class Table>
  void clip(const Table& table, const Demand& demand, double* totals, const Results& results, Form form) const {
    if (form != Form::kTwoLaunches && fits_on_chip(table, demand.norm.p))
      return clip_on_chip(table, demand, totals, results);
    if (form == Form::kOnChip)
      throw std::runtime_error("these gradients do not fit on the chip, or the norm has no such form");
    settle_and_scale(table, demand, totals, read(table, demand.norm.p, nullptr, totals), results, true);
  }

  template <class Table>
  void scale(const Table& table, const double* coefs, int64_t stride, bool zero) const {
    launch("scale_kernel", work_, device_, {blocks_for(table, device_.max_blocks)}, scale_kernel<Table>, table, coefs,
           stride, zero);
  }

  template <class Table>
  void clamp(const Table& table, double bound) const {
    launch("clamp_kernel", work_, device_, {blocks_for(table, device_.max_blocks)}, clamp_kernel<Table>, table, bound);
  }

 private:
  const Work& work_;
  const DeviceGuard guard_;
  const Device& device_;
};

}  // namespace

int64_t scratch_doubles(const Work& work) {
  return tables_of(work) * Passes(work).device().max_blocks + LargeTable::kCapacity;
}

void lift(const Work& work, double p, double* scratch, double* out) {
  const Passes passes(work);
  passes.for_each_table([&](const auto& table, int) {
    const int blocks = passes.read(table, p, scratch, nullptr);
    passes.combine_slots(table, end_of(p).combining, scratch, blocks, out);
  });
}

void norm(const Work& work, double p, double* scratch, const Results& results) {
  const Passes passes(work);
  passes.finish_norm(end_of(p), scratch, passes.read_totals(p, scratch), results);
}

void clip(const Work& work, double p, const Limits& limits, double* scratch, const Results& results, Form form) {
  const Passes passes(work);
  const Demand demand{end_of(p), limits};
  if (tables_of(work) == 1 && !overlap(work.segments))
    return passes.for_each_table([&](const auto& table, int) { passes.clip(table, demand, scratch, results, form); });
  if (form == Form::kOnChip)
    throw std::runtime_error("the on-chip form takes no more tensors than one launch does, and none that share memory");
  const int count = passes.read_totals(p, scratch);
  passes.for_each_written_table([&](const auto& table, int number) {
    passes.settle_and_scale(table, demand, scratch, count, results, number == 0);
  });
}

bool fits_on_chip(const Work& work, double p) {
  const Passes passes(work);
  bool fits = tables_of(work) == 1 && !overlap(work.segments);
  passes.for_each_table([&](const auto& table, int) { fits = fits && passes.fits_on_chip(table, p); });
  return fits;
}

void scale(const Work& work, const double* coefs, int64_t stride, bool zero) {
  const Passes passes(work);
  passes.for_each_written_table([&](const auto& table, int) { passes.scale(table, coefs, stride, zero); });
}

void clamp(const Work& work, double bound) {
  const Passes passes(work);
  passes.for_each_written_table([&](const auto& table, int) { passes.clamp(table, bound); });
}

}  // namespace fusedclip::cuda
