// The CUDA engine as Python sees it: on torch's current stream, and nothing waits for the device.
#include "bindings.h"
#include "cuda/engine.h"
#include "cuda/update.h"
#include "torch_tensors.h"
#include "update_list.h"

namespace fusedclip {
namespace {

cuda::Work cuda_work(const TensorList& l) { return {l.segments, l.device.device_id, current_stream(l.device)}; }

}  // namespace

void bind_cuda(py::module_& m) {
  using py::arg;
  const auto keywords = py::kw_only();
  m.def("cuda_missing", &cuda::missing);
  m.def("cuda_scratch_doubles",
        [](const TensorList& l, int rows) { return cuda::scratch_doubles(cuda_work(l), rows); });
  m.def("cuda_fits_on_chip", [](const TensorList& l, double p) { return cuda::fits_on_chip(cuda_work(l), p); });
  m.def(
      "cuda_lift",
      [](const TensorList& l, double p, py::handle scratch, py::handle out) {
        const cuda::Work work = cuda_work(l);
        double *const space = doubles_of(scratch, l.device), *const lifted = doubles_of(out, l.device);
        unlocked([&] { cuda::lift(work, p, space, lifted); });
      },
      arg("list"), keywords, arg("p"), arg("scratch"), arg("out"));
  m.def(
      "cuda_stats",
      [](const TensorList& l, py::handle scratch, py::handle out) {
        const cuda::Work work = cuda_work(l);
        double *const space = doubles_of(scratch, l.device), *const rows = doubles_of(out, l.device);
        unlocked([&] { cuda::stats(work, space, rows); });
      },
      arg("list"), keywords, arg("scratch"), arg("out"));
  m.def(
      "cuda_norm",
      [](const TensorList& l, double p, py::handle scratch, py::handle norm) {
        const cuda::Work work = cuda_work(l);
        const NormPlace place = norm_place_of(norm, l.device);
        double* const space = doubles_of(scratch, l.device);
        unlocked([&] { cuda::norm(work, p, space, {place.address, place.is_double, nullptr}); });
      },
      arg("list"), keywords, arg("p"), arg("scratch"), arg("norm"));
  m.def(
      "cuda_clip",
      [](TensorList& l, double p, const py::tuple& rule, py::handle max_norm, py::handle multiplier, py::handle lifted,
         py::handle scratch, py::handle norm, py::handle coef, int form) {
        const cuda::Work work = cuda_work(l);
        const cuda::Limits limits{as_rule(rule.ptr()), doubles_of(max_norm, l.device),
                                  doubles_of(multiplier, l.device)};
        const NormPlace place = norm_place_of(norm, l.device);
        const cuda::Results results{place.address, place.is_double, doubles_of(coef, l.device)};
        const double* const known = doubles_of(lifted, l.device);
        double* const space = doubles_of(scratch, l.device);
        unlocked([&] {
          known ? cuda::settle_and_scale(work, p, limits, known, results)
                : cuda::clip(work, p, limits, space, results, static_cast<cuda::Form>(form));
        });
        ++l.writes;
      },
      "`max_norm`, if it is a tensor, replaces the rule's; `lifted` is what comes of a read pass that is then not "
      "made.",
      arg("list"), keywords, arg("p"), arg("rule"), arg("max_norm"), arg("multiplier"), arg("lifted"), arg("scratch"),
      arg("norm"), arg("coef"), arg("form"));
  m.def(
      "cuda_scale",
      [](TensorList& l, py::handle coef, bool per_tensor, bool zero) {
        const cuda::Work work = cuda_work(l);
        const double* const coefs = doubles_of(coef, l.device);
        unlocked([&] { cuda::scale(work, coefs, per_tensor, zero); });
        ++l.writes;
      },
      arg("list"), keywords, arg("coef"), arg("per_tensor"), arg("zero"));
  m.def(
      "cuda_clamp",
      [](TensorList& l, double bound) {
        const cuda::Work work = cuda_work(l);
        unlocked([&] { cuda::clamp(work, bound); });
        ++l.writes;
      },
      arg("list"), keywords, arg("bound"));
  m.attr("cuda_update_scratch_doubles") = cuda::kPreparedDoubles;  // for each parameter
  m.def(
      "cuda_update",
      [](UpdateList& l, const std::string& kind, const py::sequence& rules, py::handle coefs, py::handle skip,
         py::handle scratch) {
        const Update rule = update_of(kind);
        const std::vector<UpdateRow> rows = rows_of(rule, rules, l.device);
        const UpdateWork work{l.segments, rule, rows, doubles_of(coefs, l.device), flag_of(skip, l.device)};
        const cuda::Work parameters{l.parameters, l.device.device_id, current_stream(l.device)};
        double* const space = doubles_of(scratch, l.device);
        unlocked([&] { cuda::update(work, parameters, space); });
        ++l.updates;
      },
      arg("list"), keywords, arg("kind"), arg("rules"), arg("coefs"), arg("skip").none(true), arg("scratch"));
}

}  // namespace fusedclip
