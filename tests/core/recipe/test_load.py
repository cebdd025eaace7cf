"""`load_recipe`: what it makes of a right recipe, and every problem of a wrong one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptrain import parts
from ptrain.catalog import Catalog, Offer
from ptrain.errors import PluginError, RecipeError
from ptrain.recipe.config import Config
from ptrain.recipe.load import Loaded, load_recipe

pytestmark = pytest.mark.torch_free

Load = Callable[..., Loaded]
Problems = Callable[..., list[str]]

FULL = """\
# Everything once.
type: tiny
micro_batch_size: 2_000
temp: 0.5
metadata: {who: me, x: [1, {y: null}]}
x-note: nothing
model:
  type: huggingface
  name_or_path: m
  dtype: bfloat16
  gen_length: 16
  x-note: [also, ignored]
data:
  type: tiny
  sources:
    - a/b
    - {name_or_path: c/d, sample_count: 10k}
    - {type: lines, path: p.jsonl}
  eval_sources: e/f
  max_length: 4ki
  pack: true
tokenizer: {chat_template: chatml}
optimizer: {lr: 1e-5, betas: [0.9, 0.95]}
scheduler: {type: wsd, num_decay_steps: 10}
checkpoint: {type: huggingface, output_dir: out, save_end_of_training: true}
evaluation: [score]
trackers: [{type: shout, url: "http://x/${env:NO_SUCH_VARIABLE}"}, shout]
logger: {level: INFO, print_output_ranks: "*"}
wandb: {enable: true}
deepspeed: {zero_optimization: {stage: 2, reduce_bucket_size: 5e8}, x-note: 1}
plugins:
  splitter: {size: 4, halves: {left: 1k}}
"""


def test_a_full_recipe(load: Load) -> None:
    loaded = load(FULL)
    recipe = loaded.recipe
    assert (recipe.type, recipe.micro_batch_size, recipe.metadata) == (
        "tiny",
        2000,
        {"who": "me", "x": [1, {"y": None}]},
    )
    assert recipe.trainer.model_dump() == {"temperature": 0.5, "gen_length": 16}
    assert (recipe.model.type, recipe.model.dtype, recipe.tokenizer.type) == (
        "huggingface",
        "bf16",
        "huggingface",
    )
    assert [source.type for source in recipe.data.sources] == ["named", "named", "lines"]
    assert [source.type for source in recipe.data.eval_sources] == ["named"]
    assert (recipe.data.type, recipe.data.max_length, recipe.data.sources[1].sample_count) == (
        "tiny",
        4096,
        10_000,
    )
    assert (recipe.optimizer.learning_rate, recipe.optimizer.betas) == (1e-5, (0.9, 0.95))
    assert recipe.deepspeed == {"zero_optimization": {"stage": 2, "reduce_bucket_size": 500_000_000}}
    assert [part.type for part in (*recipe.checkpoint, *recipe.evaluation, *recipe.trackers)] == [
        "huggingface",
        "score",
        "shout",
        "shout",
    ]
    assert recipe.plugins["splitter"].model_dump() == {"size": 4, "halves": {"left": 1000, "right": 0}}
    assert recipe.model_fields_set >= {"micro_batch_size", "wandb"}
    assert "seed" not in recipe.model_fields_set


def test_the_chosen_classes(load: Load) -> None:
    loaded = load(FULL)
    names = [
        cls.__name__ for cls in (loaded.trainer, loaded.model, loaded.tokenizer, loaded.optimizer, loaded.scheduler)
    ]
    assert names == ["Tiny", "TinyModel", "TinyTokenizer", "TinyOptimizer", "Wsd"]
    lists = (loaded.sources, loaded.eval_sources, loaded.checkpoint, loaded.evaluation, loaded.trackers)
    assert [[cls.__name__ for cls in classes] for classes in lists] == [
        ["Named", "Named", "Lines"],
        ["Named"],
        ["Saver"],
        ["Scorer"],
        ["Shouter", "Shouter"],
    ]
    assert [cls.__name__ for cls in loaded.features.values()] == ["Splitter"]
    assert {offer.distribution for offer in loaded.origins.values()} == {"ptrain-tiny"}
    assert set(loaded.origins) >= {loaded.trainer, loaded.model, *loaded.sources, *loaded.features.values()}
    assert loaded.user_code is None


def test_positions(load: Load) -> None:
    positions = load(FULL).positions
    assert [positions[place].line for place in [("micro_batch_size",), ("data", "sources", 1), ("gen_length",)]] == [
        3,
        17,
        11,
    ]
    assert positions["optimizer", "learning_rate"] == positions["optimizer", "lr"]
    assert positions["temperature",].line == 4


def test_unset_variables_are_warnings(load: Load) -> None:
    (warning,) = load(FULL).warnings
    assert "`trackers.0.url` refers to the environment variable `NO_SUCH_VARIABLE`" in warning.message
    assert warning.where is not None
    assert warning.where.line == 27


def test_defaults_of_the_trainer(load: Load) -> None:
    loaded = load("type: tinier\nmodel: {layers: 2}\ndata: {sources: [a]}\n")
    assert (loaded.recipe.model.type, loaded.model.__name__) == ("deep", "DeepModel")
    assert [part.type for part in loaded.recipe.evaluation] == ["score"]
    assert load("type: tinier\nmodel: {layers: 2}\ndata: {sources: [a]}\nevaluation: []\n").recipe.evaluation == []


def test_full_names(load: Load) -> None:
    text = "type: ptrain-tiny:tiny\nmodel: {type: Ptrain_Tiny:huggingface}\ndata: {type: tiny, sources: [a]}\n"
    assert load(text).recipe.type == "ptrain-tiny:tiny"


def test_relative_path_as_text(tmp_path: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.yaml").write_text("type: tiny\nmodel: {}\ndata: {sources: [a]}\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("r.yaml", catalog=catalog).document.file == "r.yaml"


def test_overrides(load: Load) -> None:
    recipe = load(
        FULL,
        "optimizer.lr=2e-5",
        "data.sources=[x/y]",
        "checkpoint.output_dir=elsewhere",
        "plugins.splitter.size=2",
    ).recipe
    assert recipe.optimizer.learning_rate == 2e-5
    assert [source.model_dump()["name_or_path"] for source in recipe.data.sources] == ["x/y"]
    assert (recipe.checkpoint[0].output_dir, recipe.plugins["splitter"].model_dump()["size"]) == (
        Path("elsewhere"),
        2,
    )


def test_an_override_wins_in_any_spelling(load: Load) -> None:
    assert load(FULL, "optimizer.learning_rate=1").recipe.optimizer.learning_rate == 1
    assert load(FULL, "temperature=2").recipe.trainer.model_dump()["temperature"] == 2
    assert load(FULL, "gen_length=3").recipe.trainer.model_dump()["gen_length"] == 3
    assert load(FULL, "model.gen_length=3").recipe.trainer.model_dump()["gen_length"] == 3


MINIMAL = "type: tiny\nmodel: {name_or_path: m}\ndata: {sources: [a/b]}\n"


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ("sede: 3", "4:1 there is no key `sede` at the top level |  | write `seed`"),
        (
            "seed: x",
            "4:7 `seed`: a whole number is expected (200k, 1e-5, 2_000, 128ki, 10%, 2^20 are some too), not `x` |  | ",
        ),
        ("seed: true", "4:7 `seed`: a number is expected, not `true` |  | "),
        ("max_length: 3", "4:1 there is no key `max_length` at the top level |  | it belongs in `data`"),
        ("maxlength: 3", "4:1 there is no key `maxlength` at the top level |  | write `max_length` in `data`"),
        ("splitter: {size: 2}", "4:1 there is no key `splitter` at the top level |  | it belongs in `plugins`"),
        ("trainer: {temperature: 2}", "4:1 there is no key `trainer` at the top level |  | "),
        ("stage: 2", "4:1 there is no key `stage` at the top level |  | it belongs in `deepspeed.zero_optimization`"),
        (
            "optimizer: {wamup_ratio: 1}",
            "4:13 `optimizer` has no key `wamup_ratio` |  | write `warmup_ratio` in `scheduler`",
        ),
        (
            "optimizer: {lr: 1, learning_rate: 2}",
            "4:20 `optimizer.learning_rate` is given twice: `optimizer.lr` is the same key |  | keep one",
        ),
        (
            "temp: 1\ntemperature: 2",
            "5:1 `temperature` is given twice, lines 4 and 5: `temp` is the same key |  | keep one",
        ),
        (
            "scheduler: {num_decay_steps: 3}",
            "4:13 `scheduler` has no key `num_decay_steps` |  | it is a key of `type: wsd`",
        ),
        ("scheduler: {type: wsd}", "4:1 `scheduler.num_decay_steps` is missing | a whole number of at least 0 | "),
        (
            "scheduler: {type: wsdd, a: 1}",
            "4:19 there is no scheduler `wsdd` | one of `huggingface`, `wsd` | write `wsd`",
        ),
        ("scheduler: {tpye: wsd, num_decay_steps: 3}", "4:13 `scheduler` has no key `tpye` |  | write `type`"),
        ("scheduler: {type: [1]}", "4:19 `scheduler.type` is a list of 1 | the name of a scheduler | "),
        (
            "scheduler: {learning_rate: 1}",
            "4:13 `scheduler` has no key `learning_rate` here: the learning rate belongs to the optimizer |  | write `lr` in `optimizer`",
        ),
        ("scheduler: linear", '4:12 `scheduler` is "linear" | keys with values | '),
        ("logger:", "4:8 `logger` is empty | keys with values | leave it out, or give it keys"),
        (
            "logger: {level: WARN}",
            '4:17 `logger.level` is "WARN" | one of `DEBUG`, `INFO`, `WARNING`, `ERROR`, `CRITICAL` | write `WARNING`',
        ),
        (
            "logger: {level: info}",
            '4:17 `logger.level` is "info" | one of `DEBUG`, `INFO`, `WARNING`, `ERROR`, `CRITICAL` | write `INFO`',
        ),
        (
            "logger: {print_output_ranks: [0, -1]}",
            "4:34 `logger.print_output_ranks.1` is -1 | `*` or a list, each a whole number of at least 0 | ",
        ),
        ("checkpoint: [{output_dir: o}]", "4:14 `checkpoint.0` has no `type` | one of `huggingface` | "),
        ("checkpoint: 3", "4:13 `checkpoint` is 3 | a list of sections with a `type` | "),
        (
            "checkpoint: [hugingface]",
            "4:14 there is no checkpoint `hugingface` | one of `huggingface` | write `huggingface`",
        ),
        (
            "checkpoint: [{type: huggingface, save_every_n_steps: -1}]",
            "4:54 `checkpoint.0.save_every_n_steps` is -1 | a whole number of at least 0 | ",
        ),
        (
            "checkpoint: [{type: huggingface, auto_resume: true}, {type: huggingface, auto_resume: true, output_dir: x}]",
            "4:74 2 entries of `checkpoint` have `auto_resume` | one at most | ",
        ),
        (
            "checkpoint: [{type: huggingface}, {type: huggingface, enabled: false}, {type: huggingface}]",
            "4:72 entries 1 and 3 of `checkpoint` would write into the same folder |  | "
            "give one of them an `output_dir` of its own",
        ),
        (
            "checkpoint: [{type: huggingface, output_dir: a/b}, {type: huggingface, output_dir: ./a/b/}]",
            "4:72 entries 1 and 2 of `checkpoint` would write into the same folder |  | "
            "give one of them an `output_dir` of its own",
        ),
        (
            "evaluation: [score, {type: score, name: again}, score]",
            "4:49 entries 1 and 3 of `evaluation` would record metrics of the same names |  | "
            "give each a `name` of its own, with which its metrics begin",
        ),
        (
            "evaluation: [{type: score, name: a}, {type: score, name: a}]",
            "4:52 entries 1 and 2 of `evaluation` would record metrics of the same names |  | "
            "give each a `name` of its own, with which its metrics begin",
        ),
        (
            "deepspeed: {zero_optimization: {stage: 3, offload_param: {device: nvme, nvme_path: /x}}}",
            "4:67 `deepspeed.zero_optimization.offload_param.device` is `nvme`, where no checkpoint can read the "
            "state from |  | write `cpu`",
        ),
        ("plugins: [splitter]", "4:10 `plugins` is a list of 1 | keys with values | "),
        ("plugins: {spliter: {}}", "4:11 there is no plugin `spliter` | one of `splitter` | write `splitter`"),
        (
            "plugins: {splitter: {halves: {lefft: 1}}}",
            "4:31 `plugins.splitter.halves` has no key `lefft` |  | write `left`",
        ),
        (
            "plugins: {sequence-parallel: {size: 2}}",
            "4:11 there is no plugin `sequence-parallel` here: it comes with the package ptrain-sequence-parallel | one of `splitter` | pip install ptrain-sequence-parallel",
        ),
        (
            "beta: 0.1",
            "4:1 there is no key `beta` at the top level here: it comes with the package ptrain-dpo |  | pip install ptrain-dpo",
        ),
    ],
)
def test_one_problem(problems: Problems, more: str, found: str) -> None:
    assert problems(f"{MINIMAL}{more}\n") == [found]


def test_fp16_needs_zero_sharding(problems: Problems, load: Any) -> None:
    text = MINIMAL.replace("name_or_path: m", "name_or_path: m, dtype: half")
    assert problems(f"{text}deepspeed: {{zero_optimization: {{stage: 0}}}}\n") == [
        "4:40 DeepSpeed does not train fp16 at ZeRO stage 0 | stage 1, 2 or 3 | "
        "write `stage: 1`, or `model.dtype: bf16`"
    ]
    load(f"{text}deepspeed: {{zero_optimization: {{stage: 1}}}}\n")


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ("{sources: []}", "3:17 `data.sources` is an empty list | a list, each a section; at least one | "),
        ("{}", "3:1 `data.sources` is missing | a list, each a section; at least one | "),
        ("{sources: [a], seed: -1}", "3:28 `data.seed` is -1 | a whole number of at least 0 | "),
        (
            "{sources: [{name_or_path: x, sample_seed: -1}]}",
            "3:49 `data.sources.0.sample_seed` is -1 | a whole number of at least 0 | ",
        ),
        ("[a]", "3:7 `data` is a list of 1 | keys with values | "),
        ("{sources: 3}", "3:17 `data.sources` is 3 | a list of sections with a `type` | "),
        (
            "{sources: [lines]}",
            "3:18 `lines` is a type of source, not the name of a data set |  | write `{type: lines, ...}`",
        ),
        ("{sources: [{type: lines}]}", "3:18 `data.sources.0.path` is missing | text | "),
        (
            "{sources: [{name_or_path: x, sample_ratio: 2, weight: 3}]}",
            "3:53 `data.sources.0.sample_ratio` is given twice: `data.sources.0.weight` is the same key |  | keep one",
        ),
        ("{sources: [{type: lines, paht: x}]}", "3:32 `data.sources` has no key `paht` |  | write `path`"),
        (
            "{sources: [{name_or_path: x, max_length: 3}]}",
            "3:36 `data.sources` has no key `max_length` |  | it belongs in `data`",
        ),
        (
            "{sources: [{name_or_path: x, sample_ratio: 1, sample_count: 1}]}",
            "3:18 `data.sources.0`: `sample_ratio` and `sample_count` exclude each other |  | ",
        ),
        (
            "{sources: [a], train_eval_split: [0.9, 0.2]}",
            "3:40 `data.train_eval_split`: two shares that add up to 1 are expected, not [0.9, 0.2] |  | ",
        ),
        (
            "{sources: [a], type: dpo}",
            '3:28 `data.type` is "dpo", but the trainer, which owns `data`, is `tiny` | `tiny` | pip install ptrain-dpo',
        ),
        (
            "{sources: [a], type: lines}",
            '3:28 `data.type` is "lines", but the trainer, which owns `data`, is `tiny` | `tiny` | '
            "it is a type of source: write `{type: lines, ...}` in `data.sources`",
        ),
        (
            "{sources: [{name_or_path: x, path: y}]}",
            "3:36 `data.sources` has no key `path` |  | it is a key of `type: lines`",
        ),
        (
            "{sources: [a], type: other}",
            '3:28 `data.type` is "other", but the trainer, which owns `data`, is `tiny` | `tiny` | leave it out',
        ),
        (
            "{sources: [a], use_data_cache: true}",
            "3:22 `data` has no key `use_data_cache` here: prepared data is always cached, keyed by its content |  | leave it out",
        ),
    ],
)
def test_one_problem_of_data(problems: Problems, data: str, found: str) -> None:
    assert problems(f"type: tiny\nmodel: {{}}\ndata: {data}\n") == [found]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "model: {}\ndata: {sources: [a]}\n",
            "1:1 `type` is missing: the recipe names no trainer | one of `tinier`, `tiny` | ",
        ),
        (
            "model: {type: tiny}\ndata: {sources: [a]}\n",
            "1:1 `type` is missing: the recipe names no trainer | one of `tinier`, `tiny` | "
            "move `type` of `model` to the top level",
        ),
        ("type:\nmodel: {}\n", "1:6 `type` is empty | the name of a trainer | "),
        ("type: tinny\nmodel: {}\n", "1:7 there is no trainer `tinny` | one of `tinier`, `tiny` | write `tiny`"),
        (
            "type: spec-decode\n",
            "1:7 there is no trainer `spec-decode` here: it comes with the package ptrain-spec-decode | one of `tinier`, `tiny` | pip install ptrain-spec-decode",
        ),
        (
            "tpye: tiny\nmodel: {}\ndata: {sources: [a]}\n",
            "1:1 there is no key `tpye` at the top level |  | write `type`",
        ),
        ("type: tiny\nmodel: {}\n", "r.yaml `data` is missing | keys with values | "),
        (
            "type: tiny\nmodle: {}\ndata: {sources: [a]}\n",
            "2:1 there is no key `modle` at the top level |  | write `model`",
        ),
        ("type: tiny\nmodel: m\ndata: {sources: [a]}\n", '2:8 `model` is "m" | keys with values | '),
        ("type: tiny\nmodel: {sources: [a]}\ndata: {}\n", "2:9 `model` has no key `sources` |  | it belongs in `data`"),
    ],
)
def test_one_problem_of_the_whole(problems: Problems, tmp_path: Path, text: str, found: str) -> None:
    assert [one.replace(f"{tmp_path}/", "") for one in problems(text)] == [found]


def test_everything_at_once_sorted_by_line(problems: Problems) -> None:
    text = """\
type: tiny
sede: 1
model: {nme_or_path: m, dtype: int4}
data:
  sources: [{name_or_pth: a}, {type: linse}]
  lr: 3
optimizer: {bets: 1}
deepspeed: {train_batch_size: 8, zero_optimisation: {stage: 1}}
plugins: {splitter: {sice: 1}}
epochs: -1
"""
    lines = [int(one.split(":")[0]) for one in problems(text, "optimizer.weight_decay=heavy") if one[0].isdigit()]
    assert lines == [2, 3, 3, 5, 5, 6, 7, 8, 8, 9, 10]
    assert problems(text, "optimizer.weight_decay=heavy")[0].startswith(
        "-o optimizer.weight_decay=heavy `optimizer.weight_decay`"
    )


def test_each_section_of_a_list_for_itself(problems: Problems) -> None:
    text = "type: tiny\nmodel: {}\ndata:\n  sources:\n"
    text += "    - {type: lines}\n    - {type: lines, paht: x}\n    - {type: lines}\n"
    found = problems(text)
    assert [one.split(" |")[0] for one in found] == [
        "5:7 `data.sources.0.path` is missing",
        "6:21 `data.sources` has no key `paht`",
        "7:7 `data.sources.2.path` is missing",
    ]


def test_problems_of_a_mapping_have_names(load: Load) -> None:
    with pytest.raises(RecipeError) as caught:
        load({"type": "tiny", "model": {"dtyp": "fp32"}, "data": {"sources": ["a"]}})
    assert str(caught.value).startswith("recipe: `model` has no key `dtyp`\n")


def test_paths_in_a_mapping_are_text(load: Load, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("")
    sources = [tmp_path / "one", {"type": "lines", "path": tmp_path / "two"}]
    keys = {"type": "tiny", "model": {"name_or_path": tmp_path}, "data": {"sources": sources}}
    found = load(keys).recipe
    assert found.model.name_or_path == str(tmp_path)
    source: Any = found.data.sources[0]
    assert source.name_or_path == str(tmp_path / "one")
    with pytest.raises(RecipeError, match="wants to run the code"):
        load({**keys, "code": tmp_path / "mine.py"})


def offering(catalog: Catalog, kind: str, cls: Any, name: str, distribution: str = "ptrain-other") -> Catalog:
    return catalog.with_classes({Offer(kind, name, distribution, "2.0", f"other:{cls.__name__}"): cls})


def test_a_name_with_two_owners(load: Load, problems: Problems, catalog: Catalog) -> None:
    class Other(parts.Scheduler):
        pass

    both = offering(catalog, "scheduler", Other, "wsd")
    assert load(MINIMAL, catalog=both).recipe.type == "tiny"
    (found,) = problems(f"{MINIMAL}scheduler: {{type: wsd}}\n", catalog=both)
    assert "offered by ptrain-other 2.0 and ptrain-tiny 1.0" in found
    assert found.endswith("say which: `ptrain-other:wsd` or `ptrain-tiny:wsd`")
    assert load(f"{MINIMAL}scheduler: {{type: ptrain-other:wsd}}\n", catalog=both).scheduler is Other


@pytest.mark.parametrize("key", ["seed", "model", "plugins", "type", "trainer"])
def test_a_trainer_may_not_take_names_of_core(load: Load, catalog: Catalog, key: str) -> None:
    taking = type("Config", (Config,), {"__annotations__": {key: int}, key: 0, "__module__": __name__})
    greedy = type("Greedy", (parts.Trainer,), {"Config": taking})
    with pytest.raises(PluginError, match=f"ptrain-other 2.0 takes `{key}`, which core owns"):
        load(MINIMAL.replace("tiny", "greedy"), catalog=offering(catalog, "trainer", greedy, "greedy"))


def test_a_trainer_that_names_a_part_that_is_not_there(problems: Problems, catalog: Catalog) -> None:
    class Lost(parts.Trainer):
        parts = {"scheduler": "nowhere", "source": "named"}

    found = problems(MINIMAL.replace("tiny", "lost"), catalog=offering(catalog, "trainer", Lost, "lost"))
    assert len(found) == 1
    assert "there is no scheduler `nowhere`" in found[0]


def test_broken_plugins_are_plugin_errors(catalog: Catalog, load: Load, tmp_path: Path) -> None:
    gone = Offer("scheduler", "gone", "ptrain-gone", "3.1", "no_such_module_at_all:X")
    with_gone = Catalog((*catalog.all, gone), catalog.classes)
    assert load(MINIMAL, catalog=with_gone).recipe.type == "tiny"
    with pytest.raises(PluginError, match=r"ptrain-gone 3.1 can't be loaded: ModuleNotFoundError") as caught:
        load(f"{MINIMAL}scheduler: {{type: gone}}\n", catalog=with_gone)
    assert str(caught.value.problems[0].where) == f"{tmp_path}/r.yaml:4:19"
    with pytest.raises(RecipeError) as both:
        load(f"{MINIMAL}scheduler: {{type: gone}}\nsede: 1\n", catalog=with_gone)
    assert len(both.value.problems) == 2
