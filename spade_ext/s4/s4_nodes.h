// Where in the complex plane a kernel's transform is evaluated. Equations: README.md.
#pragma once

#include <ATen/ops/zeros.h>
#include <spade_ext/s4/s4_cauchy.h>

#include <cmath>
#include <complex>
#include <vector>

namespace spade_ext::s4_cpu {

// The least 2^a 3^b 5^c that is not below n.
inline int64_t smooth_size(int64_t n) {
  for (;; ++n) {
    int64_t rest = n;
    for (int64_t factor : {2, 3, 5}) {
      while (rest % factor == 0) rest /= factor;
    }
    if (rest == 1) return n;
  }
}

// Half of the nodes omega_j = e^(-decay - 2 pi i j / count) of a transform, and the taps that it gives.
class Nodes {
 public:
  int64_t count, taps, bins;

  Nodes(int64_t count_, int64_t taps_, double decay)
      : count(count_),
        taps(taps_),
        bins(count_ / 2 + 1),
        planes_(at::zeros({(bins + kNodes - 1) / kNodes, kNodePlanes, 2, kNodes}, at::kDouble)),
        growth_(taps_) {
    double* planes = planes_.data_ptr<double>();
    for (int64_t bin = 0; bin < blocks() * kNodes; ++bin) {
      const std::complex<double> half(0.5 * decay,
                                      bin < bins ? M_PI * double(bin) / double(count) : M_PI / 2);
      const std::complex<double> sinh = std::sinh(half), cosh = std::cosh(half);
      const std::complex<double> values[kNodePlanes] = {sinh, cosh, sinh * sinh, 2.0 * sinh * cosh,
                                                        cosh * cosh};
      for (int64_t plane = 0; plane < kNodePlanes; ++plane) {
        double* target = planes + (bin / kNodes * kNodePlanes + plane) * kPlane + bin % kNodes;
        target[0] = values[plane].real();
        target[kNodes] = values[plane].imag();
      }
    }
    for (int64_t l = 0; l < taps; ++l) growth_[l] = std::exp(decay * double(l));
  }

  int64_t blocks() const { return planes_.size(0); }
  const double* block(int64_t i) const { return planes_.const_data_ptr<double>() + i * kNodePlanes * kPlane; }
  // What an entry of the spectrum weighs in the inverse transform: it stands for its conjugate too.
  double weight(int64_t bin) const { return (bin == 0 || 2 * bin == count ? 1.0 : 2.0) / double(count); }
  // omega^-l but for the phase
  double growth(int64_t l) const { return growth_[l]; }

 private:
  at::Tensor planes_;
  std::vector<double> growth_;
};

}  // namespace spade_ext::s4_cpu
