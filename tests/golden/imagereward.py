"""The image-reward package's own scores of a small random model, in imagereward.json beside this file.

    pip install --no-deps image-reward==1.5 fairscale==0.4.13 timm torchvision    into a copy of the tests' environment
    python tests/golden/imagereward.py

transformers 4.49 runs the package as it is; for 5 the names that it imports and calls are put back. Weights, pictures
and prompts are drawn here from numpy seeds, so only what comes out is stored. test_imagereward.py compares.
"""

import importlib
import json
import sys
import tempfile
import types
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_suffix(".json")
PROMPTS = (
    "a red circle left of a blue square",
    "Déjà-vu: two [ENC] triangles, [PAD] and 日本",
    "an area " + "and more words than fit here " * 9,
)
SHAPES = {"square": (48, 48), "as it is": (32, 32), "wide": (40, 69), "tall": (65, 40), "small": (20, 20)}
VISION = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
VISION |= {"image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
TEXT |= {"max_position_embeddings": 40, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "add_cross_attention": True}


def vocabulary() -> list[str]:
    """Uncased BERT's in small: specials, characters in and at the start of words, a few words and ends of words."""
    letters = [chr(i) for i in range(33, 127) if not chr(i).isupper()] + [*"ßøıﬁ’“”…—€日本"]
    words = "a an and area blue circle fit here left more of red square than triangle two words don mask pad"
    inner = [f"##{letter}" for letter in letters if letter.isalnum() and letter < "日"]
    ends = ("##s", "##ing", "##ngle", "##ircle", "##rea", "##t")
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys([*letters, *words.split(), *inner, *ends])]


def images(height: int, width: int) -> np.ndarray:
    """Two for each prompt, f32 [0, 1]; smooth, with an edge, and noise."""
    rng = np.random.default_rng(height * 100 + width)
    y, x = np.mgrid[:height, :width][..., None] / max(height, width)
    waves = np.stack([np.sin(rng.uniform(2, 20, 3) * x + rng.uniform(2, 20, 3) * y) for _ in range(2 * len(PROMPTS))])
    noise = rng.normal(0, 0.1, waves.shape) + np.where(x > 0.4, 0.5, 0.0)
    return np.clip(0.5 + 0.4 * waves + noise, 0, 1).astype(np.float32)


def write_config(folder: Path) -> None:
    """med_config.json and vocab.txt."""
    words = vocabulary()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    config = {**TEXT, "vocab_size": len(words) + 2, "encoder_width": 768, "vision_config": VISION}
    (folder / "med_config.json").write_text(json.dumps(config))


def draw(shapes: dict[str, list[int]], seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under the package's names: norms about 1, matrices that keep the size of what passes through."""
    rng, found = np.random.default_rng(seed), {}
    for key, shape in sorted(shapes.items()):
        if key.endswith("position_ids"):
            found[key] = np.arange(shape[1])[None]
            continue
        table, kernel = "embed" in key and "proj" not in key and "LayerNorm" not in key, len(shape) > 1
        spread = 0.5 if table else 1.15 / np.prod(shape[1:]) ** 0.5 if kernel else 0.2
        centre = 1.0 if not kernel and key.endswith("weight") else 0.0
        found[key] = rng.normal(centre, spread, shape).astype(np.float32)
    return found


def build(folder: Path, whole: bool = False):
    """The package's ImageReward with the folder's vocabulary, and small, for which its code knows no choice; or whole.

    Raises ImportError where the package is not installed. `import ImageReward` itself would want OpenAI's clip, which
    is on no index, so the modules that score are imported past it.
    """
    root = next((Path(p) / "ImageReward" for p in sys.path if (Path(p) / "ImageReward" / "models").is_dir()), None)
    if root is None:
        raise ImportError("image-reward is not installed")
    for name in ("", ".models", ".models.BLIP"):
        package = types.ModuleType("ImageReward" + name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules["ImageReward" + name] = package
    _old_names()
    pretrain, vit, package = (
        importlib.import_module(f"ImageReward.{name}")
        for name in ("models.BLIP.blip_pretrain", "models.BLIP.vit", "ImageReward")
    )
    pretrain.init_tokenizer = lambda: tokenizer(folder)
    if whole:
        return package.ImageReward(str(folder / "med_config.json")).eval()
    sizes = {"embed_dim": VISION["hidden_size"], "depth": VISION["num_hidden_layers"], "patch_size": 8, "img_size": 32}
    tower = vit.VisionTransformer(num_heads=VISION["num_attention_heads"], **sizes)
    create, pretrain.create_vit = pretrain.create_vit, lambda *args: (tower, VISION["hidden_size"])
    head, package.MLP = package.MLP, lambda width: head(TEXT["hidden_size"])
    model = package.ImageReward(str(folder / "med_config.json")).eval()
    pretrain.create_vit, package.MLP = create, head
    model.preprocess = package._transform(VISION["image_size"])
    return model


def tokenizer(folder: Path):
    """BERT's: under transformers 4 the first implementation, in Python, under 5 the one in Rust."""
    import transformers

    file = folder / "vocab.txt"
    old = transformers.__version__.startswith("4.")
    words = {word: i for i, word in enumerate(file.read_text(encoding="utf-8").splitlines())}
    made = transformers.BertTokenizer(str(file)) if old else transformers.BertTokenizer(vocab=words)
    made.add_special_tokens({"bos_token": "[DEC]"})
    made.add_special_tokens({"additional_special_tokens" if old else "extra_special_tokens": ["[ENC]"]})
    return made


def _old_names() -> None:
    """What transformers 5 no longer has."""
    import torch
    from transformers import modeling_utils, pytorch_utils

    for name in ("apply_chunking_to_forward", "prune_linear_layer", "find_pruneable_heads_and_indices"):
        if not hasattr(modeling_utils, name):
            setattr(modeling_utils, name, getattr(pytorch_utils, name, None))
    model = modeling_utils.PreTrainedModel
    if not hasattr(model, "get_head_mask"):
        model.get_head_mask = lambda self, mask, layers, *_: [None] * layers
        model.invert_attention_mask = lambda self, mask: (
            (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        )
        model.all_tied_weights_keys = {}


def make(folder: Path, seed: int = 0) -> dict:
    """Names and shapes of the package's weights; its scores of the pictures of each shape; its ids of NASTY."""
    import torch
    import transformers

    model = build(folder)
    shapes = {key: list(x.shape) for key, x in model.state_dict().items()}
    model.load_state_dict({key: torch.tensor(x) for key, x in draw(shapes, seed).items()})
    scores = {name: score(model, images(*shape)) for name, shape in SHAPES.items()}
    tokens = model.blip.tokenizer(list(NASTY), padding="max_length", truncation=True, max_length=35)
    tokens = {"ids": tokens["input_ids"], "mask": tokens["attention_mask"]}
    return {"transformers": transformers.__version__, "shapes": shapes, "scores": scores, "tokens": tokens}


def score(model, pictures: np.ndarray) -> list[float]:
    """The package's own score(prompt, picture)."""
    import torch
    from PIL import Image

    with torch.no_grad():
        levels = [Image.fromarray(np.round(picture * 255).astype(np.uint8)) for picture in pictures]
        return [model.score(PROMPTS[i * len(PROMPTS) // len(levels)], level) for i, level in enumerate(levels)]


NASTY = (
    "",
    "   ",
    "Plain words, and more.",
    "“curly” ‘quotes’ — dash … don’t",
    "&amp; &lt;b&gt; &#39;entities&#39;",
    "emoji 🙂👩‍👩‍👧 two",
    "日本の area and 한국어",
    "Déjà vu, Ångström ø ß İI ﬁt",
    "[ENC] [DEC] [CLS] [SEP] [PAD] [MASK] [UNK] [enc] [ PAD ]",
    "tab\tnew\nline\r\x00null\x07bell\u200bzero\u00a0space\u00ad \ufeff \ufffd",
    "w" * 101 + " " + "w" * 100,
    "words " * 60,
    "a_b-c/d.e@f#g$1,000.50%^&*(){}|~`",
    "triangles circles squaring ##s #s",
)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        write_config(Path(name))
        FILE.write_text(json.dumps(make(Path(name))) + "\n")
