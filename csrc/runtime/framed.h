// A convolution of images with something constant around them: what sees nothing else is not computed.
//
// conv(pad(x) + constant) = conv(pad(x)) + conv(constant), and the second term is the same for all images. Outputs that
// see the images are computed with that term as their residual; the others are copied.
#pragma once

#include "cpu/kernels.h"
#include "runtime/plan.h"

namespace vpns {

// Outputs [begin, end) of one axis that see any input, begin so that the padding before them stays at least 0.
struct SeenSpan {
  int64_t begin, end;
};
SeenSpan seen_span(int64_t in, int64_t out, int64_t window, int64_t stride, int64_t pad, int64_t dilation);

// All of a step that has a constant; `call` is that of all its images, `conv` made for one.
void run_framed(const PlanStep& step, const PlanValue& out, const ConvCall& call, const PreparedConv& conv,
                int64_t images);

}  // namespace vpns
