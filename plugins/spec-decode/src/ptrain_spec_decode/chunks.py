"""Prompts for offline generation: pieces of the texts of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ptrain import DataError

FILES = {".jsonl": "JsonLinesFiles", ".json": "JsonFiles", ".csv": "CsvFiles", ".parquet": "ParquetFiles",
         ".txt": "TextFiles", ".arrow": "ArrowFiles"}  # fmt: skip
PACKED = {".gz", ".bz2", ".xz", ".zst"}


def load_tokenizer(name: str, chat_template: str | None) -> Any:
    """The tokenizer, as a recipe with `tokenizer.name_or_path` and `tokenizer.chat_template` would have it.

    Raises:
        ModelError: it can't be loaded.
    """
    from ptrain.data.tokenizers import HuggingFaceTokenizer

    config = HuggingFaceTokenizer.Config(type="huggingface", name_or_path=name, chat_template=chat_template)
    run: Any = None  # which only a tokenizer without a name would look at
    return HuggingFaceTokenizer(config).create(run)


def prompts(data: str, tokenizer: Any, length: int, count: int | None, seed: int) -> list[list[int]]:
    """Pieces of `length` tokens of the conversations or texts in `data`, in their order; of shorter ones, the whole.

    Args:
        data: a file, a pattern, a folder, or a data set on the hub.
        count: so many of them, drawn at random; by default all.

    Raises:
        DataError: the rows can't be read, or give fewer prompts.
    """
    import numpy as np

    documents = _documents(data, tokenizer)
    places = [
        (number, start, min(start + length, size))
        for number, size in enumerate(map(int, documents.lengths))
        for start in range(0, max(size - length, 0) + 1, length)
    ]
    if count is not None and count > len(places):
        raise DataError(
            f"`{data}` gives {len(places):,} prompts of {length} tokens, and --count asks for {count:,}",
            fix="lower --count or --prompt-length",
        )
    if count is not None:
        chosen = np.random.default_rng(seed).permutation(len(places))[:count]
        places = [places[at] for at in np.sort(chosen)]
    return [documents.piece(place)[0].tolist() for place in places]


def _documents(data: str, tokenizer: Any) -> Any:
    """The rows of `data` as tokens."""
    from ptrain.data.process import encode_conversations, encode_texts
    from ptrain.data.report import Report

    rows = _rows(data)
    if {"messages", "input_ids"} & set(rows.column_names):
        return encode_conversations(rows, tokenizer, Report(), mask_inputs=False)
    return encode_texts(rows, tokenizer, Report())


def _rows(data: str) -> Any:
    run: Any = None  # these sources read what their own section says
    suffixes = [suffix for suffix in Path(data).suffixes if suffix not in PACKED]
    kind = FILES.get(suffixes[-1]) if suffixes else None
    if kind is None:
        return _of_the_hub(data)
    from ptrain.data.sources import local

    source = getattr(local, kind)
    return source(source.Config(type=suffixes[-1][1:], path=data)).load(run, "train")


def _of_the_hub(name: str) -> Any:
    """The rows of a data set of the hub or of a folder, as conversations, or as texts where it has a column of them."""
    from ptrain.data.sources.huggingface import HuggingFaceInstruct

    class Either(HuggingFaceInstruct):
        def shape(self, dataset: Any) -> Any:
            texts = "text" in dataset.column_names and "messages" not in dataset.column_names
            return dataset if texts else super().shape(dataset)

    run: Any = None
    return Either(Either.Config(type="huggingface_instruct", name_or_path=name)).load(run, "train")
