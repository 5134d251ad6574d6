// What diagonal_kernel's Meta and CPU kernels share: checks and the discretisation's name.
#pragma once

#include <spade_ext/core/autograd.h>
#include <spade_ext/core/checks.h>
#include <spade_ext/diagonal/diagonal_kernel_math.h>

#include <string_view>

namespace spade_ext::diagonal_kernel_shapes {

inline diagonal_math::Disc parse_disc(std::optional<std::string_view> disc) {
  using diagonal_math::Disc;
  if (!disc) return Disc::none;
  if (*disc == "zoh") return Disc::zoh;
  if (*disc == "bilinear") return Disc::bilinear;
  if (*disc == "dss") return Disc::dss;
  TORCH_CHECK_VALUE(false, "diagonal_kernel: disc is '", *disc,
                    "', expected 'zoh', 'bilinear', 'dss' or None");
}

inline bool has_pairs(const at::Tensor& w) { return w.dim() == 3; }

inline void check(const at::Tensor& w, const at::Tensor& c, const OptionalTensor& log_dt,
                  const c10::SymInt& length, std::optional<std::string_view> disc, double rate) {
  constexpr const char* op = "diagonal_kernel";
  TORCH_CHECK_VALUE(w.dim() == 2 || w.dim() == 3, op, ": w has shape ", shape_text(w),
                    ", expected (S, N, 2) or (S, N)");
  check_float32_or_float64(op, "w", w);
  const bool pairs = has_pairs(w);
  const char* c_letters = pairs ? "(C, H, N, 2)" : "(C, H, N)";
  if (pairs) check_size(op, "w", w, 2, 2, "(S, N, 2)");
  check_dim(op, "c", c, pairs ? 4 : 3, c_letters);
  check_like(op, "c", c, "w", w);
  check_size(op, "c", c, 2, w.sym_size(1), c_letters);
  if (pairs) check_size(op, "c", c, 3, 2, c_letters);

  const auto S = w.sym_size(0), H = c.sym_size(1);
  TORCH_CHECK_VALUE(S.sym_gt(0).expect_true(__FILE__, __LINE__), op, ": w has shape ", shape_text(w),
                    ", expected at least one copy S");
  TORCH_CHECK_VALUE((H % S).sym_eq(0).expect_true(__FILE__, __LINE__), op, ": w has ", S,
                    " copies S, expected a divisor of the number of channels H = ", H, " of c");
  const bool discretized = parse_disc(disc) != diagonal_math::Disc::none;
  TORCH_CHECK_VALUE(is_given(log_dt) == discretized, op, ": log_dt is ", is_given(log_dt) ? "given" : "None",
                    " and disc is ", discretized ? *disc : "None", ", expected both or neither");
  if (discretized) {
    check_dim(op, "log_dt", *log_dt, 1, "(H,)");
    check_like(op, "log_dt", *log_dt, "w", w);
    check_size(op, "log_dt", *log_dt, 0, H, "(H,)");
  }
  TORCH_CHECK_VALUE(length.sym_ge(0).expect_true(__FILE__, __LINE__), op, ": length is ", length,
                    ", expected 0 or more");
  TORCH_CHECK_VALUE(rate > 0 && std::isfinite(rate), op, ": rate is ", rate, ", expected a positive number");
}

inline void check_backward(const at::Tensor& grad_k, const at::Tensor& w, const at::Tensor& c,
                           const OptionalTensor& log_dt, std::optional<std::string_view> disc, double rate,
                           std::array<bool, 3> output_mask) {
  constexpr const char* op = "diagonal_kernel";
  check_dim(op, "grad_k", grad_k, 3, "(C, H, length)");
  check(w, c, log_dt, grad_k.sym_size(2), disc, rate);
  check_like(op, "grad_k", grad_k, "w", w);
  for (int64_t dim : {0, 1}) check_size(op, "grad_k", grad_k, dim, c.sym_size(dim), "(C, H, length)");
  check_wanted(op, "log_dt", output_mask[2], log_dt);
}

}  // namespace spade_ext::diagonal_kernel_shapes
