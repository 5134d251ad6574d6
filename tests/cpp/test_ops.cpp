// The ops as a C++ program sees them: no Python in this process.
#include <spade_ext/spade_ext.h>
#include <torch/torch.h>

#if __has_include(<catch2/catch_test_macros.hpp>)
#include <catch2/catch_test_macros.hpp>
#else
#include <catch2/catch.hpp>
#endif

namespace {

torch::Tensor tensor(at::ArrayRef<double> values, at::IntArrayRef shape) {
  return torch::tensor(values, torch::kDouble).view(shape);
}

// A leaf of independent normal numbers.
torch::Tensor parameter(at::IntArrayRef shape) {
  return torch::randn(shape, torch::TensorOptions().dtype(torch::kDouble).requires_grad(true));
}

bool is_close(const torch::Tensor& actual, const torch::Tensor& expected) {
  return actual.sizes() == expected.sizes() && torch::allclose(actual, expected, 1e-12, 1e-12);
}

// The derivative of sum(y cotangent) by x against a central difference along `direction`.
template <class Function>
bool gradient_is_right(const Function& function, torch::Tensor x) {
  const auto y = function(x);
  const auto cotangent = torch::randn_like(y), direction = torch::randn_like(x);
  const auto gradient = torch::autograd::grad({y}, {x}, {cotangent})[0];
  torch::NoGradGuard no_grad;
  const double step = 1e-6;
  const auto difference = (function(x + step * direction) - function(x - step * direction)) / (2 * step);
  return torch::allclose((gradient * direction).sum(), (difference * cotangent).sum(), 1e-6, 1e-8);
}

}  // namespace

TEST_CASE("build_info names version, torch and kernels") {
  const auto info = spade_ext::build_info();
  CHECK_FALSE(info.at("version").empty());
  CHECK(info.at("torch") == TORCH_VERSION);
  CHECK_FALSE(info.at("kernels").empty());
  CHECK(info.at("parallel") == "OpenMP");
}

TEST_CASE("long_conv") {
  const auto u = tensor({1, 2, 3}, {1, 1, 3}), k = tensor({1, 10}, {1, 1, 2}), skip = tensor({100}, {1, 1});

  SECTION("values") {
    CHECK(is_close(spade_ext::long_conv(u, k), tensor({1, 12, 23}, {1, 1, 1, 3})));
    CHECK(is_close(spade_ext::long_conv(u, k, skip, k), tensor({101 + 2 + 30, 212 + 3, 323}, {1, 1, 1, 3})));
    const auto documents = torch::tensor({{0, 1, 1}});
    CHECK(is_close(spade_ext::long_conv(u, k, {}, {}, documents), tensor({1, 2, 23}, {1, 1, 1, 3})));
  }
  SECTION("gradient") {
    const auto signal = torch::randn({2, 3, 9}, torch::kDouble);
    CHECK(gradient_is_right([&](const auto& x) { return spade_ext::long_conv(signal, x); },
                            parameter({4, 3, 9})));
  }
  SECTION("error") { CHECK_THROWS_AS(spade_ext::long_conv(u, tensor({1, 10}, {2, 1})), c10::ValueError); }
}

TEST_CASE("diagonal_kernel") {
  const auto half = tensor({std::log(0.5)}, {1, 1});  // abar = 1/2

  SECTION("values") {
    CHECK(is_close(spade_ext::diagonal_kernel(half, tensor({8}, {1, 1, 1}), {}, 4, std::nullopt),
                   tensor({8, 4, 2, 1}, {1, 1, 4})));
    const auto w = tensor({-2, 0}, {1, 1, 2}), c = tensor({3, 5}, {1, 1, 1, 2}), log_dt = tensor({0}, {1});
    CHECK(is_close(spade_ext::diagonal_kernel(w, c, log_dt, 3, "bilinear"), tensor({3, 0, 0}, {1, 1, 3})));
  }
  SECTION("gradient") {
    const auto c = torch::randn({2, 3, 4}, torch::kDouble), log_dt = torch::randn({3}, torch::kDouble);
    CHECK(gradient_is_right([&](const auto& w) { return spade_ext::diagonal_kernel(-w * w, c, log_dt, 9); },
                            parameter({1, 4})));
  }
  SECTION("error") {
    CHECK_THROWS_AS(spade_ext::diagonal_kernel(half, tensor({8}, {1, 1, 1}), {}, 4, "zoh"), c10::ValueError);
  }
}

TEST_CASE("diagonal_scan and diagonal_step") {
  const auto half = tensor({std::log(0.5)}, {1, 1}), b = tensor({3}, {1, 1}), c = tensor({2}, {1, 1, 1});
  const auto u = tensor({1, 0, 2}, {1, 1, 3}), state = tensor({4}, {1, 1, 1});  // states 5, 2.5, 7.25

  SECTION("values") {
    const auto [y, final_state] = spade_ext::diagonal_scan(u, half, b, c, {}, state, {}, std::nullopt);
    CHECK(is_close(y, tensor({10, 5, 14.5}, {1, 1, 1, 3})));
    CHECK(is_close(final_state, tensor({7.25}, {1, 1, 1})));
    CHECK(is_close(state, tensor({4}, {1, 1, 1})));
    const auto documents = torch::tensor({{0, 0, 1}});
    const auto packed =
        spade_ext::diagonal_scan(u, half, b, c, {}, state, {}, std::nullopt, false, documents);
    CHECK(is_close(std::get<0>(packed), tensor({10, 5, 12}, {1, 1, 1, 3})));
  }
  SECTION("a step overwrites the state") {
    const auto y = spade_ext::diagonal_step(u.select(2, 0), half, b, c, {}, state, std::nullopt);
    CHECK(is_close(y, tensor({10}, {1, 1, 1})));
    CHECK(is_close(state, tensor({5}, {1, 1, 1})));
  }
  SECTION("gradient") {
    const auto signal = torch::randn({2, 3, 9}, torch::kDouble), log_dt = torch::randn({3}, torch::kDouble);
    const auto w = -torch::rand({1, 4}, torch::kDouble), weights = torch::randn({2, 3, 4}, torch::kDouble);
    CHECK(gradient_is_right(
        [&](const auto& x) {
          const auto [y, final_state] = spade_ext::diagonal_scan(signal, w, w, weights, log_dt, x);
          return torch::cat({y.flatten(), final_state.flatten()});
        },
        parameter({2, 3, 4})));
  }
  SECTION("error") {
    CHECK_THROWS_AS(spade_ext::diagonal_scan(u, half, b, c, {}, state, {}, "dss"), c10::ValueError);
    CHECK_THROWS_AS(spade_ext::diagonal_step(u, half, b, c, {}, state, std::nullopt), c10::ValueError);
  }
}

TEST_CASE("s4") {
  // A = -2 - |p|^2 of every state and its conjugate. With p = 0 and dt = 1, Abar = 0, Bbar = b / 2.
  const auto w = tensor({-2, 0}, {1, 1, 2}), b = tensor({1, 0}, {1, 1, 2}), log_dt = tensor({0}, {1});
  const auto p = tensor({0, 0}, {1, 1, 1, 2}), c = tensor({3, 5}, {1, 1, 1, 2});

  SECTION("values of s4_kernel") {
    CHECK(is_close(spade_ext::s4_kernel(w, p, b.unsqueeze(0), c, log_dt, 3, 3),
                   tensor({3, 0, 0}, {1, 1, 1, 3})));
  }
  SECTION("values of s4_state and s4_step") {
    // p = 1 over the pair: p^* x = 2 Re x, so A = -4 and 1 - dt/2 A = 3 for the real part, Abar = -1/3.
    const auto one = tensor({1, 0}, {1, 1, 1, 2}), u = tensor({1, 0, 9}, {1, 1, 3});
    auto state = spade_ext::s4_state(u, w, one, b, log_dt);
    CHECK(is_close(state, tensor({1.0 / 27 + 3, 0}, {1, 1, 1, 2})));
    const auto y = spade_ext::s4_step(tensor({3}, {1, 1}), w, one, b, c, log_dt, state);
    CHECK(is_close(state, tensor({-1.0 / 81, 0}, {1, 1, 1, 2})));
    CHECK(is_close(y, tensor({-6.0 / 81}, {1, 1, 1})));
  }
  SECTION("gradient") {
    const auto weights = torch::randn({2, 4, 5, 2}, torch::kDouble),
               log_dts = torch::randn({4}, torch::kDouble) - 3;
    const auto decay = -torch::rand({2, 5, 2}, torch::kDouble) - 0.5;
    const auto input = torch::randn({3, 2, 5, 2}, torch::kDouble);
    CHECK(gradient_is_right(
        [&](const auto& x) { return spade_ext::s4_kernel(decay, x, input, weights, log_dts, 20, 8); },
        parameter({2, 2, 5, 2})));
  }
  SECTION("errors") {
    CHECK_THROWS_AS(spade_ext::s4_kernel(w, p, b, c, log_dt, 3, 3), c10::ValueError);
    CHECK_THROWS_AS(spade_ext::s4_state(tensor({1}, {1, 1}), w, p, b, log_dt), c10::ValueError);
    CHECK_THROWS_AS(
        spade_ext::s4_step(parameter({1, 1}), w, p, b, c, log_dt, torch::zeros({1, 1, 1, 2}, torch::kDouble)),
        c10::NotImplementedError);
  }
}

TEST_CASE("linear_step") {
  const auto x = tensor({1, 2}, {1, 2}), weight = tensor({3, 4, 5, 6, 7, 8}, {3, 2});
  CHECK(is_close(spade_ext::linear_step(x, weight, tensor({1, 0, -1}, {3})), tensor({12, 17, 22}, {1, 3})));
  CHECK_THROWS_AS(spade_ext::linear_step(x, weight.t()), c10::ValueError);
  CHECK_THROWS_AS(spade_ext::linear_step(parameter({1, 2}), weight), c10::NotImplementedError);
}

TEST_CASE("local_attention") {
  const auto zeros = torch::zeros({1, 3, 1, 2}, torch::kDouble);
  const auto v = tensor({1, 2, 6}, {1, 3, 1, 1});

  SECTION("values: equal scores give means") {
    CHECK(is_close(spade_ext::local_attention(zeros, zeros, v), tensor({3, 3, 3}, {1, 3, 1, 1})));
    CHECK(is_close(spade_ext::local_attention(zeros, zeros, v, {}, at::IntArrayRef{1, 0}),
                   tensor({1, 1.5, 4}, {1, 3, 1, 1})));
    const auto mask = torch::tensor({false, true, true}).view({1, 3});
    CHECK(is_close(spade_ext::local_attention(zeros, zeros, v, {}, at::IntArrayRef{1, 0}, {}, false, mask),
                   tensor({0, 2, 4}, {1, 3, 1, 1})));
  }
  SECTION("values: chunks, segments, activations and dropout") {
    CHECK(is_close(spade_ext::local_attention(zeros, zeros, v, {}, {}, 2),
                   tensor({1.5, 1.5, 6}, {1, 3, 1, 1})));
    const auto segments = torch::tensor({7, 4, 4}).view({1, 3});
    CHECK(is_close(spade_ext::local_attention(zeros, zeros, v, {}, {}, {}, false, {}, segments),
                   tensor({1, 4, 4}, {1, 3, 1, 1})));
    // q.k = 2 for every pair: relu2 gives (2 / n)^2, n the keys so far.
    const auto ones = torch::ones_like(zeros);
    CHECK(is_close(spade_ext::local_attention(ones, ones, v, {}, {}, {}, true, {}, {}, {}, "relu2"),
                   tensor({4 * 1, 1 * 3, 4. / 9 * 9}, {1, 3, 1, 1})));
    const auto dropped = spade_ext::local_attention(zeros, zeros, ones, {}, {}, {}, false, {}, {}, {},
                                                    "softmax", 0.5, torch::tensor(int64_t(3)));
    CHECK(is_close(dropped * 1.5, (dropped * 1.5).round()));  // 2/3 a key that is kept
  }
  SECTION("values: a step overwrites the slot of the oldest token") {
    const auto q = torch::zeros({1, 1, 2}, torch::kDouble),
               k_cache = torch::ones({1, 3, 1, 2}, torch::kDouble);
    const auto v_cache = v.clone(), position = torch::tensor({int64_t(4)});
    const auto out =
        spade_ext::local_attention_step(q, q, tensor({8}, {1, 1, 1}), {}, k_cache, v_cache, position);
    CHECK(is_close(out, tensor({5}, {1, 1, 1})));
    CHECK(is_close(v_cache, tensor({1, 8, 6}, {1, 3, 1, 1})));
    CHECK(is_close(k_cache, tensor({1, 1, 0, 0, 1, 1}, {1, 3, 1, 2})));
  }
  SECTION("gradient") {
    const auto q = torch::randn({2, 9, 4, 3}, torch::kDouble), k = torch::randn({2, 9, 2, 3}, torch::kDouble);
    const std::vector<int64_t> window{3, 2};
    CHECK(
        gradient_is_right([&](const auto& bias) { return spade_ext::local_attention(q, k, k, bias, window); },
                          parameter({4, 6})));
  }
  SECTION("error") {
    CHECK_THROWS_AS(spade_ext::local_attention(zeros, zeros, v, {}, at::IntArrayRef{-1, 0}), c10::ValueError);
  }
}

// A state space layer below an attention layer, in float32.
struct Model : torch::nn::Module {
  static constexpr int64_t kChannels = 8, kHeads = 2, kLeft = 3;
  torch::nn::Linear project{nullptr};
  torch::Tensor w, c, log_dt, skip, bias;

  Model() {
    w = register_parameter("w",
                           torch::stack({-torch::ones({1, 4}), -M_PI * torch::arange(4.0).view({1, 4})}, -1));
    c = register_parameter("c", torch::randn({1, kChannels, 4, 2}));
    log_dt = register_parameter("log_dt", torch::linspace(-5, -2, kChannels));
    skip = register_parameter("skip", torch::randn({1, kChannels}));
    bias = register_parameter("bias", torch::zeros({kHeads, kLeft + 1}));
    project = register_module("project", torch::nn::Linear(kChannels, 3 * kChannels));
  }

  // x (B, L, kChannels)
  torch::Tensor forward(const torch::Tensor& x) {
    const auto kernel = spade_ext::diagonal_kernel(w, c, log_dt, x.size(1));
    const auto y = spade_ext::long_conv(x.transpose(1, 2), kernel, skip).squeeze(1).transpose(1, 2);
    const auto qkv = project(torch::gelu(y)).unflatten(-1, {3, kHeads, kChannels / kHeads}).unbind(2);
    return spade_ext::local_attention(qkv[0], qkv[1], qkv[2], bias, at::IntArrayRef{kLeft, 0}).flatten(2);
  }
};

TEST_CASE("a model of the three ops learns to repeat the last token") {
  torch::manual_seed(0);
  Model model;
  torch::optim::Adam optimizer(model.parameters(), 1e-2);
  const auto x = torch::randn({4, 32, Model::kChannels}), target = x.roll(1, 1);

  std::vector<double> losses;
  for (int step = 0; step < 60; ++step) {
    optimizer.zero_grad();
    const auto loss = torch::mse_loss(model.forward(x).slice(1, 1), target.slice(1, 1));
    loss.backward();
    optimizer.step();
    losses.push_back(loss.item<double>());
  }
  for (const auto& parameter : model.named_parameters()) {
    INFO(parameter.key());
    CHECK(parameter->grad().abs().sum().item<double>() > 0);
  }
  CHECK(losses.back() < 0.7 * losses.front());
}
