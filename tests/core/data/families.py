"""Tokenizers and templates of the published families, made here: nothing is downloaded."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing

TEMPLATES = Path(__file__).parent / "templates"
SPECIAL = {
    "alpaca": (None, "</s>", []),
    "chatml": (None, "<|im_end|>", ["<|im_start|>", "<|im_end|>"]),
    "marked": (None, "<|im_end|>", ["<|im_start|>", "<|im_end|>"]),
    "llama2": ("<s>", "</s>", []),
    "llama3": (
        "<|begin_of_text|>", "<|end_of_text|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "llama3_tools": (
        "<|begin_of_text|>", "<|end_of_text|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "mistral": ("<s>", "</s>", ["[INST]", "[/INST]"]),
    "gemma": ("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "phi3": ("<s>", "<|endoftext|>", ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]),
    "qwen3": (None, "<|im_end|>", ["<|im_start|>", "<|im_end|>"]),
    "zephyr": ("<s>", "</s>", []),
    "vicuna": ("<s>", "</s>", []),
    "deepseek": (
        "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
        ["<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
         "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"],
    ),
}  # fmt: skip
"""BOS, EOS and further special tokens of each family."""
ADDS_BOS = {"phi3", "zephyr", "vicuna", "llama3"}
"""Families whose tokenizer begins a text with BOS; of these, only Llama 3 writes it in its template too."""
TEXT = [
    "The quick brown fox jumps over the lazy dog, and 12 + 30 = 42.\n\nIs it? It is!\n",
    "system user assistant model [INST] ### Instruction: ### Response: USER: ASSISTANT: " * 3,
    "Größe, naïve, 数学, 答え, مرحبا, 🙂🙃, \t\ttabs and   spaces\r\n" * 3,
]


@cache
def family(name: str, template: str | None = None) -> Any:
    """A byte-level tokenizer with the special tokens and the template of a family; its pad token is its EOS."""
    bos, eos, others = SPECIAL[name]
    tokenizer = byte_level(tuple(dict.fromkeys(t for t in (bos, eos, *others) if t)))
    if name in ADDS_BOS:
        begin = TemplateProcessing(f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))])
        tokenizer.backend_tokenizer.post_processor = begin
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = bos, eos, eos
    tokenizer.chat_template = (TEMPLATES / f"{template or name}.jinja").read_text(encoding="utf-8")
    return tokenizer


def byte_level(special: tuple[str, ...], split: str | None = None) -> Any:
    """A byte-level BPE whose tokens may reach over line ends, as those of Llama 3 and Qwen do."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    pattern = split or r"\p{N}{1,3}|\s*[\r\n]+|\s+|[^\s\p{N}]+"
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=list(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    raw.train_from_iterator([*TEXT, "\n\n\n\n \n\n" * 9, "  \n" * 9], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False)
