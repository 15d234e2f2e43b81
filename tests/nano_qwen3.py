"""A Qwen3 and its tokenizer at a size that compiles in seconds, as transformers itself writes them."""

from pathlib import Path

from oracle import randomise
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

QWEN3 = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,  # 4 x 12 is not hidden_size
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "tie_word_embeddings": True,
}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")
CHAT = (  # what both pipelines use of Qwen3's template: one message of a user, thinking or not
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)


def write_tokenizer(folder: Path) -> int:
    """Qwen2's kind, of the 256 bytes, with few merges. Returns how many tokens it has."""
    words = [*sorted(ByteLevel.alphabet()), "re", "\u0120a", "\u0120re"]
    made = Qwen2Tokenizer(
        vocab={word: i for i, word in enumerate(words)},
        merges=[("r", "e"), ("\u0120", "a"), ("\u0120", "re")],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=131072,
    )
    made.add_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    made.add_tokens([AddedToken(word, special=False, normalized=False) for word in THINK])
    made.chat_template = CHAT
    made.save_pretrained(folder)
    return len(made)


def make(words: int = 100, whole: bool = False, **changes) -> Qwen3Model:
    """With `whole` a Qwen3ForCausalLM, as klein's folder has; its tensors below "model." are the same."""
    kind = Qwen3ForCausalLM if whole else Qwen3Model
    return randomise(kind(Qwen3Config(**{**QWEN3, "vocab_size": words, **changes})), 5)
