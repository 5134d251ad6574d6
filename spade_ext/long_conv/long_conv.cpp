#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <spade_ext/long_conv/long_conv.h>
#include <spade_ext/long_conv/long_conv_shapes.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

namespace spade_ext {

using LongConvGrads = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

at::Tensor long_conv(const at::Tensor& u, const at::Tensor& k, const std::optional<at::Tensor>& skip,
                     const std::optional<at::Tensor>& k_reverse,
                     const std::optional<at::Tensor>& segment_ids) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("spade_ext::long_conv", "").typed<decltype(long_conv)>();
  return op.call(u, k, skip, k_reverse, segment_ids);
}

namespace long_conv_op {

LongConvGrads backward(const at::Tensor& grad_y, const at::Tensor& u, const at::Tensor& k,
                       const OptionalTensor& skip, const OptionalTensor& k_reverse,
                       const OptionalTensor& segment_ids, std::array<bool, 4> output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("spade_ext::long_conv_backward", "")
                             .typed<decltype(backward)>();
  return op.call(grad_y, u, k, skip, k_reverse, segment_ids, output_mask);
}

at::Tensor meta(const at::Tensor& u, const at::Tensor& k, const OptionalTensor& skip,
                const OptionalTensor& k_reverse, const OptionalTensor& segment_ids) {
  long_conv_shapes::check(u, k, skip, k_reverse, segment_ids);
  return long_conv_shapes::empty_output(u, k);
}

LongConvGrads backward_meta(const at::Tensor& grad_y, const at::Tensor& u, const at::Tensor& k,
                            const OptionalTensor& skip, const OptionalTensor& k_reverse,
                            const OptionalTensor& segment_ids, std::array<bool, 4> output_mask) {
  long_conv_shapes::check_backward(grad_y, u, k, skip, k_reverse, segment_ids, output_mask);
  return {output_mask[0] ? empty_signal(u) : at::Tensor(), empty_gradient(output_mask[1], k),
          empty_gradient(output_mask[2], skip), empty_gradient(output_mask[3], k_reverse)};
}

struct LongConvFunction : torch::autograd::Function<LongConvFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& u, const at::Tensor& k,
                            const OptionalTensor& skip, const OptionalTensor& k_reverse,
                            const OptionalTensor& segment_ids) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({u, k, skip.value_or(at::Tensor()), k_reverse.value_or(at::Tensor()),
                            segment_ids.value_or(at::Tensor())});
    return long_conv(u, k, skip, k_reverse, segment_ids);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto mask = gradient_mask<4>(ctx, {true, true, saved[2].defined(), saved[3].defined()});
    auto [grad_u, grad_k, grad_skip, grad_k_reverse] =
        long_conv_op::backward(grads[0], saved[0], saved[1], as_optional(saved[2]), as_optional(saved[3]),
                               as_optional(saved[4]), mask);
    return {grad_u, grad_k, grad_skip, grad_k_reverse, {}};
  }
};

at::Tensor autograd(const at::Tensor& u, const at::Tensor& k, const OptionalTensor& skip,
                    const OptionalTensor& k_reverse, const OptionalTensor& segment_ids) {
  return LongConvFunction::apply(u, k, skip, k_reverse, segment_ids);
}

// The transform loses too much in half precision: autocast runs it in float32.
template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor autocast(const at::Tensor& u, const at::Tensor& k, const OptionalTensor& skip,
                    const OptionalTensor& k_reverse, const OptionalTensor& segment_ids) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  auto cast = [](const auto& t) { return at::autocast::cached_cast(at::kFloat, t, device); };
  return long_conv(cast(u), cast(k), cast(skip), cast(k_reverse), segment_ids);
}

TORCH_LIBRARY_FRAGMENT(spade_ext, m) {
  m.def(
      "long_conv(Tensor u, Tensor k, Tensor? skip=None, Tensor? k_reverse=None, Tensor? segment_ids=None) -> "
      "Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "long_conv_backward(Tensor grad_y, Tensor u, Tensor k, Tensor? skip, Tensor? k_reverse, "
      "Tensor? segment_ids, bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(spade_ext, Meta, m) {
  m.impl("long_conv", meta);
  m.impl("long_conv_backward", backward_meta);
}

TORCH_LIBRARY_IMPL(spade_ext, Autograd, m) {
  m.impl("long_conv", autograd);
  m.impl("long_conv_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(spade_ext, AutocastCPU, m) {
  m.impl("long_conv", autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(spade_ext, AutocastCUDA, m) {
  m.impl("long_conv", autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace long_conv_op
}  // namespace spade_ext
