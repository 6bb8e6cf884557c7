// Rows of prompted, normalised canvases, and the convolution that reads them; for prompt_conv2d.h, after
// sparse_conv2d_block.inl.

// A value of the image itself, from 0 to 1.
inline float prompt_pixel(const PromptedImages& images, int64_t at) {
  if (images.is_uint8) return static_cast<float>(static_cast<const uint8_t*>(images.image)[at]) / 255.0f;
  return static_cast<const float*>(images.image)[at];
}

// Canvases of cells: float or Bf16.
template <typename Cell>
class CanvasRows {
 public:
  explicit CanvasRows(const PromptedImages& images) : images_(images), inset_(images.is_framed() ? images.frame : 0) {
    if (!images.is_uint8) return;
    for (int i = 0; i < 3 * 256; ++i) narrow(&levels_[i], images.levels[i]);
  }

  // Columns [begin, end) of row h of image n, three cells each; zeros outside the canvas.
  void compose(int64_t n, int64_t h, int64_t begin, int64_t end, Cell* to) const {
    const int64_t H = images_.H, W = images_.W, frame = images_.frame;
    if (h < 0 || h >= H) return zero_cells(to, 3 * (end - begin));
    const bool on_frame = h < frame || h >= H - frame;
    int64_t at = begin;
    const auto up_to = [&](int64_t limit, const auto& put) {
      const int64_t stop = std::clamp(limit, at, end);
      if (stop > at) put(stop);
      to += 3 * (stop - at);
      at = stop;
    };
    const auto put_zeros = [&](int64_t stop) { zero_cells(to, 3 * (stop - at)); };
    const auto put_frame = [&](int64_t stop) { put_frame_pixels(n, h, at, stop, to); };
    const auto put_image = [&](int64_t stop) { put_image_pixels(n, h, at, stop, to); };
    up_to(0, put_zeros);
    up_to(on_frame ? W : frame, put_frame);
    up_to(on_frame ? W : W - frame, put_image);
    up_to(W, put_frame);
    up_to(end, put_zeros);
  }

 private:
  void put_frame_pixels(int64_t n, int64_t h, int64_t begin, int64_t end, Cell* to) const {
    const int64_t first = (h * images_.W + begin) * 3;
    if (images_.is_framed()) return copy_cells(images_.canvas + first, 3 * (end - begin), to);
    put_values(n, h, begin, end, images_.raw + first, to);
  }

  void put_image_pixels(int64_t n, int64_t h, int64_t begin, int64_t end, Cell* to) const {
    if (!images_.is_uint8) return put_values(n, h, begin, end, nullptr, to);
    const uint8_t* from = static_cast<const uint8_t*>(images_.image) + offset(n, h, begin);
    const int64_t stride_c = images_.stride_c, stride_w = images_.stride_w;
    for (int64_t w = begin; w < end; ++w, from += stride_w, to += 3)
      for (int c = 0; c < 3; ++c) to[c] = levels_[c * 256 + from[c * stride_c]];
  }

  // Values of the image, to which a prompt may be added, normalised one by one: a channel of a few pixels at a time, so
  // that the compiler can take vectors where a row's pixels are neighbours.
  void put_values(int64_t n, int64_t h, int64_t begin, int64_t end, const float* raw, Cell* to) const {
    constexpr int64_t kPixels = 32;
    const int64_t first = offset(n, h, begin), pixels = end - begin;
    for (int64_t at = 0; at < pixels; at += kPixels) {
      const int64_t count = std::min(kPixels, pixels - at);
      Cell cells[3][kPixels];
      for (int c = 0; c < 3; ++c) {
        const int64_t from = first + at * images_.stride_w + c * images_.stride_c;
        float values[kPixels];
        if (!images_.is_uint8 && images_.stride_w == 1)
          std::copy_n(static_cast<const float*>(images_.image) + from, count, values);
        else
          for (int64_t i = 0; i < count; ++i) values[i] = prompt_pixel(images_, from + i * images_.stride_w);
        if (raw != nullptr)
          for (int64_t i = 0; i < count; ++i) values[i] += raw[3 * (at + i) + c];
        put_channel(values, count, images_.mean[c], images_.std[c], cells[c]);
      }
      for (int64_t i = 0; i < count; ++i, to += 3)
        for (int c = 0; c < 3; ++c) to[c] = cells[c][i];
    }
  }

  void put_channel(const float* values, int64_t count, float mean, float deviation, Cell* to) const {
    if (images_.raw != nullptr)
      for (int64_t i = 0; i < count; ++i) put((clamp_unit(values[i]) - mean) / deviation, to + i);
    else
      for (int64_t i = 0; i < count; ++i) put((values[i] - mean) / deviation, to + i);
  }

  // A NaN stays one.
  static float clamp_unit(float value) { return value < 0.0f ? 0.0f : value > 1.0f ? 1.0f : value; }

  void put(float value, Cell* to) const {
    if constexpr (std::is_same_v<Cell, Bf16>) return narrow(to, value);
    Bf16 half;
    narrow(&half, value);
    narrow(to, images_.rounds ? widen(half) : value);
  }

  int64_t offset(int64_t n, int64_t h, int64_t w) const {
    return n * images_.stride_n + (h - inset_) * images_.stride_h + (w - inset_) * images_.stride_w;
  }

  const PromptedImages& images_;
  int64_t inset_;
  Cell levels_[3 * 256];
};

// `cols` columns of a canvas, every skip-th one from w on.
template <typename Cell>
void compose_row(const CanvasRows<Cell>& canvases, int64_t n, int64_t h, int64_t w, int64_t cols, int64_t skip,
                 Cell* to) {
  if (skip == 1) return canvases.compose(n, h, w, w + cols, to);
  for (int64_t col = 0; col < cols; ++col, w += skip) canvases.compose(n, h, w, w + 1, to + 3 * col);
}

template <typename Cell>
void prompt_forward(const BlockPlan& plan, const PromptedImages& images, const ConvCall& call) {
  const ConvShape& s = plan.shape;
  const CanvasRows<Cell> canvases(images);
  run_block_of<Cell>(plan, call, false, [&](int64_t n, int64_t p0, int64_t q0, int64_t rows, Cell* planes) {
    for (int64_t row = 0; row < rows; ++row)
      compose_row(canvases, n, p0 * s.stride_h - s.pad_h + row * plan.h.skip, q0 * s.stride_w - s.pad_w, plan.cols,
                  plan.w.skip, planes + row * plan.cols * 3);
  });
}
