"""Both flavours of CLIP's tokenizer against ids that open_clip and transformers gave, and live where they are here."""

import gzip
import json
import random
import shutil

import numpy as np
import pytest

from configs import tiny
from solrl_jax.models import flux, folders
from solrl_jax.models.text import ClipTextConfig
from solrl_jax.rewards import clip_tokens
from solrl_jax.structs import WeightsError
from solrl_jax.weights import hub
from tests.golden import clip

GOLDEN = json.loads(clip.TOKENS.read_text(encoding="utf-8"))
FOLDER = str(clip.TOKENIZER)
IDS = {"open_clip": (clip_tokens.open_clip, 0), "transformers": (clip_tokens.hf, 49407)}


@pytest.mark.parametrize("flavour", IDS)
@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: ascii(row["caption"][:12]))
def test_golden_ids(flavour, row):
    """Padded to 77: with 0 in open_clip's flavour, with the end in transformers'."""
    tokenize, pad = IDS[flavour]
    ids = tokenize(FOLDER, 77, [row["caption"]])["ids"]
    assert (ids.shape, ids.dtype) == ((1, 77), np.int32)
    assert ids[0].tolist() == row[flavour] + [pad] * (77 - len(row[flavour]))


def test_where_the_flavours_differ():
    """Of 16 captions those with curly quotes, entities, ligatures, mojibake, or a special token spelled out."""
    differ = [i for i, row in enumerate(GOLDEN) if row["open_clip"] != row["transformers"]]
    assert differ == [3, 5, 8, 9, 10]
    assert [len(row["open_clip"]) for row in GOLDEN if len(row["caption"]) > 100] == [77, 77]
    assert GOLDEN[1]["open_clip"] == GOLDEN[2]["open_clip"] == [49406, 49407]


def test_clean():
    assert clip_tokens.clean("  “A”\n&amp;amp;  B\u00a0") == '"a" & b'


def test_shorter_texts_are_cut_with_their_end():
    ids = clip_tokens.open_clip(FOLDER, 5, ["a photo of a cat", "a cat"])["ids"]
    assert ids.tolist() == [[49406, 320, 1125, 539, 49407], [49406, 320, 2368, 49407, 0]]


def write_gzip(folder, merges):
    lines = ['"bpe_simple_vocab_16e6.txt#version: 0.2', *merges, ""]
    (folder / clip_tokens.GZIP).write_bytes(gzip.compress("\n".join(lines).encode()))


def test_open_clips_own_file(tmp_path):
    """Ids: 256 bytes, 256 that end a word, the merges, start, end."""
    write_gzip(tmp_path, ["c a", "ca t</w>"])
    ids = clip_tokens.open_clip(str(tmp_path), 8, ["cat Ca<end_of_text>"])["ids"]
    c, a_end = ord("c") - ord("!"), 256 + ord("a") - ord("!")
    assert ids.tolist() == [[514, 513, c, a_end, 515, 515, 0, 0]]
    cfg = ClipTextConfig(vocab_size=515, eos_token_id=2)
    with pytest.raises(WeightsError, match=r"the tokenizer has 516 tokens and ends with 515, but .* vocab_size 515"):
        clip_tokens.check_open_clip(cfg, str(tmp_path))
    (tmp_path / clip_tokens.GZIP).write_bytes(b"\x1f\x8b\x08cut")
    with pytest.raises(WeightsError, match=r"16e6.txt.gz is not open_clip's vocabulary .*download it again"):
        clip_tokens.read_vocabulary(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "cut", "words"),
    [
        ("merges.txt", 0.0, r"no merge makes 'in' and 172 other words of its vocabulary, so merges\.txt is cut or"),
        ("merges.txt", 0.5, r"(no merge makes|transformers cannot read its tokenizer \()"),
        ("vocab.json", 0.5, r"transformers cannot read its tokenizer \(.*\): download it again"),
        ("tokenizer.json", 0.5, r"transformers cannot read its tokenizer \(.*\): download it again"),
        ("tokenizer_config.json", 0.5, r"transformers cannot read its tokenizer \(.*\): download it again"),
    ],
)
def test_a_tokenizer_that_is_cut(tmp_path, name, cut, words):
    """Both variants; with an empty merges.txt every word was silently spelled in letters."""
    found = clip_tokens.hf_tokenizer(FOLDER)
    shutil.copytree(FOLDER, tmp_path / "mine")
    if name == "tokenizer.json":
        found.save_pretrained(tmp_path / "mine")
    file = tmp_path / "mine" / name
    if not file.exists():
        file.write_text('{"model_max_length": 77}')
    file.write_bytes(file.read_bytes()[: int(cut * file.stat().st_size)])
    for tokenize in (clip_tokens.hf, clip_tokens.open_clip):
        with pytest.raises(WeightsError, match=rf"^{tmp_path / 'mine'}: {words}"):
            tokenize(str(tmp_path / "mine"), 77, ["a photo of a cat"])


def test_a_pipelines_tokenizer_that_is_cut(tmp_path):
    for name in ("tokenizer", "text_encoder"):
        shutil.copytree(tiny.WORLD / "pipeline" / name, tmp_path / name)
    assert len(folders.tokenizers(str(tmp_path), flux.ENCODERS[:1])) == 1
    file = tmp_path / "tokenizer" / "merges.txt"
    file.write_text("\n".join(file.read_text(encoding="utf-8").splitlines()[:-1]), encoding="utf-8")
    with pytest.raises(WeightsError, match=r"tokenizer: no merge makes '\S+' and 0 other words of its vocabulary"):
        folders.tokenizers(str(tmp_path), flux.ENCODERS[:1])


def test_where_the_tokenizer_is(tmp_path, monkeypatch):
    """Beside the weights; else that of the model that PickScore and HPSv2 came from."""
    with pytest.raises(WeightsError, match=r"no tokenizer: put vocab.json and merges.txt .*, or bpe_simple_vocab_16e6"):
        clip_tokens.find(tmp_path, also=(clip_tokens.GZIP,))
    monkeypatch.setattr(hub, "model", lambda name, small, heavy: tmp_path / "hub" / name)
    assert clip_tokens.find(tmp_path) == str(tmp_path / "hub" / clip_tokens.HUB_ID)
    write_gzip(tmp_path, [])
    assert clip_tokens.find(tmp_path) != clip_tokens.find(tmp_path, also=(clip_tokens.GZIP,)) == str(tmp_path)
    (tmp_path / "vocab.json").touch()
    assert clip_tokens.find(tmp_path) == str(tmp_path)


# --- where open_clip_torch is installed -----------------------------------------------------------------------------


def test_goldens_are_still_what_open_clip_gives():
    pytest.importorskip("open_clip")
    found, vocab, merges = clip.tokens()
    assert found == GOLDEN
    assert vocab == json.loads((clip.TOKENIZER / "vocab.json").read_text(encoding="utf-8"))
    assert len(merges) == len((clip.TOKENIZER / "merges.txt").read_text(encoding="utf-8").splitlines()) - 1


def test_random_texts_with_the_whole_vocabulary():
    """2000 texts of letters, marks, symbols and emoji from all over Unicode: not an id differs."""
    tokenizer = pytest.importorskip("open_clip.tokenizer")
    rng = random.Random(0)
    ranges = [(32, 126)] * 4 + [(0xA0, 0x5FF), (0x900, 0xFFF), (0x2000, 0x2BFF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF)]
    texts = ["".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 60))) for _ in range(2000)]
    folder = tokenizer.default_bpe().removesuffix(f"/{clip_tokens.GZIP}")
    ours = clip_tokens.open_clip(folder, 77, texts)["ids"]
    assert int(np.sum(ours != tokenizer.SimpleTokenizer()(texts).numpy())) == 0
