"""What workers that share sequences check together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from swiftkv_made import SMALL, student, teacher
from torch import distributed
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from ptrain import stages
from ptrain.data.collate import collate
from ptrain_sequence_parallel import exchange
from ptrain_sequence_parallel.attention import exchange_heads
from ptrain_sequence_parallel.groups import Group
from ptrain_sequence_parallel.shards import added, cut

LENGTHS = ([7, 1, 12, 3], [9, 6], [22])
"""Of the documents of each row: 23 positions, which no number of workers but one divides."""
CLOSE = {"atol": 1e-8, "rtol": 1e-8}
SINGLE = {"atol": 1e-4, "rtol": 1e-4}
"""For families that compute norms or routers of experts in fp32, whatever the model does."""
HEADS = [(8, 8), (8, 4), (8, 2), (8, 1), (12, 4), (12, 3), (12, 6), (4, 2)]
"""Of queries, and of keys and values: fewer than workers, as many, more, and such as lie across their borders."""
SHALLOW = {"num_hidden_layers": 2}
OTHERS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"sliding_window": 5}, "gpt_neox": {}, "mixtral": {"num_local_experts": 3}, "cohere2": {"sliding_window": 5},
}  # fmt: skip
"""Further families, with what makes them small."""


def groups(*sizes: int) -> Iterator[Group]:
    """A group of each size that the workers can form."""
    for size in sizes:
        yield Group(size, distributed.get_rank() % size)


def together(function: Callable[..., None], *arguments: Any) -> None:
    """Call `function` in a process group of fp64."""
    from ptrain import engine

    engine.start("cpu", int(os.environ["LOCAL_RANK"]))
    torch.set_default_dtype(torch.float64)
    function(*arguments)
    engine.close()


def check_exchange() -> None:
    """Attention with the exchange is attention, and so are its gradients; so are sums over segments."""
    for group in groups(2, 4):
        for heads, shared in HEADS:
            _check_attention(group, heads, shared)
        _check_sums(group)


def _check_attention(group: Group, heads: int, shared: int) -> None:
    drawn = torch.Generator().manual_seed(heads * shared)
    shapes = [(2, heads, 12, 6), (2, shared, 12, 6), (2, shared, 12, 5), (2, heads, 12, 5)]
    q, k, v, weight = (torch.randn(shape, generator=drawn) for shape in shapes)
    whole = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    attend = functional.scaled_dot_product_attention
    expected = attend(*whole, is_causal=True, enable_gqa=True)
    (expected * weight).sum().backward()
    own = [tensor.chunk(group.size, 2)[group.rank].clone().requires_grad_() for tensor in (q, k, v)]
    times = exchange.repeats(heads, shared, group.size)
    there = exchange.to_heads(group, own[0], *(t.repeat_interleave(times, 1) for t in own[1:]))
    (back,) = exchange.to_positions(group, attend(*there, is_causal=True, enable_gqa=True))
    (back * weight.chunk(group.size, 2)[group.rank]).sum().backward()
    torch.testing.assert_close(back, expected.chunk(group.size, 2)[group.rank], **CLOSE)
    for part, one in zip(own, whole, strict=True):
        assert part.grad is not None and one.grad is not None
        torch.testing.assert_close(part.grad, one.grad.chunk(group.size, 2)[group.rank], **CLOSE)


def _check_sums(group: Group) -> None:
    """Each worker counts the loss of the sums, so that it is counted as often as there are workers."""
    values = torch.randn(3, 8, generator=torch.Generator().manual_seed(3))
    segments = torch.tensor([[0, 0, 0, 1, 1, -1, -1, -1], [2] * 8, [3, 3, 4, 4, 4, 4, 4, -1]])

    def sums(values: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        size = max(int(segments.max()) + 1, 0)
        inside = segments >= 0
        return torch.zeros(size).index_add(0, segments[inside], values[inside])

    whole = values.clone().requires_grad_()
    expected = sums(whole, segments)
    expected.square().sum().backward()
    own = values.chunk(group.size, 1)[group.rank].clone().requires_grad_()
    found = added(sums(own, segments.chunk(group.size, 1)[group.rank]), group)
    (found.square().sum() / group.size).backward()
    torch.testing.assert_close(found, expected, **CLOSE)
    assert own.grad is not None and whole.grad is not None
    torch.testing.assert_close(own.grad, whole.grad.chunk(group.size, 1)[group.rank], **CLOSE)


def models() -> Iterator[tuple[str, Any, list[int]]]:
    """A model of each kind in fp64, and the sizes that its heads can be divided by."""
    for heads, shared in HEADS[2:6]:
        sizes = {"hidden_size": 8 * heads, "num_attention_heads": heads, "num_key_value_heads": shared, **SHALLOW}
        yield f"llama {heads}/{shared}", teacher("llama", **sizes), [2, 4]
    for family in ("mistral", "qwen2", "qwen3", "deepseek_v2"):
        yield family, teacher(family, **({} if family == "qwen2" else SHALLOW)), [2, 4]
    for family, keys in OTHERS.items():
        torch.manual_seed(0)
        yield (
            family,
            AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **SHALLOW, **keys})).eval(),
            [2],
        )
    made = student(teacher("qwen2"), 3, 1, moved=0.1)
    yield "a student", made, [2, 4]
    taught = student(teacher("qwen2"), 3, 1, moved=0.1)
    taught.config.swiftkv = False
    yield "a student as its teacher", taught, [4]
    for reentrant in (False, True):
        recomputed = teacher("mistral", **SHALLOW).train()
        recomputed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        recomputed.enable_input_require_grads()
        yield f"checkpointed, reentrant {reentrant}", recomputed, [4]


def check_models() -> None:
    """Hidden states, and gradients of weights added over the workers, are those of the whole rows, to 1e-8."""
    for name, model, sizes in models():
        model.set_attn_implementation("ptrain_sdpa")
        model.set_experts_implementation("eager")  # the faster one has no fp64
        close = SINGLE if name.startswith("deepseek") or name in OTHERS else CLOSE
        batch = _batch(model)
        expected, gradients = _made(model, batch)
        exchange_heads(model)
        plain, _ = _made(model, batch)
        assert plain.equal(expected), f"{name}: whole rows are computed as before"
        for group in groups(*sizes):
            where = f"{name}, {group.size} workers"
            own = cut(batch, group, 0)
            found, parts = _made(model, own)
            begin = group.rank * found.shape[1]
            there = expected[:, begin : begin + found.shape[1]]
            inside = own["document_ids"][:, : there.shape[1]] >= 0
            torch.testing.assert_close(
                found[:, : there.shape[1]][inside], there[inside], **close, msg=lambda m, w=where: f"{w}: {m}"
            )
            assert parts.keys() == gradients.keys(), name
            for key, part in parts.items():
                distributed.all_reduce(part, group=group.process)
                torch.testing.assert_close(
                    part, gradients[key], **close, msg=lambda m, w=f"{where}: {key}": f"{w}: {m}"
                )


def _batch(model: Any) -> dict[str, Any]:
    rows = []
    for seed, lengths in enumerate(LENGTHS):
        ids = torch.randint(1, SMALL["vocab_size"], (sum(lengths),), generator=torch.Generator().manual_seed(seed))
        rows.append({"input_ids": ids.numpy(), "labels": ids.numpy(), "document_lengths": lengths})
    batch = collate(rows, pad_id=0)
    weight = torch.randn(
        *batch["input_ids"].shape, model.config.hidden_size, generator=torch.Generator().manual_seed(9)
    )
    return {**batch, "weight": weight * (batch["document_ids"] >= 0)[..., None]}


def _made(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states, and what a sum of them gives as gradients of the body's weights."""
    model.zero_grad()
    hidden = stages.forward(SimpleNamespace(), model, batch)  # type: ignore[arg-type]
    (hidden * batch["weight"]).sum().backward()
    return hidden.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_keywords() -> None:
    """Sinks of attention are those of the worker's heads; a bias that depends on positions is refused."""
    from ptrain import ModelError
    from ptrain_sequence_parallel import attention

    (group,) = groups(4)
    sinks, seen = torch.arange(8.0), {}

    def plain(module: Any, query: torch.Tensor, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        seen.update(kwargs, groups=module.num_key_value_groups)
        return query.transpose(1, 2), None

    told = cut({"input_ids": torch.zeros(1, 8), "document_lengths": [[8]]}, group, 0)["attention_arguments"]
    query, key = torch.randn(1, 8, 2, 4), torch.randn(1, 4, 2, 4)
    around = attention._around(plain, flex=False)
    out, _ = around(SimpleNamespace(), query, key, key, None, s_aux=sinks, position_ids=query, **told)
    assert out.equal(query.transpose(1, 2))
    assert seen.pop("s_aux").equal(sinks[2 * group.rank : 2 * group.rank + 2]) and seen == {"groups": 2}
    refused = False
    try:
        around(SimpleNamespace(), query, key, key, None, position_bias=query, **told)
    except ModelError as error:
        refused = "bias" in str(error)
    assert refused


def check_all() -> None:
    """All of the above, in one process."""
    check_exchange()
    check_keywords()
    check_models()
    check_flex()


def check_flex() -> None:
    """Flex attention has no gradient on a CPU: hidden states alone, in fp32."""
    torch.set_default_dtype(torch.float32)
    for name in ("llama", "mistral"):
        model = teacher(name, **SHALLOW)
        model.set_attn_implementation("flex_attention")
        batch = _batch(model)
        with torch.no_grad():
            expected = stages.forward(SimpleNamespace(), model, batch)  # type: ignore[arg-type]
            exchange_heads(model)
            for group in groups(2, 4):
                own = cut(batch, group, 0)
                found = stages.forward(SimpleNamespace(), model, own)  # type: ignore[arg-type]
                begin = group.rank * found.shape[1]
                there = expected[:, begin : begin + found.shape[1]]
                inside = own["document_ids"][:, : there.shape[1]] >= 0
                torch.testing.assert_close(found[:, : there.shape[1]][inside], there[inside], atol=1e-5, rtol=1e-5)


@contextlib.contextmanager
def two_machines() -> Iterator[None]:
    """Within it, each worker seems to be on a machine of its own."""
    before = {name: os.environ.get(name) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def refused(recipes: list[dict[str, Any]]) -> None:
    """A group over two machines, unless that is meant; a model that computes something else of parts."""
    import ptrain

    apart, meant, mixed = recipes
    with two_machines():
        _refuses(
            apart, r"workers 0 to 1 would share sequences, and they are not on one machine.*1 workers of a machine"
        )
        meant["plugins"]["sequence-parallel"]["across_nodes"] = True
        with ptrain.open_run(meant) as opened:
            assert opened.run.shards == 2 and opened.step().loss > 0
    _refuses(mixed, r"makes something else of a sequence in 2 parts.*hidden states differ by", plugins=[shifted])


def _refuses(recipe: dict[str, Any], message: str, **more: Any) -> None:
    import re

    import ptrain

    try:
        with ptrain.open_run(recipe, **more):
            raise AssertionError("it is not refused")
    except ptrain.PtrainError as error:
        assert re.search(message, str(error), re.DOTALL), str(error)
        assert error.exit_code == 2


def _shifted() -> Any:
    """User code by which a layer sees the token before each."""
    from ptrain import hookimpl

    @hookimpl(wrapper=True)
    def create_model() -> Any:
        model = yield

        def shift(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return output + functional.pad(output, (0, 0, 1, 0))[:, :-1]

        model.base_model.layers[0].mlp.register_forward_hook(shift)
        return model

    return create_model


shifted = _shifted()
