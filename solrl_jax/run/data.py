"""Prompts: reads text or JSON-lines files, makes batches.

A batch is a pure function of (seed, step), and a held-out split of the seed, so a resumed run draws the same prompts.
A line of a JSON-lines file is the row of its prompt: it travels beside the prompt, on the host, to the rewards.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from solrl_jax.config import ConfigError
from solrl_jax.rewards.bound import FIELD
from solrl_jax.structs import Row


class DataError(ValueError):
    """A prompt file cannot be used; the message names the file and the line."""


class PromptSet(NamedTuple):
    """Distinct, stripped prompts in file order, and the numbers of blank and of repeated lines, which are dropped.

    `rows` has the row of every prompt, of both splits.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]
    blank: int
    repeated: int
    rows: Mapping[str, Row] = MappingProxyType({})

    def rows_of(self, prompts: Sequence[str]) -> list[Row]:
        """The row of each prompt; of one that is in no file, {"prompt": text}, as of a text file's."""
        return [self.rows.get(prompt, {"prompt": prompt}) for prompt in prompts]


def digest(prompts: PromptSet) -> str:
    """It changes if any text, row or the order of them does."""
    return digest_of([prompts.rows_of(texts) for texts in (prompts.train, prompts.test)])


def digest_of(value: Any) -> str:
    """Of lists, texts and numbers, and of what else is in them as its repr."""
    return hashlib.sha256(json.dumps(value, default=repr).encode()).hexdigest()[:16]


SPLIT = 0x5B117  # used with the seed, so that the split is independent of the epochs' permutations
LAYOUT = (
    "DIR with train.txt and test.txt (one prompt per line), or with train_metadata.jsonl and test_metadata.jsonl "
    '({"prompt": ...} a line), or one .txt or .jsonl file'
)


def read(path: str | Path, held_out: int = 0, seed: int = 0) -> PromptSet:
    """Read a folder (see LAYOUT; .txt is preferred), or one file, which then serves as both splits.

    With `held_out`, so many prompts of the one file are the test split. Raises DataError if a file is missing, not
    UTF-8, not in the layout of `read_file` or without prompts, if equal prompts have different rows, and if no prompt
    is left to train on.
    """
    path = Path(path)
    if not path.is_dir():
        found, blank, repeated = _numbered(path)
        prompts, rows = tuple(found), {prompt: row for prompt, (row, _) in found.items()}
        if held_out >= len(prompts):
            count = len(prompts)
            raise DataError(
                f"evaluate.held_out={held_out}: {path} has {count} distinct prompts, leave some to train on"
            )
        return PromptSet(*split_off(prompts, held_out, seed), blank, repeated, rows)
    train, test = _numbered(_split(path, "train")), _numbered(_split(path, "test"))
    if held_out:
        raise DataError(f"evaluate.held_out={held_out}: {path} has a test split; set it to 0, or give one file")
    for prompt in train[0].keys() & test[0].keys():
        _agree(prompt, train[0][prompt], test[0][prompt])
    rows = {prompt: row for prompt, (row, _) in (*train[0].items(), *test[0].items())}
    return PromptSet(tuple(train[0]), tuple(test[0]), train[1] + test[1], train[2] + test[2], rows)


def split_off(prompts: tuple[str, ...], held_out: int, seed: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(train, test) in file order; `held_out` prompts are the test split. If it is 0, both are all prompts."""
    if not held_out:
        return prompts, prompts
    chosen = set(np.random.default_rng([seed, SPLIT]).permutation(len(prompts))[:held_out].tolist())
    train, test = ([p for i, p in enumerate(prompts) if (i in chosen) == held] for held in (False, True))
    return tuple(train), tuple(test)


def _split(folder: Path, split: str) -> Path:
    names = (f"{split}.txt", f"{split}_metadata.jsonl")
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise DataError(f"{folder} holds neither {names[0]} nor {names[1]}: give {LAYOUT}")


def read_file(file: str | Path) -> tuple[dict[str, Row], int, int]:
    """({prompt: its row}, blank lines, repeated lines) of one UTF-8 file: one prompt per line, in .jsonl as
    {"prompt": ...}. A row is the object of a line, with its prompt stripped; of a text file it is {"prompt": text}."""
    found, blank, repeated = _numbered(Path(file))
    return {prompt: row for prompt, (row, _) in found.items()}, blank, repeated


Numbered = dict[str, tuple[Row, str]]
"""{prompt: (its row, "FILE, line N")}, in file order."""


def _numbered(file: Path) -> tuple[Numbered, int, int]:
    """`read_file`, with the place of each row."""
    texts, blank, repeated = _lines(file, LAYOUT), 0, 0
    found: Numbered = {}
    for number, text in enumerate(texts, 1):
        row = _row(text, file, number) if text and _has_rows(file) else {"prompt": text}
        prompt, here = row["prompt"], (row, f"{file}, line {number}")
        if not prompt:
            blank += number < len(texts)  # an empty text after the last newline is not a line
        elif prompt in found:
            _agree(prompt, found[prompt], here)
            repeated += 1
        else:
            found[prompt] = here
    if not found:
        raise DataError(f"{file} holds no prompts ({_nothing(texts)}): write one per line")
    return found, blank, repeated


def _agree(prompt: str, one: tuple[Row, str], two: tuple[Row, str]) -> None:
    """DataError, which names both lines, unless equal prompts have equal rows: a row is looked up by its prompt."""
    (first, there), (second, here) = one, two
    if first != second:
        shared = first.keys() & second.keys()
        other = next(name for name in {**first, **second} if name not in shared or first[name] != second[name])
        raise DataError(
            f"{here}: the prompt {prompt!r:.60} of {there}, with another {other!r:.40}: equal prompts need equal rows; "
            "make the rows equal, or word one of the prompts differently"
        )


CAPTIONS = (
    'a file with one prompt per line, in the order of picture names, or a .jsonl file of {"file": ..., "prompt": ...}'
)


def read_captions(file: str | Path) -> list[Row]:
    """The row of a picture per line, in order, with repetitions: {"prompt": ...}, of a .jsonl file with "file" and all
    other fields of its object.

    Raises DataError as `read_file`, and for a blank line, after which pictures would get the wrong prompts.
    """
    file = Path(file)
    texts = _lines(file, CAPTIONS)
    while texts and not texts[-1]:
        texts.pop()
    if not texts:
        raise DataError(f"{file} holds no prompts: give {CAPTIONS}")
    if "" in texts:
        raise DataError(f"{file}, line {texts.index('') + 1}: is blank; write the prompt of a picture on every line")
    if not _has_rows(file):
        return [{"prompt": text} for text in texts]
    return [_row(text, file, number, ("file", "prompt")) for number, text in enumerate(texts, 1)]


def _lines(file: Path, layout: str) -> list[str]:
    """The stripped lines of a UTF-8 file, also the empty one after the last newline. Raises DataError."""
    if file.suffix.lower() == ".json":  # its brackets and commas would be prompts
        raise DataError(f"{file} is one JSON, of which lines are no prompts: give {layout}")
    try:
        lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except FileNotFoundError:
        raise DataError(f"{file} does not exist: give {layout}") from None
    except OSError as e:
        raise DataError(f"{file} cannot be read: {e.strerror}") from e
    return [_decode(line, file, number) for number, line in enumerate(lines, 1)]


def _has_rows(file: Path) -> bool:
    """Whether its lines are JSON."""
    return file.suffix.lower() == ".jsonl"


def _nothing(texts: list[str]) -> str:
    return "it is empty" if len(texts) == 1 else "only blank lines"


def _decode(line: bytes, file: Path, number: int) -> str:
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as e:
        raise DataError(
            f"{file}, line {number}: byte {e.start + 1} (0x{line[e.start]:02x}) is not UTF-8; save it as UTF-8"
        ) from None
    if "\0" in text:
        raise DataError(f"{file}, line {number}: holds a zero byte (is it UTF-16?); save it as UTF-8")
    return text


def _row(line: str, file: Path, number: int, texts: Sequence[str] = ("prompt",)) -> Row:
    """The object of a line of JSON, whose fields `texts` are texts; these are stripped."""
    rule = f'a line is an object with a text as "{texts[0]}"'
    try:
        found = json.loads(line)
    except json.JSONDecodeError as e:
        raise DataError(f"{file}, line {number}: not JSON at column {e.colno} ({e.msg}); {rule}") from None
    except RecursionError:
        raise DataError(f"{file}, line {number}: JSON nested too deep; {rule}") from None
    except ValueError as e:  # a whole number of thousands of digits
        raise DataError(f"{file}, line {number}: {e}; {rule}") from None
    if not isinstance(found, dict):
        raise DataError(f"{file}, line {number}: a JSON {type(found).__name__}; {rule}")
    named = found.get(FIELD, [""])
    if not isinstance(named, list) or not named or not all(isinstance(name, str) for name in named):
        raise DataError(
            f'{file}, line {number}: its "{FIELD}" is {json.dumps(named):.40}: give a list of the names of the rewards '
            f'that the prompt is scored by, as in ["ocr"], or leave it out for all'
        )
    return found | {field: _text(found, field, file, number) for field in texts}


def _text(found: Row, field: str, file: Path, number: int) -> str:
    """The text `field` of a line's object, stripped."""
    rule = f'a line is an object with a text as "{field}"'
    if not isinstance(found.get(field), str):
        what = f'no "{field}", it has {", ".join(found) or "nothing":.80}'
        what = f'its "{field}" is {json.dumps(found[field]):.40}' if field in found else what
        raise DataError(f"{file}, line {number}: {what}; {rule}")
    if "\0" in found[field]:
        raise DataError(f"{file}, line {number}: holds a NUL character (\\u0000) in its {field}; take it out")
    try:
        return _decode(found[field].encode(), file, number)
    except UnicodeEncodeError:
        raise DataError(f"{file}, line {number}: half a surrogate pair in its {field}; write the full pair") from None


def batch(prompts: Sequence[str], seed: int, step: int, count: int) -> list[str]:
    """The `count` prompts of a step: the next ones of an endless sequence of epochs, each a seeded permutation.

    Every prompt comes once per epoch, and no prompt twice in a batch. Raises ConfigError for fewer than `count`.
    """
    n = len(prompts)
    if count > n:
        raise ConfigError(f"{count} prompts a batch, but only {n} distinct ones in the file: use {n} or fewer")
    places = range(step * count, (step + 1) * count)
    return [prompts[_epoch(n, count, seed, place // n)[place % n]] for place in places]


@functools.lru_cache(maxsize=8)
def _epoch(n: int, count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of one epoch, such that the batch that spans its start has no prompt twice.

    Only the first `count` places may differ from the seeded permutation. So with 2 * count prompts or more, the end of
    the previous epoch is that of its permutation; with fewer, all epochs are computed from the first, which is quick.
    """
    first = max(epoch - 1, 0) if n >= 2 * count else 0
    order = _permutation(n, seed, first)
    for e in range(first + 1, epoch + 1):
        used = e * n % count  # prompts of the spanning batch that come from the previous epoch
        order = (
            _avoiding(_permutation(n, seed, e), order[n - used :], count - used) if used else _permutation(n, seed, e)
        )
    return tuple(order)


def _permutation(n: int, seed: int, epoch: int) -> list[int]:
    return np.random.default_rng([seed, epoch]).permutation(n).tolist()


def _avoiding(order: list[int], taken: list[int], head: int) -> list[int]:
    """`order`, with the members of `taken` moved from the first `head` places to directly behind these."""
    barred = set(taken)
    start = [i for i in order[: head + len(taken)] if i not in barred][:head]
    chosen = set(start)
    return start + [i for i in order if i not in chosen]


def cut(prompts: Sequence[str], tokenize: Callable[[Sequence[str]], Any]) -> dict[str, list[str]]:
    """{leaf of tokenize's result: prompts that are too long for it}, empty where every prompt fits.

    A prompt was cut if its tokens are the same without its last character. Only prompts with more characters than a row
    has tokens are tested; a prompt that is cut within its last word may be missed.
    """

    def named(texts: Sequence[str]) -> dict[str, np.ndarray]:
        tokens = tokenize(texts)
        return {name: ids(x) for name, x in tokens.items()} if isinstance(tokens, Mapping) else {"": ids(tokens)}

    def ids(tokens: Any) -> np.ndarray:
        return np.asarray(tokens["ids"] if isinstance(tokens, Mapping) else tokens)

    shortest = min(leaf.shape[-1] for leaf in named(prompts[:1]).values())
    long = [p for p in prompts if len(p) > shortest - 2]
    if not long:
        return {}
    whole, shorter = named(long), named([p[:-1] for p in long])
    found = {
        name: [p for p, a, b in zip(long, whole[name], shorter[name], strict=True) if np.array_equal(a, b)]
        for name in whole
    }
    return {name: texts for name, texts in found.items() if texts}
