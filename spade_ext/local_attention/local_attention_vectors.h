// What attention's inner loops add to core/vectors.h: the exponential.
#pragma once

#include <spade_ext/core/vectors.h>

#include <cstdint>
#include <limits>
#include <type_traits>

namespace spade_ext::CPU_CAPABILITY {
namespace {

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// 1 / k! for k up to degree.
template <class T, int degree>
struct ExponentialSeries {
  T coefficient[degree + 1];
  constexpr ExponentialSeries() : coefficient{} {
    T factorial = 1;
    for (int k = 0; k <= degree; ++k) factorial *= k < 2 ? 1 : k, coefficient[k] = 1 / factorial;
  }
};

// For x up to 88, by x = n log 2 + r and Taylor's polynomial of exp(r). NaN stays; 0 below the normal
// numbers.
template <class T>
C10_ALWAYS_INLINE Vectorized<T> exponential(Vectorized<T> x) {
  using Vec = Vectorized<T>;
  using Int = at::vec::int_same_size_t<T>;
  constexpr bool single = std::is_same_v<T, float>;
  constexpr int mantissa = single ? 23 : 52, degree = single ? 6 : 13;
  constexpr T magic =
      single ? 0x1.8p23 : 0x1.8p52;  // rounds to an integer, in its lowest bits, what it is added to
  constexpr Int one = single ? 0x3f800000 : 0x3ff0000000000000;
  x = at::vec::clamp_min(x, Vec(T(single ? -88 : -709)));
  const Vec n = at::vec::fmadd(x, Vec(T(1.4426950408889634)), Vec(magic));
  const Vec r = at::vec::fmadd(n - Vec(magic), Vec(T(-0.69314718055994531)), x);
  constexpr ExponentialSeries<T, degree> series;
  Vec sum(series.coefficient[degree]);
#pragma GCC unroll 16
  for (int k = degree - 1; k >= 0; --k) sum = at::vec::fmadd(sum, r, Vec(series.coefficient[k]));
  const auto power = (at::vec::cast<Int>(n) << Vectorized<Int>(mantissa)) + Vectorized<Int>(one);
  return sum * at::vec::cast<T>(power);
}

}  // namespace
}  // namespace spade_ext::CPU_CAPABILITY
