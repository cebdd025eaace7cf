"""Labels by the bytes of tokens are those by their offsets, and rows that need offsets get them."""

from __future__ import annotations

from typing import Any
from unicodedata import normalize

import pytest
from families import TEXT, byte_level, family
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

from ptrain.data.bytelevel import token_sizes
from ptrain.data.encode import Encoder

PIECES = ["<|im_start|>", "<|im_end|>", "assistant\n", "\n\n", " ", "a", "é", "e\u0301", "\u0340", "数学", "🙂", *TEXT]
rows = st.lists(
    st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), min_size=1, max_size=6), min_size=1, max_size=4
)


def changed(**parts: Any) -> Any:
    """A byte-level tokenizer with another normalizer, pre-tokenizer or post-processor."""
    tokenizer = byte_level(("<|im_start|>", "<|im_end|>"))
    for name, part in parts.items():
        setattr(tokenizer.backend_tokenizer, name, part)
    return tokenizer


def stripping() -> Any:
    """One of whose added tokens takes the white space before it."""
    tokenizer = changed()
    tokenizer.add_tokens([AddedToken("assistant", lstrip=True)])
    return tokenizer


SURE = {"plain": changed(), "nfc": changed(normalizer=normalizers.NFC()), "stripping": stripping()}


@pytest.mark.parametrize("name", sorted(SURE))
@given(pieces=rows, data=st.data())
@settings(max_examples=150, deadline=None)
def test_bytes_say_what_offsets_say(name: str, pieces: list[list[str]], data: st.DataObject) -> None:
    """For any text and any spans that do not overlap, in any number of texts."""
    texts = ["".join(one) for one in pieces]
    spans = []
    for text in texts:
        cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=4)))
        spans.append(list(zip(cuts[::2], cuts[1::2], strict=False)))
    encoders = Encoder(SURE[name]), Encoder(SURE[name])
    assert encoders[0].__dict__.setdefault("_sizes", token_sizes(SURE[name].backend_tokenizer)) is not None
    encoders[1].__dict__["_sizes"] = None
    found = [
        [(one.ids.tolist(), one.labels.tolist()) for one in encoder.labelled(texts, spans)] for encoder in encoders
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": normalizers.Lowercase()},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.ByteLevel(False)])},
        {"post_processor": processors.ByteLevel(trim_offsets=True)},
    ],
)
def test_tokenizers_that_need_offsets(parts: dict[str, Any]) -> None:
    """Where bytes may be added, or offsets leave white space out."""
    assert token_sizes(changed(**parts).backend_tokenizer) is None


def test_the_sizes_are_those_of_the_text() -> None:
    """Added tokens and bytes that are no character of their own, too."""
    for text in [*TEXT, "<｜User｜>数学<｜Assistant｜>"]:
        backend = family("deepseek").backend_tokenizer
        sizes = token_sizes(backend)
        assert sizes is not None
        assert sizes[backend.encode(text).ids].sum() == len(normalize("NFC", text).encode())
