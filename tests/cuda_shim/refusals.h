// What the engine says when a call of CUDA's fails or a dtype is not known.
#pragma once

#include <cstring>

#include "calls.h"

namespace fusedclip {

// As under MPS: what is not allowed is done in the other form, this time and from then on.
inline void a_refused_cooperative_launch_becomes_two() {
  shim::machine.failing_call = "cooperative launch";
  shim::machine.status = cudaErrorCooperativeLaunchTooLarge;
  for (int time = 0; time < 2; ++time) {
    List list = mixed(14);
    const auto before = list.values();
    const double norm = oracle_norm(list, 2);
    shim::machine.launches = 0;
    const Outcome outcome = clip(list, 2, at_most(1), Form::kAuto);
    CHECK(shim::machine.launches == 2 && close(outcome.norm, norm, 3e-7) && outcome.coef < 1);
    check_scaled(list, before, outcome.coef);
    shim::machine.failing_call = "";  // it is not asked for again
  }
}

inline void failing_calls_say_what_and_why() {
  shim::machine.status = cudaErrorLaunchFailure;
  for (const char* call : {"cudaLaunchKernelEx", "cudaGetDevice"}) {
    shim::machine.failing_call = call;
    List list = mixed(12);
    std::string message;
    try {
      clip(list, 2, at_most(1), Form::kTwoLaunches);
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    CHECK(message == (std::strcmp(call, "cudaGetDevice") == 0 ? "cudaGetDevice: unspecified launch failure"
                                                              : "read_kernel: unspecified launch failure"));
  }
  shim::machine.status = cudaErrorInsufficientDriver;
  shim::machine.failing_call = "cudaGetDeviceCount";
  CHECK(cuda::missing() ==
        "cudaGetDeviceCount: CUDA driver version is insufficient for CUDA runtime version "
        "(the driver knows CUDA 12.4, this was built with 13.0)");
  shim::machine.failing_call = "";
  CHECK(cuda::missing().empty());
  shim::machine.driver = 12000;  // which runs what CUDA 12 has built, but takes no parameters of more than 4 KB
  CHECK(cuda::missing() == "the driver knows CUDA 12.0, and 12.1 (R530) is needed");
  shim::machine.driver = 12040;
}

inline void a_dtype_that_is_not_known_is_not_launched() {
  float element = 1;
  const std::vector<Segment> segments = {{&element, 1, DType(17)}};
  const cuda::Work work{segments, 0, nullptr};
  const double coef = 0.5;
  bool refused = false;
  try {
    cuda::scale(work, &coef, 0, false);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  CHECK(refused && element == 1);
}

}  // namespace fusedclip
