// The first layer of a network behind a visual prompt: canvas, normalisation and convolution in one kernel.
//
// No prompted image is ever in memory: rows of the canvas are composed where the planes of sparse_conv2d_block.h are
// laid out, from which the block family's loops compute the layer, but for taps that a mask emptied.
//
// A framed canvas has the image inside and the same frame around it for the whole batch, so the layer is linear in the
// frame: outputs that see only the frame are computed once, and what the frame receives is one image's input gradient
// of the output's gradient summed over the batch. The released prompt is added to the rim of the image and the sum is
// clamped, which is not linear: there every image has a gradient of its own.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/sparse_conv2d_block.h"
#include "params.h"

namespace vpns {

// Images [N, 3, h, w], strides in elements, and what makes canvases [N, H, W, 3] of them.
struct PromptedImages {
  const void* image;
  bool is_uint8;  // else float, from 0 to 1
  int64_t stride_n, stride_c, stride_h, stride_w;
  int64_t H, W;
  int64_t frame;
  const float* canvas;  // [H, W, 3], normalised: framed, of which the frame is read; else null
  const float* raw;     // [H, W, 3]: released, added on the frame, then clamped; else null
  const float* levels;  // [3, 256]: uint8 normalised
  const float* mean;    // [3]
  const float* std;     // [3]
  bool rounds;          // normalised values to bf16 (canvas and levels are so already)

  bool is_framed() const { return canvas != nullptr; }
};

// A rectangle of outputs.
struct OutputArea {
  int64_t p0, p1, q0, q1;
  bool is_empty() const { return p0 >= p1 || q0 >= q1; }
};

struct PromptForward {
  ConvShape shape;     // C = 3, H and W of the canvas, no groups
  const void* weight;  // [K, 3, R, S]
  DType weight_dtype;  // float, or bf16 where the outputs are
  PromptedImages images;
  ConvCall call;  // of which y, y_dtype, bias and threads count
};

struct PromptBackward {
  ConvShape shape;
  const float* weight;  // [K, 3, R, S], rounded as the forward rounds it
  PromptedImages images;
  const void* grad;  // [N, P, Q, K] dense, float or bf16
  DType grad_dtype;
  // Each may be null.
  // [H, W, 3]: of the normalised canvas, where the prompt passes the clamp; zero inside the frame.
  float* grad_canvas;
  float* grad_weight;  // [K, 3, R, S]
  float* grad_bias;    // [K]
  int threads;
};

// By the kernel of that name, or for an empty name the first that runs here.
void prompt_conv2d(const PromptForward& forward, const std::string& kernel);
void prompt_conv2d_backward(const PromptBackward& backward, const std::string& kernel);

// Names of the kernels that this machine can run, preferred first; the first ones take bf16 outputs only.
std::vector<std::string> prompt_conv2d_kernels(bool emulated);

// From here on: what the steps of prompt_conv2d.inl and prompt_conv2d_gradients.inl share with their caller.

// Which taps read a row of the canvas, and for which outputs.
struct TapsOfAxis {
  struct Tap {
    int32_t tap, output;
  };
  std::vector<int64_t> first;  // [extent + 1]
  std::vector<Tap> taps;
};

// A filter's row of taps side by side is a run of floats of a canvas row; dilated taps are runs of three each.
struct FrameGradient {
  const PromptBackward& call;
  const void* grad;  // [images, P, Q, K]
  int64_t images;
  const TapsOfAxis& rows;
  const std::vector<int64_t>& places;  // [R]: rows of taps that read the same rows of the canvas lie side by side
  bool has_pairs;                      // words are pairs of bf16, else floats
  int64_t words;                       // of K output channels
  int64_t runs, run_floats, parts;     // of a row of taps; a part is two vectors
  const uint32_t* weight;              // [runs][parts][R by place][words][two vectors], zeros where there is no weight
};

// Outputs of one image whose share in the weight's gradient is summed at a time.
struct GradientTile {
  int64_t n;  // below zero: the gradient summed over the batch, of outputs that see only the frame
  OutputArea area;
};

struct WeightGradient {
  const PromptBackward& call;
  const float* total;  // [P, Q, K]: summed over the batch
  BlockAxis h, w;
  const std::vector<GradientTile>& tiles;
  // Tiles fall into `chunks` equal shares, each with sums [strip][R, S, 3][up to two vectors of K] of its own.
  int64_t chunks, chunk_floats;
  float* sums;
  int64_t planes, pixels;  // the most words of planes and output pixels of a tile
};

struct PromptSteps {
  void (*forward)(const BlockPlan&, const PromptedImages&, const ConvCall&);
  // Sums the gradient over the batch, but not where an output lies inside `inner`.
  void (*sum_images)(const PromptBackward&, const OutputArea& inner, float* total);
  void (*frame_gradient)(const FrameGradient&);
  void (*weight_gradient)(const WeightGradient&);
};

PromptSteps run_prompt_steps_avx2();
PromptSteps run_prompt_steps_avx512();
PromptSteps run_prompt_steps_avx512_bf16();
PromptSteps run_prompt_steps_avx512_emulated();
PromptSteps run_prompt_steps_avx512_bf16_emulated();

}  // namespace vpns
