// What the tasks of the CPU kernel read: rows at their strides, scores, and copies of the rows a block sees.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <spade_ext/core/row_products.h>
#include <spade_ext/local_attention/local_attention_band.h>
#include <spade_ext/local_attention/local_attention_shapes.h>

#include <algorithm>
#include <limits>

namespace spade_ext::local_attention_cpu {

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

// What a contiguous tensor of `type` says, or nothing.
inline at::Tensor contiguous(const OptionalTensor& t, at::ScalarType type) {
  return is_given(t) ? t->to(type).contiguous() : at::Tensor();
}

template <class scalar_t>
struct Problem {
  using acc_t = at::opmath_type<scalar_t>;
  int64_t B, H, Hkv, D, Dv;
  Band band;
  Rows<scalar_t> q, k, v;
  at::Tensor bias;    // contiguous, or undefined
  at::Tensor scales;  // (B, Lq): what each query's products are multiplied by
  local_attention_math::Activation activation;
  local_attention_math::Dropout dropout;

  Problem(const local_attention_shapes::Tensors& t, const local_attention_shapes::Options& options)
      : B(t.q.size(0)),
        H(t.q.size(2)),
        Hkv(t.k.size(2)),
        D(t.q.size(3)),
        Dv(t.v.size(3)),
        band(B, t.q.size(1), t.k.size(1), options.left.expect_int(), options.right.expect_int(),
             options.chunk_size, contiguous(t.attention_mask, at::kBool),
             contiguous(t.segment_ids, at::kLong)),
        q(t.q),
        k(t.k),
        v(t.v),
        bias(contiguous(t.bias, t.q.scalar_type())),
        scales(options.scale
                   ? at::full({B, band.Lq}, *options.scale, local_attention_shapes::statistics_options(t.q))
                   : band.counts.clamp_min(1).to(at::toOpMathType(t.q.scalar_type())).reciprocal()),
        activation(local_attention_shapes::check_activation(options.activation)) {
    if (options.dropout_p > 0) dropout = {options.dropout_p, t.dropout_seed->template item<int64_t>()};
  }

  int64_t key_head(int64_t h) const { return h / (H / Hkv); }
  const acc_t* scales_of(int64_t b) const { return scales.template data_ptr<acc_t>() + b * band.Lq; }

  // Calls body for each run of keys in `keys` that are not padding, whose content must not be read.
  template <class Body>
  void for_each_run(int64_t b, Range keys, const Body& body) const {
    const bool* real = band.mask(b);
    for (int64_t j = keys.begin; j < keys.end;) {
      const int64_t end = real ? std::find(real + j, real + keys.end, false) - real : keys.end;
      if (end > j) body(Range{j, end});
      j = end + 1;
    }
  }
  // score <- scale score + bias for query i and its keys, -inf for padding.
  void finish_scores_of_keys(int64_t b, int64_t h, int64_t i, Range keys, acc_t* score) const {
    const acc_t scale = scales_of(b)[i];
    const scalar_t* entry = bias_entry(h, i, keys.begin);
    for (int64_t j = 0; j < keys.size(); ++j) {
      score[j] = scale * score[j] + (entry ? static_cast<acc_t>(entry[j]) : 0);
    }
    fill_padding(b, keys, score, -std::numeric_limits<acc_t>::infinity());
  }
  // The same for key j, which is no padding, and its queries: the next query's entry is the one before.
  void finish_scores_of_queries(int64_t b, int64_t h, Range queries, int64_t j, acc_t* score) const {
    const acc_t* scale = scales_of(b) + queries.begin;
    const scalar_t* entry = bias_entry(h, queries.begin, j);
    for (int64_t i = 0; i < queries.size(); ++i) {
      score[i] = scale[i] * score[i] + (entry ? static_cast<acc_t>(entry[-i]) : 0);
    }
  }
  void fill_padding(int64_t b, Range keys, acc_t* row, acc_t value) const {
    const bool* real = band.mask(b);
    for (int64_t j = 0; real && j < keys.size(); ++j) {
      if (!real[keys.begin + j]) row[j] = value;
    }
  }
  // weight <- keep weight / (1 - p) for query i and its keys, and for key j and its queries.
  void drop_of_keys(int64_t b, int64_t h, int64_t i, Range keys, acc_t* weight) const {
    dropout.apply(weight, keys.size(), pair(b, h, i, keys.begin), 1);
  }
  void drop_of_queries(int64_t b, int64_t h, Range queries, int64_t j, acc_t* weight) const {
    dropout.apply(weight, queries.size(), pair(b, h, queries.begin, j), band.Lk);
  }

 private:
  const scalar_t* bias_entry(int64_t h, int64_t i, int64_t j) const {
    if (!bias.defined()) return nullptr;
    return bias.template data_ptr<scalar_t>() + h * (band.left + band.right + 1) + band.bias_entry(i, j);
  }
  // The number of a pair, modulo 2^64.
  uint64_t pair(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return (uint64_t(b * H + h) * band.Lq + i) * band.Lk + j;
  }
};

// Vector loops run on whole vectors, so past the end of a row of scratch, by less than this.
constexpr int64_t kSlack = 16;

template <class acc_t>
int64_t whole_vectors(int64_t n) {
  const int64_t lanes = row_products<acc_t>().lanes;
  return (n + lanes - 1) / lanes * lanes;
}

// Scratch: a matrix with slack at the end of each row.
template <class acc_t>
struct Matrix {
  int64_t stride;
  at::Tensor memory;
  acc_t* data;

  Matrix(int64_t rows, int64_t width)
      : stride(width + kSlack),
        memory(at::empty({rows, stride}, c10::CppTypeToScalarType<acc_t>::value)),
        data(memory.data_ptr<acc_t>()) {}
  acc_t* row(int64_t r) const { return data + r * stride; }
  void zero() { std::fill_n(data, memory.numel(), acc_t(0)); }
  operator MatrixView<acc_t>() const { return {data, stride}; }
  operator MatrixView<const acc_t>() const { return {data, stride}; }
};

// Some rows of one head in the type of sums: where they stand, or a copy if their type is another one or if
// they do not end with a whole vector.
template <class scalar_t>
struct Slab {
  using acc_t = at::opmath_type<scalar_t>;
  int64_t begin, stride;
  std::optional<Matrix<acc_t>> copy;
  const acc_t* data;

  Slab(const Rows<scalar_t>& rows, int64_t b, int64_t h, Range range) : begin(range.begin) {
    const int64_t width = rows.tensor.size(3), padded = whole_vectors<acc_t>(width);
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      if (width == padded) {
        data = rows.at(b, begin, h), stride = rows.tensor.stride(1);
        return;
      }
    }
    copy.emplace(range.size(), padded);
    data = copy->data, stride = copy->stride;
    for (int64_t l = 0; l < range.size(); ++l) {
      std::copy_n(rows.at(b, begin + l, h), width, copy->row(l));
      std::fill_n(copy->row(l) + width, padded - width, acc_t(0));
    }
  }
  MatrixView<const acc_t> from(int64_t l) const { return {data + (l - begin) * stride, stride}; }
};

// Some rows of one head, transposed: (width, rows).
template <class scalar_t>
struct TransposedSlab {
  using acc_t = at::opmath_type<scalar_t>;
  int64_t begin, width;
  Matrix<acc_t> columns;

  TransposedSlab(const Rows<scalar_t>& rows, int64_t b, int64_t h, Range range)
      : begin(range.begin), width(rows.tensor.size(3)), columns(width, range.size()) {
    const scalar_t* source = rows.at(b, range.begin, h);
    for (int64_t d = 0; d < width; ++d) {
      acc_t* column = columns.row(d);
      for (int64_t l = 0; l < range.size(); ++l) column[l] = source[l * rows.tensor.stride(1) + d];
      std::fill_n(column + range.size(), kSlack, acc_t(0));
    }
  }
  // out (n, range.size()) = x . row l for n rows x; the slack of out gets numbers without meaning.
  void dots(MatrixView<const acc_t> x, int64_t n, Range range, MatrixView<acc_t> out) const {
    const int64_t padded = whole_vectors<acc_t>(range.size());
    for (int64_t r = 0; r < n; ++r) std::fill_n(out.data + r * out.stride, padded, acc_t(0));
    row_products<acc_t>().multiply_add(x, {columns.row(0) + range.begin - begin, columns.stride}, out, n,
                                       width, padded);
  }
};

// exp of n entries of a row of scratch, which are followed by slack or by entries without meaning.
template <class acc_t>
void exp(acc_t* x, int64_t n) {
  row_products<acc_t>().exp(x, whole_vectors<acc_t>(n));
}

// A row holds entries for `all`; those outside of `part` become 0.
template <class acc_t>
void zero_outside(acc_t* row, Range all, Range part) {
  std::fill(row, row + (part.begin - all.begin), acc_t(0));
  std::fill(row + (part.end - all.begin), row + all.size(), acc_t(0));
}

}  // namespace spade_ext::local_attention_cpu
