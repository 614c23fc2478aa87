#pragma once

namespace iirsnn {

// What backward sums over neurons and time: the gradients of threshold and leak; of a current that is normalised, its
// gradient and that times x - mean as well.
enum LifSum { kThresholdSum, kLeakSum, kGradSum, kDotSum };
template <bool kNormalised>
constexpr int kSums = kNormalised ? 4 : 2;

}  // namespace iirsnn
