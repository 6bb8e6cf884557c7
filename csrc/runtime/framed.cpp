#include "runtime/framed.h"

#include <algorithm>
#include <cstring>

#include "arithmetic.h"

namespace vpns {

SeenSpan seen_span(int64_t in, int64_t out, int64_t window, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t before = pad - dilation * (window - 1);  // the first output that sees input starts here or later
  const int64_t begin = std::min(before > 0 ? ceil_div(before, stride) : 0, pad / stride);
  return {begin, std::min(out, (pad + in - 1) / stride + 1)};
}

void run_framed(const PlanStep& step, const PlanValue& out, const ConvCall& call, const PreparedConv& conv,
                int64_t images) {
  const ConvShape& s = step.shape;
  const int64_t item = bytes_of(out.dtype), row = out.width * out.channels;
  const char* const constant = static_cast<const char*>(step.constant);
  const int64_t first = (step.first_p * out.width + step.first_q) * out.channels;
  const auto copy = [&](char* y, int64_t from, int64_t count) {
    std::memcpy(y + from * item, constant + from * item, count * item);
  };
  for (int64_t n = 0; n < images; ++n) {
    char* const y = static_cast<char*>(call.y) + n * out.elements() * item;
    const int64_t end_p = step.first_p + s.P, left = step.first_q * out.channels, right = left + s.Q * out.channels;
    copy(y, 0, step.first_p * row);
    copy(y, end_p * row, (out.height - end_p) * row);
    for (int64_t p = step.first_p; p < end_p; ++p) {
      copy(y, p * row, left);
      copy(y, p * row + right, row - right);
    }
    ConvCall one = call;
    one.x = static_cast<const char*>(call.x) + n * call.x_stride_n * bytes_of(call.x_dtype);
    one.y = y + first * item;
    one.residual = constant + first * item;
    one.images = 1;
    conv.run(one);
  }
}

}  // namespace vpns
