#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <spade_ext/diagonal/diagonal.h>
#include <spade_ext/diagonal/diagonal_kernel_shapes.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

namespace spade_ext {

at::Tensor diagonal_kernel(const at::Tensor& w, const at::Tensor& c, const std::optional<at::Tensor>& log_dt,
                           c10::SymInt length, std::optional<std::string_view> disc, double rate) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("spade_ext::diagonal_kernel", "")
                             .typed<decltype(diagonal_kernel)>();
  return op.call(w, c, log_dt, std::move(length), disc, rate);
}

namespace diagonal_kernel_op {

using OptionalString = std::optional<std::string_view>;
using Grads = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Grads backward(const at::Tensor& grad_k, const at::Tensor& w, const at::Tensor& c,
               const OptionalTensor& log_dt, OptionalString disc, double rate,
               std::array<bool, 3> output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("spade_ext::diagonal_kernel_backward", "")
                             .typed<decltype(backward)>();
  return op.call(grad_k, w, c, log_dt, disc, rate, output_mask);
}

at::Tensor meta(const at::Tensor& w, const at::Tensor& c, const OptionalTensor& log_dt, c10::SymInt length,
                OptionalString disc, double rate) {
  diagonal_kernel_shapes::check(w, c, log_dt, length, disc, rate);
  return at::empty_symint({c.sym_size(0), c.sym_size(1), length}, c.options());
}

Grads backward_meta(const at::Tensor& grad_k, const at::Tensor& w, const at::Tensor& c,
                    const OptionalTensor& log_dt, OptionalString disc, double rate,
                    std::array<bool, 3> output_mask) {
  diagonal_kernel_shapes::check_backward(grad_k, w, c, log_dt, disc, rate, output_mask);
  return {empty_gradient(output_mask[0], w), empty_gradient(output_mask[1], c),
          empty_gradient(output_mask[2], log_dt)};
}

struct DiagonalKernelFunction : torch::autograd::Function<DiagonalKernelFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& w, const at::Tensor& c,
                            const OptionalTensor& log_dt, c10::SymInt length, OptionalString disc,
                            double rate) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({w, c, log_dt.value_or(at::Tensor())});
    ctx->saved_data["disc"] = disc ? c10::IValue(std::string(*disc)) : c10::IValue();
    ctx->saved_data["rate"] = rate;
    return diagonal_kernel(w, c, log_dt, std::move(length), disc, rate);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto mask = gradient_mask<3>(ctx, {true, true, saved[2].defined()});
    const auto& disc = ctx->saved_data["disc"];
    auto [grad_w, grad_c, grad_log_dt] =
        diagonal_kernel_op::backward(grads[0], saved[0], saved[1], as_optional(saved[2]),
                                     disc.isNone() ? OptionalString() : OptionalString(disc.toStringView()),
                                     ctx->saved_data["rate"].toDouble(), mask);
    return {grad_w, grad_c, grad_log_dt, {}, {}, {}};
  }
};

at::Tensor autograd(const at::Tensor& w, const at::Tensor& c, const OptionalTensor& log_dt,
                    c10::SymInt length, OptionalString disc, double rate) {
  return DiagonalKernelFunction::apply(w, c, log_dt, std::move(length), disc, rate);
}

// Half-precision state space parameters diverge: autocast runs the op in float32.
template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor autocast(const at::Tensor& w, const at::Tensor& c, const OptionalTensor& log_dt,
                    c10::SymInt length, OptionalString disc, double rate) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  auto cast = [](const auto& t) { return at::autocast::cached_cast(at::kFloat, t, device); };
  return diagonal_kernel(cast(w), cast(c), cast(log_dt), std::move(length), disc, rate);
}

TORCH_LIBRARY_FRAGMENT(spade_ext, m) {
  m.def(
      "diagonal_kernel(Tensor w, Tensor c, Tensor? log_dt, SymInt length, str? disc='zoh', float rate=1.0) "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "diagonal_kernel_backward(Tensor grad_k, Tensor w, Tensor c, Tensor? log_dt, str? disc, float rate, "
      "bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(spade_ext, Meta, m) {
  m.impl("diagonal_kernel", meta);
  m.impl("diagonal_kernel_backward", backward_meta);
}

TORCH_LIBRARY_IMPL(spade_ext, Autograd, m) {
  m.impl("diagonal_kernel", autograd);
  m.impl("diagonal_kernel_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(spade_ext, AutocastCPU, m) {
  m.impl("diagonal_kernel", autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(spade_ext, AutocastCUDA, m) {
  m.impl("diagonal_kernel", autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace diagonal_kernel_op
}  // namespace spade_ext
