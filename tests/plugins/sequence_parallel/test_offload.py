"""What layers are computed from again comes back from the host bit for bit, and nothing else goes there."""

from __future__ import annotations

from typing import Any

import pytest
import tiled_mlps
import torch

from ptrain.errors import ModelError
from ptrain_sequence_parallel import mlp, offload

LAYERS, SHAPE = 3, (2, 17, 16)
CHECKPOINTS = ["reentrant", "non-reentrant"]


def trained(checkpoint: str, how: Any, **keys: Any) -> tuple[list[torch.Tensor], Any]:
    """The loss of a micro-batch and the gradients of all weights; and the model."""
    model = tiled_mlps.made(**{"adapter": False, "layers": LAYERS, **keys}).train()
    tiled_mlps.keep(model, checkpoint)
    mlp.tile(model, 5, True, lambda line: None)
    batch = {"input_ids": torch.zeros(SHAPE[:2], dtype=torch.int64)}
    with offload.offloading(model, batch, how):
        value = tiled_mlps.loss(model, 0)
    value.backward()
    return [value, *(p.grad for p in model.parameters() if p.grad is not None)], model


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What went to the host, and what was sent for."""
    found: dict[str, list[Any]] = {"away": [], "back": []}
    made, asked = offload._Away.__init__, offload._Away.back

    def away(one: Any, tensor: torch.Tensor, before: Any) -> None:
        found["away"].append(tensor.shape)
        made(one, tensor, before)

    def back(kept: Any) -> torch.Tensor:
        found["back"].append(isinstance(kept, offload._Away))
        return asked(kept)

    monkeypatch.setattr(offload._Away, "__init__", away)
    monkeypatch.setattr(offload._Away, "back", staticmethod(back))
    return found


@pytest.mark.parametrize("block", [2**28, 200])
@pytest.mark.parametrize("keys", [{}, {"adapter": True}, {"dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_equal_bit_for_bit(checkpoint: str, keys: Any, block: int, seen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both flavours of checkpoints, in one block of memory and in several."""
    monkeypatch.setattr(offload, "BLOCK", block)
    expected, _ = trained(checkpoint, False, **keys)
    assert not seen["away"]
    found, _ = trained(checkpoint, True, **keys)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    # The last layer needs its input at once.
    assert seen["away"] == [SHAPE] * (LAYERS - 1) and sum(seen["back"]) == LAYERS - 1


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_device_keeps_none(checkpoint: str) -> None:
    """Between the passes, nothing holds what went to the host."""
    model = tiled_mlps.made(False, layers=LAYERS).train()
    tiled_mlps.keep(model, checkpoint)
    inputs: list[Any] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda m, args: inputs.append(args[0].untyped_storage()._weak_ref()))
    with offload.offloading(model, {"input_ids": torch.zeros(SHAPE[:2], dtype=torch.int64)}, True):
        value = tiled_mlps.loss(model, 0)
    assert [torch.UntypedStorage._expired(one) for one in inputs] == [True] * (LAYERS - 1) + [False]
    value.backward()


def test_without_gradients_nothing_is_copied(seen: Any) -> None:
    """An evaluation keeps nothing."""
    model = tiled_mlps.made(False, layers=LAYERS).train()
    tiled_mlps.keep(model, "non-reentrant")
    with torch.no_grad(), offload.offloading(model, {"input_ids": torch.zeros(SHAPE[:2], dtype=torch.int64)}, True):
        tiled_mlps.loss(model, 0)
    assert not seen["away"]


def test_where_it_does_not_pay(seen: Any) -> None:
    """`auto` leaves a CPU alone, and a GPU for sequences that take a tenth of its memory or less."""
    found, model = trained("non-reentrant", "auto")
    assert len(found) > 1 and not seen["away"]
    assert offload.kept_bytes(model, 1000) == LAYERS * 1000 * 16 * 4

    def pays(tokens: int, memory: int | None) -> bool:
        return offload.pays(model, torch.zeros(1, tokens, dtype=torch.int64), memory)

    memory = LAYERS * 1000 * 16 * 4 * 10
    assert not pays(1000, memory) and pays(1001, memory) and not pays(1001, None)


def test_a_model_that_keeps_its_activations(seen: Any) -> None:
    """Has nothing to offload: said before training, and left as it is."""
    model = tiled_mlps.made(False, layers=LAYERS)
    with pytest.raises(ModelError, match="layers of LlamaForCausalLM keep their activations"):
        offload.check(model)
    trained("kept", True)
    assert not seen["away"]
    tiled_mlps.keep(model, "reentrant")
    offload.check(model)
