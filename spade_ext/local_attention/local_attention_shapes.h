// What local_attention's Meta and CPU kernels share: arguments, checks and the types of results.
#pragma once

#include <ATen/OpMathType.h>
#include <c10/util/OptionalArrayRef.h>
#include <spade_ext/core/autograd.h>
#include <spade_ext/core/checks.h>
#include <spade_ext/local_attention/local_attention_math.h>

#include <algorithm>
#include <string_view>
#include <tuple>
#include <utility>

namespace spade_ext::local_attention_shapes {

using local_attention_math::Activation;
constexpr const char* kOp = "local_attention";

struct Tensors {
  const at::Tensor &q, &k, &v;
  const OptionalTensor &bias, &attention_mask, &segment_ids, &dropout_seed;
};

// What the inner ops take beside tensors: a band, left + right + 1 wide as bias is, -1 wide in a full row of
// no keys or queries, cut into chunks or not. No scale: the scores' products are divided by the number of
// keys.
struct Options {
  c10::SymInt left, right;
  std::optional<int64_t> chunk_size;
  std::optional<double> scale;
  std::string_view activation;
  double dropout_p;
};

// A (B, Lk) tensor that says something of each key.
inline void check_of_keys(const char* name, const at::Tensor& t, const at::Tensor& k) {
  TORCH_CHECK_VALUE(t.device() == k.device(), kOp, ": ", name, " is on ", t.device(), ", expected ",
                    k.device(), ", the device of q");
  check_dim(kOp, name, t, 2, "(B, Lk)");
  for (int64_t dim : {0, 1}) check_size(kOp, name, t, dim, k.sym_size(dim), "(B, Lk)");
}

inline void check_heads(const char* op, const c10::SymInt& H, const c10::SymInt& Hkv) {
  TORCH_CHECK_VALUE(
      Hkv.sym_gt(0).expect_true(__FILE__, __LINE__) && (H % Hkv).sym_eq(0).expect_true(__FILE__, __LINE__),
      op, ": k has ", Hkv, " heads, expected a divisor of the ", H, " heads of q");
}

inline void check_tensors(const Tensors& t) {
  const auto& [q, k, v, bias, attention_mask, segment_ids, dropout_seed] = t;
  check_dim(kOp, "q", q, 4, "(B, Lq, H, D)");
  check_dim(kOp, "k", k, 4, "(B, Lk, Hkv, D)");
  check_dim(kOp, "v", v, 4, "(B, Lk, Hkv, Dv)");
  check_floating(kOp, "q", q);
  check_like(kOp, "k", k, "q", q);
  check_like(kOp, "v", v, "q", q);
  check_size(kOp, "k", k, 0, q.sym_size(0), "(B, Lk, Hkv, D)");
  check_size(kOp, "k", k, 3, q.sym_size(3), "(B, Lk, Hkv, D)");
  for (int64_t dim : {0, 1, 2}) check_size(kOp, "v", v, dim, k.sym_size(dim), "(B, Lk, Hkv, Dv)");
  check_heads(kOp, q.sym_size(2), k.sym_size(2));
  if (is_given(attention_mask)) {
    TORCH_CHECK_TYPE(attention_mask->scalar_type() == at::kBool, kOp, ": attention_mask is ",
                     attention_mask->scalar_type(), ", expected bool, true at real keys");
    check_of_keys("attention_mask", *attention_mask, k);
  }
  if (is_given(segment_ids)) {
    TORCH_CHECK_TYPE(at::isIntegralType(segment_ids->scalar_type(), /*includeBool=*/false), kOp,
                     ": segment_ids is ", segment_ids->scalar_type(), ", expected integers");
    check_of_keys("segment_ids", *segment_ids, k);
  }
  if (is_given(dropout_seed)) {
    TORCH_CHECK_TYPE(dropout_seed->scalar_type() == at::kLong, kOp, ": dropout_seed is ",
                     dropout_seed->scalar_type(), ", expected int64");
    check_dim(kOp, "dropout_seed", *dropout_seed, 0, "()");
    TORCH_CHECK_VALUE(dropout_seed->is_cpu() || dropout_seed->device() == q.device(), kOp,
                      ": dropout_seed is on ", dropout_seed->device(), ", expected cpu or ", q.device(),
                      ", the device of q");
  }
}

inline Activation check_activation(std::string_view activation) {
  if (activation == "softmax") return Activation::softmax;
  if (activation == "relu2") return Activation::relu2;
  if (activation == "laplace") return Activation::laplace;
  TORCH_CHECK_VALUE(false, kOp, ": activation is ", activation, ", expected softmax, relu2 or laplace");
}

// Sums of windows, chunks and positions must not overflow.
constexpr int64_t kLargestWindow = int64_t(1) << 40;

inline void check_chunk_size(std::optional<int64_t> chunk_size) {
  TORCH_CHECK_VALUE(!chunk_size || (*chunk_size >= 1 && *chunk_size <= kLargestWindow), kOp,
                    ": chunk_size is ", *chunk_size, ", expected 1 to ", kLargestWindow,
                    "; no chunk is a full row");
}

inline void check_dropout(double dropout_p, const OptionalTensor& dropout_seed) {
  TORCH_CHECK_VALUE(dropout_p >= 0 && dropout_p < 1, kOp, ": dropout_p is ", dropout_p,
                    ", expected at least 0 and less than 1");
  TORCH_CHECK_VALUE(dropout_p == 0 || is_given(dropout_seed), kOp, ": dropout_seed is None with dropout_p ",
                    dropout_p, ", expected an int64 tensor of one number");
}

// What only the public op is asked for: combinations that mean nothing.
inline void check_window(at::OptionalIntArrayRef window, std::optional<int64_t> chunk_size, bool causal) {
  if (!window) return;
  TORCH_CHECK_VALUE(window->size() == 2 && (*window)[0] >= 0 && (*window)[1] >= 0, kOp, ": window is ",
                    *window, ", expected (left, right), both 0 or more");
  TORCH_CHECK_VALUE(std::max((*window)[0], (*window)[1]) <= kLargestWindow, kOp, ": window is ", *window,
                    ", expected at most ", kLargestWindow, "; no window is a full row");
  TORCH_CHECK_VALUE(!causal || (*window)[1] == 0, kOp, ": causal is true with window ", *window,
                    ", expected a window whose right is 0");
  TORCH_CHECK_VALUE(!chunk_size, kOp, ": chunk_size is ", *chunk_size, " with window ", *window,
                    ", expected one of the two");
}

inline void check_elementwise(at::OptionalIntArrayRef window, std::optional<double> scale,
                              std::string_view activation) {
  if (check_activation(activation) == Activation::softmax) return;
  TORCH_CHECK_VALUE(!window, kOp, ": activation is ", activation, " with window ", *window,
                    ", expected a chunk or a full row");
  TORCH_CHECK_VALUE(!scale, kOp, ": scale is ", *scale, " with activation ", activation,
                    ", expected None: it divides by the number of keys");
}

inline void check_bias(const OptionalTensor& bias, const at::Tensor& q, const c10::SymInt& entries,
                       const char* letters) {
  if (!is_given(bias)) return;
  check_dim(kOp, "bias", *bias, 2, letters);
  check_like(kOp, "bias", *bias, "q", q);
  check_size(kOp, "bias", *bias, 0, q.sym_size(2), letters);
  check_size(kOp, "bias", *bias, 1, entries, letters);
}

inline void check_forward(const Tensors& t, const Options& options) {
  check_tensors(t);
  const auto &left = options.left, &right = options.right;
  for (const auto& side : {left, right}) {
    TORCH_CHECK_VALUE(side.sym_ge(-1).expect_true(__FILE__, __LINE__) &&
                          side.sym_le(kLargestWindow).expect_true(__FILE__, __LINE__),
                      kOp, ": left and right are ", left, " and ", right, ", expected -1 to ",
                      kLargestWindow);
  }
  check_bias(t.bias, t.q, left + right + 1, "(H, left + right + 1)");
  check_chunk_size(options.chunk_size);
  check_activation(options.activation);
  check_dropout(options.dropout_p, t.dropout_seed);
}

inline void check_backward(const at::Tensor& grad_out, const Tensors& t, const at::Tensor& out,
                           const at::Tensor& lse, const Options& options, std::array<bool, 4> output_mask) {
  check_forward(t, options);
  const at::Tensor& q = t.q;
  for (const auto& [name, like_out] : {std::pair("grad_out", grad_out), std::pair("out", out)}) {
    check_dim(kOp, name, like_out, 4, "(B, Lq, H, Dv)");
    check_like(kOp, name, like_out, "q", q);
    for (int64_t dim : {0, 1, 2}) check_size(kOp, name, like_out, dim, q.sym_size(dim), "(B, Lq, H, Dv)");
    check_size(kOp, name, like_out, 3, t.v.sym_size(3), "(B, Lq, H, Dv)");
  }
  check_dim(kOp, "lse", lse, 3, "(B, H, Lq)");
  check_size(kOp, "lse", lse, 0, q.sym_size(0), "(B, H, Lq)");
  check_size(kOp, "lse", lse, 1, q.sym_size(2), "(B, H, Lq)");
  check_size(kOp, "lse", lse, 2, q.sym_size(1), "(B, H, Lq)");
  TORCH_CHECK_TYPE(lse.scalar_type() == at::toOpMathType(q.scalar_type()), kOp, ": lse is ",
                   lse.scalar_type(), ", expected ", at::toOpMathType(q.scalar_type()));
  check_wanted(kOp, "bias", output_mask[3], t.bias);
}

struct StepTensors {
  const at::Tensor &q, &k, &v;
  const OptionalTensor& bias;
  const at::Tensor &k_cache, &v_cache, &position;
};

inline void check_step(const StepTensors& t, std::optional<double> scale) {
  constexpr const char *op = "local_attention_step", *letters = "(B, left + 1, Hkv, D)",
                       *letters_of_v = "(B, left + 1, Hkv, Dv)";
  const auto& [q, k, v, bias, k_cache, v_cache, position] = t;
  check_dim(op, "q", q, 3, "(B, H, D)");
  check_dim(op, "k", k, 3, "(B, Hkv, D)");
  check_dim(op, "v", v, 3, "(B, Hkv, Dv)");
  check_dim(op, "k_cache", k_cache, 4, letters);
  check_dim(op, "v_cache", v_cache, 4, letters_of_v);
  check_floating(op, "q", q);
  for (const auto& [name, like_q] :
       {std::pair("k", k), std::pair("v", v), std::pair("k_cache", k_cache), std::pair("v_cache", v_cache)})
    check_like(op, name, like_q, "q", q);
  check_size(op, "k", k, 0, q.sym_size(0), "(B, Hkv, D)");
  check_size(op, "k", k, 2, q.sym_size(2), "(B, Hkv, D)");
  for (int64_t dim : {0, 1}) check_size(op, "v", v, dim, k.sym_size(dim), "(B, Hkv, Dv)");
  check_heads(op, q.sym_size(1), k.sym_size(1));
  TORCH_CHECK_VALUE(k_cache.sym_size(1).sym_gt(0).expect_true(__FILE__, __LINE__), op, ": k_cache has shape ",
                    shape_text(k_cache), ", expected at least 1 in dimension 1 of ", letters);
  check_size(op, "v_cache", v_cache, 1, k_cache.sym_size(1), letters_of_v);
  for (const auto& [name, cache, row, of_cache] :
       {std::tuple("k_cache", k_cache, k, letters), std::tuple("v_cache", v_cache, v, letters_of_v)}) {
    check_size(op, name, cache, 0, row.sym_size(0), of_cache);
    check_size(op, name, cache, 2, row.sym_size(1), of_cache);
    check_size(op, name, cache, 3, row.sym_size(2), of_cache);
  }
  if (is_given(bias)) {
    check_dim(op, "bias", *bias, 2, "(H, left + 1)");
    check_like(op, "bias", *bias, "q", q);
    check_size(op, "bias", *bias, 0, q.sym_size(1), "(H, left + 1)");
    check_size(op, "bias", *bias, 1, k_cache.sym_size(1), "(H, left + 1)");
  }
  TORCH_CHECK_TYPE(position.scalar_type() == at::kLong, op, ": position is ", position.scalar_type(),
                   ", expected int64");
  TORCH_CHECK_VALUE(position.device() == q.device(), op, ": position is on ", position.device(),
                    ", expected ", q.device(), ", the device of q");
  check_dim(op, "position", position, 1, "(B,)");
  check_size(op, "position", position, 0, q.sym_size(0), "(B,)");
  TORCH_CHECK_VALUE(scale || q.sym_size(2).sym_gt(0).expect_true(__FILE__, __LINE__), op,
                    ": scale is None with q of shape ", shape_text(q), ", expected a number where D is 0");
}

// The log-sum-exp of scores is kept in the type that sums are accumulated in.
inline at::TensorOptions statistics_options(const at::Tensor& q) {
  return q.options().dtype(at::toOpMathType(q.scalar_type()));
}

}  // namespace spade_ext::local_attention_shapes
