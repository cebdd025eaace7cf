"""The feature `sequence-parallel`: several workers share each sequence, and each keeps a part of it in memory."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictBool

import ptrain

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ptrain import Batch, Problem, Run
    from ptrain_sequence_parallel.groups import Group

Positive = Annotated[int, Field(ge=1)]
ENTRY = ("plugins", "sequence-parallel")


class SequenceParallel(ptrain.Feature):
    """`sequence-parallel`: Ulysses attention over `size` workers, and less memory for what grows with the sequence."""

    class Config(ptrain.Config):
        """Keys of `sequence-parallel`; none of them changes what is learnt."""

        without_effect: ClassVar[bool] = True
        aliases: ClassVar[Mapping[str, str]] = {
            ".sequence_parallel_size": "size",
            ".tiled_mlp_compute": "tiled_mlp",
            ".activation_checkpoint_cpu_offload": "offload_activations",
        }

        size: Positive = 1
        """How many workers share a sequence; the others get different ones. It has to divide the number of workers, and
        of the model's attention heads."""
        tiled_mlp: Literal["auto"] | StrictBool | Positive = "auto"
        """Compute each MLP a tile of tokens at a time: of so many, or of as many as a hidden state has numbers (`auto`
        and `true`). An MLP that can't be cut stays as it is with `auto`, and is an error with `true` or a number."""
        tiled_loss: Literal["auto"] | StrictBool | Positive = "auto"
        """Compute logits a tile of tokens at a time: of so many, or as core sees fit (`auto` and `true`); `false` makes
        all of them at once."""
        offload_activations: Literal["auto"] | bool = "auto"
        """Keep what layers are computed from again in the memory of the host; `auto` does so on a GPU, for sequences so
        long that it pays."""
        across_nodes: bool = False
        """Let workers of several machines share a sequence, which needs a fast network."""

    config: Config

    @ptrain.hookimpl
    def configure(self, run: Run) -> list[Problem]:
        """Have groups of workers read the same rows, and set the tiles of the loss; refuse a size that doesn't fit."""
        from ptrain_sequence_parallel.fits import divisors, heads_fault, known_heads

        run.loss_tile = sys.maxsize if self.config.tiled_loss is False else _number(self.config.tiled_loss)
        size, found = self.config.size, []
        where = run.loaded.positions.get
        if run.trains and run.world % size:
            message = (
                f"`size` is {size}, and the run has {run.world} worker{'s' * (run.world > 1)}, which it doesn't divide"
            )
            fix = f"start {size} `--workers`, or a multiple of it"
            found.append(ptrain.Problem(message, where((*ENTRY, "size")), f"`size` to be {divisors(run.world)}", fix))
        elif run.trains:
            run.data_rank, run.data_world = run.rank // size, run.world // size
        heads = known_heads(run.recipe.model)
        if heads and (fault := heads_fault(heads, size)):
            found.append(ptrain.Problem(fault, where((*ENTRY, "size")), f"`size` to be {divisors(heads)}"))
        if size > 1 and getattr(run.recipe.model, "attn_implementation", None) == "eager":
            message = (
                "`attn_implementation: eager` keeps weights of all pairs of tokens, and can't be cut up over workers"
            )
            at = where(("model", "attn_implementation"))
            found.append(ptrain.Problem(message, at, fix="write `attn_implementation: auto`"))
        kept = "disable_activation_checkpoint"
        if self.config.offload_activations is True and getattr(run.recipe.model, kept, None):
            message = f"`offload_activations: true` has nothing to offload where `model.{kept}` is true"
            found.append(ptrain.Problem(message, where(("model", kept)), fix=f"leave `{kept}` out, or write `false`"))
        return found

    @ptrain.hookimpl(wrapper=True)
    def create_config(self, run: Run) -> Any:
        """Refuse models that can't be trained like this."""
        config = yield
        from ptrain_sequence_parallel.fits import check_attention, check_mlps

        if run.trains and self.config.size > 1:
            check_attention(config, self.config.size)
        if run.trains and self._strict:
            check_mlps(config)
        return config

    @ptrain.hookimpl(wrapper=True)
    def create_dataloader(self, run: Run) -> Any:
        """Batches of which each worker has its part."""
        loader = yield
        if self.config.size == 1:
            return loader
        from ptrain.data.attached import Attached
        from ptrain_sequence_parallel.shards import cut

        group, pad = self._group(run), run.tokenizer.pad_token_id
        return Attached(loader, lambda batch: cut(batch, group, pad if isinstance(pad, int) else 0))

    @ptrain.hookimpl(wrapper=True)
    def create_model(self, run: Run) -> Any:
        """The model, with heads exchanged round its attention, and its MLPs in tiles."""
        from ptrain_sequence_parallel import mlp, offload

        shared = self.config.size > 1
        if shared and run.device.type != "meta":  # in a plan there are no other workers
            from ptrain_sequence_parallel.groups import check_machines

            if not self.config.across_nodes:
                check_machines(run, self.config.size)
            _ = self._group(run).process
        model = yield
        if shared:
            from ptrain_sequence_parallel.attention import exchange_heads

            exchange_heads(model)
        if self.config.tiled_mlp is not False:
            mlp.tile(model, _number(self.config.tiled_mlp) or "auto", self._strict, run.say)
        if self.config.offload_activations is True:
            offload.check(model)
        return model

    @ptrain.hookimpl(wrapper=True)
    def create_engine(self, run: Run, optimizer: torch.optim.Optimizer | None) -> Any:
        """The engine, once the model was seen to make of a sequence in parts what it makes of the whole."""
        engine = yield
        if self.config.size > 1 and optimizer is not None:
            from ptrain_sequence_parallel.probe import check_parts

            check_parts(run, engine, self._group(run))
        return engine

    @ptrain.hookimpl(wrapper=True)
    def forward(self, run: Run, model: PreTrainedModel, batch: Batch) -> Any:
        """The hidden states; what layers are computed from again waits in the memory of the host."""
        from ptrain_sequence_parallel.offload import offloading

        with offloading(model, batch, self.config.offload_activations, run.device_memory):
            return (yield)

    @ptrain.hookimpl(wrapper=True)
    def sequence_sum(self, run: Run) -> Any:
        """The sums over all parts of the sequences."""
        own = yield
        if self.config.size == 1:
            return own
        from ptrain_sequence_parallel.shards import added

        return added(own, self._group(run))

    @property
    def _strict(self) -> bool:
        """Whether an MLP that can't be cut is an error."""
        return self.config.tiled_mlp not in ("auto", False)

    def _group(self, run: Run) -> Group:
        from ptrain_sequence_parallel.groups import Group

        return Group(self.config.size, run.rank % self.config.size)


def _number(tiled: Any) -> int | None:
    """How many tokens a tile has, where that is said."""
    return None if isinstance(tiled, (bool, str)) else tiled
