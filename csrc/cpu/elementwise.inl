// The loops of elementwise.h; included after batch_norm_act.inl, whose channels they share.

template <typename T>
void add_pixels(const AddCall& call) {
  const T *const a = static_cast<const T*>(call.a), *const b = static_cast<const T*>(call.b);
  T* const y = static_cast<T*>(call.y);
#pragma omp parallel for num_threads(call.threads) schedule(static)
  for (int64_t p = 0; p < call.pixels; ++p)
    over_channels(call.channels, [&](int64_t c, auto width) {
      constexpr int kWidth = width();
      auto sum = read_channels<kWidth>(a + p * call.a_stride + c);
      if (b != nullptr) sum += read_channels<kWidth>(b + p * call.y_stride + c);
      write_channels(y + p * call.y_stride + c, activate(sum, call.act));
    });
}

// `count` elements side by side.
template <typename From, typename To>
void convert_run(const From* from, int64_t count, To* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) store8(to + i, load8(from + i));
  for (; i < count; ++i) narrow(to + i, widen(from[i]));
}

// A row of pixels: `dense` [W, C], the other side by its strides. Conversions are by vectors where one side's channels
// or pixels lie side by side; then only their order is left to change.
template <bool kIn, typename From, typename To>
void convert_row(const ConvertCall& call, const From* from, To* to) {
  constexpr int64_t kPixels = 128;
  const int64_t C = call.C, W = call.W;
  if (call.stride_c == 1 && (call.stride_w == C || W == 1)) return convert_run(from, W * C, to);
  To run[kPixels];
  for (int64_t c = 0; c < C; ++c)
    for (int64_t w = 0; w < W; w += kPixels) {
      const int64_t count = std::min(kPixels, W - w);
      const int64_t strided = w * call.stride_w + c * call.stride_c;
      if constexpr (kIn) {
        if (call.stride_w == 1) convert_run(from + strided, count, run);
        else for (int64_t i = 0; i < count; ++i) narrow(run + i, widen(from[strided + i * call.stride_w]));
        for (int64_t i = 0; i < count; ++i) to[(w + i) * C + c] = run[i];
      } else {
        for (int64_t i = 0; i < count; ++i) narrow(run + i, widen(from[(w + i) * C + c]));
        for (int64_t i = 0; i < count; ++i) to[strided + i * call.stride_w] = run[i];
      }
    }
}

template <bool kIn, typename From, typename To>
void convert_rows(const ConvertCall& call) {
  const From* const from = static_cast<const From*>(call.from);
  To* const to = static_cast<To*>(call.to);
#pragma omp parallel for num_threads(call.threads) schedule(static)
  for (int64_t row = 0; row < call.N * call.H; ++row) {
    const int64_t dense = row * call.W * call.C;
    const int64_t strided = row / call.H * call.stride_n + row % call.H * call.stride_h;
    convert_row<kIn>(call, from + (kIn ? strided : dense), to + (kIn ? dense : strided));
  }
}

template <bool kIn, typename From>
void convert_from(const ConvertCall& call) {
  if (call.to_dtype == DType::kBF16) convert_rows<kIn, From, Bf16>(call);
  else if (call.to_dtype == DType::kF16) convert_rows<kIn, From, Fp16>(call);
  else convert_rows<kIn, From, float>(call);
}

template <bool kIn>
void convert(const ConvertCall& call) {
  if (call.from_dtype == DType::kBF16) convert_from<kIn, Bf16>(call);
  else if (call.from_dtype == DType::kF16) convert_from<kIn, Fp16>(call);
  else convert_from<kIn, float>(call);
}

}  // namespace

void run_add_act_avx2(const AddCall& call) {
  if (call.dtype == DType::kBF16) add_pixels<Bf16>(call);
  else if (call.dtype == DType::kF16) add_pixels<Fp16>(call);
  else add_pixels<float>(call);
}
void run_convert_in_avx2(const ConvertCall& call) { convert<true>(call); }
void run_convert_out_avx2(const ConvertCall& call) { convert<false>(call); }

namespace {
