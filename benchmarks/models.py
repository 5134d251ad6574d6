"""Models of random weights: Hugging Face's with attn_implementation="spade_local" against the same with "sdpa"; layers
of SPADE against the matrix products of their Linears alone, whose operations are what "of sgemm" counts there; and an
encoder against Hugging Face's LongT5. Last the memory of a process that trains a layer."""

import sys
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from longt5 import LongT5Encoder
from timing import Benchmark, print_peak_memory, train, training_step
from torch import Tensor, nn
from transformers import AutoModel, Gemma3TextConfig, MistralConfig, ModernBertConfig, PretrainedConfig

from spade_ext.models import SpadeConfig
from spade_ext.models.modeling_spade import SpadeLayer


class Layers(nn.Module):
    """A model from embeddings to hidden states, its embedding not learned."""

    def __init__(self, config: PretrainedConfig, attention: str | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.model = AutoModel.from_config(deepcopy(config), attn_implementation=attention)  # which it writes there
        self.model.get_input_embeddings().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(inputs_embeds=x).last_hidden_state


class Products:
    """The matrix products of a model's Linears on so many tokens, forward and backward."""

    def __init__(self, model: nn.Module, tokens: int):
        self.weights = [module.weight.detach() for module in model.modules() if isinstance(module, nn.Linear)]
        widths = {width for weight in self.weights for width in weight.shape}
        self.rows = {width: torch.randn(tokens, width) for width in widths}
        self.flops = 6 * tokens * sum(weight.numel() for weight in self.weights)

    def __call__(self) -> None:
        for weight in self.weights:
            x, grad = self.rows[weight.size(1)], self.rows[weight.size(0)]
            x @ weight.T, grad @ weight, grad.T @ x


def wikitext103(ssm_layers: tuple[int, ...], **options: Any) -> SpadeConfig:
    """One layer of the language model, with the S4 of its bottom layer or without."""
    return SpadeConfig.preset("wikitext103", num_hidden_layers=1, ssm_layers=ssm_layers, **options)


def layers_of(config: SpadeConfig) -> nn.Sequential:
    return nn.Sequential(*(SpadeLayer(config, layer) for layer in range(config.num_hidden_layers)))


def compare_attentions(benchmark: Benchmark) -> None:
    L, D, W, H = (64, 32, 8, 2) if benchmark.quick else (4096, 512, 512, 8)
    sizes = {"vocab_size": 10, "hidden_size": D, "intermediate_size": 4 * D, "num_attention_heads": H}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": L}
    decoder = {"num_key_value_heads": H // 2, "head_dim": D // H, "sliding_window": W, "use_cache": False}
    encoder = {"local_attention": W // 4, "global_attn_every_n_layers": 3, "cls_token_id": 1, "sep_token_id": 2}
    for name, config in {
        f"Mistral, 1 layer of window {W}": MistralConfig(**sizes, **decoder, num_hidden_layers=1),
        f"Gemma 3, 2 layers of window {W}, 1 full": Gemma3TextConfig(
            **sizes, **decoder, num_hidden_layers=3, sliding_window_pattern=3
        ),
        f"ModernBERT, 2 layers of window {W // 4}, 1 full": ModernBertConfig(**sizes, **encoder, num_hidden_layers=3),
    }.items():
        ours, peer = (Layers(config, attention) for attention in ("spade_local", "sdpa"))
        benchmark.compare_modules(f"{name}, B 1 L {L} D {D}", ours, "sdpa", peer, torch.randn(1, L, D), 1e-4)


def compare_with_products(benchmark: Benchmark) -> None:
    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64} if benchmark.quick else {}
    small |= {"ssm_n_ssm": 32, "ssm_l_max": 64} if benchmark.quick else {}
    lra = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512, "num_hidden_layers": 4}
    lra |= {"window": (127, 127)} | small
    dropout = {"dropout": 0, "attention_dropout": 0, "activation_dropout": 0}
    for case, make, B, L in (
        ("layer of wikitext103", partial(wikitext103, (), **small), 1, 3072),
        ("layer 0 of wikitext103", partial(wikitext103, (0,), **small), 1, 3072),
        ("4 layers of the size of LRA", partial(SpadeConfig, **lra), 8, 1024),
    ):
        L = 64 if benchmark.quick else L
        for name, options in {"": {}, ", no dropout": dropout}.items():
            layers = layers_of(make(**options))
            x, grad = torch.randn(2, B, L, layers[0].mixer_norm.normalized_shape[0])
            products = Products(layers, B * L)
            seconds = benchmark.medians(ours=partial(training_step, layers, x.requires_grad_(), grad), peer=products)
            benchmark.row(f"{case}{name}, B {B} L {L}", "forward + backward", seconds, "products", products.flops)


def compare_encoders(benchmark: Benchmark) -> None:
    B, L, D, W, H = (1, 64, 32, 7, 2) if benchmark.quick else (2, 4096, 512, 127, 8)
    sizes = {"hidden_size": D, "intermediate_size": 2 * D, "num_attention_heads": H, "num_hidden_layers": 2}
    sizes |= {"vocab_size": 10, "window": (W, W), "position_shared": True, "ssm_l_max": L}
    sizes |= {"hidden_act": "relu", "norm": "rmsnorm", "layer_norm_eps": 1e-6}
    for name, dropout, ssm_layers, tolerance in (
        ("encoder", 0, (), 1e-2),  # ReLUs of inputs near 0 open or close by rounding
        ("encoder with S4", 0, (0,), None),
        ("encoder with S4, dropout 0.1", 0.1, (0,), None),
    ):
        ours = Layers(SpadeConfig(**sizes, dropout=dropout, attention_dropout=dropout, ssm_layers=ssm_layers))
        case, peer = f"{name}, 2 layers, B {B} L {L} D {D}", LongT5Encoder(ours.model)
        benchmark.compare_modules(case, ours, "LongT5", peer, torch.randn(B, L, D), tolerance)


def main() -> None:
    benchmark = Benchmark(__doc__)
    compare_attentions(benchmark)
    compare_with_products(benchmark)
    compare_encoders(benchmark)
    print("\nPeak memory of a process that trains one layer, memory kept:\n")
    D, L = (32, 64) if benchmark.quick else (1024, 3072)
    print_peak_memory(f"layer 0 of wikitext103, B 1 L {L}", D, L)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        D, L = map(int, sys.argv[2:])
        train(layers_of(wikitext103((0,), hidden_size=D, ssm_n_ssm=D)), torch.randn(1, L, D))
    else:
        main()
