// Convolution by our own transforms, a vector of channels and a row of the batch at a time, so that no whole
// spectrum is in memory.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <spade_ext/core/documents.h>
#include <spade_ext/core/parallel.h>
#include <spade_ext/long_conv/long_conv_plan.h>
#include <spade_ext/long_conv/long_conv_shapes.h>
#include <torch/library.h>

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

namespace spade_ext::long_conv_cpu {

using long_conv_shapes::with_channels;

// The lengths of one convolution: what of each kernel reaches an output, and the circular length without
// wrap-around.
struct Lengths {
  int64_t signal, forward, reverse, transform;

  Lengths(int64_t signal_, const at::Tensor& k, const OptionalTensor& k_reverse)
      : signal(signal_),
        forward(std::min(k.size(-1), signal)),
        reverse(is_given(k_reverse) ? std::min(k_reverse->size(-1), signal - 1) : 0),
        transform(transform_length(signal + std::max(forward - 1, reverse))) {}
};

// A call's kernels or their gradients, all with a channel dimension; those that are not there are undefined.
struct Kernels {
  at::Tensor k, skip, k_reverse;

  Kernels() = default;

  Kernels(const OptionalTensor& k_, const OptionalTensor& skip_, const OptionalTensor& k_reverse_,
          const at::Tensor& like)
      : k(with_channels(k_.value_or(at::Tensor()), like)),
        skip(with_channels(skip_.value_or(at::Tensor()), like)),
        k_reverse(with_channels(k_reverse_.value_or(at::Tensor()), like)) {}

  // Uninitialised gradients, of the taps that reach an output.
  Kernels empty_like(const Lengths& lengths) const {
    auto taps = [](const at::Tensor& t, int64_t length) {
      return t.defined() ? at::empty({t.size(0), t.size(1), length}, t.options()) : at::Tensor();
    };
    Kernels result;
    result.k = taps(k, lengths.forward), result.k_reverse = taps(k_reverse, lengths.reverse);
    if (skip.defined()) result.skip = at::empty(skip.sizes(), skip.options());
    return result;
  }

  void add(const Kernels& part) const {
    if (k.defined()) k.narrow(-1, 0, part.k.size(-1)).add_(part.k);
    if (skip.defined()) skip.add_(part.skip);
    if (k_reverse.defined()) k_reverse.narrow(-1, 0, part.k_reverse.size(-1)).add_(part.k_reverse);
  }
};

// The channels from h on and tokens from `begin` on of t[lead][c], of t (lead, C, H, L).
template <class T>
SignalView<T> signal_view(const at::Tensor& t, int64_t lead, int64_t c, int64_t h, int64_t begin = 0) {
  return {t.data_ptr<T>() + lead * t.stride(0) + c * t.stride(1) + h * t.stride(2) + begin * t.stride(3),
          t.stride(3), t.stride(2)};
}
template <class T>
SignalView<const T> input_view(const at::Tensor& t, int64_t lead, int64_t c, int64_t h, int64_t begin = 0) {
  return {
      t.const_data_ptr<T>() + lead * t.stride(0) + c * t.stride(1) + h * t.stride(2) + begin * t.stride(3),
      t.stride(3), t.stride(2)};
}

template <class T>
void reverse_rows(T* rows, int64_t count, int64_t lanes) {
  for (T *first = rows, *last = rows + (count - 1) * lanes; first < last; first += lanes, last -= lanes) {
    std::swap_ranges(first, first + lanes, last);
  }
}

// A task is a line of channels, what a cache line holds of them, and a block of the documents. Few lines have
// several blocks each; all of it follows from shapes and documents.
constexpr int64_t kLineBytes = 64;
constexpr int64_t kTasks = 16;
constexpr int64_t kDocumentsOfBlock = 4;

// Of documents of similar lengths.
template <class T>
class Convolution {
 public:
  Convolution(const at::Tensor& u, const at::Tensor& k, const OptionalTensor& skip,
              const OptionalTensor& k_reverse, std::vector<Document> documents, const Lengths& lengths)
      : u_(u.unsqueeze(1)),
        kernels_(k, skip, k_reverse, k),
        documents_(std::move(documents)),
        n_(lengths),
        C_(kernels_.k.size(0)),
        H_(u.size(1)),
        plan_(n_.transform) {
    plan_.shorten(n_.signal, n_.forward, n_.reverse);
    line_ = std::max<int64_t>(kLineBytes / sizeof(T), lanes_);
    lines_ = (H_ + line_ - 1) / line_;
    const int64_t count = documents_.size();
    blocks_ = std::clamp<int64_t>(kTasks / lines_, 1, std::max<int64_t>(count / kDocumentsOfBlock, 1));
  }

  void forward(const at::Tensor& y) const {
    parallel_for_each(lines_ * blocks_, [&](int64_t i) {
      const Line line = this->line(i / blocks_);
      const auto rows = empty_rows(line, C_);
      const auto spectra = this->spectra(line, rows);
      for_each_document(i % blocks_, [&](const Document& d) {
        load_signal(u_, d, 0, line, rows, C_ - 1);
        for (int64_t g = 0; g < line.groups; ++g) ops_.convolve(*plan_, at(spectra, g), C_, at(rows, g));
        for (int64_t c = 0; c < C_; ++c)
          store(rows, c, line, d.length(), signal_view<T>(y, d.row, c, line.h, d.begin));
      });
    });
  }

  // grad_u or all of grads may be undefined.
  void backward(const at::Tensor& grad_y, const at::Tensor& grad_u, const Kernels& grads) const {
    const bool kernels = grads.k.defined() || grads.skip.defined() || grads.k_reverse.defined();
    std::vector<at::Tensor> sums(lines_ * blocks_);  // of a task's documents; a line's are added in order
    parallel_for_each(lines_ * blocks_, [&](int64_t i) {
      const Line line = this->line(i / blocks_);
      sums[i] = backward_documents(line, i % blocks_, grad_y, grad_u, kernels);
      if (blocks_ == 1 && kernels) kernel_gradients(line, std::exchange(sums[i], at::Tensor()), grads);
    });
    if (blocks_ == 1 || !kernels) return;
    parallel_for_each(lines_, [&](int64_t i) {
      const auto sum = sums[i * blocks_];
      for (int64_t block = 1; block < blocks_; ++block) sum.add_(sums[i * blocks_ + block]);
      kernel_gradients(line(i), sum, grads);
    });
  }

 private:
  // The channels [h, h + channels), in `groups` vectors.
  struct Line {
    int64_t h, channels, groups;
  };

  Line line(int64_t i) const {
    const int64_t h = i * line_, channels = std::min(line_, H_ - h);
    return {h, channels, (channels + lanes_ - 1) / lanes_};
  }

  template <class Body>
  void for_each_document(int64_t block, const Body& body) const {
    const int64_t count = documents_.size(), size = (count + blocks_ - 1) / blocks_;
    for (int64_t i = block * size; i < std::min((block + 1) * size, count); ++i) body(documents_[i]);
  }

  at::Tensor empty_rows(const Line& line, int64_t count) const {
    return at::empty({line.groups, count, n_.transform * lanes_}, u_.options());
  }

  at::Tensor empty_spectra(const Line& line) const {
    return at::empty({line.groups, C_, (*plan_).pairs * 6 * lanes_}, u_.options());
  }

  static T* at(const at::Tensor& scratch, int64_t group, int64_t c = 0) {
    return scratch.data_ptr<T>() + group * scratch.stride(0) + c * scratch.stride(1);
  }

  // Of t (B, C, H, L), into rows[:, to].
  void load_signal(const at::Tensor& t, const Document& d, int64_t c, const Line& line,
                   const at::Tensor& rows, int64_t to) const {
    const int64_t padded = (*plan_).short_signals ? (*plan_).points : n_.transform;
    ops_.load(input_view<T>(t, d.row, c, line.h, d.begin), line.channels, d.length(), padded, at(rows, 0, to),
              rows.stride(0));
  }

  void store(const at::Tensor& rows, int64_t c, const Line& line, int64_t tokens,
             SignalView<T> signal) const {
    ops_.store(at(rows, 0, c), rows.stride(0), line.channels, tokens, signal);
  }

  // Into rows[:, 0], the weight of lag l >= 0 at l, of lag l < 0 at n + l. The skip is one more weight of lag
  // 0.
  void load_kernel(const Line& line, int64_t c, const at::Tensor& rows) const {
    const int64_t causal = n_.transform - n_.reverse;
    ops_.load(input_view<T>(kernels_.k.unsqueeze(0), 0, c, line.h), line.channels, n_.forward,
              (*plan_).short_kernels ? (*plan_).points : causal, at(rows, 0), rows.stride(0));
    if (kernels_.k_reverse.defined()) {
      ops_.load(input_view<T>(kernels_.k_reverse.unsqueeze(0), 0, c, line.h), line.channels, n_.reverse,
                n_.reverse, at(rows, 0) + causal * lanes_, rows.stride(0));
      reverse_lags(line, rows);
    }
    if (!kernels_.skip.defined()) return;
    const at::Tensor skip = kernels_.skip.select(0, c);
    for (int64_t i = 0; i < line.channels; ++i) {
      at(rows, i / lanes_)[i % lanes_] += skip.const_data_ptr<T>()[(line.h + i) * skip.stride(0)];
    }
  }

  void reverse_lags(const Line& line, const at::Tensor& rows) const {
    for (int64_t g = 0; g < line.groups; ++g) {
      reverse_rows(at(rows, g) + (n_.transform - n_.reverse) * lanes_, n_.reverse, lanes_);
    }
  }

  at::Tensor spectra(const Line& line, const at::Tensor& rows) const {
    const auto spectra = empty_spectra(line);
    for (int64_t c = 0; c < C_; ++c) {
      load_kernel(line, c, rows);
      for (int64_t g = 0; g < line.groups; ++g) ops_.spectrum(*plan_, at(rows, g), at(spectra, g, c));
    }
    return spectra;
  }

  // Writes the gradient of u in one block of the documents; returns that of the spectra summed over it.
  at::Tensor backward_documents(const Line& line, int64_t block, const at::Tensor& grad_y,
                                const at::Tensor& grad_u, bool kernels) const {
    const auto rows = empty_rows(line, 1 + C_);
    const auto spectra = grad_u.defined() ? this->spectra(line, rows) : at::Tensor();
    const auto sums = kernels ? empty_spectra(line).zero_() : at::Tensor();
    auto at_group = [](const at::Tensor& t, int64_t g) { return t.defined() ? at(t, g) : nullptr; };
    for_each_document(block, [&](const Document& d) {
      if (kernels) load_signal(u_, d, 0, line, rows, 0);
      for (int64_t c = 0; c < C_; ++c) load_signal(grad_y, d, c, line, rows, 1 + c);
      for (int64_t g = 0; g < line.groups; ++g) {
        ops_.backward(*plan_, at_group(spectra, g), C_, at(rows, g), at_group(sums, g));
      }
      if (grad_u.defined())
        store(rows, 0, line, d.length(), signal_view<T>(grad_u, d.row, 0, line.h, d.begin));
    });
    return sums;
  }

  void kernel_gradients(const Line& line, const at::Tensor& sums, const Kernels& grads) const {
    const auto rows = empty_rows(line, 1);  // as load_kernel's
    for (int64_t c = 0; c < C_; ++c) {
      for (int64_t g = 0; g < line.groups; ++g) ops_.correlate(*plan_, at(sums, g, c), at(rows, g));
      if (grads.k.defined()) {
        store(rows, 0, line, n_.forward, signal_view<T>(grads.k.unsqueeze(0), 0, c, line.h));
      }
      if (grads.skip.defined()) {
        T* skip = grads.skip.data_ptr<T>() + c * H_ + line.h;
        for (int64_t i = 0; i < line.channels; ++i) skip[i] = at(rows, i / lanes_)[i % lanes_];
      }
      if (grads.k_reverse.defined()) {
        reverse_lags(line, rows);
        ops_.store(at(rows, 0) + (n_.transform - n_.reverse) * lanes_, rows.stride(0), line.channels,
                   n_.reverse, signal_view<T>(grads.k_reverse.unsqueeze(0), 0, c, line.h));
      }
    }
  }

  const LongConvTransform<T>& ops_ = long_conv_transform<T>();
  const at::Tensor u_;  // (B, 1, H, L)
  const Kernels kernels_;
  const std::vector<Document> documents_;
  const Lengths n_;
  const int64_t C_, H_, lanes_ = ops_.lanes;
  Plan<T> plan_;
  int64_t line_, lines_, blocks_;
};

// Calls body(documents, lengths) for the documents of each length of transform; the lengths are the longest
// one's.
template <class Body>
void for_each_length(const at::Tensor& u, const at::Tensor& k, const OptionalTensor& k_reverse,
                     const OptionalTensor& segment_ids, const Body& body) {
  std::map<int64_t, std::vector<Document>> groups;
  for (const auto& row : documents(u.size(0), u.size(2), segment_ids)) {
    for (const Document& document : row)
      groups[Lengths(document.length(), k, k_reverse).transform].push_back(document);
  }
  for (auto& [transform, group] : groups) {
    int64_t longest = 0;
    for (const Document& document : group) longest = std::max(longest, document.length());
    body(std::move(group), Lengths(longest, k, k_reverse));
  }
}

at::Tensor long_conv(const at::Tensor& u, const at::Tensor& k, const OptionalTensor& skip,
                     const OptionalTensor& k_reverse, const OptionalTensor& segment_ids) {
  long_conv_shapes::check(u, k, skip, k_reverse, segment_ids);
  const auto y = long_conv_shapes::empty_output(u, k);
  if (y.numel() == 0) return y;
  AT_DISPATCH_FLOATING_TYPES(u.scalar_type(), "long_conv", [&] {
    for_each_length(u, k, k_reverse, segment_ids, [&](std::vector<Document> group, const Lengths& lengths) {
      Convolution<scalar_t>(u, k, skip, k_reverse, std::move(group), lengths)
          .forward(k.dim() == 2 ? y.unsqueeze(1) : y);
    });
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> long_conv_backward(
    const at::Tensor& grad_y, const at::Tensor& u, const at::Tensor& k, const OptionalTensor& skip,
    const OptionalTensor& k_reverse, const OptionalTensor& segment_ids, std::array<bool, 4> output_mask) {
  long_conv_shapes::check_backward(grad_y, u, k, skip, k_reverse, segment_ids, output_mask);
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
  const Kernels grads(grad_k, grad_skip, grad_k_reverse, k);
  AT_DISPATCH_FLOATING_TYPES(u.scalar_type(), "long_conv_backward", [&] {
    for_each_length(u, k, k_reverse, segment_ids, [&](std::vector<Document> group, const Lengths& lengths) {
      const Kernels part = is_given(segment_ids) ? grads.empty_like(lengths) : grads;
      Convolution<scalar_t>(u, k, skip, k_reverse, std::move(group), lengths)
          .backward(k.dim() == 2 ? grad_y.unsqueeze(1) : grad_y,
                    output_mask[0] ? grad_u.unsqueeze(1) : grad_u, part);
      if (is_given(segment_ids)) grads.add(part);
    });
  });
  return {grad_u, grad_k, grad_skip, grad_k_reverse};
}

TORCH_LIBRARY_IMPL(spade_ext, CPU, m) {
  m.impl("long_conv", long_conv);
  m.impl("long_conv_backward", long_conv_backward);
}

}  // namespace spade_ext::long_conv_cpu
