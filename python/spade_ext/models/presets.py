"""Sizes of published experiments, for `SpadeConfig.preset` and `SpadeEncoderDecoderConfig.preset`."""

from typing import Any

# SPADE's language model (arXiv 2212.08136, section 4.2) on fairseq's transformer_lm_wiki103 (arXiv 1809.10853).
WIKITEXT103 = {
    "vocab_size": 267744,
    "hidden_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "intermediate_size": 4096,
    "hidden_act": "relu",
    "dropout": 0.3,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "causal": True,
    "window": (511, 0),
    "position": "t5",
    "position_shared": True,
    "final_norm": False,
    "ssm_n_ssm": 1024,
    "ssm_l_max": 3072,
    "ssm_lr": 1e-3,
    "scale_embedding": True,
    "adaptive_cutoffs": (20000, 60000),
    "adaptive_dropout": 0.2,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}

# BERT's base size, for a decoder and an encoder of SPADE with the published encoder's windows.
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
BASE_MODELS = {
    "causal-lm-base": {"causal": True, "window": (128, 0), "position_shared": True},
    "masked-lm-base": {"window": (128, 128), "prenorm": False, "embed_norm": True, "layer_norm_eps": 1e-6},
}


# Long Range Arena in the sizes of MEGA (arXiv 2209.10655, appendix D, and its published commands).
def _task(layers: int, width: int, z_dim: int, **options: Any) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 2 * width, "mega_z_dim": z_dim}
    common = {"num_attention_heads": 4, "hidden_act": "silu", "mega_n_dim": 16, "mega_truncation": 1024}
    return common | sizes | options | {"ssm_l_max": options["max_position_embeddings"]}


# Norms are LayerNorms where MEGA's are of batches, which padding would show in.
_TEXT = {"prenorm": False, "dropout": 0.1, "mega_activation": "softmax"}
_PIXELS = {"dropout": 0.0, "mega_activation": "laplace", "input_size": 1, "pad_token_id": None}
LRA_TASKS = {
    "listops": _task(6, 80, 64, **_TEXT, vocab_size=16, num_labels=10, max_position_embeddings=2002),
    "text": _task(4, 128, 64, **_TEXT, norm="scalenorm", vocab_size=257, max_position_embeddings=4002),
    "retrieval": _task(6, 128, 64, **_TEXT, norm="scalenorm", vocab_size=257, max_position_embeddings=4002),
    "image": _task(8, 160, 96, **_PIXELS, num_labels=10, max_position_embeddings=1024),
    "pathfinder": _task(6, 128, 64, **_PIXELS, max_position_embeddings=1024),
    "pathx": _task(4, 64, 32, **_PIXELS, max_position_embeddings=16384, mega_truncation=4096),
}
LRA_MODELS = {
    "spade-window": {"mixer": "window", "window": (127, 127)},
    "spade-chunk": {"mixer": "chunk", "chunk_size": 128},
    "mega-chunk": {"mixer": "mega", "position": "simple", "chunk_size": 128, "ssm_layers": ()},
    "mega-chunk-s4": {"mixer": "mega", "position": "simple", "chunk_size": 128},
    "mega-full": {"mixer": "mega", "position": "simple", "ssm_layers": ()},
    "s4": {"mixer": "ssm"},
    "window": {"mixer": "window", "window": (127, 127), "ssm_layers": ()},
    "full": {"mixer": "full", "ssm_layers": ()},
}


def _lra_options(task: str, model: str) -> dict[str, Any]:
    # Mega-chunk's chunks are longer in Path-X (arXiv 2209.10655).
    longer = {"chunk_size": 4096} if task == "pathx" and model.startswith("mega-chunk") else {}
    return LRA_TASKS[task] | LRA_MODELS[model] | longer


PRESETS = {
    "wikitext103": WIKITEXT103,
    **{name: BASE | options for name, options in BASE_MODELS.items()},
    **{f"lra-{task}-{model}": _lra_options(task, model) for task in LRA_TASKS for model in LRA_MODELS},
}


# The published encoder-decoder has the sizes of T5's small by default, and an S4 of the width of T5's base.
ENCODER_DECODER_PRESETS = {
    "encoder-decoder-small": {},
    "encoder-decoder-base": BASE | {"ssm_n_ssm": 768},
}


def preset_options(presets: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """The fields of a preset."""
    if name not in presets:
        raise ValueError(f"name is {name!r}, expected one of {', '.join(presets)}")
    return presets[name]
