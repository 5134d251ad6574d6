"""Hugging Face models of random weights with attn_implementation="spade_local" against the same with "sdpa"."""

from copy import deepcopy

import torch
from timing import Benchmark
from torch import Tensor, nn
from transformers import AutoModel, Gemma3TextConfig, MistralConfig, ModernBertConfig, PretrainedConfig

import spade_ext.models  # noqa: F401  (registers spade_local)


class Layers(nn.Module):
    """A model from embeddings to hidden states, its embedding not learned."""

    def __init__(self, config: PretrainedConfig, attention: str):
        super().__init__()
        torch.manual_seed(0)
        self.model = AutoModel.from_config(deepcopy(config), attn_implementation=attention)  # which it writes there
        self.model.get_input_embeddings().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(inputs_embeds=x).last_hidden_state


def main() -> None:
    benchmark = Benchmark(__doc__)
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


if __name__ == "__main__":
    main()
