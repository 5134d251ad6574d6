#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/OptionalArrayRef.h>
#include <spade_ext/export.h>

#include <cstdint>
#include <optional>
#include <string_view>

namespace spade_ext {

// Attention in which query i, at position p(i) = i + Lk - Lq, sees the real keys of its own segment that
// stand
//   in the window (left, right):        p(i) - left <= j <= p(i) + right,
//   or in its chunk of c = chunk_size:  floor((j - o) / c) = floor((p(i) - o) / c), o the segment's first
//   real
//                                       key,
//   or anywhere, without both; causal: with j <= p(i) (a window's right must be 0, which says the same).
// Weights are softmax(scale * q.k + bias), scale 1 / sqrt(D) unless given, or, elementwise and without a
// window, relu2 or laplace(q.k / n + bias), n the number of keys that the query sees, at least 1. A query
// that sees no key gives 0.
//
// q (B, Lq, H, D), k (B, Lk, Hkv, D), v (B, Lk, Hkv, Dv), any strides, float64, float32, float16 or bfloat16;
// Hkv divides H, and query head h reads key head h / (H / Hkv).
// bias (H, left + right + 1), (H, 2 chunk_size - 1) or (H, Lq + Lk - 1), entry left, chunk_size - 1 or Lk -
// 1, plus j - p(i). attention_mask (B, Lk), bool, true at real keys. segment_ids (B, Lk), integers: a segment
// is a run of equal ids; a query before all keys has none and sees nothing. dropout_p: weights become weight
// * keep / (1 - dropout_p), keep a function of dropout_seed (int64, 0-dim) and of the pair's place. Returns
// (B, Lq, H, Dv), contiguous.
SPADE_EXT_API at::Tensor local_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                         const std::optional<at::Tensor>& bias = std::nullopt,
                                         at::OptionalIntArrayRef window = std::nullopt,
                                         std::optional<int64_t> chunk_size = std::nullopt,
                                         bool causal = false,
                                         const std::optional<at::Tensor>& attention_mask = std::nullopt,
                                         const std::optional<at::Tensor>& segment_ids = std::nullopt,
                                         std::optional<double> scale = std::nullopt,
                                         std::string_view activation = "softmax", double dropout_p = 0.0,
                                         const std::optional<at::Tensor>& dropout_seed = std::nullopt);

// One token a row of a causal window (left, 0), without gradients. q (B, H, D), k (B, Hkv, D), v (B, Hkv, Dv)
// and bias (H, left + 1) as above. k_cache (B, left + 1, Hkv, D) and v_cache (B, left + 1, Hkv, Dv) are
// overwritten: slot p mod (left + 1) holds the key of position p. position (B), int64: how many tokens the
// row had before this one; a row where it is negative has not begun, writes nothing and gives 0. Returns (B,
// H, Dv), contiguous.
SPADE_EXT_API at::Tensor local_attention_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                              const std::optional<at::Tensor>& bias,
                                              const at::Tensor& k_cache, const at::Tensor& v_cache,
                                              const at::Tensor& position,
                                              std::optional<double> scale = std::nullopt);

}  // namespace spade_ext
