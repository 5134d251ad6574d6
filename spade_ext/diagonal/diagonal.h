#pragma once

#include <ATen/core/Tensor.h>
#include <spade_ext/export.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace spade_ext {

// The convolution kernel of a diagonal state space model,
//   k[c,h,l] = 2 Re sum_n cbar[c,h,n] abar[s,n]^l,  l = 0 .. length - 1,  s = h mod S.
//
// w (S, N, 2) and c (C, H, N, 2): complex numbers as real pairs, or w (S, N) and c (C, H, N): reals, and then
// k is the sum itself. S divides H. log_dt (H,), dt = exp(log_dt) * rate. disc says how (w, dt) give abar and
// cbar: "zoh", "bilinear", "dss" (a sum without the factor 2), or none: abar = exp(w), cbar = c, log_dt
// absent. float32 or float64; powers are formed in float64. Returns k (C, H, length). See README.md here.
SPADE_EXT_API at::Tensor diagonal_kernel(const at::Tensor& w, const at::Tensor& c,
                                         const std::optional<at::Tensor>& log_dt, c10::SymInt length,
                                         std::optional<std::string_view> disc = "zoh", double rate = 1.0);

// The same system as a recurrence with an initial and a final state,
//   x_t = abar x_{t-1} + bbar u_t,  y_t = 2 Re sum_n c x_t + skip u_t  (reals: the sum itself).
//
// u (B, H, L), any strides; b as w: bbar is to b what cbar is to c; state (B, H, N, 2) or (B, H, N), zeros
// unless given; skip (C, H). "dss" is refused. Returns y (B, C, H, L), in u's layout as long_conv, and the
// state after the last token. A sequence cut anywhere and run in pieces, the state handed on, gives what the
// whole gives.
//
// bidirectional: c, log_dt and state have 2 H channels. The last H run from the last token to the first, and
// y is the sum of both directions, which both see the token itself.
//
// segment_ids (B, L), integers: a run of equal ids is a document. Each starts from zeros but the one that
// time runs into first, and the returned state is that after the one that it runs into last.
SPADE_EXT_API std::tuple<at::Tensor, at::Tensor> diagonal_scan(
    const at::Tensor& u, const at::Tensor& w, const at::Tensor& b, const at::Tensor& c,
    const std::optional<at::Tensor>& log_dt, const std::optional<at::Tensor>& state = std::nullopt,
    const std::optional<at::Tensor>& skip = std::nullopt, std::optional<std::string_view> disc = "zoh",
    bool bidirectional = false, const std::optional<at::Tensor>& segment_ids = std::nullopt);

// One token of diagonal_scan: u (B, H), y (B, C, H). Overwrites `state`; no gradient.
SPADE_EXT_API at::Tensor diagonal_step(const at::Tensor& u, const at::Tensor& w, const at::Tensor& b,
                                       const at::Tensor& c, const std::optional<at::Tensor>& log_dt,
                                       const at::Tensor& state, std::optional<std::string_view> disc = "zoh");

}  // namespace spade_ext
