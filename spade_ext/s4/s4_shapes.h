// What the Meta and CPU kernels of the S4 ops share: checks.
#pragma once

#include <spade_ext/core/autograd.h>
#include <spade_ext/core/checks.h>

#include <array>

namespace spade_ext::s4_shapes {

// The state matrix and the step of H channels.
inline void check_system(const char* op, const at::Tensor& w, const at::Tensor& p, const at::Tensor& log_dt,
                         const c10::SymInt& H, const char* h_of) {
  check_dim(op, "w", w, 3, "(S, N, 2)");
  check_float32_or_float64(op, "w", w);
  check_size(op, "w", w, 2, 2, "(S, N, 2)");
  check_dim(op, "p", p, 4, "(R, S, N, 2)");
  check_like(op, "p", p, "w", w);
  for (int64_t dim : {0, 1, 2}) check_size(op, "p", p, dim + 1, w.sym_size(dim), "(R, S, N, 2)");
  check_dim(op, "log_dt", log_dt, 1, "(H,)");
  check_like(op, "log_dt", log_dt, "w", w);
  check_size(op, "log_dt", log_dt, 0, H, "(H,)");
  const auto S = w.sym_size(0);
  TORCH_CHECK_VALUE(S.sym_gt(0).expect_true(__FILE__, __LINE__), op, ": w has shape ", shape_text(w),
                    ", expected at least one copy S");
  TORCH_CHECK_VALUE((H % S).sym_eq(0).expect_true(__FILE__, __LINE__), op, ": w has ", S,
                    " copies S, expected a divisor of the number of channels H = ", H, " of ", h_of);
}

inline void check_c(const char* op, const at::Tensor& c, const at::Tensor& w, const c10::SymInt& H) {
  check_dim(op, "c", c, 4, "(C, H, N, 2)");
  check_like(op, "c", c, "w", w);
  check_size(op, "c", c, 1, H, "(C, H, N, 2)");
  check_size(op, "c", c, 2, w.sym_size(1), "(C, H, N, 2)");
  check_size(op, "c", c, 3, 2, "(C, H, N, 2)");
}

inline void check_kernel(const at::Tensor& w, const at::Tensor& p, const at::Tensor& b, const at::Tensor& c,
                         const at::Tensor& log_dt, const c10::SymInt& length, const c10::SymInt& nodes,
                         double rate) {
  constexpr const char* op = "s4_kernel";
  check_dim(op, "c", c, 4, "(C, H, N, 2)");
  check_system(op, w, p, log_dt, c.sym_size(1), "c");
  check_c(op, c, w, c.sym_size(1));
  check_dim(op, "b", b, 4, "(M, S, N, 2)");
  check_like(op, "b", b, "w", w);
  for (int64_t dim : {0, 1, 2}) check_size(op, "b", b, dim + 1, w.sym_size(dim), "(M, S, N, 2)");
  TORCH_CHECK_VALUE(length.sym_ge(0).expect_true(__FILE__, __LINE__), op, ": length is ", length,
                    ", expected 0 or more");
  TORCH_CHECK_VALUE(nodes.sym_ge(1).expect_true(__FILE__, __LINE__), op, ": nodes is ", nodes,
                    ", expected 1 or more");
  TORCH_CHECK_VALUE(rate >= 1e-6 && rate <= 1e6, op, ": rate is ", rate,
                    ", expected a positive number from 1e-6 to 1e6");
  constexpr int64_t kMostRoots = int64_t(1) << 31;
  TORCH_CHECK_VALUE(nodes.sym_le(int64_t(double(kMostRoots) * rate)).expect_true(__FILE__, __LINE__), op,
                    ": rate is ", rate, " with nodes ", nodes, ", expected nodes / rate of at most ",
                    kMostRoots);
}

inline void check_kernel_backward(const at::Tensor& grad_k, const at::Tensor& w, const at::Tensor& p,
                                  const at::Tensor& b, const at::Tensor& c, const at::Tensor& log_dt,
                                  const c10::SymInt& nodes, double rate) {
  constexpr const char *op = "s4_kernel", *letters = "(M, C, H, length)";
  check_dim(op, "grad_k", grad_k, 4, letters);
  check_kernel(w, p, b, c, log_dt, grad_k.sym_size(3), nodes, rate);
  check_like(op, "grad_k", grad_k, "w", w);
  check_size(op, "grad_k", grad_k, 0, b.sym_size(0), letters);
  for (int64_t dim : {0, 1}) check_size(op, "grad_k", grad_k, dim + 1, c.sym_size(dim), letters);
}

// u (B, H, ...), b and a state of its rows and channels.
inline void check_recurrence(const char* op, const at::Tensor& u, const at::Tensor& w, const at::Tensor& p,
                             const at::Tensor& b, const at::Tensor& log_dt, const OptionalTensor& state) {
  check_system(op, w, p, log_dt, u.sym_size(1), "u");
  check_like(op, "u", u, "w", w);
  check_dim(op, "b", b, 3, "(S, N, 2)");
  check_like(op, "b", b, "w", w);
  for (int64_t dim : {0, 1, 2}) check_size(op, "b", b, dim, w.sym_size(dim), "(S, N, 2)");
  if (!is_given(state)) return;
  check_dim(op, "state", *state, 4, "(B, H, N, 2)");
  check_like(op, "state", *state, "w", w);
  for (int64_t dim : {0, 1}) check_size(op, "state", *state, dim, u.sym_size(dim), "(B, H, N, 2)");
  for (int64_t dim : {1, 2}) check_size(op, "state", *state, dim + 1, w.sym_size(dim), "(B, H, N, 2)");
}

inline void check_state(const at::Tensor& u, const at::Tensor& w, const at::Tensor& p, const at::Tensor& b,
                        const at::Tensor& log_dt, const OptionalTensor& state) {
  check_dim("s4_state", "u", u, 3, "(B, H, L)");
  check_recurrence("s4_state", u, w, p, b, log_dt, state);
}

inline void check_step(const at::Tensor& u, const at::Tensor& w, const at::Tensor& p, const at::Tensor& b,
                       const at::Tensor& c, const at::Tensor& log_dt, const at::Tensor& state) {
  check_dim("s4_step", "u", u, 2, "(B, H)");
  check_recurrence("s4_step", u, w, p, b, log_dt, state);
  check_c("s4_step", c, w, u.sym_size(1));
}

}  // namespace spade_ext::s4_shapes
