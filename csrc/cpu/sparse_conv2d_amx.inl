// The loop of sparse_conv2d_amx.h; included by the AMX file and, over emulated tiles, by the emulated one, after
// sparse_conv2d_channels.inl.
// Needs VPNS_RUN_AMX (the name of the function that is defined) and the _tile_ intrinsics.

struct TileShapes {  // as LDTILECFG reads it
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

void configure_tiles(int64_t step) {
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) {
    const bool is_a = tile == 4 || tile == 5, is_b = tile >= 6;
    shapes.row_bytes[tile] = static_cast<uint16_t>(is_a ? step * 2 : 64);
    shapes.rows[tile] = static_cast<uint8_t>(is_b ? step / 2 : kTileRows);
  }
  _tile_loadconfig(&shapes);
}

struct AmxTile {
  const uint16_t* x[2];    // bases of the two groups of 16 rows
  int64_t row_stride;      // bytes between two rows
  const int64_t* offsets;  // by kept block
  const uint16_t* weights; // of the first kept block, at the first of its 16 output channels here
  int64_t blocks, block_elements, column_elements, steps, step;
  float* sums;  // [32][32]
};

// sums = Σ_blocks x · w for 16 or 32 rows and 16 or 32 output channels.
template <bool kTwoRows, bool kTwoColumns>
void multiply_tiles(const AmxTile& t) {
  _tile_zero(0);
  if (kTwoRows) _tile_zero(1);
  if (kTwoColumns) _tile_zero(2);
  if (kTwoRows && kTwoColumns) _tile_zero(3);
  for (int64_t block = 0; block < t.blocks; ++block)
    for (int64_t step = 0; step < t.steps; ++step) {
      const int64_t from = t.offsets[block] + step * t.step;
      const uint16_t* w = t.weights + block * t.block_elements + step * t.step * 16;
      _tile_loadd(4, t.x[0] + from, t.row_stride);
      _tile_loadd(6, w, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (kTwoRows) {
        _tile_loadd(5, t.x[1] + from, t.row_stride);
        _tile_dpbf16ps(1, 5, 6);
      }
      if (kTwoColumns) {
        _tile_loadd(7, w + t.column_elements, 64);
        _tile_dpbf16ps(2, 4, 7);
        if (kTwoRows) _tile_dpbf16ps(3, 5, 7);
      }
    }
  _tile_stored(0, t.sums, 128);
  if (kTwoRows) _tile_stored(1, t.sums + 16 * 32, 128);
  if (kTwoColumns) _tile_stored(2, t.sums + 16, 128);
  if (kTwoRows && kTwoColumns) _tile_stored(3, t.sums + 16 * 32 + 16, 128);
}

void multiply_some(const AmxTile& t, bool two_rows, bool two_columns) {
  if (two_rows) two_columns ? multiply_tiles<true, true>(t) : multiply_tiles<true, false>(t);
  else two_columns ? multiply_tiles<false, true>(t) : multiply_tiles<false, false>(t);
}

void copy_pixel(const uint16_t* from, int64_t count, int64_t padded, uint16_t* to) {
  if (from != nullptr) std::memcpy(to, from, count * 2);
  else count = 0;
  std::memset(to + count, 0, (padded - count) * 2);
}

// Output rows [p0, p1) and columns from q0 on.
struct AmxOutputs {
  int64_t p0, p1, q0;
};

// Lays out the input of some outputs of image n (and the 15 after it, where they are lanes), and of no other rows,
// which may not be there.
void load_tile_planes(const AmxPlan& plan, const ConvCall& call, int64_t n, const AmxOutputs& outputs, uint16_t* to) {
  const ConvShape& s = plan.shape;
  const int64_t channels = s.C / s.groups, lanes = plan.images_in_lanes ? kTileRows : 1;
  const uint16_t* x = static_cast<const uint16_t*>(call.x) + n * call.x_stride_n;
  const int64_t end_h = std::min(s.H, (outputs.p1 - 1) * s.stride_h - s.pad_h + (s.R - 1) * s.dilation_h + 1);
  const int64_t rows = outputs.p1 - outputs.p0 + plan.planes.h.reach;
  const int64_t left_out = (plan.planes.rows - rows) * plan.planes.cols * lanes * s.groups * plan.group_channels;
  for (const int phase_h : plan.planes.h.phases)
    for (size_t w_phase = 0; w_phase < plan.planes.w.phases.size(); ++w_phase, to += left_out)
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t col = 0; col < plan.planes.cols; ++col) {
          const int64_t h = (outputs.p0 + row) * s.stride_h + phase_h - s.pad_h;
          const int64_t w = (outputs.q0 + col) * s.stride_w + plan.planes.w.phases[w_phase] - s.pad_w;
          const bool inside = h >= 0 && h < end_h && w >= 0 && w < s.W;
          for (int64_t lane = 0; lane < lanes; ++lane) {
            const uint16_t* pixel =
                inside ? x + lane * call.x_stride_n + h * call.x_stride_h + w * call.x_stride_w : nullptr;
            for (int64_t g = 0; g < s.groups; ++g, to += plan.group_channels) {
              const bool gathers = pixel != nullptr && !plan.gather.empty();
              copy_pixel(pixel && !gathers ? pixel + g * channels : nullptr, channels, plan.group_channels, to);
              if (gathers)
                gather_cells(reinterpret_cast<const Bf16*>(pixel), plan.gather.data(), plan.inputs,
                             reinterpret_cast<Bf16*>(to));
            }
          }
        }
}

// Where the 16 rows of a group go: element index of the output pixel, or -1 where there is none.
void find_targets(const AmxPlan& plan, const ConvCall& call, int64_t n, const AmxOutputs& outputs, int64_t group,
                  int64_t* target) {
  ConvShape s = plan.shape;
  s.K = plan.outputs;  // of y, the pruned ones included
  for (int64_t lane = 0; lane < kTileRows; ++lane) {
    const int64_t tile_q = plan.planes.tile_q;
    const int64_t flat = group * kTileRows + lane;
    const int64_t row = plan.images_in_lanes ? group / tile_q : flat / plan.planes.cols;
    const int64_t col = plan.images_in_lanes ? group % tile_q : flat % plan.planes.cols;
    const int64_t p = outputs.p0 + row, q = outputs.q0 + col, image = plan.images_in_lanes ? n + lane : n;
    const bool wanted = p < outputs.p1 && col < tile_q && q < s.Q;
    target[lane] = wanted ? call.y_at(s, image, p, q) : -1;
  }
}

// Where the planes have the first row of a group.
const uint16_t* group_base(const AmxPlan& plan, const uint16_t* planes, int64_t group) {
  const int64_t tile_q = plan.planes.tile_q;
  const int64_t first = plan.images_in_lanes ? group / tile_q * plan.planes.cols + group % tile_q : group;
  return planes + first * kTileRows * plan.shape.groups * plan.group_channels;
}

// sums[0] = Σ x · w over all blocks of a row, for 16 or 32 of its output channels from k on. Groups of blocks have sums
// of their own, which pass through sums[1]. x: the bases of one or two groups of 16 rows; the second may be null.
void multiply_blocks(const AmxPlan& plan, int64_t row, int64_t k, bool two_columns, const uint16_t* const (&x)[2],
                     float (&sums)[2][32 * 32]) {
  const int64_t first_block = plan.starts[row], blocks = plan.starts[row + 1] - first_block;
  const int64_t group_blocks = std::max<int64_t>(kAmxSumTerms / plan.bc, 1), block_elements = plan.bk * plan.bc;
  const bool two_rows = x[1] != nullptr;
  AmxTile product{{x[0], x[1]},
                  plan.shape.groups * plan.group_channels * 2,
                  plan.offsets.data() + first_block,
                  plan.weights.data() + first_block * block_elements + k * plan.bc,
                  std::min(blocks, group_blocks),
                  block_elements,
                  plan.bc * 16,
                  plan.bc / plan.step,
                  plan.step,
                  sums[0]};
  multiply_some(product, two_rows, two_columns);
  for (int64_t done = group_blocks; done < blocks; done += group_blocks) {
    product.offsets += group_blocks;
    product.weights += group_blocks * block_elements;
    product.blocks = std::min(blocks - done, group_blocks);
    product.sums = sums[1];
    multiply_some(product, two_rows, two_columns);
    for (int64_t i = 0; i < (two_rows ? 32 : 16) * 32; ++i) sums[0][i] += sums[1][i];
  }
}

// Rows of 32 sums to the output pixels that `target` says.
template <typename Y>
void store_rows(const AmxPlan& plan, const Output<Y>& out, const OutputSpan& span, const float* bias, const float* sums,
                const int64_t* target, int64_t rows, bool streams) {
  for (int64_t i = 0; i < rows; ++i) {
    if (target[i] < 0) continue;
    const int64_t at = target[i] + span.k0;
    if (span.span == span.count) finish_outputs(out, at, sums + i * 32, bias, span.count, streams);
    else scatter_outputs(out, at, sums + i * 32, bias, span.span, plan.keeps.data() + span.first_mask);
  }
}

template <typename Y>
void run_amx_typed(const AmxPlan& plan, const ConvCall& call, int64_t first_image, int64_t images) {
  const ConvShape& s = plan.shape;
  const Planes& planes = plan.planes;
  const int64_t lanes = plan.images_in_lanes ? kTileRows : 1;
  const int64_t pixel_elements = s.groups * plan.group_channels;
  const int64_t plane_elements = planes.pixels() * lanes * pixel_elements;
  const int64_t rows = call.row_count(s), end_row = call.first_row + rows, tile_p = even_tile(rows, planes.tile_p);
  const int64_t flat = (tile_p - 1) * planes.cols + planes.tile_q;
  const int64_t groups = plan.images_in_lanes ? tile_p * planes.tile_q : ceil_div(flat, kTileRows);
  const int64_t tiles_p = ceil_div(rows, tile_p), tiles_q = ceil_div(s.Q, planes.tile_q);
  const int64_t tasks = images / lanes * tiles_p * tiles_q;
  const int64_t block_rows = static_cast<int64_t>(plan.starts.size()) - 1;
  const int64_t parts =
      call.threads == 1 ? 1 : std::clamp<int64_t>(2 * call.threads / std::max<int64_t>(tasks, 1), 1, block_rows);
  const Output<Y> out(call);
  const bool streams = s.N * rows * s.Q * plan.outputs * static_cast<int64_t>(sizeof(Y)) >= kStreamedBytes;
#pragma omp parallel num_threads(call.threads)
  {
    // Sixteen pixels more: the last group of rows may reach past the planes.
    float* memory = thread_scratch((plane_elements + 16 * pixel_elements) / 2 + groups * kTileRows * 2 + 16);
    int64_t* target = reinterpret_cast<int64_t*>(memory);
    uint16_t* x = reinterpret_cast<uint16_t*>(memory + groups * kTileRows * 2);
    alignas(64) float sums[2][32 * 32];
    configure_tiles(plan.step);
    PhaseClock clock(call);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t task = 0; task < tasks * parts; ++task) {
      const int64_t part = task % parts, tile = task / parts;
      const int64_t p0 = call.first_row + tile / tiles_q % tiles_p * tile_p;
      const AmxOutputs outputs{p0, std::min(p0 + tile_p, end_row), tile % tiles_q * planes.tile_q};
      const int64_t n = first_image + tile / (tiles_q * tiles_p) * lanes;
      load_tile_planes(plan, call, n, outputs, x);
      for (int64_t group = 0; group < groups; ++group)
        find_targets(plan, call, n, outputs, group, target + group * kTileRows);
      clock.ends(kLayout);
      for (int64_t row = block_rows * part / parts; row < block_rows * (part + 1) / parts; ++row)
        for (int64_t index = plan.first_span[row]; index < plan.first_span[row + 1]; ++index) {
          const OutputSpan& span = plan.spans[index];
          const int64_t k = 32 * (index - plan.first_span[row]);
          const float* bias = call.bias ? static_cast<const float*>(call.bias) + span.k0 : nullptr;
          for (int64_t group = 0; group < groups; group += 2) {
            const bool two_rows = group + 1 < groups;
            const uint16_t* const base[2] = {group_base(plan, x, group),
                                             two_rows ? group_base(plan, x, group + 1) : nullptr};
            multiply_blocks(plan, row, k, span.count > 16, base, sums);
            clock.ends(kProducts);
            store_rows(plan, out, span, bias, sums[0], target + group * kTileRows, two_rows ? 32 : 16, streams);
            clock.ends(kStores);
          }
        }
    }
    end_streams();
    _tile_release();
  }
}

}  // namespace

void VPNS_RUN_AMX(const AmxPlan& plan, const ConvCall& call, int64_t first_image, int64_t images) {
  with_types(call, [&](auto, auto y) { run_amx_typed<decltype(y)>(plan, call, first_image, images); });
}

namespace {
