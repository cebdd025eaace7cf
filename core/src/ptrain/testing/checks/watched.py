"""Checks of what a plugin does while it runs: what it reads, remembers, computes itself, and how it fails."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptrain.testing.check import NotApplicable

if TYPE_CHECKING:
    from ptrain.testing.study import Study

HEAVY = ("torch", "transformers", "datasets", "deepspeed")


def discovery(study: Study) -> None:
    """Looking up what is installed imports no module of the plugin.

    A package that is installed and not used must cost nothing, and must not be able to break a run.
    """
    module = study.offer.value.partition(":")[0]
    top = module.partition(".")[0]
    # Of ptrain itself some modules are there always.
    own = [name for name in study.fresh["found"] if (name == module if top == "ptrain" else _within(name, top))]
    if own:
        raise study.wrong(f"`{own[0]}` is imported when ptrain looks up what is installed", expected="no import yet")


def imports(study: Study) -> None:
    """Importing it imports none of torch, transformers, datasets and deepspeed.

    `ptrain check` imports what a recipe names, and has to answer at once.
    """
    heavy = [name for name in HEAVY if name in study.fresh["loaded"]]
    if heavy:
        raise study.wrong(
            f"importing `{study.offer.value}` imports {', '.join(heavy)}", expected="none of " + ", ".join(HEAVY),
            fix="import them within functions, or under `if TYPE_CHECKING:`",
        )  # fmt: skip


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def fields(study: Study) -> None:
    """Every key that it takes is read by some code.

    A key that nothing reads looks like a setting, and changes nothing. It counts as read where a watched run (prepared,
    trained, evaluated, saved) reads it, or a validator of the section. Keys that such a run does not come to are looked
    up in the source of the plugin's package: there `.key` or `getattr(..., "key")` has to stand.
    """
    from ptrain.testing.checks.declared import sections
    from ptrain.testing.checks.source_code import attributes_read
    from ptrain.testing.watch import key_of

    for section in sections(study.cls):
        own = _own_keys(study, section)
        read = {name for cls in section.__mro__ for name in study.watched["read"].get(key_of(cls), ())}
        unread = [name for name in own if name not in read]
        in_source = attributes_read(study.cls) if unread else set()
        for name in unread:
            if name not in in_source:
                raise study.wrong(
                    f"nothing reads the key `{name}` of `{section.__qualname__}`", expected="code that acts on it",
                    fix="take the key away, or do what it says",
                )  # fmt: skip


def _own_keys(study: Study, section: Any) -> list[str]:
    """The keys that are the plugin's to read: its own, and of an optimizer those of every optimizer."""
    from ptrain.parts import KINDS
    from ptrain.recipe.sections import DataConfig, PartConfig

    base = DataConfig if issubclass(section, DataConfig) else getattr(KINDS[study.kind], "Config", None)
    shared = PartConfig if study.kind == "optimizer" else base
    return [name for name in section.model_fields if name not in getattr(shared, "model_fields", {})]


def preparation(study: Study) -> None:
    """Training needs nothing of preparation but the prepared rows and the recipe.

    Rows are prepared by one process, hours or weeks before, and found in the cache by others: what a plugin kept in
    `self` or in its module is not there. A run that was prepared in its own process has to be that of another one, and
    what preparation leaves in `self` must not be read in training as if it had never been set.
    """
    from ptrain.testing.checks.trained import compare
    from ptrain.testing.finished import Finished

    lost = study.watched["lost"]
    if lost:
        raise study.wrong(
            f"`self.{lost[0]}` is set while data is prepared, and read in training, where it is not set",
            expected="nothing but prepared rows to come from preparation",
            fix="put it in the rows that `process` returns",
        )  # fmt: skip
    together = Finished(study.folder / "watched", "")
    compare(study, together, study.reference, "where data is prepared in the process that trains", 0.0)


def stages(study: Study) -> None:
    """`loss` makes no logits itself: it asks `token_logprobs`, which makes them at labels alone, a tile at a time.

    So do `token_nll`, `token_argmax` and `token_kl`. Fused kernels, tiles and shards then reach every trainer without a
    line of its own.
    """
    logits = study.watched["logits"]
    if logits:
        raise study.wrong(
            f"`loss` makes logits itself (`{logits[0]}`)", expected='`run.call("token_logprobs", ...)` to make them'
        )


def shards(study: Study) -> None:
    """It learns the same where every sequence is cut in two, for two workers (`ptrain.testing.shards`).

    A trainer that calls the model, shifts labels or adds up positions itself sees half of the sequence; one that goes
    through `forward`, `token_logprobs` and `sequence_sum` does not notice.
    """
    from ptrain.errors import PluginError
    from ptrain.testing import shards as code
    from ptrain.testing.checks.trained import TOLERANCE, compare

    try:
        found = study.run("shards", workers=2, code=Path(code.__file__))
        compare(study, found, study.reference, "where sequences are cut over 2 workers", TOLERANCE)
    except PluginError as error:
        first = error.problems[0]
        raise study.wrong(
            first.message.removeprefix(f"{study.who}: "), expected=first.expected,
            fix="go through `forward`, `token_logprobs` and `sequence_sum`, whose values other workers may add to",
        ) from None  # fmt: skip


def errors(study: Study) -> None:
    """What fails within it comes out as an error that names plugin, distribution and stage.

    Its own code is made to fail, at one stage after the other. Observers are reported and left out.
    """
    if not study.faults:
        raise NotApplicable("the run comes to none of its stages")
    for stage, told in study.faults.items():
        text = " ".join(told)
        for part in (study.offer.name, study.offer.distribution, stage):
            if part not in text:
                raise study.wrong(
                    f"an error within `{stage}` comes out as {text!r}"
                    if told
                    else f"an error within `{stage}` does not come out",
                    expected=f"an error that names `{study.offer.name}`, {study.offer.distribution} and `{stage}`",
                    fix="let it through, or raise one of your own from it",
                )
