#include "bindings/group_options.h"

#include <algorithm>

namespace py = pybind11;

namespace fusedopt {

GroupOptions read_options(const OptimizerRow& row, GroupReader& reader) {
  GroupOptions options = {};
  options.source = read_hyper(row, reader);
  options.scalars_gpu = reader.scalars_gpu();
  options.capturable = reader.is_capturable();
  options.errs_if_nonfinite = reader.errs_if_nonfinite();
  options.master_weights = reader.master_weights();
  const HyperParams& hyper = options.source.values;
  options.rule = rule_for(row, hyper).id;
  with_rule(options.rule, [&](auto rule) {
    const auto variant = rule.variant(hyper);
    options.variant = static_cast<uint8_t>(variant.number());
    for (int s = 0; s < static_cast<int>(row.state_names.size()); ++s) {
      if (!variant.uses(s)) continue;
      options.states |= 1u << s;
      options.names[kFirstState + s] = &row.state_names[static_cast<size_t>(s)];
    }
  });
  if (options.master_weights == Master::kFloat32) options.names[kMaster] = &kMasterParam;
  if (options.master_weights == Master::kSplit) options.names[kMaster] = &kParamRemainder;
  if (options.master_weights == Master::kSplit8) options.names[kMaster] = &kParamRemainder8;
  if (hyper.has_ema()) options.names[kEma] = &kEmaParam;
  options.counts_steps =
      row.always_counts || hyper.has_ema() ||
      hyper.stochastic_rounding == StochasticRounding::kAll ||
      (reader.wants_codes() && hyper.stochastic_rounding != StochasticRounding::kNone) ||
      rounds_remainder(options.master_weights, hyper.stochastic_rounding);
  options.has_state =
      options.counts_steps || std::any_of(std::begin(options.names), std::end(options.names),
                                          [](const Key* name) { return name != nullptr; });
  return options;
}

std::optional<Master> master_for(Master wanted, DType param, bool is_complex) {
  if (wanted == Master::kNone) return wanted;
  if (wanted == Master::kFloat32 && item_size(param) > 2) return Master::kNone;
  if (is_complex || (is_split(wanted) && param != DType::kBFloat16)) return std::nullopt;
  return wanted;
}

std::string master_is_for(Master kind) {
  return kind == Master::kSplit    ? "master_weights='split' is for torch.bfloat16"
         : kind == Master::kSplit8 ? "master_weights='split8' is for torch.bfloat16"
                                   : "master_weights='float32' is for real numbers";
}

}  // namespace fusedopt
