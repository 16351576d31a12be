// The CUDA engine, as the bindings see it: no CUDA header is needed to include this.
//
// Every function works on the stream that it is given, leaves its device the current one, never waits for the device,
// allocates nothing there and throws std::runtime_error with the call that failed and CUDA's reason. Pointers are to
// memory of the list's device. Segments may share memory: what they share is written in the order of the list, a launch
// for each segment.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../segment.h"
#include "request.h"

namespace fusedclip::cuda {

// The gradients of one device, and where in time to work on them.
struct Work {
  const std::vector<Segment>& segments;
  int device;
  void* stream;
};

enum class Form : int { kAuto, kTwoLaunches, kOnChip };

// Why no device can be used here, in CUDA's own words; empty if one can.
std::string missing();

// Doubles of scratch memory that lift, norm and clip each want, and stats with kStats rows: O(rows * (segments +
// blocks)).
int64_t scratch_doubles(const Work& work, int rows);

// out[s] = the lifted value of segment s.
void lift(const Work& work, double p, double* scratch, double* out);

// out[row * segments + s] = the statistics of segment s, a row per member.
void stats(const Work& work, double* scratch, double* out);

// The norm of all segments together. Not for p = 0, which counts tensors: that is for lift.
void norm(const Work& work, double p, double* scratch, const Results& results);

// The norm times the multiplier, its coefficient times the multiplier, and every element times that unless it is 1.
// Not for p = 0. kAuto keeps the gradients on chip where they fit, unless the device has refused to.
void clip(const Work& work, double p, const Limits& limits, double* scratch, const Results& results, Form form);

// What `clip` does after its read pass, whose lifted value of everything (over other ranks, too) is at `lifted`.
void settle_and_scale(const Work& work, double p, const Limits& limits, const double* lifted, const Results& results);

// Whether kAuto would keep them on chip.
bool fits_on_chip(const Work& work, double p);

// Segment s times coefs[s * stride]; 1 writes nothing, and with `zero` a coefficient of 0 stores zeros.
void scale(const Work& work, const double* coefs, int64_t stride, bool zero);

// Every element into [-bound, bound].
void clamp(const Work& work, double bound);

}  // namespace fusedclip::cuda
