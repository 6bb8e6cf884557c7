#include "cpu/prompt_conv2d.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <numeric>

#include "arithmetic.h"
#include "checks.h"
#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/planes.h"
#include "cpu/prompt_conv2d_taps.h"
#include "cpu/sparse_conv2d.h"

namespace vpns {
namespace {

struct Kernel {
  const char* name;
  Isa isa;
  bool emulated;
  int64_t lanes;
  bool pairs;  // takes bf16 only
  PromptSteps (*steps)();
};

// In the order in which they are preferred.
const std::vector<Kernel>& kernels() {
  static const std::vector<Kernel> table = {
#if defined(VPNS_WITH_AVX512_BF16)
      {"avx512_bf16", Isa::kAvx512Bf16, false, 16, true, run_prompt_steps_avx512_bf16},
#endif
#if defined(VPNS_WITH_AVX512)
      {"avx512", Isa::kAvx512, false, 16, false, run_prompt_steps_avx512},
#endif
#if defined(VPNS_WITH_AVX2)
      {"avx2", Isa::kAvx2, false, 8, false, run_prompt_steps_avx2},
      {"avx512_bf16_emulated", Isa::kAvx2, true, 16, true, run_prompt_steps_avx512_bf16_emulated},
      {"avx512_emulated", Isa::kAvx2, true, 16, false, run_prompt_steps_avx512_emulated},
#endif
  };
  return table;
}

const Kernel& choose(const std::string& name, DType dtype) {
  for (const Kernel& kernel : kernels())
    if ((name.empty() ? !kernel.emulated : name == kernel.name) && isa_usable(kernel.isa) &&
        (!kernel.pairs || dtype == DType::kBF16))
      return kernel;
  fail("prompt_conv2d", "a kernel that runs here and gives this type (bf16 or float)",
       name.empty() ? "a CPU without AVX2, or a cap below it" : "'" + name + "'");
}

void check_sizes(const ConvShape& s, const PromptedImages& images) {
  const char* me = "prompt_conv2d";
  check(s.C == 3 && s.groups == 1, me, "3 channels without groups", s.C);
  check(s.H == images.H && s.W == images.W, me, "a canvas of the shape's size", images.H);
  check(images.frame >= 0 && 2 * images.frame < std::min(s.H, s.W), me, "a frame that leaves room for the image",
        images.frame);
  check((s.P - 1) * s.stride_h + (s.R - 1) * s.dilation_h < s.H + 2 * s.pad_h &&
            (s.Q - 1) * s.stride_w + (s.S - 1) * s.dilation_w < s.W + 2 * s.pad_w,
        me, "outputs within the padded canvas", s.P);
}

// Outputs that may see the image, and outputs that see nothing but it and the zeros around the canvas.
OutputArea that_see_the_image(const ConvShape& s, int64_t frame) {
  const auto axis = [frame](int64_t extent, int64_t outputs, int64_t taps, int64_t stride, int64_t pad,
                            int64_t dilation) {
    const int64_t before = frame + pad - (taps - 1) * dilation;
    const int64_t begin = before <= 0 ? 0 : std::min(ceil_div(before, stride), outputs);
    return std::pair{begin, std::clamp(ceil_div(extent - frame + pad, stride), begin, outputs)};
  };
  const auto [p0, p1] = axis(s.H, s.P, s.R, s.stride_h, s.pad_h, s.dilation_h);
  const auto [q0, q1] = axis(s.W, s.Q, s.S, s.stride_w, s.pad_w, s.dilation_w);
  return {p0, p1, q0, q1};
}

OutputArea that_do_not_see_the_frame(const ConvShape& s, int64_t frame) {
  const auto axis = [frame](int64_t extent, int64_t outputs, int64_t taps, int64_t stride, int64_t pad,
                            int64_t dilation) {
    const int64_t begin = frame == 0 ? 0 : std::min(ceil_div(frame + pad, stride), outputs);
    const int64_t last = extent - frame - 1 + pad - (taps - 1) * dilation;
    return std::pair{begin, frame == 0 ? outputs : std::clamp(last < 0 ? 0 : last / stride + 1, begin, outputs)};
  };
  const auto [p0, p1] = axis(s.H, s.P, s.R, s.stride_h, s.pad_h, s.dilation_h);
  const auto [q0, q1] = axis(s.W, s.Q, s.S, s.stride_w, s.pad_w, s.dilation_w);
  return {p0, p1, q0, q1};
}

// An area of the outputs of `images` images, from that image on, as a convolution of its own.
void run_area(const PromptForward& f, const Kernel& kernel, const OutputArea& area, int64_t first, int64_t images) {
  ConvShape s = f.shape;
  s.N = images;
  s.P = area.p1 - area.p0;
  s.Q = area.q1 - area.q0;
  s.pad_h -= area.p0 * s.stride_h;
  s.pad_w -= area.q0 * s.stride_w;
  const TapBlocks blocks = tap_blocks(s, f.weight, f.weight_dtype, 2 * kernel.lanes);
  const BlockPlan plan = make_block_plan(s, blocks.view(), kernel.lanes, kernel.pairs);
  PromptedImages source = f.images;
  source.image = static_cast<const char*>(source.image) + first * source.stride_n * (source.is_uint8 ? 1 : 4);
  ConvCall call = f.call;
  call.y_stride_n = f.shape.P * f.shape.Q * s.K;
  call.y_stride_h = f.shape.Q * s.K;
  call.y_stride_w = s.K;
  const int64_t at = first * call.y_stride_n + area.p0 * call.y_stride_h + area.q0 * call.y_stride_w;
  call.y = static_cast<char*>(call.y) + at * bytes_of(call.y_dtype);
  kernel.steps().forward(plan, source, call);
}

// Outputs outside `area`, from the first image to all others.
void copy_around(const PromptForward& f, const OutputArea& area) {
  const ConvShape& s = f.shape;
  const int64_t pixel = s.K * bytes_of(f.call.y_dtype);
  char* const y = static_cast<char*>(f.call.y);
#pragma omp parallel for num_threads(f.call.threads) collapse(2) schedule(static)
  for (int64_t n = 1; n < s.N; ++n)
    for (int64_t p = 0; p < s.P; ++p) {
      const auto copy = [&](int64_t q0, int64_t q1) {
        std::memcpy(y + ((n * s.P + p) * s.Q + q0) * pixel, y + (p * s.Q + q0) * pixel, (q1 - q0) * pixel);
      };
      const bool passes = p >= area.p0 && p < area.p1;
      copy(0, passes ? area.q0 : s.Q);
      if (passes) copy(area.q1, s.Q);
    }
}

void run_frame_gradient(const PromptBackward& b, const Kernel& kernel, const float* total) {
  const ConvShape& s = b.shape;
  const TapsOfAxis rows = taps_of_axis(s.H, s.P, s.R, s.stride_h, s.pad_h, s.dilation_h);
  // The sum over the batch is not rounded to bf16.
  const bool sums_first = b.images.is_framed(), has_pairs = kernel.pairs && !sums_first;
  std::vector<int64_t> order(s.R), places(s.R);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&s](int64_t a, int64_t b) {
    return a * s.dilation_h % s.stride_h < b * s.dilation_h % s.stride_h;
  });
  for (int64_t place = 0; place < s.R; ++place) places[order[place]] = place;
  const bool is_run = s.dilation_w == 1;
  const int64_t floats = 2 * kernel.lanes, run_floats = is_run ? 3 * s.S : 3;
  FrameGradient step{b,
                     sums_first ? total : b.grad,
                     sums_first ? 1 : s.N,
                     rows,
                     places,
                     has_pairs,
                     ceil_div(s.K, has_pairs ? 2 : 1),
                     is_run ? 1 : s.S,
                     run_floats,
                     ceil_div(run_floats, floats),
                     nullptr};
  std::vector<uint32_t> weight(step.runs * step.parts * s.R * step.words * floats, 0);
  for (int64_t k = 0; k < s.K; ++k)
    for (int64_t r = 0; r < s.R; ++r)
      for (int64_t i = 0; i < 3 * s.S; ++i) {
        const int64_t run = i / run_floats, in_run = i % run_floats;
        const int64_t row = ((run * step.parts + in_run / floats) * s.R + places[r]) * step.words;
        const float value = b.weight[(k * 3 + i % 3) * s.R * s.S + r * s.S + i / 3];
        uint32_t& word = weight[(row + (has_pairs ? k / 2 : k)) * floats + in_run % floats];
        if (has_pairs) word |= static_cast<uint32_t>(float_to_bf16(value)) << (k % 2 * 16);
        else word = std::bit_cast<uint32_t>(value);
      }
  step.weight = weight.data();
  kernel.steps().frame_gradient(step);
}

// Output pixels of a tile, whose gradient and canvas then stay in the second-level cache.
constexpr int64_t kTilePixels = 512;
// Shares of the tiles: they depend on the sizes alone, as does the order in which their sums are added up.
constexpr int64_t kChunks = 32;

void add_tiles(std::vector<GradientTile>& tiles, int64_t n, const OutputArea& area) {
  if (area.is_empty()) return;
  const int64_t tile_q = even_tile(area.q1 - area.q0, kTilePixels);
  const int64_t tile_p = even_tile(area.p1 - area.p0, std::max<int64_t>(kTilePixels / tile_q, 1));
  for (int64_t p = area.p0; p < area.p1; p += tile_p)
    for (int64_t q = area.q0; q < area.q1; q += tile_q)
      tiles.push_back({n, {p, std::min(p + tile_p, area.p1), q, std::min(q + tile_q, area.q1)}});
}

void run_weight_gradient(const PromptBackward& b, const Kernel& kernel, const OutputArea& varies, const float* total) {
  const ConvShape& s = b.shape;
  std::vector<GradientTile> tiles;
  for (int64_t n = 0; n < s.N; ++n) add_tiles(tiles, n, varies);
  if (total != nullptr) {
    add_tiles(tiles, -1, {0, varies.p0, 0, s.Q});
    add_tiles(tiles, -1, {varies.p1, s.P, 0, s.Q});
    add_tiles(tiles, -1, {varies.p0, varies.p1, 0, varies.q0});
    add_tiles(tiles, -1, {varies.p0, varies.p1, varies.q1, s.Q});
  }
  const int64_t lanes = kernel.lanes, taps = s.R * s.S, strip = taps * 3 * 2 * lanes;
  WeightGradient step{b,
                      total,
                      make_block_axis(s.R, s.stride_h, s.dilation_h),
                      make_block_axis(s.S, s.stride_w, s.dilation_w),
                      tiles,
                      std::min<int64_t>(static_cast<int64_t>(tiles.size()), kChunks),
                      ceil_div(s.K, 2 * lanes) * strip,
                      nullptr,
                      0,
                      0};
  for (const GradientTile& tile : tiles) {
    const int64_t p = tile.area.p1 - tile.area.p0, q = tile.area.q1 - tile.area.q0;
    step.planes = std::max(step.planes, step.h.extent(p) * step.w.extent(q) * 3);
    step.pixels = std::max(step.pixels, p * q);
  }
  const auto sums = std::make_unique_for_overwrite<float[]>(step.chunks * step.chunk_floats);
  step.sums = sums.get();
  kernel.steps().weight_gradient(step);
  for (int64_t k = 0; k < s.K; ++k) {
    const int64_t in_strip = k % (2 * lanes);
    const int64_t width = s.K - (k - in_strip) > lanes ? 2 * lanes : lanes;
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t c = 0; c < 3; ++c) {
        const float* from = sums.get() + k / (2 * lanes) * strip + (tap * 3 + c) * width + in_strip;
        double sum = 0;
        for (int64_t chunk = 0; chunk < step.chunks; ++chunk) sum += from[chunk * step.chunk_floats];
        b.grad_weight[(k * 3 + c) * taps + tap] = static_cast<float>(sum);
      }
  }
}

void run_bias_gradient(const PromptBackward& b, const float* total) {
  const ConvShape& s = b.shape;
  std::vector<double> sums(s.K, 0.0);
  for (int64_t pixel = 0; pixel < s.P * s.Q; ++pixel)
    for (int64_t k = 0; k < s.K; ++k) sums[k] += total[pixel * s.K + k];
  for (int64_t k = 0; k < s.K; ++k) b.grad_bias[k] = static_cast<float>(sums[k]);
}

}  // namespace

std::vector<std::string> prompt_conv2d_kernels(bool emulated) {
  std::vector<std::string> names;
  for (const Kernel& kernel : kernels())
    if (isa_usable(kernel.isa) && (emulated || !kernel.emulated)) names.emplace_back(kernel.name);
  return names;
}

void prompt_conv2d(const PromptForward& f, const std::string& kernel_name) {
  const ConvShape& s = f.shape;
  check_sizes(s, f.images);
  const Kernel& kernel = choose(kernel_name, f.call.y_dtype);
  prefer_huge_pages(f.call.y, s.N * s.P * s.Q * s.K * bytes_of(f.call.y_dtype));
  const OutputArea all{0, s.P, 0, s.Q};
  const OutputArea varies = f.images.is_framed() ? that_see_the_image(s, f.images.frame) : all;
  const bool has_constants = s.N > 1 && (varies.p1 - varies.p0) * (varies.q1 - varies.q0) < s.P * s.Q;
  if (!has_constants) return run_area(f, kernel, all, 0, s.N);
  run_area(f, kernel, all, 0, 1);
  if (!varies.is_empty()) run_area(f, kernel, varies, 1, s.N - 1);
  copy_around(f, varies);
}

void prompt_conv2d_backward(const PromptBackward& b, const std::string& kernel_name) {
  const ConvShape& s = b.shape;
  check_sizes(s, b.images);
  const Kernel& kernel = choose(kernel_name, b.grad_dtype);
  const OutputArea all{0, s.P, 0, s.Q}, none{0, 0, 0, 0};
  const bool is_framed = b.images.is_framed();
  const OutputArea varies = is_framed ? that_see_the_image(s, b.images.frame) : all;
  const bool has_constants = (varies.p1 - varies.p0) * (varies.q1 - varies.q0) < s.P * s.Q;
  std::unique_ptr<float[]> total;
  const bool sums_for_frame = is_framed && b.grad_canvas != nullptr;
  if (b.grad_bias != nullptr || sums_for_frame || (has_constants && b.grad_weight != nullptr)) {
    total = std::make_unique_for_overwrite<float[]>(s.P * s.Q * s.K);
    kernel.steps().sum_images(b, b.grad_bias != nullptr ? none : that_do_not_see_the_frame(s, b.images.frame),
                              total.get());
  }
  if (b.grad_canvas != nullptr) run_frame_gradient(b, kernel, total.get());
  if (b.grad_weight != nullptr) run_weight_gradient(b, kernel, varies, has_constants ? total.get() : nullptr);
  if (b.grad_bias != nullptr) run_bias_gradient(b, total.get());
}

}  // namespace vpns
