# Copyright 2026 The spade-ext developers.
"""Files of published weights, and folders of ours."""

import argparse
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..convert import load_reference, to_reference
from ..data.files import flush
from .configuration_spade import SpadeConfig
from .modeling_spade import SpadeForCausalLM, SpadeModel
from .published_config import MEGA_ENCODER, published_config, published_kind

SUFFIXES = (".pt", ".safetensors")
# Of MEGA's models of the Long Range Arena, whose classifier is not ours.
CLASSIFIER = ("classifier.", "sentence_projection_layer.")


def convert_to_ours(published: Path, folder: Path, **options: Any) -> tuple[PreTrainedModel, list[str]]:
    """Read a published state dict and write the folder of the model that it makes, as save_pretrained does.

    Weights keep their type; state space models are float32 at least.

    Args:
        published: a file of tensors, of torch.save or safetensors; or a checkpoint of fairseq, if it is plain data.
        folder: appears whole, and must not be there.
        options: see `published_config`.

    Returns:
        The model, SpadeForCausalLM or for an encoder SpadeModel; and the names of a classifier's tensors, which have no
        counterpart.

    Raises:
        OSError: the file cannot be read, or the folder not be written.
        ValueError: what the file holds is no such state dict, or the options do not fit.
    """
    _check_free(folder)
    tensors = read_tensors(published)
    try:
        model_class = SpadeModel if published_kind(tensors) == MEGA_ENCODER else SpadeForCausalLM
        left_out = [name for name in tensors if model_class is SpadeModel and name.startswith(CLASSIFIER)]
        tensors = {name: tensor for name, tensor in tensors.items() if name not in left_out}
        model = model_class(published_config(tensors, **options))
        model.to(reduce(torch.promote_types, (t.dtype for name, t in tensors.items() if name.endswith(".weight"))))
        load_reference(model, tensors)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{published}: {error}") from None
    with _written(folder) as staged:
        model.save_pretrained(staged)
    return model, left_out


def convert_to_published(folder: Path, published: Path) -> PreTrainedModel:
    """Write the published state dict of a folder of ours, the inverse of `convert_to_ours`.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the folder holds no whole model that has a published counterpart, or `published` is neither .pt nor
            .safetensors.
    """
    if published.suffix not in SUFFIXES:
        raise ValueError(f"{published} ends with {published.suffix!r}, expected {' or '.join(SUFFIXES)}")
    _check_free(published)
    model = _read_model(folder)
    try:
        tensors = to_reference(model)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}: {error}") from None
    with _written(published) as staged:
        if published.suffix == ".pt":
            torch.save(tensors, staged)
        else:
            save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, staged)
    return model


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict of a file: its tensors, or those of fairseq's "model"."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file, expected a published state dict or a folder of ours")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is not a file of plain data: of a checkpoint that you trust, keep the tensors alone by torch.save("
            "torch.load(path, weights_only=False)['model'], new_path)"
        ) from None
    except (EOFError, OSError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} is not a whole file of torch.save or safetensors ({reason})") from None
    tensors = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} holds no state dict, expected names with tensors, or a checkpoint's 'model' of them")
    return tensors


def _read_model(folder: Path) -> PreTrainedModel:
    try:
        config = SpadeConfig.from_pretrained(folder)
        classes = {cls.__name__: cls for cls in (SpadeForCausalLM, SpadeModel)}
        name = (config.architectures or ["?"])[0]
        if name not in classes:
            raise ValueError(f"it is a {name}, expected a {' or a '.join(classes)}")
        if name == SpadeModel.__name__ and config.mixer != "mega":
            raise ValueError(f"it is a SpadeModel of mixer {config.mixer!r}, expected 'mega' or a SpadeForCausalLM")
        model, report = classes[name].from_pretrained(folder, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"{folder} holds no model with a published counterpart: {error}") from None
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{folder} holds no whole model: {missing[0]} is missing")
    return model


def _check_free(path: Path) -> None:
    if path.exists():
        raise FileExistsError(f"{path} is there already, expected a path that is free")


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """Where to write a file or a folder, which then appears whole at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield staged
        for file in staged.iterdir() if staged.is_dir() else ():
            flush(file)
        flush(staged)
        os.rename(staged, path)
        flush(path.parent)
    except (RuntimeError, SafetensorError) as error:  # a full disk is either, as the writer may be
        raise OSError(f"{path} could not be written ({error})") from error
    finally:
        if staged.is_dir():
            shutil.rmtree(staged, ignore_errors=True)
        staged.unlink(missing_ok=True)
