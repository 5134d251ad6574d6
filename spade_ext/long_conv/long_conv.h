#pragma once

#include <ATen/core/Tensor.h>
#include <spade_ext/export.h>

#include <optional>

namespace spade_ext {

// y[b,c,h,t] = sum_{s<=t} k[c,h,t-s] u[b,h,s] + skip[c,h] u[b,h,t] + sum_{s>t} k_reverse[c,h,s-t-1] u[b,h,s]
//
// u (B, H, L), any strides; k, k_reverse (C, H, Lk), any length each; skip (C, H); float32 or float64.
// Returns y (B, C, H, L) in u's layout: where u is a transposed contiguous (B, L, H), y is a transposed
// contiguous (B, L, C, H). With kernels (H, Lk) and skip (H), y is (B, H, L). segment_ids (B, L), integers: a
// run of equal ids is a document, convolved as it is alone.
SPADE_EXT_API at::Tensor long_conv(const at::Tensor& u, const at::Tensor& k,
                                   const std::optional<at::Tensor>& skip = std::nullopt,
                                   const std::optional<at::Tensor>& k_reverse = std::nullopt,
                                   const std::optional<at::Tensor>& segment_ids = std::nullopt);

}  // namespace spade_ext
