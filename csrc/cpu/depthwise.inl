// The loops of depthwise.h for one vector length; included after channel_tiles.inl by each instruction set's own file.

// Neighbouring output pixels whose sums are in registers, two chains of which hide the latency of an addition.
constexpr int kDepthwisePixels = 4;
constexpr int kDepthwiseParts = 16 / kLanes;  // vectors to 16 channels

using MaskVec = int32_t __attribute__((vector_size(kLanes * 4)));

// Output pixels [q, q + kPixels) of row p, channels [16 · vector, + lanes); taps outside the input are left out.
template <int kPixels, bool kInside, typename X, typename Y>
void depthwise_pixels(const DepthwisePlan& plan, const ConvCall& call, const Output<Y>& out, int64_t n, int64_t p,
                      int64_t q, int64_t vector) {
  const ConvShape& s = plan.shape;
  const int64_t lanes = std::min<int64_t>(16, s.C - vector * 16);
  const bool is_whole = lanes == 16;
  Vec sum[kPixels][kDepthwiseParts] = {};
  const X* const image = static_cast<const X*>(call.x) + n * call.x_stride_n + vector * 16;
  for (int64_t r = 0; r < s.R; ++r) {
    const int64_t h = p * s.stride_h - s.pad_h + r * s.dilation_h;
    if (h < 0 || h >= s.H) continue;
    for (int64_t t = 0; t < s.S; ++t) {
      const int64_t tap = (r * s.S + t) * plan.vectors + vector;
      const DepthwisePlan::Kept kind = plan.kinds[tap];
      if (kind == DepthwisePlan::Kept::kNone) continue;
      const int64_t w0 = q * s.stride_w - s.pad_w + t * s.dilation_w;
      const float* const weights = plan.weights.data() + tap * 16;
#pragma GCC unroll 4
      for (int m = 0; m < kPixels; ++m) {
        const int64_t w = w0 + m * s.stride_w;
        if (!kInside && (w < 0 || w >= s.W)) continue;
        const X* from = image + h * call.x_stride_h + w * call.x_stride_w;
        alignas(64) X last[16] = {};
        if (!is_whole) from = static_cast<const X*>(std::memcpy(last, from, lanes * sizeof(X)));
#pragma GCC unroll 2
        for (int part = 0; part < kDepthwiseParts; ++part) {
          const Vec added = sum[m][part] + load(from + part * kLanes) * load(weights + part * kLanes);
          if (kind == DepthwisePlan::Kept::kAll) {
            sum[m][part] = added;
          } else {
            MaskVec kept;
            std::memcpy(&kept, plan.kept.data() + tap * 16 + part * kLanes, sizeof kept);
            sum[m][part] = kept != 0 ? added : sum[m][part];
          }
        }
      }
    }
  }
  const float* const bias = static_cast<const float*>(call.bias);
  if (bias != nullptr) {
    alignas(64) float last[16] = {};
    std::memcpy(last, bias + vector * 16, lanes * sizeof(float));
    for (int m = 0; m < kPixels; ++m)
      for (int part = 0; part < kDepthwiseParts; ++part) sum[m][part] += load(last + part * kLanes);
  }
  for (int m = 0; m < kPixels; ++m) {
    const int64_t at = call.y_at(s, n, p, q + m) + vector * 16;
    float row[16];
    for (int part = 0; part < kDepthwiseParts; ++part) {
      if (is_whole) finish(out, at + part * kLanes, sum[m][part]);
      else store(row + part * kLanes, sum[m][part]);
    }
    if (!is_whole) finish_row(out, at, row, lanes);
  }
}

// Whether tiles took the call: they add no residual to what they compute twice.
template <typename X, typename Y>
bool try_depthwise_tiles(const DepthwisePlan& plan, const ConvCall& call) {
  const ConvShape& s = plan.shape;
  if (!plan.is_dense || s.R != s.S || s.dilation_h != 1 || s.dilation_w != 1 || s.stride_h != s.stride_w ||
      s.C < kLanes || (s.C % kLanes != 0 && call.residual != nullptr))
    return false;
  const auto run = [&](auto size) {
    if (s.stride_h == 1) run_channel_tiles<ReadsOwnChannel, size, 1, X, Y>(s, plan.weights.data(), call);
    else run_channel_tiles<ReadsOwnChannel, size, 2, X, Y>(s, plan.weights.data(), call);
  };
  if (s.stride_h > 2) return false;
  if (s.S == 3) run(std::integral_constant<int, 3>{});
  else if (s.S == 5) run(std::integral_constant<int, 5>{});
  else if (s.S == 7) run(std::integral_constant<int, 7>{});
  else return false;
  return true;
}

template <typename X, typename Y>
void run_depthwise(const DepthwisePlan& plan, const ConvCall& call) {
  if (try_depthwise_tiles<X, Y>(plan, call)) return;
  const ConvShape& s = plan.shape;
  const Output<Y> out(call);
  const int64_t rows = call.row_count(s);
  // Outputs [first, last) read no column outside the input.
  const int64_t reach = (s.S - 1) * s.dilation_w;
  const int64_t first = std::min(ceil_div(s.pad_w, s.stride_w), s.Q);
  const int64_t room = s.W - 1 - reach + s.pad_w;
  const int64_t last = std::clamp(room < 0 ? 0 : room / s.stride_w + 1, first, s.Q);
#pragma omp parallel for num_threads(call.threads) schedule(static)
  for (int64_t row = 0; row < call.batch(s) * rows; ++row) {
    const int64_t n = row / rows, p = call.first_row + row % rows;
    for (int64_t vector = 0; vector < plan.vectors; ++vector) {
      int64_t q = 0;
      for (; q < first; ++q) depthwise_pixels<1, false, X>(plan, call, out, n, p, q, vector);
      for (; q + kDepthwisePixels <= last; q += kDepthwisePixels)
        depthwise_pixels<kDepthwisePixels, true, X>(plan, call, out, n, p, q, vector);
      for (; q < s.Q; ++q) depthwise_pixels<1, false, X>(plan, call, out, n, p, q, vector);
    }
  }
}
