"""ListOps of Long Range Arena: generator, reader, collator and baselines.

An expression such as `[MAX 4 [SM 7 8 ] 2 ]` has as its label the digit it evaluates to.
Sources: Nangia and Bowman 2018 (arXiv:1804.06028), Tay et al. 2021 (arXiv:2011.04006).
"""

import hashlib
import inspect
import json
import multiprocessing
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from itertools import count, islice, repeat
from pathlib import Path
from random import Random
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm import tqdm

from .files import sha256

_OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(median(values)),
    "[SM": lambda values: sum(values) % 10,
}
_OPERATOR_NAMES = tuple(_OPERATORS)
_DIGITS = tuple("0123456789")

TOKENS = ("<pad>", *_DIGITS, *_OPERATORS, "]")
VOCAB_SIZE = len(TOKENS)
PAD_ID = 0
NUM_LABELS = 10
FILES = {"train": "basic_train.tsv", "validation": "basic_val.tsv", "test": "basic_test.tsv"}

_HEADER = "Source\tTarget"
_RECORD = "generation.json"
_IDS = {token.encode(): id for id, token in enumerate(TOKENS) if id != PAD_ID} | {b"X": TOKENS.index("]")}
_LABELS = {digit.encode(): label for label, digit in enumerate(_DIGITS)}

_OPERATOR_PROBABILITY = 0.25
_ATTEMPTS_PER_BLOCK = 1_000
_FRUITLESS_BLOCKS = 1_000


def evaluate_expression(tokens: Iterable[str]) -> int:
    """Value (0 to 9) of the expression spelled by `tokens`: strings of TOKENS, so without parentheses.

    MED of an even count is the mean of the two middle values, truncated; SM is the sum modulo 10.

    Raises:
        ValueError: the tokens are not exactly one complete expression.
    """
    operators: list[str] = []
    arguments: list[list[int]] = [[]]
    for position, token in enumerate(tokens):
        if token in _OPERATORS:
            operators.append(token)
            arguments.append([])
        elif token in _DIGITS:
            arguments[-1].append(int(token))
        elif token == "]" and operators and arguments[-1]:
            value = _OPERATORS[operators.pop()](arguments.pop())
            arguments[-1].append(value)
        else:
            raise ValueError(f"token {position} is {token!r}, expected an operator, a digit, or ] after an argument")
    if operators or len(arguments[0]) != 1:
        raise ValueError(
            f"tokens hold {len(arguments[0])} complete expressions and {len(operators)} open ones, "
            "expected one complete expression"
        )
    return arguments[0][0]


class _Rules(NamedTuple):
    min_length: int
    max_length: int
    max_depth: int
    max_args: int
    seed: int


class _TooLong(Exception):
    pass


def _sample_nodes(
    number: int, depth: int, length: int, random: Callable[[], float], rules: _Rules
) -> tuple[list[str], list[int], int]:
    """Texts and values of `number` siblings; `length` is the least the whole expression can have, before and after."""
    may_branch = depth < rules.max_depth
    texts, values = [], []
    for _ in range(number):
        if may_branch and random() <= _OPERATOR_PROBABILITY:
            text, value, length = _sample_operator(depth, length, random, rules)
        else:
            value = int(random() * 10)
            text = _DIGITS[value]
        texts.append(text)
        values.append(value)
    return texts, values, length


def _sample_operator(depth: int, length: int, random: Callable[[], float], rules: _Rules) -> tuple[str, int, int]:
    arity = 2 + int(random() * (rules.max_args - 1))
    length += arity + 1  # `length` already counts this node as one token
    if length >= rules.max_length:
        raise _TooLong
    texts, values, length = _sample_nodes(arity, depth + 1, length, random, rules)
    name = _OPERATOR_NAMES[int(random() * len(_OPERATOR_NAMES))]
    text = "( " * (arity + 1) + name + " " + " ) ".join(texts) + " ) ] )"
    return text, _OPERATORS[name](values), length


def _sample_block(rules: _Rules, index: int) -> list[tuple[str, int]]:
    # Only random() has a sequence that Python keeps the same from version to version.
    random = Random((rules.seed << 32) + index).random
    kept = []
    for _ in range(_ATTEMPTS_PER_BLOCK):
        try:
            (text,), (value,), length = _sample_nodes(1, 1, 1, random, rules)
        except _TooLong:
            continue
        if rules.min_length < length:
            kept.append((text, value))
    return kept


def _sample_blocks(rules: _Rules, workers: int) -> Iterator[list[tuple[str, int]]]:
    if workers == 1:
        yield from map(_sample_block, repeat(rules), count())
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        pending = deque(pool.submit(_sample_block, rules, index) for index in range(2 * workers))
        for index in count(len(pending)):
            yield pending.popleft().result()
            pending.append(pool.submit(_sample_block, rules, index))


def _distinct(blocks: Iterable[list[tuple[str, int]]], rules: _Rules, total: int) -> Iterator[tuple[str, int]]:
    """The expressions of `blocks` in order, without repetitions."""
    seen: set[bytes] = set()
    fruitless = 0
    for block in blocks:
        before = len(seen)
        for text, value in block:
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                yield text, value
        fruitless = fruitless + 1 if len(seen) == before else 0
        if fruitless == _FRUITLESS_BLOCKS:
            options = ", ".join(f"{name}={value}" for name, value in rules._asdict().items())
            raise ValueError(
                f"{options} gave {before:,} distinct expressions and no other in the next "
                f"{_FRUITLESS_BLOCKS * _ATTEMPTS_PER_BLOCK:,} attempts, expected {total:,} (train + validation + test)"
            )


def _check_integer(name: str, value: int, least: int) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"{name} is {value!r}, expected an integer of at least {least}")


def _check_options(sizes: dict[str, int], rules: _Rules, workers: int) -> None:
    for name, size in sizes.items():
        _check_integer(name, size, 1)
    _check_integer("min_length", rules.min_length, 0)
    _check_integer("max_length", rules.max_length, rules.min_length + 2)
    _check_integer("max_depth", rules.max_depth, 1)
    _check_integer("max_args", rules.max_args, 2)
    _check_integer("seed", rules.seed, 0)
    _check_integer("workers", workers, 1)


def _write_splits(directory: Path, sizes: dict[str, int], rules: _Rules, workers: int) -> None:
    total = sum(sizes.values())
    with (
        closing(_sample_blocks(rules, workers)) as blocks,
        tqdm(total=total, desc="ListOps", unit=" expressions") as progress,
    ):
        expressions = _distinct(blocks, rules, total)
        for split, size in sizes.items():
            with open(directory / FILES[split], "w", encoding="ascii", newline="\n") as file:
                file.write(_HEADER + "\n")
                for text, value in islice(expressions, size):
                    file.write(f"{text}\t{value}\n")
                    progress.update()


def _record(directory: Path, options: dict[str, int]) -> dict[str, dict]:
    return {"options": options, "sha256": {name: sha256(directory / name) for name in FILES.values()}}


def generate(
    directory: str | os.PathLike,
    *,
    train: int = 96_000,
    validation: int = 2_000,
    test: int = 2_000,
    min_length: int = 500,
    max_length: int = 2_000,
    max_depth: int = 10,
    max_args: int = 10,
    seed: int = 0,
    workers: int | None = None,
) -> None:
    """Write a ListOps data set in the published layout: basic_train.tsv, basic_val.tsv, basic_test.tsv.

    A node above `max_depth` (the root has depth 1) is an operator with probability 1/4 and 2 to `max_args` arguments,
    else a digit; all choices are uniform. Expressions with min_length < length < max_length tokens (brackets count,
    parentheses do not) are kept, and none occurs twice in the three files together.

    The rules are the published ones, the stream is our own: block i of 1,000 attempts is drawn from
    `random.Random(seed * 2**32 + i)`, an attempt ending as soon as it is too long. Files depend on the options but not
    on `workers` (default: one for each core). Each file appears whole; a failure while expressions are drawn leaves
    none, and `generation.json` (options and SHA-256 of each file) comes last and marks the set complete. More than one
    worker means spawned processes, so a script must guard its call with `if __name__ == "__main__"`.

    Raises:
        FileExistsError: `directory` already holds one of the three files.
        ValueError: an option is out of range, or the options do not give enough distinct expressions.

    Source: listops.py of google-research/long-range-arena.
    """
    workers = (os.cpu_count() or 1) if workers is None else workers
    sizes = {"train": train, "validation": validation, "test": test}
    rules = _Rules(min_length, max_length, max_depth, max_args, seed)
    _check_options(sizes, rules, workers)

    directory = Path(directory)
    for name in FILES.values():
        if (directory / name).exists():
            raise FileExistsError(f"{directory / name} exists, expected a directory without {name}")

    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".listops-", dir=directory) as temporary:
        complete = Path(temporary)
        _write_splits(complete, sizes, rules, workers)
        record = _record(complete, {**sizes, **rules._asdict()})
        (complete / _RECORD).write_text(json.dumps(record, indent=2) + "\n")
        for name in (*FILES.values(), _RECORD):
            os.replace(complete / name, directory / name)


def matches(directory: str | os.PathLike, **options: int) -> bool:
    """Whether `directory` holds, unchanged, what `generate(directory, **options)` writes.

    Raises:
        ValueError: generation.json is not JSON.
    """
    arguments = inspect.signature(generate).bind(directory, **options)
    arguments.apply_defaults()
    expected = {name: value for name, value in arguments.arguments.items() if name not in ("directory", "workers")}
    directory = Path(directory)
    if not all((directory / name).is_file() for name in (*FILES.values(), _RECORD)):
        return False
    try:
        record = json.loads((directory / _RECORD).read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{directory / _RECORD} is not JSON, expected what `spade-ext data` wrote") from None
    return record == _record(directory, expected)


def _shown(field: bytes) -> str:
    return repr(field[:40].decode(errors="replace"))


def _parse_line(line: bytes, max_length: int) -> tuple[bytes, int]:
    columns = line.rstrip(b"\r\n").split(b"\t")
    if len(columns) != 2:
        raise ValueError(f"the number of tab-separated columns is {len(columns)}, expected 2 (Source and Target)")
    source, target = columns
    tokens = source.translate(None, delete=b"()").split()[:max_length]
    if not tokens:
        raise ValueError("Source is empty, expected an expression")
    if target not in _LABELS:
        raise ValueError(f"Target is {_shown(target)}, expected an integer from 0 to 9")
    try:
        return bytes(map(_IDS.__getitem__, tokens)), _LABELS[target]
    except KeyError as error:
        raise ValueError(f"token is {_shown(error.args[0])}, expected one of {' '.join(TOKENS[1:])}") from None


class ListOps(Dataset):
    """One published ListOps file in memory, one byte a token.

    Item: {"input_ids": (L,) int64 with L <= max_length, "labels": int from 0 to 9}. Parentheses are dropped, the
    closing token is `]` or `X`, and only the first `max_length` tokens of an expression are read.

    Attributes:
        labels: (N,) int64.
        lengths: (N,) int64, tokens of each item.

    Raises:
        FileNotFoundError, IsADirectoryError: no such file.
        ValueError: a line is malformed; the message names file and line.
    """

    def __init__(self, path: str | os.PathLike, max_length: int = 2_000):
        _check_integer("max_length", max_length, 1)
        if not Path(path).exists():
            raise FileNotFoundError(f"{path} does not exist, expected a file that `spade-ext data RECIPE` makes")
        if Path(path).is_dir():
            raise IsADirectoryError(f"{path} is a directory, expected a file that `spade-ext data RECIPE` makes")
        ids, lengths, labels = bytearray(), [], []
        with open(path, "rb") as file:
            header = file.readline().rstrip(b"\r\n")
            if header != _HEADER.encode():
                raise ValueError(f"{path}, line 1: the header is {_shown(header)}, expected {_HEADER!r}")
            for number, line in enumerate(file, start=2):
                try:
                    line_ids, label = _parse_line(line, max_length)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from None
                ids += line_ids
                lengths.append(len(line_ids))
                labels.append(label)
        if not labels:
            raise ValueError(f"{path}, line 2: the file ends here, expected an expression")
        self.labels = torch.tensor(labels)
        self.lengths = torch.tensor(lengths)
        self._ids = torch.frombuffer(ids, dtype=torch.uint8)
        self._offsets = np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        index = range(len(self))[index]
        start, stop = self._offsets[index : index + 2]
        return {"input_ids": self._ids[start:stop].long(), "labels": int(self.labels[index])}


class Collator:
    """Right-pads items of `ListOps` to the longest of the batch.

    Returns {"input_ids": (B, L) int64, "attention_mask": (B, L) bool, True at tokens, "labels": (B,) int64}.
    """

    def __call__(self, items: Sequence[dict[str, torch.Tensor | int]]) -> dict[str, torch.Tensor]:
        input_ids = pad_sequence([item["input_ids"] for item in items], batch_first=True, padding_value=PAD_ID)
        labels = torch.tensor([item["labels"] for item in items])
        return {"input_ids": input_ids, "attention_mask": input_ids != PAD_ID, "labels": labels}


def root_operator_accuracy(train: ListOps, test: ListOps) -> float:
    """Accuracy on `test`, 0 to 1, of answering the most frequent label that the first token has in `train`.

    A first token that `train` does not have gets the most frequent label of `train`.
    """
    cells = NUM_LABELS * _first_tokens(train) + train.labels
    counts = cells.bincount(minlength=VOCAB_SIZE * NUM_LABELS).view(VOCAB_SIZE, NUM_LABELS)
    answers = torch.where(counts.any(1), counts.argmax(1), counts.sum(0).argmax())
    return (test.labels == answers[_first_tokens(test)]).double().mean().item()


def _first_tokens(dataset: ListOps) -> torch.Tensor:
    return dataset._ids[dataset._offsets[:-1]].long()
