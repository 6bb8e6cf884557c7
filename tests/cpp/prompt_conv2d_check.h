// Does prompt_conv2d compute what loops in double precision do, gradients included, within its memory?
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "arithmetic.h"
#include "chance.h"
#include "cpu/prompt_conv2d.h"
#include "guarded.h"

class PromptCheck {
 public:
  PromptCheck() {
    using vpns::DType;
    released_ = one_in(2);
    s_.N = pick({1, 2, 3});
    s_.C = 3;
    s_.K = pick({1, 5, 16, 17, 33, 48, 70});
    s_.R = pick({1, 2, 3, 5, 7}), s_.S = pick({1, 2, 3, 5, 7});
    s_.stride_h = pick({1, 1, 2, 3}), s_.stride_w = pick({1, 1, 2, 3});
    s_.pad_h = pick({0, 1, 2, 3}), s_.pad_w = pick({0, 1, 2, 3});
    s_.dilation_h = pick({1, 1, 2}), s_.dilation_w = pick({1, 1, 2});
    s_.groups = 1;
    const int64_t h = pick({1, 2, 5, 9, 20, 33}), w = pick({1, 2, 5, 9, 20, 33});
    frame_ = pick({0, 1, 2, 5, 9});
    if (released_) frame_ = std::min(frame_, (std::min(h, w) - 1) / 2);
    const int64_t ring = released_ ? 0 : frame_;
    s_.H = h + 2 * ring, s_.W = w + 2 * ring;
    s_.pad_h = std::max(s_.pad_h, vpns::ceil_div((s_.R - 1) * s_.dilation_h + 1 - s_.H, 2));
    s_.pad_w = std::max(s_.pad_w, vpns::ceil_div((s_.S - 1) * s_.dilation_w + 1 - s_.W, 2));
    s_.P = (s_.H + 2 * s_.pad_h - (s_.R - 1) * s_.dilation_h - 1) / s_.stride_h + 1;
    s_.Q = (s_.W + 2 * s_.pad_w - (s_.S - 1) * s_.dilation_w - 1) / s_.stride_w + 1;
    at_back_ = one_in(2);
    is_uint8_ = one_in(2);
    image_.resize(s_.N * 3 * h * w);
    Guarded bytes(image_.size(), at_back_);
    GuardedArray floats(DType::kF32, static_cast<int64_t>(image_.size()), at_back_);
    for (size_t i = 0; i < image_.size(); ++i) {
      bytes.as<uint8_t>()[i] = static_cast<uint8_t>(127.5 * (uniform() + 1));
      const double value = floats.set(i, 0.6 * uniform() + 0.5);
      image_[i] = is_uint8_ ? bytes.as<uint8_t>()[i] / 255.0f : static_cast<float>(value);
    }
    bytes_ = std::move(bytes), floats_.push_back(std::move(floats));
  }

  // All there is to say against one kernel; empty where it is right.
  std::string complaint(const std::string& kernel, vpns::DType type) {
    using vpns::DType;
    const Operands o = draw(type);
    const Truth truth = compute(o, compose(o));
    const vpns::PromptedImages images = images_of(o);
    const std::initializer_list<const Guarded*> inputs = {
        &bytes_,           &floats_[0].memory(),    &o.weight.memory(),     &o.wide_weight.memory(),
        &o.bias.memory(),  &o.wide_levels.memory(), &o.wide_frame.memory(), &o.grad.memory()};
    for (const Guarded* input : inputs) input->allow(PROT_READ);
    for (const int threads : {1, 2, 3}) {
      const auto output = [&](DType of, const Sums& like) {
        return GuardedArray(of, static_cast<int64_t>(like.value.size()), at_back_);
      };
      const GuardedArray y = output(type, truth.y), canvas = output(DType::kF32, truth.canvas),
                         weight = output(DType::kF32, truth.weight), bias = output(DType::kF32, truth.bias);
      const vpns::ConvCall call{nullptr, DType::kF32, 0, 0, 0, y.data(), type, o.bias.data(), threads};
      vpns::prompt_conv2d({s_, o.weight.data(), type, images, call}, kernel);
      vpns::prompt_conv2d_backward({s_, floats(o.wide_weight), images, o.grad.data(), type, floats(canvas),
                                    floats(weight), floats(bias), threads},
                                   kernel);
      const std::string with = " with " + std::to_string(threads) + " threads";
      if (!is_right(y, truth.y)) return "wrong output" + with;
      if (!is_right(canvas, truth.canvas)) return "wrong gradient of the canvas" + with;
      if (!is_right(weight, truth.weight)) return "wrong gradient of the weight" + with;
      if (!is_right(bias, truth.bias)) return "wrong gradient of the bias" + with;
    }
    return {};
  }

 private:
  struct Operands {
    vpns::DType type;
    GuardedArray weight, bias, levels, frame, grad;
    // The library takes these in float.
    GuardedArray wide_weight = widened(weight), wide_levels = widened(levels), wide_frame = widened(frame);
  };

  struct Canvas {
    std::vector<double> values;  // [N, H, W, 3]
    std::vector<bool> passes;    // whether a gradient reaches the frame
  };

  // Sums, and those of their terms' magnitudes.
  struct Sums {
    explicit Sums(int64_t count) : value(count), scale(count) {}
    void add(int64_t i, double term) {
      value[i] += term;
      scale[i] += std::abs(term);
    }
    std::vector<double> value, scale;
  };

  struct Truth {
    Sums y, canvas, weight, bias;  // the output, and the gradients
  };

  int64_t image_height() const { return released_ ? s_.H : s_.H - 2 * frame_; }
  int64_t image_width() const { return released_ ? s_.W : s_.W - 2 * frame_; }

  Operands draw(vpns::DType type) const {
    const auto filled = [&](vpns::DType of, int64_t count) {
      GuardedArray array(of, count, at_back_);
      for (int64_t i = 0; i < count; ++i) array.set(i, uniform());
      return array;
    };
    GuardedArray weight = filled(type, s_.K * 3 * s_.R * s_.S);
    if (one_in(2))  // most taps masked: zeros of either sign
      for (int64_t i = 0; i < weight.count(); ++i)
        if (i % (s_.R * s_.S) % 4 != 1) weight.set(i, 0 * weight.get(i));
    return {type,
            std::move(weight),
            filled(vpns::DType::kF32, s_.K),
            filled(type, 3 * 256),
            filled(type, s_.H * s_.W * 3),
            filled(type, s_.N * s_.P * s_.Q * s_.K)};
  }

  vpns::PromptedImages images_of(const Operands& o) const {
    const int64_t h = image_height(), w = image_width();
    vpns::PromptedImages images{is_uint8_ ? bytes_.as<void>() : floats_[0].data(),
                                is_uint8_, 3 * h * w, h * w, w, 1, s_.H, s_.W, frame_, nullptr, nullptr,
                                floats(o.wide_levels), kMean, kDeviation, o.type == vpns::DType::kBF16};
    (released_ ? images.raw : images.canvas) = floats(o.wide_frame);
    return images;
  }

  Canvas compose(const Operands& o) const {
    const int64_t h = image_height(), w = image_width(), ring = released_ ? 0 : frame_;
    Canvas canvas{std::vector<double>(s_.N * s_.H * s_.W * 3), std::vector<bool>(s_.N * s_.H * s_.W * 3)};
    const GuardedArray rounded(o.type, 1, true);
    for (int64_t i = 0; i < static_cast<int64_t>(canvas.values.size()); ++i) {
      const int64_t c = i % 3, x = i / 3 % s_.W, y = i / 3 / s_.W % s_.H, n = i / 3 / s_.W / s_.H;
      const int64_t in_image = i % (s_.H * s_.W * 3);
      const bool on_frame = y < frame_ || y >= s_.H - frame_ || x < frame_ || x >= s_.W - frame_;
      canvas.passes[i] = on_frame;
      if (on_frame && !released_) {
        canvas.values[i] = o.frame.get(in_image);
        continue;
      }
      const int64_t at = ((n * 3 + c) * h + y - ring) * w + x - ring;
      float value = image_[at];
      if (is_uint8_ && !on_frame) {
        canvas.values[i] = o.levels.get(c * 256 + bytes_.as<uint8_t>()[at]);
        continue;
      }
      if (on_frame) value += static_cast<float>(o.wide_frame.get(in_image));
      canvas.passes[i] = on_frame && value >= 0 && value <= 1;
      if (released_) value = std::clamp(value, 0.0f, 1.0f);
      canvas.values[i] = rounded.set(0, (value - kMean[c]) / kDeviation[c]);
    }
    return canvas;
  }

  Truth compute(const Operands& o, const Canvas& canvas) const {
    Truth truth{Sums(o.grad.count()), Sums(o.frame.count()), Sums(o.weight.count()), Sums(s_.K)};
    for (int64_t i = 0; i < o.grad.count(); ++i) {
      const int64_t k = i % s_.K, q = i / s_.K % s_.Q, p = i / s_.K / s_.Q % s_.P, n = i / s_.K / s_.Q / s_.P;
      const double g = o.grad.get(i);
      truth.y.add(i, o.bias.get(k));
      truth.bias.add(k, g);
      for (int64_t tap = 0; tap < 3 * s_.R * s_.S; ++tap) {
        const int64_t c = tap / (s_.R * s_.S), r = tap / s_.S % s_.R, col = tap % s_.S;
        const int64_t row = p * s_.stride_h - s_.pad_h + r * s_.dilation_h;
        const int64_t column = q * s_.stride_w - s_.pad_w + col * s_.dilation_w;
        if (row < 0 || row >= s_.H || column < 0 || column >= s_.W) continue;
        const int64_t cell = (row * s_.W + column) * 3 + c, at = n * s_.H * s_.W * 3 + cell;
        const int64_t from = k * 3 * s_.R * s_.S + tap;
        truth.y.add(i, o.weight.get(from) * canvas.values[at]);
        truth.weight.add(from, g * canvas.values[at]);
        if (canvas.passes[at]) truth.canvas.add(cell, g * o.weight.get(from));
      }
    }
    return truth;
  }

  static float* floats(const GuardedArray& array) { return static_cast<float*>(array.data()); }

  static GuardedArray widened(const GuardedArray& from) {
    GuardedArray wide(vpns::DType::kF32, from.count(), true);
    for (int64_t i = 0; i < from.count(); ++i) wide.set(i, from.get(i));
    return wide;
  }

  static bool is_right(const GuardedArray& found, const Sums& truth) {
    const double half_ulp = found.type() == vpns::DType::kBF16 ? 0x1p-8 : 0x1p-24;
    for (int64_t i = 0; i < found.count(); ++i) {
      const double bound = 2e-6 * truth.scale[i] + half_ulp * std::abs(truth.value[i]) + 1e-30;
      if (!(std::abs(found.get(i) - truth.value[i]) <= bound)) return false;
    }
    return found.memory().surroundings_are_intact();
  }

  static constexpr float kMean[3] = {0.4f, 0.5f, 0.6f}, kDeviation[3] = {0.2f, 0.3f, 0.4f};

  vpns::ConvShape s_{};
  int64_t frame_;
  bool released_, is_uint8_, at_back_;
  std::vector<float> image_;  // from 0 to 1
  Guarded bytes_{0, true};
  std::vector<GuardedArray> floats_;
};
