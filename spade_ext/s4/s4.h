#pragma once

#include <ATen/core/Tensor.h>
#include <spade_ext/export.h>

#include <optional>

namespace spade_ext {

// S4: in each channel the bilinear discretisation of x' = A x + b u, y = 2 Re(c x), where
// A = diag(w) - sum_r p_r p_r^* acts on all states, of which one of each conjugate pair is stored.
//
// Complex numbers are real pairs, and a channel h uses copy h mod S of A and b; S divides H, dt =
// exp(log_dt). w (S, N, 2), p (R, S, N, 2), b (M, S, N, 2) or (S, N, 2), c (C, H, N, 2), log_dt (H,), state
// (B, H, N, 2). float32 or float64; the arithmetic is float64. Equations: README.md.

// The convolution kernels (M, C, H, length) of every row of b: inputs, or initial states x_0 written as
// b = (x_0 + dt/2 A x_0) / dt. c is truncated, c = C (I - Abar^nodes), at rate 1; dt is multiplied by rate.
SPADE_EXT_API at::Tensor s4_kernel(const at::Tensor& w, const at::Tensor& p, const at::Tensor& b,
                                   const at::Tensor& c, const at::Tensor& log_dt, c10::SymInt length,
                                   c10::SymInt nodes, double rate = 1.0);

// The state after the inputs u (B, H, L), from `state` or zeros. No gradient.
SPADE_EXT_API at::Tensor s4_state(const at::Tensor& u, const at::Tensor& w, const at::Tensor& p,
                                  const at::Tensor& b, const at::Tensor& log_dt,
                                  const std::optional<at::Tensor>& state = std::nullopt);

// One token u (B, H): updates `state` in place and returns y (B, C, H). c is not truncated. No gradient.
SPADE_EXT_API at::Tensor s4_step(const at::Tensor& u, const at::Tensor& w, const at::Tensor& p,
                                 const at::Tensor& b, const at::Tensor& c, const at::Tensor& log_dt,
                                 const at::Tensor& state);

}  // namespace spade_ext
