// A task takes a block of rows of one head, a tile of kTile rows at a time against all that the tile sees.
// Both products of attention, scores = q K^T and out = p V, are products with rows as they stand in memory
// (core/row_products.h), the first with the transposed keys. Beyond inputs, outputs and statistics, memory is
// the keys or queries that a block sees.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <spade_ext/core/parallel.h>
#include <spade_ext/local_attention/local_attention_rows.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace spade_ext::local_attention_cpu {

using local_attention_math::Activation;
using local_attention_shapes::Options;
using local_attention_shapes::Tensors;

// Rows of a task: enough that copying what they see costs little beside the products.
constexpr int64_t kBlock = 128;

template <class acc_t, class Y>
void store(const acc_t* x, Y* y, int64_t n) {
  for (int64_t d = 0; d < n; ++d) y[d] = static_cast<Y>(x[d]);
}

// Splits [0, size) of every (b, h) into blocks and calls body(b, h, rows) for each, on any thread.
template <class Body>
void for_each_block(int64_t B, int64_t H, int64_t size, int64_t block, const Body& body) {
  const int64_t blocks = (size + block - 1) / block;
  parallel_for_each(B * H * blocks, [&](int64_t task) {
    const int64_t row = task / blocks, begin = task % blocks * block;
    body(row / H, row % H, Range{begin, std::min(begin + block, size)});
  });
}

// Calls body(tile) for each tile of a block: up to kTile rows, each of which sees, or is seen by, something
// that the row before it does too. So no tile meets two segments: the content of another one must not be
// read.
template <class Body>
void for_each_tile(const Ranges& ranges, int64_t b, Range block, const Body& body) {
  for (Range tile{block.begin, block.begin}; tile.begin < block.end; tile.begin = tile.end) {
    do {
      ++tile.end;
    } while (tile.end < block.end && tile.size() < kTile && ranges.overlaps_previous(b, tile.end));
    body(tile);
  }
}

// Turns the scores of a query's keys into weights. Returns the log-sum-exp of the scores, +inf where all are
// -inf, as if there were no key, and 0 where the weights are not normalised.
template <class acc_t>
acc_t activate(Activation activation, acc_t* x, int64_t n) {
  if (activation == Activation::relu2) {
    for (int64_t j = 0; j < n; ++j) x[j] = local_attention_math::relu2(x[j]).value;
    return 0;
  }
  if (activation == Activation::laplace) {
    for (int64_t j = 0; j < n; ++j) x[j] = local_attention_math::laplace(x[j]).value;
    return 0;
  }
  constexpr acc_t kInfinity = std::numeric_limits<acc_t>::infinity();
  acc_t largest = -kInfinity, total = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < n; ++j) largest = std::max(largest, x[j]);
  if (largest == -kInfinity && std::count(x, x + n, -kInfinity) == n) {  // the maximum passes over a NaN
    std::fill_n(x, n, acc_t(0));
    return kInfinity;
  }
  for (int64_t j = 0; j < n; ++j) x[j] -= largest;
  exp(x, n);
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < n; ++j) total += x[j];
  for (int64_t j = 0; j < n; ++j) x[j] /= total;
  return largest + std::log(total);
}

// Turns n scores x into weights and the gradients of weights into those of scores. lse(m) and delta(m) are
// those of the m-th pair's query.
template <class acc_t, class Lse, class Delta>
void activate_backward(Activation activation, acc_t* x, acc_t* grad, int64_t n, const Lse& lse,
                       const Delta& delta) {
  auto elementwise = [&](const auto& function) {
    for (int64_t m = 0; m < n; ++m) {
      const auto [value, slope] = function(x[m]);
      x[m] = value;
      grad[m] *= slope;
    }
  };
  if (activation == Activation::relu2) return elementwise(local_attention_math::relu2<acc_t>);
  if (activation == Activation::laplace) return elementwise(local_attention_math::laplace<acc_t>);
  for (int64_t m = 0; m < n; ++m) x[m] -= lse(m);
  exp(x, n);
  for (int64_t m = 0; m < n; ++m) grad[m] = x[m] * (grad[m] - delta(m));
}

// Turns a row of products q . k with the keys of `all` into the dropped weights of query i, 0 where it does
// not see. Returns the log-sum-exp of its scores, +inf where it sees no key or all are -inf, and 0 where
// weights are not normalised.
template <class scalar_t, class acc_t = at::opmath_type<scalar_t>>
acc_t weights_row(const Problem<scalar_t>& problem, int64_t b, int64_t h, int64_t i, Range all, acc_t* row) {
  const Range keys = problem.band.keys.of(b, i);
  if (keys.size() == 0) {
    std::fill_n(row, all.size(), acc_t(0));
    return std::numeric_limits<acc_t>::infinity();
  }
  acc_t* p = row + keys.begin - all.begin;
  problem.finish_scores_of_keys(b, h, i, keys, p);
  const acc_t lse = activate(problem.activation, p, keys.size());
  problem.drop_of_keys(b, h, i, keys, p);
  zero_outside(row, all, keys);
  return lse;
}

// out = p v for the queries of a block, and their log-sum-exps.
template <class scalar_t, class acc_t = at::opmath_type<scalar_t>>
void forward_block(const Problem<scalar_t>& problem, int64_t b, int64_t h, Range block,
                   const Rows<scalar_t>& out, acc_t* lse) {
  const Band& band = problem.band;
  const Range seen = band.keys.of(b, block);
  const Slab<scalar_t> q(problem.q, b, h, block), v(problem.v, b, problem.key_head(h), seen);
  const TransposedSlab<scalar_t> k(problem.k, b, problem.key_head(h), seen);
  Matrix<acc_t> p(kTile, seen.size()), sums(kTile, problem.Dv);
  for_each_tile(band.keys, b, block, [&](Range tile) {
    const Range all = band.keys.of(b, tile);
    sums.zero();
    problem.for_each_run(b, all, [&](Range run) {
      k.dots(q.from(tile.begin), tile.size(), run, {p.data + run.begin - all.begin, p.stride});
    });
    for (int64_t r = 0; r < tile.size(); ++r)
      *lse++ = weights_row(problem, b, h, tile.begin + r, all, p.row(r));
    problem.for_each_run(b, all, [&](Range run) {
      row_products<acc_t>().multiply_add({p.data + run.begin - all.begin, p.stride}, v.from(run.begin), sums,
                                         tile.size(), run.size(), whole_vectors<acc_t>(problem.Dv));
    });
    for (int64_t r = 0; r < tile.size(); ++r) store(sums.row(r), out.at(b, tile.begin + r, h), problem.Dv);
  });
}

// What the backward of a problem knows beside it; delta (B, H, Lq) is grad_out . out.
template <class scalar_t>
struct Backward {
  using acc_t = at::opmath_type<scalar_t>;
  const Problem<scalar_t>& problem;
  Rows<scalar_t> grad_out;
  at::Tensor lse, delta;

  Backward(const Problem<scalar_t>& problem_, const at::Tensor& grad_out_, const at::Tensor& out_,
           const at::Tensor& lse_)
      : problem(problem_), grad_out(grad_out_), lse(lse_), delta(at::empty(lse_.sizes(), lse_.options())) {
    const Rows<scalar_t> out(out_);
    for_each_block(problem.B, problem.H, problem.band.Lq, kBlock, [&](int64_t b, int64_t h, Range block) {
      acc_t* deltas = delta_row(b, h);
      for (int64_t i = block.begin; i < block.end; ++i) {
        const scalar_t *x = grad_out.at(b, i, h), *y = out.at(b, i, h);
        acc_t sum = 0;
        for (int64_t d = 0; d < problem.Dv; ++d) sum += static_cast<acc_t>(x[d]) * static_cast<acc_t>(y[d]);
        deltas[i] = sum;
      }
    });
  }
  const acc_t* lse_row(int64_t b, int64_t h) const { return row(lse, b, h); }
  acc_t* delta_row(int64_t b, int64_t h) const { return row(delta, b, h); }

 private:
  acc_t* row(const at::Tensor& t, int64_t b, int64_t h) const {
    return t.template data_ptr<acc_t>() + (b * problem.H + h) * problem.band.Lq;
  }
};

// Turns rows of products q . k and grad_out . v with the keys of `all` into the gradients of query i's
// scores, in the second row, 0 where it does not see.
template <class scalar_t, class acc_t = at::opmath_type<scalar_t>>
void grad_score_row(const Backward<scalar_t>& backward, int64_t b, int64_t h, int64_t i, Range all,
                    acc_t* score, acc_t* grad) {
  const auto& problem = backward.problem;
  const Range keys = problem.band.keys.of(b, i);
  if (keys.size() == 0) {
    std::fill_n(grad, all.size(), acc_t(0));
    return;
  }
  const acc_t lse = backward.lse_row(b, h)[i], delta = backward.delta_row(b, h)[i];
  acc_t* p = score + keys.begin - all.begin;
  acc_t* grad_score = grad + keys.begin - all.begin;
  problem.finish_scores_of_keys(b, h, i, keys, p);
  problem.drop_of_keys(b, h, i, keys, grad_score);
  activate_backward(
      problem.activation, p, grad_score, keys.size(), [&](int64_t) { return lse; },
      [&](int64_t) { return delta; });
  problem.fill_padding(b, keys, grad_score, 0);
  zero_outside(grad, all, keys);
}

// grad_q for the queries of a block; what they add to the bias gradient goes into `table`, unless it is null.
template <class scalar_t, class acc_t = at::opmath_type<scalar_t>>
void backward_queries_block(const Backward<scalar_t>& backward, int64_t b, int64_t h, Range block,
                            const std::optional<Rows<scalar_t>>& grad_q, acc_t* table) {
  const auto& problem = backward.problem;
  const Band& band = problem.band;
  const Range seen = band.keys.of(b, block);
  const int64_t head = problem.key_head(h);
  const Slab<scalar_t> q(problem.q, b, h, block), grad_out(backward.grad_out, b, h, block);
  const Slab<scalar_t> k(problem.k, b, head, seen);
  const TransposedSlab<scalar_t> k_columns(problem.k, b, head, seen), v_columns(problem.v, b, head, seen);
  Matrix<acc_t> scores(kTile, seen.size()), grad_scores(kTile, seen.size()), sums(kTile, problem.D);
  for_each_tile(band.keys, b, block, [&](Range tile) {
    const Range all = band.keys.of(b, tile);
    sums.zero();
    problem.for_each_run(b, all, [&](Range run) {
      const int64_t offset = run.begin - all.begin;
      k_columns.dots(q.from(tile.begin), tile.size(), run, {scores.data + offset, scores.stride});
      v_columns.dots(grad_out.from(tile.begin), tile.size(), run,
                     {grad_scores.data + offset, grad_scores.stride});
    });
    for (int64_t r = 0; r < tile.size(); ++r) {
      const int64_t i = tile.begin + r;
      grad_score_row(backward, b, h, i, all, scores.row(r), grad_scores.row(r));
      if (!table) continue;
      const Range keys = band.keys.of(b, i);
      const acc_t* grad_score = grad_scores.row(r) + keys.begin - all.begin;
      acc_t* entry = table + band.bias_entry(i, keys.begin);
      for (int64_t j = 0; j < keys.size(); ++j) entry[j] += grad_score[j];
    }
    problem.for_each_run(b, all, [&](Range run) {
      row_products<acc_t>().multiply_add({grad_scores.data + run.begin - all.begin, grad_scores.stride},
                                         k.from(run.begin), sums, tile.size(), run.size(),
                                         whole_vectors<acc_t>(problem.D));
    });
    for (int64_t r = 0; grad_q && r < tile.size(); ++r) {
      const acc_t scale = problem.scales_of(b)[tile.begin + r];
      for (int64_t d = 0; d < problem.D; ++d) sums.row(r)[d] *= scale;
      store(sums.row(r), grad_q->at(b, tile.begin + r, h), problem.D);
    }
  });
}

// grad_q by blocks, and the bias gradient as one partial table a block, added up in order.
template <class scalar_t>
void backward_queries(const Backward<scalar_t>& backward, const at::Tensor& grad_q,
                      const at::Tensor& grad_bias) {
  using acc_t = at::opmath_type<scalar_t>;
  const auto& problem = backward.problem;
  const Band& band = problem.band;
  const int64_t entries = grad_bias.defined() ? band.left + band.right + 1 : 0;
  // At least as many rows a block as the table has entries, so that the partial tables stay O(B L H).
  const int64_t rows = std::max(kBlock, entries);
  const int64_t blocks = (band.Lq + rows - 1) / rows;
  const auto partial = at::zeros({problem.B, problem.H, blocks, entries}, backward.delta.options());
  acc_t* tables = partial.template data_ptr<acc_t>();
  const auto grad_rows = grad_q.defined() ? std::optional(Rows<scalar_t>(grad_q)) : std::nullopt;
  for_each_block(problem.B, problem.H, band.Lq, rows, [&](int64_t b, int64_t h, Range block) {
    acc_t* table = tables + ((b * problem.H + h) * blocks + block.begin / rows) * entries;
    for (int64_t begin = block.begin; begin < block.end; begin += kBlock) {
      const Range part{begin, std::min(begin + kBlock, block.end)};
      backward_queries_block(backward, b, h, part, grad_rows, entries ? table : nullptr);
    }
  });
  if (!grad_bias.defined()) return;
  scalar_t* total = grad_bias.data_ptr<scalar_t>();
  parallel_for_each(problem.H, [&](int64_t h) {
    for (int64_t r = 0; r < entries; ++r) {
      acc_t sum = 0;
      for (int64_t b = 0; b < problem.B; ++b) {
        for (int64_t i = 0; i < blocks; ++i) sum += tables[((b * problem.H + h) * blocks + i) * entries + r];
      }
      total[h * entries + r] = static_cast<scalar_t>(sum);
    }
  });
}

// Turns rows of products k . q and v . grad_out with the queries of `all` into key j's dropped weights and
// the scaled gradients of its scores, 0 where it is not seen.
template <class scalar_t, class acc_t = at::opmath_type<scalar_t>>
void key_row(const Backward<scalar_t>& backward, int64_t b, int64_t h, int64_t j, Range queries, Range all,
             acc_t* score, acc_t* grad) {
  const auto& problem = backward.problem;
  if (queries.size() == 0 || !problem.band.is_real(b, j)) {
    std::fill_n(score, all.size(), acc_t(0));
    std::fill_n(grad, all.size(), acc_t(0));
    return;
  }
  const int64_t n = queries.size();
  const acc_t* lse = backward.lse_row(b, h) + queries.begin;
  const acc_t* delta = backward.delta_row(b, h) + queries.begin;
  const acc_t* scale = problem.scales_of(b) + queries.begin;
  acc_t* p = score + queries.begin - all.begin;
  acc_t* grad_score = grad + queries.begin - all.begin;
  problem.finish_scores_of_queries(b, h, queries, j, p);
  problem.drop_of_queries(b, h, queries, j, grad_score);
  activate_backward(
      problem.activation, p, grad_score, n, [&](int64_t i) { return lse[i]; },
      [&](int64_t i) { return delta[i]; });
  problem.drop_of_queries(b, h, queries, j, p);
  for (int64_t i = 0; i < n; ++i) grad_score[i] *= scale[i];
  zero_outside(score, all, queries);
  zero_outside(grad, all, queries);
}

// grad_k and grad_v for the keys of a block: each gathers from the queries that see it, its group's heads in
// order.
template <class scalar_t, class acc_t = at::opmath_type<scalar_t>>
void backward_keys_block(const Backward<scalar_t>& backward, const Ranges& queries, int64_t b, int64_t head,
                         Range block, const Rows<scalar_t>& grad_k, const Rows<scalar_t>& grad_v) {
  const auto& problem = backward.problem;
  const Range seen = queries.of(b, block);
  const int64_t group = problem.H / problem.Hkv;
  const auto& multiply_add = row_products<acc_t>().multiply_add;
  const Slab<scalar_t> k(problem.k, b, head, block), v(problem.v, b, head, block);
  Matrix<acc_t> k_sums(block.size(), problem.D), v_sums(block.size(), problem.Dv);
  Matrix<acc_t> p(kTile, seen.size()), grad_scores(kTile, seen.size());
  k_sums.zero(), v_sums.zero();
  for (int64_t h = head * group; h < (head + 1) * group && seen.size() > 0; ++h) {
    const Slab<scalar_t> q(problem.q, b, h, seen), grad_out(backward.grad_out, b, h, seen);
    const TransposedSlab<scalar_t> q_columns(problem.q, b, h, seen),
        grad_columns(backward.grad_out, b, h, seen);
    for_each_tile(queries, b, block, [&](Range tile) {
      const Range all = queries.of(b, tile);
      if (all.size() == 0) return;
      const int64_t first = tile.begin - block.begin;
      q_columns.dots(k.from(tile.begin), tile.size(), all, p);
      grad_columns.dots(v.from(tile.begin), tile.size(), all, grad_scores);
      for (int64_t r = 0; r < tile.size(); ++r) {
        const int64_t j = tile.begin + r;
        key_row(backward, b, h, j, queries.of(b, j), all, p.row(r), grad_scores.row(r));
      }
      multiply_add(grad_scores, q.from(all.begin), {k_sums.row(first), k_sums.stride}, tile.size(),
                   all.size(), whole_vectors<acc_t>(problem.D));
      multiply_add(p, grad_out.from(all.begin), {v_sums.row(first), v_sums.stride}, tile.size(), all.size(),
                   whole_vectors<acc_t>(problem.Dv));
    });
  }
  for (int64_t r = 0; r < block.size(); ++r) {
    store(k_sums.row(r), grad_k.at(b, block.begin + r, head), problem.D);
    store(v_sums.row(r), grad_v.at(b, block.begin + r, head), problem.Dv);
  }
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
    for_each_block(problem.B, problem.H, problem.band.Lq, kBlock, [&](int64_t b, int64_t h, Range block) {
      forward_block(problem, b, h, block, out_rows,
                    statistics + (b * problem.H + h) * problem.band.Lq + block.begin);
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
  const bool key_grads = output_mask[1] || output_mask[2];  // one sweep gives both
  const auto grad_q = empty_gradient(output_mask[0], q), grad_bias = empty_gradient(output_mask[3], bias),
             grad_k = empty_gradient(key_grads, k), grad_v = empty_gradient(key_grads, v);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "local_attention_backward", [&] {
    const Problem<scalar_t> problem(tensors, options);
    const Backward<scalar_t> backward(problem, grad_out, out, lse);
    if (grad_q.defined() || grad_bias.defined()) backward_queries(backward, grad_q, grad_bias);
    if (!key_grads) return;
    const Ranges queries = problem.band.queries();
    const Rows<scalar_t> k_rows(grad_k), v_rows(grad_v);
    for_each_block(problem.B, problem.Hkv, problem.band.Lk, kBlock,
                   [&](int64_t b, int64_t head, Range block) {
                     backward_keys_block(backward, queries, b, head, block, k_rows, v_rows);
                   });
  });
  return {grad_q, output_mask[1] ? grad_k : at::Tensor(), output_mask[2] ? grad_v : at::Tensor(), grad_bias};
}

TORCH_LIBRARY_IMPL(spade_ext, CPU, m) {
  m.impl("local_attention_forward", local_attention_forward);
  m.impl("local_attention_backward", local_attention_backward);
}

}  // namespace spade_ext::local_attention_cpu
