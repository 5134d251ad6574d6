// What local_attention's Meta and CPU kernels share: checks and the types of results.
#pragma once

#include <ATen/OpMathType.h>
#include <c10/util/OptionalArrayRef.h>
#include <spade_ext/core/autograd.h>
#include <spade_ext/core/checks.h>

namespace spade_ext::local_attention_shapes {

using OptionalTensor = std::optional<at::Tensor>;

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

inline void check_window(at::OptionalIntArrayRef window, bool causal) {
  constexpr const char* op = "local_attention";
  if (!window) return;
  TORCH_CHECK_VALUE(window->size() == 2 && (*window)[0] >= 0 && (*window)[1] >= 0, op, ": window is ",
                    *window, ", expected (left, right), both 0 or more");
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

// The log-sum-exp of scores is kept in the type that sums are accumulated in.
inline at::TensorOptions statistics_options(const at::Tensor& q) {
  return q.options().dtype(at::toOpMathType(q.scalar_type()));
}

}  // namespace spade_ext::local_attention_shapes
