// Prepares block and channel weights: planes, strips of output channels, runs of neighbouring inputs, weights in words.
#include <algorithm>
#include <bit>
#include <numeric>

#include "arithmetic.h"
#include "cpu/planes.h"
#include "cpu/sparse_conv2d.h"
#include "cpu/sparse_conv2d_block.h"

namespace vpns {
namespace {

// Neighbouring channels of one tap, all of which a strip keeps.
struct Piece {
  int64_t r, s, c, channels;
  int64_t source;  // index of the weight of the strip's first output and the first of these channels
};

// Where a strip finds the weight of one of its outputs and one channel of a piece, from the piece's source on.
struct WeightStrides {
  int64_t output, channel;
};

constexpr int64_t kNoWeight = -1;

float as_float(float value) { return value; }
float as_float(Bf16 value) { return bf16_to_float(value.bits); }
float as_float(Fp16 value) { return fp16_to_float(value.bits); }

// So many words of weights are put in order by several threads.
constexpr int64_t kLeastSharedWords = 64 * 1024;

// What the stores of a strip cost, in words of weights for each of its vectors.
constexpr int64_t kStripCost = 16;

// Input channels that channel weights take at a time, so that the planes of a few pixels stay in the first-level cache.
constexpr int64_t kChannelChunk = 64;

// Output pixels that a piece should have: whole register tiles, and some use of each weight.
constexpr int64_t kLeastPixels = 48;

// Of the planes for so many output rows of an image.
int64_t plane_bytes(const BlockPlan& plan, int64_t rows) {
  return plan.h.extent(rows) * plan.cols * plan.shape.groups * plan.group_cells * plan.cell_bytes;
}

class Planner {
 public:
  Planner(const ConvShape& s, const SparseWeights& weights, int64_t lanes, bool pairs, int64_t channels, int64_t bc)
      : weights_(weights), lanes_(lanes), pairs_(pairs) {
    // A last channel that is alone in its block needs a partner in its word.
    const bool alone = pairs && channels % bc == (bc == 1 ? 0 : 1);
    plan_.shape = s;
    plan_.cell_bytes = pairs ? 2 : 4;
    plan_.h = make_block_axis(s.R, s.stride_h, s.dilation_h);
    plan_.w = make_block_axis(s.S, s.stride_w, s.dilation_w);
    plan_.group_cells = std::max<int64_t>(channels + alone, 1);
    plan_.may_read_in_place = s.R * s.S == 1 && s.pad_h == 0 && s.pad_w == 0 && !alone && s.groups * channels == s.C &&
                              (s.P - 1) * s.stride_h < s.H && (s.Q - 1) * s.stride_w < s.W;
    set_tile();
  }

  // A strip of outputs of group g.
  void add(const BlockStrip& outputs, int64_t g, const std::vector<Piece>& pieces, WeightStrides strides) {
    BlockStrip strip = outputs;
    strip.first_group = static_cast<int64_t>(plan_.groups.size());
    begin_group();
    fills_.push_back({static_cast<int64_t>(words_.size()), weights_size_, strip.word_vectors() * lanes_, strip.count,
                      strides.output});
    const int64_t pixel = plan_.shape.groups * plan_.group_cells;
    for (size_t i = 0; i < pieces.size();) {
      const auto offset_of = [&](const Piece& p) {
        return (p.r * plan_.h.distance * plan_.cols + p.s * plan_.w.distance) * pixel + g * plan_.group_cells + p.c;
      };
      const int64_t offset = offset_of(pieces[i]);
      std::vector<int64_t> sources;  // by cell
      for (; i < pieces.size() && offset_of(pieces[i]) == offset + static_cast<int64_t>(sources.size()); ++i)
        for (int64_t c = 0; c < pieces[i].channels; ++c)
          sources.push_back(pieces[i].source + c * strides.channel);
      add_run(strip, offset, sources);
    }
    strip.groups = static_cast<int64_t>(plan_.groups.size()) - strip.first_group;
    int64_t words = 0;
    for (int64_t i = 0; i < strip.groups; ++i) words += plan_.groups[strip.first_group + i].words;
    if (goes_on(strip)) {
      BlockStrip& before = plan_.strips.back();
      for (int64_t i = 0; i < strip.groups; ++i) plan_.groups[strip.first_group + i].vector = 1;
      before.groups += strip.groups;
      before.span = before.count += strip.count;
      last_cost_ += words;
      return;
    }
    plan_.cost.push_back((plan_.cost.empty() ? 0 : plan_.cost.back()) + last_cost_);
    last_cost_ = strip.word_vectors() * (kStripCost + words);
    plan_.strips.push_back(strip);
  }

  BlockPlan finish() {
    plan_.cost.push_back((plan_.cost.empty() ? 0 : plan_.cost.back()) + last_cost_);
    if (weights_.dtype == DType::kBF16) fill<Bf16>();
    else if (weights_.dtype == DType::kF16) fill<Fp16>();
    else fill<float>();
    return std::move(plan_);
  }

  BlockPlan& plan() { return plan_; }

 private:
  void set_tile() {
    const ConvShape& s = plan_.shape;
    plan_.tile_p = s.P;
    plan_.tile_q = s.Q;
    const auto bytes = [&] {
      plan_.cols = plan_.w.extent(plan_.tile_q);
      return plane_bytes(plan_, plan_.tile_p);
    };
    while (bytes() > kBlockPlaneBytes && plan_.tile_p > 1) plan_.tile_p = even_tile(s.P, plan_.tile_p - 1);
    while (bytes() > kBlockPlaneBytes && plan_.tile_q > 16) plan_.tile_q = even_tile(s.Q, plan_.tile_q - 1);
  }

  // Whether a strip of one vector can be the second vector of the strip before it.
  bool goes_on(const BlockStrip& strip) const {
    if (plan_.strips.empty() || strip.vectors > 0 || strip.span != strip.count) return false;
    const BlockStrip& before = plan_.strips.back();
    return before.vectors == 0 && before.count == lanes_ && before.span == lanes_ && before.k0 + lanes_ == strip.k0;
  }

  static int64_t most_words(const BlockStrip& strip) { return strip.vectors > 0 ? kWideGroupWords : kGroupWords; }

  void begin_group() {
    plan_.groups.push_back(
        {static_cast<int64_t>(plan_.runs.size()), 0, 0, weights_size_});
  }

  // A run of words that are added next.
  void begin_run(const BlockStrip& strip, int64_t offset, int64_t words) {
    if (plan_.groups.back().words > 0 && plan_.groups.back().words + words > most_words(strip)) begin_group();
    plan_.runs.push_back({offset, 0});
    ++plan_.groups.back().runs;
  }

  // Words of weights for the cells from `offset` on. Of an odd number, the last shares its word with the one before it,
  // half of whose weight is in either word: a zero would make a NaN of its infinity, a stranger would bring in its own.
  void add_run(const BlockStrip& strip, int64_t offset, std::vector<int64_t>& sources) {
    int64_t cells = static_cast<int64_t>(sources.size());
    if (!pairs_) {
      begin_run(strip, offset, cells);
      for (int64_t source : sources) add_word(strip, kNoWeight, source);
      return;
    }
    if (cells == 1) {  // The planes have a zero beside it.
      sources.push_back(kNoWeight);
      cells = 2;
    }
    const bool odd = cells % 2 != 0, fits = ceil_div(cells, 2) <= most_words(strip);
    begin_run(strip, offset, fits ? ceil_div(cells, 2) : cells / 2);
    for (int64_t i = 0; i + 1 < cells; i += 2)
      add_word(strip, sources[i], sources[i + 1], 1.0f, odd && i + 3 == cells ? 0.5f : 1.0f);
    if (!odd) return;
    if (fits) plan_.runs.back().shared = 1;
    else begin_run(strip, offset + cells - 2, 1);
    add_word(strip, sources[cells - 2], sources[cells - 1], 0.5f);
  }

  void add_word(const BlockStrip& strip, int64_t low, int64_t high, float low_share = 1.0f, float high_share = 1.0f) {
    if (plan_.groups.back().words == most_words(strip)) {  // a long run goes on in the next group
      const BlockRun full = plan_.runs.back();
      begin_run(strip, full.offset + full.words * (pairs_ ? 2 : 1), 1);
    }
    ++plan_.runs.back().words;
    ++plan_.groups.back().words;
    words_.push_back({low, high, low_share, high_share});
    weights_size_ += strip.word_vectors() * lanes_;
  }

  // A strip's words, in the order in which they were added.
  struct Fill {
    int64_t first_word, weights;  // of words_, of plan_.weights
    int64_t width, outputs, stride;
  };

  // Writes the words of the strips' weights. Their sources lie side by side from word to word or from output to output:
  // a few words and all outputs at a time touch few cache lines of either.
  template <typename Value>
  void fill() {
    constexpr int64_t kWords = 32;
    plan_.weights.resize(weights_size_);
    const Value* const values = static_cast<const Value*>(weights_.values);
    const int64_t count = static_cast<int64_t>(fills_.size());
#pragma omp parallel for num_threads(weights_.threads) schedule(dynamic, 1) if (weights_size_ > kLeastSharedWords)
    for (int64_t i = 0; i < count; ++i) {
      const Fill& strip = fills_[i];
      const int64_t end = i + 1 < count ? fills_[i + 1].first_word : static_cast<int64_t>(words_.size());
      for (int64_t word = strip.first_word; word < end; word += kWords) {
        const int64_t last = std::min(word + kWords, end);
        for (int64_t k = 0; k < strip.outputs; ++k) {
          uint32_t* to = plan_.weights.data() + strip.weights + (word - strip.first_word) * strip.width + k;
          for (int64_t j = word; j < last; ++j, to += strip.width) *to = word_bits(values, words_[j], k * strip.stride);
        }
      }
    }
  }

  struct Word {
    int64_t low, high;  // where its weights lie, or kNoWeight
    float low_share, high_share;
  };

  // The high half of a float is its bf16, so one rule serves both types: low | high.
  template <typename Value>
  static uint32_t word_bits(const Value* values, const Word& word, int64_t at) {
    const uint32_t high =
        word.high == kNoWeight ? 0u : std::bit_cast<uint32_t>(word.high_share * as_float(values[word.high + at]));
    if (word.low == kNoWeight) return high;
    return std::bit_cast<uint32_t>(word.low_share * as_float(values[word.low + at])) >> 16 | high;
  }

  const SparseWeights& weights_;
  int64_t lanes_;
  bool pairs_;
  int64_t last_cost_ = 0;
  std::vector<Word> words_;
  std::vector<Fill> fills_;
  int64_t weights_size_ = 0;
  BlockPlan plan_{};
};

BlockPlan plan_blocks(const ConvShape& s, const SparseWeights& weights, int64_t lanes, bool pairs) {
  const int64_t channels = s.C / s.groups, filters = s.K / s.groups, taps = s.R * s.S;
  // A stem has fewer channels than a block.
  const int64_t bc = std::min(weights.bc, channels), bk = weights.bk;
  Planner planner(s, weights, lanes, pairs, channels, bc);
  const int64_t rows_per_group = ceil_div(filters, bk);
  for (int64_t row = 0; row < s.groups * rows_per_group; ++row) {
    const int64_t g = row / rows_per_group, in_group = row % rows_per_group * bk;
    for (int64_t k = 0; k < std::min(bk, filters - in_group); k += 2 * lanes) {
      std::vector<Piece> pieces;
      for (int32_t i = weights.indptr[row]; i < weights.indptr[row + 1]; ++i) {
        const int64_t c = weights.index[i] / taps * bc, tap = weights.index[i] % taps;
        pieces.push_back({tap / s.S, tap % s.S, c, std::min(bc, channels - c), (i * bk + k) * weights.bc});
      }
      const int64_t count = std::min({2 * lanes, bk - k, filters - in_group - k});
      const OutputSpan span{g * filters + in_group + k, count, count, 0};
      planner.add({span, count > lanes ? 2 : 0}, g, pieces, {weights.bc, 1});
    }
  }
  return planner.finish();
}

// How many sums each strip of channel weights has: whole vectors, in as few strips as take up to three.
std::vector<int64_t> strip_sums(int64_t outputs, int64_t lanes) {
  const int64_t vectors = std::max<int64_t>(ceil_div(outputs, lanes), 1), strips = ceil_div(vectors, 3);
  std::vector<int64_t> sums;
  for (int64_t i = 0; i < strips; ++i)
    sums.push_back((vectors * (i + 1) / strips - vectors * i / strips) * lanes);
  return sums;
}

BlockPlan plan_channels(const ConvShape& s, const SparseWeights& weights, int64_t lanes, bool pairs) {
  const int64_t columns = weights.columns, taps = s.R * s.S;
  const int64_t chunk = columns > 2 * kChannelChunk ? kChannelChunk : std::max<int64_t>(columns, 1);
  Planner planner(s, weights, lanes, pairs, columns, chunk);
  BlockPlan& plan = planner.plan();
  plan.gather = kept_inputs(s, weights);
  int64_t first = 0;  // of the span's kept outputs
  for (const OutputSpan& span : kept_outputs(s, weights, strip_sums(weights.count, lanes), plan.keeps)) {
    std::vector<Piece> pieces;
    for (int64_t c = 0; c < columns && span.count > 0; c += chunk)
      for (int64_t tap = 0; tap < taps; ++tap)
        pieces.push_back({tap / s.S, tap % s.S, c, std::min(chunk, columns - c), (first * columns + c) * taps + tap});
    const int64_t vectors = ceil_div(span.count, lanes);
    planner.add({span, vectors > 1 ? vectors : 0}, 0, pieces, {columns * taps, taps});
    first += span.count;
  }
  return planner.finish();
}

}  // namespace

BlockAxis make_block_axis(int64_t taps, int64_t stride, int64_t dilation) {
  const int64_t skip = taps == 1 ? stride : std::gcd(stride, dilation);
  return {skip, stride / skip, taps == 1 ? 1 : dilation / skip, taps};
}

BlockPlan make_block_plan(const ConvShape& s, const SparseWeights& weights, int64_t lanes, bool pairs) {
  return weights.format == Format::kBlock ? plan_blocks(s, weights, lanes, pairs)
                                          : plan_channels(s, weights, lanes, pairs);
}

BlockTasks cut_tasks(const BlockPlan& plan, const ConvCall& call) {
  const ConvShape& s = plan.shape;
  const int64_t images = call.batch(s), rows = call.row_count(s), threads = call.threads;
  BlockTasks cut{images, ceil_div(rows, plan.tile_p), ceil_div(s.Q, plan.tile_q), 0, 1};
  if (cut.pieces() == 0) return cut;
  if (cut.tiles_p * cut.tiles_q == 1) {
    // Small images share a piece, for whole register tiles and longer use of each weight.
    const int64_t room = std::max<int64_t>(kBlockPlaneBytes / plane_bytes(plan, rows), 1);
    const int64_t wanted = std::max(ceil_div(images, 2 * threads), ceil_div(kLeastPixels, rows * s.Q));
    cut.groups = ceil_div(images, std::clamp<int64_t>(wanted, 1, room));
    if (cut.groups > threads) cut.groups = std::min(images, ceil_div(cut.groups, threads) * threads);
  }
  cut.whole = cut.pieces();
  const int64_t left = cut.whole % threads;
  if (left == 0) return cut;
  // Smaller tiles, where the rows can be shared out evenly.
  for (int64_t tiles = cut.tiles_p; tiles <= std::min(rows, 4 * threads); ++tiles) {
    const int64_t pieces = cut.groups * tiles * cut.tiles_q, tile_p = ceil_div(rows, tiles);
    const int64_t busiest = ceil_div(pieces, threads) * tile_p * threads, all = cut.groups * cut.tiles_q * rows;
    if (tile_p * plan.tile_q < kLeastPixels) break;
    if (busiest * 16 > all * 17) continue;
    cut.tiles_p = tiles;
    cut.whole = pieces;
    return cut;
  }
  cut.whole -= left;
  cut.parts = parts_of_left(left, threads, static_cast<int64_t>(plan.strips.size()));
  return cut;
}

BlockPiece find_piece(const BlockPlan& plan, const ConvCall& call, const BlockTasks& cut, int64_t piece) {
  const ConvShape& s = plan.shape;
  const auto share = [](int64_t all, int64_t i, int64_t shares) { return all * i / shares; };
  const int64_t q = piece % cut.tiles_q, p = piece / cut.tiles_q % cut.tiles_p, n = piece / cut.tiles_q / cut.tiles_p;
  const int64_t images = call.batch(s), rows = call.row_count(s);
  return {share(images, n, cut.groups),
          share(images, n + 1, cut.groups),
          call.first_row + share(rows, p, cut.tiles_p),
          call.first_row + share(rows, p + 1, cut.tiles_p),
          q * plan.tile_q,
          std::min((q + 1) * plan.tile_q, s.Q)};
}

int64_t first_strip(const BlockPlan& plan, int64_t part, int64_t parts) {
  const int64_t wanted = plan.cost.back() * part / parts;
  return std::lower_bound(plan.cost.begin(), plan.cost.end() - 1, wanted) - plan.cost.begin();
}

}  // namespace vpns
