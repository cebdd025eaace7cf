"""Students of every family: against the teacher, a dense reference, themselves with a cache, and on disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from swiftkv_dense import Dense
from swiftkv_made import LAYOUTS, OWN, ids, student, teacher
from transformers import AutoModelForCausalLM

from ptrain_swiftkv.models import body
from ptrain_swiftkv.models.body import as_teacher, reusing_trunk
from ptrain_swiftkv.student import freeze

DENSE = ["llama", "mistral", "qwen2", "qwen3"]
"""The families that the dense reference knows."""


@pytest.mark.parametrize("family", OWN)
@torch.no_grad()
def test_as_its_own_teacher_it_is_the_model_that_it_was_made_from(family: str) -> None:
    """Bit for bit, whatever has become of the student, and the student is itself again afterwards."""
    model = teacher(family)
    for kept, size in LAYOUTS:
        made = student(model, kept, size, moved=0.1)
        before = made(ids()).logits
        with as_teacher(made):
            assert made(ids()).logits.equal(model(ids()).logits)
        assert made(ids()).logits.equal(before)


@pytest.mark.parametrize("family", OWN)
@torch.no_grad()
def test_with_all_layers_but_one_it_begins_as_the_teacher(family: str) -> None:
    """Bit for bit: the keys and values of the last layer are made of what goes into it. So it is with all layers."""
    model = teacher(family)
    for kept in (5, 6):
        assert student(model, kept, 1)(ids()).logits.equal(model(ids()).logits)
    assert not torch.allclose(student(model, 2, 1)(ids()).logits, model(ids()).logits, atol=0.1)


@pytest.mark.parametrize("family", OWN)
def test_it_begins_with_the_mean_of_its_group(family: str) -> None:
    """Keys and values; queries are each layer's own, and the norm is the first one of the first later layer."""
    model = teacher(family)
    made = student(model, 2, 2)
    theirs = dict(model.named_parameters())
    own = {name: p for name, p in made.named_parameters() if "_swiftkv." in name}
    assert own.pop("model.norm_swiftkv.weight").equal(theirs["model.layers.2.input_layernorm.weight"])
    assert own
    for name, parameter in own.items():
        plain = name.replace("_swiftkv", "")
        layer = int(plain.split(".")[2])
        if ".q_" in name:
            assert parameter.equal(theirs[plain]), name
        else:
            assert layer in (2, 4)
            other = theirs[plain.replace(f"layers.{layer}.", f"layers.{layer + 1}.")]
            torch.testing.assert_close(parameter, (theirs[plain] + other) / 2, atol=1e-7, rtol=0)
    heads = {name.split(".")[2] for name in own if ".q_" in name}
    assert heads == {"2", "3", "4", "5"}


@pytest.mark.parametrize(("kept", "size"), [(3, 1), (2, 2), (2, 4)])
@pytest.mark.parametrize("family", DENSE)
@torch.no_grad()
def test_hidden_states_are_those_of_the_dense_reference(family: str, kept: int, size: int) -> None:
    """Of teacher and student, every layer, in fp64; transformers computes norms and rotations in fp32 all the same."""
    if family == "qwen2" and size == 4:
        pytest.skip("layers with a window and without one don't share")
    made = student(teacher(family).double(), kept, size, moved=0.1)
    dense = Dense(dict(made.state_dict()), made.config)
    for row in ids():
        for one in (False, True):
            made.config.swiftkv = one
            found = made.model(row[None], output_hidden_states=True).hidden_states
            expected = dense.states(row, student=one)
            assert len(found) == len(expected)
            for ours, theirs in zip(found, expected, strict=True):
                assert (ours[0] - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("family", OWN)
@torch.no_grad()
def test_a_second_pass_may_take_the_ordinary_layers_from_the_first(family: str) -> None:
    """Bit for bit; only over the very same tokens, and not afterwards."""
    made = student(teacher(family), 3, 1, moved=0.1)
    calls: list[int] = []
    made.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(0))
    rows, other = ids(), ids(3, 7)

    def states(row: torch.Tensor) -> torch.Tensor:
        return made.model(row, use_cache=False).last_hidden_state

    expected = states(rows)
    with reusing_trunk(made):
        with as_teacher(made):
            states(rows)
        assert len(calls) == 2
        assert states(rows).equal(expected)
        assert len(calls) == 2, "the ordinary layers were gone through again"
        assert states(other).shape == (3, 7, 32)
    assert states(rows).equal(expected)
    assert len(calls) == 4


@pytest.mark.parametrize("family", OWN)
def test_layers_that_are_computed_again_give_the_same_gradients(family: str) -> None:
    """Also those of keys and values, which several of them share."""
    found = []
    for again in (False, True):
        made = student(teacher(family), 2, 2, moved=0.1).train()
        freeze(made)
        if again:
            made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with reusing_trunk(made):
            with torch.no_grad(), as_teacher(made):
                made.model(ids(), use_cache=False)
            made.model(ids(), use_cache=False).last_hidden_state.square().sum().backward()
        found.append({name: p.grad for name, p in made.named_parameters() if p.requires_grad})
    assert len(found[0]) >= 9 and all(value is not None and value.any() for value in found[0].values())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-5, rtol=1e-5)


# Generation


def in_precision(model: Any) -> tuple[Any, dict[str, float]]:
    """The model in fp64, and how near that makes results; torch has no product of experts in fp64."""
    if model.config.model_type == "deepseek_v2":
        return model, {"atol": 1e-4, "rtol": 1e-4}
    return model.double(), {"atol": 1e-5, "rtol": 1e-5}


@pytest.mark.parametrize("family", OWN)
@torch.no_grad()
def test_with_a_cache_it_computes_the_same(family: str) -> None:
    """The prompt at once and then token by token, against everything at once, also with padding on the left."""
    model, close = in_precision(teacher(family))
    for kept, size in LAYOUTS:
        made = student(model, kept, size, moved=0.1)
        whole = made(ids()).logits
        out = made(ids()[:, :6], use_cache=True, logits_to_keep=1)
        steps = [out.logits]
        for at in range(6, 13):
            steps.append(made(ids()[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), whole[:, 5:], **close)
        padded = torch.cat([ids().new_zeros(2, 3), ids()], dim=1)
        mask = (torch.arange(16) >= 3).long().expand(2, -1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        found = made(padded, attention_mask=mask, position_ids=positions, logits_to_keep=1).logits
        torch.testing.assert_close(found, whole[:, -1:], **close)


@pytest.mark.parametrize("family", OWN)
@torch.no_grad()
def test_generation_is_that_without_a_cache(family: str) -> None:
    """Greedy, of prompts of two lengths in one batch, and with beams."""
    made = student(in_precision(teacher(family))[0], 2, 2, moved=0.1)
    prompts = [ids()[0, :5].tolist(), ids()[1, :8].tolist()]
    alone = []
    for prompt in prompts:
        row = torch.tensor([prompt])
        for _ in range(7):
            row = torch.cat([row, made(row).logits[:, -1:].argmax(-1)], dim=1)
        alone.append(row[0, len(prompt) :].tolist())
    options: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    padded = torch.tensor([[0] * (8 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (8 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    assert made.generate(padded, attention_mask=mask, **options)[:, 8:].tolist() == alone
    beams = [made.generate(ids(), num_beams=3, use_cache=cached, **options) for cached in (True, False)]
    assert beams[0].equal(beams[1])


def test_what_a_prompt_costs() -> None:
    """Later layers make keys and values once a group, and go through no token of a prompt but the last."""
    made = student(teacher("llama"), 2, 2)
    seen: dict[str, list[int]] = {}
    for name, module in made.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).append(args[0].shape[1])
            )
    with torch.no_grad():
        made.generate(ids(), max_new_tokens=1, do_sample=False, pad_token_id=0, eos_token_id=None)
    for name, lengths in seen.items():
        later = "layers" in name and int(name.split(".")[2]) >= 2
        whole = not later or name.endswith(("k_proj_swiftkv", "v_proj_swiftkv"))
        assert lengths == [13 if whole and name != "lm_head" else 1], name
    keys = [name for name in seen if name.endswith("k_proj_swiftkv")]
    assert len(keys) == 2
    assert not any(name.endswith(f"{at}.self_attn.{p}_proj") for name in seen for at in range(2, 6) for p in "qkv")


@torch.no_grad()
def test_masks_that_can_not_be_cut_leave_the_prompt_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as those of flex attention: the logits are the same, and only the work is not saved."""
    made = student(teacher("llama"), 2, 2, moved=0.1)
    expected = made(ids(), logits_to_keep=1).logits
    monkeypatch.setattr(body, "_each", lambda masks: [object()])
    lengths: list[int] = []
    made.model.layers[-1].mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    torch.testing.assert_close(made(ids(), logits_to_keep=1).logits, expected, atol=1e-5, rtol=1e-5)
    assert lengths == [ids().shape[1]]


def cached_bytes(model: Any, tokens: int) -> int:
    """Of keys and values after a prompt of so many tokens."""
    with torch.no_grad():
        cache = model(torch.zeros(1, tokens, dtype=torch.int64), use_cache=True, logits_to_keep=1).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)


def test_the_cache_of_half_the_layers_and_groups_of_4_is_5_8_of_the_plain_one() -> None:
    """16 layers of 32 have their own keys and values, and 16 share 4: 20 of 32, 62.5 %."""
    model = teacher("llama", num_hidden_layers=32)
    plain = cached_bytes(model, 40)
    assert plain == 32 * 2 * 40 * model.config.num_key_value_heads * model.config.head_dim * 4
    assert cached_bytes(student(model, 16, 4), 40) == 0.625 * plain
    assert cached_bytes(student(model, 16, 1), 40) == plain
    assert cached_bytes(student(model, 16, 16), 40) == 17 / 32 * plain


# On disk


@pytest.mark.parametrize("family", OWN)
def test_what_is_saved_loads_by_the_auto_classes(family: str, tmp_path: Path) -> None:
    """In a process that imports the package; every weight, and the same logits."""
    made = student(teacher(family), 2, 2, moved=0.1)
    made.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    model, report = loaded
    assert type(model) is type(made) and not any(report.values())
    assert model.config.model_type == f"{family.split()[0]}_swiftkv"
    with torch.no_grad():
        assert model.eval()(ids()).logits.equal(made(ids()).logits)
    for key in ("num_key_value_layers", "key_value_group_size", "swiftkv"):
        assert getattr(model.config, key) == getattr(made.config, key)


def test_a_stranger_loads_it(tmp_path: Path) -> None:
    """With one import; without it transformers does not know the type."""
    student(teacher("llama"), 2, 2).save_pretrained(tmp_path)
    load = f"from transformers import AutoModelForCausalLM as A; print(type(A.from_pretrained({str(tmp_path)!r})))"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        for code in (f"import ptrain_swiftkv.models; {load}", load)
    ]
    assert "LlamaSwiftKVForCausalLM" in runs[0].stdout, runs[0].stderr
    assert runs[1].returncode and "llama_swiftkv" in runs[1].stderr
