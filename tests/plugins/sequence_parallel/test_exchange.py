"""The exchange of heads against a permutation written out by hand, and the parts of a batch; without processes."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptrain_sequence_parallel.exchange import HEADS, POSITIONS, packed, repeats, unpacked
from ptrain_sequence_parallel.groups import Group
from ptrain_sequence_parallel.shards import cut

Shape = tuple[int, int, int]
SIZES = st.integers(1, 5)
SMALL = st.integers(1, 3)


def exchanged(sent: list[list[torch.Tensor]], split: int, join: int) -> list[list[torch.Tensor]]:
    """What each worker has after the exchange, by worker and tensor, given what each has before."""
    messages = [packed(tensors, len(sent), split) for tensors in sent]
    received = [torch.stack([message[rank] for message in messages]) for rank in range(len(sent))]
    return [unpacked(message, tensors, split, join) for message, tensors in zip(received, sent, strict=True)]


def drawn(size: int, rows: int, positions: int, shapes: list[tuple[int, int]], seed: int) -> list[list[torch.Tensor]]:
    """For each worker a tensor [rows, heads, positions, d] for each `(heads per worker, d)`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(rows, size * own, positions, d, generator=generator, dtype=torch.float64) for own, d in shapes]
        for _ in range(size)
    ]


LAYOUTS = {
    "size": SIZES, "rows": SMALL, "positions": st.integers(1, 4),
    "shapes": st.lists(st.tuples(SMALL, SMALL), min_size=1, max_size=3), "seed": st.integers(0, 99),
}  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(**LAYOUTS)
def test_every_number_goes_where_it_belongs(**layout: Any) -> None:
    """Head j of worker r is head r x n + j, and position t is position t % s of worker t // s."""
    before = drawn(**layout)
    after = exchanged(before, HEADS, POSITIONS)
    size, s = layout["size"], layout["positions"]
    for rank, (at, (own, _)) in itertools.product(range(size), enumerate(layout["shapes"])):
        assert after[rank][at].shape[1:3] == (own, size * s)
        for head, position in itertools.product(range(own), range(size * s)):
            there = before[position // s][at][:, rank * own + head, position % s]
            assert after[rank][at][:, head, position].equal(there)


@settings(max_examples=40, deadline=None)
@given(**LAYOUTS)
def test_the_way_back_is_the_inverse_and_the_gradient(**layout: Any) -> None:
    """It brings back every number, and <exchange(x), y> = <x, back(y)>, summed over the workers."""
    before, size = drawn(**layout), layout["size"]
    after = exchanged(before, HEADS, POSITIONS)
    back = exchanged(after, POSITIONS, HEADS)
    assert all(x.equal(y) for one, other in zip(before, back, strict=True) for x, y in zip(one, other, strict=True))
    generator = torch.Generator().manual_seed(1)
    other = [[torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors] for tensors in after]
    there = sum((x * y).sum() for one, two in zip(after, other, strict=True) for x, y in zip(one, two, strict=True))
    brought = exchanged(other, POSITIONS, HEADS)
    here = sum((x * y).sum() for one, two in zip(before, brought, strict=True) for x, y in zip(one, two, strict=True))
    torch.testing.assert_close(there, here, atol=1e-10 * size, rtol=1e-10)


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 8))
def test_every_head_finds_its_keys_and_values(size: int, own: int, shared: int) -> None:
    """Of whatever numbers of heads: those that query head i needs, i // (heads / shared), are where it is computed."""
    heads = size * own
    if heads % shared:
        return
    times = repeats(heads, shared, size)
    spread = torch.arange(shared).repeat_interleave(times)
    assert len(spread) % size == 0 and len(spread) <= heads
    for rank, part in enumerate(spread.chunk(size)):
        together = own // len(part)
        found = [int(part[head // together]) for head in range(own)]
        assert found == [(rank * own + head) // (heads // shared) for head in range(own)]
    if shared % size == 0:
        assert times == 1, "nothing is sent twice that need not be"


BATCHES = {"size": SIZES, "rows": SMALL, "length": st.integers(1, 12), "extra": st.lists(SMALL, max_size=2)}


@settings(max_examples=60, deadline=None)
@given(**BATCHES)
def test_the_parts_of_a_batch_are_the_batch(size: int, rows: int, length: int, extra: list[int]) -> None:
    """With padding that no loss sees; what has no place for each position is whole."""
    ids = torch.arange(1, rows * length + 1).view(rows, length)
    whole = {
        "input_ids": ids, "shift_labels": ids + 1, "position_ids": torch.arange(length).expand(rows, -1),
        "document_ids": torch.zeros(rows, length, dtype=torch.int64), "document_lengths": [[length]] * rows,
        "attached": torch.randn(rows, length, *extra), "per_row": torch.randn(rows), "rows": rows, "split": "train",
    }  # fmt: skip
    parts = [cut(whole, Group(size, rank), pad_id=0) for rank in range(size)]
    put_together = {name: torch.cat([p[name] for p in parts], 1) for name in (*list(whole)[:4], "attached")}
    row_length = parts[0]["row_length"]
    assert row_length == -(-length // size) * size
    for name, value in put_together.items():
        assert value[:, :length].equal(whole[name]) and value.shape[1] == row_length, name
    padding = {name: value[:, length:] for name, value in put_together.items()}
    assert (padding["shift_labels"] == -100).all() and (padding["document_ids"] == -1).all()
    assert (padding["input_ids"] == 0).all() and (padding["attached"] == 0).all()
    # None is beyond the longest document: learnt positions may end there.
    assert put_together["position_ids"].equal((torch.arange(row_length) % length).expand(rows, -1))
    for part in parts:
        assert {name: part[name] for name in ("document_lengths", "rows", "split")} == {
            "document_lengths": [[length]] * rows, "rows": rows, "split": "train",
        }  # fmt: skip
        assert part["per_row"] is whole["per_row"]


def test_a_batch_without_rows_stays_without_any() -> None:
    """A worker that has none left gets one token, which is padding; so does each worker of its group."""
    from ptrain.data.collate import filler

    batch = filler({"input_ids": [5]}, pad_id=7)
    for rank in range(4):
        part = cut(batch, Group(4, rank), pad_id=7)
        assert part["input_ids"].shape == (1, 1) and part["rows"] == 0
        assert part["document_ids"].item() == -1 and part["shift_labels"].item() == -100


def test_flash_attention_is_told_of_whole_rows() -> None:
    """Where documents begin in the rows laid end to end, with the padding that parts have."""
    from ptrain.model.varlen import VARLEN, document_arguments

    ids = torch.zeros(2, 9, dtype=torch.int64)
    whole = {"input_ids": ids, "position_ids": ids, "document_lengths": [[3, 5], [9]]}
    model: Any = SimpleNamespace(config=SimpleNamespace(_attn_implementation=VARLEN))
    for rank in range(2):
        told = document_arguments(model, cut(whole, Group(2, rank), pad_id=0))
        assert told["cu_seq_lens_q"].tolist() == [0, 3, 8, 10, 19, 20] and told["max_length_q"] == 9


@pytest.mark.parametrize("window", [None, 3])
def test_the_mask_of_flex_attention(window: int | None) -> None:
    """Causal, within documents and the window, over whole rows; padding is no document's."""
    lengths = [[3, 5], [6], [1, 1, 2]]
    told = cut(
        {
            "input_ids": torch.zeros(3, 9, dtype=torch.int64), "position_ids": torch.zeros(3, 9, dtype=torch.int64),
            "document_lengths": lengths,
        },
        Group(2, 1), pad_id=0,
    )["attention_arguments"]["ulysses"]  # fmt: skip
    mask = told.block_mask(window, torch.device("cpu"))
    assert mask is told.block_mask(window, torch.device("cpu")), "it is made once a batch"
    at = torch.arange(10)
    for row, of_row in enumerate(lengths):
        document = torch.tensor([n for n, length in enumerate([*of_row, 10 - sum(of_row)]) for _ in range(length)])
        expected = (at[:, None] >= at) & (document[:, None] == document)
        if window is not None:
            expected &= at[:, None] - at < window
        found = mask.mask_mod(torch.tensor(row), torch.tensor(0), at[:, None], at[None])
        assert found.equal(expected)
