"""Texts to vectors, with a model that is asked: in training, or loaded by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from ptrain_embed.model import EmbedModel, modules, vectors, width

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ptrain import Batch, Run
    from ptrain_embed.modules import Modules

Kind = Literal["query", "document"]
BLOCK = 4096
"""Texts that are tokenised at a time."""
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class Encoder:
    """Embeds texts with a model, its tokenizer, its pooling and its prompts.

    Args:
        forward: the vectors of a batch, fp32 [n, d].
        limits: the most tokens of a text, by kind; what is longer is cut.
        together: whether workers have to ask the model equally often.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, made: Modules, device: torch.device,
        forward: Callable[[Batch], torch.Tensor], limits: dict[Kind | None, int], together: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.dimension = made.dimension or width(model)
        """How many numbers a vector has."""
        self.normalised = made.normalize
        """Whether it has length 1."""
        self._prompts: dict[Kind | None, str] = {None: "", "query": made.query_prompt, "document": made.document_prompt}
        # Decoders add no special tokens, so that an empty text has no token at all.
        self._empty = cast(int, tokenizer.eos_token_id or tokenizer.pad_token_id or 0)
        self._forward, self._limits, self._together = forward, limits, together

    @classmethod
    def load(
        cls, name_or_path: str, *, device: str | torch.device | None = None, dtype: Any = None,
        max_length: int | Mapping[Kind, int] | None = None, tokenizer: PreTrainedTokenizerBase | None = None,
        **keys: Any,
    ) -> Encoder:  # fmt: skip
        """Of a model by its name on the hub, or of a folder.

        Args:
            device: by default the GPU, if there is one.
            dtype: of its weights, such as `bf16` or `torch.bfloat16`; by default fp32.
            max_length: the most tokens of a text, or of a text of each kind; by default what the model was made for,
                and never more than the positions that it has learnt.
            tokenizer: by default the model's.
            keys: of the section `model`, such as `query_prompt`, where they differ from what the model says.

        Raises:
            ModelError: there is none, or it does something that is not known here.
        """
        import torch
        from transformers import AutoTokenizer

        from ptrain import stages
        from ptrain.hub import explained

        asked = str(dtype or "fp32").removeprefix("torch.")
        config = EmbedModel.Config(type="embed", name_or_path=name_or_path, dtype=DTYPES.get(asked, asked), **keys)  # type: ignore[arg-type]
        part = EmbedModel(config)
        with explained("tokenizer of the model", name_or_path):
            found = tokenizer or AutoTokenizer.from_pretrained(name_or_path, revision=config.revision)
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = part.load(place, warn=lambda message: None)

        def forward(batch: Batch) -> torch.Tensor:
            return vectors(model, stages.forward(None, model, batch), batch, part.modules)  # type: ignore[arg-type]

        given = max_length if isinstance(max_length, Mapping) else {}
        longest = max(given.values()) if given else max_length or longest_text(part, found, model)
        lengths: dict[Kind | None, int] = {None: longest, "query": longest, "document": longest, **given}  # type: ignore[dict-item]
        return cls(model, found, part.modules, place, forward, within_positions(part, model, lengths))

    @classmethod
    def of(cls, run: Run) -> Encoder:
        """Of the model in training, which is put back into training afterwards; every worker encodes what it is given.

        Texts are cut as those of the training data are.
        """
        from ptrain_embed.model import embed_batch

        def forward(batch: Batch) -> torch.Tensor:
            return run.engine(lambda: embed_batch(run, batch))

        together = run.world > 1 and run.engine.stage == 3
        return cls(run.model, run.tokenizer, modules(run), run.device, forward, limits(run), together)

    def encode(
        self, texts: Sequence[str], kind: Kind | None = None, *, tokens: int = 16384,
        progress: Callable[[int], None] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The vectors of `texts`, fp32 [n, d] on the CPU, in their order. Without dropout and gradients.

        Args:
            kind: whose prompt is put before each text; by default none.
            tokens: about as many are computed at a time.
            progress: told after each batch how many texts it had.
        """
        import torch

        found = torch.empty(len(texts), self.dimension)
        mode = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                for places, batch in self._in_step(self._batches(texts, kind, tokens)):
                    made = self._forward(batch)
                    if places:
                        found[places] = made.cpu()
                    if places and progress is not None:
                        progress(len(places))
        finally:
            self.model.train(mode)
        return found

    def _batches(self, texts: Sequence[str], kind: Kind | None, tokens: int) -> Iterator[tuple[list[int], Batch]]:
        """With their places in `texts`; the longest first, so that what does not fit into memory shows at once."""
        order = sorted(range(len(texts)), key=lambda at: -len(texts[at]))
        for first in range(0, len(order), BLOCK):
            block = order[first : first + BLOCK]
            ids = self._cut([self._prompts[kind] + texts[at] for at in block], self._limits[kind])
            yield from self._filled(sorted(zip(block, ids, strict=True), key=lambda one: -len(one[1])), tokens)

    def _cut(self, texts: list[str], length: int) -> list[list[int]]:
        """The tokens of texts, at most `length` of each; at least one."""
        found = self.tokenizer(texts, truncation=True, max_length=length, padding=False)["input_ids"]
        return [ids or [self._empty] for ids in cast("list[list[int]]", found)]

    def _filled(self, ids: list[tuple[int, list[int]]], tokens: int) -> Iterator[tuple[list[int], Batch]]:
        """Rows of documents end to end, each of about `tokens` tokens."""
        row: list[tuple[int, list[int]]] = []
        size = 0
        for one in ids:
            if row and size + len(one[1]) > tokens:
                yield self._batch(row)
                row, size = [], 0
            row.append(one)
            size += len(one[1])
        if row:
            yield self._batch(row)

    def _batch(self, row: list[tuple[int, list[int]]]) -> tuple[list[int], Batch]:
        from ptrain.data.collate import IGNORED, collate
        from ptrain.stages import to_device

        flat = [token for _, ids in row for token in ids]
        asked = {"input_ids": flat, "labels": [IGNORED] * len(flat), "document_lengths": [len(ids) for _, ids in row]}
        return [at for at, _ in row], to_device(collate([asked], pad_id=0), self.device)

    def _in_step(self, batches: Iterator[tuple[list[int], Batch]]) -> Iterator[tuple[list[int], Batch]]:
        """`batches`, and then fillers while another worker has some: all of them gather ZeRO-3's weights."""
        import torch
        from torch import distributed

        from ptrain.data.collate import filler
        from ptrain.stages import to_device

        empty = to_device(filler({"input_ids": [0]}, pad_id=0), self.device) if self._together else None
        while True:
            found = next(batches, None)
            if empty is not None:
                going = torch.tensor(float(found is not None), device=self.device)
                distributed.all_reduce(going, op=distributed.ReduceOp.MAX)
                if not going:
                    return
            elif found is None:
                return
            yield found if found is not None else ([], empty)  # type: ignore[misc]


def limits(run: Run) -> dict[Kind | None, int]:
    """The most tokens of a text by kind: as many as in the training data, where the model has positions for them."""
    longest, data = longest_text(run.parts.model, run.tokenizer, run.model), run.recipe.data
    query, document = (getattr(data, f"longest_{kind}", longest) for kind in ("query", "document"))
    found: dict[Kind | None, int] = {None: max(query, document), "query": query, "document": document}
    return within_positions(run.parts.model, run.model, found)


def within_positions(
    part: EmbedModel, model: PreTrainedModel, lengths: dict[Kind | None, int]
) -> dict[Kind | None, int]:
    """`lengths`, none beyond the positions that a model has learnt: a recipe may allow for more than its texts have."""
    most = part.learnt_positions(model)
    return {kind: min(length, most or length) for kind, length in lengths.items()}


def longest_text(part: EmbedModel, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """The most tokens of a text that a model was made for, with special ones."""
    known = tokenizer.model_max_length
    return min(part.modules.max_length or known, part.positions(model) or known)
