"""`huggingface`: models of transformers, loaded from the hub or a folder, or made from a configuration."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from ptrain.data.sources.base import content_hashes
from ptrain.errors import ModelError
from ptrain.hub import explained, said
from ptrain.parts import Model
from ptrain.recipe.sections import ModelConfig

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from ptrain.model.choice import Choice
    from ptrain.run import Run

FITTING = "leave out what `model.hf_config_kwargs` says of sizes, or download or save the model again"
OLD_NAMES = {"LayerNorm.gamma", "LayerNorm.beta"}
"""What the weights of norms are called in very old files."""
ONLY_SPEED = {"attn_implementation", "compile", "disable_activation_checkpoint"}
"""Keys that change how fast a model is, and nothing else but rounding."""
LAYERS = "num_hidden_layers"
ATTENTION = Literal["auto", "sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"]


class HuggingFaceModel(Model):
    """A causal language model of transformers, or what a subclass says by `auto`."""

    may_lack: str = ""
    """A pattern for the names of weights that what is loaded need not have, as they are made anew."""
    blank = False
    """Make it from its configuration, whatever weights there are: for a plan, on a device without memory."""

    class Config(ModelConfig):
        """Keys of `huggingface`."""

        config: dict[str, Any] = {}
        """Make the model with random weights from these keys (`model_type: llama`, ...), not from a name."""
        hf_config_kwargs: dict[str, Any] = {}
        """Keys of the model's configuration to change; another number of layers gives random weights."""
        attn_implementation: ATTENTION = "auto"
        """How attention is computed. `auto` goes by what is here: on a GPU flash attention, if it is installed and
        works, or torch's own kernel for packed documents, otherwise `sdpa`; a line at the start says which, and why.
        What is named and not installed is an error, never replaced silently."""
        disable_activation_checkpoint: bool | None = None
        """False recomputes activations in the backward pass to save memory; by default that is done on GPUs."""
        revision: str | None = None
        """The commit, branch or tag on the hub."""
        trust_remote_code: bool = False
        """Run Python code that comes with the model; needs `revision` to be a commit."""
        peft_config: dict[str, Any] = {}
        """Train an adapter instead of the model's own weights, and save that alone: keys of the library peft, such as
        `{peft_type: LORA, r: 16, target_modules: all-linear}`. `peft_type` is LORA where it is left out."""
        quantization_config: dict[str, Any] = {}
        """Load the weights of the model rounded by bitsandbytes, to train an adapter beside them (QLoRA):
        `{load_in_4bit: true, bnb_4bit_quant_type: nf4}` or `{load_in_8bit: true}`, and what else it takes."""
        save_name: str | None = None
        """The name that the model card of the result carries."""

        @model_validator(mode="after")
        def _adapts_something(self) -> Any:
            if self.quantization_config and self.config:
                raise ValueError(
                    "`quantization_config` rounds weights that are loaded: give `name_or_path`, not `config`"
                )
            if self.peft_config and self.config:
                raise ValueError(
                    "`peft_config` adapts a model that can be loaded again: give `name_or_path`, not `config`, whose "
                    "weights are drawn at random"
                )
            return self

    dequantized: bool = False
    """Whether rounded weights become numbers of the dtype again once they are loaded, to merge an adapter."""

    def create_config(self, run: Run) -> PretrainedConfig:
        """The model's configuration, with `hf_config_kwargs` applied.

        Raises:
            ModelError: no such model, or a key that this kind of model does not have.
        """
        from huggingface_hub.errors import StrictDataclassError

        if self.config.quantization_config:
            self._check_quantization(run)
        config = self._from_keys(run) if self.config.config else self._from_name()
        for key, value in {**self._by_layer(config), **self.config.hf_config_kwargs}.items():
            _check_key(config, key, "model.hf_config_kwargs")
            try:
                setattr(config, key, value)
            except (StrictDataclassError, TypeError, ValueError, AttributeError) as error:
                raise ModelError(
                    f"`model.hf_config_kwargs.{key}` can't be {value!r} in a {config.model_type} configuration: "
                    + said(error)
                ) from error
        return config

    def create_model(self, run: Run, config: PretrainedConfig) -> PreTrainedModel:
        """The model in its dtype, with activation checkpointing where it is on.

        Raises:
            ModelError: weights are missing, or don't fit the configuration.
        """
        choice = self.attention(config, run.device)
        run.say(f"attention: {choice.name}, because {choice.because}")
        if self._random(config):
            # `from_config` writes the implementation into the config it is given.
            model = self.auto_class(config).from_config(
                _copy(config), attn_implementation=choice.name, dtype=self._dtype(), **self.code(config)
            )
        else:
            self._shard(run)
            model = self.pretrained(config, choice.name, run.warn)
        if self.config.quantization_config:
            model = self._rounded(model)
        self.adapt(model)
        if _checkpoints_activations(self.config.disable_activation_checkpoint, run.device):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    def load(self, device: torch.device, warn: Callable[[str], None]) -> PreTrainedModel:
        """The model that `name_or_path` names, on `device`, to be asked without a run.

        Raises:
            ModelError: there is none, or its weights are missing or don't fit.
        """
        from ptrain.engine import quiet

        quiet()
        config = self._from_name()
        model = self.pretrained(config, self.attention(config, device).name, warn)
        self.adapt(model)
        return model.to(device).eval()  # type: ignore[arg-type]

    @staticmethod
    def positions(model: PreTrainedModel) -> int | None:
        """The most tokens of a document that the model was made for, where its configuration says so."""
        from ptrain.model.rows import first_position

        known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        return known - first_position(model) if known else None

    @staticmethod
    def learnt_positions(model: PreTrainedModel) -> int | None:
        """The most tokens of a document that the model can read; None where positions are not learnt, and go on."""
        from ptrain.model.rows import learns_positions

        return HuggingFaceModel.positions(model) if learns_positions(model) else None

    def auto_class(self, config: PretrainedConfig) -> Any:
        """The class of transformers that makes the model from this configuration."""
        import transformers

        return getattr(transformers, self.auto(config))

    def attention(self, config: PretrainedConfig, device: torch.device) -> Choice:
        """How attention is computed, and why."""
        from ptrain.model.choice import attention

        return attention(config, self.config.attn_implementation, self._dtype(), device, self._class(config))

    def _class(self, config: PretrainedConfig) -> Any:
        """The class of a model with this configuration, where transformers knows it."""
        kind = self.auto_class(config)._model_mapping.get(type(config), None)
        return kind[0] if isinstance(kind, tuple) else kind

    def adapt(self, model: PreTrainedModel) -> None:
        """Give `model` the adapter that the recipe describes, or the one that it names, if any.

        Raises:
            ModelError: there is no such adapter, or it doesn't fit.
        """
        from ptrain.engine import quiet
        from ptrain.model import adapters

        name, revision, folder = self._base
        if folder is None and not self.config.peft_config:
            return
        if importlib.util.find_spec("peft") is None:
            raise ModelError("adapters need the package peft, which is not installed", fix="pip install peft")
        quiet()  # peft imports DeepSpeed
        if folder is None:
            adapters.attach(model, self.config.peft_config, name, revision)
        elif self.config.peft_config:
            raise ModelError(
                f"`{self.config.name_or_path}` is an adapter, and `model.peft_config` asks for another one",
                fix="leave `peft_config` out to train the adapter further, or name the model that it belongs to",
            )
        else:
            adapters.load(model, folder)

    def restore(self, model: PreTrainedModel, folder: Path) -> None:
        """Give `model`, which has an adapter, what was trained and exported to `folder`."""
        from ptrain.model import adapters

        adapters.restore(model, folder)

    def fingerprint(self, run: Run) -> Any:
        """Of the files of a folder, by content; of the commit on the hub; or of what weights are drawn from."""
        keys = self.config.model_dump(mode="json", exclude=ONLY_SPEED)
        name, _, folder = self._base
        # An adapter, too, may draw what it begins with.
        drawn = run.recipe.seed if not name or self.config.peft_config or self._random(run.hf_config) else None
        here = [str(path) for path in (folder, name) if path and Path(path).is_dir()]
        if self.config.name_or_path in here:
            keys["name_or_path"] = ""
        files = [sorted(p for kind in ("*.safetensors", "*.json") for p in Path(one).glob(kind)) for one in here]
        return [keys, getattr(run.hf_config, "_commit_hash", None), drawn, [content_hashes(one) for one in files]]

    @functools.cached_property
    def _base(self) -> tuple[str, str | None, Path | None]:
        """The name and the revision of the model, and the folder of the adapter where `name_or_path` names one."""
        from ptrain.model.adapters import base_of, folder_of

        name, revision = self.config.name_or_path, self.config.revision
        with explained("model", name):
            folder = folder_of(name, revision)
        return (*base_of(folder), folder) if folder is not None else (name, revision, None)

    def _by_layer(self, config: PretrainedConfig) -> dict[str, Any]:
        """What a configuration lists layer by layer, for another number of layers: its first ones, or all over again.

        Many list the kinds of their layers, `layer_types`.
        """
        before, wanted = getattr(config, "num_hidden_layers", None), self.config.hf_config_kwargs.get(LAYERS)
        if not before or not isinstance(wanted, int) or wanted == before:
            return {}
        known = {key: value for key, value in config.to_dict().items() if "layer" in key and isinstance(value, list)}
        return {
            key: [value[at % before] for at in range(wanted)] for key, value in known.items() if len(value) == before
        }

    def _random(self, config: PretrainedConfig) -> bool:
        if self.blank or self.config.config:
            return True
        layers = self.config.hf_config_kwargs.get(LAYERS)
        return layers is not None and layers != self._from_name().num_hidden_layers

    def _dtype(self) -> torch.dtype:
        import torch

        from ptrain.model.quantized import DTYPES

        return getattr(torch, DTYPES[self.config.dtype])

    def _from_keys(self, run: Run) -> PretrainedConfig:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        keys = dict(self.config.config)
        kind = keys.pop("model_type", None)
        if kind is None:
            raise ModelError("`model.config` has no `model_type`", fix="add one, e.g. `model_type: llama`")
        try:
            plain = AutoConfig.for_model(kind)
        except ValueError as error:
            raise ModelError(
                f"transformers knows no model type `{kind}`", expected="a name such as llama, qwen3, gemma3_text"
            ) from error
        for key in keys:
            _check_key(plain, key, "model.config")
        tokenizer = run.tokenizer
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        try:
            return AutoConfig.for_model(kind, **{"vocab_size": len(tokenizer), **special, **keys})
        except (StrictDataclassError, TypeError, ValueError) as error:
            raise ModelError(f"`model.config` is no configuration of {kind}: {said(error)}") from error

    def code(self, config: PretrainedConfig) -> dict[str, Any]:
        """How code that comes with the model is run where one is made from its configuration alone.

        Without a revision, transformers would take the newest code that there is.
        """
        trusted, kind = self._trusted(), self._class(config)
        known = kind is not None and not kind.__module__.startswith("transformers.")  # its code ran before
        own = trusted and self.auto(config) in (getattr(config, "auto_map", None) or {}) and not known
        return {"trust_remote_code": trusted, **({"code_revision": self._base[1]} if own else {})}

    def _from_name(self) -> PretrainedConfig:
        from transformers import AutoConfig

        if not self.config.name_or_path:
            raise ModelError(
                "the recipe names no model", fix="give `model.name_or_path`, or `model.config` for random weights"
            )
        name, revision, _ = self._base
        with explained("model", name):
            return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=self._trusted())

    def _shard(self, run: Run) -> None:
        from ptrain.engine import deepspeed_config

        block = deepspeed_config(run.recipe, run.world)
        if block["zero_optimization"]["stage"] == 3:
            # Kept alive by the model: transformers then loads straight into ZeRO-3's shards.
            from transformers.integrations.deepspeed import HfDeepSpeedConfig

            self._shards = HfDeepSpeedConfig(block)

    def pretrained(self, config: PretrainedConfig, attention: str, warn: Callable[[str], None]) -> PreTrainedModel:
        """The weights that `name_or_path` names, in a model with this attention.

        Raises:
            ModelError: weights are missing, or don't fit the configuration.
        """
        name, revision, _ = self._base
        with explained("model", name):
            try:
                loaded: Any = self.auto_class(config).from_pretrained(
                    name, config=_copy(config), attn_implementation=attention, dtype=self._dtype(), revision=revision,
                    trust_remote_code=self._trusted(), use_safetensors=True, output_loading_info=True,
                    ignore_mismatched_sizes=True, **self._rounding(),
                )  # fmt: skip
            except RuntimeError as error:
                if "size mismatch" not in str(error):  # so it comes with ZeRO-3
                    raise
                first = next(line.strip() for line in str(error).splitlines() if "size mismatch" in line)
                raise ModelError(f"`{name}` does not fit its configuration: {first}", fix=FITTING) from error
        model, report = loaded
        self._check_loaded(name, report, warn)
        _forget_old_names(model)
        return model

    def _check_loaded(self, name: str, report: Mapping[str, Any], warn: Callable[[str], None]) -> None:
        """Refuse to train weights that transformers has drawn at random because they are not there."""
        missing = [key for key in sorted(report["missing_keys"]) if not self._may_lack(key)]
        if missing:
            raise ModelError(
                f"`{name}` lacks weights of the model that its configuration describes ({len(missing)}): "
                + _some(missing),
                fix="download or save it again; weights drawn at random are had by `model.config`",
            )
        for key, found, wanted in report["mismatched_keys"]:
            raise ModelError(
                f"`{name}` does not fit its configuration: `{key}` is {list(found)}, and {list(wanted)} in the model",
                fix=FITTING,
            )
        if unexpected := sorted(report["unexpected_keys"]):
            warn(f"`{name}` has weights that the model has no place for ({len(unexpected)}): {_some(unexpected)}")

    def _may_lack(self, key: str) -> bool:
        return bool(self.may_lack and re.search(self.may_lack, key))

    def _rounding(self) -> dict[str, Any]:
        from ptrain.model.quantized import rounding

        keys = self.config.quantization_config
        return {"quantization_config": rounding(keys, self.config.dtype)} if keys else {}

    def _rounded(self, model: Any) -> PreTrainedModel:
        from ptrain.model.quantized import keep_gradients

        keep_gradients(model)
        return model.dequantize(self._dtype()) if self.dequantized else model

    def _check_quantization(self, run: Run) -> None:
        """Raise ModelError where rounded weights would be trained themselves, or sharded."""
        if not self.config.peft_config and self._base[2] is None:
            raise ModelError(
                "`model.quantization_config` rounds the weights of the model, which then can't be trained",
                fix="train an adapter beside them: `model.peft_config: {target_modules: all-linear}`",
            )
        if run.zero["stage"] == 3:
            raise ModelError(
                "weights that `model.quantization_config` rounds can't be sharded by ZeRO stage 3",
                fix="use stage 2: `deepspeed: {zero_optimization: {stage: 2}}`",
            )
        self._rounding()

    def _trusted(self) -> bool:
        if not self.config.trust_remote_code:
            return False
        name, revision, adapter = self._base
        if not re.fullmatch("[0-9a-f]{40}", revision or ""):
            pins = "`model.revision`" if adapter is None else f"the adapter, which belongs to `{name}`,"
            raise ModelError(
                f"`model.trust_remote_code` runs code of strangers, and {pins} pins none",
                expected="the 40 hexadecimal digits of a commit that you have read",
            )
        self._check_code(name, revision)
        return True

    def _check_code(self, name: str, revision: str | None) -> None:
        """Raise ModelError where the code of a model lies in another repository, whose commit nothing pins."""
        from transformers import PretrainedConfig

        if not name:
            return
        with explained("model", name):
            content, _ = PretrainedConfig.get_config_dict(name, revision=revision)
        for place in (content.get("auto_map") or {}).values():
            # Tokenizers have a list there; their code is never run.
            other = place.rpartition("--")[0] if isinstance(place, str) else ""
            if other not in ("", name):
                raise ModelError(
                    f"the code of `{name}` is that of `{other}`, of which `model.revision` pins no commit",
                    fix=f"download both, put the code of `{other}` into the folder of the model, and name that",
                )


def _forget_old_names(model: Any) -> None:
    """See to it that norms are saved by the names that they have.

    Transformers undoes at saving what it renamed at loading, and with ZeRO-3 takes all for renamed that may have been.
    """
    kept = getattr(model, "_weight_conversions", None)
    if kept:
        model._weight_conversions = [one for one in kept if not OLD_NAMES.intersection(one.source_patterns)]


def _some(names: Sequence[str]) -> str:
    """The first few of `names`."""
    return ", ".join(f"`{name}`" for name in names[:3]) + (", ..." if len(names) > 3 else "")


def _copy(config: PretrainedConfig) -> PretrainedConfig:
    import copy

    return copy.deepcopy(config)


def _checkpoints_activations(disabled: bool | None, device: torch.device) -> bool:
    return device.type != "cpu" if disabled is None else not disabled


def _check_key(config: PretrainedConfig, key: str, section: str) -> None:
    if hasattr(config, key) and not key.startswith("_") and not callable(getattr(type(config), key, None)):
        return
    close = difflib.get_close_matches(key, config.to_dict(), n=1)
    raise ModelError(
        f"a {config.model_type} configuration has no key `{key}` (in `{section}`)",
        fix=f"write `{close[0]}`" if close else None,
    )
