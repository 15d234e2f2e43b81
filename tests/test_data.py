"""Prompt files and batches."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solrl_jax.config import ConfigError
from solrl_jax.run import data


def test_a_file_is_both_splits_and_drops_are_counted(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffa red box\r\n\n  a blue box \na red box\n   \nein größerer Kreis".encode())
    found = data.read(file)
    assert found.train == found.test == ("a red box", "a blue box", "ein größerer Kreis")
    assert (found.blank, found.repeated) == (2, 1)


def test_a_folder_has_two_splits(tmp_path):
    (tmp_path / "train.txt").write_text("a\nb\nb\n")
    (tmp_path / "test.txt").write_text("c\n\n")
    rows = {text: {"prompt": text} for text in "abc"}
    assert data.read(tmp_path) == data.PromptSet(("a", "b"), ("c",), 1, 1, rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"p.txt holds no prompts \(it is empty\)"),
        (b"\n \n", r"p.txt holds no prompts \(only blank lines\)"),
        (b"good\nbad \xff byte\n", r"p.txt, line 2: byte 5 \(0xff\) is not UTF-8"),
        ("good".encode("utf-16-le"), r"p.txt, line 1: holds a zero byte \(is it UTF-16\?\)"),
        (None, r"p.txt does not exist: give DIR with train.txt and test.txt"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    file = tmp_path / "p.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(data.DataError, match=message):
        data.read(file)


@pytest.mark.parametrize("name", ["p.json", "p.JSON"])
def test_one_json_has_no_lines_of_prompts(tmp_path, name):
    (tmp_path / name).write_text('[\n "a",\n "b"\n]\n')
    for read in (data.read, data.read_captions):
        with pytest.raises(data.DataError, match=f"{name} is one JSON, of which lines are no prompts: give "):
            read(tmp_path / name)


def test_an_ending_in_capitals_is_the_same(tmp_path):
    file = tmp_path / "P.JSONL"
    file.write_text('{"prompt": "a", "file": "a.png"}\n')
    row = {"prompt": "a", "file": "a.png"}
    assert data.read_file(file) == ({"a": row}, 0, 0) and data.read_captions(file) == [row]


def test_an_escape_in_text_is_no_zero_byte(tmp_path):
    """A .txt file has no escapes: these are the six characters. A NUL itself is a zero byte there."""
    file = tmp_path / "p.txt"
    file.write_bytes(rb"a\u0000b")
    assert data.read_file(file) == ({"a\\u0000b": {"prompt": "a\\u0000b"}}, 0, 0)
    file.write_bytes(b"one\ntwo\0\n")
    with pytest.raises(data.DataError, match=r"p.txt, line 2: holds a zero byte \(is it UTF-16\?\); save it as UTF-8"):
        data.read_file(file)


def test_a_nul_in_a_file_name(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a", "file": "x\\u0000.png"}\n')
    with pytest.raises(data.DataError, match=r"line 1: holds a NUL character \(\\u0000\) in its file; take it out$"):
        data.read_captions(file)


def test_a_folder_without_its_files(tmp_path):
    with pytest.raises(
        data.DataError, match=r"holds neither train.txt nor train_metadata.jsonl: give DIR with train.txt"
    ):
        data.read(tmp_path)
    (tmp_path / "train.txt").write_text("a\n")
    with pytest.raises(data.DataError, match=r"holds neither test.txt nor test_metadata.jsonl"):
        data.read(tmp_path)


def test_json_lines_as_one_file_as_a_folder_and_beside_text(tmp_path):
    train = tmp_path / "train_metadata.jsonl"
    train.write_text(
        '{"tag": "x", "prompt": " a cat "}\r\n\n{"prompt": "a \\u00e9 dog"}\n{"prompt": "a cat", "tag": "x"}\n'
        '{"prompt": ""}\n'
    )
    rows = {"a cat": {"tag": "x", "prompt": "a cat"}, "a é dog": {"prompt": "a é dog"}}
    both = data.PromptSet(("a cat", "a é dog"), ("a cat", "a é dog"), 2, 1, rows)
    assert data.read(train) == both
    (tmp_path / "test_metadata.jsonl").write_text('{"prompt": "a test", "include": [{"class": "cat", "count": 2}]}')
    one = {"prompt": "a test", "include": [{"class": "cat", "count": 2}]}
    assert data.read(tmp_path) == both._replace(test=("a test",), rows=rows | {"a test": one})
    (tmp_path / "train.txt").write_text("from text\n")  # where both are, the text is read
    text = {"from text": {"prompt": "from text"}, "a test": one}
    assert data.read(tmp_path) == data.PromptSet(("from text",), ("a test",), 0, 0, text)


def test_rows_are_found_by_their_prompts(tmp_path):
    """Of both parts of a split that is made; a text of no file has its prompt alone."""
    file = tmp_path / "p.jsonl"
    file.write_text("".join(f'{{"prompt": "p{i}", "n": {i}, "rewards": ["ocr"]}}\n' for i in range(9)))
    found = data.read(file, 3, 1)
    assert found.rows_of([found.test[2], found.train[0]]) == [
        {"prompt": text, "n": int(text[1:]), "rewards": ["ocr"]} for text in (found.test[2], found.train[0])
    ]
    assert found.rows_of(["q"]) == data.PromptSet((), (), 0, 0).rows_of(["q"]) == [{"prompt": "q"}]
    (tmp_path / "p.txt").write_text("a\na\n")
    assert data.read_captions(tmp_path / "p.txt") == [{"prompt": "a"}, {"prompt": "a"}]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (
            '{"prompt": "a", "tag": "x"}\n{"prompt": "b"}\n{"prompt": " a", "tag": "y"}\n',
            '{"prompt": "c"}',
            r"train_metadata.jsonl, line 3: the prompt 'a' of .*train_metadata.jsonl, line 1, with another 'tag': ",
        ),
        (
            '{"prompt": "a", "n": [1]}\n{"prompt": "a", "n": [1], "of": 2}\n',
            '{"prompt": "c"}',
            r"train_metadata.jsonl, line 2: the prompt 'a' of .*, line 1, with another 'of': equal prompts",
        ),
        (
            '{"prompt": "a"}\n{"prompt": "b", "n": 1}\n',
            '{"prompt": "c"}\n{"prompt": "b", "n": 2}',
            r"test_metadata.jsonl, line 2: the prompt 'b' of .*train_metadata.jsonl, line 2, with another 'n': equal",
        ),
    ],
)
def test_rows_that_contradict_each_other_name_both_lines(tmp_path, train, test, message):
    (tmp_path / "train_metadata.jsonl").write_text(train)
    (tmp_path / "test_metadata.jsonl").write_text(test)
    with pytest.raises(data.DataError, match=message):
        data.read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"prompt": "a"}\n{"prompt": "b"\n',
            r"p.jsonl, line 2: not JSON at column 15 \(Expecting ',' delimiter\); a line",
        ),
        (b"a plain prompt\n", r"p.jsonl, line 1: not JSON at column 1 .*a line is an object with a text as \"prompt\""),
        (b'["a"]\n', r"line 1: a JSON list; a line is an object"),
        (b'\n{"text": "a", "tag": 1}\n', r'line 2: no "prompt", it has text, tag; a line is an object'),
        (b"{}\n", r'line 1: no "prompt", it has nothing; a line'),
        (b'{"prompt": ["a"]}\n', r'line 1: its "prompt" is \["a"\]; a line'),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', r"line 2: byte 13 \(0xff\) is not UTF-8; save it as UTF-8"),
        (
            b'{"prompt": "ok"}\n{"prompt": "a\\u0000b"}\n',
            r"p.jsonl, line 2: holds a NUL character \(\\u0000\) in its prompt; take it out$",
        ),
        (b'{"prompt": "a\0b"}\n', r"p.jsonl, line 1: holds a zero byte \(is it UTF-16\?\); save it as UTF-8"),
        ('{"prompt": "a"}\n'.encode("utf-16-le"), r"p.jsonl, line 1: holds a zero byte \(is it UTF-16\?\)"),
        (b'{"prompt": "a\\ud83d"}\n', r"line 1: half a surrogate pair in its prompt"),
        (b"[" * 100_000, r"line 1: JSON nested too deep"),
        (b'{"prompt": "a", "n": ' + b"1" * 5000 + b"}\n", r"p.jsonl, line 1: Exceeds the limit \(4300 digits\)"),
        (b"\n\n", r"p.jsonl holds no prompts \(only blank lines\)"),
    ],
)
def test_bad_json_lines_are_named(tmp_path, content, message):
    file = tmp_path / "p.jsonl"
    file.write_bytes(content)
    with pytest.raises(data.DataError, match=message):
        data.read(file)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.data(), st.integers(0, 5))
def test_every_prompt_once_an_epoch_and_none_twice_in_a_batch(n, more, seed):
    count = more.draw(st.integers(1, n))
    prompts = [str(i) for i in range(n)]
    steps = 3 * n  # lcm(n, count) places are a whole number of epochs and of batches
    batches = [data.batch(prompts, seed, step, count) for step in range(steps)]
    assert all(len(set(batch)) == count for batch in batches)
    walk = [p for batch in batches for p in batch]
    for start in range(0, len(walk) - n + 1, n):
        assert Counter(walk[start : start + n]) == Counter(prompts)


@pytest.mark.parametrize(("n", "count"), [(5, 4), (30, 4)])
def test_a_batch_depends_on_seed_and_step_alone(n, count):
    prompts = [str(i) for i in range(n)]
    forward = [data.batch(prompts, 3, step, count) for step in range(40)]
    data._epoch.cache_clear()
    assert [data.batch(prompts, 3, step, count) for step in reversed(range(40))] == forward[::-1]
    assert forward != [data.batch(prompts, 4, step, count) for step in range(40)]
    epochs = [tuple(p for b in forward for p in b)[i * n : (i + 1) * n] for i in range(4)]
    assert len(set(epochs)) == 4  # each epoch in an order of its own


def test_more_than_there_are():
    with pytest.raises(ConfigError, match="3 prompts a batch, but only 2 distinct ones"):
        data.batch(["a", "b"], 0, 0, 3)


def test_cut_prompts_are_found_by_the_tokens_alone():
    def tokenize(prompts):
        rows = np.array([[ord(c) for c in f"{p:8.8}"] for p in prompts], np.int32)
        return {"clip": rows[:, :5], "t5": rows}

    found = data.cut(["abc", "abcde", "abcdef", "abcdefgh", "abcdefghi"], tokenize)
    assert found == {"clip": ["abcdef", "abcdefgh", "abcdefghi"], "t5": ["abcdefghi"]}
    assert data.cut(["abc"], tokenize) == {}


def test_a_split_that_is_made(tmp_path):
    """Of one file, by the seed alone: nothing is in both, all are in one, in the file's order."""
    file = tmp_path / "all.txt"
    file.write_text("".join(f"p{i}\n" for i in range(50)))
    whole = data.read(file).train
    found = data.read(file, 8, 42)
    assert len(found.test) == 8 and len(found.train) == 42 and found == data.read(file, 8, 42)
    assert sorted(found.train + found.test, key=whole.index) == list(whole)
    assert all(list(part) == sorted(part, key=whole.index) for part in (found.train, found.test))
    others = [set(data.read(file, 8, seed).test) for seed in range(20)]
    assert len(set(map(frozenset, others))) > 15 and len(set().union(*others)) > 40  # everywhere in the file
    with pytest.raises(data.DataError, match=r"evaluate.held_out=50: .*all.txt has 50 distinct prompts, leave some"):
        data.read(file, 50)
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).write_text("a\n")
    with pytest.raises(
        data.DataError, match=r"evaluate.held_out=1: .* has a test split; set it to 0, or give one file"
    ):
        data.read(tmp_path, 1)
