// Reads plan.bin: a table of values, of steps and of tensors, then names, then the tensors' data.
#include <algorithm>
#include <cstring>

#include "arithmetic.h"
#include "checks.h"
#include "cpu/kernels.h"
#include "runtime/framed.h"
#include "runtime/plan.h"

namespace vpns {
namespace {

const char* const kMe = "plan.bin";
constexpr uint32_t kVersion = 3, kNative = 1, kHasBias = 2, kCountsPadding = 4, kHasConstant = 8;
constexpr int64_t kLastAct = 2;  // codes beyond are curves
constexpr int64_t kHeaderBytes = 96, kValueBytes = 32, kStepBytes = 112, kTensorBytes = 64, kAlignment = 64;
constexpr int64_t kMostImages = 4096;

// A tensor of a step: its extents are below 2^31 each and in product.
struct PlanTensor {
  uint32_t dtype;
  std::vector<int64_t> shape;
  const uint8_t* data;

  int64_t count() const {
    int64_t product = 1;
    for (int64_t extent : shape) product *= extent;
    return product;
  }
};

enum : uint32_t { kFloat32 = 1, kBfloat16 = 2, kFloat64 = 3, kInt32 = 4, kFloat16 = 5 };

class Reader {
 public:
  Reader(const uint8_t* bytes, int64_t size, int64_t segment) : bytes_(bytes), size_(size), segment_(segment) {}

  Plan read() {
    read_header();
    for (int64_t i = 0; i < values_; ++i) read_value(values_start_ + i * kValueBytes);
    read_tensors();
    if (segment_ == kWholePlan) open_input(plan_input_);
    find_segment();
    for (int64_t i = 0; i < begin_; ++i) skip_tensors(steps_start_ + i * kStepBytes);
    for (int64_t i = begin_; i < end_; ++i) read_step(steps_start_ + i * kStepBytes);
    for (int64_t i = end_; i < steps_; ++i) skip_tensors(steps_start_ + i * kStepBytes);
    check(tensors_used_ == tensors_.size(), kMe, "as many tensors as its steps use", tensors_.size());
    if (segment_ == kWholePlan) plan_.outputs = {plan_output_};
    else find_outputs();
    for (uint32_t output : plan_.outputs) check(is_ready(output), kMe, "an output that some step computes", output);
    std::sort(plan_.inputs.begin(), plan_.inputs.end());
    return std::move(plan_);
  }

 private:
  template <typename T>
  T number(int64_t at) const {
    T value;
    std::memcpy(&value, bytes_ + at, sizeof value);
    return value;
  }
  int64_t u32(int64_t at) const { return number<uint32_t>(at); }

  void read_header() {
    check(size_ >= kHeaderBytes, kMe, "at least a header", size_);
    check(std::memcmp(bytes_, "VPNSPLAN", 8) == 0, kMe, "the magic VPNSPLAN", "another");
    if (const int64_t version = u32(8); version != kVersion)
      fail(kMe, "version " + std::to_string(kVersion),
           std::to_string(version) +
               (version > kVersion ? " (newer than this reader)" : " (older: compile and save it again)"));
    steps_ = u32(12);
    const int64_t tensors = u32(16);
    values_ = u32(20);
    check(number<uint64_t>(24) == static_cast<uint64_t>(size_), kMe, "its own size", number<uint64_t>(24));
    steps_start_ = kHeaderBytes;
    values_start_ = steps_start_ + steps_ * kStepBytes;
    tensors_start_ = values_start_ + values_ * kValueBytes;
    names_start_ = tensors_start_ + tensors * kTensorBytes;
    const uint64_t names = number<uint64_t>(64);
    const int64_t starts[] = {steps_start_, values_start_, tensors_start_, names_start_};
    for (int i = 0; i < 4; ++i)
      check(number<uint64_t>(32 + 8 * i) == static_cast<uint64_t>(starts[i]), kMe, "tables without gaps", i);
    check(names <= static_cast<uint64_t>(size_) && names_start_ <= size_ - static_cast<int64_t>(names), kMe,
          "tables within the file", names);
    names_end_ = names_start_ + static_cast<int64_t>(names);
    tensors_.resize(tensors);
    plan_input_ = number<uint32_t>(72);
    plan_output_ = number<uint32_t>(76);
    plan_.chunk = u32(80);
    check(steps_ > 0 && plan_input_ != kNoValue, kMe, "a network, not its layers alone", steps_);
    check(plan_input_ < values_ && plan_output_ < values_, kMe, "an input and an output among its values", values_);
    check(plan_.chunk >= 1 && plan_.chunk <= kMostImages, kMe, "1 to 4096 images at a time", plan_.chunk);
    ready_.assign(values_, 0);
  }

  void read_value(int64_t at) {
    const PlanValue value{u32(at), u32(at + 4), u32(at + 8), float_type(u32(at + 12))};
    for (int64_t extent : {value.channels, value.height, value.width})
      check(extent >= 1 && extent < kSizeLimit, kMe, "activations of at least one entry", extent);
    check(value.channels * value.height < kSizeLimit && value.elements() < kSizeLimit, kMe,
          "activations of fewer than 2^31 entries", value.channels);
    plan_.values.push_back(value);
  }

  void open_input(uint32_t value) {
    ready_[value] = plan_.values[value].channels;
    plan_.inputs.push_back(value);
  }
  bool is_input(uint32_t value) const {
    return std::find(plan_.inputs.begin(), plan_.inputs.end(), value) != plan_.inputs.end();
  }

  // Which steps are wanted: all, or those of one segment.
  void find_segment() {
    const auto is_native = [&](int64_t i) { return (u32(steps_start_ + i * kStepBytes + 28) & kNative) != 0; };
    begin_ = 0, end_ = steps_;
    if (segment_ == kWholePlan) {
      for (int64_t i = 0; i < steps_; ++i)
        if (!is_native(i))
          fail(kMe, "steps that run without torch",
               "layer " + text(steps_start_ + i * kStepBytes) + ", which needs it");
      return;
    }
    int64_t found = -1;
    for (int64_t i = 0; i < steps_; ++i) {
      if (is_native(i) && (i == 0 || !is_native(i - 1)) && ++found == segment_) begin_ = i;
      if (found == segment_ && !is_native(i)) {
        end_ = i;
        break;
      }
    }
    check(segment_ >= 0 && found >= segment_, kMe, "a segment that is there", segment_);
  }

  // What others read of this segment.
  void find_outputs() {
    std::vector<bool> wanted(values_, false);
    wanted[plan_output_] = true;
    for (int64_t i = 0; i < steps_; ++i) {
      if (i >= begin_ && i < end_) continue;
      for (int64_t place : {40, 44}) {
        const int64_t value = u32(steps_start_ + i * kStepBytes + place);
        if (value < values_) wanted[value] = true;
      }
    }
    for (const PlanStep& step : plan_.steps) {
      if (wanted[step.output]) plan_.outputs.push_back(step.output);
      wanted[step.output] = false;
    }
    std::sort(plan_.outputs.begin(), plan_.outputs.end());
  }

  void skip_tensors(int64_t at) {
    check(u32(at + 32) == static_cast<int64_t>(tensors_used_), kMe, "tensors in the order of the steps", u32(at + 32));
    for (int64_t left = u32(at + 36); left > 0; --left) take();
  }

  static DType float_type(int64_t code) {
    if (code == kFloat32) return DType::kF32;
    check(code == kBfloat16 || code == kFloat16, kMe, "float32, bfloat16 or float16", code);
    return code == kBfloat16 ? DType::kBF16 : DType::kF16;
  }

  void read_tensors() {
    int64_t place = names_end_;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const int64_t at = tensors_start_ + static_cast<int64_t>(i) * kTensorBytes;
      PlanTensor& tensor = tensors_[i];
      tensor.dtype = number<uint32_t>(at + 8);
      const int64_t rank = u32(at + 12);
      check(rank <= 4 && tensor.dtype >= kFloat32 && tensor.dtype <= kFloat16, kMe, "a rank of at most 4", rank);
      int64_t count = 1;
      for (int64_t axis = 0; axis < rank; ++axis) {
        const uint64_t extent = number<uint64_t>(at + 16 + 8 * axis);
        check(extent < static_cast<uint64_t>(kSizeLimit), kMe, "extents below 2^31", extent);
        tensor.shape.push_back(static_cast<int64_t>(extent));
        count *= static_cast<int64_t>(extent);
        check(count < kSizeLimit, kMe, "tensors of fewer than 2^31 entries", count);
      }
      const int64_t item = tensor.dtype == kFloat64 ? 8 : tensor.dtype == kFloat32 || tensor.dtype == kInt32 ? 4 : 2;
      place = round_up(place, kAlignment);
      check(number<uint64_t>(at + 48) == static_cast<uint64_t>(place), kMe, "tensors without gaps", place);
      check(number<uint64_t>(at + 56) == static_cast<uint64_t>(count * item), kMe, "a size that fits its shape", count);
      check(count * item <= size_ - place, kMe, "tensors within the file", place);
      tensor.data = bytes_ + place;
      place += count * item;
    }
    check(place == size_ || (tensors_.empty() && size_ == names_end_), kMe, "nothing behind its last tensor", size_);
  }

  std::string text(int64_t at) const {
    const int64_t offset = u32(at), length = u32(at + 4), names = names_end_ - names_start_;
    check(offset <= names && length <= names - offset, kMe, "names within their table", offset);
    return {reinterpret_cast<const char*>(bytes_ + names_start_ + offset), static_cast<size_t>(length)};
  }

  void read_step(int64_t at) {
    PlanStep step{};
    step.name = text(at);
    text(at + 8);  // the pattern, for people: the weights' shape tells the format
    step.kernel = text(at + 16);
    const int64_t op = u32(at + 24), flags = u32(at + 28), count = u32(at + 36);
    check(op < static_cast<int64_t>(PlanOp::kCount), kMe, "an op that is known", op);
    check(flags < 16, kMe, "flags that are known", flags);
    step.op = static_cast<PlanOp>(op);
    check(step.op != PlanOp::kTorch, kMe, "steps that run without torch", step.name);
    step.counts_padding = (flags & kCountsPadding) != 0;
    step.x = number<uint32_t>(at + 40);
    step.residual = number<uint32_t>(at + 44);
    step.output = number<uint32_t>(at + 48);
    step.first_channel = u32(at + 52);
    const int64_t act = u32(at + 56);
    check(act < kLastAct + static_cast<int64_t>(Curve::kCount), kMe, "an activation that is known", act);
    step.act = act <= kLastAct ? static_cast<Act>(act) : Act::kNone;
    step.curve = act <= kLastAct ? Curve::kNone : static_cast<Curve>(act - kLastAct);
    step.read_channel = u32(at + 104);
    step.strip_steps = u32(at + 108);
    check(step.read_channel == 0 || step.op == PlanOp::kCopy, kMe, "all channels read of such an op", step.name);
    check(u32(at + 32) == static_cast<int64_t>(tensors_used_), kMe, "tensors in the order of the steps", u32(at + 32));
    if (segment_ != kWholePlan)
      for (uint32_t value : {step.x, step.residual})
        if (value < values_ && ready_[value] == 0) open_input(value);
    check(is_ready(step.x), kMe, "an input that was computed before", step.name);
    check(step.output < values_ && !is_input(step.output) && step.output != step.x, kMe, "an output of its own",
          step.name);
    read_shape(step, at + 60);
    check_values(step);
    const bool has_constant = (flags & kHasConstant) != 0;
    if (step.op == PlanOp::kConv2d || step.op == PlanOp::kLinear) {
      if (has_constant) find_window(step);
      read_weights(step, count - has_constant, (flags & kHasBias) != 0);
      if (has_constant) read_constant(step);
    } else {
      check(count == 0 && (flags & (kHasBias | kHasConstant)) == 0, kMe, "no weights of such an op", step.name);
    }
    plan_.steps.push_back(std::move(step));
  }

  void read_shape(PlanStep& step, int64_t at) {
    const PlanValue &x = plan_.values[step.x], &y = plan_.values[step.output];
    ConvShape& s = step.shape;
    s.N = 1;
    s.C = u32(at), s.K = u32(at + 4), s.R = u32(at + 8), s.S = u32(at + 12);
    s.stride_h = u32(at + 16), s.stride_w = u32(at + 20), s.pad_h = u32(at + 24), s.pad_w = u32(at + 28);
    s.dilation_h = u32(at + 32), s.dilation_w = u32(at + 36), s.groups = u32(at + 40);
    s.H = x.height, s.W = x.width, s.P = y.height, s.Q = y.width;
    for (int64_t number : {s.C, s.K, s.R, s.S, s.stride_h, s.stride_w, s.pad_h, s.pad_w, s.dilation_h, s.dilation_w,
                           s.groups})
      check(number < kSizeLimit, kMe, "sizes below 2^31", number);
    check_conv_shape(s);
    check(s.C == x.channels, kMe, "an input of its channels", step.name);
  }

  // Sizes and types of what a step reads and writes.
  void check_values(const PlanStep& step) {
    const ConvShape& s = step.shape;
    const PlanValue &x = plan_.values[step.x], &y = plan_.values[step.output];
    const bool is_conv = step.op == PlanOp::kConv2d || step.op == PlanOp::kLinear;
    const bool is_window = is_conv || step.op == PlanOp::kMaxPool || step.op == PlanOp::kAvgPool;
    if (is_window) {
      const auto fits = [](int64_t in, int64_t pad, int64_t reach, int64_t stride, int64_t out) {
        const int64_t room = in + 2 * pad - reach;
        return room >= 0 && (out == room / stride + 1 || out == ceil_div(room, stride) + 1);
      };
      const int64_t reach_h = s.dilation_h * (s.R - 1) + 1, reach_w = s.dilation_w * (s.S - 1) + 1;
      check(fits(s.H, s.pad_h, reach_h, s.stride_h, s.P) && fits(s.W, s.pad_w, reach_w, s.stride_w, s.Q), kMe,
            "an output of the size that its windows give", step.name);
      if (!is_conv) check(2 * s.pad_h <= reach_h && 2 * s.pad_w <= reach_w, kMe, "padding of half a window", step.name);
    } else if (step.op == PlanOp::kFlatten) {
      check(y.channels == x.elements() && s.P * s.Q == 1, kMe, "an output of one pixel with all that was read",
            step.name);
    } else if (step.op != PlanOp::kAdaptiveAvgPool) {
      check(s.P == s.H && s.Q == s.W, kMe, "an output of the input's size", step.name);
    }
    if (step.op == PlanOp::kCopy)
      check(step.read_channel + s.K <= s.C, kMe, "channels of its input", step.name);
    else check(is_conv || s.K == s.C, kMe, "as many output as input channels", step.name);
    if (step.op == PlanOp::kGate || step.op == PlanOp::kShuffle)
      check(step.first_channel == 0 && s.K == y.channels && step.act == Act::kNone, kMe, "an output like its input",
            step.name);
    check(is_conv || x.dtype == y.dtype, kMe, "one type in and out", step.name);
    const int64_t written = step.op == PlanOp::kFlatten ? y.channels : s.K;
    check(step.first_channel + written <= y.channels, kMe, "outputs within their value", step.name);
    // Channels of one value come in order, so that none is read before it is written.
    check(ready_[step.output] == step.first_channel, kMe, "output channels in order", step.name);
    ready_[step.output] += written;
    const bool is_gate = step.op == PlanOp::kGate;
    check(!is_gate || step.residual != kNoValue, kMe, "a gate", step.name);
    if (step.residual == kNoValue) return;
    check(is_conv || is_gate || step.op == PlanOp::kAdd, kMe, "no residual of such an op", step.name);
    check(step.residual != step.output && is_ready(step.residual), kMe, "a residual computed before", step.name);
    const PlanValue& r = plan_.values[step.residual];
    if (is_gate && r.channels == y.channels && r.height * r.width == 1 && r.dtype == y.dtype) return;
    const bool is_like = r.channels == y.channels && r.height == y.height && r.width == y.width && r.dtype == y.dtype;
    check(is_like && step.first_channel == 0 && s.K == y.channels, kMe, "a residual like its output", step.name);
  }

  bool is_ready(uint32_t value) const { return value < values_ && ready_[value] == plan_.values[value].channels; }

  void read_weights(PlanStep& step, int64_t count, bool has_bias) {
    const PlanTensor& values = take();
    const size_t rank = values.shape.size();
    check(rank == 1 || rank == 3 || rank == 4, kMe, "values of 1, 3 or 4 dimensions", step.name);
    check(count == (rank == 4 ? 3 : 6) + (has_bias ? 1 : 0), kMe, "the tensors of its format", step.name);
    SparseWeights& w = step.weights;
    w.format = rank == 1 ? Format::kUnstructured : rank == 3 ? Format::kBlock : Format::kChannel;
    w.dtype = float_type(values.dtype);
    w.values = values.data;
    w.count = values.shape[0];
    w.bk = rank == 3 ? values.shape[1] : 1;
    w.bc = rank == 3 ? values.shape[2] : 1;
    const PlanTensor &first = take(), &second = take();
    w.indptr = indices(first);
    w.index = indices(second);
    const ConvShape& s = step.shape;
    if (rank == 4) {
      w.columns = values.shape[1];
      check(first.count() == w.count && second.count() == w.columns && values.shape[2] == s.R && values.shape[3] == s.S,
            kMe, "lists of its kept channels", step.name);
    } else {
      const int64_t rows = s.groups * ceil_div(s.K / s.groups, w.bk);
      check(first.count() == rows + 1 && second.count() == w.count, kMe, "an index of its rows", step.name);
      for (int part = 0; part < 3; ++part) take();  // the transposed index serves training
    }
    check_sparse_conv2d(s, w);
    if (!has_bias) return;
    const PlanTensor& bias = take();
    check(bias.dtype == kFloat32 && bias.shape.size() == 1 && bias.shape[0] == s.K, kMe, "a float32 bias", step.name);
    step.bias = reinterpret_cast<const float*>(bias.data);
  }

  // Of a step with a constant: its shape becomes that of the outputs that see images.
  void find_window(PlanStep& step) {
    ConvShape& s = step.shape;
    check(step.residual == kNoValue && step.first_channel == 0 && s.K == plan_.values[step.output].channels, kMe,
          "a constant in the place of a residual", step.name);
    const SeenSpan h = seen_span(s.H, s.P, s.R, s.stride_h, s.pad_h, s.dilation_h);
    const SeenSpan w = seen_span(s.W, s.Q, s.S, s.stride_w, s.pad_w, s.dilation_w);
    check(h.begin < h.end && w.begin < w.end, kMe, "outputs that see images", step.name);
    step.first_p = h.begin, step.first_q = w.begin;
    s.pad_h -= h.begin * s.stride_h, s.pad_w -= w.begin * s.stride_w;
    s.P = h.end - h.begin, s.Q = w.end - w.begin;
  }

  void read_constant(PlanStep& step) {
    const PlanTensor& constant = take();
    const PlanValue& y = plan_.values[step.output];
    const std::vector<int64_t> shape{y.height, y.width, y.channels};
    const bool is_like = float_type(constant.dtype) == y.dtype && constant.shape == shape;
    check(is_like, kMe, "a constant like its output", step.name);
    step.constant = constant.data;
  }

  const PlanTensor& take() {
    check(tensors_used_ < tensors_.size(), kMe, "a tensor more", tensors_used_);
    return tensors_[tensors_used_++];
  }

  static const int32_t* indices(const PlanTensor& tensor) {
    check(tensor.dtype == kInt32 && tensor.shape.size() == 1, kMe, "a list of int32", tensor.shape.size());
    return reinterpret_cast<const int32_t*>(tensor.data);
  }

  const uint8_t* bytes_;
  int64_t size_, segment_;
  int64_t begin_ = 0, end_ = 0;  // steps that are wanted
  uint32_t plan_input_ = kNoValue, plan_output_ = kNoValue;
  int64_t steps_ = 0, values_ = 0;
  int64_t steps_start_ = 0, values_start_ = 0, tensors_start_ = 0, names_start_ = 0, names_end_ = 0;
  std::vector<PlanTensor> tensors_;
  size_t tensors_used_ = 0;
  std::vector<int64_t> ready_;  // channels of each value that are computed
  Plan plan_{};
};

}  // namespace

Plan read_plan(const uint8_t* bytes, int64_t size, int64_t segment) { return Reader(bytes, size, segment).read(); }

}  // namespace vpns
