// The loop of sparse_conv2d_block.h for one vector length; included by each instruction set's own file.
// Needs VPNS_LANES, VPNS_BLOCK_PIXELS and VPNS_RUN_BLOCK (the name of the function that is defined).

constexpr int kBlockPixels = VPNS_BLOCK_PIXELS;

struct BlockTile {
  const float* x;          // base of the planes
  const int64_t* pixel;    // by output pixel, floats from the base
  const int64_t* offsets;  // by kept block
  const float* weights;    // of the first kept block, at the first of its output channels here
  int64_t blocks, bc, padded_bk;
  const float* bias;  // of the first output channel here; may be null
  float* sums;        // [pixels][2 * kLanes]
  int64_t filters;    // how many output channels there are, for the bias
};

// sums[m][k] = bias[k] + Σ_blocks Σ_c x[m][c] · w[c][k] for kPixels pixels and kVectors vectors of output channels.
template <int kPixels, int kVectors>
void multiply_blocks(const BlockTile& tile) {
  Vec sum[kPixels][kVectors];
  float start[kVectors * kLanes] = {};
  if (tile.bias != nullptr)
    for (int64_t k = 0; k < tile.filters; ++k) start[k] = tile.bias[k];
#pragma GCC unroll 16
  for (int m = 0; m < kPixels; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sum[m][v] = load(start + v * kLanes);
  const float* weights = tile.weights;
  for (int64_t block = 0; block < tile.blocks; ++block) {
    const float* x[kPixels];
#pragma GCC unroll 16
    for (int m = 0; m < kPixels; ++m) x[m] = tile.x + tile.pixel[m] + tile.offsets[block];
    for (int64_t c = 0; c < tile.bc; ++c, weights += tile.padded_bk) {
      Vec w[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) w[v] = load(weights + v * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < kPixels; ++m) {
        const Vec value = broadcast(x[m][c]);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) sum[m][v] += value * w[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kPixels; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) store(tile.sums + m * 2 * kLanes + v * kLanes, sum[m][v]);
}

using MultiplyBlocks = void (*)(const BlockTile&);

template <int kVectors, int... kPixels>
constexpr std::array<MultiplyBlocks, sizeof...(kPixels)> block_table(std::integer_sequence<int, kPixels...>) {
  return {multiply_blocks<kPixels + 1, kVectors>...};
}
constexpr auto kMultiplyOne = block_table<1>(std::make_integer_sequence<int, kBlockPixels>{});
constexpr auto kMultiplyTwo = block_table<2>(std::make_integer_sequence<int, kBlockPixels>{});

template <typename X>
void copy_channels(const X* from, int64_t count, int64_t padded, float* to) {
  int64_t c = 0;
  if (from != nullptr) {
    for (; c + 8 <= count; c += 8) store8(to + c, load8(from + c));
    for (; c < count; ++c) to[c] = widen(from[c]);
  }
  for (; c < padded; ++c) to[c] = 0.0f;
}

// Lays out the input of output rows from p0 and columns from q0 of one image: [phase][row][col][group][channel].
template <typename X>
void load_block_planes(const BlockPlan& plan, const ConvCall& call, int64_t n, int64_t p0, int64_t q0, float* to) {
  const ConvShape& s = plan.shape;
  const int64_t channels = s.C / s.groups;
  const X* x = static_cast<const X*>(call.x) + n * call.x_stride_n;
  for (const int phase_h : plan.planes.h.phases)
    for (const int phase_w : plan.planes.w.phases)
      for (int64_t row = 0; row < plan.planes.rows; ++row)
        for (int64_t col = 0; col < plan.planes.cols; ++col) {
          const int64_t h = (p0 + row) * s.stride_h + phase_h - s.pad_h;
          const int64_t w = (q0 + col) * s.stride_w + phase_w - s.pad_w;
          const bool inside = h >= 0 && h < s.H && w >= 0 && w < s.W;
          const X* pixel = inside ? x + h * call.x_stride_h + w * call.x_stride_w : nullptr;
          for (int64_t g = 0; g < s.groups; ++g, to += plan.group_channels)
            copy_channels(pixel ? pixel + g * channels : nullptr, channels, plan.group_channels, to);
        }
}

// All pixels of a task × one row of blocks.
template <typename Y>
void run_block_row(const BlockPlan& plan, const ConvCall& call, int64_t row, const float* x, const int64_t* pixel,
                   const int64_t* target, int64_t pixels) {
  const ConvShape& s = plan.shape;
  const int64_t filters = s.K / s.groups, rows = ceil_div(filters, plan.bk);
  const int64_t k0 = row / rows * filters + row % rows * plan.bk;
  const int64_t wanted = std::min(plan.bk, filters - row % rows * plan.bk);
  const float* bias = static_cast<const float*>(call.bias);
  const Output<Y> out(call);
  alignas(64) float sums[kBlockPixels * 2 * kLanes];
  for (int64_t k = 0; k < wanted; k += 2 * kLanes) {
    const int64_t count = std::min<int64_t>(wanted - k, 2 * kLanes);
    const auto& table = count > kLanes ? kMultiplyTwo : kMultiplyOne;
    const int64_t first = plan.starts[row];
    // Equal shares of pixels, so that no share has too few sums to hide the latency of the additions.
    const int64_t shares = ceil_div(pixels, kBlockPixels);
    for (int64_t share = 0; share < shares; ++share) {
      const int64_t begin = pixels * share / shares, size = pixels * (share + 1) / shares - begin;
      const BlockTile tile{x,
                           pixel + begin,
                           plan.offsets.data() + first,
                           plan.weights.data() + first * plan.bc * plan.padded_bk + k,
                           plan.starts[row + 1] - first,
                           plan.bc,
                           plan.padded_bk,
                           bias ? bias + k0 + k : nullptr,
                           sums,
                           count};
      table[size - 1](tile);
      for (int64_t m = 0; m < size; ++m)
        finish_row(out, target[begin + m] * s.K + k0 + k, sums + m * 2 * kLanes, count);
    }
  }
}

template <typename X, typename Y>
void run_block_typed(const BlockPlan& plan, const ConvCall& call) {
  const ConvShape& s = plan.shape;
  const Planes& planes = plan.planes;
  const bool in_place = plan.may_read_in_place && std::is_same_v<X, float>;
  const int64_t pixel_floats = s.groups * plan.group_channels;
  const int64_t image_floats = planes.pixels() * pixel_floats;
  const int64_t tiles_p = ceil_div(s.P, planes.tile_p), tiles_q = ceil_div(s.Q, planes.tile_q);
  // Small images share a task, for whole register tiles and longer use of each weight.
  const bool whole = tiles_p * tiles_q == 1;
  const int64_t room = std::max<int64_t>(kBlockPlaneBytes / (4 * image_floats), 1);
  const int64_t tile_n = whole ? even_tile(s.N, std::min(room, ceil_div(s.N, 2 * call.threads))) : 1;
  const int64_t tasks = ceil_div(s.N, tile_n) * tiles_p * tiles_q;
  const int64_t block_rows = static_cast<int64_t>(plan.starts.size()) - 1;
  const int64_t parts = call.threads == 1 ? 1 : std::clamp<int64_t>(2 * call.threads / std::max<int64_t>(tasks, 1), 1, block_rows);
  const int64_t pixel_room = tile_n * planes.tile_p * planes.tile_q;
#pragma omp parallel num_threads(call.threads)
  {
    float* memory = thread_scratch((in_place ? 0 : tile_n * image_floats + 16) + 4 * pixel_room);
    int64_t* pixel = reinterpret_cast<int64_t*>(memory);
    int64_t* target = pixel + pixel_room;
    float* x_planes = memory + 4 * pixel_room;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks * parts; ++task) {
      const int64_t part = task % parts, tile = task / parts;
      const int64_t q0 = tile % tiles_q * planes.tile_q, p0 = tile / tiles_q % tiles_p * planes.tile_p;
      const int64_t n0 = tile / (tiles_q * tiles_p) * tile_n;
      int64_t pixels = 0;
      for (int64_t n = n0; n < std::min(n0 + tile_n, s.N); ++n) {
        if (!in_place) load_block_planes<X>(plan, call, n, p0, q0, x_planes + (n - n0) * image_floats);
        for (int64_t p = p0; p < std::min(p0 + planes.tile_p, s.P); ++p)
          for (int64_t q = q0; q < std::min(q0 + planes.tile_q, s.Q); ++q, ++pixels) {
            pixel[pixels] = in_place ? n * call.x_stride_n + p * s.stride_h * call.x_stride_h +
                                                q * s.stride_w * call.x_stride_w
                                          : (n - n0) * image_floats + ((p - p0) * planes.cols + q - q0) * pixel_floats;
            target[pixels] = (n * s.P + p) * s.Q + q;
          }
      }
      const float* x = in_place ? static_cast<const float*>(call.x) : x_planes;
      for (int64_t row = block_rows * part / parts; row < block_rows * (part + 1) / parts; ++row)
        run_block_row<Y>(plan, call, row, x, pixel, target, pixels);
    }
  }
}

}  // namespace

void VPNS_RUN_BLOCK(const BlockPlan& plan, const ConvCall& call) {
  with_types(call, [&](auto x, auto y) { run_block_typed<decltype(x), decltype(y)>(plan, call); });
}

namespace {
