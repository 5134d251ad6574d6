#include <spade_ext/linear_step/linear_step.h>

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <spade_ext/linear_step/linear_step_shapes.h>
#include <torch/library.h>

namespace spade_ext {

at::Tensor linear_step(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("spade_ext::linear_step", "")
                             .typed<decltype(linear_step)>();
  return op.call(x, weight, bias);
}

namespace linear_step_op {

at::Tensor meta(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
  linear_step_shapes::check(x, weight, bias);
  return linear_step_shapes::empty_result(x, weight);
}

at::Tensor autograd(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
  refuse_gradients("linear_step", {{"x", x}, {"weight", weight}, {"bias", bias}});
  at::AutoDispatchBelowAutograd guard;
  return linear_step(x, weight, bias);
}

template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor autocast(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  const auto type = at::autocast::get_lower_precision_fp_from_device_type(device);
  auto cast = [type](const auto& t) { return at::autocast::cached_cast(type, t, device); };
  return linear_step(cast(x), cast(weight), cast(bias));
}

TORCH_LIBRARY_FRAGMENT(spade_ext, m) {
  m.def("linear_step(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(spade_ext, Meta, m) { m.impl("linear_step", meta); }

TORCH_LIBRARY_IMPL(spade_ext, Autograd, m) { m.impl("linear_step", autograd); }

TORCH_LIBRARY_IMPL(spade_ext, AutocastCPU, m) {
  m.impl("linear_step", autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(spade_ext, AutocastCUDA, m) {
  m.impl("linear_step", autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace linear_step_op
}  // namespace spade_ext
