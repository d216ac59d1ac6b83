#include <pybind11/pybind11.h>

#include "bindings/codes.h"
#include "bindings/fingerprint.h"
#include "bindings/operands.h"
#include "bindings/plan.h"
#include "bindings/scalars.h"
#include "bindings/state_spec.h"
#include "bindings/torch_api.h"
#include "bindings/torch_layout.h"
#include "bindings/weights.h"
#include "core/codes.h"
#include "core/gpu.h"
#if defined(FUSEDOPT_EMULATED)
#include "core/emulation.h"
#endif

namespace py = pybind11;

namespace {

// What was built and what this machine offers; fusedopt.show_config() puts it into words.
py::dict build_info() {
  using namespace fusedopt;
  py::list isas;
  for (const cpu::Isa isa : {cpu::Isa::kBaseline, cpu::Isa::kAvx2, cpu::Isa::kAvx512})
    if (isa <= cpu::best_isa()) isas.append(cpu::isa_name(isa));
  py::dict info;
  info["compiler"] = __VERSION__;
  info["isas"] = isas;  // rising; the last is the best
  info["openmp"] = cpu::openmp_version();
  info["fingerprints"] = has_fingerprints();
  info["fingerprint_obstacle"] =
      has_fingerprints() ? py::object(py::none()) : py::str(layout_obstacle());
  info["lazy_keys"] = has_dispatch_keys();
  info["versions"] = has_versions();
  const char* const reason = cuda::unavailable_reason();
  info["cuda_unavailable"] = reason == nullptr ? py::object(py::none()) : py::str(reason);
  info["cuda_archs"] = cuda::architectures();
  return info;
}

void check_group(const std::string& optimizer, const py::dict& group, int64_t index,
                 bool is_construction) {
  using fusedopt::Ranges;
  fusedopt::GroupReader reader(group.ptr(), index, /*leave_on_gpu=*/false,
                               is_construction ? Ranges::kOfTorch : Ranges::kSensible);
  fusedopt::read_options(fusedopt::find_optimizer(optimizer), reader);
}

double max_grad_norm(const py::dict& group, int64_t index) {
  fusedopt::GroupReader reader(group.ptr(), index, /*leave_on_gpu=*/false);
  return fusedopt::read_max_grad_norm(reader);
}

void check_state(const std::string& optimizer, const py::dict& state, const py::dict& group,
                 int64_t group_index, int64_t index) {
  const fusedopt::OptimizerRow& row = fusedopt::find_optimizer(optimizer);
  fusedopt::GroupReader reader(group.ptr(), group_index, /*leave_on_gpu=*/true);
  const fusedopt::ParamId id = {group.ptr(), group_index, index};
  fusedopt::refuse_partial(row, read_options(row, reader).states, state.ptr(), id.text(),
                           /*is_checkpoint=*/true);
}

fusedopt::StateSpec state_spec(const std::string& optimizer, const py::object& group,
                               const py::object& dtype, bool is_strict) {
  const py::object dict = fusedopt::as_dict(group.ptr(), "param group");
  fusedopt::GroupReader reader(dict.ptr(), 0, /*leave_on_gpu=*/true, fusedopt::Ranges::kAny);
  return fusedopt::state_spec(fusedopt::find_optimizer(optimizer), reader, dtype, is_strict);
}

// Whether this is a tensor whose value only a GPU knows.
bool is_on_gpu(const py::object& tensor) {
  return fusedopt::is_tensor(tensor.ptr()) &&
         (fusedopt::cuda::is_emulated() || tensor.attr("is_cuda").cast<bool>());
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  fusedopt::connect_to_torch();
  fusedopt::learn_layout();
  fusedopt::all_optimizers();  // made here, where no other thread waits for it
  py::class_<fusedopt::Plan>(m, "Plan")
      .def(py::init<const std::string&, const std::string&, int64_t>(), py::arg("optimizer"),
           py::arg("isa"), py::arg("chunk_elements") = 0)
      .def("step", &fusedopt::Plan::step, py::arg("param_groups"), py::arg("state"),
           py::arg("grad_scale"), py::arg("found_inf"), py::arg("num_threads"),
           py::arg("checks_grads"), py::arg("norm_groups"), py::arg("grad_norm"))
      .def_property_readonly("grad_status", &fusedopt::Plan::status)
      .def_property_readonly("num_runs", &fusedopt::Plan::num_runs)
      .def("bookkeeping_bytes", &fusedopt::Plan::bookkeeping_bytes)
      .def("overlap_checks", &fusedopt::Plan::overlap_checks);
  py::class_<fusedopt::PendingStep>(m, "PendingStep")
      .def_readonly("missing", &fusedopt::PendingStep::missing)
      .def_readonly("maybe_written", &fusedopt::PendingStep::maybe_written)
      .def_readonly("counts_on_gpu", &fusedopt::PendingStep::counts_on_gpu)
      .def_property_readonly("has_run", &fusedopt::PendingStep::has_run)
      .def("run", &fusedopt::PendingStep::run)
      .def("close", &fusedopt::PendingStep::close);
  py::class_<fusedopt::StateSpec>(m, "StateSpec")
      .def_readonly("entries", &fusedopt::StateSpec::entries)
      .def_readonly("omissible", &fusedopt::StateSpec::omissible)
      .def_readonly("unused", &fusedopt::StateSpec::unused)
      .def_readonly("codes", &fusedopt::StateSpec::codes)
      .def_readonly("wants_codes", &fusedopt::StateSpec::wants_codes)
      .def_readonly("starts", &fusedopt::StateSpec::starts)
      .def_readonly("counts_steps", &fusedopt::StateSpec::counts_steps)
      .def_readonly("state_dtype", &fusedopt::StateSpec::state_dtype)
      .def_readonly("weight_dtype", &fusedopt::StateSpec::weight_dtype);
  m.attr("WEIGHTS_IN_STATE") = fusedopt::names_of_weights();
  m.attr("GRAD_STATUS") = fusedopt::GradNorm::status_fields();
  m.def("check_group", &check_group, py::arg("optimizer"), py::arg("group"), py::arg("index"),
        py::arg("is_construction") = false);
  m.def("max_grad_norm", &max_grad_norm, py::arg("group"), py::arg("index"));
  m.def("check_state", &check_state, py::arg("optimizer"), py::arg("state"), py::arg("group"),
        py::arg("group_index"), py::arg("index"));
  m.def("state_spec", &state_spec, py::arg("optimizer"), py::arg("group"), py::arg("dtype"),
        py::arg("is_strict") = true);
  m.def("state_dtype_name", &fusedopt::state_dtype_name, py::arg("value"));
  m.def("join_weights", &fusedopt::join_weights, py::arg("param"), py::arg("remainder"),
        py::arg("weight"));
  m.def("split_weights", &fusedopt::split_weights, py::arg("weight"), py::arg("param"),
        py::arg("remainder"));
  m.def("encode", &fusedopt::encode, py::arg("values"), py::arg("codes"), py::arg("scales"));
  m.def("decode", &fusedopt::decode, py::arg("codes"), py::arg("scales"), py::arg("values"));
  m.def(
      "names_of_scales",
      [](const std::string& optimizer) {
        py::list names;
        const fusedopt::OptimizerRow& row = fusedopt::find_optimizer(optimizer);
        for (size_t s = 0; s < row.scale_names.size(); ++s)
          if (row.can_be_codes(s)) names.append(row.scale_names[s].str());
        return names;
      },
      py::arg("optimizer"));
  m.attr("CODES_SUFFIX") = fusedopt::kCodesSuffix;
  m.attr("SCALES_SUFFIX") = fusedopt::kScalesSuffix;
  m.attr("GROUP_OF_CODES") = fusedopt::kGroup;
  m.attr("TOO_MANY_STEPS") = fusedopt::kTooManySteps;
  m.def("build_info", &build_info);
  m.def("is_on_gpu", &is_on_gpu, py::arg("tensor"));
#if defined(FUSEDOPT_EMULATED)
  py::module_ emulation = m.def_submodule("emulation");
  emulation.def("use", &fusedopt::cuda::emulation::use, py::arg("emulate"));
  emulation.def("is_used", &fusedopt::cuda::is_emulated);
  emulation.def("begin_capture", &fusedopt::cuda::emulation::begin_capture);
  emulation.def("end_capture", &fusedopt::cuda::emulation::end_capture);
  emulation.def("replay", &fusedopt::cuda::emulation::replay);
#endif
}
