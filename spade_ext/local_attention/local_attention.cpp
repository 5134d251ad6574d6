#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <spade_ext/local_attention/local_attention.h>
#include <spade_ext/local_attention/local_attention_shapes.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

namespace spade_ext {

at::Tensor local_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const std::optional<at::Tensor>& bias, at::OptionalIntArrayRef window,
                           std::optional<int64_t> chunk_size, bool causal,
                           const std::optional<at::Tensor>& attention_mask,
                           const std::optional<at::Tensor>& segment_ids, std::optional<double> scale,
                           std::string_view activation, double dropout_p,
                           const std::optional<at::Tensor>& dropout_seed) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("spade_ext::local_attention", "")
                             .typed<decltype(local_attention)>();
  return op.call(q, k, v, bias, window, chunk_size, causal, attention_mask, segment_ids, scale, activation,
                 dropout_p, dropout_seed);
}

at::Tensor local_attention_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const std::optional<at::Tensor>& bias, const at::Tensor& k_cache,
                                const at::Tensor& v_cache, const at::Tensor& position,
                                std::optional<double> scale) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("spade_ext::local_attention_step", "")
                             .typed<decltype(local_attention_step)>();
  return op.call(q, k, v, bias, k_cache, v_cache, position, scale);
}

namespace local_attention_op {

using local_attention_shapes::Options;
using local_attention_shapes::Tensors;
using Forward = std::tuple<at::Tensor, at::Tensor>;
using Grads = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The inner ops take Tensors and Options one by one, as a schema must.
using ForwardSignature = Forward(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                 const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                 const OptionalTensor&, c10::SymInt, c10::SymInt, std::optional<int64_t>,
                                 std::optional<double>, std::string_view, double);
using BackwardSignature = Grads(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                const OptionalTensor&, const at::Tensor&, const at::Tensor&, c10::SymInt,
                                c10::SymInt, std::optional<int64_t>, std::optional<double>, std::string_view,
                                double, std::array<bool, 4>);

Forward forward(const Tensors& t, const Options& o) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("spade_ext::local_attention_forward", "")
                             .typed<ForwardSignature>();
  return op.call(t.q, t.k, t.v, t.bias, t.attention_mask, t.segment_ids, t.dropout_seed, o.left, o.right,
                 o.chunk_size, o.scale, o.activation, o.dropout_p);
}

Grads backward(const at::Tensor& grad_out, const Tensors& t, const at::Tensor& out, const at::Tensor& lse,
               const Options& o, std::array<bool, 4> output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("spade_ext::local_attention_backward", "")
                             .typed<BackwardSignature>();
  return op.call(grad_out, t.q, t.k, t.v, t.bias, t.attention_mask, t.segment_ids, t.dropout_seed, out, lse,
                 o.left, o.right, o.chunk_size, o.scale, o.activation, o.dropout_p, output_mask);
}

Forward forward_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const OptionalTensor& bias, const OptionalTensor& attention_mask,
                     const OptionalTensor& segment_ids, const OptionalTensor& dropout_seed, c10::SymInt left,
                     c10::SymInt right, std::optional<int64_t> chunk_size, std::optional<double> scale,
                     std::string_view activation, double dropout_p) {
  local_attention_shapes::check_forward({q, k, v, bias, attention_mask, segment_ids, dropout_seed},
                                        {left, right, chunk_size, scale, activation, dropout_p});
  const auto B = q.sym_size(0), Lq = q.sym_size(1), H = q.sym_size(2);
  return {at::empty_symint({B, Lq, H, v.sym_size(3)}, q.options()),
          at::empty_symint({B, H, Lq}, local_attention_shapes::statistics_options(q))};
}

Grads backward_meta(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const OptionalTensor& bias, const OptionalTensor& attention_mask,
                    const OptionalTensor& segment_ids, const OptionalTensor& dropout_seed,
                    const at::Tensor& out, const at::Tensor& lse, c10::SymInt left, c10::SymInt right,
                    std::optional<int64_t> chunk_size, std::optional<double> scale,
                    std::string_view activation, double dropout_p, std::array<bool, 4> output_mask) {
  local_attention_shapes::check_backward(grad_out, {q, k, v, bias, attention_mask, segment_ids, dropout_seed},
                                         out, lse, {left, right, chunk_size, scale, activation, dropout_p},
                                         output_mask);
  return {empty_gradient(output_mask[0], q), empty_gradient(output_mask[1], k),
          empty_gradient(output_mask[2], v), empty_gradient(output_mask[3], bias)};
}

at::Tensor step_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const OptionalTensor& bias, const at::Tensor& k_cache, const at::Tensor& v_cache,
                     const at::Tensor& position, std::optional<double> scale) {
  local_attention_shapes::check_step({q, k, v, bias, k_cache, v_cache, position}, scale);
  return at::empty_symint({q.sym_size(0), q.sym_size(1), v.sym_size(2)}, q.options());
}

struct LocalAttentionFunction : torch::autograd::Function<LocalAttentionFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& v, const OptionalTensor& bias,
                            const OptionalTensor& attention_mask, const OptionalTensor& segment_ids,
                            const OptionalTensor& dropout_seed, const Options& options) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, lse] =
        local_attention_op::forward({q, k, v, bias, attention_mask, segment_ids, dropout_seed}, options);
    auto saved = [](const OptionalTensor& t) { return t.value_or(at::Tensor()); };
    ctx->save_for_backward(
        {q, k, v, saved(bias), saved(attention_mask), saved(segment_ids), saved(dropout_seed), out, lse});
    ctx->saved_data["left"] = options.left;
    ctx->saved_data["right"] = options.right;
    ctx->saved_data["chunk_size"] = options.chunk_size;
    ctx->saved_data["scale"] = options.scale;
    ctx->saved_data["activation"] = std::string(options.activation);
    ctx->saved_data["dropout_p"] = options.dropout_p;
    return out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    const auto bias = as_optional(saved[3]), attention_mask = as_optional(saved[4]),
               segment_ids = as_optional(saved[5]), dropout_seed = as_optional(saved[6]);
    const Options options{data["left"].toSymInt(),
                          data["right"].toSymInt(),
                          data["chunk_size"].toOptional<int64_t>(),
                          data["scale"].toOptional<double>(),
                          data["activation"].toStringView(),
                          data["dropout_p"].toDouble()};
    auto [grad_q, grad_k, grad_v, grad_bias] = local_attention_op::backward(
        grads[0], {saved[0], saved[1], saved[2], bias, attention_mask, segment_ids, dropout_seed}, saved[7],
        saved[8], options, gradient_mask<4>(ctx, {true, true, true, bias.has_value()}));
    return {grad_q, grad_k, grad_v, grad_bias, {}, {}, {}, {}};
  }
};

// What the inner ops take for the public ones' bias, window, chunk_size, causal, scale, activation and
// dropout_p.
std::pair<OptionalTensor, Options> with_band(const Tensors& t, at::OptionalIntArrayRef window,
                                             std::optional<int64_t> chunk_size, bool causal,
                                             std::optional<double> scale, std::string_view activation,
                                             double dropout_p) {
  using namespace local_attention_shapes;
  check_tensors(t);
  check_window(window, chunk_size, causal);
  check_chunk_size(chunk_size);
  check_elementwise(window, scale, activation);
  check_dropout(dropout_p, t.dropout_seed);
  c10::SymInt left = t.k.sym_size(1) - 1, right = t.q.sym_size(1) - 1;
  const char* letters = "(H, Lq + Lk - 1)";
  if (window) {
    left = (*window)[0], right = (*window)[1], letters = "(H, left + right + 1)";
  } else if (chunk_size) {
    left = right = *chunk_size - 1, letters = "(H, 2 chunk_size - 1)";
  }
  check_bias(t.bias, t.q, left + right + 1, letters);
  auto bias = t.bias;
  if (causal && !window) {
    right = right.min(0);
    if (is_given(bias)) bias = bias->slice_symint(1, 0, left + right + 1);
  }
  if (!scale && check_activation(activation) == Activation::softmax) {
    const int64_t D = t.q.sym_size(3).guard_int(__FILE__, __LINE__);
    TORCH_CHECK_VALUE(D > 0, kOp, ": scale is None with q of shape ", shape_text(t.q),
                      ", expected a number where D is 0");
    scale = 1.0 / std::sqrt(double(D));
  }
  return {bias, {left, right, chunk_size, scale, activation, dropout_p}};
}

at::Tensor autograd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& bias,
                    at::OptionalIntArrayRef window, std::optional<int64_t> chunk_size, bool causal,
                    const OptionalTensor& attention_mask, const OptionalTensor& segment_ids,
                    std::optional<double> scale, std::string_view activation, double dropout_p,
                    const OptionalTensor& dropout_seed) {
  const auto [band, options] = with_band({q, k, v, bias, attention_mask, segment_ids, dropout_seed}, window,
                                         chunk_size, causal, scale, activation, dropout_p);
  return LocalAttentionFunction::apply(q, k, v, band, attention_mask, segment_ids, dropout_seed, options);
}

// Inference mode has no Autograd key.
at::Tensor composite(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const OptionalTensor& bias, at::OptionalIntArrayRef window,
                     std::optional<int64_t> chunk_size, bool causal, const OptionalTensor& attention_mask,
                     const OptionalTensor& segment_ids, std::optional<double> scale,
                     std::string_view activation, double dropout_p, const OptionalTensor& dropout_seed) {
  const auto [band, options] = with_band({q, k, v, bias, attention_mask, segment_ids, dropout_seed}, window,
                                         chunk_size, causal, scale, activation, dropout_p);
  return std::get<0>(forward({q, k, v, band, attention_mask, segment_ids, dropout_seed}, options));
}

at::Tensor step_autograd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const OptionalTensor& bias, const at::Tensor& k_cache, const at::Tensor& v_cache,
                         const at::Tensor& position, std::optional<double> scale) {
  refuse_gradients(
      "local_attention_step",
      {{"q", q}, {"k", k}, {"v", v}, {"bias", bias}, {"k_cache", k_cache}, {"v_cache", v_cache}});
  at::AutoDispatchBelowAutograd guard;
  return local_attention_step(q, k, v, bias, k_cache, v_cache, position, scale);
}

at::Tensor step_inplace(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const OptionalTensor& bias, const at::Tensor& k_cache, const at::Tensor& v_cache,
                        const at::Tensor& position, std::optional<double> scale) {
  const auto out = step_in_place(
      k_cache, [&] { return local_attention_step(q, k, v, bias, k_cache, v_cache, position, scale); });
  torch::autograd::impl::bump_version(v_cache);
  return out;
}

template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor autocast(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& bias,
                    at::OptionalIntArrayRef window, std::optional<int64_t> chunk_size, bool causal,
                    const OptionalTensor& attention_mask, const OptionalTensor& segment_ids,
                    std::optional<double> scale, std::string_view activation, double dropout_p,
                    const OptionalTensor& dropout_seed) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  const auto type = at::autocast::get_lower_precision_fp_from_device_type(device);
  auto cast = [type](const auto& t) { return at::autocast::cached_cast(type, t, device); };
  return local_attention(cast(q), cast(k), cast(v), cast(bias), window, chunk_size, causal, attention_mask,
                         segment_ids, scale, activation, dropout_p, dropout_seed);
}

// The caches are written, so they cannot be cast copies.
template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor step_autocast(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const OptionalTensor& bias, const at::Tensor& k_cache, const at::Tensor& v_cache,
                         const at::Tensor& position, std::optional<double> scale) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  const auto type = at::autocast::get_lower_precision_fp_from_device_type(device);
  auto cast = [type](const auto& t) { return at::autocast::cached_cast(type, t, device); };
  return local_attention_step(cast(q), cast(k), cast(v), cast(bias), k_cache, v_cache, position, scale);
}

TORCH_LIBRARY_FRAGMENT(spade_ext, m) {
  m.def(
      "local_attention(Tensor q, Tensor k, Tensor v, Tensor? bias=None, *, int[2]? window=None, "
      "int? chunk_size=None, bool causal=False, Tensor? attention_mask=None, Tensor? segment_ids=None, "
      "float? scale=None, str activation='softmax', float dropout_p=0.0, Tensor? dropout_seed=None) -> "
      "Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "local_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? attention_mask, "
      "Tensor? segment_ids, Tensor? dropout_seed, SymInt left, SymInt right, int? chunk_size, float? scale, "
      "str activation, float dropout_p) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "local_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? bias, "
      "Tensor? attention_mask, Tensor? segment_ids, Tensor? dropout_seed, Tensor out, Tensor lse, "
      "SymInt left, SymInt right, int? chunk_size, float? scale, str activation, float dropout_p, "
      "bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "local_attention_step(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor(a!) k_cache, "
      "Tensor(b!) v_cache, Tensor position, *, float? scale=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(spade_ext, Meta, m) {
  m.impl("local_attention_forward", forward_meta);
  m.impl("local_attention_backward", backward_meta);
  m.impl("local_attention_step", step_meta);
}

TORCH_LIBRARY_IMPL(spade_ext, CompositeExplicitAutograd, m) { m.impl("local_attention", composite); }

TORCH_LIBRARY_IMPL(spade_ext, Autograd, m) {
  m.impl("local_attention", autograd);
  m.impl("local_attention_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("local_attention_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("local_attention_step", step_autograd);
}

TORCH_LIBRARY_IMPL(spade_ext, ADInplaceOrView, m) { m.impl("local_attention_step", step_inplace); }

TORCH_LIBRARY_IMPL(spade_ext, AutocastCPU, m) {
  m.impl("local_attention", autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
  m.impl("local_attention_step", step_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(spade_ext, AutocastCUDA, m) {
  m.impl("local_attention", autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
  m.impl("local_attention_step", step_autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace local_attention_op
}  // namespace spade_ext
