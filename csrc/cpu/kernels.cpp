#include "cpu/kernels.h"

#include "arithmetic.h"
#include "checks.h"
#include "cpu/sparse_conv2d.h"

namespace vpns {

const std::vector<SparseConvKernel>& sparse_conv2d_kernels() {
  static const std::vector<SparseConvKernel> table = [] {
    std::vector<SparseConvKernel> rows;
    add_depthwise_kernels(rows);
    add_grouped_kernels(rows);
    add_amx_kernels(rows);
    add_block_kernels(rows);
    add_unstructured_kernels(rows);
    add_scalar_kernels(rows);
    return rows;
  }();
  return table;
}

static std::string why_not_here(const SparseConvKernel& kernel, const ConvShape& shape, const SparseWeights& weights,
                                DType x_dtype) {
  return isa_usable(kernel.isa) ? kernel.why_not(shape, weights, x_dtype)
                                : std::string("it needs ") + isa_name(kernel.isa);
}

const SparseConvKernel& choose_sparse_conv2d(const std::string& name, const ConvShape& shape,
                                             const SparseWeights& weights, DType x_dtype) {
  std::string reasons;
  for (const SparseConvKernel& kernel : sparse_conv2d_kernels()) {
    if (name.empty() ? kernel.emulated : name != kernel.name) continue;
    const std::string reason = why_not_here(kernel, shape, weights, x_dtype);
    if (reason.empty()) return kernel;
    reasons += std::string(reasons.empty() ? "" : "; ") + kernel.name + ": " + reason;
  }
  fail("sparse_conv2d", "a kernel that takes this layer", reasons.empty() ? "no kernel named '" + name + "'" : reasons);
}

std::vector<std::pair<std::string, std::string>> sparse_conv2d_refusals(const ConvShape& shape,
                                                                        const SparseWeights& weights, DType x_dtype) {
  std::vector<std::pair<std::string, std::string>> found;
  for (const SparseConvKernel& kernel : sparse_conv2d_kernels())
    if (!kernel.emulated) found.emplace_back(kernel.name, why_not_here(kernel, shape, weights, x_dtype));
  return found;
}

void check_conv_shape(const ConvShape& s) {
  const char* me = "sparse_conv2d";
  for (int64_t size : {s.C, s.H, s.W, s.K, s.R, s.S, s.P, s.Q, s.stride_h, s.stride_w, s.dilation_h, s.dilation_w,
                       s.groups})
    check(size >= 1 && size < kSizeLimit, me, "sizes of at least 1 and below 2^31", size);
  check(s.N >= 0 && s.pad_h >= 0 && s.pad_w >= 0, me, "a batch and padding of at least 0", s.N);
  check(s.C % s.groups == 0 && s.K % s.groups == 0, me, "channels divisible by groups", s.groups);
}

void check_sparse_conv2d(const ConvShape& s, const SparseWeights& w) {
  const char* me = "sparse_conv2d";
  check_conv_shape(s);
  for (int64_t size : {w.bk, w.bc})
    check(size >= 1 && size < kSizeLimit, me, "blocks of at least 1 x 1 and below 2^31", size);
  const int64_t filters = s.K / s.groups, channels = s.C / s.groups;
  if (w.format == Format::kChannel) {
    check(s.groups == 1, me, "channel weights without groups", s.groups);
    const auto check_list = [me](const int32_t* list, int64_t count, int64_t limit) {
      for (int64_t i = 0; i < count; ++i) {
        check(list[i] >= 0 && list[i] < limit, me, "channels inside the layer", list[i]);
        check(i == 0 || list[i - 1] < list[i], me, "strictly ascending channels", list[i]);
      }
    };
    check_list(w.indptr, w.count, s.K);
    return check_list(w.index, w.columns, s.C);
  }
  check(s.groups == 1 || filters % w.bk == 0, me, "blocks within a group", w.bk);
  const int64_t rows = s.groups * ceil_div(filters, w.bk);
  const int64_t columns = ceil_div(channels, w.bc) * s.R * s.S;
  check(w.indptr[0] == 0 && w.indptr[rows] == w.count, me, "row pointers from 0 to the count", w.indptr[rows]);
  for (int64_t row = 0; row < rows; ++row) {
    check(w.indptr[row] <= w.indptr[row + 1], me, "ascending row pointers", w.indptr[row + 1]);
    check(w.indptr[row + 1] <= w.count, me, "row pointers up to the count", w.indptr[row + 1]);
    for (int32_t i = w.indptr[row]; i < w.indptr[row + 1]; ++i) {
      check(w.index[i] >= 0 && w.index[i] < columns, me, "indices inside the weight", w.index[i]);
      check(i == w.indptr[row] || w.index[i - 1] < w.index[i], me, "strictly ascending indices in a row", w.index[i]);
    }
  }
}

}  // namespace vpns
