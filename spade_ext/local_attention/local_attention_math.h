// The names of the activations and the random numbers of dropout. Equations: README.md.
#pragma once

#include <cmath>
#include <cstdint>

namespace spade_ext::local_attention_math {

enum class Activation { softmax, relu2, laplace };

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
    for (int64_t m = 0; m < n; ++m) x[m] = keeps(first + m * step) ? x[m] * T(factor) : T(0);
  }
};

}  // namespace spade_ext::local_attention_math
