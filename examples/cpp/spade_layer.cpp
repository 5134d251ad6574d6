// A SPADE layer on LibTorch and spade_ext alone: loads weights that Python saved, checks that it computes
// what Python does, and trains it.
//
//   python save_layer.py layer.pt && ./spade_layer layer.pt
#include <spade_ext/spade_ext.h>
#include <torch/torch.h>

#include <fstream>
#include <iostream>
#include <iterator>

// Module and parameter names are those of the Python module, so that its state dict fits.
struct S4 : torch::nn::Module {
  torch::Tensor log_w_real, w_imag, P, B, C, log_dt, D, l_max;

  S4(int64_t width, int64_t halves) {
    log_w_real = register_parameter("log_w_real", torch::zeros({width, halves}));
    w_imag = register_parameter("w_imag", torch::zeros({width, halves}));
    P = register_parameter("P", torch::zeros({1, width, halves, 2}));
    B = register_parameter("B", torch::zeros({width, halves, 2}));
    C = register_parameter("C", torch::zeros({1, width, halves, 2}));
    log_dt = register_parameter("log_dt", torch::zeros(width));
    D = register_parameter("D", torch::zeros({1, width}));
    l_max = register_buffer("l_max", torch::zeros({}, torch::kLong));
  }

  // x (B, L, width)
  torch::Tensor forward(const torch::Tensor& x) {
    const auto w = torch::stack({-log_w_real.exp(), w_imag}, -1);
    const auto k = spade_ext::s4_kernel(w, P, B.unsqueeze(0), C, log_dt, x.size(1), l_max.item<int64_t>());
    return spade_ext::long_conv(x.mT(), k.squeeze(0), D).squeeze(1).mT();
  }
};

struct LocalAttention : torch::nn::Module {
  int64_t heads, left;
  torch::nn::Linear qkv, o;
  torch::Tensor position;

  LocalAttention(int64_t width, int64_t heads_, int64_t left_)
      : heads(heads_), left(left_), qkv(options(width, 3 * width)), o(options(width, width)) {
    register_module("qkv", qkv), register_module("o", o);
    auto bias = register_module("position", std::make_shared<torch::nn::Module>());
    position = bias->register_parameter("weight", torch::zeros({heads, 2 * left + 1}));
  }

  static torch::nn::LinearOptions options(int64_t width, int64_t outputs) {
    return torch::nn::LinearOptions(width, outputs).bias(false);
  }

  torch::Tensor forward(const torch::Tensor& x) {
    const auto projected = qkv(x).unflatten(-1, {3, heads, -1}).unbind(2);
    const std::vector<int64_t> window{left, 0};
    const auto bias = position.slice(1, 0, left + 1);
    return o(spade_ext::local_attention(projected[0], projected[1], projected[2], bias, window).flatten(2));
  }
};

struct Mixer : torch::nn::Module {
  std::shared_ptr<S4> ssm;
  std::shared_ptr<LocalAttention> attention;
  torch::nn::LayerNorm ssm_norm, attention_norm;
  torch::nn::Linear aggregate;

  Mixer(int64_t width, int64_t heads, int64_t left, int64_t halves)
      : ssm(register_module("ssm", std::make_shared<S4>(width, halves))),
        attention(register_module("attention", std::make_shared<LocalAttention>(width, heads, left))),
        ssm_norm(register_module("ssm_norm", torch::nn::LayerNorm(norm(width)))),
        attention_norm(register_module("attention_norm", torch::nn::LayerNorm(norm(width)))),
        aggregate(register_module("aggregate", torch::nn::Linear(2 * width, width))) {}

  static torch::nn::LayerNormOptions norm(int64_t width) { return torch::nn::LayerNormOptions({width}); }

  torch::Tensor forward(const torch::Tensor& x) {
    return aggregate(torch::cat({ssm_norm(ssm->forward(x)), attention_norm(attention->forward(x))}, -1));
  }
};

struct FeedForward : torch::nn::Module {
  torch::nn::Linear fc1, fc2;

  FeedForward(int64_t width, int64_t inner)
      : fc1(register_module("fc1", torch::nn::Linear(width, inner))),
        fc2(register_module("fc2", torch::nn::Linear(inner, width))) {}

  torch::Tensor forward(const torch::Tensor& x) { return fc2(torch::relu(fc1(x))); }
};

struct SpadeLayer : torch::nn::Module {
  std::shared_ptr<Mixer> mixer;
  torch::nn::LayerNorm mixer_norm, feed_forward_norm;
  std::shared_ptr<FeedForward> feed_forward;

  SpadeLayer()
      : mixer(register_module("mixer", std::make_shared<Mixer>(16, 2, 8, 8))),
        mixer_norm(register_module("mixer_norm", torch::nn::LayerNorm(Mixer::norm(16)))),
        feed_forward_norm(register_module("feed_forward_norm", torch::nn::LayerNorm(Mixer::norm(16)))),
        feed_forward(register_module("feed_forward", std::make_shared<FeedForward>(16, 32))) {}

  torch::Tensor forward(const torch::Tensor& x) {
    const auto mixed = x + mixer->forward(mixer_norm(x));
    return mixed + feed_forward->forward(feed_forward_norm(mixed));
  }
};

c10::Dict<c10::IValue, c10::IValue> read_dict(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot read ", path);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  return torch::pickle_load(bytes).toGenericDict();
}

int main(int argc, char** argv) {
  TORCH_CHECK(argc == 2, "usage: spade_layer FILE, which save_layer.py wrote");
  const auto saved = read_dict(argv[1]);
  SpadeLayer layer;
  {
    torch::NoGradGuard no_grad;
    for (auto& parameter : layer.named_parameters()) parameter->copy_(saved.at(parameter.key()).toTensor());
    for (auto& buffer : layer.named_buffers()) buffer->copy_(saved.at(buffer.key()).toTensor());
  }
  const auto x = saved.at("x").toTensor(), expected = saved.at("y").toTensor();
  const double difference = (layer.forward(x) - expected).abs().max().item<double>();
  std::cout << "difference from Python: " << difference << std::endl;
  TORCH_CHECK(difference < 1e-5, "the layer does not compute what Python's does");

  // Each token is to repeat the one 30 before it, beyond the window of 8: only the state space model reaches
  // it.
  torch::manual_seed(0);
  torch::optim::Adam optimizer(layer.parameters(), torch::optim::AdamOptions(3e-3));
  double first = 0, last = 0;
  for (int step = 0; step < 150; ++step) {
    const auto input = torch::randn({8, 100, 16});
    const auto output = layer.forward(input).slice(1, 30), target = input.slice(1, 0, 70);
    const auto loss = torch::mse_loss(output, target);
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    (step == 0 ? first : last) = loss.item<double>();
  }
  std::cout << "loss: " << first << " before, " << last << " after 150 steps" << std::endl;
  TORCH_CHECK(last < 0.7 * first, "the loss did not fall");
}
