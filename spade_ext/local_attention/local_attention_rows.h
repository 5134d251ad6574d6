// What the tasks of the CPU kernel read, and their scratch.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <spade_ext/local_attention/local_attention_band.h>
#include <spade_ext/local_attention/local_attention_shapes.h>
#include <spade_ext/local_attention/local_attention_tiles.h>

#include <algorithm>
#include <array>
#include <limits>

namespace spade_ext::local_attention_cpu {

// A (B, L, H, D) or (B, H, D) tensor with contiguous rows, read at its strides.
template <class scalar_t>
struct Rows {
  at::Tensor tensor;
  scalar_t* data;

  explicit Rows(const at::Tensor& t)
      : tensor(t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous()),
        data(tensor.data_ptr<scalar_t>()) {}
  scalar_t* at(int64_t b, int64_t l, int64_t h) const {
    return data + b * tensor.stride(0) + l * tensor.stride(1) + h * tensor.stride(2);
  }
  scalar_t* at(int64_t b, int64_t h) const { return data + b * tensor.stride(0) + h * tensor.stride(1); }
  int64_t stride() const { return tensor.stride(1); }
};

// What a contiguous tensor of `type` says, or nothing.
inline at::Tensor contiguous(const OptionalTensor& t, at::ScalarType type) {
  return is_given(t) ? t->to(type).contiguous() : at::Tensor();
}

// One table a head of what is added to products, by p(i) - j in rising order: a query's next entry is that of
// the next query. Where the band ends it is -inf, for as many entries as tiles may look beyond.
template <class acc_t>
class BiasTables {
 public:
  int64_t entries, pad, width;

  BiasTables(const at::Tensor& bias, const Band& band, int64_t pad_)
      : entries(std::max<int64_t>(band.reach_left() + band.reach_right() + 1, 0)),
        pad(pad_),
        width(entries + 2 * pad),
        shift_(pad + band.reach_right() + band.Lk - band.Lq),
        tables_(at::full({bias.defined() ? bias.size(0) : 1, width}, -std::numeric_limits<acc_t>::infinity(),
                         c10::CppTypeToScalarType<acc_t>::value)) {
    auto inside = tables_.narrow(1, pad, entries);
    bias.defined() ? inside.copy_(of_band(bias, band).flip(1)) : inside.zero_();
  }
  // The entries of a bias that the band can reach.
  at::Tensor of_band(const at::Tensor& bias, const Band& band) const {
    return bias.narrow(1, band.left - band.reach_left(), entries);
  }
  int64_t entry(int64_t i, int64_t j) const { return shift_ + i - j; }
  const acc_t* at(int64_t h, int64_t i, int64_t j) const {
    return tables_.template data_ptr<acc_t>() + (tables_.size(0) == 1 ? 0 : h) * width + entry(i, j);
  }

 private:
  int64_t shift_;
  at::Tensor tables_;
};

template <class scalar_t>
struct Problem {
  using acc_t = at::opmath_type<scalar_t>;
  const LocalAttentionTiles<scalar_t>& tiles = local_attention_tiles<scalar_t>();
  int64_t B, H, Hkv, D, Dv;
  Band band;
  Rows<scalar_t> q, k, v;
  BiasTables<acc_t> bias;
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
        bias(contiguous(t.bias, t.q.scalar_type()), band, 2 * tiles.panel),
        activation(local_attention_shapes::check_activation(options.activation)),
        scales_(options.scale
                    ? at::full({1, band.Lq}, *options.scale, local_attention_shapes::statistics_options(t.q))
                    : band.counts.clamp_min(1).to(at::toOpMathType(t.q.scalar_type())).reciprocal()),
        real_keys_(contiguous(t.attention_mask, at::toOpMathType(t.q.scalar_type()))) {
    if (options.dropout_p > 0) dropout = {options.dropout_p, t.dropout_seed->template item<int64_t>()};
  }

  int64_t group() const { return H / Hkv; }
  // What query i's products are multiplied by.
  const acc_t* scales(int64_t b, int64_t i) const {
    return scales_.template data_ptr<acc_t>() + (scales_.size(0) == 1 ? 0 : b) * band.Lq + i;
  }
  // 1 or, for padding, 0; null where there is none.
  const acc_t* real_keys(int64_t b, int64_t j) const {
    return real_keys_.defined() ? real_keys_.template data_ptr<acc_t>() + b * band.Lk + j : nullptr;
  }
  // Elements of a matrix in panels.
  int64_t size(int64_t rows, int64_t width) const {
    return (width + tiles.panel - 1) / tiles.panel * tiles.panel * rows;
  }
  int64_t vectors(int64_t columns) const { return columns > tiles.lanes ? 2 : 1; }
  // Calls body(panel, vectors) for the panels of a matrix.
  template <class Body>
  void for_each_panel(int64_t width, const Body& body) const {
    for (int64_t p = 0; p * tiles.panel < width; ++p) body(p, vectors(width - p * tiles.panel));
  }
  // Keys are rows of x, a panel of queries from i on its columns: x <- keep x / (1 - p).
  void drop(int64_t b, int64_t h, Range queries, Range keys, acc_t* x) const {
    if (dropout.threshold == 0) return;
    const uint64_t first = (uint64_t(b * H + h) * band.Lq + queries.begin) * band.Lk + keys.begin;
    tiles.drop(dropout, x, keys.size(), first, band.Lk);
  }

 private:
  at::Tensor scales_, real_keys_;
};

// One allocation in `count` parts, each at a cache line.
template <class acc_t, size_t count>
struct Scratch {
  at::Tensor memory;
  std::array<acc_t*, count> parts;

  explicit Scratch(std::array<int64_t, count> sizes) {
    int64_t total = 0;
    for (int64_t& size : sizes) size = (size + 15) / 16 * 16, total += size;
    memory = at::empty({total}, c10::CppTypeToScalarType<acc_t>::value);
    acc_t* part = memory.template data_ptr<acc_t>();
    for (size_t n = 0; n < count; ++n) parts[n] = part, part += sizes[n];
  }
};

}  // namespace spade_ext::local_attention_cpu
