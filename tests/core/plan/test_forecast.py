"""Plans of recipes: what is refused, what is not known, and what layers of others change."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ptrain import Config, Feature, hookimpl
from ptrain.catalog import Catalog, Offer
from ptrain.data.attached import Attached
from ptrain.errors import DataError, PtrainError
from ptrain.parts import Optimizer, Scheduler
from ptrain.plan.devices import Device
from ptrain.plan.forecast import Forecast, forecast
from ptrain.plan.memory import ROOM
from ptrain.plan.offline import offline
from ptrain.recipe.load import load_recipe
from ptrain.recipe.sections import OptimizerConfig, SchedulerConfig

RECIPE: dict[str, Any] = {
    "type": "sft",
    "model": {
        "config": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                   "num_attention_heads": 2, "num_key_value_heads": 2},
        "dtype": "fp32",
    },
    "tokenizer": {"type": "train", "vocab_size": 320},
    "data": {"sources": [{"type": "tasks", "count": 100}], "max_length": 64},
    "micro_batch_size": 4,
    "train_iters": 3,
}  # fmt: skip
GPU = Device("a GPU", "cuda", 10**9)


class Frozen(Feature):
    """Freezes all but the last layer, and adds a parameter."""

    @hookimpl(wrapper=True)
    def create_model(self) -> Any:
        """The model, changed."""
        model = yield
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.1" in name)
        model.added = torch.nn.Parameter(torch.zeros(7))
        return model


class Peeking(Feature):
    """Reads values of weights, which a plan has none of."""

    @hookimpl(wrapper=True)
    def create_model(self) -> Any:
        """The model, looked at."""
        model = yield
        model.lm_head.weight.sum().item()
        return model


class Moving(Feature):
    """Keeps what the forward pass saves in the memory of the machine."""

    @hookimpl(wrapper=True)
    def forward(self) -> Any:
        """The forward pass."""
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (t.device, t.to("cpu")), lambda kept: kept[1].to(kept[0])
        ):
            return (yield)


class Halving(Feature):
    """Has two workers share rows."""

    class Config(Config):
        """Keys of it."""

        looks: bool = False
        """Whether it looks at values."""

    @hookimpl(wrapper=True)
    def create_dataloader(self) -> Any:
        """The first half of each row."""
        return Attached((yield), self.halved)

    def halved(self, batch: Any) -> Any:
        """The first half."""
        length = batch["input_ids"].shape[1] // (2 if not self.config.looks or batch["input_ids"].sum().item() else 1)
        return {**batch, "input_ids": batch["input_ids"][:, :length], "position_ids": batch["position_ids"][:, :length]}


class OneCycle(Scheduler):
    """A schedule that can only be gone through."""

    class Config(SchedulerConfig):
        """Keys of it."""

    def create(self, run: Any, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
        """torch's own."""
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=total_steps, cycle_momentum=False)


class Whole(Optimizer):
    """An optimizer that looks at gradients, of which a plan has none; its state has the shape of a row."""

    class Config(OptimizerConfig):
        """Keys of it."""

        looks: bool = False
        """Whether it looks."""

    def create(self, run: Any, model: torch.nn.Module) -> torch.optim.Optimizer:
        """A part of Adafactor's idea."""
        looks = self.config.looks

        class Rows(torch.optim.SGD):
            def step(self, closure: Any = None) -> None:  # type: ignore[override]
                for p in self.param_groups[0]["params"]:
                    if looks and not p.grad.sum().item():
                        continue
                    self.state[p]["row"] = torch.zeros_like(p[..., 0] if p.ndim > 1 else p)

        return Rows(model.parameters(), lr=1e-3)


@pytest.fixture
def plan(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the plan of the recipe with other keys; all share one cache."""
    monkeypatch.chdir(tmp_path)
    cache = tmp_path_factory.getbasetemp() / "plan-cache"
    offers = {
        Offer("plugin", "frozen", "tests", "0", "tests"): Frozen,
        Offer("plugin", "peeking", "tests", "0", "tests"): Peeking,
        Offer("plugin", "moving", "tests", "0", "tests"): Moving,
        Offer("plugin", "halving", "tests", "0", "tests"): Halving,
        Offer("optimizer", "whole", "tests", "0", "tests"): Whole,
        Offer("scheduler", "one-cycle", "tests", "0", "tests"): OneCycle,
    }

    def make(overrides: list[str] = [], workers: int = 1, device: Device = GPU) -> Forecast:  # noqa: B006
        catalog = Catalog.installed().with_classes(offers)
        loaded = load_recipe(RECIPE, [f"data.cache_dir={cache}", *overrides], catalog=catalog)
        return forecast(loaded, Path("nowhere"), workers, device)

    return make


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.config.hidden_sise=3", "`hidden_size`"),
        ("eval_interval=2", "there are no rows for them"),
        ("scheduler={type: wsd, num_warmup_steps: 3, num_decay_steps: 3}", "do not fit in 3 steps"),
        ("data.sources=[{type: jsonl, path: broken.jsonl}]", "this line is no JSON"),
        (
            "data.sources=[{type: tasks, count: 200}, {type: jsonl, path: tokens.jsonl, process: false}]",
            "tokens.jsonl:2: there is a token 9999, and the model has",
        ),
        ("tokenizer.chat_template=nothing", "no chat template `nothing`"),
    ],
)
def test_what_a_run_would_stop_on_is_refused(plan: Any, override: str, said: str) -> None:
    Path("broken.jsonl").write_text("{\n")
    rows = [{"input_ids": [1, at, 2], "labels": [-100, at, 2]} for at in (5, 9999, 7)] * 4
    Path("tokens.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(PtrainError) as found:
        plan([override])
    assert said in str(found.value) and found.value.exit_code == 2


def test_an_evaluation_without_a_question_is_refused(plan: Any) -> None:
    keys = ["data.mask_inputs=false", "data.train_eval_split=[0.9, 0.1]", "evaluation=[exact_match]"]
    assert plan(keys[1:]).rows["eval"]
    with pytest.raises(DataError, match="hold no question for `exact_match`"):
        plan(keys)


def test_too_many_workers_are_refused(plan: Any) -> None:
    with pytest.raises(PtrainError, match="fewer than one batch of 400"):
        plan(workers=100)


def test_a_vocabulary_that_is_asked_for_is_enough(plan: Any) -> None:
    """Without the data there is no tokenizer yet, but the recipe says how large it will be."""
    found = plan(["data.sources=[{type: jsonl, path: gone.jsonl}]"])
    assert found.unknown[0] == "rows, tokens and what follows from them: there is no file `gone.jsonl`"
    known = plan()
    assert found.parameters.total == known.parameters.total == known.parameters.trainable
    assert (found.rows, found.padding, found.steps.per_epoch) == ({}, None, None) and found.steps.total == 3
    # Rows as long as they can be.
    assert (found.memory.samples, found.memory.length) == (4, 64) and known.memory.length < 64
    assert found.memory.activations > known.memory.activations


def test_a_model_in_a_folder_needs_no_weights(plan: Any, tmp_path: Path) -> None:
    """Its configuration is enough."""
    from transformers import LlamaConfig

    sizes = {key: value for key, value in RECIPE["model"]["config"].items() if key != "model_type"}
    LlamaConfig(**sizes, vocab_size=320).save_pretrained(tmp_path / "model")
    found = plan(["model={name_or_path: model, dtype: fp32}"])
    assert found.parameters.total == plan().parameters.total and found.memory.activations > 0
    assert not any("model" in line for line in found.unknown)
    adapted = plan(
        ["model={name_or_path: model, dtype: fp32, peft_config: {r: 4, target_modules: [q_proj]}}",
         "checkpoint=[{type: huggingface, save_end_of_training: true}]"]
    )  # fmt: skip
    assert adapted.parameters.trainable == 2 * 4 * (32 + 32) and adapted.parameters.total > found.parameters.total
    assert adapted.memory.gradients == adapted.saved[0].bytes == 4 * adapted.parameters.trainable


def test_layers_may_change_the_model(plan: Any) -> None:
    changed, plain = plan(["plugins={frozen: {}}"]), plan()
    layer = 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32
    assert changed.parameters.trainable == layer + 7
    assert changed.parameters.total == plain.parameters.total + 7
    assert changed.memory.gradients == 4 * (layer + 7)


def test_a_layer_that_needs_weights_is_named(plan: Any) -> None:
    found = plan(["plugins={peeking: {}}"])
    assert any(line.startswith("what plugins make of the model: `create_model` of `peeking`") for line in found.unknown)
    assert found.parameters.total == plan().parameters.total and found.memory.activations > 0


def test_an_optimizer_keeps_what_it_keeps(plan: Any) -> None:
    """Found by a step of it; where it can't make one without values, that is said, and two numbers are assumed."""
    found, adamw = plan(["optimizer={type: whole}"]), plan()
    shapes = [shape for group in found.parameters.trained for shape in group]
    assert found.memory.optimizer == sum(4 * shape[0] for shape in shapes)
    looking = plan(["optimizer={type: whole, looks: true}"])
    assert looking.unknown[0].startswith("what the optimizer keeps, here taken to be two fp32 numbers")
    assert looking.memory.optimizer == 8 * looking.parameters.trainable
    assert adamw.memory.optimizer == pytest.approx(8 * adamw.parameters.trainable, rel=0.01)
    assert plan(["optimizer={type: cpu_adam}"]).memory.optimizer == adamw.memory.optimizer


def test_a_schedule_without_a_function_is_gone_through(plan: Any) -> None:
    rates = {one.step: one.rate for one in plan(["scheduler={type: one-cycle}", "train_iters=10"]).steps.rates}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10, cycle_momentum=False)
    expected = {}
    for step in range(1, 11):
        expected[step] = schedule.get_last_lr()[0]
        optimizer.step()
        if step < 10:
            schedule.step()
    assert list(rates) == [1, 3, 5, 8, 10]
    assert rates == pytest.approx({step: expected[step] for step in rates})


def test_where_the_passes_cannot_be_followed_the_rest_is_known(plan: Any) -> None:
    """Experts are chosen by values, of which there are none."""
    experts = "model.config={model_type: mixtral, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, "
    found = plan([experts + "num_attention_heads: 2, num_key_value_heads: 2, num_local_experts: 4}"])
    memory = found.memory
    assert memory.activations is None and memory.logits is None
    assert any("MixtralForCausalLM can't be followed" in line for line in found.unknown)
    assert memory.weights == 4 * found.parameters.total + found.parameters.buffers


def test_choices_change_what_they_say(plan: Any) -> None:
    """Of eight workers in 16 bit, each stage of ZeRO keeps less; sums are those of the parts."""
    found = plan(["model.dtype=bf16", "micro_batch_size=2", "deepspeed={zero_optimization: {reduce_bucket_size: 1000}}"],
                 workers=8)  # fmt: skip
    others = {choice.name: choice.memory for choice in found.others}
    assert list(others) == [
        "ZeRO 0", "ZeRO 1", "ZeRO 3", "activations kept", "micro_batch_size 1",
        "ZeRO 3, computed again, micro_batch_size 1",
    ]  # fmt: skip
    kept = [one.weights + one.gradients + one.optimizer for one in (others["ZeRO 0"], others["ZeRO 1"], found.memory)]
    assert kept == sorted(kept, reverse=True) and others["ZeRO 3"].optimizer < others["ZeRO 0"].optimizer / 7
    assert others["activations kept"].activations > found.memory.activations > others["micro_batch_size 1"].activations
    assert found.memory.share(GPU, 8) == found.memory.peak / 10**9
    on_cpu = plan(device=Device("cpu", "cpu", 10**9), workers=2)
    assert not on_cpu.memory.recompute and on_cpu.memory.share(on_cpu.device, 2) == 2 * on_cpu.memory.peak / 10**9


def test_the_longest_rows_fit_and_longer_ones_do_not(plan: Any) -> None:
    """Both are planned as what they are; of a model that fits no device, none do."""
    rows = ["data.sources=[{type: jsonl, path: gone.jsonl}]", "micro_batch_size=2"]
    longest = plan(rows).longest
    fits, too_long = (
        plan([*rows, f"data.max_length={length}"]).memory for length in (longest, longest + longest // 100)
    )
    assert fits.share(GPU, 1) <= ROOM < too_long.share(GPU, 1)
    assert plan(rows, device=Device("a GPU", "cuda", 10**5)).longest == 0


def test_what_is_moved_to_the_machine_is_counted_there(plan: Any) -> None:
    """Whoever moves what the forward pass keeps; the device has that much less of it, but for one layer's."""
    again = ["model.disable_activation_checkpoint=false", "model.config.num_hidden_layers=12", "train_iters=1"]
    kept, moved = plan(again).memory, plan([*again, "plugins={moving: {}}"]).memory
    layer = 4 * kept.samples * kept.length * 32
    assert kept.host == 0 and moved.host >= 12 * layer
    assert kept.activations - moved.activations >= 9 * layer


def test_what_plugins_make_of_batches_is_followed(plan: Any) -> None:
    """A worker's part of the rows; who looks at values is named, and the batch stays as it was."""
    whole, halved = plan(workers=2).memory, plan(["plugins={halving: {}}"], workers=2).memory
    assert whole.length == whole.columns == halved.length == 2 * halved.columns
    assert 0.4 < halved.activations / whole.activations < 0.6
    looking = plan(["plugins={halving: {looks: true}}"], workers=2)
    assert looking.memory.columns == whole.length
    assert any(line.startswith("what plugins make of batches: Tensor.item() cannot") for line in looking.unknown)


def test_nobody_is_asked_while_a_plan_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the libraries of the hub were imported before; afterwards all is as it was."""
    import datasets.config
    from huggingface_hub import constants, is_offline_mode

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with offline():
        assert is_offline_mode() and datasets.config.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"
    assert not is_offline_mode() and not datasets.config.HF_HUB_OFFLINE and "HF_HUB_OFFLINE" not in os.environ
