// The loops of channel_mask.h; included after batch_norm_act.inl, whose chunks and channels they share.

template <typename T>
void mask_channels(const ChannelMaskForward& call) {
  const Chunks chunks(call.pixels, call.channels, sizeof(T));
  const T* x = static_cast<const T*>(call.x);
  T* y = static_cast<T*>(call.y);
#pragma omp parallel for num_threads(call.threads) schedule(static)
  for (int64_t chunk = 0; chunk < chunks.count(); ++chunk)
    for (int64_t p = chunks.begin(chunk); p < chunks.end(chunk); ++p)
      over_channels(call.channels, [&](int64_t c, auto width) {
        const int64_t at = p * call.channels + c;
        write_channels(y + at, read_channels<width()>(x + at) * read_channels<width()>(call.mask + c));
      });
}

template <typename T>
void mask_channels_backward(const ChannelMaskBackward& call) {
  const Chunks chunks(call.pixels, call.channels, sizeof(T));
  const T *grad = static_cast<const T*>(call.grad), *x = static_cast<const T*>(call.x);
  T* grad_x = static_cast<T*>(call.grad_x);
  const int64_t channels = call.channels;
  std::vector<float> sums(call.sums == nullptr ? 0 : chunks.count() * channels);
#pragma omp parallel for num_threads(call.threads) schedule(static)
  for (int64_t chunk = 0; chunk < chunks.count(); ++chunk)
    over_channels(channels, [&](int64_t c, auto width) {
      const auto mask = read_channels<width()>(call.mask + c);
      auto sum = mask - mask;
      for (int64_t p = chunks.begin(chunk); p < chunks.end(chunk); ++p) {
        const int64_t at = p * channels + c;
        const auto g = read_channels<width()>(grad + at);
        if (call.sums != nullptr) sum += g * read_channels<width()>(x + at);
        if (grad_x != nullptr) write_channels(grad_x + at, g * mask);
      }
      if (call.sums != nullptr) write_channels(&sums[chunk * channels + c], sum);
    });
  for (int64_t c = 0; c < channels && call.sums != nullptr; ++c) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks.count(); ++chunk) sum += sums[chunk * channels + c];
    call.sums[c] = static_cast<float>(sum);
  }
}

}  // namespace

void VPNS_RUN_CHANNEL_MASK(const ChannelMaskForward& call) {
  if (call.dtype == DType::kBF16) mask_channels<Bf16>(call);
  else if (call.dtype == DType::kF16) mask_channels<Fp16>(call);
  else mask_channels<float>(call);
}

void VPNS_RUN_CHANNEL_MASK_BACKWARD(const ChannelMaskBackward& call) {
  if (call.dtype == DType::kBF16) mask_channels_backward<Bf16>(call);
  else if (call.dtype == DType::kF16) mask_channels_backward<Fp16>(call);
  else mask_channels_backward<float>(call);
}

namespace {
