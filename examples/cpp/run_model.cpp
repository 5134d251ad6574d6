// Runs a SPADE language model that Python compiled, on LibTorch and spade_ext alone.
//
//   python export_model.py model.pt2 expected.pt && ./run_model model.pt2 expected.pt
#include <spade_ext/spade_ext.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <fstream>
#include <iostream>
#include <iterator>

int main(int argc, char** argv) {
  TORCH_CHECK(argc == 3, "usage: run_model MODEL EXPECTED, which export_model.py wrote");
  std::cout << "ops of spade_ext " << spade_ext::build_info().at("version") << std::endl;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);

  std::ifstream file(argv[2], std::ios::binary);
  TORCH_CHECK(file, "cannot read ", argv[2]);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const auto examples = torch::pickle_load(bytes);
  for (const auto& example : examples.toListRef()) {
    const auto& tensors = example.toTupleRef().elements();
    const auto ids = tensors[0].toTensor(), mask = tensors[1].toTensor(), expected = tensors[2].toTensor();
    const auto logits = model.run({ids, mask})[0];
    const auto at_real_tokens = (logits - expected) * mask.unsqueeze(-1);
    const double difference = at_real_tokens.abs().max().item<double>();
    std::cout << ids.sizes() << ": difference from Python " << difference << std::endl;
    TORCH_CHECK(logits.sizes() == expected.sizes() && difference < 1e-5, "the model computes something else");
  }
}
