"""Stage 2: samples of the base that can be had again, and the loss, gradients and resumed runs of training on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ptrain import RecipeError
from ptrain.testing import Finished
from ptrain_spec_decode.layout import Shape
from ptrain_spec_decode.sampling import uniforms
from ptrain_spec_decode.speculator import make
from ptrain_spec_decode.stage2 import Prompt, pieces, prompts_of

WIDTH, HEADS, PROMPT, LENGTH, TOP_K = 32, 3, 6, 9, 8
WATCH = '''
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

import ptrain


@ptrain.hookimpl
def on_start(run):
    """Keep what training begins with, and the gradients of each step."""
    if run.engine.stage:
        return
    (run.dir / "rows.json").write_text(json.dumps([list(map(int, row["input_ids"])) for row in run.train_data]))
    named = dict(run.model.speculator.named_parameters())
    save_file({name: p.detach().clone() for name, p in named.items()}, run.dir / "begin.safetensors")
    update = run.engine.update

    def kept():
        save_file({name: p.grad.clone() for name, p in named.items()}, run.dir / f"grads-{run.progress.step}.safetensors")
        return update()

    run.engine.update = kept


@ptrain.callback("pre-loss")
def note(run, batch):
    """Write down what was generated after which row, and in what micro-batches."""
    if batch["split"] == "train":
        rows = [[row, ids] for row, ids in zip(batch["row_numbers"], batch["input_ids"].tolist())]
        line = {"step": run.progress.step, "rows": rows, "size": len(batch["input_ids"])}
        with (run.dir / f"seen-{run.rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\\n")
'''


@pytest.fixture(scope="module")
def recipe(ptrain_recipe: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def make_recipe(**changes: Any) -> dict[str, Any]:
        stage2 = {
            "gen_train": True, "gen_prompt_length": PROMPT, "gen_seq_length": LENGTH, "gen_top_k": TOP_K,
            "gen_micro_batch_size": 3, "gen_train_micro_batch_size": 2,
        }  # fmt: skip
        base = ptrain_recipe("spec-decode", rows="conversations", model={"speculator_width": WIDTH}, train_iters=3)
        base["checkpoint"] = [{"type": "speculator", "save_end_of_training": True}]
        return {**base, **stage2, **changes}

    return make_recipe


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("code") / "watch.py"
    path.write_text(WATCH)
    return path


def seen(run: Finished, workers: int = 1) -> dict[int, dict[int, list[int]]]:
    """By step and row, the last token of the prompt and what was generated."""
    found: dict[int, dict[int, list[int]]] = {}
    for rank in range(workers):
        for line in map(json.loads, (run.dir / f"seen-{rank}.jsonl").read_text().splitlines()):
            for row, ids in line["rows"]:
                assert row not in found.setdefault(line["step"], {})
                found[line["step"]][row] = ids
    return found


def saved(run: Finished) -> dict[str, torch.Tensor]:
    """The tensors of the speculator that was saved at the end."""
    (file,) = (run.dir / "speculator" / "latest").glob("*.safetensors")
    return load_file(file)


def test_against_a_brute_force_reference(recipe: Any, watched: Path, ptrain_run: Any, ptrain_model: Path) -> None:
    """Every sample drawn token by token without a cache; every head's loss position by position."""
    run = ptrain_run(recipe(train_iters=1), code=watched)
    base = AutoModelForCausalLM.from_pretrained(ptrain_model, dtype=torch.float32).eval()
    heads = make(Shape("mlp", 64, base.config.vocab_size, inner=(WIDTH,), proj=(WIDTH,), emb=(WIDTH,)))
    heads.load_state_dict(load_file(run.dir / "begin.safetensors"))
    rows = json.loads((run.dir / "rows.json").read_text())
    total, count = [torch.zeros(())] * HEADS, [0] * HEADS
    samples = seen(run)[0]
    assert len(samples) == 4
    for row, ids in samples.items():
        text = rows[row][:PROMPT]
        assert ids[0] == text[-1]
        draws = uniforms(42, [f"0/{row}/0"], LENGTH)[0]
        hidden = []
        for draw in draws:
            with torch.no_grad():
                out = base(torch.tensor([text]), output_hidden_states=True)
            hidden.append(out.hidden_states[-1][0, -1])
            kept = out.logits[0, -1].topk(TOP_K).indices.sort().values
            cumulative = out.logits[0, -1, kept].double().softmax(-1).cumsum(-1)
            text.append(int(kept[int((cumulative <= draw).sum())]))
        assert ids[1:] == text[PROMPT:]
        written = text[PROMPT:]
        for at in range(LENGTH):
            state = heads.begin(hidden[at])
            for i in range(HEADS):
                if at + 1 + i < LENGTH:
                    state = heads.advance(state, torch.tensor(written[at + i]), i)
                    logits = heads.head(i)(state.hidden)
                    total[i] = total[i] - logits.log_softmax(-1)[written[at + 1 + i]]
                    count[i] += 1
    loss: Any = sum(t / n for t, n in zip(total, count, strict=True))
    assert run.losses[0] == pytest.approx(loss.item(), rel=1e-6)
    loss.backward()
    grads = load_file(run.dir / "grads-0.safetensors")
    for name, parameter in heads.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_cuts_and_workers_make_no_difference(recipe: Any, watched: Path, ptrain_run: Any) -> None:
    """The same samples, losses and weights on one worker and on two that share the weights (ZeRO-3)."""
    alone = ptrain_run(recipe(micro_batch_size=6), code=watched)
    zero3 = {"zero_optimization": {"stage": 3}}
    changes = {"gen_micro_batch_size": 1, "gen_train_micro_batch_size": 3, "deepspeed": zero3}
    both = ptrain_run(recipe(micro_batch_size=1, gradient_accumulation_steps=3, **changes), workers=2, code=watched)
    assert seen(both, workers=2) == seen(alone)
    # Rows of the last step: 17 rows are 6, 6 and 5.
    assert [len(rows) for rows in seen(alone).values()] == [6, 6, 5]
    assert both.losses == pytest.approx(alone.losses, rel=1e-5)
    for name, value in saved(both).items():
        torch.testing.assert_close(value, saved(alone)[name], rtol=1e-3, atol=1e-5)
    other = ptrain_run(recipe(micro_batch_size=6, seed=7), code=watched)
    assert seen(other) != seen(alone)


def test_a_resumed_run_is_the_same_bit_for_bit(recipe: Any, watched: Path, ptrain_run: Any) -> None:
    saves = [{"type": "deepspeed", "save_every_n_steps": 1}, {"type": "speculator", "save_end_of_training": True}]
    whole = ptrain_run(recipe(checkpoint=saves, train_iters=4), code=watched)
    ptrain_run(recipe(checkpoint=saves, train_iters=4, exit_iteration=2), code=watched)
    again = ptrain_run(recipe(checkpoint=saves, train_iters=4), resume=True, code=watched)
    assert again.losses == whole.losses
    assert seen(again) == seen(whole)
    for name, value in saved(again).items():
        assert torch.equal(value, saved(whole)[name])


def test_several_prompts_of_a_row(recipe: Any, watched: Path, ptrain_run: Any) -> None:

    run = ptrain_run(recipe(train_iters=1, gen_train_global_batch_size=8), code=watched)
    lines = [json.loads(line) for line in (run.dir / "seen-0.jsonl").read_text().splitlines()]
    rows = [row for line in lines for row, _ in line["rows"]]
    assert len(rows) == 8 and len(set(rows)) == 4
    texts = [tuple(ids) for line in lines for _, ids in line["rows"]]
    assert len(set(texts)) == 8


def test_prompts_are_cut_within_documents() -> None:
    batch = {
        "input_ids": torch.arange(40).view(2, 20), "document_lengths": [[3, 9, 8], [20]], "rows": 2,
        "row_numbers": [5, 9],
    }  # fmt: skip
    found = prompts_of(batch, 4, 3)
    assert [prompt.tokens for prompt in found if prompt.row == 5] == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10]]
    assert [prompt.tokens[0] for prompt in found if prompt.row == 9] == [20, 24, 28]
    assert found[-1] == Prompt([28, 29, 30, 31], 9, 2)
    assert [prompt.piece for prompt in prompts_of(batch, 4, 1)] == [0, 0]
    assert prompts_of({**batch, "rows": 0}, 4, 1) == []
    assert len(prompts_of(batch, 4, 99)) == 1 + 2 + 2 + 5


def test_prompts_of_a_step_are_a_multiple_of_its_rows() -> None:
    recipe = SimpleNamespace(micro_batch_size=2)
    run: Any = SimpleNamespace(config=SimpleNamespace(), recipe=recipe, accumulation=3, data_world=2, world=2)
    for wanted, expected in ((None, 1), (12, 1), (48, 4)):
        run.config.gen_train_global_batch_size = wanted
        assert pieces(run) == expected
    run.config.gen_train_global_batch_size = 40
    with pytest.raises(RecipeError, match=r"is 40, and a step has 12 rows of text \(2 x 3 x 2 workers\)") as caught:
        pieces(run)
    assert caught.value.problems[0].fix == "set it to 36, or leave it out for a prompt a row"
    run.world = 4
    with pytest.raises(
        RecipeError, match=r"a plugin cuts sequences up over workers \(4 of them read 2 different rows\)"
    ):
        pieces(run)
