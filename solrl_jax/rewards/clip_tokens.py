"""Captions -> CLIP's token ids, in two variants: one vocabulary, two ways to clean text.

transformers' variant (CLIPScore, PickScore) collapses spaces and makes lower case. open_clip's (HPSv2) first repairs
the text with ftfy, so that curly quotes become straight, and decodes HTML entities. The vocabulary is the user's file
or the hub's: vocab.json and merges.txt, or tokenizer.json, of any CLIP; for open_clip's variant also its own .txt.gz.
"""

import functools
import gzip
import html
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from solrl_jax.models.text import ClipTextConfig, check_merges, contents, read_tokenizer
from solrl_jax.structs import WeightsError
from solrl_jax.weights import hub

Tokens = dict[str, Int[np.ndarray, "G L"]]  # {"ids": ids}
HUB_ID = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Its tokenizer is used for weights without one: PickScore and HPSv2 were trained from this model."""
GZIP = "bpe_simple_vocab_16e6.txt.gz"
TOKENIZERS = ("tokenizer.json", "vocab.json")


def find(folder: str | Path, also: Sequence[str] = ()) -> str:
    """The folder itself if it holds a tokenizer, one of TOKENIZERS or `also`, else HUB_ID's, fetched once."""
    names = (*TOKENIZERS, *also)
    if any((Path(folder) / name).is_file() for name in names):
        return str(Path(folder).resolve())
    try:
        return str(hub.model(HUB_ID, ("vocab.json", "merges.txt", "tokenizer_config.json"), ()).resolve())
    except WeightsError as e:
        raise WeightsError(
            f"{folder} holds no tokenizer: put vocab.json and merges.txt of any CLIP there, as of "
            f"openai/clip-vit-large-patch14{''.join(f', or {name}' for name in also)} ({e})"
        ) from e


def check(cfg: ClipTextConfig, folder: str, count: int, end: int) -> None:
    """WeightsError if tokenizer and weights do not fit: ids would exceed the embeddings, or no id would be the end."""
    if count > cfg.vocab_size or cfg.eos_token_id not in (2, end):
        raise WeightsError(
            f"{folder}: the tokenizer has {count} tokens and ends with {end}, "
            f"but the model's config says vocab_size {cfg.vocab_size} and eos_token_id {cfg.eos_token_id}"
        )


# ---- transformers' variant


FILES = ("vocab.json", "merges.txt", "tokenizer.json", "*_config.json", "special_tokens_map.json", GZIP)


def hf_tokenizer(folder: str) -> Any:
    """transformers' CLIPTokenizer of a folder that holds its files; cached by their content."""
    return _hf_tokenizer(folder, contents(Path(folder), *FILES))


@functools.lru_cache
def _hf_tokenizer(folder: str, digest: str) -> Any:
    from transformers import CLIPTokenizer  # seconds to import

    found = read_tokenizer(CLIPTokenizer, folder)
    check_merges(found, folder)
    return found


def check_hf(cfg: ClipTextConfig, folder: str) -> None:
    tokenizer = hf_tokenizer(folder)
    check(cfg, folder, len(tokenizer), tokenizer.eos_token_id)


def hf(folder: str, length: int, prompts: Sequence[str]) -> Tokens:
    """Start, at most length - 2 tokens, end; padded with the end token."""
    how = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "np"}
    return {"ids": hf_tokenizer(folder)(list(prompts), **how)["input_ids"].astype(np.int32)}


# ---- open_clip's variant

_START, _END = "<start_of_text>", "<end_of_text>"  # a caption may contain these as words
_WORDS = rf"{_START}|{_END}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+"


class Vocabulary(NamedTuple):
    """A byte-pair encoding (tokenizers.models.BPE), the start and end ids, and the number of tokens."""

    bpe: Any
    start: int
    end: int
    size: int


def open_clip(folder: str, length: int, prompts: Sequence[str]) -> Tokens:
    """Start, the tokens, end; truncated to `length`, with the end as the last token; padded with 0."""
    vocabulary = read_vocabulary(folder)
    out = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(out, prompts, strict=True):
        ids = [vocabulary.start, *_encode(vocabulary, clean(prompt)), vocabulary.end][:length]
        row[: len(ids)] = ids
        row[len(ids) - 1] = vocabulary.end
    return {"ids": out}


def check_open_clip(cfg: ClipTextConfig, folder: str) -> None:
    vocabulary = read_vocabulary(folder)
    check(cfg, folder, vocabulary.size, vocabulary.end)


def clean(text: str) -> str:
    """The text repaired, HTML entities decoded (twice, as they may be escaped twice), single spaces, lower case."""
    import ftfy  # only HPSv2 needs it

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def _encode(vocabulary: Vocabulary, text: str) -> list[int]:
    import regex  # re does not know \p{L}

    special, ids = {_START: vocabulary.start, _END: vocabulary.end}, []
    for word in regex.findall(_WORDS, text, regex.IGNORECASE):
        if word in special:
            ids.append(special[word])
        else:
            spelled = "".join(byte_alphabet()[byte] for byte in word.encode())
            ids += [token.id for token in vocabulary.bpe.tokenize(spelled)]
    return ids


def read_vocabulary(folder: str) -> Vocabulary:
    """From open_clip's file if the folder has it, else from transformers' files; cached by their content."""
    return _vocabulary(folder, contents(Path(folder), *FILES))


@functools.lru_cache
def _vocabulary(folder: str, digest: str) -> Vocabulary:
    from tokenizers.models import BPE

    if (Path(folder) / GZIP).is_file():
        vocab, merges, start, end = _read_gzip(Path(folder) / GZIP)
    else:
        tokenizer = hf_tokenizer(folder)
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        vocab, merges = model["vocab"], [(a, b) for a, b in model["merges"]]
        start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    return Vocabulary(BPE(vocab, merges, end_of_word_suffix="</w>"), start, end, max(vocab.values()) + 1)


def _read_gzip(file: Path) -> tuple[dict[str, int], list[tuple[str, str]], int, int]:
    """Ids in CLIP's order: bytes, bytes that end a word, merges (the first 48,894 of the file's), start, end."""
    try:
        lines = gzip.decompress(file.read_bytes()).decode().split("\n")
        merges = [(a, b) for a, b in (line.split() for line in lines[1 : 49152 - 256 - 2 + 1] if line)]
    except (OSError, EOFError, zlib.error, ValueError) as e:
        raise WeightsError(f"{file} is not open_clip's vocabulary ({e!r}): download it again") from e
    letters = byte_alphabet().values()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges), _START, _END]
    return {token: i for i, token in enumerate(tokens)}, merges, len(tokens) - 2, len(tokens) - 1


@functools.cache
def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable characters for the 256 bytes: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
