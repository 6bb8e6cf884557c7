// What joins layers: y = act(a + b) on activations of any layout of pixels, and how images come in and results go out.
#pragma once

#include <cstdint>

#include "params.h"

namespace vpns {

// `pixels` of `channels` each: a and y by their own distances from pixel to pixel (in elements), b as y; one type.
struct AddCall {
  DType dtype;
  const void* a;
  const void* b;  // may be null
  void* y;
  int64_t pixels, channels, a_stride, y_stride;
  Act act;
  int threads;
};

// An image tensor of any strides (in elements) and an activation [N, H, W, C], each in a type of its own.
struct ConvertCall {
  const void* from;
  void* to;
  DType from_dtype, to_dtype;
  int64_t N, C, H, W;
  int64_t stride_n, stride_c, stride_h, stride_w;  // of the side that is not [N, H, W, C]
  int threads;
};

// Throw std::invalid_argument where the CPU lacks AVX2.
void add_act(const AddCall& call);
void convert_in(const ConvertCall& call);   // from the strided tensor
void convert_out(const ConvertCall& call);  // into it

void run_add_act_avx2(const AddCall& call);
void run_convert_in_avx2(const ConvertCall& call);
void run_convert_out_avx2(const ConvertCall& call);

}  // namespace vpns
