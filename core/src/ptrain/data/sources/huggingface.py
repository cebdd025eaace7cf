"""`huggingface`, `huggingface_instruct` and `huggingface_causal`: data sets of the hub, or saved locally."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import field_validator

from ptrain.data.rows import CONVERSATIONS, ORIGIN, shown
from ptrain.data.sources.base import checked, content_hashes, matching, sampled, stored
from ptrain.errors import DataError, MissingData, Position
from ptrain.hub import UNASKED
from ptrain.parts import Source
from ptrain.recipe.sections import SourceConfig

if TYPE_CHECKING:
    from datasets import Dataset

    from ptrain.run import Run

SPLITS: Mapping[str, Mapping[str, str]] = {
    "HuggingFaceH4/ultrachat_200k": {"train": "train_sft", "eval": "test_sft"},
    "HuggingFaceH4/ultrafeedback_binarized": {"train": "train_prefs", "eval": "test_prefs"},
    "nvidia/AceMath-Instruct-Training-Data": {"train": "general_sft_stage2"},
}
"""Names of the splits of well-known data sets."""
ROLE_MAPPINGS: Mapping[str, Mapping[str, str]] = {
    "HuggingFaceH4/ultrachat_200k": {"user": "messages.role.user", "assistant": "messages.role.assistant"},
    "nvidia/AceMath-Instruct-Training-Data": {"user": "messages.role.user", "assistant": "answer"},
    "Open-Orca/OpenOrca": {"system": "system_prompt", "user": "question", "assistant": "response"},
    "Open-Orca/SlimOrca": {
        "system": "conversations.from.system",
        "user": "conversations.from.human",
        "assistant": "conversations.from.gpt",
    },
    "THUDM/LongAlign-10k": {"user": "messages.role.user", "assistant": "messages.role.assistant"},
    "Yukang/LongAlpaca-12k": {"user": "instruction", "assistant": "output"},
    "meta-math/MetaMathQA": {"user": "query", "assistant": "response"},
    "ise-uiuc/Magicoder-OSS-Instruct-75K": {"user": "problem", "assistant": "solution"},
    "lmsys/lmsys-chat-1m": {"user": "conversation.role.user", "assistant": "conversation.role.assistant"},
}
"""How the columns of well-known data sets map to roles."""
CONTENT_KEYS = ("content", "text", "message", "value")
OF_MAP = re.compile(r"cache-\w+\.arrow")
"""Files in which `datasets` keeps what it has computed from the rows of a saved data set."""


class HuggingFaceSource(Source):
    """`huggingface`: the rows as they are; a `messages` column is checked."""

    samples = True  # before rows are shaped

    class Config(SourceConfig):
        """Keys of `huggingface`."""

        name_or_path: str
        """A data set on the hub or a local folder; `name:split[10:20]` takes a part of a split."""
        kwargs: dict[str, Any] = {}
        """Further arguments of `datasets.load_dataset`, but `split` and `streaming`."""
        split_mapping: dict[str, str] = {}
        """Which of its splits are `train` and `eval`."""

        @field_validator("kwargs")
        @classmethod
        def _loads_rows(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
            if "split" in kwargs:
                raise ValueError("`split` is a key of the source itself")
            if kwargs.get("streaming"):
                raise ValueError("`streaming` gives rows that can't be counted, drawn or divided")
            return kwargs

    def load(self, run: Run, split: str) -> Dataset:
        """The rows of the split, sampled.

        Raises:
            DataError: it can't be loaded, or a row is wrong.
        """
        dataset, config = self._load(split), self.config
        if (config.sample_count or config.sample_ratio) and ORIGIN not in dataset.column_names:
            dataset = _with_origins(dataset, self._name()[0])
        return self.shape(sampled(dataset, config))

    def shape(self, dataset: Dataset) -> Dataset:
        """The rows in the form that trainers read."""
        chats = set(CONVERSATIONS) & set(dataset.column_names)
        return self._stored(_numbered(dataset, self._name()[0])) if chats else dataset

    def fingerprint(self) -> Any:
        """Hashes of the files of a local folder, and of those that `kwargs` names; a name on the hub stands for itself,
        with its `kwargs.revision`."""
        files = [*_inside(Path(self._name()[0]).expanduser()), *_named(self.config.kwargs)]
        # What `Dataset.map` of the user's code leaves beside the rows is no part of them.
        files = [one for one in files if not OF_MAP.fullmatch(one.name)]
        return content_hashes(files) or None

    def _stored(self, rows: Any) -> Dataset:
        whole = self.config.model_copy(update={"sample_count": None, "sample_ratio": None})
        return stored(checked(rows, self._name()[0]), whole)

    def _name(self) -> tuple[str, str | None]:
        found = re.fullmatch(r"(.+?):([\w.-]+(?:\[[^/]*)?)", self.config.name_or_path)
        return (found[1], found[2]) if found else (self.config.name_or_path, None)

    def _load(self, split: str) -> Dataset:
        import datasets
        from datasets import config as settings
        from datasets.exceptions import DatasetGenerationError, DatasetsError

        name, own = self._name()
        mapping = {**SPLITS.get(name, {}), **self.config.split_mapping}
        wanted = own or mapping.get(split, split)
        folder = Path(name).expanduser()
        if folder.is_file():
            raise DataError(f"`{name}` is a file", expected="a folder", fix="write e.g. `{type: jsonl, path: ...}`")
        try:
            if any((folder / file).exists() for file in ("dataset_dict.json", "dataset_info.json")):
                return _part(datasets.load_from_disk(str(folder)), wanted)
            return datasets.load_dataset(str(folder) if folder.exists() else name, split=wanted, **self.config.kwargs)
        except (OSError, ValueError, KeyError, TypeError, DatasetsError) as error:
            if isinstance(error, DatasetGenerationError) and isinstance(error.__cause__, Exception):
                error = error.__cause__  # it says what is wrong
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            absent = isinstance(error, OSError) and not folder.exists()
            if absent and settings.HF_HUB_OFFLINE:
                first = UNASKED
            raise (MissingData if absent else DataError)(
                f"the data set `{name}`, split `{wanted}`, can't be loaded: {first}",
                expected="a data set on the hub (with network), or a local folder",
            ) from error


def _with_origins(dataset: Dataset, name: str) -> Dataset:
    """`dataset` with the name of each row, which it keeps when it is drawn, or drawn twice."""
    import pyarrow as pa
    import pyarrow.compute as pc

    numbers: Any = pa.array(range(1, len(dataset) + 1)).cast(pa.string())
    made: Any = pc.binary_join_element_wise(name, numbers, ":")  # type: ignore[attr-defined]
    return dataset.add_column(ORIGIN, made)  # type: ignore[call-arg]


def _numbered(dataset: Dataset, name: str) -> Iterator[tuple[int, Any]]:
    """The rows with their numbers in the whole data set, from 1."""
    row: Any
    for at, row in enumerate(dataset, 1):
        kept = str(row.get(ORIGIN)).removeprefix(f"{name}:")
        yield int(kept) if kept.isdecimal() else at, row


def _inside(folder: Path) -> list[Path]:
    """The files of a folder, if it is one."""
    return sorted(one for one in folder.rglob("*") if one.is_file()) if folder.is_dir() else []


def _named(kwargs: Mapping[str, Any]) -> list[Path]:
    """The local files that `data_files` (text, a list, or either by split) and `data_dir` name."""
    folder = str(kwargs.get("data_dir") or "")
    given = kwargs.get("data_files") or []
    values = list(given.values()) if isinstance(given, Mapping) else [given]
    patterns = [str(one) for value in values for one in (value if isinstance(value, list) else [value])]
    found = [one for pattern in patterns if "://" not in pattern for one in matching(str(Path(folder, pattern)))]
    return found if patterns or not folder else _inside(Path(folder))


def _part(found: Any, wanted: str) -> Dataset:
    """The split `name` or `name[a:b]` of a saved data set; one without splits is taken for any."""
    matched = re.fullmatch(r"(\w+)(?:\[(-?\d*):(-?\d*)\])?", wanted)
    if matched is None:
        raise ValueError(f"`{wanted}` is no split")
    name, start, stop = matched.groups()
    if isinstance(found, dict):
        if name not in found:
            raise ValueError(f"it has the splits {sorted(found)}")
        found = found[name]
    return found.select(range(len(found))[slice(int(start) if start else None, int(stop) if stop else None)])


class HuggingFaceInstruct(HuggingFaceSource):
    """`huggingface_instruct`: columns, or lists of turns, as `messages`."""

    class Config(HuggingFaceSource.Config):
        """Keys of `huggingface_instruct`."""

        role_mapping: dict[str, str] = {}
        """By role, a column (`question`) or the turns of a list (`conversations.from.human`)."""
        content_key: str | None = None
        """The key of a turn that holds its text; by default content, text, message or value."""

    def shape(self, dataset: Dataset) -> Dataset:
        """The rows with a `messages` column, turns in the order in which they stand.

        Raises:
            DataError: it is not known which columns hold the conversation, or one is missing.
        """
        name = self._name()[0]
        mapping = self.config.role_mapping or ROLE_MAPPINGS.get(name) or _guess(dataset.column_names)
        if mapping is None:
            raise DataError(
                f"it is not known which columns of `{name}` hold the conversation (it has {dataset.column_names})",
                expected="a column `messages`, or `role_mapping`",
                fix="add e.g. `role_mapping: {user: question, assistant: answer}`",
            )
        rows = _numbered(dataset, name)
        return self._stored((at, self._row(row, mapping, Position(name, at, 1))) for at, row in rows)

    def _row(self, row: Mapping[str, Any], mapping: Mapping[str, str], where: Position) -> dict[str, Any]:
        """One conversation: plain columns before the turns of a list, but an answer after them."""
        lists: dict[tuple[str, str], dict[str, str]] = {}
        plain: list[dict[str, Any]] = []
        for role, path in mapping.items():
            column, _, rest = path.partition(".")
            if column not in row:
                raise DataError(f"there is no column `{column}`", where=where, expected=f"one of {sorted(row)}")
            if rest:
                key, _, value = rest.partition(".")
                lists.setdefault((column, key), {})[value] = role
            elif row[column] or role != "system":
                plain.append({"role": role, "content": row[column]})
        turns = [turn for (column, key), roles in lists.items() for turn in self._turns(row[column], key, roles, where)]
        last = [one for one in plain if turns and one["role"] == "assistant"]
        extra = {"tools": row["tools"]} if row.get("tools") else {}
        return {"messages": [*(one for one in plain if one not in last), *turns, *last], **extra}

    def _turns(self, turns: Any, key: str, roles: Mapping[str, str], where: Position) -> list[dict[str, Any]]:
        made = []
        if not isinstance(turns, list):
            raise DataError(f"the column of the turns is {shown(turns)}", where=where, expected="a list of turns")
        for at, turn in enumerate(turns):
            if not isinstance(turn, Mapping):
                raise DataError(f"turn {at} is {shown(turn)}", where=where, expected=f"an object with `{key}`")
            text = self.config.content_key or next((k for k in CONTENT_KEYS if k in turn), "content")
            if text not in turn or key not in turn:
                missing = key if key not in turn else text
                raise DataError(f"turn {at} has no `{missing}`", where=where, expected=f"one of {sorted(turn)}")
            others = {k: v for k, v in turn.items() if k not in (key, text) and v is not None}
            made.append({**others, "role": roles.get(turn[key], turn[key]), "content": turn[text]})
        return made


def _guess(columns: list[str]) -> Mapping[str, str] | None:
    if "messages" in columns:
        return {"user": "messages.role.user", "assistant": "messages.role.assistant"}
    for asked, answered in (("user", "assistant"), ("prompt", "completion")):
        if {asked, answered} <= set(columns):
            return {"user": asked, "assistant": answered}
    return None


class HuggingFaceCausal(HuggingFaceSource):
    """`huggingface_causal`: one column of text."""

    class Config(HuggingFaceSource.Config):
        """Keys of `huggingface_causal`."""

        column: str = "text"
        """The column; where it is missing and there is only one, that one."""

    def shape(self, dataset: Dataset) -> Dataset:
        """The rows with a `text` column alone, and their origins where some were drawn.

        Raises:
            DataError: there is no such column.
        """
        column, names = self.config.column, dataset.column_names
        if column not in names and len(names) == 1:
            column = names[0]
        if column not in names:
            raise DataError(f"`{self.config.name_or_path}` has no column `{column}`", expected=f"one of {names}")
        ours = column != ORIGIN and ORIGIN in names and str(dataset[0][ORIGIN]).startswith(f"{self._name()[0]}:")
        chosen = dataset.select_columns([column, ORIGIN] if ours else [column])
        return chosen if column == "text" else chosen.rename_column(column, "text")
