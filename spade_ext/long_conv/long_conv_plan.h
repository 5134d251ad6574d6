// The tables of one call's transforms.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/complex.h>
#include <spade_ext/long_conv/long_conv_transform.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <numbers>
#include <vector>

namespace spade_ext {

// The smallest even length >= n of the form 2^a, 3 2^a or 5 2^a.
inline int64_t transform_length(int64_t n) {
  int64_t best = 0;
  for (int64_t odd : {1, 3, 5}) {
    int64_t length = 2 * odd;
    while (length < n) length *= 2;
    if (best == 0 || length < best) best = length;
  }
  return best;
}

// exp(-2 pi i f / size) for f < size, each the product of a coarse and a fine angle's: few sines for many
// roots.
inline at::Tensor roots_of_unity(int64_t size) {
  const auto roots = at::empty({size}, at::kComplexDouble);
  auto* root = roots.data_ptr<c10::complex<double>>();
  const int64_t step = static_cast<int64_t>(std::ceil(std::sqrt(size)));
  auto exact = [&](int64_t f) { return c10::polar(1.0, -2 * std::numbers::pi * f / size); };
  for (int64_t f = 0; f < step; ++f) root[f] = exact(f);
  for (int64_t coarse = step; coarse < size; coarse += step) {
    const auto turn = exact(coarse);
    for (int64_t f = 0; f < std::min(step, size - coarse); ++f) root[coarse + f] = turn * root[f];
  }
  return roots;
}

template <class T>
class Plan {
 public:
  // For transforms of n real numbers, which transform_length gave.
  explicit Plan(int64_t n) : roots_(roots_of_unity(n / 2)) {
    plan_.points = n / 2;
    plan_.pairs = plan_.points / 2 + 1;
    int twos = std::countr_zero(static_cast<uint64_t>(plan_.points));
    plan_.leaf = plan_.points >> twos;
    for (int64_t size = plan_.points; twos > 0;) {
      const int bits = twos == 1 ? 1 : twos % 3 == 0 ? 3 : 2;  // fours before eights; a two alone
      twos -= bits;
      if (twos == 0 && plan_.leaf == 1) {
        plan_.leaf = size;
      } else {
        add_pass(int64_t(1) << bits, size);
        size >>= bits;
      }
    }
    add_pair_twiddles();
    plan_.short_signals = plan_.short_kernels = false;
  }

  // Signals of `signal` tokens, kernels whose lags are in [-reverse, forward).
  Plan& shorten(int64_t signal, int64_t forward, int64_t reverse) {
    plan_.short_signals = plan_.pass_count > 0 && signal <= plan_.points;
    plan_.short_kernels = plan_.pass_count > 0 && reverse == 0 && forward <= plan_.points;
    return *this;
  }

  const TransformPlan<T>& operator*() const { return plan_; }

 private:
  T* new_twiddles(int64_t count) {
    tables_.push_back(at::empty({count, 2}, c10::CppTypeToScalarType<T>::value));
    return tables_.back().template data_ptr<T>();
  }

  T* put_root(T* twiddles, int64_t f) const {
    const auto root = roots_.data_ptr<c10::complex<double>>()[f];
    *twiddles++ = static_cast<T>(root.real());
    *twiddles++ = static_cast<T>(root.imag());
    return twiddles;
  }

  void add_pass(int64_t radix, int64_t size) {
    T* twiddles = new_twiddles(size / radix * (radix - 1));
    plan_.passes[plan_.pass_count++] = {radix, size, twiddles};
    for (int64_t j = 0; j < size / radix; ++j) {
      for (int64_t q = 1; q < radix; ++q) twiddles = put_root(twiddles, j * q * (plan_.points / size));
    }
  }

  void add_pair_twiddles() {
    const at::Tensor frequencies = at::empty({plan_.pairs}, at::kLong);
    const int64_t* f = frequencies.data_ptr<int64_t>();
    long_conv_transform<T>().pair_frequencies(plan_, frequencies.data_ptr<int64_t>());
    T* twiddles = new_twiddles(plan_.pairs);
    plan_.pair_twiddles = twiddles;
    for (int64_t i = 0; i < plan_.pairs; ++i) twiddles = put_root(twiddles, f[i]);
  }

  at::Tensor roots_;
  std::vector<at::Tensor> tables_;
  TransformPlan<T> plan_{};
};

}  // namespace spade_ext
