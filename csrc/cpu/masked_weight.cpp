#include "cpu/masked_weight.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>

#include "arithmetic.h"
#include "checks.h"
#include "cpu/planes.h"
#include "cpu/sparse_conv2d.h"
#include "cpu/transposed_weights.h"

namespace vpns {
namespace {

// One axis of the weight, within a group: its units' size, its extent in channels, and how far its channels are apart
// in the weight and its units in the mask.
struct Axis {
  int64_t size, extent, weight_stride, mask_stride;
  int64_t units() const { return ceil_div(extent, size); }
};

// A weight as one direction sees it: rows of units, each with columns and taps.
struct View {
  Axis row, column;
  int64_t groups, weight_group, mask_group;  // distances from one group to the next
  std::vector<int64_t> taps;                 // by own tap, the filter's
};

View forward_view(const ConvShape& s, const MaskedWeight& w) {
  const int64_t filters = s.K / s.groups, channels = s.C / s.groups, taps = s.R * s.S;
  const int64_t columns = ceil_div(channels, w.bc), rows = ceil_div(filters, w.bk);
  View view{{w.bk, filters, w.stride_k, columns * taps}, {w.bc, channels, w.stride_c, taps}, s.groups,
            filters * w.stride_k, rows * columns * taps, std::vector<int64_t>(taps)};
  std::iota(view.taps.begin(), view.taps.end(), 0);
  return view;
}

View transposed_view(const ConvShape& s, const MaskedWeight& w, const AxisClass& h, const AxisClass& v) {
  View view = forward_view(s, w);
  std::swap(view.row, view.column);
  view.taps.clear();
  for (int64_t r : h.tap)
    for (int64_t col : v.tap) view.taps.push_back(r * s.S + col);
  return view;
}

inline void put(float* to, float value, DType rounds) {
  if (rounds == DType::kBF16) value = bf16_to_float(float_to_bf16(value));
  if (rounds == DType::kF16) value = static_cast<float>(static_cast<_Float16>(value));
  *to = value;
}
inline void put(uint16_t* to, float value, DType) { *to = float_to_bf16(value); }

// A kept unit [rows][columns] from its first weight on; zeros beyond ragged edges.
template <typename Value>
void copy_block(const float* from, const Axis& row, const Axis& column, int64_t rows, int64_t columns, DType rounds,
                Value* to) {
  if (rows < row.size || columns < column.size) std::fill_n(to, row.size * column.size, Value{});
  // The inner loop reads neighbours.
  if (row.weight_stride < column.weight_stride) {
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t r = 0; r < rows; ++r)
        put(to + r * column.size + c, from[r * row.weight_stride + c * column.weight_stride], rounds);
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c)
        put(to + r * column.size + c, from[r * row.weight_stride + c * column.weight_stride], rounds);
  }
}

template <typename Value>
void allocate(OwnedWeights& packed, int64_t count, int64_t unit) {
  check(count < kSizeLimit, "masked_conv2d", "fewer than 2^31 kept units", count);
  packed.values = std::make_unique_for_overwrite<char[]>(std::max<int64_t>(count * unit, 1) * sizeof(Value));
  packed.index.resize(count);
}

// Blocks: there are few units, whatever the order in which the mask is read.
template <typename Value>
OwnedWeights pack_blocks(const ConvShape& s, const View& view, const MaskedWeight& w, DType rounds, int threads) {
  const std::vector<uint8_t> reaches = reaching_taps(s);
  std::vector<int64_t> own_taps;
  for (size_t tap = 0; tap < view.taps.size(); ++tap)
    if (reaches[view.taps[tap]]) own_taps.push_back(static_cast<int64_t>(tap));
  const int64_t rows = view.groups * view.row.units(), columns = view.column.units();
  const int64_t taps = static_cast<int64_t>(view.taps.size()), unit = view.row.size * view.column.size;
  OwnedWeights packed;
  packed.indptr.assign(rows + 1, 0);
  const auto mask_of = [&](int64_t row) {
    return w.mask + row / view.row.units() * view.mask_group + row % view.row.units() * view.row.mask_stride;
  };
  for (int64_t row = 0; row < rows; ++row) {
    packed.indptr[row + 1] = packed.indptr[row];
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t tap : own_taps)
        packed.indptr[row + 1] += mask_of(row)[c * view.column.mask_stride + view.taps[tap]] != 0;
  }
  allocate<Value>(packed, packed.indptr[rows], unit);
  Value* const values = reinterpret_cast<Value*>(packed.values.get());
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t first = row % view.row.units() * view.row.size;
    const float* from =
        w.weight + row / view.row.units() * view.weight_group + first * view.row.weight_stride;
    int64_t i = packed.indptr[row];
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t tap : own_taps) {
        if (mask_of(row)[c * view.column.mask_stride + view.taps[tap]] == 0) continue;
        const int64_t channel = c * view.column.size;
        packed.index[i] = static_cast<int32_t>(c * taps + tap);
        copy_block(from + channel * view.column.weight_stride + view.taps[tap] * w.stride_tap, view.row, view.column,
                   std::min(view.row.size, view.row.extent - first),
                   std::min(view.column.size, view.column.extent - channel), rounds, values + i * unit);
        ++i;
      }
  }
  return packed;
}

// Calls found(i) with each i below `count` whose byte is not zero, and that `reaches` has not as zero, in rising order.
template <typename Found>
inline void each_kept(const uint8_t* mask, const uint8_t* reaches, int64_t count, const Found& found) {
  int64_t at = 0;
  for (; at + 8 <= count; at += 8) {
    uint64_t bytes, wanted;
    std::memcpy(&bytes, mask + at, sizeof bytes);
    std::memcpy(&wanted, reaches + at, sizeof wanted);
    bytes &= wanted;
    while (bytes != 0) {
      const int byte = std::countr_zero(bytes) / 8;
      found(at + byte);
      bytes &= ~(uint64_t{0xff} << 8 * byte);
    }
  }
  for (; at < count; ++at)
    if ((mask[at] & reaches[at]) != 0) found(at);
}

// Single weights, forward: a row of the mask, as it lies in memory, is a row of the index.
OwnedWeights pack_rows(const ConvShape& s, const MaskedWeight& w, DType rounds, int threads) {
  const int64_t taps = s.R * s.S, row_units = s.C / s.groups * taps;
  OwnedWeights packed;
  packed.indptr.assign(s.K + 1, 0);
  const std::vector<uint8_t> taps_reach = reaching_taps(s);
  std::vector<uint8_t> reaches(row_units);
  for (int64_t i = 0; i < row_units; ++i) reaches[i] = taps_reach[i % taps];
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t k = 0; k < s.K; ++k) {
    int32_t kept = 0;
    for (int64_t i = 0; i < row_units; ++i) kept += (w.mask[k * row_units + i] & reaches[i]) != 0;
    packed.indptr[k + 1] = kept;
  }
  std::partial_sum(packed.indptr.begin(), packed.indptr.end(), packed.indptr.begin());
  allocate<float>(packed, packed.indptr[s.K], 1);
  float* const values = reinterpret_cast<float*>(packed.values.get());
  // Where a row of the weight lies as its mask does, what is kept is found without a table.
  const bool alike = w.stride_tap == 1 && w.stride_c == taps;
  std::vector<int64_t> offset(alike ? 0 : row_units);
  for (size_t i = 0; i < offset.size(); ++i) {
    const int64_t unit = static_cast<int64_t>(i);
    offset[i] = unit / taps * w.stride_c + unit % taps * w.stride_tap;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 8)
  for (int64_t k = 0; k < s.K; ++k) {
    int64_t to = packed.indptr[k];
    const float* const row = w.weight + k * w.stride_k;
    each_kept(w.mask + k * row_units, reaches.data(), row_units, [&](int64_t i) {
      packed.index[to] = static_cast<int32_t>(i);
      put(values + to++, row[alike ? i : offset[i]], rounds);
    });
  }
  return packed;
}

bool is_single(const MaskedWeight& w) { return w.bk == 1 && w.bc == 1; }

OwnedWeights pack_view(const ConvShape& s, const MaskedWeight& w, const View& view, DType dtype, int threads) {
  const bool single = is_single(w), halves = !single && dtype == DType::kBF16;
  OwnedWeights packed = single   ? pack_rows(s, w, dtype, threads)
                        : halves ? pack_blocks<uint16_t>(s, view, w, dtype, threads)
                                 : pack_blocks<float>(s, view, w, dtype, threads);
  packed.view = {single ? Format::kUnstructured : Format::kBlock,
                 halves ? DType::kBF16 : DType::kF32,
                 packed.values.get(),
                 packed.indptr.data(),
                 packed.index.data(),
                 static_cast<int64_t>(packed.index.size()),
                 view.row.size,
                 view.column.size};
  packed.view.threads = threads;
  return packed;
}

}  // namespace

void check_masked_weight(const ConvShape& s, const MaskedWeight& w) {
  check_conv_shape(s);
  check(w.bk >= 1 && w.bc >= 1, "masked_conv2d", "blocks of at least 1 x 1", std::min(w.bk, w.bc));
  check(s.groups == 1 || s.K / s.groups % w.bk == 0, "masked_conv2d", "blocks within a group", w.bk);
}

OwnedWeights pack_masked(const ConvShape& s, const MaskedWeight& w, DType dtype, int threads) {
  return pack_view(s, w, forward_view(s, w), dtype, threads);
}

std::unique_ptr<PreparedConv> prepare_masked(const ConvShape& s, const MaskedWeight& w, DType x_dtype,
                                             const std::string& kernel, int threads) {
  const OwnedWeights packed = pack_masked(s, w, x_dtype, threads);
  return choose_sparse_conv2d(kernel, s, packed.view, x_dtype).prepare(s, packed.view);
}

std::unique_ptr<PreparedConv> prepare_masked_input_gradient(const ConvShape& s, const MaskedWeight& w,
                                                            DType grad_dtype, const std::string& kernel, int threads) {
  // Of single weights the mask, far larger than what it keeps, is read once, whatever the stride.
  const OwnedWeights forward = is_single(w) ? pack_masked(s, w, grad_dtype, threads) : OwnedWeights{};
  const auto transpose_class = [&](const AxisClass& h, const AxisClass& v) {
    if (!is_single(w)) return pack_view(s, w, transposed_view(s, w, h, v), grad_dtype, threads);
    OwnedWeights transposed;
    transposed.layout = std::make_shared<const TransposedWeights>(s, forward.view, h.tap, v.tap);
    transposed.layout->fill(forward.view, transposed, threads);
    transposed.view.threads = threads;
    return transposed;
  };
  return prepare_input_gradient(s, transpose_class, grad_dtype, kernel);
}

}  // namespace vpns
