// The packed weight as the torch glue knows it.
#pragma once

#include <ATen/core/Tensor.h>

#include "int8_matmul/int8_matmul.h"

namespace fastattn {

// Whether `packed` was made by int8_pack_weight of `weight` as it is now. False where nothing could tell.
bool is_packed_form_of(const at::Tensor& packed, const at::Tensor& weight);

}  // namespace fastattn
