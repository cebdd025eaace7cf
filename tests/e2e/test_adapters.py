"""Adapters: trained as a bare loop trains them, saved alone, loaded again, merged, resumed; and what is refused."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import bare_loop
import pytest
import torch
from harness import losses, run, run_workers
from safetensors.torch import load_file, save_file
from test_oracle import token_rows

from ptrain.errors import ModelError, PtrainError
from ptrain.export import export
from ptrain.testing.recipes import merged

TARGETS = ("q_proj", "down_proj")
R, ALPHA = 4, 8
LORA = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": "all-linear"}
SAVES = [
    {"type": "deepspeed", "save_every_n_steps": 3},
    {"type": "huggingface", "save_end_of_training": True, "verify": False},
]
FILE = "adapter_model.safetensors"
STAGES = [0, 2, 3]


class Lora(torch.nn.Module):
    """y = W x + alpha / r B A x, by the formula of the paper (Hu et al. 2021, section 4.1)."""

    def __init__(self, layer: torch.nn.Linear, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.a, self.b = torch.nn.Parameter(a.clone()), torch.nn.Parameter(b.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + ALPHA / R * (x @ self.a.T @ self.b.T)


def lora_model(model: Any, weights: dict[str, torch.Tensor]) -> tuple[Any, dict[str, Lora]]:
    """`model` with adapters of our own, of these weights; and the adapters by place."""
    model.requires_grad_(False)
    places = {}
    for name in sorted({name.rpartition(".lora_")[0] for name in weights}):
        parent = model.get_submodule(name.removeprefix("base_model.model.").rpartition(".")[0])
        a, b = (weights[f"{name}.lora_{part}.weight"] for part in "AB")
        places[name] = Lora(getattr(parent, name.rpartition(".")[2]), a, b)
        setattr(parent, name.rpartition(".")[2], places[name])
    return model, places


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter that does something already, written by hand, and the tokenizer of its model."""
    folder = tmp_path_factory.mktemp("adapter")
    drawn = torch.Generator().manual_seed(1)
    weights = {}
    for layer, name in itertools.product(range(2), ("self_attn.q_proj", "mlp.down_proj")):
        size = 64 if name.endswith("q_proj") else 128
        place = f"base_model.model.model.layers.{layer}.{name}"
        weights[f"{place}.lora_A.weight"] = 0.1 * torch.randn(R, size, generator=drawn)
        weights[f"{place}.lora_B.weight"] = 0.1 * torch.randn(64, R, generator=drawn)
    save_file(weights, folder / FILE)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(tiny_model), "r": R,
        "lora_alpha": ALPHA, "target_modules": list(TARGETS),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / file, folder)
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_equals_the_bare_loop(workers: int, recipes: Any, prepared: Any, adapter: Path, tiny_model: Path) -> None:
    """An adapter that is trained further: losses and its weights to 1e-5, however the batch is cut, ZeRO 0 to 3."""
    from transformers import AutoModelForCausalLM

    cases = list(zip(STAGES, [(8, 1), (2, 4), (4, 2)], strict=True))
    specs = [
        prepared(recipes(
            model={"name_or_path": str(adapter)}, deepspeed={"zero_optimization": {"stage": stage}},
            micro_batch_size=cut[0], gradient_accumulation_steps=cut[1],
            checkpoint=[{"type": "huggingface", "save_end_of_training": True, "verify": stage == 3}],
        ))
        for stage, cut in cases
    ]  # fmt: skip
    run_workers(specs, workers)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model, places = lora_model(base, load_file(adapter / FILE))
    steps = len(losses(specs[0]))
    expected = bare_loop.train(model, token_rows(specs[0]), batch=8 * workers, steps=steps, lr=1e-3, seed=42)
    assert steps >= 4
    for (stage, cut), spec in zip(cases, specs, strict=True):
        where = f"workers={workers} ZeRO {stage} {cut}"
        torch.testing.assert_close(losses(spec), expected, atol=1e-5, rtol=0, msg=lambda m, w=where: f"{w}: {m}")
        folder = spec.parent / "model" / "latest"
        found = load_file(folder / FILE)
        assert not (folder / "config.json").exists() and not (folder / "model.safetensors").exists()
        assert len(found) == 2 * len(places), "the adapter alone is saved"
        for name, lora in places.items():
            for part, value in (("A", lora.a), ("B", lora.b)):
                difference = (found[f"{name}.lora_{part}.weight"] - value).abs().max().item()
                assert difference <= 1e-5, (where, name, part, difference)


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def test_rounded_weights(recipes: Any, prepared: Any, adapter: Path, tiny_model: Path) -> None:
    """QLoRA is LoRA on the rounded weights, made numbers again: losses and adapter to 1e-5; and so is what is merged."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = {"name_or_path": str(adapter), "quantization_config": NF4}
    recipe = recipes(model=model, micro_batch_size=4, epochs=1, checkpoint=SAVES)
    spec = prepared(merged(recipe, {"checkpoint": [SAVES[0], {**SAVES[1], "verify": True}]}))
    run_workers([spec], 2)
    rounded = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=BitsAndBytesConfig(**NF4))
    base = rounded.dequantize(torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert (base.model.layers[0].mlp.up_proj.weight - plain.model.layers[0].mlp.up_proj.weight).abs().max() > 1e-3
    oracle, places = lora_model(base, load_file(adapter / FILE))
    steps = len(losses(spec))
    expected = bare_loop.train(oracle, token_rows(spec), batch=8, steps=steps, lr=1e-3, seed=42)
    torch.testing.assert_close(losses(spec), expected, atol=1e-5, rtol=0)
    found = load_file(spec.parent / "model" / "latest" / FILE)
    for name, lora in places.items():
        assert (found[f"{name}.lora_A.weight"] - lora.a).abs().max() <= 1e-5, name
        assert (found[f"{name}.lora_B.weight"] - lora.b).abs().max() <= 1e-5, name
    whole = AutoModelForCausalLM.from_pretrained(export(spec.parent, merge=True))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, oracle(ids).logits, atol=1e-4, rtol=1e-4)


METHODS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "dora": {**LORA, "use_dora": True},
    "vera": {"peft_type": "VERA", "r": 4, "target_modules": ["q_proj", "o_proj"]},
    "ia3": {"peft_type": "ia3"},
    "tokens": {"r": 2, "trainable_token_indices": [1, 2]},
    "head": {"r": 2, "modules_to_save": ["lm_head"]},
}


def test_merged_models_compute_the_same(recipes: Any, prepared: Any, tiny_model: Path, tmp_path: Path) -> None:
    """Of every method, trained under ZeRO-3 on two workers: logits of the merged model, loaded without peft, to 1e-5.

    Tokens under ZeRO-2: peft reads their embeddings from ZeRO-3 shards on GPUs alone.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    specs = {
        name: prepared(recipes(
            model={"peft_config": keys}, micro_batch_size=4, epochs=1,
            deepspeed={"zero_optimization": {"stage": 2 if name == "tokens" else 3}},
            checkpoint=[{**SAVES[1], "verify": name == "dora"}], optimizer={"lr": 1e-2},
        ))
        for name, keys in METHODS.items()
    }  # fmt: skip
    run_workers(list(specs.values()), 2)
    ids = torch.arange(3, 40)[None]
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    for name, spec in specs.items():
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        beside = PeftModel.from_pretrained(base, str(spec.parent / "model" / "latest")).eval()
        if name == "lora":
            code, out, err = run("export", spec.parent, "--merge", "--to", tmp_path / name)
            assert code == 0 and out.endswith(f"model: {tmp_path / name}\n"), err
        else:
            assert export(spec.parent, merge=True) == spec.parent / "merged"
        folder = tmp_path / name if name == "lora" else spec.parent / "merged"
        assert not (folder / "adapter_config.json").exists()
        found = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            expected = beside(ids).logits
            torch.testing.assert_close(found(ids).logits, expected, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: n + m)
            assert (expected - plain(ids).logits).abs().max() > 1e-3, f"{name} has learnt nothing"
    with pytest.raises(PtrainError, match="not empty"):
        export(specs["dora"].parent, merge=True)
    with pytest.raises(PtrainError, match="has exported its newest checkpoint itself"):
        export(specs["dora"].parent)


def test_resume_is_exact_and_what_it_saves_is_exported(recipes: Any, prepared: Any, tmp_path: Path) -> None:
    """Bit for bit, dropout on; the checkpoint holds the adapter alone; `export` gives what the run would have."""
    changes: dict[str, Any] = {"model": {"peft_config": {**LORA, "lora_dropout": 0.1}}, "micro_batch_size": 8}
    for workers, stage in ((1, 0), (2, 3)):
        recipe = recipes(deepspeed={"zero_optimization": {"stage": stage}}, checkpoint=SAVES, epochs=3, **changes)
        names = f"whole-{workers}", f"cut-{workers}"
        whole, cut = prepared(recipe, names[0]), prepared(merged(recipe, {"exit_iteration": 3}), names[1])
        run_workers([whole, cut], workers)
        state = json.loads((cut.parent / "checkpoints" / "latest" / "state.json").read_text())
        assert all("lora" in name for name in state["parameters"])
        if workers == 1:
            early = export(cut.parent)
            assert load_file(early / FILE).keys() == load_file(whole.parent / "model" / "latest" / FILE).keys()
        run_workers([prepared(recipe, names[1], resume=True)], workers)
        assert losses(cut) == losses(whole)
        old = load_file(whole.parent / "model" / "latest" / FILE)
        for name, value in load_file(cut.parent / "model" / "latest" / FILE).items():
            assert value.equal(old[name]), name
    spec = prepared(merged(recipes(checkpoint=SAVES[:1], epochs=1, **changes), {"exit_iteration": 3}), "plain")
    run_workers([spec], 1)
    assert (export(spec.parent, merge=True) / "model.safetensors").is_file()


def test_a_run_that_exported_nothing_is_exported(recipes: Any, prepared: Any, tmp_path: Path) -> None:
    """All weights of a run with resumable checkpoints alone: those that the same run would have exported itself."""
    recipe = recipes(micro_batch_size=8, deepspeed={"zero_optimization": {"stage": 3}}, epochs=1)
    own = prepared(merged(recipe, {"checkpoint": SAVES[1:]}), "own")
    late = prepared(merged(recipe, {"checkpoint": [{"type": "deepspeed", "save_end_of_training": True}]}), "late")
    none = prepared(merged(recipe, {"checkpoint": [{**SAVES[0], "enabled": False}]}), "none")
    run_workers([own, late, none], 2)
    found = load_file(export(late.parent, tmp_path / "to") / "model.safetensors")
    expected = load_file(own.parent / "model" / "latest" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(value.equal(expected[name]) for name, value in found.items())
    with pytest.raises(PtrainError, match="has no adapter to merge"):
        export(late.parent, merge=True)
    with pytest.raises(PtrainError, match="has saved no checkpoint"):
        export(none.parent)
    with pytest.raises(PtrainError, match="there is no run in"):
        export(tmp_path / "nothing")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a key": ({"peft_config": {"rank": 4}}, "no key `rank`"),
    "a method": ({"peft_config": {"peft_type": "LORRA"}}, "is `LORRA`"),
    "a prompt": ({"peft_config": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}}, "before the prompt"),
    "a schedule": ({"peft_config": {"peft_type": "ADALORA"}}, "calls of its own"),
    "a module": ({"peft_config": {"megatron_config": {}, "megatron_core": "os"}}, "no key `megatron_config`"),
    "layers": ({"peft_config": {"target_modules": ["nope"]}}, "nope"),
    "rounded": ({"quantization_config": NF4}, "can't be trained"),
    "rounded how": ({"quantization_config": {"load_4bit": True}, "peft_config": LORA}, "no key `load_4bit`"),
    "random weights": ({"name_or_path": "", "config": {"model_type": "llama"}, "peft_config": LORA}, "loaded again"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, recipes: Any, prepared: Any, tmp_path: Path) -> None:
    """Before anything is trained, and nothing is written."""
    changes, message = REFUSED[what]
    with pytest.raises(PtrainError, match=message):
        prepared(recipes(model=changes), "refused")
    assert not (tmp_path / "refused").exists()


def test_an_adapter_has_one_model(recipes: Any, prepared: Any, adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Two adapters, a folder with both, and an adapter that is a pickle or names code are refused."""
    with pytest.raises(ModelError, match="asks for another one"):
        prepared(recipes(model={"name_or_path": str(adapter), "peft_config": LORA}))
    both = shutil.copytree(adapter, tmp_path / "both")
    shutil.copy(tiny_model / "config.json", both)
    with pytest.raises(ModelError, match="both a model and an adapter"):
        prepared(recipes(model={"name_or_path": str(both)}))
    importing = shutil.copytree(adapter, tmp_path / "importing")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (importing / "adapter_config.json").write_text(json.dumps({**config, "megatron_config": {"a": 1}}))
    with pytest.raises(ModelError, match="made with Megatron"):
        prepared(recipes(model={"name_or_path": str(importing)}))
    (importing / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="does not say which model"):
        prepared(recipes(model={"name_or_path": str(importing)}))
    pickled = shutil.copytree(adapter, tmp_path / "pickled")
    (pickled / FILE).rename(pickled / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"has no `adapter_model.safetensors`"):
        prepared(recipes(model={"name_or_path": str(pickled)}))


def test_new_tokens_are_trained_or_refused(recipes: Any, prepared: Any, tiny_model: Path, tmp_path: Path) -> None:
    """A tokenizer with tokens that the model has rows for and was not trained with."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = shutil.copytree(tiny_model, tmp_path / "roomy")
    roomy = AutoModelForCausalLM.from_pretrained(tiny_model)
    roomy.resize_token_embeddings(roomy.config.vocab_size + 8)
    roomy.save_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(tmp_path / "more")
    new = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])

    def recipe(**keys: Any) -> dict[str, Any]:
        return recipes(
            model={"name_or_path": str(model), "peft_config": {"r": 2, **keys}},
            tokenizer={"name_or_path": str(tmp_path / "more")},
        )

    with pytest.raises(ModelError, match="2 tokens that the model was not trained with, such as `<think>`") as refused:
        prepared(recipe())
    assert f"add `trainable_token_indices: {new}` to `model.peft_config`" in str(refused.value)
    assert prepared(recipe(trainable_token_indices=new)).is_file()
    assert prepared(recipe(modules_to_save=["embed_tokens", "lm_head"])).is_file()


def test_weights_of_the_model_itself_stay(recipes: Any, tmp_path: Path) -> None:
    """A way to begin that changes them (PiSSA) is refused: the adapter alone would be saved."""
    import yaml

    path = tmp_path / "pissa.yaml"
    recipe = recipes(model={"peft_config": {**LORA, "init_lora_weights": "pissa"}}, output_dir=str(tmp_path / "out"))
    path.write_text(yaml.safe_dump(recipe))
    code, _, err = run("run", path)
    assert code == 2 and "changes the model's own weights" in err, err
