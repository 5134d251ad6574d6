// A task takes a run of rows of one key head and copies what they see of k and v into panels
// (local_attention_tiles.h). Tiles of kTile queries meet it a panel of queries at a time. Beyond inputs,
// outputs and statistics, memory is what a task copies and a tile's scores.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <spade_ext/core/parallel.h>
#include <spade_ext/local_attention/local_attention_rows.h>
#include <torch/library.h>

#include <algorithm>

namespace spade_ext::local_attention_cpu {

using local_attention_math::Activation;
using local_attention_shapes::Options;
using local_attention_shapes::Tensors;

constexpr int64_t kTile = 64;   // queries, in whole panels
constexpr int64_t kBlock = 96;  // keys that a tile of the backward meets at a time

// Splits [0, size) of every (b, h) into blocks and calls body(b, h, rows) for each, on any thread. Heads come
// first: their rows lie side by side.
template <class Body>
void for_each_block(int64_t B, int64_t H, int64_t size, int64_t block, const Body& body) {
  const int64_t blocks = (size + block - 1) / block;
  parallel_for_each(B * blocks * H, [&](int64_t task) {
    const int64_t begin = task / H % blocks * block;
    body(task / H / blocks, task % H, Range{begin, std::min(begin + block, size)});
  });
}

// Calls body(tile) for each tile of a run of queries: up to kTile, each of which sees something that the one
// before it does too. So no tile meets two segments: the content of another one must not be read.
template <class Body>
void for_each_tile(const Ranges& keys, int64_t b, Range queries, const Body& body) {
  for (Range tile{queries.begin, queries.begin}; tile.begin < queries.end; tile.begin = tile.end) {
    do {
      ++tile.end;
    } while (tile.end < queries.end && tile.size() < kTile && keys.overlaps_previous(b, tile.end));
    body(tile);
  }
}

// Calls body(part) for parts of a range of nearly the same size, at most `size`.
template <class Body>
void for_each_part(Range range, int64_t size, const Body& body) {
  const int64_t parts = (range.size() + size - 1) / size;
  for (int64_t n = 0; n < parts; ++n) {
    body(Range{range.begin + range.size() * n / parts, range.begin + range.size() * (n + 1) / parts});
  }
}

// Rows of a tensor as panels, their copy in the type of sums.
template <class scalar_t>
void load(const Problem<scalar_t>& problem, const Rows<scalar_t>& x, int64_t b, int64_t h, Range rows,
          const at::opmath_type<scalar_t>* factor, at::opmath_type<scalar_t>* panels) {
  problem.tiles.load(x.at(b, rows.begin, h), x.stride(), factor, rows.size(), x.tensor.size(3), panels);
}

// out = p v for a run of queries of one key head's group, and their log-sum-exps.
template <class scalar_t>
class ForwardTask {
  using acc_t = at::opmath_type<scalar_t>;
  const Problem<scalar_t>& problem_;
  const LocalAttentionTiles<scalar_t>& tiles_;
  const int64_t b_;
  const Range seen_;
  const Scratch<acc_t, 8> scratch_;

 public:
  ForwardTask(const Problem<scalar_t>& problem, int64_t b, Range queries)
      : problem_(problem),
        tiles_(problem.tiles),
        b_(b),
        seen_(problem.band.keys.of(b, queries)),
        scratch_({problem.size(seen_.size(), problem.D), problem.size(seen_.size(), problem.Dv),
                  problem.size(kTile, problem.D), problem.size(problem.D, kTile),
                  problem.size(seen_.size(), 1), problem.size(kTile, problem.Dv), kTile, kTile}) {}

  void run(int64_t head, Range queries, const Rows<scalar_t>& out, acc_t* lse) const {
    const auto& [k, v, q, q_transposed, scores, sums, tile_lse, factor] = scratch_.parts;
    load(problem_, problem_.k, b_, head, seen_, problem_.real_keys(b_, seen_.begin), k);
    load(problem_, problem_.v, b_, head, seen_, problem_.real_keys(b_, seen_.begin), v);
    for (int64_t h = head * problem_.group(); h < (head + 1) * problem_.group(); ++h) {
      for_each_tile(problem_.band.keys, b_, queries, [&](Range tile) {
        load(problem_, problem_.q, b_, h, tile, problem_.scales(b_, tile.begin), q);
        tiles_.transpose(q, tile.size(), problem_.D, q_transposed);
        problem_.for_each_panel(tile.size(), [&](int64_t p, int64_t) { panel(h, tile, p); });
        tiles_.store(sums, kTile, factor, tile.size(), problem_.Dv, out.at(b_, tile.begin, h), out.stride());
        std::copy_n(tile_lse, tile.size(), lse + (b_ * problem_.H + h) * problem_.band.Lq + tile.begin);
      });
    }
  }

 private:
  // Weights, and unnormalised sums, of a tile's panel p of queries.
  void panel(int64_t h, Range tile, int64_t p) const {
    const auto& [k, v, q, q_transposed, scores, sums, lse, factor] = scratch_.parts;
    const int64_t width = tiles_.panel, first = tile.begin + p * width;
    const Range queries{first, std::min(first + width, tile.end)};
    const Range keys = problem_.band.keys.of(b_, queries);
    const int64_t vectors = problem_.vectors(queries.size());
    tiles_.multiply(k + (keys.begin - seen_.begin) * width, seen_.size() * width,
                    q_transposed + p * problem_.D * width, scores, keys.size(), 0, problem_.D, vectors,
                    false);
    tiles_.weights(problem_.activation, scores, keys.size(), problem_.bias.at(h, first, keys.begin),
                   problem_.real_keys(b_, keys.begin), vectors, lse + p * width, factor + p * width);
    problem_.drop(b_, h, queries, keys, scores);
    problem_.for_each_panel(problem_.Dv, [&](int64_t d, int64_t vectors) {
      for_each_part(queries, tiles_.rows, [&](Range rows) {
        const Range their = problem_.band.keys.of(b_, rows);
        tiles_.multiply_transposed(scores + (their.begin - keys.begin) * width + rows.begin - first,
                                   v + (d * seen_.size() + their.begin - seen_.begin) * width,
                                   sums + (d * kTile + rows.begin - tile.begin) * width, rows.size(),
                                   their.size(), vectors, false);
      });
    });
  }
};

// Queries of a task of the forward, in whole tiles: enough that copying what they see costs little beside the
// products.
inline int64_t forward_rows(int64_t reach) {
  return std::clamp<int64_t>(2 * reach, 256, 1024) / kTile * kTile;
}

// What the backward of a problem knows beside it. Gradients that nobody wants are undefined; those of k and v
// come together.
template <class scalar_t>
struct Backward {
  using acc_t = at::opmath_type<scalar_t>;
  const Problem<scalar_t>& problem;
  Rows<scalar_t> grad_out, out;
  const acc_t* lse;  // (B, H, Lq)
  std::optional<Rows<scalar_t>> grad_q, grad_k, grad_v;
  at::Tensor bias_tables;  // (B, H, tasks, width of a table)

  acc_t* bias_table(int64_t b, int64_t h, int64_t task) const {
    return bias_tables.template data_ptr<acc_t>() +
           ((b * problem.H + h) * bias_tables.size(2) + task) * bias_tables.size(3);
  }
  bool wants_keys() const { return grad_k.has_value(); }
  bool wants_queries() const { return grad_q || bias_tables.defined(); }
};

// The gradients of a run of positions: those of the queries and of the keys that stand there, its own. A pair
// of which one is its own is met by two tasks, each of which adds to its own. So no two tasks write to the
// same memory, and the cut costs the scores of few pairs a second time.
template <class scalar_t>
class BackwardTask {
  using acc_t = at::opmath_type<scalar_t>;
  const Backward<scalar_t>& backward_;
  const Problem<scalar_t>& problem_;
  const LocalAttentionTiles<scalar_t>& tiles_;
  const Ranges& askers_;  // of each key, the queries that see it
  const int64_t b_;
  const Range own_queries_, own_keys_;
  const Range keys_, queries_;  // all that it meets
  const Scratch<acc_t, 14> scratch_;

 public:
  BackwardTask(const Backward<scalar_t>& backward, const Ranges& askers, int64_t b, Range own_queries,
               Range own_keys)
      : backward_(backward),
        problem_(backward.problem),
        tiles_(problem_.tiles),
        askers_(askers),
        b_(b),
        own_queries_(backward.wants_queries() ? own_queries : Range{0, 0}),
        own_keys_(backward.wants_keys() ? own_keys : Range{0, 0}),
        keys_(hull(problem_.band.keys.of(b, own_queries_), own_keys_)),
        queries_(hull(askers_.of(b, own_keys_), own_queries_)),
        scratch_({problem_.size(keys_.size(), problem_.D), problem_.size(keys_.size(), problem_.Dv),
                  problem_.size(own_keys_.size(), problem_.D), problem_.size(own_keys_.size(), problem_.Dv),
                  problem_.size(kTile, problem_.D), problem_.size(problem_.D, kTile),
                  problem_.size(kTile, problem_.Dv), problem_.size(problem_.Dv, kTile),
                  problem_.size(kTile, problem_.Dv), problem_.size(kTile, problem_.D),
                  problem_.size(kBlock, kTile), problem_.size(kBlock, kTile), kTile, kTile}) {}

  void run(int64_t head, int64_t task) const {
    const auto& [k, v, grad_k, grad_v, q, q_t, grad_out, grad_out_t, out, grad_q, p, grad, lse, delta] =
        scratch_.parts;
    load(problem_, problem_.k, b_, head, keys_, problem_.real_keys(b_, keys_.begin), k);
    load(problem_, problem_.v, b_, head, keys_, problem_.real_keys(b_, keys_.begin), v);
    std::fill_n(grad_k, problem_.size(own_keys_.size(), problem_.D), acc_t(0));
    std::fill_n(grad_v, problem_.size(own_keys_.size(), problem_.Dv), acc_t(0));
    const Range own = own_queries_.size() ? own_queries_ : Range{queries_.end, queries_.end};
    for (int64_t h = head * problem_.group(); h < (head + 1) * problem_.group(); ++h) {
      for (Range part : {Range{queries_.begin, own.begin}, own, Range{own.end, queries_.end}}) {
        for_each_tile(problem_.band.keys, b_, part, [&](Range queries) { tile(h, task, queries); });
      }
    }
    if (own_keys_.size() == 0) return;
    store(grad_k, own_keys_.size(), nullptr, *backward_.grad_k, head, own_keys_);
    store(grad_v, own_keys_.size(), nullptr, *backward_.grad_v, head, own_keys_);
  }

 private:
  void store(const acc_t* panels, int64_t panel_rows, const acc_t* factor, const Rows<scalar_t>& y, int64_t h,
             Range rows) const {
    tiles_.store(panels, panel_rows, factor, rows.size(), y.tensor.size(3), y.at(b_, rows.begin, h),
                 y.stride());
  }

  void tile(int64_t h, int64_t task, Range queries) const {
    const auto& [k, v, grad_k, grad_v, q, q_t, grad_out, grad_out_t, out, grad_q, p, grad, lse, delta] =
        scratch_.parts;
    const bool own = intersection(queries, own_queries_).size() > 0;
    const Range all = problem_.band.keys.of(b_, queries);
    const Range keys = own ? all : intersection(all, own_keys_);
    const int64_t n = queries.size();
    std::fill_n(grad_q, problem_.size(kTile, problem_.D), acc_t(0));
    if (keys.size() > 0) {
      load(problem_, problem_.q, b_, h, queries, problem_.scales(b_, queries.begin), q);
      load(problem_, backward_.grad_out, b_, h, queries, nullptr, grad_out);
      load(problem_, backward_.out, b_, h, queries, nullptr, out);
      tiles_.transpose(q, n, problem_.D, q_t);
      tiles_.transpose(grad_out, n, problem_.Dv, grad_out_t);
      tiles_.dots(grad_out, out, n, problem_.Dv, delta);
      std::copy_n(backward_.lse + (b_ * problem_.H + h) * problem_.band.Lq + queries.begin, n, lse);
      std::fill(lse + n, lse + kTile, std::numeric_limits<acc_t>::infinity());
      std::fill(delta + n, delta + kTile, acc_t(0));
    }
    for (Range block{keys.begin, keys.begin}; block.begin < keys.end; block.begin = block.end) {
      block.end = std::min(block.begin + kBlock, keys.end);
      for (int64_t cut : {own_keys_.begin, own_keys_.end}) {
        if (block.begin < cut) block.end = std::min(block.end, cut);
      }
      problem_.for_each_panel(n, [&](int64_t panel, int64_t vectors) {
        grad_scores(h, task, queries, own, block, panel, vectors);
      });
      if (intersection(block, own_keys_).size() > 0) add_to_keys(queries, block);
    }
    if (own && backward_.grad_q) {
      store(grad_q, kTile, problem_.scales(b_, queries.begin), *backward_.grad_q, h, queries);
    }
  }

  // Weights and gradients of scores of a block of keys and a panel of queries, and what follows for these.
  // Rows of results are met together, so all of those of which one has something here.
  void grad_scores(int64_t h, int64_t task, Range tile, bool own, Range block, int64_t panel,
                   int64_t vectors) const {
    const auto& [k, v, grad_k, grad_v, q, q_t, grad_out, grad_out_t, out, grad_q, p, grad, lse, delta] =
        scratch_.parts;
    const int64_t width = tiles_.panel, first = tile.begin + panel * width;
    const Range queries{first, std::min(first + width, tile.end)};
    Range keys = intersection(problem_.band.keys.of(b_, queries), block);
    if (keys.size() == 0) return;
    keys.begin -= (keys.begin - block.begin) % tiles_.rows;
    keys.end = std::min(block.end, keys.end + tiles_.rows - 1 - (keys.end - 1 - block.begin) % tiles_.rows);
    const int64_t offset = (panel * kBlock + keys.begin - block.begin) * width;
    const int64_t row = (keys.begin - keys_.begin) * width, a_panel = keys_.size() * width;
    tiles_.multiply(k + row, a_panel, q_t + panel * problem_.D * width, p + offset, keys.size(), 0,
                    problem_.D, vectors, false);
    tiles_.multiply(v + row, a_panel, grad_out_t + panel * problem_.Dv * width, grad + offset, keys.size(), 0,
                    problem_.Dv, vectors, false);
    problem_.drop(b_, h, queries, keys, grad + offset);
    tiles_.gradients(problem_.activation, p + offset, grad + offset, keys.size(),
                     problem_.bias.at(h, first, keys.begin), problem_.real_keys(b_, keys.begin), vectors,
                     lse + panel * width, delta + panel * width);
    problem_.drop(b_, h, queries, keys, p + offset);
    if (!own) return;
    if (backward_.bias_tables.defined()) {
      tiles_.add_to_table(grad + offset, keys.size(), vectors,
                          backward_.bias_table(b_, h, task) + problem_.bias.entry(first, keys.begin));
    }
    problem_.for_each_panel(problem_.D, [&](int64_t d, int64_t vectors) {
      for_each_part(queries, tiles_.rows, [&](Range rows) {
        const Range their = intersection(problem_.band.keys.of(b_, rows), block);
        tiles_.multiply_transposed(
            grad + (panel * kBlock + their.begin - block.begin) * width + rows.begin - first,
            k + (d * keys_.size() + their.begin - keys_.begin) * width,
            grad_q + (d * kTile + rows.begin - tile.begin) * width, rows.size(), their.size(), vectors, true);
      });
    });
  }

  void add_to_keys(Range tile, Range block) const {
    const auto& [k, v, grad_k, grad_v, q, q_t, grad_out, grad_out_t, out, grad_q, p, grad, lse, delta] =
        scratch_.parts;
    const int64_t width = tiles_.panel;
    for (Range rows{block.begin, block.begin}; rows.begin < block.end; rows.begin = rows.end) {
      rows.end = std::min(rows.begin + tiles_.rows, block.end);
      const Range queries = intersection(askers_.of(b_, rows), tile);
      if (queries.size() == 0) continue;
      auto add = [&](const acc_t* a, const acc_t* b, acc_t* c, int64_t D) {
        problem_.for_each_panel(D, [&](int64_t d, int64_t vectors) {
          tiles_.multiply(a + (rows.begin - block.begin) * width, kBlock * width, b + d * tile.size() * width,
                          c + (d * own_keys_.size() + rows.begin - own_keys_.begin) * width, rows.size(),
                          queries.begin - tile.begin, queries.end - tile.begin, vectors, true);
        });
      };
      add(grad, q, grad_k, problem_.D);
      add(p, grad_out, grad_v, problem_.Dv);
    }
  }
};

// Of `size` positions those of a task of the backward, in whole tiles: enough that few pairs are met twice
// and that the tables of the bias's gradient are small beside the inputs.
inline int64_t backward_rows(int64_t size, int64_t reach) {
  const int64_t most = std::max(std::clamp<int64_t>(8 * reach, 512, 2048), reach / 16);
  const int64_t tiles = (size + kTile - 1) / kTile, tasks = (size + most - 1) / most;
  return tasks == 0 ? kTile : (tiles + tasks - 1) / tasks * kTile;
}

// The gradient of the bias: the tasks' tables, added in order.
template <class scalar_t>
void add_tables(const Backward<scalar_t>& backward, const at::Tensor& grad_bias) {
  const Problem<scalar_t>& problem = backward.problem;
  const BiasTables<typename Problem<scalar_t>::acc_t>& bias = problem.bias;
  grad_bias.zero_();
  if (backward.bias_tables.numel() == 0) return;
  parallel_for_each(problem.H, [&](int64_t h) {
    auto* total = backward.bias_table(0, h, 0);
    for (int64_t n = 1; n < problem.B * backward.bias_tables.size(2); ++n) {
      const auto* table =
          backward.bias_table(n / backward.bias_tables.size(2), h, n % backward.bias_tables.size(2));
      for (int64_t r = 0; r < bias.width; ++r) total[r] += table[r];
    }
  });
  bias.of_band(grad_bias, problem.band)
      .copy_(backward.bias_tables.select(2, 0).select(0, 0).narrow(1, bias.pad, bias.entries).flip(1));
}

template <class scalar_t>
void run_backward(Backward<scalar_t> backward, const at::Tensor& grad_bias) {
  using acc_t = at::opmath_type<scalar_t>;
  const Problem<scalar_t>& problem = backward.problem;
  const Band& band = problem.band;
  const int64_t size = std::max(band.Lq, band.Lk), rows = backward_rows(size, problem.bias.entries);
  if (grad_bias.defined()) {
    backward.bias_tables = at::zeros({problem.B, problem.H, (size + rows - 1) / rows, problem.bias.width},
                                     c10::CppTypeToScalarType<acc_t>::value);
  }
  const Ranges askers = band.queries();
  for_each_block(problem.B, problem.Hkv, size, rows, [&](int64_t b, int64_t head, Range block) {
    auto own = [&](int64_t n) {  // of n rows, aligned at the end
      const int64_t first = size - n;
      return intersection({block.begin - first, block.end - first}, {0, n});
    };
    BackwardTask<scalar_t>(backward, askers, b, own(band.Lq), own(band.Lk)).run(head, block.begin / rows);
  });
  if (grad_bias.defined()) add_tables(backward, grad_bias);
}

std::tuple<at::Tensor, at::Tensor> local_attention_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& bias,
    const OptionalTensor& attention_mask, const OptionalTensor& segment_ids,
    const OptionalTensor& dropout_seed, int64_t left, int64_t right, std::optional<int64_t> chunk_size,
    std::optional<double> scale, std::string_view activation, double dropout_p) {
  const Tensors tensors{q, k, v, bias, attention_mask, segment_ids, dropout_seed};
  const Options options{left, right, chunk_size, scale, activation, dropout_p};
  local_attention_shapes::check_forward(tensors, options);
  auto out = at::empty({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options());
  auto lse = at::empty({q.size(0), q.size(2), q.size(1)}, local_attention_shapes::statistics_options(q));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "local_attention", [&] {
    const Problem<scalar_t> problem(tensors, options);
    const Rows<scalar_t> out_rows(out);
    auto* statistics = lse.data_ptr<at::opmath_type<scalar_t>>();
    for_each_block(problem.B, problem.Hkv, problem.band.Lq, forward_rows(problem.bias.entries),
                   [&](int64_t b, int64_t head, Range queries) {
                     ForwardTask<scalar_t>(problem, b, queries).run(head, queries, out_rows, statistics);
                   });
  });
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> local_attention_backward(
    const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const OptionalTensor& bias, const OptionalTensor& attention_mask, const OptionalTensor& segment_ids,
    const OptionalTensor& dropout_seed, const at::Tensor& out, const at::Tensor& lse, int64_t left,
    int64_t right, std::optional<int64_t> chunk_size, std::optional<double> scale,
    std::string_view activation, double dropout_p, std::array<bool, 4> output_mask) {
  const Tensors tensors{q, k, v, bias, attention_mask, segment_ids, dropout_seed};
  const Options options{left, right, chunk_size, scale, activation, dropout_p};
  local_attention_shapes::check_backward(grad_out, tensors, out, lse, options, output_mask);
  const bool key_grads = output_mask[1] || output_mask[2];  // one product after the other gives both
  const auto grad_q = empty_gradient(output_mask[0], q), grad_bias = empty_gradient(output_mask[3], bias),
             grad_k = empty_gradient(key_grads, k), grad_v = empty_gradient(key_grads, v);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "local_attention_backward", [&] {
    const Problem<scalar_t> problem(tensors, options);
    auto rows = [](const at::Tensor& grad) {
      return grad.defined() ? std::optional(Rows<scalar_t>(grad)) : std::nullopt;
    };
    const auto* statistics = lse.data_ptr<at::opmath_type<scalar_t>>();
    run_backward<scalar_t>({problem,
                            Rows<scalar_t>(grad_out),
                            Rows<scalar_t>(out),
                            statistics,
                            rows(grad_q),
                            rows(grad_k),
                            rows(grad_v),
                            {}},
                           grad_bias);
  });
  return {grad_q, output_mask[1] ? grad_k : at::Tensor(), output_mask[2] ? grad_v : at::Tensor(), grad_bias};
}

TORCH_LIBRARY_IMPL(spade_ext, CPU, m) {
  m.impl("local_attention_forward", local_attention_forward);
  m.impl("local_attention_backward", local_attention_backward);
}

}  // namespace spade_ext::local_attention_cpu
