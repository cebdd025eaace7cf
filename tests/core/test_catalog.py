"""The catalog of installed packages, on distributions that are really there: metadata and modules on `sys.path`."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from ptrain.catalog import Catalog, Offer
from ptrain.errors import PluginError

pytestmark = pytest.mark.torch_free

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a distribution with entry points and one module on the path."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def install(name: str, version: str, points: str, module: str, code: str, requires: str = "") -> None:
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        wants = f"Requires-Dist: {requires}\n" if requires else ""
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{wants}")
        (info / "entry_points.txt").write_text(textwrap.dedent(points))
        (site / f"{module}.py").write_text(textwrap.dedent(code))
        monkeypatch.delitem(sys.modules, module, raising=False)

    return install


GOOD = """
import ptrain

class MyScheduler(ptrain.Scheduler):
    pass

class MyTrainer(ptrain.Trainer):
    class Inner(ptrain.Trainer):
        pass
"""


def good(install: Install, name: str = "ptrain-zebra", module: str = "zebra_plugin", **more: str) -> None:
    points = f"""
        [ptrain.scheduler]
        zebra = {module}:MyScheduler
        [ptrain.trainer]
        zebra = {module}:MyTrainer.Inner
        [console_scripts]
        z = z:z
    """
    install(name, "1.2", points, module, GOOD, **more)


def test_installed_reads_metadata_and_imports_nothing(install: Install) -> None:
    good(install)
    catalog = Catalog.installed()
    assert Offer("scheduler", "zebra", "ptrain-zebra", "1.2", "zebra_plugin:MyScheduler") in catalog.offers("scheduler")
    assert "zebra" in catalog.names("trainer")
    assert not [offer for offer in catalog.all if offer.kind == "console_scripts"]
    assert "zebra_plugin" not in sys.modules


def test_what_ships_is_on_offer() -> None:
    catalog = Catalog.installed()
    for kind, name in [
        ("trainer", "sft"),
        ("trainer", "causal"),
        ("model", "huggingface"),
        ("optimizer", "adamw"),
    ]:
        assert catalog.find(kind, name).name == name


def test_load(install: Install) -> None:
    good(install)
    catalog = Catalog.installed()
    for name in ("zebra", "ptrain-zebra:zebra", "Ptrain_Zebra:zebra"):
        assert catalog.load(catalog.find("scheduler", name)).__name__ == "MyScheduler"
    assert catalog.load(catalog.find("trainer", "zebra")).__qualname__ == "MyTrainer.Inner"
    assert catalog.status(catalog.find("trainer", "zebra")).state == "ok"


def test_the_first_of_two_copies_counts(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good(install)
    later = tmp_path / "later" / "ptrain_zebra-0.1.dist-info"
    later.mkdir(parents=True)
    (later / "METADATA").write_text("Metadata-Version: 2.1\nName: Ptrain.Zebra\nVersion: 0.1\n")
    (later / "entry_points.txt").write_text("[ptrain.scheduler]\nzebra = old:Old\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "later")])
    assert Catalog.installed().find("scheduler", "zebra").version == "1.2"


def test_two_owners_of_a_name(install: Install) -> None:
    good(install)
    good(install, "ptrain-yak", "yak_plugin")
    catalog = Catalog.installed()
    with pytest.raises(PluginError) as caught:
        catalog.find("scheduler", "zebra")
    text = str(caught.value)
    assert "ptrain-yak 1.2 and ptrain-zebra 1.2" in text
    assert "`ptrain-yak:zebra` or `ptrain-zebra:zebra`" in text
    offer = catalog.find("scheduler", "ptrain-yak:zebra")
    assert catalog.load(offer).__module__ == "yak_plugin"
    assert catalog.status(offer).state == "conflict"
    assert "ptrain-yak and ptrain-zebra" in catalog.status(offer).reason


def test_unknown_names() -> None:
    catalog = Catalog((Offer("scheduler", "cosine", "ptrain-x", "1", "x:X"),))
    for name, told in [
        ("cosin", "fix: write `cosine`"),
        ("zzz", "expected: one of `cosine`"),
        ("ptrain-y:cosine", "expected: one of `cosine`"),
    ]:
        with pytest.raises(PluginError, match="there is no scheduler") as caught:
            catalog.find("scheduler", name)
        assert told in str(caught.value)
    with pytest.raises(PluginError, match="an installed package that offers one"):
        catalog.find("model", "x")


@pytest.mark.parametrize(
    ("kind", "name", "package"),
    [
        ("trainer", "swiftkv", "ptrain-swiftkv"),
        ("trainer", "dpo", "ptrain-dpo"),
        ("trainer", "spec-decode", "ptrain-spec-decode"),
        ("trainer", "biencoder", "ptrain-embed"),
        ("trainer", "embed", "ptrain-embed"),
        ("trainer", "sft", "ptrain-sft"),
        ("plugin", "sequence-parallel", "ptrain-sequence-parallel"),
        ("model", "swiftkv", "ptrain-swiftkv"),
        ("source", "contrastive_pretokenized", "ptrain-embed"),
        ("checkpoint", "spec-decode", "ptrain-spec-decode"),
    ],
)
def test_names_of_packages_that_are_not_installed(kind: str, name: str, package: str) -> None:
    with pytest.raises(PluginError, match=f"it comes with the package {package}") as caught:
        Catalog().find(kind, name)
    assert f"pip install {package}" in str(caught.value)


def test_names_that_are_gone() -> None:
    for kind, name, told in [
        ("optimizer", "fused_adam_moe", "mixtures of experts"),
        ("model", "liger", "fused kernels"),
        ("source", "snowflake", "jsonl"),
    ]:
        with pytest.raises(PluginError, match=f"there is no {kind} `{name}` here") as caught:
            Catalog().find(kind, name)
        assert told in str(caught.value)


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("import no_such_module_at_all\n", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("from ptrain import NoSuchThing\n", "ImportError: cannot import name 'NoSuchThing'"),
        ("1 / 0\n", "ZeroDivisionError"),
        ("raise SystemExit(0)\n", "SystemExit"),
        ("def broken(:\n", "SyntaxError"),
        ("x = 1\n", "AttributeError"),
    ],
)
def test_a_broken_plugin(install: Install, code: str, cause: str) -> None:
    install("ptrain-wreck", "9.1", "[ptrain.scheduler]\nwreck = wreck_plugin:Wreck\n", "wreck_plugin", code)
    catalog = Catalog.installed()
    offer = catalog.find("scheduler", "wreck")
    with pytest.raises(PluginError) as caught:
        catalog.load(offer)
    assert "scheduler `wreck` of ptrain-wreck 9.1 can't be loaded: " in str(caught.value)
    assert cause in str(caught.value)
    assert "`wreck_plugin:Wreck`" in str(caught.value)
    assert catalog.status(offer).state == "broken"
    assert cause in catalog.status(offer).reason


def test_an_incomplete_installation_says_so(install: Install) -> None:
    install("ptrain-wreck", "9.1", "[ptrain.scheduler]\nwreck = wreck_gone.inner:Wreck\n", "other", "")
    with pytest.raises(PluginError, match=r"pip install --force-reinstall ptrain-wreck"):
        Catalog.installed().load(Catalog.installed().find("scheduler", "wreck"))


def test_a_plugin_that_stops_the_process_is_not_swallowed(install: Install) -> None:
    install(
        "ptrain-wreck",
        "9.1",
        "[ptrain.scheduler]\nwreck = quitting_plugin:X\n",
        "quitting_plugin",
        "raise KeyboardInterrupt\n",
    )
    with pytest.raises(KeyboardInterrupt):
        Catalog.installed().load(Catalog.installed().find("scheduler", "wreck"))


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("def Wreck(): ...\n", "is function"),
        ("class Wreck: ...\n", "a subclass of `ptrain.Scheduler`"),
        ("import ptrain\nclass Wreck(ptrain.Trainer): ...\n", "a subclass of `ptrain.Scheduler`"),
        (
            "import ptrain\nclass Wreck(ptrain.Scheduler):\n    class Config(ptrain.Config): ...\n",
            "does not extend `SchedulerConfig`",
        ),
        ("import ptrain\nclass Wreck(ptrain.Scheduler):\n    Config = None\n", "does not extend `SchedulerConfig`"),
    ],
)
def test_what_is_no_class_of_its_kind(install: Install, code: str, told: str) -> None:
    install("ptrain-wreck", "9.1", "[ptrain.scheduler]\nwreck = wreck_plugin:Wreck\n", "wreck_plugin", code)
    with pytest.raises(PluginError, match=r"ptrain-wreck 9.1") as caught:
        Catalog.installed().load(Catalog.installed().find("scheduler", "wreck"))
    assert told in str(caught.value)


@pytest.mark.parametrize("wants", ["ptrain-core>=99", "ptrain_core (<0.0.1)", "Ptrain.Core==99; python_version>'3'"])
def test_a_plugin_for_another_core(install: Install, wants: str) -> None:
    good(install, requires=wants)
    with pytest.raises(PluginError, match=r"ptrain-zebra 1.2 needs another ptrain-core: it wants") as caught:
        Catalog.installed().load(Catalog.installed().find("scheduler", "zebra"))
    assert ", got " in str(caught.value)
    assert "zebra_plugin" not in sys.modules


@pytest.mark.parametrize(
    "wants",
    [
        "ptrain-core>=0.0.1",
        "ptrain-core>=99; extra=='new'",
        "ptrain-core>=99; python_version<'3'",
        "not a requirement!",
    ],
)
def test_a_plugin_for_this_core(install: Install, wants: str) -> None:
    good(install, requires=wants)
    assert Catalog.installed().load(Catalog.installed().find("scheduler", "zebra"))


def test_making_the_catalog_is_cheap() -> None:
    code = (
        "import sys, time; from ptrain.catalog import Catalog; before = set(sys.modules); t = time.process_time();"
        "catalog = Catalog.installed(); took = time.process_time() - t; assert catalog.all;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(took); sys.exit(bool(new & {'ptrain_sft', 'torch', 'transformers', 'datasets', 'deepspeed'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.2
