import hashlib
import re
from collections import Counter

import numpy as np
import pytest
import torch

from spade_ext.data import listops
from spade_ext.data.baselines import majority_accuracy
from spade_ext.data.listops import FILES, TOKENS, Collator, ListOps

SMALL = {"train": 240, "validation": 30, "test": 30, "seed": 7}
# sha256 of the three files one after the other: a change of the stream breaks everybody's data.
SMALL_SHA256 = "e0c4d36341515d2f8136cb5f988e3187689c80ebcae0a8d588f33e0b9b0d05ff"


def read_rows(directory):
    rows = {}
    for split, name in FILES.items():
        header, *lines = (directory / name).read_text().splitlines()
        assert header == "Source\tTarget"
        rows[split] = [line.split("\t") for line in lines]
    return rows


def all_rows(directory):
    return [row for rows in read_rows(directory).values() for row in rows]


def parse_pairs(words):
    word = next(words)
    if word != "(":
        return word
    left, right = parse_pairs(words), parse_pairs(words)
    assert next(words) == ")"
    return left, right


def unparse(pair):
    return pair if isinstance(pair, str) else f"( {unparse(pair[0])} {unparse(pair[1])} )"


def nest(pair):
    """Left-nested pairs as [operator, argument, ...], a digit as int."""
    if isinstance(pair, str):
        return int(pair)
    head, close = pair
    assert close == "]"
    arguments = []
    while isinstance(head, tuple):
        head, argument = head
        arguments.append(nest(argument))
    return [head, *reversed(arguments)]


def parse(text):
    words = iter(text.split(" "))
    pair = parse_pairs(words)
    assert next(words, None) is None
    return nest(pair)


def evaluate(tree):
    if isinstance(tree, int):
        return tree
    operator, *arguments = tree
    values = np.array([evaluate(argument) for argument in arguments])
    functions = {"[MIN": np.min, "[MAX": np.max, "[MED": np.median, "[SM": lambda x: np.sum(x) % 10}
    return int(functions[operator](values))


def nodes(tree, depth=1):
    yield depth, tree
    if isinstance(tree, list):
        for argument in tree[1:]:
            yield from nodes(argument, depth + 1)


def sha256(directory):
    return hashlib.sha256(b"".join((directory / name).read_bytes() for name in FILES.values())).hexdigest()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    directory = tmp_path_factory.mktemp("small")
    listops.generate(directory, **SMALL, workers=1)
    return directory


@pytest.fixture
def write(tmp_path):
    def write(text, name="basic_train.tsv"):
        path = tmp_path / name
        path.write_bytes(text.encode())
        return path

    return write


# Generator


def test_stream_is_golden(small):
    assert sha256(small) == SMALL_SHA256


def test_workers_do_not_change_the_files(small, tmp_path):
    listops.generate(tmp_path, **SMALL, workers=2)
    assert sha256(tmp_path) == SMALL_SHA256
    assert (tmp_path / "generation.json").read_bytes() == (small / "generation.json").read_bytes()


def test_seeds_differ(small, tmp_path):
    listops.generate(tmp_path, **SMALL | {"seed": 8}, workers=1)
    assert not {text for text, _ in all_rows(small)} & {text for text, _ in all_rows(tmp_path)}


def test_default_lengths(small):
    lengths = [len(re.sub("[()]", "", text).split()) for text, _ in all_rows(small)]
    assert 500 < min(lengths) < 700
    assert 1500 < max(lengths) < 2000


def test_split_sizes(small):
    assert {split: len(rows) for split, rows in read_rows(small).items()} == {split: SMALL[split] for split in FILES}


def test_text_is_nested_pairs(small):
    for text, _ in all_rows(small):
        assert unparse(parse_pairs(iter(text.split(" ")))) == text


def test_targets(small):
    for text, target in all_rows(small):
        assert (
            target == str(evaluate(parse(text))) == str(listops.evaluate_expression(re.sub("[()]", "", text).split()))
        )


def test_length_limits_are_strict_and_rows_distinct(tmp_path):
    listops.generate(tmp_path, train=600, validation=200, test=200, min_length=4, max_length=8, seed=1, workers=1)
    texts = [text for text, _ in all_rows(tmp_path)]
    assert {len(re.sub("[()]", "", text).split()) for text in texts} == {5, 6, 7}
    assert len(set(texts)) == 1000


def test_every_expression_can_be_used_once(tmp_path):
    listops.generate(tmp_path, train=8, validation=1, test=1, min_length=0, max_length=2, workers=1)
    assert sorted(all_rows(tmp_path)) == [[digit, digit] for digit in "0123456789"]


def chi_square(counts, expected):
    total = sum(counts.values())
    assert set(counts) <= set(expected)
    return sum((counts[key] - share * total) ** 2 / (share * total) for key, share in expected.items())


def test_distribution(tmp_path):
    # No tree of depth 4 reaches max_length, so only leaf roots and rare repetitions are missing.
    listops.generate(
        tmp_path, train=2000, validation=1, test=1, min_length=1, max_length=2000, max_depth=4, seed=3, workers=1
    )
    sampled = [node for text, _ in all_rows(tmp_path) for node in nodes(parse(text))]
    operators = [tree for _, tree in sampled if isinstance(tree, list)]
    digits = Counter(tree for _, tree in sampled if isinstance(tree, int))
    inner = Counter(isinstance(tree, list) for depth, tree in sampled if 1 < depth < 4)

    # Thresholds are exceeded with probability 1e-4 under the rules.
    assert chi_square(Counter(tree[0] for tree in operators), dict.fromkeys(TOKENS[11:15], 1 / 4)) < 21.1
    assert chi_square(Counter(len(tree) - 1 for tree in operators), dict.fromkeys(range(2, 11), 1 / 9)) < 31.8
    assert chi_square(digits, dict.fromkeys(range(10), 1 / 10)) < 33.7
    assert chi_square(inner, {True: 1 / 4, False: 3 / 4}) < 15.1
    assert max(depth for depth, _ in sampled) == 4


def test_max_args(tmp_path):
    listops.generate(tmp_path, train=200, validation=1, test=1, min_length=1, max_args=3, seed=4, workers=1)
    arities = {
        len(tree) - 1 for text, _ in all_rows(tmp_path) for _, tree in nodes(parse(text)) if tree not in range(10)
    }
    assert arities == {2, 3}


@pytest.mark.parametrize("name", FILES.values())
def test_existing_file_is_kept(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"{name} exists, expected"):
        listops.generate(tmp_path, **SMALL, workers=1)
    assert (tmp_path / name).read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_failure_leaves_nothing(tmp_path, monkeypatch):
    sample_block = listops._sample_block

    def fail_later(rules, index):
        if index == 1:
            raise RuntimeError("midway")
        return sample_block(rules, index)

    monkeypatch.setattr(listops, "_sample_block", fail_later)
    with pytest.raises(RuntimeError, match="midway"):
        listops.generate(tmp_path, **SMALL | {"test": 1000}, workers=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 0}, "train is 0, expected an integer of at least 1"),
        ({"validation": -1}, "validation is -1, expected an integer of at least 1"),
        ({"test": 1.5}, "test is 1.5, expected an integer of at least 1"),
        ({"min_length": -1}, "min_length is -1, expected an integer of at least 0"),
        ({"min_length": 500, "max_length": 501}, "max_length is 501, expected an integer of at least 502"),
        ({"max_depth": 0}, "max_depth is 0, expected an integer of at least 1"),
        ({"max_args": 1}, "max_args is 1, expected an integer of at least 2"),
        ({"seed": True}, "seed is True, expected an integer of at least 0"),
        ({"seed": -1}, "seed is -1, expected an integer of at least 0"),
        ({"workers": 0}, "workers is 0, expected an integer of at least 1"),
    ],
)
def test_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        listops.generate(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "found"), [({"min_length": 0, "max_length": 2}, 10), ({"max_depth": 2}, 0)], ids=["few", "none"]
)
def test_too_few_expressions_are_refused(tmp_path, monkeypatch, options, found):
    monkeypatch.setattr(listops, "_FRUITLESS_BLOCKS", 20)
    message = f"gave {found} distinct expressions and no other in the next 20,000 attempts, expected 300 "
    with pytest.raises(ValueError, match=message):
        listops.generate(tmp_path, **SMALL, **options, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_matches(small, tmp_path):
    assert listops.matches(small, **SMALL)
    assert listops.matches(small, **SMALL, max_args=10, workers=5)
    assert not listops.matches(small)
    assert not listops.matches(small, **SMALL | {"seed": 8})
    assert not listops.matches(tmp_path, **SMALL)
    with pytest.raises(TypeError, match="depth"):
        listops.matches(small, depth=3)


@pytest.mark.parametrize("name", [*FILES.values(), "generation.json"])
def test_matches_needs_every_file(small, tmp_path, name):
    for path in small.iterdir():
        if path.name != name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert not listops.matches(tmp_path, **SMALL)


def test_matches_notices_a_changed_file(small, tmp_path):
    for path in small.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert listops.matches(tmp_path, **SMALL)
    with open(tmp_path / FILES["test"], "a") as file:
        file.write("5\t5\n")
    assert not listops.matches(tmp_path, **SMALL)


def test_matches_refuses_a_broken_record(small, tmp_path):
    for path in small.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "generation.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation\.json is not JSON, expected"):
        listops.matches(tmp_path, **SMALL)


# Values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("[MIN 3 9 4 ]", 3),
        ("[MAX 3 9 4 ]", 9),
        ("[MED 9 1 4 ]", 4),
        ("[MED 9 1 ]", 5),
        ("[MED 8 1 3 4 ]", 3),
        ("[SM 9 9 9 ]", 7),
        ("[MAX 4 [SM 7 8 ] [MIN 9 [MED 8 9 ] ] ]", 8),
    ],
)
def test_evaluate_expression(text, value):
    assert listops.evaluate_expression(text.split()) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "tokens hold 0 complete expressions and 0 open ones"),
        ("1 2", "tokens hold 2 complete expressions and 0 open ones"),
        ("[MIN 1", "tokens hold 0 complete expressions and 1 open ones"),
        ("1 ]", "token 1 is ']'"),
        ("[MIN ]", "token 1 is ']'"),
        ("[MIN 1 11 ]", "token 2 is '11'"),
        ("[MIN ( 1 2 ) ]", r"token 1 is '\('"),
    ],
)
def test_malformed_expression_is_refused(text, message):
    with pytest.raises(ValueError, match=f"^{message}, expected"):
        listops.evaluate_expression(text.split())


# Reader


def test_vocabulary():
    assert " ".join(TOKENS) == "<pad> 0 1 2 3 4 5 6 7 8 9 [MIN [MAX [MED [SM ]"
    assert (listops.VOCAB_SIZE, listops.PAD_ID, listops.NUM_LABELS) == (16, 0, 10)


def test_read_generated(small):
    dataset = ListOps(small / FILES["train"])
    rows = read_rows(small)["train"]
    assert len(dataset) == len(rows) == 240
    for item, label, length, (text, target) in zip(dataset, dataset.labels, dataset.lengths, rows, strict=True):
        assert item["input_ids"].dtype == torch.int64
        assert [TOKENS[id] for id in item["input_ids"]] == re.sub("[()]", "", text).split()
        assert item["labels"] == label == int(target)
        assert len(item["input_ids"]) == length
    assert dataset.labels.dtype == dataset.lengths.dtype == torch.int64


@pytest.mark.parametrize("close", ["]", "X"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_read_variants(write, end, close):
    lines = ["Source\tTarget", f"( ( ( [MAX 2 ) ( ( ( [SM 7 ) 8 ) {close} ) ) {close} )\t5", "0\t0"]
    for text in (end.join(lines), end.join(lines) + end):
        dataset = ListOps(write(text))
        assert [item["input_ids"].tolist() for item in dataset] == [[12, 3, 14, 8, 9, 15, 15], [1]]
        assert dataset.labels.tolist() == [5, 0]


def test_index(write):
    dataset = ListOps(write("Source\tTarget\n3\t3\n4\t4\n"))
    assert dataset[-1]["labels"] == 4
    assert dataset[-1]["input_ids"].tolist() == [5]
    for index in (2, -3):
        with pytest.raises(IndexError):
            dataset[index]


def test_truncation(write):
    dataset = ListOps(write("Source\tTarget\n[MAX 1 2 3 ]\t3\n4\t4\n"), max_length=3)
    assert [item["input_ids"].tolist() for item in dataset] == [[12, 2, 3], [5]]
    assert dataset.lengths.tolist() == [3, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: the header is '', expected 'Source"),
        ("[MIN 1 2 ]\t1\n", r"line 1: the header is '\[MIN 1 2 \]\\t1', expected 'Source\\tTarget'"),
        ("Source\tTarget\n", "line 2: the file ends here, expected an expression"),
        ("Source\tTarget\n1\t1\n2\n", r"line 3: the number of tab-separated columns is 1, expected 2 \(Source and"),
        ("Source\tTarget\n1\t1\t1\n", "line 2: the number of tab-separated columns is 3, expected 2"),
        ("Source\tTarget\n1\t1\n\n", "line 3: the number of tab-separated columns is 1, expected 2"),
        ("Source\tTarget\n[MIN 1 12 ]\t1\n", r"line 2: token is '12', expected one of 0 1 2 .* \[SM \]"),
        ("Source\tTarget\n[MEAN 1 2 ]\t1\n", r"line 2: token is '\[MEAN', expected one of"),
        ("Source\tTarget\n<pad> 1\t1\n", "line 2: token is '<pad>', expected one of"),
        ("Source\tTarget\n1\t1\n1\t10\n", "line 3: Target is '10', expected an integer from 0 to 9"),
        ("Source\tTarget\n1\t-1\n", "line 2: Target is '-1', expected an integer from 0 to 9"),
        ("Source\tTarget\n1\t\n", "line 2: Target is '', expected an integer from 0 to 9"),
        ("Source\tTarget\n1\t1\n( )\t1\n", "line 3: Source is empty, expected an expression"),
    ],
)
def test_malformed_file_is_refused(write, text, message):
    path = write(text, "broken.tsv")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}, {message}"):
        ListOps(path)


def test_missing_file_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"basic_val\.tsv does not exist.*`spade-ext data RECIPE`"):
        ListOps(tmp_path / "basic_val.tsv")


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a directory, expected a file"):
        ListOps(tmp_path)


def test_max_length_is_refused(write):
    with pytest.raises(ValueError, match="max_length is 0, expected an integer of at least 1"):
        ListOps(write("Source\tTarget\n1\t1\n"), max_length=0)


def test_collator(write):
    dataset = ListOps(write("Source\tTarget\n[MAX 0 2 ]\t2\n4\t4\n"))
    batch = Collator()([dataset[0], dataset[1]])
    assert batch["input_ids"].tolist() == [[12, 1, 3, 15], [5, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[True] * 4, [True, False, False, False]]
    assert batch["labels"].tolist() == [2, 4]
    assert [batch[key].dtype for key in batch] == [torch.int64, torch.bool, torch.int64]


# Baselines


def test_baselines(write):
    train = ListOps(
        write(
            "Source\tTarget\n[MIN 1 2 ]\t1\n[MIN 1 3 ]\t1\n[MIN 0 3 ]\t0\n[MAX 1 9 ]\t9\n[MAX 2 9 ]\t9\n[SM 4 5 ]\t9\n"
        )
    )
    # Right by majority (9): rows 3, 4, 5. Right by root: rows 1, 3, 4 and, its root unknown in train, 5.
    rows = ["[MIN 1 4 ]\t1", "[MIN 0 4 ]\t0", "[MAX 9 3 ]\t9", "[SM 9 0 ]\t9", "[MED 9 9 ]\t9", "[MED 1 1 ]\t1"]
    test = ListOps(write("\n".join(["Source\tTarget", *rows]), "basic_test.tsv"))
    assert majority_accuracy(train, test) == pytest.approx(3 / 6)
    assert listops.root_operator_accuracy(train, test) == pytest.approx(4 / 6)
