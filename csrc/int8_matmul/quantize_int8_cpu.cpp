// quantize_int8: one fp32 scale per row, see quantize_int8_cpu.h.
// Work: a thread takes a range of rows. Memory: a row is read twice; the second time from cache.
#include "int8_matmul/quantize_int8_cpu.h"

#include "common/parallel.h"
#include "int8_matmul/int8_matmul.h"

namespace fastattn {
namespace FASTATTN_ISA {

void quantize_int8_cpu(const QuantizeInt8Params& p) {
  // Below 32 Ki elements a second thread costs more than it saves.
  const int64_t grain = 32768 / max_of<int64_t>(p.depth, 1) + 1;
  dispatch_element(p.dtype, [&](auto element) {
    using Element = decltype(element);
    const Element* input = static_cast<const Element*>(p.input);
    parallel_ranges(p.rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        p.scale[row] = quantize_row(input + row * p.stride_input, p.depth, p.q + row * p.stride_q);
      }
    });
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
