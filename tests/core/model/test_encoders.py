"""Bodies that see both ways: documents of a row are as if alone, whatever computes the attention."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from ptrain import stages
from ptrain.data.collate import collate
from ptrain.model import dropped
from ptrain.model import layout as layouts
from ptrain.model.attention import NAME
from ptrain.model.layout import layout
from ptrain.model.rows import first_position, one_a_row

SMALL: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 80, "pad_token_id": 1,
}  # fmt: skip
WINDOW: dict[str, Any] = {"local_attention": 8, "num_hidden_layers": 4, "cls_token_id": 2, "sep_token_id": 3}
DISENTANGLED: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
BOTH_WAYS: dict[str, Any] = {
    "use_bidirectional_attention": True, "sliding_window": 8, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("bert", {}, NAME),
    ("xlm-roberta", {}, NAME),
    ("xlm-roberta", {}, "eager"),
    ("modernbert", WINDOW, NAME),
    ("modernbert", WINDOW, "sdpa"),
    ("gemma3_text", BOTH_WAYS, NAME),
    ("mpnet", {}, "eager"),
    ("deberta-v2", DISENTANGLED, "eager"),
    ("llama", {"num_key_value_heads": 2}, NAME),
    ("llama", {"num_key_value_heads": 2}, "eager"),
]
SHORT = ([7, 9, 12, 11], [9, 6, 1], [13])
"""Of the documents of each row: all short, so that those of like length are computed in one call."""
LONG = ([7, 40], [9, 6, 1], [13])


def body(kind: str, keys: dict[str, Any], attention: str) -> Any:
    """A model without an output layer, with weights that are large enough to tell."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, "bos_token_id": 2, "eos_token_id": 3, **keys})
    model = AutoModel.from_config(config, attn_implementation=attention).float().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return model


def rows_of(lengths: tuple[list[int], ...]) -> tuple[list[list[torch.Tensor]], dict[str, Any]]:
    """Random documents by row, and the batch of them."""
    drawn = torch.Generator().manual_seed(0)
    documents = [[torch.randint(5, 67, (length,), generator=drawn) for length in row] for row in lengths]
    whole = [torch.cat(row).numpy() for row in documents]
    rows = [{"input_ids": ids, "labels": ids, "document_lengths": row} for ids, row in zip(whole, lengths, strict=True)]
    return documents, collate(rows, pad_id=1, multiple=8)


def hidden(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """What core's stage `forward` gives."""
    return stages.forward(SimpleNamespace(), model, batch)  # type: ignore[arg-type]


def flat(states: torch.Tensor, lengths: tuple[list[int], ...]) -> torch.Tensor:
    """Those of documents, without padding."""
    return torch.cat([states[at, : sum(row)] for at, row in enumerate(lengths)])


@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize(("kind", "keys", "attention"), CASES, ids=[f"{kind}-{how}" for kind, _, how in CASES])
def test_documents_are_as_if_alone(
    kind: str, keys: dict[str, Any], attention: str, lengths: tuple[list[int], ...]
) -> None:
    """Hidden states and gradients are those of each document in a batch of its own, without any argument but ids."""
    model = body(kind, keys, attention)
    documents, batch = rows_of(lengths)
    ours = flat(hidden(model, batch), lengths)
    alone = torch.cat([model(input_ids=one[None]).last_hidden_state[0] for row in documents for one in row])
    torch.testing.assert_close(ours, alone, atol=2e-5, rtol=1e-5)
    parameters = [one for name, one in model.named_parameters() if not name.startswith("pooler")]
    found, expected = (
        torch.autograd.grad(states.square().mean(), parameters, allow_unused=True) for states in (ours, alone)
    )
    for one, other in zip(found, expected, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_rows_of_one_document_are_not_seen_beyond_their_end() -> None:
    """Padding on the right is seen by encoders, where no causal mask hides it."""
    model = body("bert", {}, NAME)
    documents, batch = rows_of(([7], [12], [3]))
    for states, (document,) in zip(hidden(model, batch), documents, strict=True):
        alone = model(input_ids=document[None]).last_hidden_state[0]
        torch.testing.assert_close(states[: len(document)], alone, atol=1e-5, rtol=1e-5)


def test_hidden_states_between_layers_come_back_where_they_were() -> None:
    """Also where each document was computed in a row of its own."""
    _, batch = rows_of(SHORT)
    ours, apart = body("llama", {"num_key_value_heads": 2}, NAME), body("llama", {"num_key_value_heads": 2}, "eager")
    assert one_a_row(apart) and not one_a_row(ours)
    one, other = (
        stages.forward(SimpleNamespace(), model, batch, layers=[0, 1, -1])  # type: ignore[arg-type]
        for model in (ours, apart)
    )
    torch.testing.assert_close(flat(one, SHORT), flat(other, SHORT), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "first"), [("bert", 0), ("xlm-roberta", 2), ("mpnet", 2), ("modernbert", 0)])
def test_positions_begin_where_the_model_begins_them(kind: str, first: int) -> None:
    assert first_position(body(kind, WINDOW if kind == "modernbert" else {}, "eager")) == first


@pytest.mark.parametrize("size", [40, 64])
def test_a_layout_moves_tokens_there_and_back(size: int) -> None:
    """Also on a GPU, where longer documents are computed together too; filling gets no gradient."""
    lengths = ((7, 9, 12, 11), (9, 6, 1), (39,))
    plan = layout(lengths, size, torch.device("cpu"))
    assert plan.moved is None and [group.count for group in plan.groups if group.length] == [1] * 8
    documents = [(7, 0), (9, 7), (12, 16), (11, 28), (9, size), (6, size + 9), (1, size + 15), (39, 2 * size)]
    groups = layouts.alike(documents)
    assert [[length for length, _ in group] for group in groups] == [[39], [12, 11, 9, 9], [7, 6], [1]]
    gaps = [(size - 39, 39), (size - 16, size + 16), (size - 39, 2 * size + 39)]
    plan = layouts._grouped(groups, gaps, torch.device("cpu"))
    tokens = torch.randn(3 * size, 2, 3, dtype=torch.float64, requires_grad=True)
    there = plan.there(tokens)
    assert sum(plan.sizes) == len(there)
    assert torch.equal(plan.back(there), tokens)
    inside = plan.groups[1].inside
    assert inside is not None and inside.sum(1).tolist() == [12, 11, 9, 9]
    # A token that fills up is seen by nobody: whatever comes of it, nothing comes back.
    filled = there.split(plan.sizes)[1].unflatten(0, (4, 12))
    weights = torch.randn(len(tokens), dtype=torch.float64)[:, None, None]
    (gradient,) = torch.autograd.grad((plan.back(there.square()) * weights).sum(), tokens)
    torch.testing.assert_close(gradient, 2 * weights * tokens.detach())
    assert filled.shape == (4, 12, 2, 3)


def test_dropout_in_attention_is_used() -> None:
    """In training alone, and drawn from torch's own generator: the same seed gives the same states."""
    model = body("bert", {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.0}, NAME)
    _, batch = rows_of(SHORT)
    calm = flat(hidden(model, batch), SHORT)
    model.train()
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        drawn.append(flat(hidden(model, copy.copy(batch)), SHORT))
    assert torch.equal(*drawn) and not torch.allclose(drawn[0], calm, atol=1e-3)


@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("bert", {"attention_probs_dropout_prob": 1e-6, "hidden_dropout_prob": 0.0}),
        ("modernbert", {**WINDOW, "attention_dropout": 1e-6}),
        ("gemma3_text", {**BOTH_WAYS, "attention_dropout": 1e-6}),
        ("llama", {"num_key_value_heads": 2, "attention_dropout": 1e-6}),
        ("mistral", {"num_key_value_heads": 2, "attention_dropout": 1e-6, "sliding_window": 8}),
    ],
)
def test_dropout_of_nothing_changes_nothing(
    kind: str, keys: dict[str, Any], lengths: tuple[list[int], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents, padding, windows and groups of heads are those of attention without dropout."""
    model, (_, batch) = body(kind, keys, NAME), rows_of(lengths)
    calm = flat(hidden(model, copy.copy(batch)), lengths)
    asked, plain = [], dropped.attention
    monkeypatch.setattr(dropped, "attention", lambda *given: asked.append(given) or plain(*given))
    found = flat(hidden(model.train(), batch), lengths)
    assert asked
    torch.testing.assert_close(found, calm, atol=1e-5, rtol=1e-5)
