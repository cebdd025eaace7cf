"""A model of a hundred thousand weights with a tokenizer of its own, made in a second and without a download."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ptrain.testing.rows import WORDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PADDING, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 400


def make_model(folder: Path) -> Path:
    """Fill `folder` with a tiny Llama, drawn from a fixed seed, and its tokenizer; return the folder."""
    from ptrain.engine import quiet

    quiet()
    import torch

    if not torch.cuda.is_available():
        # DeepSpeed, which transformers imports, would warn that it finds no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(folder)
    padding, _, end = range(3)  # the trainer numbers special tokens first, as they are listed
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=True,
        eos_token_id=end, pad_token_id=padding, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on the words of the made-up rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[PADDING, START, END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    raw.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END, pad_token=PADDING, bos_token=None)
