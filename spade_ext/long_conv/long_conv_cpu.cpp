// Convolution through ATen's real transforms, a block of rows at a time, so that no whole spectrum is in
// memory.
#include <ATen/ops/conj_physical.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/fft_irfft.h>
#include <ATen/ops/fft_rfft.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <spade_ext/core/parallel.h>
#include <spade_ext/long_conv/long_conv_shapes.h>
#include <torch/library.h>

#include <algorithm>

namespace spade_ext::long_conv_cpu {

using long_conv_shapes::with_channels;

// 64 rows of a transform stay in a core's cache at usual lengths.
constexpr int64_t kChannelBlock = 8;
constexpr int64_t kBatchBlock = 8;

// The smallest even length >= n of the form 2^a, 3 2^a or 5 2^a.
int64_t transform_length(int64_t n) {
  int64_t best = 0;
  for (int64_t odd : {1, 3, 5}) {
    int64_t length = 2 * odd;
    while (length < n) length *= 2;
    if (best == 0 || length < best) best = length;
  }
  return best;
}

// The lengths of one call: what of each kernel reaches an output, and the circular length without
// wrap-around.
struct Lengths {
  int64_t signal, forward, reverse, transform;

  Lengths(const at::Tensor& u, const at::Tensor& k, const OptionalTensor& k_reverse)
      : signal(u.size(2)),
        forward(std::min(k.size(-1), signal)),
        reverse(is_given(k_reverse) ? std::min(k_reverse->size(-1), signal - 1) : 0),
        transform(transform_length(signal + std::max(forward - 1, reverse))) {}
};

struct Block {
  int64_t begin, end;
  at::Tensor of(const at::Tensor& t, int64_t dim) const { return t.slice(dim, begin, end); }
  int64_t size() const { return end - begin; }
};

template <class Body>
void for_each_block(int64_t size, int64_t block, const Body& body) {
  for (int64_t begin = 0; begin < size; begin += block) body(Block{begin, std::min(begin + block, size)});
}

// Entry of lag l >= 0 at l, of lag l < 0 at n + l: (C, Hb, n). The skip is one more weight of lag 0.
at::Tensor circular_kernel(const Lengths& n, const at::Tensor& k, const at::Tensor& skip,
                           const at::Tensor& k_reverse) {
  auto circular = at::zeros({k.size(0), k.size(1), n.transform}, k.options());
  circular.slice(2, 0, n.forward).copy_(k.slice(2, 0, n.forward));
  if (skip.defined()) circular.select(2, 0).add_(skip);
  if (k_reverse.defined()) {
    circular.slice(2, n.transform - n.reverse).copy_(k_reverse.slice(2, 0, n.reverse).flip(2));
  }
  return circular;
}

// A call's kernels, all with a channel dimension; those that were not given are undefined.
struct Kernels {
  at::Tensor k, skip, k_reverse;

  Kernels(const at::Tensor& k_, const OptionalTensor& skip_, const OptionalTensor& k_reverse_)
      : k(with_channels(k_, k_)),
        skip(with_channels(skip_.value_or(at::Tensor()), k_)),
        k_reverse(with_channels(k_reverse_.value_or(at::Tensor()), k_)) {}

  at::Tensor spectrum(const Lengths& n, const Block& channels) const {
    auto part = [&](const at::Tensor& t) { return t.defined() ? channels.of(t, 1) : t; };
    return at::fft_rfft(circular_kernel(n, part(k), part(skip), part(k_reverse)));  // (C, Hb, n/2 + 1)
  }
};

int64_t block_count(int64_t channels) { return (channels + kChannelBlock - 1) / kChannelBlock; }

Block channel_block(int64_t i, int64_t channels) {
  return {i * kChannelBlock, std::min((i + 1) * kChannelBlock, channels)};
}

at::Tensor long_conv(const at::Tensor& u, const at::Tensor& k, const OptionalTensor& skip,
                     const OptionalTensor& k_reverse) {
  long_conv_shapes::check(u, k, skip, k_reverse);
  const auto y = long_conv_shapes::empty_output(u, k);
  if (y.numel() == 0) return y;

  const Lengths n(u, k, k_reverse);
  const Kernels kernels(k, skip, k_reverse);
  const auto y4 = k.dim() == 2 ? y.unsqueeze(1) : y;  // (B, C, H, L)
  const int64_t H = u.size(1);
  parallel_for_each(block_count(H), [&](int64_t i) {
    const Block channels = channel_block(i, H);
    const auto spectrum = kernels.spectrum(n, channels);
    for_each_block(u.size(0), kBatchBlock, [&](const Block& batch) {
      const auto u_spectrum = at::fft_rfft(channels.of(batch.of(u, 0), 1), n.transform);  // (Bb, Hb, n/2 + 1)
      const auto product = at::fft_irfft(u_spectrum.unsqueeze(1) * spectrum, n.transform);
      channels.of(batch.of(y4, 0), 2).copy_(product.slice(3, 0, n.signal));
    });
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> long_conv_backward(
    const at::Tensor& grad_y, const at::Tensor& u, const at::Tensor& k, const OptionalTensor& skip,
    const OptionalTensor& k_reverse, std::array<bool, 4> output_mask) {
  long_conv_shapes::check_backward(grad_y, u, k, skip, k_reverse, output_mask);
  const auto grad_u = output_mask[0] ? empty_signal(u) : at::Tensor();
  const auto grad_k = empty_gradient(output_mask[1], k), grad_skip = empty_gradient(output_mask[2], skip),
             grad_k_reverse = empty_gradient(output_mask[3], k_reverse);
  for (const auto& grad : {grad_k, grad_skip, grad_k_reverse}) {
    if (grad.defined()) grad.zero_();  // what lies beyond the signal stays 0
  }
  const bool kernel_grads = output_mask[1] || output_mask[2] || output_mask[3];
  if (grad_y.numel() == 0) {
    if (output_mask[0]) grad_u.zero_();
    return {grad_u, grad_k, grad_skip, grad_k_reverse};
  }

  const Lengths n(u, k, k_reverse);
  const Kernels kernels(k, skip, k_reverse);
  const auto grad_y4 = k.dim() == 2 ? grad_y.unsqueeze(1) : grad_y;  // (B, C, H, L)
  const auto gk = with_channels(grad_k, k), gs = with_channels(grad_skip, k),
             gr = with_channels(grad_k_reverse, k);
  const int64_t H = u.size(1);
  parallel_for_each(block_count(H), [&](int64_t i) {
    const Block channels = channel_block(i, H);
    // conj_physical: the lazy conj() is not applied in a kernel that a TorchDispatchMode has called.
    const auto spectrum = output_mask[0] ? at::conj_physical(kernels.spectrum(n, channels)) : at::Tensor();
    at::Tensor correlation_spectrum;  // (C, Hb, n/2 + 1), summed over the batch in order
    for_each_block(u.size(0), kBatchBlock, [&](const Block& batch) {
      const auto grad_spectrum = at::fft_rfft(channels.of(batch.of(grad_y4, 0), 2), n.transform);
      if (output_mask[0]) {
        const auto product = at::fft_irfft(at::sum(grad_spectrum * spectrum, 1), n.transform);
        channels.of(batch.of(grad_u, 0), 1).copy_(product.slice(2, 0, n.signal));
      }
      if (kernel_grads) {
        const auto u_spectrum = at::fft_rfft(channels.of(batch.of(u, 0), 1), n.transform);
        const auto product = at::sum(grad_spectrum * at::conj_physical(u_spectrum).unsqueeze(1), 0);
        correlation_spectrum = correlation_spectrum.defined() ? correlation_spectrum.add_(product) : product;
      }
    });
    if (!kernel_grads) return;
    const auto correlation = at::fft_irfft(correlation_spectrum, n.transform);  // by lag, as circular_kernel
    if (gk.defined()) channels.of(gk, 1).slice(2, 0, n.forward).copy_(correlation.slice(2, 0, n.forward));
    if (gs.defined()) channels.of(gs, 1).copy_(correlation.select(2, 0));
    if (gr.defined()) {
      channels.of(gr, 1).slice(2, 0, n.reverse).copy_(correlation.slice(2, n.transform - n.reverse).flip(2));
    }
  });
  return {grad_u, grad_k, grad_skip, grad_k_reverse};
}

TORCH_LIBRARY_IMPL(spade_ext, CPU, m) {
  m.impl("long_conv", long_conv);
  m.impl("long_conv_backward", long_conv_backward);
}

}  // namespace spade_ext::long_conv_cpu
