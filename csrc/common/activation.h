// What a linear layer may apply to its result.
#pragma once

namespace fastattn {

enum class Activation : int { kNone, kRelu, kGelu, kGeluTanh, kSilu };

}  // namespace fastattn
