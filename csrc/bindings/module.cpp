#include <pybind11/pybind11.h>

#include "bindings/fingerprint.h"
#include "bindings/plan.h"
#include "bindings/torch_api.h"
#include "bindings/weights.h"
#include "core/gpu.h"

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
  info["lazy_keys"] = has_dispatch_keys();
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
  fusedopt::find_optimizer(optimizer).read(reader);
}

// Reads a param group that has been checked.
fusedopt::HyperParams read_group(const fusedopt::OptimizerRow& row, const py::object& group,
                                 int64_t index) {
  const py::object dict = fusedopt::as_dict(group.ptr(), "param group");
  fusedopt::GroupReader reader(dict.ptr(), index, /*leave_on_gpu=*/true);
  return row.read(reader).values;
}

void check_state(const std::string& optimizer, const py::dict& state, const py::dict& group,
                 int64_t group_index, int64_t index) {
  const fusedopt::OptimizerRow& row = fusedopt::find_optimizer(optimizer);
  const fusedopt::States in_use = states_in_use(row, read_group(row, group, group_index));
  fusedopt::refuse_partial(row, in_use, state.ptr(), {group.ptr(), group_index, index},
                           /*is_checkpoint=*/true);
}

// Names of the states that the group's options have a use for, of those that are left out because
// they have none, and whether there is a "step".
py::tuple state_names(const std::string& optimizer, const py::object& group) {
  const fusedopt::OptimizerRow& row = fusedopt::find_optimizer(optimizer);
  const fusedopt::HyperParams hyper = read_group(row, group, 0);
  const fusedopt::States in_use = states_in_use(row, hyper);
  py::list used, left_out;
  for (size_t s = 0; s < row.state_names.size(); ++s) {
    if ((in_use >> s & 1) != 0)
      used.append(row.state_names[s].name());
    else if ((row.omissible >> s & 1) != 0)
      left_out.append(row.state_names[s].name());
  }
  return py::make_tuple(used, left_out, counts_steps(row, hyper));
}

// The controls of the emulated CUDA driver.
const fusedopt::cuda::Emulation& emulation() {
  if (fusedopt::cuda::emulation() == nullptr)
    throw std::runtime_error("this is no build with FUSEDOPT_CUDA=emulated");
  return *fusedopt::cuda::emulation();
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  fusedopt::connect_to_torch();
  fusedopt::learn_fingerprints();
  py::class_<fusedopt::Plan>(m, "Plan")
      .def(py::init<const std::string&, const std::string&, int64_t>(), py::arg("optimizer"),
           py::arg("isa"), py::arg("chunk_elements") = 0)
      .def("step", &fusedopt::Plan::step, py::arg("param_groups"), py::arg("state"),
           py::arg("grad_scale"), py::arg("found_inf"), py::arg("create_state"),
           py::arg("num_threads"), py::arg("checks_grads"))
      .def_property_readonly("grad_status", &fusedopt::Plan::status)
      .def("bookkeeping_bytes", &fusedopt::Plan::bookkeeping_bytes)
      .def("overlap_checks", &fusedopt::Plan::overlap_checks);
  m.def("check_group", &check_group, py::arg("optimizer"), py::arg("group"), py::arg("index"),
        py::arg("is_construction") = false);
  m.def("check_state", &check_state, py::arg("optimizer"), py::arg("state"), py::arg("group"),
        py::arg("group_index"), py::arg("index"));
  m.def("state_names", &state_names, py::arg("optimizer"), py::arg("group"));
  m.def("join_weights", &fusedopt::join_weights, py::arg("param"), py::arg("remainder"),
        py::arg("weight"));
  m.def("split_weights", &fusedopt::split_weights, py::arg("weight"), py::arg("param"),
        py::arg("remainder"));
  m.def("build_info", &build_info);
  m.def("is_emulated", &fusedopt::cuda::is_emulated);
  m.def("emulate", [](bool emulate) { emulation().use(emulate); }, py::arg("emulate"));
  m.def("begin_capture", [] { emulation().begin_capture(); });
  m.def("end_capture", [] { emulation().end_capture(); });
  m.def("replay", [] { emulation().replay(); });
}
