"""Mining: embed queries and documents, search, choose, write a data set. Each part goes on where it was stopped."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ptrain
from ptrain import DataError
from ptrain_embed.negatives import Chosen, Mining, Report, choose
from ptrain_embed.vectors import embedded, read_note, write_note

if TYPE_CHECKING:
    import numpy as np

    from ptrain import Run
    from ptrain_embed.candidates import Candidates

SUFFIXES = (".jsonl", ".parquet")
KEYS = {"pooling", "normalize", "projection", "query_prompt", "document_prompt", "revision", "trust_remote_code"}
"""Of the section `model`: what vectors depend on besides its weights."""
QUERIES = 8192
"""Queries that are searched for at a time, after which what was found is kept."""


def mine(run: Run, say: Callable[[str], None]) -> Report:
    """Write the data set that the section `mine` of a recipe asks for, and a report beside it; return that.

    In the folder `<output>.work` beside it are texts, vectors and what was found: the same recipe goes on where it was
    stopped, and with other rules for what is taken it begins with the choice.

    Args:
        run: of the recipe; nothing of it has been done.
        say: is told what is done.

    Raises:
        RecipeError: there is no such section.
        DataError: of the rows, the corpus, or the disk; or another process is mining into the same data set.
        ModelError: of the model.
    """
    settings = mining(run)
    output = Path(settings.output).expanduser()
    check_output(output)
    folder = output.with_name(output.name + ".work")
    folder.mkdir(exist_ok=True)
    with _alone(folder, output):
        candidates = _candidates(run, settings, folder)
        say(f"{len(candidates.queries):,} queries, {len(candidates.documents):,} documents; in between: {folder}")
        search = Search(run, settings, candidates, folder)
        report = Report()
        _write(_rows(candidates, search.results(), settings, run.recipe.seed, report), output)
        record = {**report.record(), "settings": settings.model_dump(mode="json"), "model": search.model}
        write_note(output.with_name(output.name + ".report.json"), record)
    return report


@contextmanager
def _alone(folder: Path, output: Path) -> Iterator[None]:
    """One search for a data set at a time; a killed one lets go by itself.

    Raises:
        DataError: another process is at it.
    """
    import fcntl

    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another process is mining into `{output}`", fix="wait for its end, or give another `mine.output`"
            ) from None
        yield


def mining(run: Run) -> Mining:
    """The section `mine` of the recipe.

    Raises:
        RecipeError: there is none.
    """
    found = getattr(run.config, "mine", None)
    if not isinstance(found, Mining):
        raise ptrain.RecipeError(
            "the recipe has no section `mine`",
            expected="`type: embed` and `mine: {output: mined.jsonl}`, say",
        )
    return found


def check_output(path: Path) -> None:
    """Raise DataError where the data set can't be written there."""
    if path.suffix not in SUFFIXES:
        raise DataError(f"`mine.output` is `{path}`", expected=f"a file that ends in {' or '.join(SUFFIXES)}")
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"can't be written: there is no folder `{path.parent}`"
        raise DataError(f"`mine.output`: `{path}` {what}")


def _candidates(run: Run, settings: Mining, folder: Path) -> Candidates:
    from ptrain.data.workspace import Workspace, using
    from ptrain_embed.candidates import Candidates
    from ptrain_embed.collection import corpus_texts

    further = itertools.chain.from_iterable(corpus_texts(path) for path in settings.corpus)
    with tempfile.TemporaryDirectory(dir=folder) as temporary, using(Workspace(Path(temporary))):
        rows = (run.call("load", source=one) for one in run.parts.sources)
        return Candidates(rows, further, folder / "documents.arrow")


class Search:
    """What is found for each query, kept in files.

    Attributes:
        model: what embeds.
    """

    def __init__(self, run: Run, settings: Mining, candidates: Candidates, folder: Path) -> None:
        name = settings.model or run.recipe.model.name_or_path
        if not name:
            raise ptrain.ModelError("mining needs a model", fix="write `mine.model` or `model.name_or_path`")
        self.model = str(name)
        self._run, self._settings, self._candidates, self._folder = run, settings, candidates, folder
        self._encoder: Any = None
        named = bool(run.recipe.tokenizer.name_or_path) and settings.model is None
        self._tokenizer: Any = run.call("create_tokenizer") if named else None
        """Where the recipe names another one than the model's."""

    def results(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Number of the first query, numbers and scores [q, k] of blocks of queries."""
        import numpy as np

        from ptrain.data.key import tokenizer_content

        settings, candidates = self._settings, self._candidates
        made_of = {"texts": candidates.digest, "model": self.model, "files": fingerprint(self.model), **self._lengths}
        made_of["keys"] = self._keys
        if self._tokenizer is not None:
            made_of["tokenizer"] = tokenizer_content(self._tokenizer)
        documents = self._embedded("documents", candidates.documents, "document", made_of)
        queries = self._embedded("queries", candidates.queries, "query", made_of)
        made_of |= {"top_k": settings.top_k, "engine": settings.engine}
        if read_note(self._folder / "found.json") != made_of:
            for path in self._folder.glob("found-*.npz"):
                path.unlink()
            write_note(self._folder / "found.json", made_of)
        for first in range(0, len(queries), QUERIES):
            path = self._folder / f"found-{first}.npz"
            if not path.exists():
                self._search(queries[first : first + QUERIES], documents, path)
            with np.load(path) as file:
                yield first, file["numbers"], file["scores"]

    def _search(self, queries: np.ndarray, documents: np.ndarray, path: Path) -> None:
        import numpy as np

        from ptrain.data.progress import progress
        from ptrain_embed.search import search

        k = min(self._settings.top_k, len(documents))
        with progress("searching", len(documents)) as advance:
            scores, numbers = search(
                queries, documents, k, device=_device(), engine=self._settings.engine, progress=advance
            )
        temporary = path.with_name("found.tmp.npz")
        np.savez(temporary, scores=scores, numbers=numbers)
        temporary.replace(path)

    def _embedded(self, name: str, texts: Any, kind: str, made_of: Mapping[str, Any]) -> np.ndarray:
        from ptrain.data.progress import progress

        with progress(f"embedding {name}", len(texts)) as advance:
            return embedded(
                self._folder / f"{name}.npy", texts, lambda part: self._encode(part, kind), made_of, advance
            )

    def _encode(self, texts: Any, kind: str) -> Any:
        from ptrain_embed.encoder import Encoder

        if self._encoder is None:
            self._encoder = Encoder.load(self.model, max_length=self._lengths, tokenizer=self._tokenizer, **self._keys)
        return self._encoder.encode(texts if isinstance(texts, list) else texts.to_pylist(), kind)

    @property
    def _lengths(self) -> dict[Any, int]:
        """The most tokens of a text, as in training."""
        data: Any = self._run.recipe.data
        return {"query": data.longest_query, "document": data.longest_document}

    @property
    def _keys(self) -> dict[str, Any]:
        """What the section `model` says of vectors; nothing of another model."""
        if self._settings.model is not None:
            return {}
        return self._run.recipe.model.model_dump(include=KEYS, exclude_none=True)


def fingerprint(model: str) -> list[list[Any]]:
    """Name, size and time of each file of a model's folder; nothing for a name on the hub."""
    files = sorted(path for path in Path(model).expanduser().rglob("*") if path.is_file())
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _rows(
    candidates: Candidates,
    results: Iterator[tuple[int, np.ndarray, np.ndarray]],
    settings: Mining,
    seed: int,
    report: Report,
) -> Iterator[dict[str, Any]]:
    """The rows of the data set: of each query with enough negatives."""
    for first, numbers, scores in results:
        for at, (found, near) in enumerate(zip(numbers, scores, strict=True), first):
            chosen = choose(candidates.known[at], found, near, settings, seed, report)
            if chosen is not None:
                yield _row(candidates, candidates.queries[at], chosen)


def _row(candidates: Candidates, query: str, chosen: Chosen) -> dict[str, Any]:
    return {
        "query": query,
        "positives": candidates.texts(chosen.positives),
        "negatives": candidates.texts(chosen.negatives),
        "scores": chosen.scores,
    }


def _write(rows: Iterator[dict[str, Any]], path: Path) -> None:
    """Write the data set; it is there whole, or as it was before.

    Raises:
        DataError: no row is left.
    """
    temporary = path.with_name(path.name + ".tmp")
    first = next(rows, None)
    if first is None:
        raise DataError(
            "no query is left: none has a positive among the documents found and enough negatives below the threshold",
            fix="raise `mine.top_k` or `mine.threshold`, lower `mine.negatives`, or write `mine.fewer: keep`",
        )
    (_write_parquet if path.suffix == ".parquet" else _write_json)(itertools.chain([first], rows), temporary)
    temporary.replace(path)


def _write_json(rows: Iterator[dict[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_parquet(rows: Iterator[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ptrain.data.arrow import blocks

    texts = pa.list_(pa.string())
    columns = {"query": pa.string(), "positives": texts, "negatives": texts, "scores": pa.list_(pa.float32())}
    schema = pa.schema(columns)
    with pq.ParquetWriter(path, schema) as writer:
        for block in blocks(rows):
            writer.write_table(pa.Table.from_pylist(block, schema))


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
