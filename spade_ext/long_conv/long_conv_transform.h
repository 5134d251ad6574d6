// Transforms and products of spectra, a vector of channels at a time (README.md, "Transform"), compiled once
// for each level of the CPU and chosen at run time.
#pragma once

#include <cstdint>

namespace spade_ext {

// A signal (tokens, channels) of any strides.
template <class T>
struct SignalView {
  T* data;
  int64_t token_stride, channel_stride;
};

// Splits each block of `size` points into `radix` blocks.
template <class T>
struct TransformPass {
  int64_t radix, size;
  const T* twiddles;  // (size / radix, radix - 1, 2): exp(-2 pi i j q / size), q = 1 ... radix - 1
};

constexpr int kMaxPasses = 32;

// A transform of n = 2 points real tokens, as one of `points` complex numbers token 2 j + i token (2 j + 1).
template <class T>
struct TransformPlan {
  int64_t points;
  int64_t pairs;  // of frequencies (f, -f), points / 2 + 1
  int64_t leaf;   // size of the last blocks
  int pass_count;
  TransformPass<T> passes[kMaxPasses];
  const T* pair_twiddles;  // (pairs, 2): exp(-2 pi i f / points), f a pair's first frequency
  bool short_signals;      // tokens from `points` on are zeros in inputs, unused in outputs
  bool short_kernels;
};

// Rows are tokens, `lanes` channels each. A spectrum (pairs, 3, 2, lanes) holds the numbers that take a
// signal's pair of frequencies to the convolution's.
template <class T>
struct LongConvTransform {
  int64_t lanes;
  // Copies channels into the lanes of one or more rows (padded, lanes), `stride` elements apart; zeros in
  // lanes without a channel and from `tokens` to `padded`.
  void (*load)(SignalView<const T> signal, int64_t channels, int64_t tokens, int64_t padded, T* rows,
               int64_t stride);
  void (*store)(const T* rows, int64_t stride, int64_t channels, int64_t tokens, SignalView<T> signal);
  // frequencies (pairs): each pair's first one, in the order of spectra
  void (*pair_frequencies)(const TransformPlan<T>& plan, int64_t* frequencies);
  // kernel (n, lanes) by lag, overwritten
  void (*spectrum)(const TransformPlan<T>& plan, T* kernel, T* spectrum);
  // rows (C, n, lanes): in the last one the signal, afterwards the C convolutions
  void (*convolve)(const TransformPlan<T>& plan, const T* spectra, int64_t C, T* rows);
  // rows (1 + C, n, lanes): the signal and the gradients of the outputs; afterwards the first one is the
  // signal's gradient. spectra or correlations, which are added to, may be null where that gradient is not
  // wanted.
  void (*backward)(const TransformPlan<T>& plan, const T* spectra, int64_t C, T* rows, T* correlations);
  // The gradient of the kernel (n, lanes) by lag, from its sums over the batch.
  void (*correlate)(const TransformPlan<T>& plan, const T* correlation, T* kernel);
};

// The functions for this CPU, T = float or double. ATEN_CPU_CAPABILITY chooses another level, as for torch.
template <class T>
const LongConvTransform<T>& long_conv_transform();

}  // namespace spade_ext
