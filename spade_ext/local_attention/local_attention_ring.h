// Attention of one token's query heads to keys in memory, compiled once for each level of the CPU and chosen
// at run time.
#pragma once

#include <ATen/OpMathType.h>

#include <cstdint>

namespace spade_ext {

// n keys (D) and values (Dv), `stride` elements apart, and the bias of the first: that of the next key is the
// next entry, that of the next head bias_stride further. Null without a bias.
template <class scalar_t>
struct LocalAttentionRun {
  const scalar_t *k, *v, *bias;
  int64_t k_stride, v_stride, bias_stride, n, D, Dv;
};

// What the heads of a group have summed so far: exp(score - largest) in total, and times the values in out.
template <class T>
struct LocalAttentionSums {
  const T*
      q;  // (heads, D), scaled; rows are q_stride apart, whole panels (local_attention_tiles.h), 0 after D
  T *out, *largest, *total;  // (heads, Dv), rows out_stride apart in whole panels; (heads); (heads)
  int64_t heads, q_stride, out_stride;
};

template <class scalar_t>
struct LocalAttentionRing {
  void (*add)(const LocalAttentionRun<scalar_t>& run,
              const LocalAttentionSums<at::opmath_type<scalar_t>>& sums);
};

// The function for this CPU: double, float, at::Half or at::BFloat16.
template <class scalar_t>
const LocalAttentionRing<scalar_t>& local_attention_ring();

}  // namespace spade_ext
