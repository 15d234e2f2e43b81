"""Tokenizers of a small world, trained on its captions, offline.

Both have the layout of the public ones, so that transformers and diffusers load them from a folder. Every word of the
captions is one token, so sequences are short. Other text also works, as bytes (CLIP) or printable characters (T5).
"""

import itertools
import json
import math
import string
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from solrl_jax.rewards.clip_tokens import byte_alphabet

START, END = "<|startoftext|>", "<|endoftext|>"


def write_clip_tokenizer(folder: str | Path, texts: Iterable[str], length: int = 77) -> int:
    """vocab.json, merges.txt and tokenizer_config.json of a CLIP tokenizer; `length` is its model_max_length.

    Ids in CLIP's order: bytes ("!" is 0), bytes that end a word, merges, start, end. Returns the number of ids.
    """
    from transformers import CLIPTokenizer

    letters = [*byte_alphabet().values()]
    plain = CLIPTokenizer(vocab=_ids([*letters, START, END]), merges=[]).backend_tokenizer
    words = Counter(
        word for text in texts for word, _ in plain.pre_tokenizer.pre_tokenize_str(plain.normalizer.normalize_str(text))
    )
    merges = learn_merges(words)
    merged = dict.fromkeys(a + b for a, b in merges)  # two pairs may spell the same token
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), *merged, START, END]
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "bos_token": START}
    config |= {"eos_token": END, "unk_token": END, "pad_token": END}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(_ids(vocabulary), ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return len(vocabulary)


def learn_merges(words: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding, most frequent pair first, until every word is one symbol.

    Encoding applies the merges in the order in which they were learned, so every word of `words` becomes one token.
    Merges chosen for each word separately would interfere.
    """
    splits = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    merges = []
    while any(len(symbols) > 1 for symbols in splits.values()):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in splits.items():
            for pair in itertools.pairwise(symbols):
                pairs[pair] += words[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        splits = {word: _merged(symbols, best) for word, symbols in splits.items()}
    return merges


def _merged(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    i = 0
    while i < len(symbols):
        both = symbols[i : i + 2] == pair
        out.append("".join(pair) if both else symbols[i])
        i += 2 if both else 1
    return tuple(out)


def write_t5_tokenizer(folder: str | Path, texts: Iterable[str]) -> int:
    """tokenizer.json and tokenizer_config.json of a T5 unigram tokenizer: pad 0, end 1, unknown 2, no sentinels.

    Pieces are the words between spaces (without punctuation at their ends), scored by the logarithm of their share, and
    single characters, cheap enough only where no word fits. Returns how many ids there are.
    """
    from transformers import T5TokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

    texts = list(texts)
    words = Counter(word.strip(string.punctuation) for text in texts for word in text.split())
    words.pop("", None)
    total = sum(words.values())
    ranked = sorted(words, key=lambda word: (-words[word], word))
    pieces = {"▁" + word: math.log(words[word] / total) for word in ranked}
    rare = min(pieces.values(), default=0.0) - 10.0
    letters = sorted(set(string.printable.strip()).union(*texts) - set(string.whitespace))
    pieces = {"▁": rare} | {letter: rare for letter in letters} | pieces
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces.items()]
    T5TokenizerFast(vocab=vocabulary, extra_ids=0).save_pretrained(folder)
    return len(vocabulary)


def _ids(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}
