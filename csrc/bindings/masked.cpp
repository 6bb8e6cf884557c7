#include "cpu/masked_weight.h"

#include <pybind11/stl.h>

#include "bindings/convert.h"
#include "cpu/channel_mask.h"
#include "cpu/weight_gradient.h"

namespace py = pybind11;

namespace vpns {

// Strides of the output channel, the input channel and the tap; sizes of a unit's block.
static MaskedWeight masked_weight(uintptr_t weight, const std::vector<int64_t>& strides, uintptr_t mask,
                                  const std::vector<int64_t>& block) {
  check(strides.size() == 3 && block.size() == 2, "MaskedWeight", "3 strides and 2 sizes of a block", strides.size());
  return {pointer<const float>(weight), strides[0], strides[1], strides[2], pointer<const uint8_t>(mask),
          block[0],                     block[1]};
}

void bind_masked(py::module_& m) {
  py::class_<MaskedWeight>(m, "MaskedWeight")
      .def(py::init(&masked_weight), py::arg("weight"), py::arg("strides"), py::arg("mask"), py::arg("block"));

  m.def(
      "masked_conv2d_prepare",
      [](const std::vector<int64_t>& sizes, const MaskedWeight& w, const std::string& x_type, bool is_input_gradient,
         const std::string& kernel, int threads) {
        const ConvShape s = shape(sizes);
        const DType type = dtype(x_type);
        py::gil_scoped_release release;
        check_masked_weight(s, w);
        return is_input_gradient ? prepare_masked_input_gradient(s, w, type, kernel, threads)
                                 : prepare_masked(s, w, type, kernel, threads);
      },
      py::arg("shape"), py::arg("weight"), py::arg("x_dtype"), py::arg("is_input_gradient"), py::arg("kernel"),
      py::arg("threads"),
      "Packs the kept weights and prepares them; the input gradient runs on the output's gradient.");

  m.def(
      "masked_conv2d_score_gradient",
      [](const std::vector<int64_t>& sizes, const MaskedWeight& w, uintptr_t x, const std::string& type,
         int64_t stride_n, int64_t stride_h, int64_t stride_w, uintptr_t grad, uintptr_t scores, uintptr_t out,
         const std::string& kernel, int threads) {
        const ConvShape s = shape(sizes);
        const WeightGradCall call{pointer<const void>(x),    dtype(type),         stride_n, stride_h, stride_w,
                                  pointer<const void>(grad), pointer<float>(out), threads,  &w,
                                  pointer<const float>(scores)};
        py::gil_scoped_release release;
        check_masked_weight(s, w);
        score_gradient(s, call, kernel);
      },
      py::arg("shape"), py::arg("weight"), py::arg("x"), py::arg("dtype"), py::arg("stride_n"), py::arg("stride_h"),
      py::arg("stride_w"), py::arg("grad"), py::arg("scores"), py::arg("out"), py::arg("kernel"), py::arg("threads"),
      "The sum of weight times its gradient over each block, masked or not; with scores (else 0), their sign times the "
      "weight times its gradient, weight by weight.");

  m.def(
      "channel_mask",
      [](const std::string& type, uintptr_t x, uintptr_t y, int64_t pixels, int64_t channels, uintptr_t mask,
         int threads) {
        const ChannelMaskForward call{dtype(type), pointer<const void>(x),      pointer<void>(y), pixels,
                                      channels,    pointer<const float>(mask), threads};
        py::gil_scoped_release release;
        channel_mask(call);
      },
      py::arg("dtype"), py::arg("x"), py::arg("y"), py::arg("pixels"), py::arg("channels"), py::arg("mask"),
      py::arg("threads"));

  m.def(
      "channel_mask_backward",
      [](const std::string& type, uintptr_t grad, uintptr_t x, uintptr_t grad_x, int64_t pixels, int64_t channels,
         uintptr_t mask, uintptr_t sums, int threads) {
        const ChannelMaskBackward call{dtype(type), pointer<const void>(grad),  pointer<const void>(x),
                                       pointer<void>(grad_x), pixels, channels, pointer<const float>(mask),
                                       pointer<float>(sums),  threads};
        py::gil_scoped_release release;
        channel_mask_backward(call);
      },
      py::arg("dtype"), py::arg("grad"), py::arg("x"), py::arg("grad_x"), py::arg("pixels"), py::arg("channels"),
      py::arg("mask"), py::arg("sums"), py::arg("threads"), "grad_x and sums may each be 0: not wanted.");
}

}  // namespace vpns
