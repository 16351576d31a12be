// How the kernels are launched, per architecture: the kernels' bounds and the launches read one table.
#pragma once

#include <cstdint>

namespace fusedclip::cuda {

constexpr int kWarp = 32;  // threads

struct LaunchPolicy {
  int architecture;   // the first compute capability (major * 10 + minor) that the row is for
  int threads;        // per block
  int blocks_per_sm;  // of the streaming kernels; the on-chip form has one
  int unroll;         // 16-byte loads that a thread has in flight when it reads
  int write_unroll;   // and when it reads, changes and writes
};

// Bytes in flight must cover bandwidth times latency (about 0.7 us): 13 KB per SM on an A100 (2.0 TB/s, 108 SMs), 18 KB
// on an H100 (3.35 TB/s, 132), 38 KB on a B200 (8 TB/s, 148), 7 KB on an RTX 5090 (1.8 TB/s, 170). 512 threads x 2
// blocks x 4 loads x 16 bytes are 64 KB. 512 x 2 also leaves 64 registers a thread, in which 8 loads would spill (on a
// B200 4 would, and 3 are 48 KB), and keeps the totals that every block of the second launch reads at 2-3 KB. Half of
// what a write pass moves are loads: 2 a thread (32 KB) do on a B200 and 1 on an RTX 5090, for which nvcc 13.0 spills
// with more; for Ampere and Hopper it doesn't.
#ifndef FUSEDCLIP_LAUNCH_POLICIES  // tests run the kernels on the host, with few threads
#define FUSEDCLIP_LAUNCH_POLICIES {80, 512, 2, 4, 4}, {90, 512, 2, 4, 4}, {100, 512, 2, 3, 2}, {120, 512, 2, 4, 1}
#endif
constexpr LaunchPolicy kPolicies[] = {FUSEDCLIP_LAUNCH_POLICIES};

// The last row at or below `architecture`; the first one for what is older still.
constexpr LaunchPolicy policy_of(int architecture) {
  LaunchPolicy found = kPolicies[0];
  for (const LaunchPolicy& row : kPolicies)
    if (row.architecture <= architecture) found = row;
  return found;
}

constexpr bool powers_of_two() {
  for (const LaunchPolicy& row : kPolicies)
    if (row.threads & (row.threads - 1)) return false;
  return true;
}
static_assert(powers_of_two(), "tiles are counted by shifting");

// One 16-byte pack per thread.
constexpr int64_t tile_bytes(const LaunchPolicy& policy) { return int64_t(policy.threads) * 16; }

// Shared memory of a tile that is kept on chip: itself, and where it came from.
constexpr int64_t on_chip_tile_bytes(const LaunchPolicy& policy) { return tile_bytes(policy) + 16; }

}  // namespace fusedclip::cuda
