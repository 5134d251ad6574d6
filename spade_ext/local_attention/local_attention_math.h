// The elementwise activations and the random numbers of dropout. Equations: README.md.
#pragma once

#include <cmath>
#include <cstdint>

namespace spade_ext::local_attention_math {

enum class Activation { softmax, relu2, laplace };

// An elementwise activation's weight of a score, and its derivative. A score of -inf gives 0 and 0.
template <class T>
struct Weight {
  T value, slope;
};

template <class T>
Weight<T> relu2(T score) {
  const T positive = score < 0 ? T(0) : score;  // NaN stays
  return {positive * positive, 2 * positive};
}

template <class T>
Weight<T> laplace(T score) {
  constexpr T mean = T(0.707107), inverse_width = T(1 / (0.282095 * 1.4142135623730951));
  constexpr T inverse_sqrt_pi = T(0.56418958354775629);
  const T x = (score - mean) * inverse_width;
  return {T(0.5) * (1 + std::erf(x)), inverse_width * inverse_sqrt_pi * std::exp(-x * x)};
}

// The finaliser of splitmix64.
inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Which weights stay: a pair's number in a (B, H, Lq, Lk) tensor counts into the stream of splitmix64 that
// starts at the mixed seed.
struct Dropout {
  uint64_t start = 0, threshold = 0;  // a pair is dropped where the upper 53 bits are below the threshold
  double factor = 1;

  Dropout() = default;
  Dropout(double p, int64_t seed)
      : start(mix(static_cast<uint64_t>(seed))),
        threshold(static_cast<uint64_t>(std::ceil(p * 0x1p53))),
        factor(1 / (1 - p)) {}

  bool keeps(uint64_t pair) const {
    return (mix(start + (pair + 1) * 0x9e3779b97f4a7c15u) >> 11) >= threshold;
  }
  // x[m] <- keep x[m] / (1 - p) for the pairs first, first + step, ...
  template <class T>
  void apply(T* x, int64_t n, uint64_t first, uint64_t step) const {
    if (threshold == 0) return;
    for (int64_t m = 0; m < n; ++m) x[m] = keeps(first + m * step) ? x[m] * T(factor) : T(0);
  }
};

}  // namespace spade_ext::local_attention_math
