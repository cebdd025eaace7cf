"""What benchmarks work on: conversations, a tokenizer and models of fixed size, all made here from seeds."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VOCABULARY = 4096
TINY = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
}  # fmt: skip
"""1.9M parameters."""


def messages(path: Path | None, count: int) -> Iterator[dict[str, Any]]:
    """Rows of a file (`.jsonl`, `.jsonl.gz`), again and again; without one, generated ones.

    Those have about 150 tokens, half of them the assistant's.
    """
    if path is not None:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        yield from itertools.islice(itertools.cycle(rows), count)
        return
    from ptrain.data.tasks import generate, task_names

    asked = generate(task_names(), 20 * count, 0, "train")
    drawn = random.Random(0)
    for _ in range(count):
        rows = [[said["content"] for said in row["messages"]] for row in itertools.islice(asked, drawn.randint(1, 9))]
        question = "\n".join(asks for asks, _ in rows)
        answer = "\n".join(f"{asks} {answers}" for asks, answers in rows)
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def written(path: Path | None, count: int) -> Path:
    """Those rows as a plain `.jsonl` file."""
    out = Path(tempfile.mkdtemp()) / "rows.jsonl"
    with out.open("w", encoding="utf-8") as file:
        for row in messages(path, count):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return out


def tokenizer(rows: Path, size: int = VOCABULARY) -> Any:
    """A byte-level BPE trained on the rows, with ptrain's ChatML template."""
    from importlib.resources import files

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    with rows.open(encoding="utf-8") as file:
        texts = [said["content"] for line in itertools.islice(file, 7_473) for said in json.loads(line)["messages"]]
    raw.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = (files("ptrain.data") / "templates" / "chatml.jinja").read_text(encoding="utf-8")
    return made
