// The passes as launches. Bytes moved are said in kernels.cuh.
#include <atomic>

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

template <class Table>
void add_kernels(Kernels& k) {
  for (const void* one :
       {address(stats_kernel<Table>), address(combine_slots_kernel<Table>), address(settle_and_scale_kernel<Table>),
        address(scale_kernel<Table>), address(clamp_kernel<Table>)})
    k.streaming.push_back(one);
  for_each_norm([&](auto n) {
    using N = decltype(n);
    k.streaming.push_back(address(read_kernel<N, Table>));
    if constexpr (kHasOnChipForm<N>) k.on_chip.push_back(address(clip_on_chip_kernel<N, Table>));
  });
}

const Kernels& kernels() {
  static const Kernels all = [] {
    Kernels k{{address(norm_kernel<>)}, {}};
    add_kernels<SmallTable>(k);
    add_kernels<MiddleTable>(k);
    add_kernels<LargeTable>(k);
    return k;
  }();
  return all;
}

// A cooperative launch may be refused where a process has a part of the device only (MPS, green contexts).
bool is_refusal(cudaError_t status) {
  return status == cudaErrorCooperativeLaunchTooLarge || status == cudaErrorNotSupported ||
         status == cudaErrorNotPermitted || status == cudaErrorLaunchOutOfResources;
}
std::atomic<uint64_t> refused_on_chip{0};  // a bit for each device

// A list on its device, which is the current one.
class Passes {
 public:
  explicit Passes(const Work& work) : work_(work), device_(made_ready(work.device, kernels())) {}

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

  // The statistics of pairs of block and segment to kStats rows of slots; the number of blocks.
  template <class Table>
  int read_stats(const Table& table, double* slots) const {
    const int blocks = blocks_for(table, device_.max_blocks);
    launch("stats_kernel", work_, device_, {blocks}, stats_kernel<Table>, table, slots);
    return blocks;
  }

  template <class Table>
  void combine_slots(const Table& table, Combining last, int rows, const double* slots, int blocks, double* out) const {
    const int warps = device_.policy.threads / kWarp;
    launch("combine_slots_kernel", work_, device_,
           {std::max(1, (table.size * rows + warps - 1) / warps), Start::kEarly}, combine_slots_kernel<Table>, table,
           last, rows, slots, blocks, out, int64_t(work_.segments.size()));
  }

  void finish_norm(const NormEnd& norm, const double* totals, int count, const Results& results) const {
    launch("norm_kernel", work_, device_, {1, Start::kEarly}, norm_kernel<>, norm, totals, count, results);
  }

  template <class Table>
  bool fits_on_chip(const Table& table, double p) const {
    return !(refused_on_chip & device_bit()) &&
           with_norm(norm_of(p), [](auto n) { return kHasOnChipForm<decltype(n)>; }) &&
           int64_t(table.tiles()) <= int64_t(device_.on_chip_blocks) * device_.on_chip_tiles;
  }

  template <class Table>
  cudaError_t clip_on_chip(const Table& table, const Demand& demand, double* totals, const Results& results) const {
    const int blocks = blocks_for(table, device_.on_chip_blocks);
    const int64_t most = (int64_t(table.tiles()) + blocks - 1) / blocks;
    const Shape shape{blocks, Start::kTogether, size_t(most * on_chip_tile_bytes(device_.policy))};
    return with_norm(norm_of(demand.norm.p), [&](auto n) {
      if constexpr (kHasOnChipForm<decltype(n)>)
        return try_launch(work_, device_, shape, clip_on_chip_kernel<decltype(n), Table>, table, demand, totals,
                          results);
      else
        return cudaErrorNotSupported;
    });
  }

  template <class Table>
  void settle_and_scale(const Table& table, const Demand& demand, const double* totals, int count,
                        const Results& results, bool first) const {
    const Results stored_once = first ? results : Results{};
    launch("settle_and_scale_kernel", work_, device_,
           {blocks_for(table, device_.max_blocks), first ? Start::kEarly : Start::kInTurn},
           settle_and_scale_kernel<Table>, table, demand, totals, count, stored_once);
  }

  void settle_and_scale_all(const Demand& demand, const double* totals, int count, const Results& results) const {
    for_each_written_table(
        [&](const auto& table, int number) { settle_and_scale(table, demand, totals, count, results, number == 0); });
  }

  // One table: built once for both launches.
  template <class Table>
  void clip(const Table& table, const Demand& demand, double* totals, const Results& results, Form form) const {
    if (form != Form::kTwoLaunches && fits_on_chip(table, demand.norm.p)) {
      const cudaError_t status = clip_on_chip(table, demand, totals, results);
      if (form == Form::kOnChip || !is_refusal(status)) return check(status, "clip_on_chip_kernel");
      cudaGetLastError();  // whoever asks next is not to be told of it
      refused_on_chip |= device_bit();
    }
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
  uint64_t device_bit() const { return uint64_t(1) << (work_.device & 63); }

  const Work& work_;
  const Device& device_;
};

}  // namespace

int64_t scratch_doubles(const Work& work, int rows) {
  return rows * (tables_of(work) * Passes(work).device().max_blocks + LargeTable::kCapacity);
}

void lift(const Work& work, double p, double* scratch, double* out) {
  const Passes passes(work);
  passes.for_each_table([&](const auto& table, int) {
    const int blocks = passes.read(table, p, scratch, nullptr);
    passes.combine_slots(table, end_of(p).combining, 1, scratch, blocks, out);
  });
}

void stats(const Work& work, double* scratch, double* out) {
  const Passes passes(work);
  passes.for_each_table([&](const auto& table, int) {
    const int blocks = passes.read_stats(table, scratch);
    passes.combine_slots(table, Combining::kMax, kStats, scratch, blocks, out);
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
  passes.settle_and_scale_all(demand, scratch, passes.read_totals(p, scratch), results);
}

void settle_and_scale(const Work& work, double p, const Limits& limits, const double* lifted, const Results& results) {
  Passes(work).settle_and_scale_all({end_of(p), limits}, lifted, 1, results);
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
