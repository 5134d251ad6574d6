// The names of the activations and the random numbers of dropout. Equations: README.md.
#pragma once

#include <c10/macros/Macros.h>

#include <cmath>
#include <cstdint>

namespace spade_ext::local_attention_math {

enum class Activation { softmax, relu2, laplace };

// The finaliser of splitmix64.
C10_ALWAYS_INLINE uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Which weights stay: a pair's number in a (B, H, Lq, Lk) tensor counts into the stream of splitmix64 that
// starts at the mixed seed.
struct Dropout {
  uint64_t start = 0;
  int64_t threshold = 0;  // a pair is dropped where the upper 53 bits are below it
  double factor = 1;

  Dropout() = default;
  Dropout(double p, int64_t seed)
      : start(mix(static_cast<uint64_t>(seed))),
        threshold(static_cast<int64_t>(std::ceil(p * 0x1p53))),
        factor(1 / (1 - p)) {}

  // The upper 53 bits of a pair's random number.
  C10_ALWAYS_INLINE int64_t bits(uint64_t pair) const {
    return static_cast<int64_t>(mix(start + (pair + 1) * 0x9e3779b97f4a7c15u) >> 11);
  }
};

}  // namespace spade_ext::local_attention_math
