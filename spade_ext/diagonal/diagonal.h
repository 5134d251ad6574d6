#pragma once

#include <ATen/core/Tensor.h>
#include <spade_ext/export.h>

#include <optional>
#include <string_view>

namespace spade_ext {

// The convolution kernel of a diagonal state space model,
//   k[c,h,l] = 2 Re sum_n cbar[c,h,n] abar[s,n]^l,  l = 0 .. length - 1,  s = h mod S.
//
// w (S, N, 2) and c (C, H, N, 2): complex numbers as real pairs, or w (S, N) and c (C, H, N): reals, and then
// k is the sum itself. S divides H. log_dt (H,), dt = exp(log_dt) * rate. disc says how (w, dt) give abar and
// cbar: "zoh", "bilinear", "dss" (a sum without the factor 2), or none: abar = exp(w), cbar = c, log_dt
// absent. float32 or float64; the arithmetic is float64. Returns k (C, H, length). See README.md here.
SPADE_EXT_API at::Tensor diagonal_kernel(const at::Tensor& w, const at::Tensor& c,
                                         const std::optional<at::Tensor>& log_dt, c10::SymInt length,
                                         std::optional<std::string_view> disc = "zoh", double rate = 1.0);

}  // namespace spade_ext
