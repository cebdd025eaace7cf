"""The evaluators `retrieval` and `similarity`: they measure on data of their own, while a model trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

import ptrain

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from ptrain import Run

Size = Annotated[int, Field(ge=1)]


class Measured(ptrain.Evaluator):
    """What both evaluators share."""

    needs_rows = False

    class Config(ptrain.EvaluatorConfig):
        """Keys of both evaluators."""

        path: str
        """Where the data is."""
        dimensions: list[Size] | None = None
        """Measure at these first dimensions too; by default at those of `matryoshka`."""

    def sizes(self, run: Run) -> Sequence[int] | None:
        """The dimensions to measure at besides all."""
        return self.config.dimensions or list(getattr(run.config, "matryoshka", None) or ()) or None

    def check(self, run: Run, rows: Dataset) -> None:
        """See that there is something to measure on.

        Raises:
            DataError: of the data, as far as it is small; or a dimension is larger than the model's.
        """
        from ptrain_embed.model import modules
        from ptrain_embed.search import dimensions

        dimensions(self.sizes(run), modules(run).dimension or run.hf_config.get_text_config().hidden_size)

    def named(self, found: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        """The metrics under their names, which begin with the evaluator's where the recipe gives no other."""
        own = self.config.type.rpartition(":")[2] or type(self).__name__.lower()
        begin = "" if self.config.name else f"{own}/"
        return {begin + name: value for name, value in found.items()}


class Retrieval(Measured):
    """`retrieval`: nDCG, MRR, MAP and recall on a folder with a corpus, queries and qrels, as BEIR has them."""

    class Config(Measured.Config):
        """Keys of `retrieval`."""

        path: str
        """A folder with `corpus`, `queries` and `qrels`."""
        split: str = "test"
        """Which file of `qrels`, where that is a folder."""
        titles: bool = True
        """Put the title of a document before its text."""

    def check(self, run: Run, rows: Dataset) -> None:
        """All but the corpus, which may be large: of that the first document."""
        from ptrain_embed import beir

        super().check(run, rows)
        folder = beir.folder_of(self.config.path)
        grades, queries = beir.read_qrels(folder, self.config.split), beir.read_queries(folder)
        next(beir.read_corpus(folder, titles=self.config.titles), None)
        beir.refuse_unknown(folder, grades, queries, {one for judged in grades.values() for one in judged})

    def evaluate(self, run: Run) -> Mapping[str, tuple[float, float]]:
        """This worker's sum of each measure over its queries, and how many those are.

        Raises:
            DataError: of the data; or a dimension is larger than the model's.
        """
        from ptrain_embed import measure
        from ptrain_embed.collection import read_collection
        from ptrain_embed.model import modules

        config = self.config
        collection = read_collection(config.path, config.split, titles=config.titles)
        documents = embed_together(run, list(collection.documents.values()), "document")
        mine, embedded = embed_own(run, list(collection.queries.values()), "query")
        names = list(collection.queries)[mine]
        asked = dict(zip(names, embedded, strict=True))
        normalise = modules(run).normalize
        sums, count = measure.retrieval(asked, documents, collection, self.sizes(run), normalise)
        return self.named({name: (value, float(count)) for name, value in sums.items()})


class Similarity(Measured):
    """`similarity`: Spearman's and Pearson's correlation of cosines with the grades of pairs of sentences."""

    class Config(Measured.Config):
        """Keys of `similarity`."""

        path: str
        """A file with `sentence1`, `sentence2` and `score`."""

    def check(self, run: Run, rows: Dataset) -> None:
        """All pairs."""
        from ptrain_embed import measure

        super().check(run, rows)
        measure.read_pairs(self.config.path)

    def evaluate(self, run: Run) -> Mapping[str, tuple[float, float]]:
        """The correlations over all pairs, the same on each worker.

        Raises:
            DataError: of the data; or a dimension is larger than the model's.
        """
        from ptrain_embed import measure

        first, second, grades = measure.read_pairs(self.config.path)
        embedded = embed_together(run, [*first, *second], None)
        found = measure.similarity(embedded[: len(first)], embedded[len(first) :], grades, self.sizes(run))
        return self.named({name: (value, 1.0) for name, value in found.items()})


def embed_together(run: Run, texts: list[str], kind: Literal["query", "document"] | None) -> torch.Tensor:
    """The embeddings of texts [n, d] on every worker, each of which has embedded a part of them."""
    import torch

    _, embedded = embed_own(run, texts, kind)
    if run.data_world == 1:
        return embedded
    share = -(-len(texts) // run.data_world)
    padded = torch.zeros(share, embedded.shape[1], device=run.device)
    padded[: len(embedded)] = embedded.to(run.device)
    every = [torch.empty_like(padded) for _ in range(run.world)]
    torch.distributed.all_gather(every, padded)
    # Workers that read the same rows, such as shards of a sequence, have embedded the same ones.
    parts = every[:: run.world // run.data_world]
    return torch.cat(parts)[: len(texts)].cpu()


def embed_own(run: Run, texts: list[str], kind: Literal["query", "document"] | None) -> tuple[slice, torch.Tensor]:
    """Which texts are this worker's, and their embeddings [n, d] on the CPU; every worker has to ask."""
    from ptrain_embed.encoder import Encoder

    share = -(-len(texts) // run.data_world)
    mine = slice(run.data_rank * share, min((run.data_rank + 1) * share, len(texts)))
    return mine, Encoder.of(run).encode(texts[mine], kind)
