#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <spade_ext/local_attention/local_attention.h>
#include <spade_ext/local_attention/local_attention_shapes.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

namespace spade_ext {

at::Tensor local_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const std::optional<at::Tensor>& bias,
                           const std::optional<at::Tensor>& attention_mask, at::OptionalIntArrayRef window,
                           bool causal, std::optional<double> scale) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("spade_ext::local_attention", "")
                             .typed<decltype(local_attention)>();
  return op.call(q, k, v, bias, attention_mask, window, causal, scale);
}

namespace local_attention_op {

using Forward = std::tuple<at::Tensor, at::Tensor>;
using Grads = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The inner ops see a band: left and right are plain numbers, and bias has left + right + 1 entries.
Forward forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& bias,
                const OptionalTensor& attention_mask, c10::SymInt left, c10::SymInt right, double scale) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("spade_ext::local_attention_forward", "")
                             .typed<decltype(forward)>();
  return op.call(q, k, v, bias, attention_mask, std::move(left), std::move(right), scale);
}

Grads backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
               const OptionalTensor& bias, const OptionalTensor& attention_mask, const at::Tensor& out,
               const at::Tensor& lse, c10::SymInt left, c10::SymInt right, double scale,
               std::array<bool, 4> output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("spade_ext::local_attention_backward", "")
                             .typed<decltype(backward)>();
  return op.call(grad_out, q, k, v, bias, attention_mask, out, lse, std::move(left), std::move(right), scale,
                 output_mask);
}

Forward forward_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const OptionalTensor& bias, const OptionalTensor& attention_mask, c10::SymInt left,
                     c10::SymInt right, double) {
  local_attention_shapes::check_band(q, k, v, bias, attention_mask, left, right);
  const auto B = q.sym_size(0), Lq = q.sym_size(1), H = q.sym_size(2);
  return {at::empty_symint({B, Lq, H, v.sym_size(3)}, q.options()),
          at::empty_symint({B, H, Lq}, local_attention_shapes::statistics_options(q))};
}

Grads backward_meta(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const OptionalTensor& bias, const OptionalTensor& attention_mask, const at::Tensor& out,
                    const at::Tensor& lse, c10::SymInt left, c10::SymInt right, double,
                    std::array<bool, 4> output_mask) {
  local_attention_shapes::check_backward(grad_out, q, k, v, bias, attention_mask, out, lse, left, right,
                                         output_mask);
  return {empty_gradient(output_mask[0], q), empty_gradient(output_mask[1], k),
          empty_gradient(output_mask[2], v), empty_gradient(output_mask[3], bias)};
}

struct LocalAttentionFunction : torch::autograd::Function<LocalAttentionFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& v, const OptionalTensor& bias,
                            const OptionalTensor& attention_mask, c10::SymInt left, c10::SymInt right,
                            double scale) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, lse] = local_attention_op::forward(q, k, v, bias, attention_mask, left, right, scale);
    ctx->save_for_backward(
        {q, k, v, bias.value_or(at::Tensor()), attention_mask.value_or(at::Tensor()), out, lse});
    ctx->saved_data["left"] = left;
    ctx->saved_data["right"] = right;
    ctx->saved_data["scale"] = scale;
    return out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto mask = gradient_mask<4>(ctx, {true, true, true, saved[3].defined()});
    auto [grad_q, grad_k, grad_v, grad_bias] = local_attention_op::backward(
        grads[0], saved[0], saved[1], saved[2], as_optional(saved[3]), as_optional(saved[4]), saved[5],
        saved[6], ctx->saved_data["left"].toSymInt(), ctx->saved_data["right"].toSymInt(),
        ctx->saved_data["scale"].toDouble(), mask);
    return {grad_q, grad_k, grad_v, grad_bias, {}, {}, {}, {}};
  }
};

// Turns the public arguments into a band and calls body(bias, left, right, scale).
template <class Body>
at::Tensor with_band(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const OptionalTensor& bias, const OptionalTensor& attention_mask,
                     at::OptionalIntArrayRef window, bool causal, std::optional<double> scale,
                     const Body& body) {
  local_attention_shapes::check_tensors(q, k, v, attention_mask);
  local_attention_shapes::check_window(window, causal);
  const double used_scale =
      scale.value_or(1.0 / std::sqrt(double(q.sym_size(3).guard_int(__FILE__, __LINE__))));
  if (window) {
    const c10::SymInt left((*window)[0]), right((*window)[1]);
    local_attention_shapes::check_bias(bias, q, left + right + 1, "(H, left + right + 1)");
    return body(bias, left, right, used_scale);
  }
  const c10::SymInt left = k.sym_size(1) - 1, right = causal ? c10::SymInt(0) : q.sym_size(1) - 1;
  local_attention_shapes::check_bias(bias, q, left + q.sym_size(1), "(H, Lq + Lk - 1)");
  const auto band = causal && is_given(bias) ? OptionalTensor(bias->slice_symint(1, 0, left + 1)) : bias;
  return body(band, left, right, used_scale);
}

at::Tensor autograd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& bias,
                    const OptionalTensor& attention_mask, at::OptionalIntArrayRef window, bool causal,
                    std::optional<double> scale) {
  return with_band(q, k, v, bias, attention_mask, window, causal, scale,
                   [&](const OptionalTensor& band, const auto& left, const auto& right, double used_scale) {
                     return LocalAttentionFunction::apply(q, k, v, band, attention_mask, left, right,
                                                          used_scale);
                   });
}

// Inference mode has no Autograd key.
at::Tensor composite(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const OptionalTensor& bias, const OptionalTensor& attention_mask,
                     at::OptionalIntArrayRef window, bool causal, std::optional<double> scale) {
  return with_band(q, k, v, bias, attention_mask, window, causal, scale,
                   [&](const OptionalTensor& band, const auto& left, const auto& right, double used_scale) {
                     return std::get<0>(forward(q, k, v, band, attention_mask, left, right, used_scale));
                   });
}

template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor autocast(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& bias,
                    const OptionalTensor& attention_mask, at::OptionalIntArrayRef window, bool causal,
                    std::optional<double> scale) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  const auto type = at::autocast::get_lower_precision_fp_from_device_type(device);
  auto cast = [type](const auto& t) { return at::autocast::cached_cast(type, t, device); };
  return local_attention(cast(q), cast(k), cast(v), cast(bias), attention_mask, window, causal, scale);
}

TORCH_LIBRARY_FRAGMENT(spade_ext, m) {
  m.def(
      "local_attention(Tensor q, Tensor k, Tensor v, Tensor? bias=None, Tensor? attention_mask=None, "
      "int[2]? window=None, bool causal=False, float? scale=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "local_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? attention_mask, "
      "SymInt left, SymInt right, float scale) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "local_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? bias, "
      "Tensor? attention_mask, Tensor out, Tensor lse, SymInt left, SymInt right, float scale, "
      "bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(spade_ext, Meta, m) {
  m.impl("local_attention_forward", forward_meta);
  m.impl("local_attention_backward", backward_meta);
}

TORCH_LIBRARY_IMPL(spade_ext, CompositeExplicitAutograd, m) { m.impl("local_attention", composite); }

TORCH_LIBRARY_IMPL(spade_ext, Autograd, m) {
  m.impl("local_attention", autograd);
  m.impl("local_attention_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("local_attention_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(spade_ext, AutocastCPU, m) {
  m.impl("local_attention", autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(spade_ext, AutocastCUDA, m) {
  m.impl("local_attention", autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace local_attention_op
}  // namespace spade_ext
