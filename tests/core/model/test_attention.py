"""Documents of one row do not see each other, whatever computes the attention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ptrain import stages
from ptrain.data.collate import collate
from ptrain.errors import ModelError
from ptrain.model.apart import check_apart
from ptrain.model.attention import implementation, refuse_packing
from ptrain.model.head import output_head

SMALL: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen3": {}, "gpt_neox": {}, "gemma2": {"sliding_window": 5}, "gemma3_text": {"sliding_window": 5},
    "mistral": {"sliding_window": 4}, "cohere2": {"sliding_window": 4},
    "phimoe": {"sliding_window": 4, "num_local_experts": 2},
}  # fmt: skip
LENGTHS = ([7, 1, 12, 3], [9, 6], [30])
"""Of the documents of each row; rows are padded to 32."""


def documents() -> list[list[torch.Tensor]]:
    """Random ids, by row."""
    drawn = torch.Generator().manual_seed(0)
    return [[torch.randint(1, 67, (length,), generator=drawn) for length in row] for row in LENGTHS]


def batch_of(rows: list[list[torch.Tensor]], multiple: int = 32) -> dict[str, Any]:
    """A micro-batch of packed rows, every token a label."""
    whole = [torch.cat(row).numpy() for row in rows]
    packed = [
        {"input_ids": ids, "labels": ids, "document_lengths": [len(one) for one in row]}
        for ids, row in zip(whole, rows, strict=True)
    ]
    return collate(packed, pad_id=0, multiple=multiple)


def hidden(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """What core's stage `forward` gives."""
    return stages.forward(SimpleNamespace(), model, batch)  # type: ignore[arg-type]


@pytest.mark.parametrize("wanted", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_are_as_if_alone(family: str, wanted: str) -> None:
    """Logits to 1e-5, and gradients too (flex attention has none on a CPU)."""
    if (family, wanted) == ("gemma2", "sdpa"):
        pytest.skip("transformers has no sdpa for Gemma 2: it would leave out the soft cap of attention")
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family]})
    name = implementation(config, wanted)
    refuse_packing(config, name)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=name).float().eval()
    rows = documents()
    with torch.set_grad_enabled(wanted != "flex_attention"):
        packed = output_head(model)(hidden(model, batch_of(rows)))
        alone = [[model(input_ids=one[None], use_cache=False).logits[0] for one in row] for row in rows]
    begin = [[sum(lengths[:at]) for at in range(len(lengths))] for lengths in LENGTHS]
    for row, (starts, singles) in enumerate(zip(begin, alone, strict=True)):
        for start, single in zip(starts, singles, strict=True):
            torch.testing.assert_close(packed[row, start : start + len(single)], single, atol=1e-5, rtol=0)
    if wanted == "flex_attention":
        return
    parameters = list(model.base_model.parameters())
    together = torch.cat([packed[row, : sum(lengths)] for row, lengths in enumerate(LENGTHS)])
    apart = torch.cat([one for row in alone for one in row])
    ours, theirs = (torch.autograd.grad((x**2).mean(), parameters) for x in (together, apart))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kept", [4, 64])
def test_masks_of_a_model_s_own_are_heeded(kept: int) -> None:
    """Doge chooses the keys that a token sees, all of them where they are few, and weighs them."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("doge", **SMALL, keep_window_size=kept)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    ours = AutoModelForCausalLM.from_config(config, attn_implementation=implementation(config, "sdpa")).float().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(model.state_dict())
    (document,) = documents()[2]
    found, expected = hidden(ours, batch_of([[document]], 1)), model.base_model(document[None], use_cache=False)[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_nothing_is_predicted_across_documents() -> None:
    """The last token of each has no label."""
    labels = batch_of(documents())["shift_labels"]
    for row, lengths in enumerate(LENGTHS):
        ends = [sum(lengths[: at + 1]) - 1 for at in range(len(lengths))]
        assert (labels[row, ends] == -100).all()
        assert int((labels[row] != -100).sum()) == sum(lengths) - len(lengths)


@pytest.mark.parametrize("family", ["mamba", "falcon_h1", "qwen3_next", "jamba"])
def test_a_state_that_runs_through_a_row_is_refused(family: str) -> None:
    """Layers that are no attention carry what one document says to the next."""
    config = AutoConfig.for_model(family)
    with pytest.raises(ModelError, match="packed documents would see each other through"):
        refuse_packing(config, implementation(config, "sdpa"))


def test_an_unknown_attention_is_refused() -> None:
    """What is not known to keep documents apart."""
    config = AutoConfig.for_model("llama", **SMALL)
    with pytest.raises(ModelError, match="the attention `other`"):
        refuse_packing(config, "other")


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "rwkv"])
def test_the_model_itself_is_asked(family: str) -> None:
    """What the configuration does not say: RWKV names no kinds of layers, and carries a state."""
    torch.manual_seed(0)
    given = {} if family == "rwkv" else SMALL
    config = AutoConfig.for_model(family, **{**given, "num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 67})
    name = implementation(config, "sdpa") if family != "rwkv" else None
    model = AutoModelForCausalLM.from_config(config, attn_implementation=name).float().train()

    def call(stage: str, **arguments: Any) -> Any:
        return getattr(stages, stage)(run, **arguments)

    recipe = SimpleNamespace(micro_batch_size=1, eval_micro_batch_size=None)
    run: Any = SimpleNamespace(model=model, device=torch.device("cpu"), call=call, recipe=recipe)
    if family == "rwkv":
        with pytest.raises(ModelError, match="see each other in RwkvForCausalLM"):
            check_apart(run)
    else:
        check_apart(run)
    assert model.training


@pytest.mark.parametrize(("micro", "evaluation", "apart"), [(1, None, True), (2, None, False), (1, 4, False)])
def test_the_model_is_asked_about_several_rows(micro: int, evaluation: int | None, apart: bool) -> None:
    """Transformers' flash attention finds documents by their positions in batches of one row alone."""
    config = AutoConfig.for_model("llama", **{**SMALL, "num_hidden_layers": 1})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation(config, "sdpa")).float()

    def call(stage: str, model: Any, batch: dict[str, Any]) -> Any:
        if len(batch["input_ids"]) > 1:
            batch = {**batch, "document_lengths": [[sum(row)] for row in batch["document_lengths"]]}
        return hidden(model, batch)

    recipe = SimpleNamespace(micro_batch_size=micro, eval_micro_batch_size=evaluation)
    run: Any = SimpleNamespace(model=model, device=torch.device("cpu"), call=call, recipe=recipe)
    if apart:
        check_apart(run)
    else:
        with pytest.raises(ModelError, match="see each other in LlamaForCausalLM"):
            check_apart(run)


def test_a_function_put_round_attention() -> None:
    """It sees what the model computes with, and is called as that where nothing is cut; where something is, no mask."""
    from ptrain.attention import attention_name, wrap_attention

    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2", **SMALL)
    for name in ("sdpa", "flex_attention"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation(config, name))
        batch, calls = batch_of(documents()), []
        with torch.no_grad():
            expected = hidden(model, batch)
            plain = attention_name(model)

            def around(attend: Any, calls: list[Any] = calls) -> Any:
                def wrapped(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
                    calls.append((mask is None, kwargs.pop("note", None)))
                    return attend(module, query, key, value, mask, **kwargs)

                return wrapped

            wrap_attention(model, "test", around)
            assert torch.equal(hidden(model, batch), expected)
            hidden(model, {**batch, "attention_arguments": {"note": 1}, "row_length": 32})
        layers = SMALL["num_hidden_layers"]
        assert calls == [(name == "sdpa", None)] * layers + [(True, 1)] * layers
        assert attention_name(model) == plain == implementation(config, name)
        assert "_attn_implementation" not in model.config.to_dict()
