// The loops of weight_gradient.h for one vector length; included by each instruction set's own file, after
// sparse_conv2d_block.inl. Needs VPNS_RUN_BLOCK_GRAD (the name of the function that is defined).

struct GradTile {
  const float* x;        // base of the planes, at the block's first channel here
  const int64_t* pixel;  // by output pixel, floats from the base
  const float* grad;     // [pixels][padded_filters], at the block's first output channel here
  int64_t pixels, padded_filters, padded_bk;
  float* sums;  // [channels][padded_bk]
};

// sums[c][k] += Σ over the tile's pixels of x[pixel][c] · grad[pixel][k], kChannels × kVectors vectors in registers.
template <int kChannels, int kVectors>
void add_outer_products(const GradTile& tile) {
  Vec sum[kChannels][kVectors];
#pragma GCC unroll 16
  for (int c = 0; c < kChannels; ++c)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sum[c][v] = load(tile.sums + c * tile.padded_bk + v * kLanes);
  const float* grad = tile.grad;
  for (int64_t m = 0; m < tile.pixels; ++m, grad += tile.padded_filters) {
    const float* x = tile.x + tile.pixel[m];
    Vec g[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) g[v] = load(grad + v * kLanes);
#pragma GCC unroll 16
    for (int c = 0; c < kChannels; ++c) {
      const Vec value = broadcast(x[c]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[c][v] += value * g[v];
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < kChannels; ++c)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) store(tile.sums + c * tile.padded_bk + v * kLanes, sum[c][v]);
}

using AddOuterProducts = void (*)(const GradTile&);
template <int kVectors, int... kChannels>
constexpr std::array<AddOuterProducts, sizeof...(kChannels)> outer_table(std::integer_sequence<int, kChannels...>) {
  return {add_outer_products<kChannels + 1, kVectors>...};
}
constexpr auto kOuterOne = outer_table<1>(std::make_integer_sequence<int, kBlockPixels>{});
constexpr auto kOuterTwo = outer_table<2>(std::make_integer_sequence<int, kBlockPixels>{});

// A whole block [channels][padded_bk] over the tile's pixels.
inline void add_block(const BlockGradPlan& plan, const BlockGradPlan::Block& block, GradTile tile) {
  const float *x = tile.x, *grad = tile.grad;
  float* sums = tile.sums;
  const int64_t shares = (block.channels + kBlockPixels - 1) / kBlockPixels;
  for (int64_t k = 0; k < plan.padded_bk; k += 2 * kLanes) {
    const auto& table = plan.padded_bk - k > kLanes ? kOuterTwo : kOuterOne;
    for (int64_t share = 0; share < shares; ++share) {
      const int64_t c = block.channels * share / shares;
      tile.x = x + c;
      tile.grad = grad + k;
      tile.sums = sums + c * plan.padded_bk + k;
      table[block.channels * (share + 1) / shares - c - 1](tile);
    }
  }
}

// The gradient of one image's tile: [p][q][group][block row][padded_bk], zeros beyond ragged rows.
template <typename X>
void load_gradient(const BlockGradPlan& plan, const X* grad, int64_t n, int64_t p0, int64_t p1, int64_t q0, int64_t q1,
                   float* to) {
  const ConvShape& s = plan.reader.shape;
  const int64_t filters = s.K / s.groups;
  for (int64_t p = p0; p < p1; ++p)
    for (int64_t q = q0; q < q1; ++q) {
      const X* from = grad + ((n * s.P + p) * s.Q + q) * s.K;
      for (int64_t g = 0; g < s.groups; ++g)
        for (int64_t k = 0; k < filters; k += plan.bk, to += plan.padded_bk) {
          const int64_t count = std::min(plan.bk, filters - k);
          copy_cells(from + g * filters + k, count, to);
          zero_cells(to + count, plan.padded_bk - count);
        }
    }
}

// Σ weight · sums over a block.
inline double weigh_block(const BlockGradPlan& plan, const BlockGradPlan::Block& block, const float* weight,
                          const float* sums) {
  double score = 0;
  for (int64_t k = 0; k < plan.bk; ++k)
    for (int64_t c = 0; c < block.channels; ++c)
      score += static_cast<double>(weight[k * plan.bc + c]) * sums[c * plan.padded_bk + k];
  return score;
}

// Sums [bc][padded_bk] to the packed order [bk][bc]; zeros beyond ragged channels.
inline void store_block(const BlockGradPlan& plan, const BlockGradPlan::Block& block, const float* sums, float* out) {
  for (int64_t k = 0; k < plan.bk; ++k)
    for (int64_t c = 0; c < plan.bc; ++c) out[k * plan.bc + c] = c < block.channels ? sums[c * plan.padded_bk + k] : 0.0f;
}

template <typename X>
void run_block_grad(const BlockGradPlan& plan, const WeightGradCall& call) {
  const BlockPlan& reader = plan.reader;
  const ConvShape& s = reader.shape;
  const int64_t pixel_cells = s.groups * reader.group_cells, image_cells = reader.rows * reader.cols * pixel_cells;
  const int64_t blocks = static_cast<int64_t>(plan.blocks.size()), block_floats = plan.bc * plan.padded_bk;
  const int64_t tiles_p = (s.P + reader.tile_p - 1) / reader.tile_p, tiles_q = (s.Q + reader.tile_q - 1) / reader.tile_q;
  const int64_t tiles = (s.N + plan.images - 1) / plan.images * tiles_p * tiles_q;
  const int64_t tile_pixels = plan.images * reader.tile_p * reader.tile_q;
  std::vector<float> x(plan.images * image_cells), grad(tile_pixels * plan.padded_filters);
  std::vector<int64_t> base(tile_pixels);
  std::vector<float> sums(call.weight == nullptr ? blocks * block_floats : 0, 0.0f);
  std::vector<double> scores(call.weight == nullptr ? 0 : blocks, 0.0);
  const ConvCall source{call.x,     call.dtype, call.x_stride_n, call.x_stride_h, call.x_stride_w, nullptr,
                        call.dtype, nullptr,    1};
#pragma omp parallel num_threads(call.threads)
  {
    std::vector<float> own(call.weight == nullptr ? 0 : block_floats);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t n0 = tile / (tiles_p * tiles_q) * plan.images, n1 = std::min(n0 + plan.images, s.N);
      const int64_t p0 = tile / tiles_q % tiles_p * reader.tile_p, p1 = std::min(p0 + reader.tile_p, s.P);
      const int64_t q0 = tile % tiles_q * reader.tile_q, q1 = std::min(q0 + reader.tile_q, s.Q);
      const int64_t image_pixels = (p1 - p0) * (q1 - q0);
#pragma omp for schedule(static)
      for (int64_t n = n0; n < n1; ++n) {
        load_rows<float, X>(reader, source, n, p0, q0, 0, reader.rows, &x[(n - n0) * image_cells]);
        const int64_t first = (n - n0) * image_pixels;
        load_gradient(plan, static_cast<const X*>(call.grad), n, p0, p1, q0, q1, &grad[first * plan.padded_filters]);
        for (int64_t i = 0; i < image_pixels; ++i) {
          const int64_t row = i / (q1 - q0) * reader.h.step, col = i % (q1 - q0) * reader.w.step;
          base[first + i] = (n - n0) * image_cells + (row * reader.cols + col) * pixel_cells;
        }
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < blocks; ++i) {
        const BlockGradPlan::Block& block = plan.blocks[i];
        float* to = call.weight == nullptr ? &sums[i * block_floats] : own.data();
        if (call.weight != nullptr) zero_cells(to, block_floats);
        add_block(plan, block, {x.data() + block.offset, base.data(), grad.data() + block.filter,
                                (n1 - n0) * image_pixels, plan.padded_filters, plan.padded_bk, to});
        if (call.weight != nullptr) scores[i] += weigh_block(plan, block, call.weight + i * plan.bk * plan.bc, to);
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < blocks; ++i) {
      if (call.weight != nullptr) call.out[i] = static_cast<float>(scores[i]);
      else store_block(plan, plan.blocks[i], &sums[i * block_floats], call.out + i * plan.bk * plan.bc);
    }
  }
}

}  // namespace

void VPNS_RUN_BLOCK_GRAD(const BlockGradPlan& plan, const WeightGradCall& call) {
  if (call.dtype == DType::kBF16) run_block_grad<Bf16>(plan, call);
  else if (call.dtype == DType::kF16) run_block_grad<Fp16>(plan, call);
  else run_block_grad<float>(plan, call);
}

namespace {
