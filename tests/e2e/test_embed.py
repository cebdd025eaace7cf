"""`embed` against a bare loop on whole batches: losses and weights, however a batch is cut, on 1 and 2 workers, ZeRO 0 to 3."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import embed_dense as dense
import pytest
import torch
from embed_worker import replay
from harness import losses, run_workers

from ptrain.testing import shards
from ptrain.testing.recipes import merged
from ptrain.testing.rows import WORDS, write_rows
from ptrain.testing.workers import run_workers as run_in_workers

GLOBAL = 8
SETTINGS: dict[str, dict[str, Any]] = {
    "infonce": {"temperature": 0.1},
    "symmetric matryoshka": {"temperature": 0.1, "symmetric": True, "matryoshka": [32, 8]},
    "hard negatives": {"temperature": 0.1, "in_batch_negatives": False},
    "margin_mse": {"loss": "margin_mse"},
    "kl": {"loss": "kl", "temperature": 0.1, "matryoshka": {16: 0.5}},
    "cosent": {"loss": "cosent", "temperature": 0.5},
}
CUTS = [(8, 1), (2, 4), (1, 8)]


def labelled(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Ragged rows with texts that come twice, and labels and scores that are missing."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 20))) for _ in range(count)]
    for at in range(count):
        size = rng.randint(1, 4)
        documents = [f"{texts[at]} one" if rng.random() < 0.5 else rng.choice(texts), *rng.sample(texts, size)]
        yield {
            "query": rng.choice(texts[:6]) if at % 4 == 0 else texts[at],
            "documents": documents,
            "relations": [1, *(rng.choice([1, 0, -1]) for _ in range(size))],
            **({"scores": [rng.random() for _ in documents]} if at % 3 else {}),
        }


@pytest.fixture
def embed(recipes: Any, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Makes a recipe of `embed` on ragged rows."""
    file = write_rows(tmp_path / "labelled.jsonl", labelled(21))

    def make(**changes: Any) -> dict[str, Any]:
        base = {
            "data": {"sources": [{"type": "jsonl", "path": str(file)}], "max_length": 64},
            "model": {"pooling": "mean"},
            "checkpoint": [{"type": "huggingface", "save_end_of_training": True, "verify": False}],
        }
        return recipes("embed", **merged(base, changes))

    return make


def rows_of(spec: Path, split: str = "train") -> list[tuple[dense.Query, list[list[int]]]]:
    """The prepared rows: what is known of each, and the tokens of its query and documents."""
    from ptrain.data.cache import open_prepared

    found = []
    for row in getattr(open_prepared(Path(json.loads(spec.read_text())["prepared"])), split):
        ends = list(itertools.accumulate(row["document_lengths"]))
        tokens = [row["input_ids"][a:b] for a, b in zip([0, *ends], ends, strict=False)]
        one = dense.Query(
            row["query_key"], row["document_keys"], row["relations"], row["scores"], row["positive_keys"]
        )  # fmt: skip
        found.append((one, tokens))
    return found


def bare(model: Any, rows: list[Any], steps: list[list[int]], keys: dict[str, Any]) -> list[float]:
    """Train `model` in place, a whole batch at a time, every text on its own; the loss of each step."""
    from transformers import get_scheduler

    named = list(model.named_parameters())
    plain = [p for n, p in named if n.endswith(("bias", "norm.weight"))]
    decayed = [p for n, p in named if not n.endswith(("bias", "norm.weight"))]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    schedule = get_scheduler("linear", optimizer, -(-len(steps) // 10), len(steps))
    found = []
    for numbers in steps:
        chosen = [rows[number] for number in numbers]
        loss = dense.loss([query for query, _ in chosen], embedded(model, chosen), keys)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        found.append(loss.item())
    return found


def embedded(model: Any, rows: list[Any]) -> torch.Tensor:
    """Every text on its own: the mean of its hidden states, of length 1."""
    texts = [tokens for _, row in rows for tokens in row]
    vectors = [model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0) for ids in texts]
    return torch.nn.functional.normalize(torch.stack(vectors), dim=1)


def steps_of(spec: Path, workers: int) -> list[list[int]]:
    """The rows of each step, of all workers."""
    found: dict[int, list[int]] = {}
    for rank in range(workers):
        for line in (spec.parent / f"ids-{rank}.jsonl").read_text().splitlines():
            record = json.loads(line)
            found.setdefault(record["step"], []).extend(record["rows"])
    return [found[step] for step in sorted(found)]


def check(settings: list[str], cases: list[Any], workers: int, embed: Any, prepared: Any, model: Path) -> None:
    """Train each case, and compare it with the bare loop."""
    from transformers import AutoModel

    specs = {
        (name, micro, stage): prepared(embed(
            micro_batch_size=micro, gradient_accumulation_steps=GLOBAL // micro // workers,
            deepspeed={"zero_optimization": {"stage": stage}}, **SETTINGS[name],
        ))
        for name, (micro, stage) in itertools.product(settings, cases)
    }  # fmt: skip
    run_workers(list(specs.values()), workers)
    for (name, *case), spec in specs.items():
        bare_model: Any = AutoModel.from_pretrained(model, dtype=torch.float32)
        steps = steps_of(spec, workers)
        assert len(steps) == 6
        assert max(map(len, steps)) == 7
        expected = bare(bare_model, rows_of(spec), steps, dense_keys(SETTINGS[name]))
        torch.testing.assert_close(
            losses(spec), expected, atol=1e-5, rtol=1e-5, msg=lambda m, w=(name, case): f"{w}: {m}"
        )
        trained = AutoModel.from_pretrained(spec.parent / "model" / "latest", dtype=torch.float32).state_dict()
        for key, value in bare_model.state_dict().items():
            assert (trained[key] - value).abs().max() <= 1e-5, (name, case, key)


def dense_keys(keys: dict[str, Any]) -> dict[str, Any]:
    sizes = keys.get("matryoshka")
    return {**keys, "matryoshka": dict.fromkeys(sizes, 1.0) if isinstance(sizes, list) else sizes}


def test_equals_whole_batches(embed: Any, prepared: Any, tiny_model: Path) -> None:
    """A batch in one piece, and in several; every ZeRO stage."""
    check(["infonce"], [(8, 0), (2, 2)], 1, embed, prepared, tiny_model)
    check(["symmetric matryoshka"], [(2, 1), (1, 3)], 2, embed, prepared, tiny_model)


@pytest.mark.exhaustive
@pytest.mark.parametrize("workers", [1, 2])
def test_every_loss_and_cut_equals_whole_batches(embed: Any, prepared: Any, tiny_model: Path, workers: int) -> None:
    """Every loss, cut and ZeRO stage."""
    cuts = [(GLOBAL // workers, 0), *itertools.product((2, 1), (0, 1, 2, 3))]
    check(list(SETTINGS), cuts, workers, embed, prepared, tiny_model)


def test_dropout_is_the_same_in_both_passes(embed: Any, prepared: Any) -> None:
    """The gradient of a step in four pieces is that of the whole batch with the dropout that was drawn."""
    spec = prepared(
        embed(
            micro_batch_size=2, gradient_accumulation_steps=4, temperature=0.1, gradient_clipping=0,
            model={"hf_config_kwargs": {"attention_dropout": 0.5}},
        )
    )  # fmt: skip
    run_in_workers(replay, spec, log=spec.parent / "worker.log")
    found = json.loads((spec.parent / "replay.json").read_text())
    assert found["step"] == pytest.approx(found["whole"], rel=1e-5)


def test_evaluation_contrasts_as_many_rows_as_a_step(embed: Any, prepared: Any, tiny_model: Path) -> None:
    """However they are cut: the loss and the accuracy of the model that training begins with."""
    from transformers import AutoModel

    changes = {
        "data": {"train_eval_split": [0.4, 0.6]}, "eval_at_start": True, "train_iters": 1, "temperature": 0.1,
        "micro_batch_size": 4, "deepspeed": {"zero_optimization": {"stage": 3}},
    }  # fmt: skip
    specs = [prepared(embed(eval_micro_batch_size=size, **changes)) for size in (1, 4)]
    run_workers(specs, 2)
    rows, model = rows_of(specs[0], "eval"), AutoModel.from_pretrained(tiny_model, dtype=torch.float32)
    assert len(rows) == 13
    losses, right, pairs = 0.0, 0.0, 0
    for begin in range(0, len(rows), GLOBAL):
        chosen = rows[begin : begin + GLOBAL]
        with torch.no_grad():
            vectors, queries = embedded(model, chosen), [query for query, _ in chosen]
            number = sum(query.relations.count(1) for query in queries)
            losses += number * dense.loss(queries, vectors, {"temperature": 0.1}).item()
            right += number * dense.accuracy(queries, vectors, True)
            pairs += number
    for spec in specs:
        first = json.loads((spec.parent / "metrics.jsonl").read_text().splitlines()[0])
        assert first["eval/loss"] == pytest.approx(losses / pairs, abs=1e-5)
        assert first["eval/accuracy"] == pytest.approx(right / pairs)


OTHERS = """
import ptrain

@ptrain.hookimpl(wrapper=True)
def prepare_batch(run):
    batch = yield
    return {**batch, "input_ids": batch["input_ids"] * 7 % 50}
"""


def test_batches_are_prepared_in_both_passes(tmp_path: Path, ptrain_run: Any, ptrain_recipe: Any) -> None:
    """What other layers make of a micro-batch is what is contrasted, in one piece and in several."""
    (tmp_path / "others.py").write_text(OTHERS)
    whole, cut = (
        ptrain_run(
            ptrain_recipe("embed", micro_batch_size=size, gradient_accumulation_steps=GLOBAL // size),
            code=tmp_path / "others.py",
        )
        for size in (GLOBAL, 2)
    )
    assert cut.losses == pytest.approx(whole.losses, abs=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("pooling", ["cls", "last"])
def test_texts_in_two_parts(pooling: str, ptrain_run: Any, ptrain_recipe: Any) -> None:
    """Two workers, each of which has half of every text, learn what one does; means are tried by the kit."""
    recipe = ptrain_recipe("embed", model={"pooling": pooling}, micro_batch_size=2, gradient_accumulation_steps=2)
    parts, alone = ptrain_run(recipe, workers=2, code=Path(shards.__file__)), ptrain_run(recipe)
    assert parts.losses == pytest.approx(alone.losses, abs=1e-5)
