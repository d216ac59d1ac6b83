// See problem.h.

#include "problem.h"

#include <algorithm>
#include <limits>

#include "check.h"
#include "core/flush.h"
#include "core/stochastic.h"
#include "core/weight.h"

using namespace fusedopt;

namespace {

// A number after it has been stored and loaded.
template <class T>
T as_stored(DType dtype, T value) {
  with_storage<T>(dtype, [&](auto storage) {
    store(storage, value);
    value = load<T>(storage);
  });
  return value;
}

// The draw of an element with this number in its tensor and this new weight.
template <class T>
uint32_t draw_alone(uint32_t rounding_key, int64_t number, T weight) {
  const auto element = static_cast<uint64_t>(number);
  const auto pair_number = static_cast<uint32_t>(element / 2);
  const uint32_t pair = pair_draw(draw_key(rounding_key, element / 2), pair_number);
  const uint32_t own = element % 2 == 0 ? pair : second_of_pair(pair);
  return element_draw(own, as_bits(weight == weight ? static_cast<float>(weight) : HUGE_VALF));
}

// One element in all operands of a tensor.
class Element {
 public:
  Element(const Problem& problem, std::vector<Buffer>& buffers, int64_t i)
      : problem_(problem), buffers_(buffers), i_(i) {}

  int64_t number() const { return problem_.first_number + at(kIndex); }

  template <class T>
  T get(int operand) const {
    return buffer(operand).template get<T>(at(operand));
  }
  template <class T>
  void set(int operand, T value) const {
    buffer(operand).set(at(operand), value);
  }

  template <class T>
  T weight() const {
    const Master master = master_of(buffer(kMaster).dtype());
    if (master == Master::kNone) return get<T>(kParam);
    if (master == Master::kFloat32) return get<T>(kMaster);
    const uint32_t remainder = buffer(kMaster).word(at(kMaster));
    const uint32_t bits = master == Master::kSplit8 ? remainder << 8 : remainder;
    return static_cast<T>(join_weight(get<float>(kParam), bits));
  }

  template <class T>
  void set_weight(T weight) const {
    const Master master = master_of(buffer(kMaster).dtype());
    if (is_split(master)) {
      const SplitWeight<float> parts = split_weight(static_cast<float>(weight));
      set(kParam, parts.param);
      const uint32_t kept =
          master == Master::kSplit8 ? parts.remainder >> 8 & 0xffu : parts.remainder;
      buffer(kMaster).set_word(at(kMaster), static_cast<uint16_t>(kept));
      return;
    }
    set(kParam, weight);
    set(kMaster, weight);  // if there is one
  }

 private:
  Buffer& buffer(int operand) const { return buffers_[static_cast<size_t>(operand)]; }
  int64_t at(int operand) const { return offset_of(problem_, i_, operand); }

  const Problem& problem_;
  std::vector<Buffer>& buffers_;
  int64_t i_;
};

// Not inlined, so that nothing is computed before the mode is set.
template <class Rule, class T>
__attribute__((noinline)) void update_elements(const Problem& problem,
                                               std::vector<Buffer>& buffers) {
  const auto scalars = problem.scalars.of<Rule>().template as<T>();
  for (int64_t i = 0; i < problem.numel; ++i) {
    const Element element(problem, buffers, i);
    T weight = element.weight<T>(), state[Rule::kNumStates];
    for (int s = 0; s < Rule::kNumStates; ++s)
      state[s] = problem.has(kFirstState + s) ? element.get<T>(kFirstState + s)
                                              : std::numeric_limits<T>::quiet_NaN();
    Ieee math;
    Rule::update(Rule::Variant::of(problem.variant), scalars.rule, math, weight,
                 element.get<T>(kGrad), state);

    const uint32_t own = draw_alone(scalars.common.rounding_key, element.number(), weight);
    const auto rounded = [&](int operand, T value) {
      const uint32_t draw = operand == kCheapest ? own : mixed(own);
      return (problem.stochastic >> operand & 1) == 0
                 ? value
                 : static_cast<T>(round_stochastically(static_cast<float>(value), draw, operand));
    };
    weight = rounded(kParam, weight);
    if (master_of(problem.dtypes[kMaster]) == Master::kSplit8) {
      const auto whole = static_cast<float>(weight);
      const bool is_drawn = (problem.stochastic >> kMaster & 1) != 0;
      const uint32_t draw = draw_for_weight(mixed(own));
      weight = static_cast<T>(is_drawn ? round_to_24_bits(whole, draw) : nearest_of_24_bits(whole));
    }
    element.set_weight(weight);
    for (int s = 0; s < Rule::kNumStates; ++s)
      if (problem.has(kFirstState + s))
        element.set(kFirstState + s, rounded(kFirstState + s, state[s]));
    if (problem.has(kEma))
      element.set(kEma, scalars.common.ema(element.get<T>(kEma), element.weight<T>()));
  }
}

constexpr uint64_t kStep = 30;  // RAdam divides, and ASGD averages

Problem make_problem(RuleId rule, int variant, const HyperParams& hyper) {
  Problem problem = {};
  problem.rule = rule;
  problem.variant = variant;
  problem.hyper = hyper;
  problem.hyper.lr = 0.1;
  problem.hyper.ema_decay = 0.9;
  problem.hyper.rounding_seed = 17;
  problem.hyper.stochastic_rounding = StochasticRounding::kAll;
  problem.scalars = scalars_at(problem, {kStep, false}, 2.0);
  problem.numel = 2345;
  problem.guard = kGuard;
  return problem;
}

void set_decay(HyperParams& hyper, Decay decay) {
  hyper.weight_decay = decay == Decay::kNone ? 0 : 0.03;
  hyper.decoupled_weight_decay = decay == Decay::kDecoupled;
}

template <class Variant>
constexpr bool has_caution = false;
template <class Plain, int kNumPlain>
constexpr bool has_caution<CautiousVariant<Plain, kNumPlain>> = true;

void set_caution(HyperParams& hyper, Caution caution) {
  hyper.cautious_update = caution.in_updates;
  hyper.cautious_weight_decay = caution.in_decay;
}

// Hyper-parameters that lead to this variant.
HyperParams hyper_for(Sgd::Variant variant) {
  HyperParams hyper;
  hyper.momentum = variant.momentum == Sgd::Momentum::kNone ? 0 : 0.9;
  hyper.nesterov = variant.momentum == Sgd::Momentum::kNesterov;
  hyper.dampening = 0.25;
  set_decay(hyper, variant.decay);
  return hyper;
}

HyperParams hyper_for(Adam::Variant variant) {
  HyperParams hyper;
  hyper.beta1 = variant.averages_grads ? 0.9 : 0;
  hyper.beta2 = 0.99;
  hyper.eps = 1e-3;
  hyper.amsgrad = variant.amsgrad;
  set_decay(hyper, variant.decay);
  return hyper;
}

HyperParams hyper_for(OtherRules::Variant variant) {
  HyperParams hyper;
  hyper.beta1 = 0.9;
  hyper.beta2 = 0.99;
  hyper.eps = 1e-3;
  hyper.alpha = 0.75;
  hyper.rho = 0.9;
  hyper.lr_decay = 0.01;
  hyper.momentum_decay = 0.004;
  hyper.lambd = 0.02;
  hyper.t0 = 3;
  hyper.eta_minus = 0.5;
  hyper.eta_plus = 1.2;
  hyper.smallest_step = 0.05;
  hyper.largest_step = 0.17;
  variant.with_rule([&](auto rule, [[maybe_unused]] auto own) {
    using Rule = decltype(rule);
    if constexpr (std::is_same_v<Rule, CautiousAdam>)
      hyper = hyper_for(static_cast<const Adam::Variant&>(own));
    if constexpr (std::is_same_v<Rule, CautiousSgd>)
      hyper = hyper_for(static_cast<const Sgd::Variant&>(own));
    hyper.member = kMemberOf<Rule>;
    if constexpr (!std::is_same_v<typename Rule::Variant, OnlyVariant>) set_decay(hyper, own.decay);
    if constexpr (has_caution<typename Rule::Variant>) set_caution(hyper, own.caution);
    if constexpr (std::is_same_v<Rule, Rmsprop>) {
      hyper.momentum = own.has_momentum ? 0.9 : 0;
      hyper.centered = own.centered;
    }
  });
  return hyper;
}

// Numbers that need care: zeros, subnormal ones, infinities, NaN, the largest and the smallest.
double any_special(std::mt19937& random) {
  using Float = std::numeric_limits<float>;
  using Double = std::numeric_limits<double>;
  const double values[] = {0,
                           Float::denorm_min(),
                           1e-40,
                           Float::min(),
                           1e-30,
                           5e-8,
                           6.2e-5,
                           1,
                           65504,
                           65520,
                           1e19,
                           Float::max(),
                           Double::max(),
                           Double::infinity(),
                           Double::quiet_NaN(),
                           Double::denorm_min(),
                           1e-300};
  const double value = values[random() % (sizeof(values) / sizeof(values[0]))];
  return random() % 2 == 0 ? value : -value;
}

std::vector<Problem> make_problems() {
  std::vector<Problem> problems;
  for (int id = 0; id < Rules::kSize; ++id)
    with_rule(static_cast<RuleId>(id), [&](auto rule) {
      using Rule = decltype(rule);
      for (int number = 0; number < Rule::kNumVariants; ++number) {
        const auto variant = Rule::Variant::of(number);
        const HyperParams hyper = hyper_for(variant);
        CHECK(Rule::variant(hyper).number() == number);
        Problem problem = make_problem(static_cast<RuleId>(id), number, hyper);
        problem.dtypes[kParam] = problem.dtypes[kGrad] = DType::kFloat32;
        for (int s = 0; s < Rule::kNumStates; ++s)
          if (variant.uses(s))
            problem.dtypes[static_cast<size_t>(kFirstState + s)] = DType::kFloat32;
        problems.push_back(problem);
      }
    });
  return problems;
}

}  // namespace

bool Buffer::operator==(const Buffer& other) const {
  if (bytes_ == other.bytes_) return true;
  if (dtype_ != other.dtype_ || bytes_.size() != other.bytes_.size()) return false;
  const int64_t item = item_size(dtype_);
  const auto elements = static_cast<int64_t>(bytes_.size()) / item;
  for (int64_t i = 0; i < elements; ++i) {
    const bool same =
        std::memcmp(&bytes_[static_cast<size_t>(i * item)],
                    &other.bytes_[static_cast<size_t>(i * item)], static_cast<size_t>(item)) == 0;
    const bool both_nan = !is_remainder() && std::isnan(get<double>(i - first_)) &&
                          std::isnan(other.get<double>(i - other.first_));
    if (!same && !both_nan) return false;
  }
  return true;
}

const std::vector<Problem>& problems_of(int kind) {
  static const std::vector<std::vector<Problem>> kProblems = [] {
    std::vector<std::vector<Problem>> problems(kNumKinds);
    for (const Problem& problem : all_problems())
      problems[static_cast<size_t>(kind_of(problem))].push_back(problem);
    return problems;
  }();
  return kProblems[static_cast<size_t>(kind)];
}

const std::vector<Problem>& all_problems() {
  static const std::vector<Problem> kProblems = make_problems();
  return kProblems;
}

const std::vector<Problem>& main_problems() {
  static const std::vector<Problem> kProblems = [] {
    std::vector<Problem> problems;
    for (int kind = 0; kind < kNumKinds; ++kind) {
      const std::vector<Problem>& all = problems_of(kind);
      problems.insert(problems.end(), kind < kIdOf<OtherRules> ? all.begin() : all.end() - 1,
                      all.end());
    }
    return problems;
  }();
  return kProblems;
}

Problem in_format(Problem problem, DType dtype) {
  for (int k = 0; k < kMaster; ++k)
    if (problem.has(k)) problem.dtypes[static_cast<size_t>(k)] = dtype;
  return problem;
}

Problem rounded_stochastically(Problem problem, unsigned operands) {
  problem.stochastic = 0;
  for (int k = 0; k < kMaster; ++k) {
    const bool can_be = problem.dtypes[static_cast<size_t>(k)] == DType::kBFloat16 && k != kGrad &&
                        (k != kParam || !problem.has(kMaster));
    if (can_be) problem.stochastic |= operands & (1u << k);
  }
  if (master_of(problem.dtypes[kMaster]) == Master::kSplit8)
    problem.stochastic |= operands & (1u << kMaster);
  return problem;
}

Problem in_any_formats(Problem problem, std::mt19937& random) {
  const auto any = [&] { return kAllDTypes[random() % 4]; };
  const DType common = any();
  const bool is_uniform = random() % 2 == 0;
  for (int k = 0; k < kMaster; ++k)
    if (problem.has(k)) problem.dtypes[static_cast<size_t>(k)] = is_uniform ? common : any();
  problem.dtypes[kMaster] = DType::kAbsent;
  const DType param = problem.dtypes[kParam];
  constexpr DType kMasters[] = {DType::kFloat32, DType::kRemainder, DType::kRemainder8};
  if (item_size(param) == 2 && random() % 2 == 0)
    problem.dtypes[kMaster] = kMasters[param == DType::kBFloat16 ? random() % 3 : 0];
  problem.dtypes[kEma] = random() % 2 == 0 ? any() : DType::kAbsent;
  // A part of a tensor, which may begin before or after a change of the draws' key.
  constexpr int64_t kFirst[] = {0, 2, kMaxDrawBlock, (int64_t{2} << 32) - kMaxDrawBlock,
                                int64_t{3} << 40};
  problem.first_number = kFirst[problem.numel % 5];
  return rounded_stochastically(problem, random() % 2 == 0 ? static_cast<unsigned>(random()) : 0u);
}

Problem with_dims(Problem problem, const Dims& dims) {
  problem.dims = dims;
  problem.numel = 1;
  for (const Dim& dim : dims) problem.numel *= dim.size;
  return problem;
}

const std::vector<Dims>& strided_layouts() {
  static_assert(kMaxOperands == 7, "param, grad, three states, master, average");
  static const std::vector<Dims> kLayouts = {
      // Column slices.
      {{7, {400, 300, 300, 301, 300, 302, 400, 300}}, {300, {1, 1, 1, 1, 1, 1, 1, 1}}},
      // Transposed grads, states and averages.
      {{37, {41, 1, 1, 41, 2, 41, 1, 41}}, {41, {1, 37, 37, 1, 80, 1, 37, 1}}},
      {{5, {500, 0, 100, 100, 100, 100, 100, 100}},
       {10, {40, 0, 10, 10, 10, 10, 10, 10}},
       {10, {3, 1, 1, 1, 1, 1, 1, 1}}},
      {{1500, {2, 1, 1, 1, 1, 1, 1, 1}}},  // every second
      {{1500, {2, 3, 4, 5, 6, 7, 8, 3}}},
      // Element numbers beyond 32 and 33 bits.
      {{3, {500, 500, 500, 500, 500, 500, 500, int64_t{3} << 32}}, {499, {1, 1, 1, 1, 1, 1, 1, 1}}},
  };
  return kLayouts;
}

Scalars scalars_at(const Problem& problem, StepInfo info, double grad_scale) {
  Scalars scalars = {};
  with_rule(problem.rule, [&](auto rule) {
    using Rule = decltype(rule);
    scalars.set<Rule>(step_scalars<Rule>(problem.hyper, info, {grad_scale, 0}));
  });
  return scalars;
}

std::vector<Buffer> make_buffers(const Problem& problem, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<Buffer> buffers;
  for (int k = 0; k < kMaxOperands; ++k) {
    const auto place = static_cast<size_t>(k);
    const int64_t elements = problem.dims.empty() ? problem.numel : extent(problem.dims, k);
    buffers.emplace_back(problem.dtypes[place], problem.has(k) ? elements : 0, random,
                         problem.guard, problem.shifts[place]);
    for (int64_t i = 0; k == kGrad && i < elements; ++i)
      if (random() % 2 == 0) buffers.back().set(i, -buffers.back().get<double>(i));
  }
  return buffers;
}

void put_special_values(const Problem& problem, std::vector<Buffer>& buffers, uint32_t among,
                        std::mt19937& random) {
  for (int k = 0; k < kMaxOperands; ++k)
    for (int64_t i = 0; i < problem.numel && problem.has(k); ++i) {
      const auto place = static_cast<size_t>(k);
      if (!is_split(master_of(problem.dtypes[place])) && random() % among == 0)
        buffers[place].set(offset_of(problem, i, k), any_special(random));
    }
}

int64_t offset_of(const Problem& problem, int64_t i, int operand) {
  if (problem.dims.empty()) return i;
  int64_t at = 0;
  for (auto dim = problem.dims.rbegin(); dim != problem.dims.rend(); ++dim) {
    at += i % dim->size * dim->strides[operand];
    i /= dim->size;
  }
  return at;
}

void update_one_by_one(const Problem& problem, std::vector<Buffer>& buffers) {
  const bool in_double =
      std::count(problem.dtypes.begin(), problem.dtypes.end(), DType::kFloat64) > 0;
  const FlushMode mode(!in_double);
  with_rule(problem.rule, [&](auto rule) {
    using Rule = decltype(rule);
    if (in_double)
      update_elements<Rule, double>(problem, buffers);
    else
      update_elements<Rule, float>(problem, buffers);
  });
}

ParamUpdate make_update(const Problem& problem, std::vector<Buffer>& buffers) {
  ParamUpdate update = {};
  for (size_t k = 0; k < buffers.size(); ++k) {
    update.data[k] = buffers[k].data();
    update.formats.dtypes[k] = buffers[k].dtype();
  }
  update.formats.stochastic = static_cast<uint8_t>(problem.stochastic);
  update.numel = problem.numel;
  update.first_element = problem.first_number;
  update.layout = problem.dims.empty() ? kDense : 0;
  update.rule = problem.rule;
  update.variant = static_cast<uint8_t>(problem.variant);
  update.device = kCpu;
  return update;
}
