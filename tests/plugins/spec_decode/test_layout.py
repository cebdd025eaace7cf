"""The saved folder: every tensor's name and shape, and every field, as the published layouts have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from published import PUBLISHED, H, V, W, drawn, shape
from safetensors.torch import load_file, save_file

from ptrain import ModelError
from ptrain_spec_decode.layout import file_name
from ptrain_spec_decode.saved import Base, config_of, load_into, read, write
from ptrain_spec_decode.speculator import Speculator, make

BASE = Base("some/base", ("LlamaForCausalLM",), "abc")


def saved(made: Speculator, folder: Path, engine: str = "arctic") -> None:
    weights = {file_name(name): p.detach().clone() for name, p in made.named_parameters()}
    write(folder, weights, config_of(made.shape, BASE, "float32", engine))


@pytest.mark.parametrize("name", PUBLISHED)
def test_tensors_are_those_of_the_published_layout(name: str, tmp_path: Path) -> None:
    """In the file itself, in what a shape says, and in the count of parameters."""
    kind, published = PUBLISHED[name]
    made = drawn(kind)
    saved(made, tmp_path)
    assert {key: tuple(value.shape) for key, value in load_file(tmp_path / "model.safetensors").items()} == published
    assert dict(kind.tensors()) == published
    assert kind.parameters == sum(p.numel() for p in made.parameters())


def test_fields_are_those_of_the_published_layouts() -> None:
    """vLLM reads widths as numbers, Arctic Inference as text; each knows an architecture by its own name."""
    common = {
        "model_type": "mlp_speculator", "vocab_size": V, "n_predict": 3, "n_candidates": 3,
        "top_k_tokens_per_head": [1, 1, 1], "base_model_name_or_path": "some/base",
        "base_model_archs": ["LlamaForCausalLM"], "torch_dtype": "float32", "base_model_tokenizer": "abc",
    }  # fmt: skip
    mlp = {**common, "emb_dim": H, "inner_dim": W, "tie_weights": False, "scale_input": False}
    plain, lstm = shape("mlp"), PUBLISHED["sum_lstm, tied"][0]
    assert config_of(plain, BASE, "float32", "vllm") == {**mlp, "architectures": ["MLPSpeculatorPreTrainedModel"]}
    assert config_of(plain, BASE, "float32", "arctic") == {
        **mlp, "architectures": ["ArcticMLPSpeculatorPreTrainedModel"]
    }  # fmt: skip
    assert config_of(lstm, BASE, "float32", "arctic") == {
        **common, "architectures": ["ArcticLSTMSpeculatorPreTrainedModel"], "input_hidden_dim": H, "inner_dim": str(W),
        "proj_dim": str(W), "emb_dim": str(W), "tie_weights": True, "scale_input": False, "method": "sum_lstm",
        "tie_lstm_embs": True,
    }  # fmt: skip
    stacked = config_of(PUBLISHED["sum_rnn, stacked"][0], BASE, "float32", "arctic")
    assert (stacked["inner_dim"], stacked["proj_dim"], stacked["emb_dim"]) == ("16.8", "16.16", "16.16")


@pytest.mark.parametrize("name", PUBLISHED)
def test_load_back_is_exact(name: str, tmp_path: Path) -> None:
    made = drawn(PUBLISHED[name][0])
    saved(made, tmp_path)
    found, base = read(tmp_path)
    assert (found, base) == (made.shape, BASE)
    again = drawn(found, seed=1)
    load_into(again, tmp_path)
    assert all(a.equal(b) for a, b in zip(made.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_published_one_is_read(tmp_path: Path) -> None:
    """Without what is written here besides: a prefix before the names, `inner_dim: 0` for the width of the base."""
    made = drawn(shape("mlp", inner=(H,), proj=(H,), emb=(H,)))
    weights = {f"speculator.{file_name(name)}": p.detach().clone() for name, p in made.named_parameters()}
    save_file(weights, tmp_path / "model.safetensors")
    config = {"model_type": "mlp_speculator", "vocab_size": V, "n_predict": 3, "emb_dim": H, "inner_dim": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, base = read(tmp_path)
    assert found == made.shape and base == Base()
    again = make(found)
    load_into(again, tmp_path)
    assert again.state_dict()["emb.1.weight"].equal(made.state_dict()["emb.1.weight"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "llama"}, "its `model_type` is `llama`"),
        ({"n_predict": None}, "describes no speculator"),
        ({"n_predict": "-"}, "it has no `n_predict`"),
        ({"inner_dim": 17}, r"the tensor `emb.0.weight` .* is \[50, 16\]"),
        ({"n_predict": 4}, "lacks the tensor `emb.3.weight`"),
        ({"tie_weights": True}, "knows nothing of, the tensor `emb.1.weight`"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    made = drawn(shape("mlp"))
    saved(made, tmp_path, "vllm")
    config = {**json.loads((tmp_path / "config.json").read_text()), **changes}
    kept = {key: value for key, value in config.items() if value != "-"}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    with pytest.raises(ModelError, match=said):
        load_into(make(read(tmp_path)[0]), tmp_path)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no speculator: there is no `config.json`"):
        read(tmp_path)
    made = drawn(shape("mlp"))
    saved(made, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="can't be read"):
        load_into(made, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no `model.safetensors`"):
        load_into(made, tmp_path)


def test_what_nothing_serves_is_known() -> None:
    """A cell whose gates share no embedding, and stacks whose norm would have another width than what it gets."""
    assert {name for name, (kind, _) in PUBLISHED.items() if kind.unserved} == {"sum_lstm"}
    assert shape("lstm", emb=(8, W)).unserved == "a stack of unequal widths in `emb_dim`"
    assert shape("mlp", inner=(8,), proj=(8,), emb=(8,)).unserved is None
