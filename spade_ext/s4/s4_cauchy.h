// The resolvent of one channel at a block of nodes: Cauchy sums over the states and Woodbury's formula, in
// float64, compiled once for each level of the CPU. Equations: README.md.
#pragma once

#include <spade_ext/core/cpu_levels.h>

#include <cstdint>

namespace spade_ext {

// A plane holds a complex number at each node of a block: kNodes real parts, then kNodes imaginary ones. Two
// parts are whole tiles of row_products at every level.
constexpr int64_t kNodes = 48, kPlane = 2 * kNodes;

// What is known of the nodes before the channel. With zeta = -log(omega): sinh(zeta/2), cosh(zeta/2),
// sinh^2, 2 sinh cosh, cosh^2.
enum NodePlane { kSinh, kCosh, kSinhSinh, kSinhCosh, kCoshCosh, kNodePlanes };

// Pointers to planes, except of rho, alpha and nu_mu. Outputs of the system are the C rows of c, then the R
// of p^*, inputs the M rows of b, then the R of p; a pair of them is u = output * (M + R) + input, of K = (C
// + R) (M + R).
struct CauchyBlock {
  int64_t N, R, M, C, K;
  double delta;               // dt/2
  const double *rho, *alpha;  // (N): |dt/2 w|^2, -Re(dt/2 w)
  const double* nu_mu;        // (2 K, N): the weights of 1 / D, all nu before all mu
  const double* nodes;        // (kNodePlanes)
  double* reciprocals;        // (N): conj(1 / D)
  double* sums;               // (2 K): sum_n nu conj(1 / D), sum_n mu conj(1 / D); then (K): S
  double *matrix, *inverse;   // (R, R): I + kappa S_PP
  double *values, *xi, *eta;  // (C, M): k_hat; (R, M): p^* resolvent b; (C, R): c . resolvent . p
  double* by_values;          // (C, M): what the values multiply
  double* factors;            // (2 K): what sum_n nu / D and sum_n mu / D multiply
};

// Sums over nodes of derivatives, d = Re sum.
struct CauchyGradient {
  double* nu_mu;                // (2 K, N)
  double *rho, *alpha;          // (N)
  double log_kappa, log_front;  // by the logarithms of kappa and of the values' factor
};

struct S4Cauchy {
  void (*reciprocals)(const CauchyBlock&);
  // from sums: values, xi and eta
  void (*solve)(const CauchyBlock&);
  // from by_values: factors
  void (*differentiate_solve)(const CauchyBlock&, CauchyGradient&);
  // from factors
  void (*differentiate_sums)(const CauchyBlock&, CauchyGradient&);
};

SPADE_EXT_LEVELS(S4Cauchy, s4_cauchy)

}  // namespace spade_ext
