// Convolution by our own transforms, a vector of channels and a row of the batch at a time, so that no whole
// spectrum is in memory.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <spade_ext/core/parallel.h>
#include <spade_ext/long_conv/long_conv_plan.h>
#include <spade_ext/long_conv/long_conv_shapes.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace spade_ext::long_conv_cpu {

using long_conv_shapes::with_channels;

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

// A call's kernels or their gradients, all with a channel dimension; those that are not there are undefined.
struct Kernels {
  at::Tensor k, skip, k_reverse;

  Kernels(const OptionalTensor& k_, const OptionalTensor& skip_, const OptionalTensor& k_reverse_,
          const at::Tensor& like)
      : k(with_channels(k_.value_or(at::Tensor()), like)),
        skip(with_channels(skip_.value_or(at::Tensor()), like)),
        k_reverse(with_channels(k_reverse_.value_or(at::Tensor()), like)) {}
};

// The channels from h on of t[lead][c], of t (lead, C, H, L).
template <class T>
SignalView<T> signal_view(const at::Tensor& t, int64_t lead, int64_t c, int64_t h) {
  return {t.data_ptr<T>() + lead * t.stride(0) + c * t.stride(1) + h * t.stride(2), t.stride(3), t.stride(2)};
}
template <class T>
SignalView<const T> input_view(const at::Tensor& t, int64_t lead, int64_t c, int64_t h) {
  return {t.const_data_ptr<T>() + lead * t.stride(0) + c * t.stride(1) + h * t.stride(2), t.stride(3),
          t.stride(2)};
}

template <class T>
void reverse_rows(T* rows, int64_t count, int64_t lanes) {
  for (T *first = rows, *last = rows + (count - 1) * lanes; first < last; first += lanes, last -= lanes) {
    std::swap_ranges(first, first + lanes, last);
  }
}

// A task is a line of channels, what a cache line holds of them, and a block of the batch. Few lines have
// several blocks each; all of it follows from shapes.
constexpr int64_t kLineBytes = 64;
constexpr int64_t kTasks = 16;
constexpr int64_t kRowsOfBlock = 4;

template <class T>
class Convolution {
 public:
  Convolution(const at::Tensor& u, const at::Tensor& k, const OptionalTensor& skip,
              const OptionalTensor& k_reverse)
      : u_(u.unsqueeze(1)),
        kernels_(k, skip, k_reverse, k),
        n_(u, k, k_reverse),
        B_(u.size(0)),
        C_(kernels_.k.size(0)),
        H_(u.size(1)),
        plan_(n_.transform) {
    plan_.shorten(n_.signal, n_.forward, n_.reverse);
    line_ = std::max<int64_t>(kLineBytes / sizeof(T), lanes_);
    lines_ = (H_ + line_ - 1) / line_;
    blocks_ = std::clamp<int64_t>(kTasks / lines_, 1, std::max<int64_t>(B_ / kRowsOfBlock, 1));
  }

  void forward(const at::Tensor& y) const {
    parallel_for_each(lines_ * blocks_, [&](int64_t i) {
      const auto groups = groups_of(i / blocks_);
      const auto rows = empty_rows(groups, C_);
      const auto spectra = this->spectra(groups, rows);
      for_each_row(i % blocks_, [&](int64_t b) {
        for (const auto& g : groups) load(input_view<T>(u_, b, 0, g.h), g, at(rows, g.index, C_ - 1));
        for (const auto& g : groups) ops_.convolve(*plan_, at(spectra, g.index), C_, at(rows, g.index));
        for (const auto& g : groups) {
          for (int64_t c = 0; c < C_; ++c) {
            ops_.store(at(rows, g.index, c), g.channels, n_.signal, signal_view<T>(y, b, c, g.h));
          }
        }
      });
    });
  }

  // grad_u or all of grads may be undefined.
  void backward(const at::Tensor& grad_y, const at::Tensor& grad_u, const Kernels& grads) const {
    const bool kernels = grads.k.defined() || grads.skip.defined() || grads.k_reverse.defined();
    std::vector<at::Tensor> sums(lines_ * blocks_);  // of a task's rows; a line's are added in order
    parallel_for_each(lines_ * blocks_, [&](int64_t i) {
      const auto groups = groups_of(i / blocks_);
      sums[i] = backward_rows(groups, i % blocks_, grad_y, grad_u, kernels);
      if (blocks_ == 1 && kernels) kernel_gradients(groups, std::exchange(sums[i], at::Tensor()), grads);
    });
    if (blocks_ == 1 || !kernels) return;
    parallel_for_each(lines_, [&](int64_t line) {
      const auto sum = sums[line * blocks_];
      for (int64_t block = 1; block < blocks_; ++block) sum.add_(sums[line * blocks_ + block]);
      kernel_gradients(groups_of(line), sum, grads);
    });
  }

 private:
  // A vector of channels, [h, h + channels).
  struct Group {
    int64_t index, h, channels;
  };

  std::vector<Group> groups_of(int64_t line) const {
    std::vector<Group> groups;
    for (int64_t h = line * line_; h < std::min((line + 1) * line_, H_); h += lanes_) {
      groups.push_back({static_cast<int64_t>(groups.size()), h, std::min(lanes_, H_ - h)});
    }
    return groups;
  }

  template <class Body>
  void for_each_row(int64_t block, const Body& body) const {
    const int64_t size = (B_ + blocks_ - 1) / blocks_;
    for (int64_t b = block * size; b < std::min((block + 1) * size, B_); ++b) body(b);
  }

  at::Tensor empty_rows(const std::vector<Group>& groups, int64_t count) const {
    return at::empty({static_cast<int64_t>(groups.size()), count, n_.transform * lanes_},
                     kernels_.k.options());
  }

  at::Tensor empty_spectra(const std::vector<Group>& groups) const {
    return at::empty({static_cast<int64_t>(groups.size()), C_, (*plan_).pairs * 6 * lanes_},
                     kernels_.k.options());
  }

  static T* at(const at::Tensor& scratch, int64_t group, int64_t c = 0) {
    return scratch.data_ptr<T>() + group * scratch.stride(0) + c * scratch.stride(1);
  }

  void load(SignalView<const T> signal, const Group& group, T* rows) const {
    const auto& plan = *plan_;
    ops_.load(signal, group.channels, n_.signal, plan.short_signals ? plan.points : n_.transform, rows);
  }

  // Entry of lag l >= 0 at l, of lag l < 0 at n + l. The skip is one more weight of lag 0.
  void load_kernel(const Group& group, int64_t c, T* rows) const {
    const auto& plan = *plan_;
    T* reverse = rows + (n_.transform - n_.reverse) * lanes_;
    ops_.load(input_view<T>(kernels_.k.unsqueeze(0), 0, c, group.h), group.channels, n_.forward,
              plan.short_kernels ? plan.points : n_.transform - n_.reverse, rows);
    if (kernels_.k_reverse.defined()) {
      ops_.load(input_view<T>(kernels_.k_reverse.unsqueeze(0), 0, c, group.h), group.channels, n_.reverse,
                n_.reverse, reverse);
      reverse_rows(reverse, n_.reverse, lanes_);
    }
    if (!kernels_.skip.defined()) return;
    const auto skip = kernels_.skip.select(0, c);
    for (int64_t i = 0; i < group.channels; ++i) {
      rows[i] += skip.template const_data_ptr<T>()[(group.h + i) * skip.stride(0)];
    }
  }

  at::Tensor spectra(const std::vector<Group>& groups, const at::Tensor& rows) const {
    const auto spectra = empty_spectra(groups);
    for (const auto& g : groups) {
      for (int64_t c = 0; c < C_; ++c) {
        load_kernel(g, c, at(rows, g.index));
        ops_.spectrum(*plan_, at(rows, g.index), at(spectra, g.index, c));
      }
    }
    return spectra;
  }

  // Writes the gradient of u in one block of the batch; returns that of the spectra summed over it.
  at::Tensor backward_rows(const std::vector<Group>& groups, int64_t block, const at::Tensor& grad_y,
                           const at::Tensor& grad_u, bool kernels) const {
    const auto rows = empty_rows(groups, 1 + C_);
    const auto spectra = grad_u.defined() ? this->spectra(groups, rows) : at::Tensor();
    const auto sums = kernels ? empty_spectra(groups).zero_() : at::Tensor();
    auto at_group = [](const at::Tensor& t, const Group& g) {
      return t.defined() ? at(t, g.index) : nullptr;
    };
    for_each_row(block, [&](int64_t b) {
      for (const auto& g : groups) {
        if (kernels) load(input_view<T>(u_, b, 0, g.h), g, at(rows, g.index));
      }
      for (int64_t c = 0; c < C_; ++c) {
        for (const auto& g : groups) load(input_view<T>(grad_y, b, c, g.h), g, at(rows, g.index, 1 + c));
      }
      for (const auto& g : groups) {
        ops_.backward(*plan_, at_group(spectra, g), C_, at(rows, g.index), at_group(sums, g));
      }
      for (const auto& g : groups) {
        if (!grad_u.defined()) continue;
        ops_.store(at(rows, g.index), g.channels, n_.signal, signal_view<T>(grad_u, b, 0, g.h));
      }
    });
    return sums;
  }

  void kernel_gradients(const std::vector<Group>& groups, const at::Tensor& sums,
                        const Kernels& grads) const {
    const at::Tensor scratch = at::empty({n_.transform * lanes_}, sums.options());
    T* rows = scratch.data_ptr<T>();  // by lag, as load_kernel
    T* reverse = rows + (n_.transform - n_.reverse) * lanes_;
    for (const auto& g : groups) {
      for (int64_t c = 0; c < C_; ++c) {
        ops_.correlate(*plan_, at(sums, g.index, c), rows);
        if (grads.k.defined()) {
          ops_.store(rows, g.channels, n_.forward, signal_view<T>(grads.k.unsqueeze(0), 0, c, g.h));
        }
        if (grads.skip.defined()) {
          std::copy_n(rows, g.channels, grads.skip.data_ptr<T>() + c * H_ + g.h);
        }
        if (grads.k_reverse.defined()) {
          reverse_rows(reverse, n_.reverse, lanes_);
          ops_.store(reverse, g.channels, n_.reverse,
                     signal_view<T>(grads.k_reverse.unsqueeze(0), 0, c, g.h));
        }
      }
    }
  }

  const LongConvTransform<T>& ops_ = long_conv_transform<T>();
  const at::Tensor u_;  // (B, 1, H, L)
  const Kernels kernels_;
  const Lengths n_;
  const int64_t B_, C_, H_, lanes_ = ops_.lanes;
  Plan<T> plan_;
  int64_t line_, lines_, blocks_;
};

at::Tensor long_conv(const at::Tensor& u, const at::Tensor& k, const OptionalTensor& skip,
                     const OptionalTensor& k_reverse) {
  long_conv_shapes::check(u, k, skip, k_reverse);
  const auto y = long_conv_shapes::empty_output(u, k);
  if (y.numel() == 0) return y;
  AT_DISPATCH_FLOATING_TYPES(u.scalar_type(), "long_conv", [&] {
    Convolution<scalar_t>(u, k, skip, k_reverse).forward(k.dim() == 2 ? y.unsqueeze(1) : y);
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
  if (grad_y.numel() == 0) {
    if (output_mask[0]) grad_u.zero_();
    return {grad_u, grad_k, grad_skip, grad_k_reverse};
  }
  AT_DISPATCH_FLOATING_TYPES(u.scalar_type(), "long_conv_backward", [&] {
    Convolution<scalar_t>(u, k, skip, k_reverse)
        .backward(k.dim() == 2 ? grad_y.unsqueeze(1) : grad_y, output_mask[0] ? grad_u.unsqueeze(1) : grad_u,
                  Kernels(grad_k, grad_skip, grad_k_reverse, k));
  });
  return {grad_u, grad_k, grad_skip, grad_k_reverse};
}

TORCH_LIBRARY_IMPL(spade_ext, CPU, m) {
  m.impl("long_conv", long_conv);
  m.impl("long_conv_backward", long_conv_backward);
}

}  // namespace spade_ext::long_conv_cpu
