"""`spec-decode` in real runs: against formulas, a bare loop, itself resumed, and what it saved."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bare_loop
import gradients
import pytest
import torch
from by_formula import logits
from harness import losses, metrics, run_workers
from safetensors.torch import load_file
from test_oracle import token_rows

from ptrain.testing import workers as kit
from ptrain.testing.recipes import merged
from ptrain_spec_decode.layout import file_name
from ptrain_spec_decode.losses import states
from ptrain_spec_decode.saved import load_into, read
from ptrain_spec_decode.speculator import Speculator, make

CELL = {"speculator": "lstm", "method": "sum_lstm", "speculator_tie_weights": True, "tie_lstm_embs": True}
KINDS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "stacked": {"speculator": "lstm", "speculator_width": "32.24", "proj_dim": "40.32", "speculator_scale_input": True},
    "cell": CELL,
}
CUTS = [(8, 1), (2, 4)]
EVAL = {"train_eval_split": [0.7, 0.3]}


@pytest.fixture
def recipe(recipes: Any) -> Callable[..., dict[str, Any]]:
    """Makes a recipe of `spec-decode` on ragged rows; the base has dropout, which must not act."""

    def made(kind: str = "mlp", stage: int = 0, **changes: Any) -> dict[str, Any]:
        base = {
            "type": "spec-decode",
            "model": {"speculator_width": 32, "hf_config_kwargs": {"attention_dropout": 0.5}, **KINDS[kind]},
            "deepspeed": {"zero_optimization": {"stage": stage}},
            "optimizer": {"lr": 1e-2},
            "checkpoint": [{"type": "speculator", "save_end_of_training": True}],
        }
        return merged(recipes("sft"), merged(base, changes))

    return made


def saved(spec: Path) -> Path:
    """The folder of the speculator that a run left."""
    return (spec.parent / "speculator" / "latest").resolve()


def loaded(folder: Path) -> Speculator:
    """The speculator that lies there."""
    made = make(read(folder)[0])
    load_into(made, folder)
    return made


def base(folder: Path) -> Any:
    """The base of the runs."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class Oracle:
    """The loss of a document on its own: every head at every position that has a supervised target."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def heads(self, speculator: Speculator, document: bare_loop.Document) -> Iterator[tuple[Any, Any]]:
        """By head, the logits and the targets of a document, whose targets may be -100."""
        ids, labels = (torch.tensor(part) for part in document)
        with torch.no_grad():
            hidden = self.model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        # Tokens that are not there lead to nothing that is counted.
        room = torch.cat([ids, torch.zeros(speculator.n_predict, dtype=ids.dtype)])
        tokens = torch.stack([room[i + 1 : i + 1 + len(ids)] for i in range(speculator.n_predict)], -1)
        for i, state in enumerate(states(speculator, hidden, tokens)):
            yield speculator.head(i)(state[: max(len(ids) - 2 - i, 0)]), labels[2 + i :]

    def __call__(self, speculator: Any, rows: bare_loop.Rows) -> Iterator[torch.Tensor]:
        documents = [document for row in rows for document in row]
        counts = [
            sum(label != -100 for _, labels in documents for label in labels[2 + i :])
            for i in range(speculator.n_predict)
        ]
        for document in documents:
            pairs = zip(self.heads(speculator, document), counts, strict=True)
            yield sum(
                torch.nn.functional.cross_entropy(found.float(), labels, reduction="sum") / count
                for (found, labels), count in pairs
            )  # type: ignore[misc]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_formulas(kind: str, recipe: Any, prepared: Any, tiny_model: Path) -> None:
    """Of packed rows, position by position in fp64, to 1e-6; the base gets no gradient."""
    spec = prepared(recipe(kind, data={"pack_samples": True, "max_length": 96, "overlength": "drop"}))
    kit.run_workers(gradients.leave, str(spec), str(spec.parent / "found"), log=spec.parent / "log")
    found = load_file(spec.parent / "found")
    assert {name.split(".")[0] for name in found if name.startswith("gradient/")} == {"gradient/speculator"}
    shape = make_shape(spec)
    model = base(tiny_model).double()
    own: dict[str, Any] = {
        file_name(name.removeprefix("weight/")): value.double().requires_grad_()
        for name, value in found.items() if name.startswith("weight/")
    }  # fmt: skip
    terms: list[list[torch.Tensor]] = [[] for _ in range(shape.n_predict)]
    for (document,) in split(found):
        ids, labels = document
        hidden = model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0].detach()
        for t in range(len(ids)):
            for i in range(shape.n_predict):
                if t + 2 + i < len(ids) and labels[t + 2 + i] != -100:
                    made = logits(shape, own, hidden[t], ids[t + 1 : t + 2 + i])[i]
                    terms[i].append(-torch.log_softmax(made, -1)[labels[t + 2 + i]])
    means = [torch.stack(term).mean() for term in terms]
    sum(means[1:], start=means[0]).backward()
    for i, mean in enumerate(means):
        assert float(found[f"loss/head{i + 1}"]) == pytest.approx(mean.item(), abs=1e-6, rel=1e-6)
    for name, value in found.items():
        if name.startswith("gradient/"):
            wanted = own[file_name(name.removeprefix("gradient/speculator."))].grad
            torch.testing.assert_close(value.double(), wanted, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def make_shape(spec: Path) -> Any:
    """The shape that the recipe of a run asks for."""
    from ptrain_spec_decode.model import SpeculatorModel

    keys = json.loads(spec.read_text())["recipe"]["model"]
    return SpeculatorModel.Config(**keys).shape(hidden_size=64, vocab_size=tokens_of(keys["name_or_path"]))


def tokens_of(folder: str) -> int:
    """The vocabulary of a model."""
    return json.loads((Path(folder) / "config.json").read_text())["vocab_size"]


def split(batch: dict[str, torch.Tensor]) -> Iterator[list[bare_loop.Document]]:
    """The documents of a micro-batch, each a row of its own, with labels that are not shifted."""
    for ids, labels, documents in zip(batch["input_ids"], batch["shift_labels"], batch["document_ids"], strict=True):
        for number in range(int(documents.max()) + 1):
            where = documents == number
            yield [(ids[where].tolist(), [-100, *labels[where].tolist()[:-1]])]


@pytest.mark.parametrize("workers", [1, 2])
def test_equals_the_bare_loop(workers: int, recipe: Any, prepared: Any, tiny_model: Path) -> None:
    """Losses, weights and what evaluations say to 1e-5, for each kind, however the batch is cut, ZeRO 0, 2 and 3."""
    stages = itertools.cycle([0, 2, 3, 3, 0])
    cases = [(kind, cut, next(stages)) for kind, cut in itertools.product(KINDS, CUTS)]
    packed = {"pack_samples": True, "max_length": 96, "overlength": "drop", **EVAL}
    specs = [
        prepared(recipe(
            kind, stage, micro_batch_size=cut[0], gradient_accumulation_steps=cut[1],
            data={**packed, "mask_inputs": kind != "mlp"}, train_iters=4,
        ))
        for kind, cut, stage in cases
    ]  # fmt: skip
    run_workers(specs, workers)
    for kind in KINDS:
        mine = [spec for case, spec in zip(cases, specs, strict=True) if case[0] == kind]
        oracle, speculator = Oracle(base(tiny_model)), drawn(mine[0])
        expected = bare_loop.train(
            speculator, token_rows(mine[0]), batch=8 * workers, steps=4, lr=1e-2, seed=42, parts=oracle  # type: ignore[arg-type]
        )  # fmt: skip
        measured = by_hand(oracle, speculator, token_rows(mine[0], "eval"))
        for case, spec in zip(cases, specs, strict=True):
            if case[0] != kind:
                continue
            torch.testing.assert_close(losses(spec), expected, atol=1e-5, rtol=1e-6, msg=lambda m, w=case: f"{w}: {m}")
            for (name, value), wanted in zip(
                loaded(saved(spec)).state_dict().items(), speculator.state_dict().values(), strict=True
            ):
                assert (value - wanted).abs().max() <= 1e-5, (case, name)
            assert evaluation(spec) == pytest.approx(measured, abs=1e-5), case


def drawn(spec: Path) -> Speculator:
    """The speculator that a run begins with."""
    from ptrain.seeds import derived_seed

    made = make(make_shape(spec))
    made.initialise(torch.Generator().manual_seed(derived_seed(42, "speculator")))
    return made


def by_hand(oracle: Oracle, speculator: Speculator, rows: bare_loop.Rows) -> dict[str, float]:
    """What an evaluation says of a speculator: losses, accuracies, and tokens for each pass of the base."""
    count = speculator.n_predict
    right, total = [0] * count, [0] * count
    yields = []
    with torch.no_grad():
        for document in (document for row in rows for document in row):
            hits = []
            for i, (found, labels) in enumerate(oracle.heads(speculator, document)):
                hits.append([(int(a), int(b)) for a, b in zip(found.argmax(-1), labels, strict=True)])
                right[i] += sum(a == b for a, b in hits[i])
                total[i] += sum(b != -100 for _, b in hits[i])
            for chain in zip(*hits, strict=False):
                if all(label != -100 for _, label in chain):
                    yields.append(1 + sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], chain)))
        loss = float(sum(oracle(speculator, rows)))
    accuracies = {f"accuracy/head{i + 1}": right[i] / total[i] for i in range(count)}
    return {"loss": loss, **accuracies, "acceptance_length": sum(yields) / len(yields)}


def evaluation(spec: Path) -> dict[str, float]:
    """What the last evaluation of a run recorded, without the loss of each head."""
    lines = [json.loads(line) for line in (spec.parent / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "eval/loss" in line][-1]
    found = {name.removeprefix("eval/"): value for name, value in last.items() if name.startswith("eval/")}
    return {name: value for name, value in found.items() if not name.startswith("loss/")}


RESUMABLE = {"type": "deepspeed", "save_every_n_steps": 1, "keep_last": 1}


def test_resumed_runs_are_the_uninterrupted_one(recipe: Any, prepared: Any) -> None:
    """Bit for bit, on two workers under ZeRO 2 and 3; the resumable checkpoint holds the speculator alone."""
    whole, cut = [], []
    for kind, stage in (("mlp", 2), ("cell", 3)):
        made = recipe(kind, stage, train_iters=4, micro_batch_size=2)
        checkpoints = {"checkpoint": [*made["checkpoint"], RESUMABLE]}
        whole.append(prepared(merged(made, checkpoints), f"whole-{kind}"))
        cut.append(prepared(merged(made, {**checkpoints, "exit_iteration_this_run": 2}), f"cut-{kind}"))
    run_workers([*whole, *cut], 2)
    for spec, kind in zip(cut, ("mlp", "cell"), strict=True):
        (state,) = (spec.parent / "checkpoints").glob("step-*")
        assert {name.split(".")[0] for file in state.glob("*.safetensors") for name in load_file(file)} == {
            "speculator"
        }
        made = recipe(kind, 2 if kind == "mlp" else 3, train_iters=4, micro_batch_size=2)
        prepared(merged(made, {"checkpoint": [*made["checkpoint"], RESUMABLE]}), f"cut-{kind}", resume=True)
    run_workers(cut, 2)
    for one, other in zip(whole, cut, strict=True):
        assert losses(one) == losses(other) and len(losses(one)) == 4
        before, after = (load_file(saved(spec) / "model.safetensors") for spec in (one, other))
        assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)


def test_training_goes_on_from_what_was_saved(recipe: Any, prepared: Any, tmp_path: Path) -> None:
    """Whatever ZeRO stage saves and loads it: with a rate of 0 the same file comes out, bit for bit."""
    first = [prepared(recipe(kind, stage, train_iters=2)) for kind, stage in (("mlp", 3), ("stacked", 0), ("cell", 2))]
    whole = {"checkpoint": [{"type": "huggingface", "save_end_of_training": True, "verify": False}]}
    run_workers([*first, prepared(merged(recipe(train_iters=1), whole))], 2)
    log = (first[0].parent / "worker.log").read_text()
    assert "can't load a stack of unequal widths in `proj_dim`" in log
    assert "`huggingface` saves the whole base" in log
    again = [
        prepared(merged(recipe(stage=stage, train_iters=1, optimizer={"lr": 0.0}, speculator_path=str(saved(spec))),
                        {"model": {"speculator_width": KINDS[kind].get("speculator_width", 32),
                                   "speculator": KINDS[kind].get("speculator", "mlp")}}))
        for spec, stage, kind in zip(first, (2, 3, 0), KINDS, strict=True)
    ]  # fmt: skip
    run_workers(again, 2)
    for one, other in zip(first, again, strict=True):
        before, after = (load_file(saved(spec) / "model.safetensors") for spec in (one, other))
        assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
        configs = [json.loads((saved(spec) / "config.json").read_text()) for spec in (one, other)]
        assert configs[0] == configs[1]
        assert losses(other)[0] < losses(one)[0]


def test_the_base_stays_as_it_is(recipe: Any, prepared: Any, tiny_model: Path) -> None:
    """In bf16 too, where a speculator learns as well; a run may export the base beside it."""
    export = {"type": "huggingface", "save_end_of_training": True, "verify": False}
    made = recipe("mlp", 2, model={"dtype": "bf16"}, train_iters=30, micro_batch_size=8)
    spec = prepared(merged(made, {"checkpoint": [*made["checkpoint"], export]}))
    run_workers([spec], 1)
    before, after = (
        load_file(tiny_model / "model.safetensors"),
        load_file(spec.parent / "model/latest/model.safetensors"),
    )
    assert all(after[name].equal(value.bfloat16()) for name, value in before.items())
    assert metrics(spec)[-1]["loss"] < 0.8 * metrics(spec)[0]["loss"]
    assert load_file(saved(spec) / "model.safetensors")["emb.0.weight"].dtype == torch.bfloat16
    shutil.rmtree(spec.parent)
