"""--mode=score gives the scores of the rewards for arrays; an error is one line, and nothing is written."""

import csv
import errno
import json
import os

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image

from configs.tiny import WORLD
from solrl_jax import disk, main, rewards
from solrl_jax.run import score
from tests.tiers import slow

CLIP = (f"--config.reward_paths=clipscore={WORLD / 'clip'}", "--config.reward=clipscore")
PROMPTS = ["a red circle", "a blue square left of a green cross", "a small yellow triangle"]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """command(...) -> (exit code, stdout, stderr) of --mode=score, in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        with flagsaver.flagsaver(config=None):
            code = main.main(main.parse(["solrl_jax", "--mode=score", "--run_dir=out", *words]))
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def pictures(tmp_path):
    """{name: array} of the pictures in tmp_path/pictures, which have two sizes; prompts in tmp_path/p.txt."""
    (tmp_path / "pictures").mkdir()
    random, found = np.random.default_rng(0), {}
    for name, shape in (("a.png", (32, 32, 3)), ("b.webp", (64, 40, 3)), ("c.PNG", (32, 32, 3))):
        found[name] = random.integers(0, 256, shape, np.uint8)
        Image.fromarray(found[name]).save(tmp_path / "pictures" / name, lossless=True)
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS) + "\n")
    return found


def scored(images, prompts):
    """CLIPScore of single pictures, given as arrays."""
    mix, towers = rewards.load_rewards("clipscore", {"clipscore": str(WORLD / "clip")})
    score, one = jax.jit(lambda *args: rewards.score_images(mix, *args)[0][0]), []
    for image, prompt in zip(images, prompts, strict=True):
        one.append(score(towers, image[None] / np.float32(255), rewards.tokenize(mix, [prompt])))
    return np.array(one)


def lines(tmp_path):
    with (tmp_path / "out" / "scores.csv").open(newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize("chunk", [1, slow(24)])
def test_scores_are_those_of_the_arrays(command, pictures, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("solrl_jax.run.assemble.open_weights", None)  # the text-to-image model is not loaded
    code, out, err = command(*CLIP, "--prompts=p.txt", "--images=pictures", f"--config.evaluate.chunk={chunk}")
    assert (code, err) == (0, "")
    found, wanted = lines(tmp_path), scored(pictures.values(), PROMPTS)
    assert [(line["file"], line["prompt"]) for line in found] == list(zip(pictures, PROMPTS, strict=True))
    np.testing.assert_allclose([float(line["clipscore"]) for line in found], wanted, rtol=1e-5)
    head, *rows, mean, last = out.splitlines()
    assert head.split() == ["picture", "prompt", "clipscore"] and mean.split() == ["mean", f"{wanted.mean():.4f}"]
    assert [row.split()[-1] for row in rows] == [f"{value:.4f}" for value in wanted]
    assert last == "scores: out/scores.csv"


def test_scores_are_kept_where_nobody_reads_the_table(command, pictures, tmp_path, monkeypatch):
    (tmp_path / "same.py").write_text("HOST = True\n\ndef half(images, prompts):\n    return [0.5] * len(prompts)\n")

    def closed(*_):
        raise BrokenPipeError

    monkeypatch.setattr(score, "table", closed)
    with pytest.raises(BrokenPipeError):
        command("--config.reward=same.half", "--prompts=p.txt", "--images=pictures")
    assert [line["same.half"] for line in lines(tmp_path)] == ["0.5"] * 3


def test_scores_are_written_whole_or_not_at_all(command, pictures, tmp_path, monkeypatch):
    """A disk that fails at the end of the file leaves the scores of before."""
    (tmp_path / "one.py").write_text("HOST = True\n\ndef half(images, prompts):\n    return [0.5] * len(prompts)\n")
    (tmp_path / "two.py").write_text("HOST = True\n\ndef third(images, prompts):\n    return [0.3] * len(prompts)\n")
    words = "--prompts=p.txt", "--images=pictures"
    assert command("--config.reward=one.half", *words)[0] == 0

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk.os, "fsync", full)
    code, _, err = command("--config.reward=two.third", *words)
    assert code == 2 and "No space left" in err
    assert [line["one.half"] for line in lines(tmp_path)] == ["0.5"] * 3
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["scores.csv"]


def test_a_name_that_the_csv_cannot_hold_is_said_before_scoring(command, pictures, tmp_path):
    (tmp_path / "pictures" / "a.png").rename(tmp_path / "pictures" / "\udcff.png")
    code, _, err = command("--config.reward=shapes", "--prompts=p.txt", "--images=pictures")
    assert code == 2 and "the name '\\udcff.png' is not UTF-8: rename the picture" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_jsonl_names_its_pictures_and_a_config_its_rewards(command, pictures, tmp_path):
    pairs = [("c.PNG", PROMPTS[2]), ("a.png", PROMPTS[0]), ("c.PNG", PROMPTS[0])]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"file": f, "prompt": p}) + "\n" for f, p in pairs))
    code, out, _ = command("--config=tiny", "--prompts=p.jsonl", "--images=pictures")
    assert code == 0 and "1 pictures of pictures are not named in p.jsonl and were not scored" in out
    found = lines(tmp_path)
    assert [(line["file"], line["prompt"]) for line in found] == pairs
    assert list(found[0]) == ["file", "prompt", "clipscore", "shapes"]
    wanted = scored([pictures[f] for f, _ in pairs], [p for _, p in pairs])
    np.testing.assert_allclose([float(line["clipscore"]) for line in found], wanted, rtol=1e-5)


def test_a_line_names_its_rewards(command, pictures, tmp_path):
    """A host reward sees the pictures that ask for it; other cells are empty, and means are over those that ask."""
    (tmp_path / "seen.py").write_text(
        "HOST = True\n\ndef a(images, prompts):\n    assert 'x' not in prompts\n    return list(map(len, prompts))\n\n"
        "def b(images, prompts):\n    return [0.5] * len(prompts)\n"
    )
    rows = [{"file": name, "prompt": p} for name, p in zip(pictures, ("x", "four", "sixsix"), strict=True)]
    rows[0]["rewards"], rows[1]["rewards"] = ["seen.b"], ["seen.a"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = "--prompts=p.jsonl", "--images=pictures"
    code, out, err = command("--config.reward=seen.a,seen.b", *words)
    assert (code, err) == (0, "")
    assert [(line["seen.a"], line["seen.b"]) for line in lines(tmp_path)] == [("", "0.5"), ("4", ""), ("6", "0.5")]
    assert out.splitlines()[-2].split() == ["mean", "5.0000", "0.5000"]
    code, _, err = command("--config.reward=seen.b", *words)
    assert code == 2 and "the prompt 'four' asks for reward 'seen.a', which is not configured" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*CLIP, "--prompts=p.txt"), "needs --prompts=FILE and --images=DIR"),
        (("--prompts=p.txt", "--images=pictures"), "no reward is named: give --config.reward=NAME"),
        (("--config.reward=clipscore", "--prompts=p.txt", "--images=pictures"), "needs the folder of a CLIP model"),
        ((*CLIP, "--prompts=q.txt", "--images=pictures"), "q.txt does not exist"),
        ((*CLIP, "--prompts=two.txt", "--images=pictures"), "two.txt has 2 prompts and pictures 3 pictures"),
        ((*CLIP, "--prompts=gap.txt", "--images=pictures"), "gap.txt, line 2: is blank"),
        ((*CLIP, "--prompts=void.txt", "--images=pictures"), "void.txt holds no prompts"),
        ((*CLIP, "--prompts=none.jsonl", "--images=pictures"), "pictures/z.png does not exist"),
        ((*CLIP, "--prompts=bare.jsonl", "--images=pictures"), 'bare.jsonl, line 1: no "file"'),
        ((*CLIP, "--prompts=p.txt", "--images=nowhere"), "--images=nowhere is not a folder"),
        ((*CLIP, "--prompts=p.txt", "--images=empty"), "--images=empty holds no picture"),
        ((*CLIP, "--prompts=p.txt", "--images=broken"), "broken/cut.png cannot be read as a picture"),
        ((*CLIP, "--prompts=p.txt", "--images=deep"), "deep/deep.png has more than 8 bits a channel"),
        ((*CLIP, "--prompts=p.txt", "--images=pictures", "--devices=2"), "--mode=score uses one device"),
        (("--config.reward=shapes", "--prompts=p.txt", "--images=pictures"), "cannot score pictures of 40x64"),
        (("--config.reward=shapes", "--prompts=cat.txt", "--images=pictures"), "shapes cannot read a prompt"),
    ],
)
def test_what_is_wrong_is_one_line(command, pictures, tmp_path, words, message):
    for name, text in (
        ("two.txt", "a\nb\n"),
        ("gap.txt", "a\n\nb\n"),
        ("void.txt", "\n"),
        ("none.jsonl", '{"file": "z.png", "prompt": "a"}\n'),
        ("bare.jsonl", '{"prompt": "a"}\n'),
        ("cat.txt", "a cat\n" * 3),
    ):
        (tmp_path / name).write_text(text)
    for name in ("empty", "broken", "deep"):
        (tmp_path / name).mkdir()
    whole = (tmp_path / "pictures" / "a.png").read_bytes()
    for i in range(3):
        (tmp_path / "broken" / ("cut.png" if i == 1 else f"{i}.png")).write_bytes(whole[: len(whole) // (1 + (i == 1))])
        (tmp_path / "deep" / f"{i}.png").write_bytes(whole)
    (tmp_path / "deep" / "0.png").unlink()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep" / "deep.png")
    code, _, err = command(*words)
    assert code == 2 and err.startswith("error: ") and message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_long_prompts_are_shortened_in_the_table_only():
    rows = score.table([score.Picture("a.png", {"prompt": "x" * 60}, (1, 1))], {"nice": np.ones(1, np.float32)})
    assert "x" * 37 + "...  " in rows[1] and len({len(row) for row in rows}) == 1
