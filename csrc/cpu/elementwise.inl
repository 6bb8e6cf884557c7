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

template <typename From, typename To>
void convert_element(const From& from, To& to) {
  narrow(&to, widen(from));
}

// Row by row: element (n, h, w, c) of the dense side is at ((n · H + h) · W + w) · C + c.
template <bool kIn, typename From, typename To>
void convert_rows(const ConvertCall& call) {
  const From* const from = static_cast<const From*>(call.from);
  To* const to = static_cast<To*>(call.to);
#pragma omp parallel for num_threads(call.threads) schedule(static)
  for (int64_t row = 0; row < call.N * call.H; ++row) {
    const int64_t dense = row * call.W * call.C;
    const int64_t strided = row / call.H * call.stride_n + row % call.H * call.stride_h;
    for (int64_t w = 0; w < call.W; ++w)
      for (int64_t c = 0; c < call.C; ++c) {
        const int64_t i = dense + w * call.C + c, j = strided + w * call.stride_w + c * call.stride_c;
        if constexpr (kIn) convert_element(from[j], to[i]);
        else convert_element(from[i], to[j]);
      }
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
