"""One kernel for all documents of a batch computes what one call for each does.

Without a GPU the kernel is replaced by a loop that does what its documentation says; all around it is then tested.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from ptrain import stages
from ptrain.data.collate import collate
from ptrain.errors import ModelError
from ptrain.model import varlen
from ptrain.model.apart import check_apart
from ptrain.model.attention import NAME, Documents
from ptrain.model.choice import has_varlen
from ptrain.model.varlen import VARLEN, boundaries

LENGTHS = [[7, 1, 12, 3], [9, 6], [30], [32]]
SIZE = 32
SMALL: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 5},
}


def document_by_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, scale: float | None, left: int,
    right: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Attention of [tokens, heads, d], within so many tokens to the left and right (all where that is negative)."""
    out = []
    for start, stop in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        q, k, v = (t[start:stop].transpose(0, 1) for t in (query, key, value))
        k, v = (t.repeat_interleave(len(q) // len(t), dim=0) for t in (k, v))
        distance = torch.arange(stop - start)[:, None] - torch.arange(stop - start)[None]
        mask = ((-distance <= right) | (right < 0)) & ((distance <= left) | (left < 0))
        out.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(0, 1))
    return torch.cat(out)


def torch_kernel(q: Any, k: Any, v: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, **kwargs: Any) -> Any:
    """`torch.nn.attention.varlen.varlen_attn`, by its documentation."""
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert kwargs["enable_gqa"] or q.shape[1] == k.shape[1]
    left, right = kwargs["window_size"]
    return document_by_document(q, k, v, cu_seq_q, kwargs["scale"], left, right)


def flash_kernel(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, **kwargs: Any) -> Any:
    """`flash_attn_varlen_func` of flash-attn, by its documentation."""
    left, right = kwargs.get("window_size", (-1, -1))
    return document_by_document(q, k, v, cu_seqlens_q, kwargs["softmax_scale"], left, 0 if kwargs["causal"] else right)


def one_document_a_row(q: Any, k: Any, v: Any, **kwargs: Any) -> Any:
    """`flash_attn_func` of flash-attn, by its documentation."""
    ends = torch.arange(len(q) + 1) * q.shape[1]
    q_flat, k_flat, v_flat = (t.flatten(0, 1) for t in (q, k, v))
    return document_by_document(q_flat, k_flat, v_flat, ends, kwargs["softmax_scale"], -1).view(q.shape)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let both run on a CPU, in fp32."""
    pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no kernel for documents of any length")
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torch_kernel)
    monkeypatch.setattr(varlen, "DTYPES", (torch.float32,))
    from transformers import modeling_flash_attention_utils as flash

    supported: dict[str, bool] = dict.fromkeys(
        ("dropout_p", "window_size", "deterministic", "softcap", "cache_seqlens", "max_seqlen_q", "max_seqlen_k"), True
    )

    def process(**kwargs: Any) -> dict[str, Any]:
        return flash._process_flash_attention_kwargs(**kwargs, supports_mapping=supported)

    functions = (one_document_a_row, flash_kernel, None, None, None)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda _: (functions, (process, None)))


def states(model: Any, batch: dict[str, Any], name: str) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Hidden states of the real tokens, and the gradients of their squares."""
    model.config._attn_implementation = name
    hidden = stages.forward(SimpleNamespace(), model, batch)  # type: ignore[arg-type]
    real = hidden[batch["document_ids"] >= 0]
    return real.detach(), torch.autograd.grad((real**2).mean(), list(model.base_model.parameters()))


def batch_of(lengths: list[list[int]], size: int = SIZE) -> dict[str, Any]:
    drawn = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 67, (sum(row),), generator=drawn).numpy() for row in lengths]
    return collate(
        [{"input_ids": i, "labels": i, "document_lengths": n} for i, n in zip(rows, lengths, strict=True)],
        pad_id=0, length=size,
    )  # fmt: skip


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("rows", [LENGTHS, LENGTHS[:1], LENGTHS[3:]], ids=["several rows", "one row", "one document"])
@pytest.mark.parametrize("name", [VARLEN, "flash_attention_2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model(family: str, name: str, rows: list[list[int]]) -> None:
    """With grouped heads, padding, windows and several packed rows."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).float()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = batch_of(rows)
    expected, expected_gradients = states(model, batch, NAME)
    found, gradients = states(model, batch, name)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for one, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", [VARLEN, "flash_attention_2"])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_an_encoder(family: str, name: str) -> None:
    """Attention in both directions, within a window in some layers."""
    torch.manual_seed(0)
    own = {"local_attention": 8, "num_hidden_layers": 4, "cls_token_id": 2, "sep_token_id": 3}
    keys = {
        key: value
        for key, value in SMALL.items()
        if key not in ("head_dim", "num_key_value_heads", "num_hidden_layers")
    }
    config = AutoConfig.for_model(
        family, bos_token_id=2, eos_token_id=3, **keys, **(own if family == "modernbert" else {"num_hidden_layers": 2})
    )
    model = AutoModel.from_config(config, attn_implementation=NAME).float().eval()
    batch = batch_of(LENGTHS)
    expected, found = (_hidden(model, batch, one) for one in (NAME, name))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    model.config._attn_implementation = name
    alone = model(input_ids=batch["input_ids"][:1, :7]).last_hidden_state[0] if name == VARLEN else expected[:7]
    torch.testing.assert_close(found[:7], alone, atol=1e-5, rtol=0)


def _hidden(model: Any, batch: dict[str, Any], name: str) -> torch.Tensor:
    model.config._attn_implementation = name
    return stages.forward(SimpleNamespace(), model, batch)[batch["document_ids"] >= 0].detach()  # type: ignore[arg-type]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("micro", "evaluated"), [(1, None), (2, None), (1, 2)])
@pytest.mark.parametrize("told", [True, False])
def test_documents_of_several_rows_are_asked_about_too(told: bool, micro: int, evaluated: int | None) -> None:
    """Transformers itself finds documents in a batch of one row alone; a model may take no arguments to be told by."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SMALL)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).float()
    model.config._attn_implementation = "flash_attention_2"
    model._supports_attention_backend = told
    recipe = SimpleNamespace(micro_batch_size=micro, eval_micro_batch_size=evaluated)
    run: Any = SimpleNamespace(model=model, device=torch.device("cpu"), recipe=recipe)
    run.call = lambda stage, **arguments: getattr(stages, stage)(run, **arguments)
    if told or max(micro, evaluated or 1) == 1:
        check_apart(run)
    else:
        with pytest.raises(ModelError, match="see each other in LlamaForCausalLM"):
            check_apart(run)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("size", "extra"),
    [
        (16, {"dropout": 0.5}),
        (12, {}),
        (264, {}),
        (16, {"position_bias": torch.ones(1, 1)}),
    ],
    ids=["dropout", "odd size", "large head", "bias"],
)
def test_what_the_kernel_cannot_is_left_to_sdpa(
    size: int, extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, NAME, lambda *a, **kwargs: seen.append(kwargs))
    where = boundaries(LENGTHS, SIZE, torch.device("cpu"))
    query = torch.randn(len(LENGTHS), 2, SIZE, size)
    function = ALL_ATTENTION_FUNCTIONS[VARLEN]
    documents = Documents(LENGTHS)
    function(torch.nn.Module(), query, query, query, None, document_lengths=documents, **where, **extra)
    assert seen == [{"document_lengths": documents, "sliding_window": None, **extra}]


def test_boundaries() -> None:
    """Padding is a document of its own; a full row has none."""
    found = boundaries([[3, 2], [8], [1]], 8, torch.device("cpu"))
    assert found["cu_seq_lens_q"].tolist() == [0, 3, 5, 8, 16, 17, 24]
    assert found["cu_seq_lens_q"].dtype == torch.int32
    assert found["max_length_q"] == found["max_length_k"] == 8
    assert isinstance(found["max_length_q"], int)  # a tensor would be read back from the device in every layer


LONG = [[700, 1, 290], [1000], [3, 1021]]
AVAILABLE = {
    VARLEN: has_varlen,
    "flash_attention_2": is_flash_attn_2_available,
    "flash_attention_3": lambda: is_flash_attn_3_available() and torch.cuda.get_device_capability()[0] == 9,
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("window", [None, 4, 500])
@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (8, 2)])
@pytest.mark.parametrize("name", AVAILABLE)
def test_the_kernel_itself(name: str, queries: int, keys: int, window: int | None) -> None:
    """Forward and gradients in bf16 are about as far from those in fp32 as document by document in bf16."""
    if not AVAILABLE[name]():
        pytest.skip(f"{name} is not installed")
    torch.manual_seed(0)
    module: Any = torch.nn.Linear(1, 1, dtype=torch.bfloat16)
    module.config = SimpleNamespace(_attn_implementation=name)
    module.is_causal, module.num_key_value_groups = True, queries // keys
    shape = (len(LONG), 1024, 64)
    inputs = [torch.randn(shape[0], n, *shape[1:], device="cuda").bfloat16() for n in (queries, keys, keys)]
    real = batch_of(LONG, 1024)["document_ids"].cuda() >= 0
    weights = torch.randn(*shape[:2], queries, 64, device="cuda")[real]

    def attend(by: str, dtype: torch.dtype, **extra: Any) -> list[torch.Tensor]:
        given = [t.to(dtype).requires_grad_() for t in inputs]
        out = ALL_ATTENTION_FUNCTIONS[by](module, *given, None, sliding_window=window, scaling=0.125, **extra)[0][real]
        return [out, *torch.autograd.grad((out.float() * weights).sum(), given)]

    exact, plain = (attend(NAME, dtype, document_lengths=Documents(LONG)) for dtype in (torch.float32, torch.bfloat16))
    together = attend(name, torch.bfloat16, **boundaries(LONG, 1024, torch.device("cuda")))
    for best, one, other in zip(exact, plain, together, strict=True):
        error, allowed = ((t.float() - best).abs().max().item() for t in (other, one))
        assert error <= 2 * allowed + 1e-3
