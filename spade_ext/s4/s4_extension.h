// c, truncated at some length, for a kernel that is longer: c (I + Abar^n) is truncated at 2 n. The powers
// are taken by stepping, in O(n N R) with a state every few steps kept for the backward.
#pragma once

#include <spade_ext/s4/s4_system.h>

namespace spade_ext::s4_cpu {

// Derivatives by dt/2 w, p and dt/2 (for a fixed dt/2 w): d = Re(a d(dt/2 w) + p dp) + delta d(dt/2).
struct StateGradient {
  Vector a, p;
  double delta = 0;

  explicit StateGradient(const StateMatrix& matrix) : a(matrix.N), p(matrix.R * matrix.N) {}
};

class Extension {
 public:
  Extension(const StateMatrix& a, double delta, int64_t from, int64_t to)
      : delta_(delta), from_(from), to_(to), forward_(a.transposed(), delta), transposed_(a, delta) {}

  Vector extend(const complex* c) const {
    Vector extended(c, c + N());
    for (int64_t length = from_; length < to_; length *= 2) add_power(extended, length);
    return extended;
  }

  // grad (N), by the extended c on entry, by c on return; adds to what A gets.
  void backward(const complex* c, complex* grad, StateGradient& state) const {
    std::vector<Vector> stages{Vector(c, c + N())};
    for (int64_t length = from_; length < to_; length *= 2) {
      stages.push_back(stages.back());
      add_power(stages.back(), length);
    }
    stages.pop_back();
    for (int64_t length = to_ / 2; !stages.empty(); length /= 2, stages.pop_back()) {
      Vector through_power(grad, grad + N());
      power_backward(stages.back(), length, through_power, state);
      for (int64_t n = 0; n < N(); ++n) grad[n] += through_power[n];
    }
  }

 private:
  int64_t N() const { return forward_.matrix().N; }

  void add_power(Vector& c, int64_t length) const {
    BilinearStep step = forward_;
    Vector x = c;
    for (int64_t l = 0; l < length; ++l) {
      if (l % kFlushEvery == 0) flush(x.data(), N());
      step.step(x.data());
    }
    for (int64_t n = 0; n < N(); ++n) c[n] += x[n];
  }

  // grad, by x Abar^length on entry, by x on return.
  void power_backward(const Vector& x, int64_t length, Vector& grad, StateGradient& state) const {
    BilinearStep step = forward_, reverse = transposed_;
    const int64_t blocks = (length + kFlushEvery - 1) / kFlushEvery;
    Vector begins(blocks * N()), states((kFlushEvery + 1) * N()), current = x, lambda(N());
    for (int64_t l = 0; l < length; ++l) {
      if (l % kFlushEvery == 0) {
        flush(current.data(), N());
        std::copy(current.begin(), current.end(), begins.begin() + l / kFlushEvery * N());
      }
      step.step(current.data());
    }
    for (int64_t block = blocks - 1; block >= 0; --block) {
      const int64_t size = std::min(kFlushEvery, length - block * kFlushEvery);
      std::copy_n(begins.begin() + block * N(), N(), states.begin());
      for (int64_t l = 0; l < size; ++l) {
        complex* next = states.data() + (l + 1) * N();
        std::copy_n(states.data() + l * N(), N(), next);
        step.step(next);
      }
      flush(grad.data(), N());
      for (int64_t l = size - 1; l >= 0; --l) {
        lambda = grad;
        reverse.solve(lambda.data());
        accumulate(states.data() + l * N(), states.data() + (l + 1) * N(), lambda.data(), state);
        for (int64_t n = 0; n < N(); ++n) grad[n] = 2.0 * lambda[n] - grad[n];
      }
    }
  }

  // (I - dt/2 A) x' = (I + dt/2 A) x moves with dt/2 A as lambda d(dt/2 A) (x + x') does. A here is the
  // transposed matrix, whose rows are conj(p).
  void accumulate(const complex* x, const complex* next, const complex* lambda, StateGradient& state) const {
    for (int64_t n = 0; n < N(); ++n) state.a[n] += lambda[n] * (x[n] + next[n]);
    for (int64_t r = 0; r < forward_.matrix().R; ++r) {
      const complex* p = transposed_.matrix().row(r);
      double alpha = 0, beta = 0;
      for (int64_t n = 0; n < N(); ++n) {
        alpha += (lambda[n] * std::conj(p[n])).real();
        beta += 2 * (p[n] * (x[n] + next[n])).real();
      }
      state.delta -= alpha * beta;
      complex* grad = state.p.data() + r * N();
      for (int64_t n = 0; n < N(); ++n) {
        grad[n] -= delta_ * (beta * std::conj(lambda[n]) + 2 * alpha * (x[n] + next[n]));
      }
    }
  }

  double delta_;
  int64_t from_, to_;
  BilinearStep forward_, transposed_;  // of what multiplies a state, and of a state
};

}  // namespace spade_ext::s4_cpu
