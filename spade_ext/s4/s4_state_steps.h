// Steps of S4's recurrence, compiled once for each level of the CPU. Equations: README.md, "Bilinear step".
// Every number is a vector of `lanes` channels; a complex row is N real parts, then N imaginary ones.
#pragma once

#include <cstdint>

namespace spade_ext {

// x <- decay x + input u - sum_r column_r kappa_r, kappa_r = row_r . x + feed_r u over the real and imaginary
// parts
struct S4Steps {
  int64_t N, R;
  double *decay, *input;          // (2, N) each
  double *rows, *columns, *feed;  // (R, 2, N), (R, 2, N), (R)
};

struct S4StateSteps {
  int64_t lanes;
  // Moves the states x (batch, 2, N) over the inputs u (batch, tokens). kappa (R, 4)
  void (*run)(const S4Steps& steps, int64_t batch, int64_t tokens, const double* u, double* x, double* kappa);
};

}  // namespace spade_ext
