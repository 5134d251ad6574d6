// What the tasks of the CPU kernel read: the band, rows at their strides, and copies of the rows a block
// sees.
#pragma once

#include <ATen/ops/empty.h>
#include <spade_ext/core/row_products.h>
#include <spade_ext/local_attention/local_attention_shapes.h>

#include <algorithm>
#include <functional>
#include <limits>

namespace spade_ext::local_attention_cpu {

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
  const bool* mask(int64_t b) const {
    return mask_tensor.defined() ? mask_tensor.data_ptr<bool>() + b * band.Lk : nullptr;
  }
  bool sees_any(int64_t b, Range keys) const {
    const bool* real = mask(b);
    return keys.size() > 0 && (!real || std::any_of(real + keys.begin, real + keys.end, std::identity()));
  }
  // Calls body for each run of keys in `keys` that are not padding, whose content must not be read.
  template <class Body>
  void for_each_run(int64_t b, Range keys, const Body& body) const {
    const bool* real = mask(b);
    for (int64_t j = keys.begin; j < keys.end;) {
      const int64_t end = real ? std::find(real + j, real + keys.end, false) - real : keys.end;
      if (end > j) body(Range{j, end});
      j = end + 1;
    }
  }
  // score <- scale score + bias for query i and its keys, -inf for padding.
  void finish_scores_of_keys(int64_t b, int64_t h, int64_t i, Range keys, acc_t* score) const {
    const scalar_t* entry = bias_entry(h, i, keys.begin);
    for (int64_t j = 0; j < keys.size(); ++j) {
      score[j] = scale * score[j] + (entry ? static_cast<acc_t>(entry[j]) : 0);
    }
    fill_padding(b, keys, score, -std::numeric_limits<acc_t>::infinity());
  }
  // The same for key j, which is no padding, and its queries: the next query's entry is the one before.
  void finish_scores_of_queries(int64_t h, Range queries, int64_t j, acc_t* score) const {
    const scalar_t* entry = bias_entry(h, queries.begin, j);
    for (int64_t i = 0; i < queries.size(); ++i) {
      score[i] = scale * score[i] + (entry ? static_cast<acc_t>(entry[-i]) : 0);
    }
  }
  void fill_padding(int64_t b, Range keys, acc_t* row, acc_t value) const {
    const bool* real = mask(b);
    for (int64_t j = 0; real && j < keys.size(); ++j) {
      if (!real[keys.begin + j]) row[j] = value;
    }
  }

 private:
  const scalar_t* bias_entry(int64_t h, int64_t i, int64_t j) const {
    if (!bias_tensor.defined()) return nullptr;
    return bias_tensor.data_ptr<scalar_t>() + h * (band.left + band.right + 1) + band.bias_entry(i, j);
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
