#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/OptionalArrayRef.h>
#include <spade_ext/export.h>

#include <optional>

namespace spade_ext {

// Softmax attention in which query i, at position p(i) = i + Lk - Lq, sees key j when
// p(i) - left <= j <= p(i) + right, (left, right) = window; every key when there is no window.
//
// q (B, Lq, H, D), k (B, Lk, Hkv, D), v (B, Lk, Hkv, Dv), any strides; Hkv divides H, and query head h reads
// key head h / (H / Hkv). Scores are scale * q.k + bias[h, left + j - p(i)], scale 1 / sqrt(D) unless given.
// bias (H, left + right + 1), or (H, Lq + Lk - 1) without a window, entry Lk - 1 + j - p(i).
// causal: no key after p(i); with a window its right must be 0. attention_mask (B, Lk), bool, true at real
// keys. float64, float32, float16 or bfloat16. Returns (B, Lq, H, Dv), contiguous; a query that sees no key
// gives 0.
SPADE_EXT_API at::Tensor local_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                         const std::optional<at::Tensor>& bias = std::nullopt,
                                         const std::optional<at::Tensor>& attention_mask = std::nullopt,
                                         at::OptionalIntArrayRef window = std::nullopt, bool causal = false,
                                         std::optional<double> scale = std::nullopt);

}  // namespace spade_ext
