// Which updates take the kernel of a usual step (cuda/usual.h): no result depends on it.
#include "check.h"

#include "cuda/launch.h"
#include "cuda/stage.h"
#include "cuda/usual.h"

using namespace fusedopt;
using namespace fusedopt::cuda;

namespace {

constexpr Adam::Variant kAdamW = {Decay::kDecoupled, false, true};

ParamUpdate update_of(const Formats& formats) {
  ParamUpdate update = {};
  update.rule = kIdOf<Adam>;
  update.layout = kDense;
  update.formats = formats;
  update.variant = static_cast<uint8_t>(kAdamW.number());
  return update;
}

// The kernel for all formats.
bool is_for_all(KernelKind kind, const Formats& formats) {
  return kind == (formats.has_codes() ? kCodesKernel : kPlainKernel);
}

void test_what_is_near(const Formats& formats) {
  const ParamUpdate usual = update_of(formats);
  CHECK(is_for_all(kernel_kind<Adam>(usual, only(kGrad)), formats));
  CHECK(is_for_all(kernel_kind<Sgd>(usual, 0), formats));
  CHECK(is_for_all(kernel_kind<OtherRules>(usual, 0), formats));

  ParamUpdate other = usual;
  other.layout = 0;
  CHECK(is_for_all(kernel_kind<Adam>(other, 0), formats));
  other = usual;
  other.formats.dtypes[kFirstState + Adam::kMaxExpAvgSq] = DType::kFloat32;
  CHECK(is_for_all(kernel_kind<Adam>(other, 0), other.formats));
  other = usual;
  other.formats.dtypes[kFirstState + Adam::kExpAvg] = DType::kAbsent;  // beta1 is 0
  CHECK(is_for_all(kernel_kind<Adam>(other, 0), other.formats));
  other = usual;
  other.formats.stochastic ^= 1 << kMaster;
  CHECK(is_for_all(kernel_kind<Adam>(other, 0), formats) == formats.has_codes());
}

template <int kNumber>
void test_step() {
  using Step = UsualStep<Adam, kNumber>;
  const Formats formats = Usual<Adam>::formats_of(kNumber);
  CHECK(bit_cast<uint64_t>(Step::formats()) == bit_cast<uint64_t>(formats));
  CHECK(Step::kHasCodes == formats.has_codes());
  CHECK(kernel_kind<Adam>(update_of(formats), 0) == kUsualKernel + kNumber);
  for (const Decay decay : {Decay::kNone, Decay::kL2}) {  // so groups need not be launched apart
    ParamUpdate other = update_of(formats);
    other.variant = static_cast<uint8_t>(Adam::Variant{decay, false, true}.number());
    CHECK(launch_key_of(other) == launch_key_of(update_of(formats)));
  }
  CHECK(launch_key_of(update_of(formats)).kind == kUsualKernel + kNumber);
  test_what_is_near(formats);

  Formats asked = formats;
  asked.stochastic = 1 << kParam;
  const uint8_t drawn = formats_of_step<Step>(asked).stochastic;
  const bool has_nothing_to_draw_for = kNumber == 1 || kNumber == 4;  // fp16, and float32 masters
  const uint8_t expected = has_nothing_to_draw_for ? 0 : asked.stochastic;
  CHECK(drawn == (Step::kHasCodes ? formats.stochastic : expected));
  bool is_visited = false;
  with_usual_step<Adam>(kNumber,
                        [&](auto step) { is_visited = decltype(step)::kNumber == kNumber; });
  CHECK(is_visited);
  if constexpr (kNumber + 1 < Usual<Adam>::kCount) test_step<kNumber + 1>();
}

}  // namespace

void test_usual() {
  test_step<0>();
  with_usual_step<Adam>(Usual<Adam>::kCount, [&](auto) { CHECK(false); });
}
