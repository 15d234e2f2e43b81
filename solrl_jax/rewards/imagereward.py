"""ImageReward: BLIP reads picture and prompt together, a linear head gives the score.

8-bit pictures resized by Pillow's bicubic filter, text as 35 wordpieces of uncased BERT, as in Sol-RL's reference.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from solrl_jax import weights
from solrl_jax.models.layers import F32
from solrl_jax.models.text import contents
from solrl_jax.rewards import blip, preprocess
from solrl_jax.rewards.blip import Blip, BlipConfig
from solrl_jax.rewards.clip_tower import Products
from solrl_jax.structs import Images, Params, PerSample, Reward, WeightsError
from solrl_jax.weights import hub

LENGTH = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072
FILES = ("ImageReward.safetensors", "model.safetensors", "ImageReward.pt")
VOCABULARIES = ("vocab.txt", "tokenizer.json")
HUB_ID = "zai-org/ImageReward"
BERT = "google-bert/bert-base-uncased"


def make(path: str | Path | None, dtype: Any = F32) -> tuple[Reward, Params]:
    """The reward, and its f32 weights, from a .pt or .safetensors file, a folder with one of FILES, or HUB_ID.

    The vocabulary is one of VOCABULARIES beside the file, else BERT's is fetched. The sizes are those of a
    med_config.json beside the file, else the public ones. `dtype` is that of the transformers' products
    (Products.of). The same folder, config and dtype give the same Reward object, as jit's static arguments require.
    """
    if path is None:
        raise WeightsError(f"imagereward needs ImageReward.pt, its folder, or {HUB_ID}")
    file = find(path)
    cfg, words = BlipConfig.read(file.parent), _vocabulary_file(file.parent)
    _check_tokenizer(words, cfg)
    return _reward(words, cfg, Products.of(dtype)), blip.load(file, Blip(cfg))


def shapes(path: str | Path | None, dtype: Any = F32) -> tuple[Reward, Params, Any]:
    """The reward, its weights and one prompt's tokens, the last two as ShapeDtypeStructs; no weights are read."""
    found = hub.here(path, "med_config.json")
    cfg = BlipConfig() if found is None else BlipConfig.read(found.parent if found.is_file() else found)
    ids, mask = (jax.ShapeDtypeStruct((1, LENGTH), kind) for kind in (jnp.int32, jnp.bool_))
    return _reward(str(path), cfg, Products.of(dtype)), blip.shapes(Blip(cfg)), {"ids": ids, "mask": mask}


def find(path: str | Path) -> Path:
    """The file of the weights, from a file, a folder or a name on the hub."""
    if Path(path).is_file():
        return Path(path)
    folder = hub.model(str(path), ("med_config.json", "*.txt"), ("ImageReward.pt",))
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise WeightsError(f"{folder} holds none of {', '.join(FILES)}: get ImageReward.pt from {HUB_ID}")
    return file


@functools.lru_cache
def _reward(words: str, cfg: BlipConfig, how: Products) -> Reward:
    return Reward("imagereward", functools.partial(_tokenize, words), functools.partial(_score, Blip(cfg, *how)))


# ---- text


def _vocabulary_file(folder: Path) -> str:
    """The folder's vocabulary, else BERT's: ImageReward's own folder on the hub has none."""
    for name in VOCABULARIES:
        if (folder / name).is_file():
            return str(folder.resolve() / name)
    try:
        return str(hub.model(BERT, ("vocab.txt",), ()).resolve() / "vocab.txt")
    except WeightsError as e:
        raise WeightsError(f"{folder} holds no {' or '.join(VOCABULARIES)}: put that of {BERT} there ({e})") from e


def _read_vocabulary(file: str) -> dict[str, int]:
    """{wordpiece: id} of vocab.txt or tokenizer.json."""
    if file.endswith(".json"):
        model = weights.read_json(file).get("model")
        found = model.get("vocab") if isinstance(model, dict) else None
        if not isinstance(found, dict) or not all(type(i) is int for i in found.values()):
            raise WeightsError(
                f"{file} has no model.vocab of word: id pairs: ImageReward takes the vocabulary of {BERT}"
            )
        return found
    try:
        lines = Path(file).read_text(encoding="utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as e:
        raise WeightsError(f"{file} is not text in UTF-8 ({e}): ImageReward takes the vocabulary of {BERT}") from e
    return {line: i for i, line in enumerate(lines)}


def _tokenizer(file: str) -> Any:
    """Uncased BERT's tokenizer with BLIP's two added tokens and the user's vocabulary; cached by the file's content."""
    return _read_tokenizer(file, contents(Path(file).parent, Path(file).name))


@functools.lru_cache
def _read_tokenizer(file: str, digest: str) -> Any:
    from transformers import BertTokenizer  # seconds to import

    tokenizer = BertTokenizer(vocab=_read_vocabulary(file))
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "extra_special_tokens": ["[ENC]"]})
    return tokenizer


def _check_tokenizer(file: str, cfg: BlipConfig) -> None:
    """WeightsError for another vocabulary, by its number of words: a cased or multilingual one would score wrongly."""
    vocabulary, tokenizer = _read_vocabulary(file), _tokenizer(file)
    missing = [word for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if word not in vocabulary]
    if missing or len(tokenizer) != cfg.text.vocab_size:
        count = f"{len(tokenizer)} words with [DEC] and [ENC], not {cfg.text.vocab_size}"
        raise WeightsError(
            f"{file} has {f'no {missing[0]}' if missing else count}: ImageReward takes the vocabulary of {BERT}"
        )


def _tokenize(file: str, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """ids int32 and mask bool, both [G, LENGTH]: [CLS], at most 33 wordpieces, [SEP], padding where mask is False.

    The mask is not ids != 0: a prompt may contain the word [PAD].
    """
    how = {"padding": "max_length", "truncation": True, "max_length": LENGTH, "return_tensors": "np"}
    found = _tokenizer(file)(list(prompts), **how)
    return {"ids": found["input_ids"].astype(np.int32), "mask": found["attention_mask"].astype(bool)}


# ---- score


def _score(module: Blip, params: Params, images: Images, tokens: Mapping[str, Array]) -> PerSample:
    """Images f32 [0, 1], B of them for G prompts."""
    pixels = preprocess.pil_bicubic(images.astype(F32), module.cfg.vision.image_size, floor=False)
    pixels = preprocess.standardise(pixels, preprocess.OPENAI_MEAN, preprocess.OPENAI_STD)
    ids, mask = (jnp.asarray(tokens[name]) for name in ("ids", "mask"))
    raw = jnp.asarray(module.apply({"params": params}, pixels, ids, mask))
    return (raw - MEAN) / STD
