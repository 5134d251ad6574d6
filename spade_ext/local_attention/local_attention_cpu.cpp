// A task takes a block of rows of one head. Both products of attention, scores = q K^T and out = p V, are
// sums of rows weighted by a row (core/row_products.h): the first over the transposed keys. Beyond inputs,
// outputs and statistics, memory is the keys or queries that a task's block sees.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <spade_ext/core/parallel.h>
#include <spade_ext/core/row_products.h>
#include <spade_ext/local_attention/local_attention_shapes.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace spade_ext::local_attention_cpu {

using local_attention_shapes::OptionalTensor;

// Rows of a task: enough that copying what they see costs little beside the products.
constexpr int64_t kBlock = 128;

struct Range {
  int64_t begin, end;
  int64_t size() const { return std::max<int64_t>(end - begin, 0); }
};

// Which keys a query sees and which queries a key is seen by. Positions: query i stands at i + Lk - Lq.
struct Band {
  int64_t Lq, Lk, left, right;

  int64_t position(int64_t i) const { return i + Lk - Lq; }
  Range keys(int64_t i) const {
    return {std::max<int64_t>(0, position(i) - left), std::min(Lk, position(i) + right + 1)};
  }
  Range queries(int64_t j) const {
    return {std::max<int64_t>(0, j - right - (Lk - Lq)), std::min(Lq, j + left + 1 - (Lk - Lq))};
  }
  int64_t bias_entry(int64_t i, int64_t j) const { return left + j - position(i); }
  Range keys(Range i) const { return {keys(i.begin).begin, keys(i.end - 1).end}; }
  Range queries(Range j) const { return {queries(j.begin).begin, queries(j.end - 1).end}; }
};

// A (B, L, H, D) tensor with contiguous rows, read at its strides.
template <class scalar_t>
struct Rows {
  at::Tensor tensor;
  scalar_t* data;

  explicit Rows(const at::Tensor& t)
      : tensor(t.stride(3) == 1 || t.size(3) == 1 ? t : t.contiguous()), data(tensor.data_ptr<scalar_t>()) {}
  scalar_t* at(int64_t b, int64_t l, int64_t h) const {
    return data + b * tensor.stride(0) + l * tensor.stride(1) + h * tensor.stride(2);
  }
};

template <class scalar_t>
struct Problem {
  using acc_t = at::opmath_type<scalar_t>;
  int64_t B, H, Hkv, D, Dv;
  Band band;
  Rows<scalar_t> q, k, v;
  at::Tensor bias_tensor, mask_tensor;  // contiguous, or undefined
  acc_t scale;

  Problem(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_, const OptionalTensor& bias,
          const OptionalTensor& mask, int64_t left, int64_t right, double scale_)
      : B(q_.size(0)),
        H(q_.size(2)),
        Hkv(k_.size(2)),
        D(q_.size(3)),
        Dv(v_.size(3)),
        band{q_.size(1), k_.size(1), left, right},
        q(q_),
        k(k_),
        v(v_),
        bias_tensor(is_given(bias) ? bias->contiguous() : at::Tensor()),
        mask_tensor(is_given(mask) ? mask->contiguous() : at::Tensor()),
        scale(static_cast<acc_t>(scale_)) {}

  int64_t key_head(int64_t h) const { return h / (H / Hkv); }
  bool sees(int64_t b, int64_t j) const {
    return !mask_tensor.defined() || mask_tensor.data_ptr<bool>()[b * band.Lk + j];
  }
  // Calls body for each run of keys in `keys` that are not padding.
  template <class Body>
  void for_each_run(int64_t b, Range keys, const Body& body) const {
    for (int64_t j = keys.begin; j < keys.end;) {
      Range run{j, j};
      while (run.end < keys.end && sees(b, run.end)) ++run.end;
      if (run.size() > 0) body(run);
      j = run.end + 1;
    }
  }
  // score <- scale score + bias, for query i and a run of keys.
  void scale_and_bias_keys(int64_t h, int64_t i, Range run, acc_t* score) const {
    const scalar_t* entry = bias_entry(h, i, run.begin);
    for (int64_t j = 0; j < run.size(); ++j) {
      score[j] = scale * score[j] + (entry ? static_cast<acc_t>(entry[j]) : 0);
    }
  }
  // The same for key j and some queries: the next query's entry is the one before.
  void scale_and_bias_queries(int64_t h, Range queries, int64_t j, acc_t* score) const {
    const scalar_t* entry = bias_entry(h, queries.begin, j);
    for (int64_t i = 0; i < queries.size(); ++i) {
      score[i] = scale * score[i] + (entry ? static_cast<acc_t>(entry[-i]) : 0);
    }
  }

 private:
  const scalar_t* bias_entry(int64_t h, int64_t i, int64_t j) const {
    if (!bias_tensor.defined()) return nullptr;
    return bias_tensor.data_ptr<scalar_t>() + h * (band.left + band.right + 1) + band.bias_entry(i, j);
  }
};

// Vector loops may run up to this many entries past the end of a row of scratch.
constexpr int64_t kSlack = 16;

int64_t with_slack(int64_t n) { return (n + kSlack - 1) / kSlack * kSlack; }

template <class acc_t>
struct Scratch {
  at::Tensor memory;
  acc_t* data;
  explicit Scratch(int64_t n)
      : memory(at::empty({n + kSlack}, c10::CppTypeToScalarType<acc_t>::value)),
        data(memory.data_ptr<acc_t>()) {}
  void zero(int64_t n) { std::fill_n(data, n, acc_t(0)); }
};

// Some rows of one head in the type of sums: where they stand, or a copy if their type is another one.
template <class scalar_t>
struct Slab {
  using acc_t = at::opmath_type<scalar_t>;
  int64_t begin, stride;
  std::optional<Scratch<acc_t>> copy;
  const acc_t* data;

  Slab(const Rows<scalar_t>& rows, int64_t b, int64_t h, Range range) : begin(range.begin) {
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      data = rows.at(b, range.begin, h);
      stride = rows.tensor.stride(1);
    } else {
      stride = rows.tensor.size(3);
      copy.emplace(range.size() * stride);
      data = copy->data;
      for (int64_t l = range.begin; l < range.end; ++l) {
        std::copy_n(rows.at(b, l, h), stride, copy->data + (l - begin) * stride);
      }
    }
  }
  const acc_t* row(int64_t l) const { return data + (l - begin) * stride; }
};

// Some rows of one head, transposed: (width, rows).
template <class scalar_t>
struct TransposedSlab {
  using acc_t = at::opmath_type<scalar_t>;
  int64_t begin, width, stride;
  Scratch<acc_t> memory;

  TransposedSlab(const Rows<scalar_t>& rows, int64_t b, int64_t h, Range range)
      : begin(range.begin),
        width(rows.tensor.size(3)),
        stride(range.size() + kSlack),
        memory(width * stride) {
    const scalar_t* source = rows.at(b, range.begin, h);
    for (int64_t d = 0; d < width; ++d) {
      acc_t* column = memory.data + d * stride;
      for (int64_t l = 0; l < range.size(); ++l) column[l] = source[l * rows.tensor.stride(1) + d];
      std::fill_n(column + range.size(), kSlack, acc_t(0));
    }
  }
  // out[l - range.begin] = x . row l, and numbers without meaning in the slack after them.
  void dots(const acc_t* x, Range range, acc_t* out) const {
    std::fill_n(out, with_slack(range.size()), acc_t(0));
    row_products<acc_t>().combine(x, memory.data + range.begin - begin, stride, width,
                                  with_slack(range.size()), out);
  }
};

template <class acc_t>
void exp(acc_t* x, int64_t n) {
  row_products<acc_t>().exp(x, with_slack(n));
}

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

// out = softmax(scores) v for the queries of a block, and the log-sum-exp of each one's scores.
template <class scalar_t, class acc_t = at::opmath_type<scalar_t>>
void forward_block(const Problem<scalar_t>& problem, int64_t b, int64_t h, Range block,
                   const Rows<scalar_t>& out, acc_t* lse) {
  const Band& band = problem.band;
  const Range all = band.keys(block);
  const Slab<scalar_t> q(problem.q, b, h, block), v(problem.v, b, problem.key_head(h), all);
  const TransposedSlab<scalar_t> k(problem.k, b, problem.key_head(h), all);
  Scratch<acc_t> p(all.size()), sum(problem.Dv);
  for (int64_t i = block.begin; i < block.end; ++i) {
    const Range keys = band.keys(i);
    acc_t largest = -std::numeric_limits<acc_t>::infinity(), total = 0;
    bool any = false;
    problem.for_each_run(b, keys, [&](Range run) {
      acc_t* score = p.data + run.begin - keys.begin;
      k.dots(q.row(i), run, score);
      problem.scale_and_bias_keys(h, i, run, score);
      largest = std::max(largest, *std::max_element(score, score + run.size()));
      any = true;
    });
    for (int64_t j = 0; j < keys.size(); ++j) p.data[j] -= largest;
    exp(p.data, keys.size());
    sum.zero(problem.Dv);
    problem.for_each_run(b, keys, [&](Range run) {
      const acc_t* weight = p.data + run.begin - keys.begin;
      total = std::accumulate(weight, weight + run.size(), total);
      row_products<acc_t>().combine(weight, v.row(run.begin), v.stride, run.size(), problem.Dv, sum.data);
    });
    for (int64_t d = 0; any && d < problem.Dv; ++d) sum.data[d] /= total;
    store(sum.data, out.at(b, i, h), problem.Dv);
    *lse++ = any ? largest + std::log(total) : std::numeric_limits<acc_t>::infinity();
  }
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

// grad_q for the queries of a block; what they add to the bias gradient goes into `table`, unless it is null.
template <class scalar_t, class acc_t = at::opmath_type<scalar_t>>
void backward_queries_block(const Backward<scalar_t>& backward, int64_t b, int64_t h, Range block,
                            const std::optional<Rows<scalar_t>>& grad_q, acc_t* table) {
  const auto& problem = backward.problem;
  const Band& band = problem.band;
  const Range all = band.keys(block);
  const int64_t head = problem.key_head(h);
  const Slab<scalar_t> q(problem.q, b, h, block), grad_out(backward.grad_out, b, h, block),
      k(problem.k, b, head, all);
  const TransposedSlab<scalar_t> k_columns(problem.k, b, head, all), v_columns(problem.v, b, head, all);
  Scratch<acc_t> p(all.size()), grad_p(all.size()), sum(problem.D);
  for (int64_t i = block.begin; i < block.end; ++i) {
    const Range keys = band.keys(i);
    const acc_t lse = backward.lse_row(b, h)[i], delta = backward.delta_row(b, h)[i];
    problem.for_each_run(b, keys, [&](Range run) {
      acc_t* score = p.data + run.begin - keys.begin;
      k_columns.dots(q.row(i), run, score);
      problem.scale_and_bias_keys(h, i, run, score);
    });
    for (int64_t j = 0; j < keys.size(); ++j) p.data[j] -= lse;
    exp(p.data, keys.size());
    sum.zero(problem.D);
    problem.for_each_run(b, keys, [&](Range run) {
      const acc_t* probability = p.data + run.begin - keys.begin;
      v_columns.dots(grad_out.row(i), run, grad_p.data);
      acc_t* grad_score = grad_p.data;
      for (int64_t j = 0; j < run.size(); ++j) grad_score[j] = probability[j] * (grad_p.data[j] - delta);
      if (table) {
        acc_t* entry = table + band.bias_entry(i, run.begin);
        for (int64_t j = 0; j < run.size(); ++j) entry[j] += grad_score[j];
      }
      row_products<acc_t>().combine(grad_score, k.row(run.begin), k.stride, run.size(), problem.D, sum.data);
    });
    for (int64_t d = 0; d < problem.D; ++d) sum.data[d] *= problem.scale;
    if (grad_q) store(sum.data, grad_q->at(b, i, h), problem.D);
  }
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

// grad_k and grad_v for the keys of a block: each gathers from the queries that see it, its group's heads in
// order.
template <class scalar_t, class acc_t = at::opmath_type<scalar_t>>
void backward_keys_block(const Backward<scalar_t>& backward, int64_t b, int64_t head, Range block,
                         const Rows<scalar_t>& grad_k, const Rows<scalar_t>& grad_v) {
  const auto& problem = backward.problem;
  const Band& band = problem.band;
  const Range all = band.queries(block);
  const int64_t D = problem.D, Dv = problem.Dv, group = problem.H / problem.Hkv;
  Scratch<acc_t> k_sums(block.size() * D), v_sums(block.size() * Dv), p(all.size()), grad_score(all.size());
  k_sums.zero(block.size() * D), v_sums.zero(block.size() * Dv);
  for (int64_t h = head * group; h < (head + 1) * group && all.size() > 0; ++h) {
    const Slab<scalar_t> k(problem.k, b, head, block), v(problem.v, b, head, block);
    const Slab<scalar_t> q(problem.q, b, h, all), grad_out(backward.grad_out, b, h, all);
    const TransposedSlab<scalar_t> q_columns(problem.q, b, h, all),
        grad_columns(backward.grad_out, b, h, all);
    const acc_t *lse = backward.lse_row(b, h), *delta = backward.delta_row(b, h);
    for (int64_t j = block.begin; j < block.end; ++j) {
      const Range queries = band.queries(j);
      const int64_t n = queries.size(), first = queries.begin;
      if (n == 0 || !problem.sees(b, j)) continue;
      q_columns.dots(k.row(j), queries, p.data);
      grad_columns.dots(v.row(j), queries, grad_score.data);
      problem.scale_and_bias_queries(h, queries, j, p.data);
      for (int64_t i = 0; i < n; ++i) p.data[i] -= lse[first + i];
      exp(p.data, n);
      for (int64_t i = 0; i < n; ++i)
        grad_score.data[i] = p.data[i] * (grad_score.data[i] - delta[first + i]);
      const auto& products = row_products<acc_t>();
      products.combine(grad_score.data, q.row(first), q.stride, n, D, k_sums.data + (j - block.begin) * D);
      products.combine(p.data, grad_out.row(first), grad_out.stride, n, Dv,
                       v_sums.data + (j - block.begin) * Dv);
    }
  }
  for (int64_t d = 0; d < block.size() * D; ++d) k_sums.data[d] *= problem.scale;
  for (int64_t j = block.begin; j < block.end; ++j) {
    store(k_sums.data + (j - block.begin) * D, grad_k.at(b, j, head), D);
    store(v_sums.data + (j - block.begin) * Dv, grad_v.at(b, j, head), Dv);
  }
}

std::tuple<at::Tensor, at::Tensor> local_attention_forward(const at::Tensor& q, const at::Tensor& k,
                                                           const at::Tensor& v, const OptionalTensor& bias,
                                                           const OptionalTensor& attention_mask, int64_t left,
                                                           int64_t right, double scale) {
  local_attention_shapes::check_tensors(q, k, v, attention_mask);
  local_attention_shapes::check_bias(bias, q, left + right + 1, "(H, left + right + 1)");
  auto out = at::empty({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options());
  auto lse = at::empty({q.size(0), q.size(2), q.size(1)}, local_attention_shapes::statistics_options(q));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "local_attention", [&] {
    const Problem<scalar_t> problem(q, k, v, bias, attention_mask, left, right, scale);
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
    const OptionalTensor& bias, const OptionalTensor& attention_mask, const at::Tensor& out,
    const at::Tensor& lse, int64_t left, int64_t right, double scale, std::array<bool, 4> output_mask) {
  auto empty_like = [](const at::Tensor& t) { return at::empty(t.sizes(), t.options()); };
  at::Tensor grad_q, grad_k, grad_v, grad_bias;
  if (output_mask[0]) grad_q = empty_like(q);
  if (output_mask[1] || output_mask[2]) grad_k = empty_like(k), grad_v = empty_like(v);
  if (output_mask[3]) grad_bias = empty_like(*bias);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "local_attention_backward", [&] {
    const Problem<scalar_t> problem(q, k, v, bias, attention_mask, left, right, scale);
    const Backward<scalar_t> backward(problem, grad_out, out, lse);
    if (grad_q.defined() || grad_bias.defined()) backward_queries(backward, grad_q, grad_bias);
    if (!grad_k.defined()) return;
    const Rows<scalar_t> k_rows(grad_k), v_rows(grad_v);
    for_each_block(problem.B, problem.Hkv, problem.band.Lk, kBlock,
                   [&](int64_t b, int64_t head, Range block) {
                     backward_keys_block(backward, b, head, block, k_rows, v_rows);
                   });
  });
  return {grad_q, output_mask[1] ? grad_k : at::Tensor(), output_mask[2] ? grad_v : at::Tensor(), grad_bias};
}

TORCH_LIBRARY_IMPL(spade_ext, CPU, m) {
  m.impl("local_attention_forward", local_attention_forward);
  m.impl("local_attention_backward", local_attention_backward);
}

}  // namespace spade_ext::local_attention_cpu
