"""Each kind of speculator against its formulas, written out for one position at a time, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from by_formula import logits
from published import PUBLISHED, H, V, drawn

from ptrain.optimizers import parameter_groups
from ptrain_spec_decode.layout import Shape, file_name
from ptrain_spec_decode.losses import states


@pytest.mark.parametrize("name", PUBLISHED)
def test_logits_and_gradients_are_those_of_the_formulas(name: str) -> None:
    """To 1e-12, with biases and norms that are not those of the beginning."""
    kind, _ = PUBLISHED[name]
    made = drawn(kind).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    hidden = torch.randn(2, 4, H, generator=generator, dtype=torch.float64)
    tokens = torch.randint(V, (2, 4, kind.n_predict), generator=generator)
    found = torch.stack([made.head(i)(state) for i, state in enumerate(states(made, hidden, tokens))])
    direction = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    (found * direction).sum().backward()

    own: dict[str, Any] = {file_name(n): p.detach().clone().requires_grad_() for n, p in made.named_parameters()}
    expected = [[logits(kind, own, hidden[b, t], tokens[b, t].tolist()) for t in range(4)] for b in range(2)]
    stacked = torch.stack([torch.stack([torch.stack(one) for one in row]) for row in expected]).permute(2, 0, 1, 3)
    (stacked * direction).sum().backward()
    torch.testing.assert_close(found, stacked, atol=1e-12, rtol=1e-12)
    for key, parameter in made.named_parameters():
        torch.testing.assert_close(parameter.grad, own[file_name(key)].grad, atol=1e-11, rtol=1e-11, msg=key)


def test_the_beginning() -> None:
    """Of an MLP every weight is drawn with 1 / sqrt(width), of the others with 1 / sqrt(the smaller side)."""
    sizes: Any = {"hidden_size": 300, "vocab_size": 2000, "inner": (400,), "proj": (400,), "emb": (400,)}
    plain = drawn(Shape(kind="mlp", **sizes)).state_dict()
    assert plain["proj.0.weight"].std() == pytest.approx(1 / 20, rel=0.02)
    assert plain["heads.2.weight"].std() == pytest.approx(1 / 20, rel=0.02)
    assert plain["emb.0.weight"].std() == pytest.approx(1 / 20, rel=0.02)
    assert plain["ln.1.norm.weight"].eq(1).all() and plain["ln.1.norm.bias"].eq(0).all()
    cell = drawn(Shape(kind="lstm", method="sum_lstm", tie_weights=True, **sizes)).state_dict()
    assert cell["input_proj.0.weight"].std() == pytest.approx(300**-0.5, rel=0.02)
    assert cell["input_proj.1.weight"].std() == pytest.approx(1 / 20, rel=0.02)
    assert cell["cell_emb.0.weight"].std() == pytest.approx(1 / 20, rel=0.02)


def test_embeddings_and_states_weigh_what_they_should() -> None:
    """In the last head's state, that of the base makes up half of the variance that is summed up."""
    for heads in (1, 2, 3, 5):
        kind = Shape(kind="mlp", hidden_size=8, vocab_size=8, n_predict=heads, inner=(64,), proj=(64,), emb=(64,))
        # A projected state and an embedding have equal variances where an activated state has the mean square 1 / 2.
        weight = kind.embedding_scale**2 / (64 / 2)
        assert (1 / (1 + weight)) ** heads == pytest.approx(0.5)


def test_norms_and_biases_do_not_decay() -> None:
    for kind, _ in PUBLISHED.values():
        made = drawn(kind)
        decays, rest = parameter_groups(made, 0.1)
        assert all(p.ndim == 2 for p in decays["params"]) and all(p.ndim == 1 for p in rest["params"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"proj": (8,)}, "must be the same number"),
        ({"inner": (16, 8)}, "stacked widths belong to"),
        ({"tie_weights": True, "n_predict": 1}, "and there is one"),
        ({"kind": "lstm", "method": "sum_lstm"}, "one cell for all heads"),
        ({"kind": "lstm", "method": "sum_lstm", "tie_weights": True, "inner": (16, 8)}, "has no stacked widths"),
        ({"method": "sum_lstm"}, "belong to `speculator: lstm`"),
        ({"kind": "lstm", "tie_lstm_embs": True}, "belongs to `method: sum_lstm`"),
    ],
)
def test_shapes_that_contradict_themselves(changes: dict[str, Any], said: str) -> None:
    sizes: Any = {"kind": "mlp", "hidden_size": H, "vocab_size": V, "inner": (16,), "proj": (16,), "emb": (16,)}
    with pytest.raises(ValueError, match=said):
        Shape(**{**sizes, **changes})
