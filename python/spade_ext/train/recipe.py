"""Recipes: a YAML file that says which task, data, model and training make a result."""

import dataclasses
import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from huggingface_hub.dataclasses import type_validator
from huggingface_hub.errors import StrictDataclassError
from transformers import TrainingArguments

from ..data.files import write_text
from ..models import SpadeConfig
from .tasks import TASKS

RECIPE_FILE = "recipe.yaml"

# Other than those of TrainingArguments: every parameter of our models gets a gradient, so none is searched for.
_TRAINING_DEFAULTS = {"ddp_find_unused_parameters": False}


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-3` is a number and `no`, a strategy of TrainingArguments, is a string."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
        task: a name of `spade_ext.train.tasks.TASKS`.
        data: keyword arguments of the task's class.
        model: fields of `SpadeConfig`; those that the task fixes, such as vocab_size, are left out.
        training: fields of transformers' `TrainingArguments`.
    """

    task: str
    data: dict[str, Any]
    model: dict[str, Any]
    training: dict[str, Any]

    def __post_init__(self):
        if self.task not in list(TASKS):
            raise ValueError(f"task is {self.task!r}, expected one of {', '.join(TASKS)}")
        task = TASKS[self.task]
        for section in ("data", "model", "training"):
            _check_section(section, getattr(self, section))
        _check_keys("data.", self.data, _keys(task))
        _check_keys("training.", self.training, _keys(TrainingArguments))
        _check_required("data", self.data, task)
        _check_types("data", self.data, get_type_hints(task))
        own = SpadeConfig.__annotations__  # those of transformers are not all resolvable, and checked with the rest
        _check_types("model", {key: value for key, value in self.model.items() if key in own}, own)
        _check_types("training", self.training, get_type_hints(TrainingArguments))
        generate = self.data.get("generate", {})
        _check_keys("data.generate.", generate, list(task.generate_options))
        _check_types("data.generate", generate, task.generate_options)
        for key in self.make_task().model_options:
            if key in self.model:
                raise ValueError(f"model.{key} is fixed by the task {self.task}, expected it to be left out")
        _check_keys("model.", self.model, _keys(SpadeConfig))
        try:
            self.model_config()
        except StrictDataclassError as error:
            raise ValueError(f"model: {error.__cause__ or error}") from None
        if not self.training.get("output_dir"):
            raise ValueError("training.output_dir is missing, expected the folder that the run is written to")

    @classmethod
    def load(cls, path: str | os.PathLike, overrides: Sequence[str] = ()) -> "Recipe":
        """Read a YAML file and apply overrides such as "model.hidden_size=128" (values are YAML).

        Raises:
            FileNotFoundError, ValueError: one sentence that names the file, key and value and what was expected.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file, expected a recipe such as recipes/quickstart/listops.yaml")
        try:
            content = _parse_yaml(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError(f"the content is {type(content).__name__}, expected keys {', '.join(_keys(cls))}")
            for override in overrides:
                _apply_override(content, override)
            _check_keys("", content, _keys(cls))
            if missing := [key for key in _keys(cls) if key not in content]:
                raise ValueError(f"{missing[0]} is missing, expected the keys {', '.join(_keys(cls))}")
            return cls(**content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path: str | os.PathLike) -> None:
        write_text(path, yaml.safe_dump(dataclasses.asdict(self), sort_keys=False))

    def differences(self, earlier: "Recipe") -> Iterator[tuple[str, str]]:
        """The fields in which this recipe differs: their names, such as "model.hidden_size", and "64 instead of 32"."""
        if self.task != earlier.task:
            yield "task", f"{self.task!r} instead of {earlier.task!r}"
            return
        for section, cls in (("data", TASKS[self.task]), ("model", SpadeConfig), ("training", TrainingArguments)):
            now, before = getattr(self, section), getattr(earlier, section)
            defaults = {field.name: _default(field) for field in dataclasses.fields(cls)}
            for key in dict.fromkeys((*before, *now)):
                new, old = now.get(key, defaults[key]), before.get(key, defaults[key])
                if new != old:
                    yield f"{section}.{key}", f"{new!r} instead of {old!r}"

    def make_task(self) -> Any:
        try:
            return TASKS[self.task](**self.data)
        except ValueError as error:
            raise ValueError(f"data: {error}") from None

    def model_config(self) -> SpadeConfig:
        return SpadeConfig(**{**self.make_task().model_options, **self.model})

    def training_arguments(self) -> TrainingArguments:
        try:
            return TrainingArguments(**{**_TRAINING_DEFAULTS, **self.training})
        except (ValueError, ImportError) as error:
            raise ValueError(f"training: {error}") from error


def model_options(overrides: Sequence[str]) -> dict[str, Any]:
    """Fields of `SpadeConfig` given as in "window=[64,64]".

    Raises:
        ValueError: an unknown field, or a value that is none.
    """
    options: dict[str, Any] = {}
    for override in overrides:
        _apply_override(options, override)
    _check_keys("", options, _keys(SpadeConfig))
    for key, value in options.items():
        if key in SpadeConfig.__annotations__:
            _check_type(key, value, SpadeConfig.__annotations__[key])
    return options


def _parse_yaml(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{place}{getattr(error, 'problem', error)}, expected YAML") from None


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"override is {override!r}, expected KEY=VALUE such as model.hidden_size=128")
    *sections, name = key.split(".")
    target = content
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ValueError(f"override is {override!r}, but {section} holds no keys")
    target[name] = _parse_yaml(text)


def _keys(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls) if field.init]


def _default(field: dataclasses.Field) -> Any:
    """A field's default as YAML would give it."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return list(value) if isinstance(value, tuple) else value


def _check_keys(prefix: str, content: Iterable[str], known: Sequence[str]) -> None:
    for key in content:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0)[0]
            raise ValueError(f"{prefix}{key} is not a known key, the nearest is {prefix}{nearest}")


def _check_section(section: str, content: Any) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{section} is {content!r}, expected keys and values")


def _check_required(section: str, content: Iterable[str], cls: type) -> None:
    for field in dataclasses.fields(cls):
        optional = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if not optional and field.name not in content:
            raise ValueError(f"{section}.{field.name} is missing, expected {field.type.__name__}")


def _check_types(section: str, content: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    for key, value in content.items():
        _check_type(f"{section}.{key}", value, hints[key])


def _check_type(name: str, value: Any, hint: Any) -> None:
    enums = [option for option in get_args(hint) if isinstance(option, type) and issubclass(option, Enum)]
    if names := [member.value for enum in enums for member in enum]:  # TrainingArguments takes the names too
        hint = Literal[tuple(names)]
    candidates = [value, float(value)] if type(value) is int else [value]  # an int is a float too
    for candidate in candidates:
        try:
            return type_validator(name, candidate, hint)
        except TypeError:
            continue
    choices = " or ".join(map(repr, get_args(hint))) if get_origin(hint) is Literal else ""
    raise ValueError(f"{name} is {value!r}, expected {choices or getattr(hint, '__name__', hint)}")
