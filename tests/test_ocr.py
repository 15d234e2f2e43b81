"""The OCR rewards: the formula's golden values, and pictures with drawn text where the reader is installed."""

import sys
import threading
import types

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from solrl_jax import config, rewards
from solrl_jax.plan import shapes
from solrl_jax.rewards import ocr, ocr_strict, own
from solrl_jax.run import assemble, data
from tests.toy_world import world


def drawn(text: str, side: int, size: int, ink: str = "black", paper: str = "white") -> np.ndarray:
    """A picture of `side` with a text, a little right of its left edge, in letters of `size`."""
    image = Image.new("RGB", (side, side), paper)
    font = ImageFont.load_default(size)
    ImageDraw.Draw(image).multiline_text((side // 16, side // 4), text, fill=ink, font=font)
    return np.asarray(image)


def rows_of(*prompts: str) -> list[dict]:
    return [{"prompt": prompt} for prompt in prompts]


# --- the formula ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "score", "strict"),
    [
        ("SPRING COLLECTION 2024", 1, 1),
        ("Spring Collecton 2024", 0.95, 0.95),
        ("xx spring collection 2024 yy", 1, 0.8),
        ("", 0, 0),
        ("Summer 2023", 0.25, 0.25),
        ("Spring", 0.3, 0.3),
        ("a" * 44, 0, 0),
        ("ＳＰＲＩＮＧ\u00a0collection\n2024", 1, 1),  # full width letters, spaces of other kinds
    ],
)
def test_golden_values(read, score, strict):
    """The formula of `ocr` by hand; |b| is 20."""
    text = "Spring Collection 2024"
    assert ocr.shown(read, text) == pytest.approx(score, abs=1e-12)
    assert ocr.shown(read, text, strict=True) == pytest.approx(strict, abs=1e-12)


def test_distance():
    for a, b, d in (("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)):
        assert ocr.distance(a, b) == ocr.distance(b, a) == d


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": 'a sign that says "OPEN"'}, "OPEN"),
        ({"prompt": 'one "two" three "four"'}, "two"),
        ({"prompt": "a sign that says “Grand Opening”"}, "Grand Opening"),
        ({"prompt": 'a sign that says "OPEN"', "text": "Closed"}, "Closed"),
        ({"prompt": "a sign without quotes", "text": "Closed"}, "Closed"),
    ],
)
def test_the_text_that_is_asked_for(row, text):
    assert ocr.target(row) == text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a red circle"},
            "'a red circle' asks for no text that can be read .it has no text in double quotes",
        ),
        ({"prompt": 'an inch: 1"'}, "it has no text in double quotes, its row no"),
        ({"prompt": 'a sign " " on a wall'}, "it has no text in double quotes"),
        ({"prompt": 'a "b"', "text": "  "}, """its row has "text": '  '"""),
        ({"prompt": 'a "b"', "text": 3}, 'its row has "text": 3'),
    ],
)
def test_a_prompt_without_text_is_refused(row, message):
    with pytest.raises(ValueError, match=message) as found:
        ocr.tokenize(["x"], [row])
    assert len(str(found.value).splitlines()) == 1


def test_a_run_names_such_a_prompt_before_it_reads_weights(tmp_path, monkeypatch):
    pytest.importorskip("rapidocr")
    monkeypatch.setattr(assemble, "open_weights", None)
    lines = ('{"prompt": "a sign \\"A1\\""}', '{"prompt": "a poster", "text": "B2"}', '{"prompt": "a cat"}')
    toy = config.override(world(monkeypatch, tmp_path), reward="ocr", prompt_files=str(tmp_path / "p.jsonl"), prompts=2)
    monkeypatch.setattr(rewards, "REWARDS", ("ocr", "dark"))
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    with pytest.raises(config.ConfigError, match="reward ocr cannot read a prompt: 'a cat' asks for no text"):
        assemble.assemble(toy, 1)
    (tmp_path / "p.jsonl").write_text("\n".join(lines[:2]))
    judges = assemble.open_rewards(toy, data.read(toy.prompt_files))
    assert judges.score.on_host and judges.judged.names == ("ocr", "dark")


# --- the reader -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ocr", "ocr_strict"])
def test_without_the_reader_one_line_says_what_to_install(monkeypatch, name):
    for missing in ("rapidocr", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
            patch.setitem(sys.modules, missing, None)
            with pytest.raises(
                config.ConfigError, match=rf"reward {name} needs a reader .*{missing}.*pip install"
            ) as e:
                rewards.load_rewards(name, {})
            assert len(str(e.value).splitlines()) == 1 and "requirements-ocr.txt" in str(e.value)


def test_the_plan_counts_them_without_the_reader(monkeypatch):
    """Rewards on the host have nothing on the devices: no note, no bytes."""
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    cfg = config.override(config.load("tiny"), reward="clipscore:1,ocr:0.5", **{"evaluate.rewards": "ocr_strict"})
    found = shapes.read(cfg, 1)
    assert not any("ocr" in note for note in found.notes)
    assert found.score.names == ("clipscore", "ocr") and found.judged.names == ("clipscore", "ocr", "ocr_strict")
    assert [reward.name for reward in found.judged.on_host] == ["ocr", "ocr_strict"]
    assert found.frozen.rewards["ocr"] == found.towers["ocr_strict"] == {}


def test_they_are_static_arguments_without_weights():
    pytest.importorskip("rapidocr")
    for module, name in ((ocr, "ocr"), (ocr_strict, "ocr_strict")):
        one, two = (module.make(None, "float32") for _ in range(2))
        assert one == two and hash(one[0]) == hash(two[0]) and one[1] == {}
        assert one[0] == module.shapes(None, "float32")[0] and one[0].name == name
    with pytest.raises(config.ConfigError, match="reward 'ocr' runs on the host and reads no path"):
        rewards.load_rewards("ocr", {"ocr": "folder"})


SIGNS = [
    ("Spring Collection 2024", 512, 40, "black", "white"),
    ("Hello World", 512, 70, "yellow", "navy"),
    ("Grand\nOpening", 256, 48, "black", "lightgray"),
    ("STOP", 64, 20, "white", "red"),
    ("Hi 42", 64, 12, "black", "white"),
]


def test_drawn_text_is_read():
    """At several sizes and colours; a text over two lines too."""
    pytest.importorskip("rapidocr")
    for text, *how in SIGNS:
        (read,) = ocr.read(drawn(text, *how)[None])
        assert ocr.plain(read) == ocr.plain(text)


def test_scores_of_drawn_text():
    """Through the same call as in a run: eight bits, pictures with the text, another and none."""
    pytest.importorskip("rapidocr")
    mix, _ = rewards.load_rewards("ocr:1,ocr_strict:0.5", {})
    rows = [{"prompt": 'a sign that says "SALE"'}, {"prompt": "a sign", "text": "SALE TODAY"}]
    pictures = [drawn(text, 128, 18) for text in ("SALE", "SALE TODAY", "", "SALE", "SALE TODAY", "EXIT")]
    tokens = rewards.tokenize(mix, [row["prompt"] for row in rows], rows)
    assert tokens["ocr"].tolist() == tokens["ocr_strict"].tolist() == [0, 1]
    total, parts = rewards.score_on_host(mix, np.stack(pictures).reshape(2, 3, 128, 128, 3), rows)
    np.testing.assert_allclose(parts["ocr"], [[1, 1, 0], [4 / 9, 1, 1 / 9]], rtol=1e-6)
    np.testing.assert_allclose(parts["ocr_strict"], [[1, 0, 0], [4 / 9, 1, 1 / 9]], rtol=1e-6)
    np.testing.assert_allclose(total, parts["ocr"] + 0.5 * parts["ocr_strict"], rtol=1e-6)


def test_a_reading_depends_on_its_picture_alone():
    """Whatever stands beside it in the batch, and from whichever thread."""
    pytest.importorskip("rapidocr")
    pictures = np.stack([drawn(text, 128, 18) for text in ("SALE", "a longer line", "x", "Opening")])
    alone = [ocr.read(picture[None])[0] for picture in pictures]
    assert ocr.read(pictures) == ocr.read(pictures[::-1])[::-1] == alone


def test_a_reader_that_fails_is_no_score(monkeypatch):
    """Neither if it raises, nor if it finds lines and gives none of them."""

    def raises(picture):
        raise RuntimeError("broken model")

    mix = rewards.Score((ocr.shapes(None, "float32")[0],), (1.0,))
    for reader, message in (
        (raises, "RuntimeError: broken model"),
        (lambda picture: object(), "AttributeError: .*txts"),
    ):
        monkeypatch.setattr(ocr, "_engine", lambda reader=reader: reader)
        with pytest.raises(own.RewardError, match=f"reward ocr failed: {message}"):
            rewards.score_on_host(mix, np.zeros((1, 1, 32, 32, 3), np.uint8), rows_of('"a"'))


def test_two_rewards_read_a_picture_once(monkeypatch):
    """Six pictures, six readings. One other picture makes other pictures; so does a call after one that failed."""
    seen, broken = [], []

    def reader(picture):
        seen.append(picture)
        if broken:
            raise RuntimeError("broken model")
        return types.SimpleNamespace(txts=["xax"])

    monkeypatch.setattr(ocr, "_engine", lambda: reader)
    monkeypatch.setattr(ocr, "_mine", threading.local())
    mix = rewards.Score(tuple(module.shapes(None, "float32")[0] for module in (ocr, ocr_strict)), (1.0, 1.0))
    images = np.arange(6 * 8 * 4 * 3, dtype=np.uint8).reshape(2, 3, 8, 4, 3)
    rows = rows_of('"a"', '"xa"')
    _, parts = rewards.score_on_host(mix, images, rows)
    assert len(seen) == 6
    assert parts["ocr"].tolist() == [[1] * 3] * 2 and parts["ocr_strict"].tolist() == [[0] * 3, [0.5] * 3]
    other = images.copy()
    other[1, 2, 7, 3, 2] ^= 1
    rewards.score_on_host(mix, other, rows)
    assert len(seen) == 12
    rewards.score_on_host(mix, other.reshape(2, 3, 4, 8, 3), rows)
    assert len(seen) == 18
    broken.append(True)
    with pytest.raises(own.RewardError, match="reward ocr failed: RuntimeError: broken model"):
        rewards.score_on_host(mix, images, rows)
    broken.clear()
    seen.clear()
    rewards.score_on_host(mix, images, rows)
    assert len(seen) == 6


def test_the_reader_is_given_blue_green_red(monkeypatch):
    """As rapidocr takes arrays; a red word on green is of other brightness otherwise."""
    seen = []
    monkeypatch.setattr(ocr, "_engine", lambda: lambda picture: seen.append(picture) or shown_nothing)
    shown_nothing = types.SimpleNamespace(txts=None)
    assert ocr.read(np.broadcast_to(np.array([200, 100, 0], np.uint8), (2, 8, 8, 3))) == ["", ""]
    assert all(picture[0, 0].tolist() == [0, 100, 200] and picture.flags.c_contiguous for picture in seen)
