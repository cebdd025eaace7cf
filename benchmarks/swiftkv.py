"""SwiftKV beside the plain way: a training step, the pass over a prompt, and what is cached of it.

    python benchmarks/swiftkv.py

`all` and `half` are training steps of a small Llama with a vocabulary of 128,256, in fp32 on CPU: one row of 4,096
tokens, a label at every one or at half of them, 4 of 8 layers kept. `naive` computes the same loss of the same weights
and rows as one would write it first: the whole teacher, the whole student, all logits of both, torch's `kl_div`.
`prefill` is the time until `generate` has one token, for a Llama with 32 layers of which 16 are kept and the
proportions of Llama-3.1-8B; `limit` is the share of the matrix products that is left of the plain model's. `cache` is
what such a model keeps of a token. Times are CPU time of the process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import harness
import inputs
import step
from step import memory, padded

SMALL = {
    "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 1, "vocab_size": 128256, "initializer_range": 0.05, "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
}  # fmt: skip
"""What is trained: 73M parameters, of which 66M are embeddings and output layer."""
DEEP = {
    "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 32, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": inputs.VOCABULARY, "tie_word_embeddings": False,
}  # fmt: skip
"""What is generated with: Llama-3.1-8B, 16 times narrower."""
LENGTH = 4096
TEMPERATURE = 2.0
WARM, STEPS = 1, 1
PROMPTS = (128, 512, 2048)
GROUPS = (1, 4)


class Clock(step.Clock):
    """Looked at after each step: when that was, in CPU seconds."""

    def numbers(self, loss: float) -> dict[str, float]:
        """The median step, the memory above what the imports took, and the loss of the first step."""
        steps = [b - a for a, b in zip(self.times[WARM - 1 :], self.times[WARM:], strict=False)]
        return {"ms": 1000 * statistics.median(steps), "MiB": memory() - self.before, "loss": loss}


def rows(folder: Path) -> Path:
    """Conversations with a question and an answer of half a row each; the tokenizer is left in the folder."""
    drawn = inputs.written(None, 400)
    tokenizer = inputs.tokenizer(drawn)
    tokenizer.save_pretrained(folder / "tokenizer")
    texts = [said["content"] for line in drawn.open(encoding="utf-8") for said in json.loads(line)["messages"]]
    ids = tokenizer("\n".join(texts))["input_ids"]
    half, out = LENGTH // 2 - 8, folder / "rows.jsonl"
    with out.open("w", encoding="utf-8") as file:
        for start in range(0, 2 * half * (WARM + STEPS), 2 * half):
            asks, answers = (tokenizer.decode(ids[at : at + half]) for at in (start, start + half))
            said = [{"role": "user", "content": asks}, {"role": "assistant", "content": answers}]
            file.write(json.dumps({"messages": said}) + "\n")
    return out


def recipe(all_labels: bool, folder: Path) -> dict[str, Any]:
    """What ptrain runs; the naive loop reads the rows that are prepared for it, and begins with the same weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(folder / "base")
    return {
        "type": "swiftkv",
        "model": {"name_or_path": str(folder / "base"), "num_key_value_layers": 4, "dtype": "fp32"},
        "data": {
            "sources": [{"type": "jsonl", "path": str(rows(folder))}],
            "cache_dir": str(folder / "cache"),
            "max_length": LENGTH,
            "overlength": "truncate_right",
            "mask_inputs": not all_labels,
            "pad_to": "max_length",
        },
        "tokenizer": {"name_or_path": str(folder / "tokenizer")},
        "logits_loss_temp": TEMPERATURE,
        "optimizer": {"lr": 1e-4, "weight_decay": 0},
        "train_iters": WARM + STEPS,
        "loss_log_interval": 0,
        "output_dir": str(folder / "run"),
        "checkpoint": [],
    }


def ptrain(all_labels: bool, options: argparse.Namespace) -> Mapping[str, float]:
    """`ptrain run`, from the first step on."""
    import ptrain_swiftkv.models  # noqa: F401 - imports are not what is measured
    from ptrain import engine, loop
    from ptrain.job import open_spec, prepare_run
    from ptrain.recipe.load import load_recipe

    folder = Path(tempfile.mkdtemp())
    spec = prepare_run(load_recipe(recipe(all_labels, folder)), None)
    engine.start("cpu", 0)
    clock = Clock()

    loop.train(open_spec(spec, harness.Looks(clock.look)))
    first = json.loads((folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    return clock.numbers(first["loss"])


def naive(all_labels: bool, options: argparse.Namespace) -> Mapping[str, float]:
    """A plain loop."""
    import numpy as np
    import torch
    from transformers import AutoConfig

    from ptrain.job import prepare_data
    from ptrain.recipe.load import load_recipe
    from ptrain_swiftkv.models.llama import LlamaSwiftKVForCausalLM
    from ptrain_swiftkv.student import begin, freeze, student_config

    folder = Path(tempfile.mkdtemp())
    loaded = load_recipe(recipe(all_labels, folder))
    _, prepared = prepare_data(loaded, folder / "run")
    prepared_rows = prepared.train.with_format("numpy")
    drawn = np.random.Generator(np.random.PCG64(np.random.SeedSequence([loaded.recipe.data.seed, 0])))
    order = drawn.permutation(len(prepared_rows)).tolist()
    clock = Clock()
    config = student_config(AutoConfig.from_pretrained(folder / "base"), 4, 1)
    model = LlamaSwiftKVForCausalLM.from_pretrained(folder / "base", config=config, attn_implementation="sdpa").train()
    begin(model)
    freeze(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0)
    losses = []
    for at in order:
        loss = plain_loss(model, padded([prepared_rows[at]], packed=False)[0])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        clock.look()
    return clock.numbers(losses[0])


def plain_loss(model: Any, batch: Mapping[str, Any]) -> Any:
    """The loss of a micro-batch: every logit of both."""
    from torch.nn import functional

    asked = {name: value for name, value in batch.items() if name != "labels"}
    chosen = functional.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100
    teacher, student = both(model, asked)
    logp = functional.log_softmax(teacher.logits.float() / TEMPERATURE, dim=-1)
    logq = functional.log_softmax(student.logits.float() / TEMPERATURE, dim=-1)
    divergence = functional.kl_div(logq, logp, reduction="none", log_target=True).sum(-1)
    apart = functional.mse_loss(student.hidden_states[-2].float(), teacher.hidden_states[-2].float())
    return TEMPERATURE**2 * (divergence * chosen).sum() / chosen.sum() + apart


def both(model: Any, asked: Mapping[str, Any]) -> tuple[Any, Any]:
    """What teacher and student give, with the hidden states of all layers."""
    import torch

    from ptrain_swiftkv.models.body import as_teacher

    with torch.no_grad(), as_teacher(model):
        teacher = model(**asked, use_cache=False, output_hidden_states=True)
    return teacher, model(**asked, use_cache=False, output_hidden_states=True)


def deep(size: int | None) -> Any:
    """The plain model of 32 layers, or a student of it with groups of `size`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ptrain_swiftkv.models.llama import LlamaSwiftKVForCausalLM
    from ptrain_swiftkv.student import student_config

    torch.manual_seed(0)
    base = LlamaConfig(**DEEP, max_position_embeddings=8192)
    if size is None:
        return LlamaForCausalLM(base).eval()
    return LlamaSwiftKVForCausalLM(student_config(base, DEEP["num_hidden_layers"] // 2, size)).eval()


def prefill(length: int, options: argparse.Namespace) -> Mapping[str, float]:
    """The time until there is one token after a prompt of so many."""
    models = {"plain": deep(None), **{f"groups of {size}": deep(size) for size in GROUPS}}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(1 + (5 if length < 1000 else 2)):
        for name, model in models.items():
            times[name].append(first_token(model, length))
    found = {f"{name}, ms": 1000 * statistics.median(spent[1:]) for name, spent in times.items()}
    whole = products(length, None)
    return {**found, **{f"groups of {size}, limit": products(length, size) / whole for size in GROUPS}}


def first_token(model: Any, length: int) -> float:
    """CPU seconds."""
    import torch

    ids = (torch.arange(length)[None] * 7 + 1) % DEEP["vocab_size"]
    begin = time.process_time()
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0
    )
    return time.process_time() - begin


def products(length: int, size: int | None) -> float:
    """FLOP of the matrix products for a prompt of so many tokens; `size` of a student's groups."""
    hidden, layers = DEEP["hidden_size"], DEEP["num_hidden_layers"]
    keys = hidden * DEEP["num_key_value_heads"] // DEEP["num_attention_heads"]
    weights = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * DEEP["intermediate_size"]
    head = 2 * hidden * DEEP["vocab_size"]
    layer = length * (2 * weights + 2 * hidden * length)
    if size is None:
        return layers * layer + head
    late = layers // 2
    # The last token alone goes through the later layers, whose keys and values are made once a group.
    last = 2 * (weights - 2 * hidden * keys) + 4 * hidden * length
    return (layers - late) * layer + late // size * length * 4 * hidden * keys + late * last + head


def cache(options: argparse.Namespace) -> Mapping[str, float]:
    """Bytes that are kept of a token of a prompt, in fp32."""
    import torch

    length, found = 64, {}
    ids = torch.ones(1, length, dtype=torch.long)
    for name, size in (("plain", None), *((f"groups of {size}", size) for size in GROUPS)):
        with torch.no_grad():
            kept = deep(size)(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        tensors = [t for layer in kept.layers for t in (layer.keys, layer.values) if t is not None]
        found[f"{name}, bytes"] = sum(t.nbytes for t in tensors) / length
    return found


CASES: dict[str, harness.Case] = {
    **{
        f"{name}.{side}": partial(run, name == "all")
        for name in ("all", "half") for side, run in (("naive", naive), ("ptrain", ptrain))
    },
    **{f"prefill {length}": partial(prefill, length) for length in PROMPTS},
    "cache": cache,
}  # fmt: skip
AIMS = {("all", "ms"): 1.05, ("half", "ms"): 0.8, ("all", "MiB"): 0.5, ("half", "MiB"): 0.5}
WORDS = {"all": "every position with a label", "half": "half of them", "ms": "time per step", "MiB": "memory"}
RATIOS = {
    **{
        f"{WORDS[name]}, {WORDS[number]}, ptrain to naive": harness.Ratio(
            f"{name}.ptrain.{number}", f"{name}.naive.{number}", "less", aim
        )
        for (name, number), aim in AIMS.items()
    },
    **{
        f"{WORDS[name]}, loss of the first step, ptrain to naive": harness.Ratio(
            f"{name}.ptrain.loss", f"{name}.naive.loss", "less"
        )
        for name in ("all", "half")
    },
    **{
        f"prompt of {length}, groups of {size}, time to plain": harness.Ratio(
            f"prefill {length}.groups of {size}, ms", f"prefill {length}.plain, ms", "less"
        )
        for length in PROMPTS for size in GROUPS
    },
    **{
        f"cached bytes, groups of {size}, to plain": harness.Ratio(
            f"cache.groups of {size}, bytes", "cache.plain, bytes", "less", 0.5 + 0.5 / size
        )
        for size in GROUPS
    },
}  # fmt: skip


def add(parser: argparse.ArgumentParser) -> None:
    """The defaults of this benchmark."""
    parser.set_defaults(rounds=3)


if __name__ == "__main__":
    sys.exit(harness.main("swiftkv", CASES, RATIOS, add))
