"""What open_clip and transformers make of captions and of small random CLIPs; the tests need neither's vocabulary.

    python -m tests.golden.clip          in an environment with open_clip_torch (3.3.0 here), torch and transformers

writes beside itself tokens.json, open_clip.json and clip_tokenizer/, the part of CLIP's vocabulary that these captions
use, under its true ids. Weights are drawn from the names of the parameters, so that none need to be kept.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
TOKENS, TOWERS, TOKENIZER = HERE / "tokens.json", HERE / "open_clip.json", HERE / "clip_tokenizer"
START, END = "<|startoftext|>", "<|endoftext|>"
CAPTIONS = [
    "a photo of a cat",
    "",
    "   ",
    "“curly” ‘quotes’, don’t",
    "DON'T SHOUT, IT'S 'LL and we'RE",
    "&amp;lt;b&amp;gt; caf&eacute; &quot;x&quot; &#x65;&#x301;",
    "🎨 paint 👩‍👩‍👧‍👦 ✨",
    "一只猫坐在桌子上, 猫",
    "ﬁne ﬀ ＦＵＬＬ ｗｉｄｔｈ ½ ² Ⅷ 3.14",
    "sÃ©ance â€œquotedâ€ \u001b[31m",
    "<|endoftext|> <end_of_text>!<start_of_text>x",
    "tab\tnew\nline\u00a0nbsp\u3000wide",
    "Ελληνικά Русский العربية हिन्दी ไทย İstanbul",
    "--- *** ((a)) http://x.y/?a=b&c=d",
    "a red cube on a blue sphere " * 20,
    "x" * 300,
]
CONFIGS = {
    "gelu": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 3, "width": 160, "head_width": 80, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
    },
    "quick_gelu": {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    },
}
SHAPES = ((48, 48), (32, 32), (40, 64))


def pictures(shape: tuple[int, int]) -> np.ndarray:
    """Four, two of each of the first and the fourth caption; f32 [0, 1]."""
    return np.random.default_rng(0).uniform(size=(4, *shape, 3)).astype(np.float32)


def weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """f32 by key: matrices keep the size of what passes through, norms' gains are near 1."""

    def draw(key: str, shape: Sequence[int]) -> np.ndarray:
        noise = np.random.default_rng(zlib.crc32(key.encode())).normal(size=shape)
        if len(shape) > 1:
            fan_in = shape[0] if key in ("text_projection", "visual.proj") else np.prod(shape[1:])
            return noise / np.sqrt(fan_in)
        return (3.0 if not shape else float(key.endswith("weight"))) + 0.2 * noise

    return {key: np.asarray(draw(key, shape), np.float32) for key, shape in shapes.items()}


def pixels(images: np.ndarray, size: int) -> torch.Tensor:
    """HPSv2's: torch's bicubic of the long edge, black around it, standardised; NHWC -> NCHW."""
    x = torch.tensor(images).permute(0, 3, 1, 2)
    scale = size / max(x.shape[2:])
    if scale != 1:
        inner = [round(n * scale) for n in x.shape[2:]]
        x = torch.nn.functional.interpolate(x, inner, mode="bicubic", antialias=True)
    down, right = (size - n for n in x.shape[2:])
    x = torch.nn.functional.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return (x - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1)


@torch.no_grad()
def tower(config: Mapping) -> dict:
    """The shapes of open_clip's parameters, and the scores of `pictures` by its network, resize and tokenizer."""
    import open_clip

    model = open_clip.CLIP(**config, output_dict=True).eval()
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict({key: torch.tensor(value) for key, value in weights(shapes).items()})
    text = model.encode_text(open_clip.tokenize([CAPTIONS[0], CAPTIONS[3]]), normalize=True)
    scores = {}
    for shape in SHAPES:
        x = pixels(pictures(shape), config["vision_cfg"]["image_size"])
        cosines = model.encode_image(x, normalize=True) @ text.T
        scores["x".join(map(str, shape))] = cosines[range(4), [0, 0, 1, 1]].tolist()
    return {"config": config, "shapes": shapes, "scores": scores}


def tokens() -> tuple[list[dict], dict[str, int], list[tuple[str, str]]]:
    """Both flavours' ids of each of CAPTIONS without the padding, and the tokens and merges that they use."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    ours, used = SimpleTokenizer(), set()

    class Ranks(dict):
        """Notes the merges that are made: before one is, it is looked up here."""

        def __contains__(self, pair):
            found = super().__contains__(pair)
            used.update([pair] * found)
            return found

    ours.bpe_ranks = Ranks(ours.bpe_ranks)
    merges = list(ours.bpe_ranks)
    vocab = {token: i for token, i in ours.encoder.items() if i < 49406} | {START: 49406, END: 49407}
    theirs = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    plain = theirs.backend_tokenizer
    for text in CAPTIONS:
        for word, _ in plain.pre_tokenizer.pre_tokenize_str(plain.normalizer.normalize_str(text)):
            ours.bpe(word)
    mine = [row[: np.flatnonzero(row == 49407)[-1] + 1].tolist() for row in ours(CAPTIONS).numpy()]
    other = theirs(CAPTIONS, truncation=True, max_length=77)["input_ids"]
    rows = zip(CAPTIONS, mine, other, strict=True)
    found = [{"caption": text, "open_clip": a, "transformers": b} for text, a, b in rows]
    kept = {"".join(pair) for pair in used}
    part = {token: i for token, i in vocab.items() if i < 512 or token in kept or i > 49405}
    return found, part, [pair for pair in merges if pair in used]


def main() -> None:
    found, vocab, merges = tokens()
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in found)
    TOKENS.write_text(f"[\n{rows}\n]\n", encoding="utf-8")
    TOKENIZER.mkdir(exist_ok=True)
    (TOKENIZER / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (TOKENIZER / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": START, "eos_token": END}
    config |= {"unk_token": END, "pad_token": END}
    (TOKENIZER / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    TOWERS.write_text(json.dumps({name: tower(config) for name, config in CONFIGS.items()}) + "\n")


if __name__ == "__main__":
    main()
