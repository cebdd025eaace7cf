"""The model part `speculator`: a frozen base with a speculator beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

import ptrain
from ptrain import ModelError
from ptrain_spec_decode import fits
from ptrain_spec_decode.layout import Kind, Method, Shape, widths
from ptrain_spec_decode.saved import Base, load_into, read, vocabulary_digest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from ptrain import Run

Widths = int | str
KEYS = {
    "speculator": "kind", "n_speculator_heads": "n_predict", "speculator_width": "inner", "proj_dim": "proj",
    "emb_dim": "emb", "speculator_tie_weights": "tie_weights", "speculator_scale_input": "scale_input",
    "method": "method", "tie_lstm_embs": "tie_lstm_embs",
}  # fmt: skip
"""By key of the recipe, what it is called in a `Shape`."""


class SpeculatorModel(ptrain.HuggingFaceModel):
    """`speculator`: a model of transformers that is not trained, with a speculator in `model.speculator` that is."""

    class Config(ptrain.HuggingFaceModel.Config):
        """Keys of `speculator`."""

        speculator: Kind = "mlp"
        """`mlp`, or `lstm` with its `method`."""
        n_speculator_heads: Annotated[int, Field(ge=1)] = 3
        """How many tokens are drafted, a head each."""
        speculator_width: Widths = 4096
        """The width of the state. With `lstm`, `method: sum_rnn`, also several with dots between: `"4096.2048"` adds a
        layer of 2048 after one of 4096; so may `proj_dim` and `emb_dim`."""
        proj_dim: Widths | None = None
        """What a state is projected to before it is normalised; by default (the first of) `speculator_width`."""
        emb_dim: Widths | None = None
        """The width of the embedded token that is added; by default (the first of) `speculator_width`."""
        speculator_tie_weights: bool = False
        """All heads share one set of weights, but for the first projection."""
        speculator_scale_input: bool = False
        """Normalise the base's hidden states first."""
        method: Method = "sum_rnn"
        """With `lstm`: `sum_rnn`, a plain recurrence that may be stacked, or `sum_lstm`, a cell with gates."""
        tie_lstm_embs: bool = False
        """With `sum_lstm`, its four gates share one embedding, which serving engines expect."""
        disable_activation_checkpoint: bool | None = True
        """Nothing is ever computed again, since the base has no backward pass."""

        @model_validator(mode="after")
        def _fits_together(self) -> Any:
            if self.peft_config:
                raise ValueError("`peft_config` trains an adapter, and with a speculator the base stays as it is")
            if self.disable_activation_checkpoint is False:
                raise ValueError("the base has no backward pass: leave `disable_activation_checkpoint` out")
            self.shape(hidden_size=1, vocab_size=1)
            return self

        def shape(self, hidden_size: int, vocab_size: int) -> Shape:
            """The shape of a speculator for a base of these sizes.

            Raises:
                ValueError: keys contradict each other.
            """
            inner = widths(self.speculator_width)
            first = inner[:1]
            return Shape(
                kind=self.speculator, hidden_size=hidden_size, vocab_size=vocab_size, n_predict=self.n_speculator_heads,
                inner=inner, proj=first if self.proj_dim is None else widths(self.proj_dim),
                emb=first if self.emb_dim is None else widths(self.emb_dim), tie_weights=self.speculator_tie_weights,
                scale_input=self.speculator_scale_input, method=self.method, tie_lstm_embs=self.tie_lstm_embs,
            )  # fmt: skip

    _shape: Shape
    _folder: Path | None
    _seed: int

    def heads(self, run: Run) -> int:
        """How many heads the speculator has."""
        folder = begins_with(run)
        return self.config.n_speculator_heads if folder is None else read(folder)[0].n_predict

    def create_config(self, run: Run) -> PretrainedConfig:
        """The base's configuration; from it follow the sizes of the speculator, which are checked.

        Raises:
            ModelError: the tokenizer is not the base's, the speculator is for another one, or too large.
        """
        config = super().create_config(run)
        text = config.get_text_config()
        self._seed, self._folder = run.recipe.seed, begins_with(run)
        self._shape = self.config.shape(text.hidden_size, text.vocab_size)
        fits.check_tokenizer(run)
        if self._folder is not None:
            self._shape = fits.saved_shape(run, self._folder, self._shape, base_of(run, config), given(self.config))
        fits.check_size(run, self._shape)
        return config

    def adapt(self, model: PreTrainedModel) -> None:
        """Freeze the base, and put the speculator beside it."""
        super().adapt(model)
        model.requires_grad_(False)
        model.speculator = self._made(model)

    def _made(self, model: PreTrainedModel) -> Any:
        import torch

        from ptrain.seeds import derived_seed
        from ptrain_spec_decode.speculator import make

        # Its numbers are written once, in their own dtype, and on the CPU, whatever ZeRO has made of the base.
        with torch.device("meta"):
            speculator = make(self._shape).to(model.dtype)
        if model.device.type == "meta":
            return speculator
        speculator.to_empty(device="cpu")
        if self._folder is not None:
            load_into(speculator, self._folder)
        else:
            speculator.initialise(torch.Generator().manual_seed(derived_seed(self._seed, "speculator")))
        return speculator

    def fingerprint(self, run: Run) -> Any:
        """Of the base and of what the speculator begins with."""
        folder = begins_with(run)
        return [super().fingerprint(run), run.recipe.seed, fits.content(folder) if folder is not None else None]


def begins_with(run: Run) -> Path | None:
    """The folder of the speculator that training begins with, if the trainer has such a key, and it is given."""
    return getattr(run.config, "speculator_path", None)


def given(config: Any) -> dict[str, str]:
    """The keys of the speculator that a recipe gives, with what a `Shape` calls them."""
    return {key: name for key, name in KEYS.items() if key in config.model_fields_set}


def base_of(run: Run, config: PretrainedConfig) -> Base:
    """What the speculator of this run is for."""
    name = run.recipe.model.name_or_path
    if name and Path(name).is_dir():
        name = str(Path(name).resolve())
    known = hasattr(run.tokenizer, "get_vocab")  # a plan may know no tokenizer yet
    architectures = tuple(config.architectures or ())
    return Base(name or None, architectures or None, vocabulary_digest(run.tokenizer) if known else None)


def speculator_of(run: Run) -> Any:
    """The speculator of a run.

    Raises:
        ModelError: its model has none.
    """
    found = getattr(run.model, "speculator", None)
    if found is None:
        raise ModelError("the model has no speculator", fix="use `model.type: speculator`")
    return found
