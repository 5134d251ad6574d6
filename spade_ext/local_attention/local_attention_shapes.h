// What local_attention's Meta and CPU kernels share: checks and the types of results.
#pragma once

#include <ATen/OpMathType.h>
#include <c10/util/OptionalArrayRef.h>
#include <spade_ext/core/autograd.h>
#include <spade_ext/core/checks.h>

#include <algorithm>
#include <utility>

namespace spade_ext::local_attention_shapes {

inline void check_tensors(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const OptionalTensor& attention_mask) {
  constexpr const char* op = "local_attention";
  check_dim(op, "q", q, 4, "(B, Lq, H, D)");
  check_dim(op, "k", k, 4, "(B, Lk, Hkv, D)");
  check_dim(op, "v", v, 4, "(B, Lk, Hkv, Dv)");
  TORCH_CHECK_TYPE(at::isFloatingType(q.scalar_type()), op, ": q is ", q.scalar_type(),
                   ", expected float64, float32, float16 or bfloat16");
  check_like(op, "k", k, "q", q);
  check_like(op, "v", v, "q", q);
  check_size(op, "k", k, 0, q.sym_size(0), "(B, Lk, Hkv, D)");
  check_size(op, "k", k, 3, q.sym_size(3), "(B, Lk, Hkv, D)");
  for (int64_t dim : {0, 1, 2}) check_size(op, "v", v, dim, k.sym_size(dim), "(B, Lk, Hkv, Dv)");
  const auto H = q.sym_size(2), Hkv = k.sym_size(2);
  TORCH_CHECK_VALUE(
      Hkv.sym_gt(0).expect_true(__FILE__, __LINE__) && (H % Hkv).sym_eq(0).expect_true(__FILE__, __LINE__),
      op, ": k has ", Hkv, " heads, expected a divisor of the ", H, " heads of q");
  if (is_given(attention_mask)) {
    TORCH_CHECK_TYPE(attention_mask->scalar_type() == at::kBool, op, ": attention_mask is ",
                     attention_mask->scalar_type(), ", expected bool, true at real keys");
    TORCH_CHECK_VALUE(attention_mask->device() == q.device(), op, ": attention_mask is on ",
                      attention_mask->device(), ", expected ", q.device(), ", the device of q");
    check_dim(op, "attention_mask", *attention_mask, 2, "(B, Lk)");
    check_size(op, "attention_mask", *attention_mask, 0, k.sym_size(0), "(B, Lk)");
    check_size(op, "attention_mask", *attention_mask, 1, k.sym_size(1), "(B, Lk)");
  }
}

// Sums of windows and positions must not overflow.
constexpr int64_t kLargestWindow = int64_t(1) << 40;

inline void check_window(at::OptionalIntArrayRef window, bool causal) {
  constexpr const char* op = "local_attention";
  if (!window) return;
  TORCH_CHECK_VALUE(window->size() == 2 && (*window)[0] >= 0 && (*window)[1] >= 0, op, ": window is ",
                    *window, ", expected (left, right), both 0 or more");
  TORCH_CHECK_VALUE(std::max((*window)[0], (*window)[1]) <= kLargestWindow, op, ": window is ", *window,
                    ", expected at most ", kLargestWindow, "; no window is a full row");
  TORCH_CHECK_VALUE(!causal || (*window)[1] == 0, op, ": causal is true with window ", *window,
                    ", expected a window whose right is 0");
}

inline void check_bias(const OptionalTensor& bias, const at::Tensor& q, const c10::SymInt& entries,
                       const char* letters) {
  if (!is_given(bias)) return;
  check_dim("local_attention", "bias", *bias, 2, letters);
  check_like("local_attention", "bias", *bias, "q", q);
  check_size("local_attention", "bias", *bias, 0, q.sym_size(2), letters);
  check_size("local_attention", "bias", *bias, 1, entries, letters);
}

// What the inner ops take: a band, which in a full row of no keys or queries is -1 wide.
inline void check_band(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       const OptionalTensor& bias, const OptionalTensor& attention_mask,
                       const c10::SymInt& left, const c10::SymInt& right) {
  check_tensors(q, k, v, attention_mask);
  for (const auto& side : {left, right}) {
    TORCH_CHECK_VALUE(side.sym_ge(-1).expect_true(__FILE__, __LINE__) &&
                          side.sym_le(kLargestWindow).expect_true(__FILE__, __LINE__),
                      "local_attention: left and right are ", left, " and ", right, ", expected -1 to ",
                      kLargestWindow);
  }
  check_bias(bias, q, left + right + 1, "(H, left + right + 1)");
}

inline void check_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                           const at::Tensor& v, const OptionalTensor& bias,
                           const OptionalTensor& attention_mask, const at::Tensor& out, const at::Tensor& lse,
                           const c10::SymInt& left, const c10::SymInt& right,
                           std::array<bool, 4> output_mask) {
  constexpr const char* op = "local_attention";
  check_band(q, k, v, bias, attention_mask, left, right);
  for (const auto& [name, t] : {std::pair("grad_out", grad_out), std::pair("out", out)}) {
    check_dim(op, name, t, 4, "(B, Lq, H, Dv)");
    check_like(op, name, t, "q", q);
    for (int64_t dim : {0, 1, 2}) check_size(op, name, t, dim, q.sym_size(dim), "(B, Lq, H, Dv)");
    check_size(op, name, t, 3, v.sym_size(3), "(B, Lq, H, Dv)");
  }
  check_dim(op, "lse", lse, 3, "(B, H, Lq)");
  check_size(op, "lse", lse, 0, q.sym_size(0), "(B, H, Lq)");
  check_size(op, "lse", lse, 1, q.sym_size(2), "(B, H, Lq)");
  check_size(op, "lse", lse, 2, q.sym_size(1), "(B, H, Lq)");
  TORCH_CHECK_TYPE(lse.scalar_type() == at::toOpMathType(q.scalar_type()), op, ": lse is ", lse.scalar_type(),
                   ", expected ", at::toOpMathType(q.scalar_type()));
  check_wanted(op, "bias", output_mask[3], bias);
}

// The log-sum-exp of scores is kept in the type that sums are accumulated in.
inline at::TensorOptions statistics_options(const at::Tensor& q) {
  return q.options().dtype(at::toOpMathType(q.scalar_type()));
}

}  // namespace spade_ext::local_attention_shapes
