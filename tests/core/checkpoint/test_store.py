"""The store under kills, full disks and bit rot: real processes, real file systems."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptrain.checkpoint import store
from ptrain.errors import CheckpointError

pytestmark = pytest.mark.torch_free

OLD, NEW, NEXT = "step-00000001", "step-00000002", "step-00000003"
FILES = ("weights.bin", "nested/manifest.json")

WRITER = """
import json, os, signal, sys, time
from pathlib import Path
from ptrain.checkpoint import store

root, name, rank, world, kill_at, keep_last, barriers = json.loads(sys.argv[1])
points, passed = [], []

def fault(point):
    if len(points) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    points.append(point)

def agree(flag):
    passed.append(None)
    meeting = f"{len(passed)}-"
    aside = Path(barriers) / f"writing-{rank}"
    aside.write_text(json.dumps(flag))
    aside.rename(Path(barriers) / f"{meeting}{rank}")
    deadline = time.monotonic() + 60
    while len(list(Path(barriers).glob(f"{meeting}*"))) < world:
        if time.monotonic() > deadline:
            raise RuntimeError("the other worker never came")
        time.sleep(0.005)
    return json.loads((Path(barriers) / f"{meeting}0").read_text())

def fill(path):
    file = path / f"worker-{rank}.bin"
    with file.open("wb") as out:
        for piece in range(2):
            fault(f"write {file.name}")
            out.write(f"{name} {rank} {piece};".encode() * 1000)
            out.flush()

store.fault = fault
store.write(
    Path(root), name, fill, rank=rank, agree=agree if world > 1 else lambda flag: flag,
    report=lambda text: print(text, file=sys.stderr), keep_last=keep_last,
)
print(json.dumps(points))
"""


def start(
    root: Path,
    name: str,
    *,
    rank: int = 0,
    world: int = 1,
    kill_at: int = -1,
    keep_last: int | None = None,
    barriers: Path | None = None,
) -> subprocess.Popen[str]:
    """A process that writes a checkpoint, and kills itself at the point of that number."""
    given = [str(root), name, rank, world, kill_at, keep_last, str(barriers)]
    command = [sys.executable, "-c", WRITER, json.dumps(given)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def points_of(process: subprocess.Popen[str]) -> list[str]:
    """The points that a writer which was not killed has passed."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out)


def fill_with(text: str) -> Callable[[Path], None]:
    def fill(path: Path) -> None:
        for name in FILES:
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_text(f"{name} of {text}\n" * 100)

    return fill


def write(root: Path, name: str, fill: Callable[[Path], object] | None = None, **more: object) -> list[str]:
    """Write a checkpoint as the only worker; what was reported."""
    reports: list[str] = []
    arguments = {"rank": 0, "agree": lambda flag: flag, "report": reports.append, **more}
    path = store.write(root, name, fill or fill_with(name), **arguments)  # type: ignore[arg-type]
    assert path == root / name
    return reports


def newest(root: Path) -> str | None:
    found = store.newest_good(root, lambda text: None)
    return found and found.name


def leftovers(root: Path) -> list[str]:
    return [path.name for path in root.glob(".tmp-*")]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A root with two good checkpoints."""
    write(tmp_path, OLD)
    write(tmp_path, NEW)
    return tmp_path


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with one good checkpoint, only to be read."""
    root = tmp_path_factory.mktemp("one")
    write(root, OLD)
    return root


# Writing


def test_a_checkpoint_has_its_files_a_manifest_and_a_relative_pointer(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    assert write(root, OLD) == []
    manifest = json.loads((root / OLD / "manifest.json").read_text())
    assert set(manifest["files"]) == set(FILES)
    assert manifest["files"]["weights.bin"]["size"] == (root / OLD / "weights.bin").stat().st_size
    assert (root / "latest").readlink() == Path(OLD)
    assert store.verify(root / OLD) == []
    assert leftovers(root) == []
    assert newest(root) == OLD


def test_order_files_are_synced_before_the_rename_and_renamed_before_the_pointer(tmp_path: Path) -> None:
    points = points_of(start(tmp_path, OLD))
    order = ["fsync worker-0.bin", "write manifest", "fsync manifest", f"fsync .tmp-{OLD}", "rename", "fsync root"]
    order += ["write pointer", "rename pointer", "fsync pointer"]
    assert points[-len(order) :] == order


def test_two_workers_write_one_checkpoint(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for attempt in range(2):
        barriers = tmp_path / f"barriers-{attempt}"
        barriers.mkdir()
        workers = [start(root, OLD, rank=rank, world=2, barriers=barriers) for rank in range(2)]
        points = [points_of(worker) for worker in workers]
        # The second time it is there, whole, and both know that.
        assert [any(p.startswith("write worker") for p in own) for own in points] == [attempt == 0] * 2
    assert sorted(contents(root / OLD)) == ["manifest.json", "worker-0.bin", "worker-1.bin"]
    assert newest(root) == OLD


def test_a_good_checkpoint_of_that_step_is_kept(two: Path) -> None:
    def fill(path: Path) -> None:
        raise AssertionError("called")

    before = contents(two / NEW)
    assert write(two, NEW, fill) == []
    assert contents(two / NEW) == before
    assert leftovers(two) == []


def test_a_damaged_checkpoint_of_that_step_is_written_anew(two: Path) -> None:
    (two / NEW / "weights.bin").write_text("short")
    (two / NEW / "stray").write_text("of the damaged one")
    reports = write(two, NEW)
    assert "weights.bin: truncated" in reports[0]
    assert reports[-1] == f"writing {two / NEW} anew"
    assert store.verify(two / NEW) == []
    assert not (two / NEW / "stray").exists()
    assert leftovers(two) == []


@pytest.mark.parametrize("where", ["fill", "verify"])
@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (CheckpointError("the weight `w` is empty"), CheckpointError),
        (OSError(5, "Input/output error"), CheckpointError),
        (RuntimeError("a bug"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failure_leaves_all_as_it_was(two: Path, where: str, error: BaseException, seen: type) -> None:
    def fail(path: Path) -> None:
        (path / "half").write_text("half")
        raise error

    before = contents(two)
    with pytest.raises(seen):
        write(two, NEXT, **{where: fail})
    assert contents(two) == before
    assert leftovers(two) == []
    assert newest(two) == NEW
    write(two, NEXT)
    assert newest(two) == NEXT


def test_verify_sees_the_files_before_the_checkpoint_is_there(tmp_path: Path) -> None:
    seen: list[tuple[bool, bool]] = []
    write(tmp_path, OLD, verify=lambda path: seen.append(((path / "weights.bin").exists(), (tmp_path / OLD).exists())))
    assert seen == [(True, False)]


def test_no_files_and_a_file_named_like_the_manifest_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no worker wrote a file"):
        write(tmp_path, OLD, lambda path: None)
    with pytest.raises(CheckpointError, match=r"named `manifest\.json`"):
        write(tmp_path, OLD, lambda path: (path / "manifest.json").write_text("{}"))
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_is_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match=rf"`{OLD}` could not be written to `.*taken`"):
        write(tmp_path / "taken", OLD)


# Kills


@pytest.mark.parametrize(
    ("before", "keep_last", "damage"),
    [([], None, False), ([OLD], None, False), ([OLD], 1, False), ([OLD, NEW], 1, True)],
    ids=["first", "second", "keep-last-1", "over-a-damaged-one"],
)
def test_killed_at_every_point_the_old_or_the_new_one_is_whole(
    tmp_path: Path, before: list[str], keep_last: int | None, damage: bool
) -> None:
    template = tmp_path / "template"
    template.mkdir()
    for name in before:
        write(template, name)
    if damage:
        (template / NEW / "weights.bin").write_text("")
    names: list[str] = []
    kill_at = 0
    while True:
        root = tmp_path / f"killed-at-{kill_at}"
        shutil.copytree(template, root, symlinks=True)
        process = start(root, NEW, kill_at=kill_at, keep_last=keep_last)
        out, err = process.communicate(timeout=120)
        if process.returncode == 0:
            names = json.loads(out)
            break
        assert process.returncode == -9, err
        check_killed(root, OLD in before, keep_last)
        kill_at += 1
    assert kill_at == len(names)
    assert names[0] == "make staging folder"
    assert names[-1] == ("delete old" if keep_last else "fsync pointer")
    assert newest(root) == NEW


def check_killed(root: Path, had_old: bool, keep_last: int | None) -> None:
    """After a kill: something whole, and saving goes on."""
    found = newest(root)
    assert found in ((OLD, NEW) if had_old else (None, NEW))
    if found == NEW:
        expected = "".join(f"{NEW} 0 {piece};" * 1000 for piece in range(2))
        assert (root / NEW / "worker-0.bin").read_text() == expected
    write(root, NEW, keep_last=keep_last)
    assert newest(root) == NEW
    write(root, NEXT, keep_last=keep_last)
    assert newest(root) == NEXT
    assert leftovers(root) == []
    assert len(store.saved(root)) == (keep_last or 2 + had_old)


# Full disks


def disk_of_2_mb(root: Path, mount: Callable[..., Path]) -> Path:
    mount(root, "size=2m,nr_inodes=64")
    write(root, OLD, lambda path: (path / "weights.bin").write_bytes(bytes(500_000)))
    return root


def save_array(path: Path) -> None:
    """As the weights are written: the error of the Rust code is no OSError."""
    numpy = pytest.importorskip("numpy")
    pytest.importorskip("safetensors.numpy").save_file({"w": numpy.zeros(3_000_000, "u1")}, path / "w.safetensors")


@pytest.mark.parametrize("writer", ["python", "safetensors", "wrapped"])
def test_disk_full(tmp_path: Path, mount: Callable[..., Path], writer: str) -> None:
    root = disk_of_2_mb(tmp_path / "disk", mount)

    def fill(path: Path) -> None:
        if writer == "safetensors":
            return save_array(path)
        try:
            (path / "weights.bin").write_bytes(bytes(3_000_000))
        except OSError as error:
            raise (RuntimeError("a plugin failed") if writer == "wrapped" else error) from error

    with pytest.raises(
        CheckpointError, match=r"disk is full.*it needs more than [\d,]+ bytes, and [\d,]+ are free"
    ) as e:
        write(root, NEW, fill)
    free = int(str(e.value).split(" are free")[0].split()[-1].replace(",", ""))
    assert 1_000_000 < free < 2_000_000, "what was half-written is gone before free space is counted"
    assert e.value.exit_code == 2
    assert leftovers(root) == []
    assert newest(root) == OLD
    write(root, NEW)
    assert newest(root) == NEW


def test_disk_full_names_what_the_checkpoint_before_needed(tmp_path: Path, mount: Callable[..., Path]) -> None:
    root = disk_of_2_mb(tmp_path / "disk", mount)
    (root / "other").write_bytes(bytes(1_200_000))
    with pytest.raises(CheckpointError, match=r"it needs about 500,000 bytes"):
        write(root, NEW, lambda path: (path / "weights.bin").write_bytes(bytes(500_000)))


def test_disk_full_at_every_file_that_the_store_makes(tmp_path: Path, mount: Callable[..., Path]) -> None:
    """With few inodes left it is the staging folder, a file, the manifest or the pointer that can't be made."""
    root = disk_of_2_mb(tmp_path / "disk", mount)
    fillers = []
    with pytest.raises(OSError, match="No space left"):
        while True:
            (root / f"filler-{len(fillers)}").touch()
            fillers.append(root / f"filler-{len(fillers)}")
    failed = 0
    while True:
        try:
            write(root, NEW)
            break
        except CheckpointError as error:
            assert "disk is full" in str(error)
            failed += 1
        assert newest(root) == OLD
        assert (root / "latest").resolve().name == OLD
        assert store.verify(root / OLD) == []
        fillers.pop().unlink()
    assert failed == 6, "the staging folder, its folder, two files, the manifest, the pointer"
    assert newest(root) == NEW
    assert leftovers(root) == []


# Damage


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated (5 bytes instead of": lambda file: os.truncate(file, 5),
    "empty (0 bytes instead of": lambda file: os.truncate(file, 0),
    "altered (another SHA-256)": lambda file: file.write_bytes(b"X" + file.read_bytes()[1:]),
    "altered (": lambda file: file.write_bytes(file.read_bytes() + b"X"),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("reason", DAMAGE)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(two: Path, name: str, reason: str) -> None:
    DAMAGE[reason](two / NEW / name)
    reports: list[str] = []
    assert store.newest_good(two, reports.append) == two / OLD
    assert len(reports) == 2
    assert reports[0].startswith(f"damaged checkpoint: {two / NEW / name}: {reason}")
    assert reports[1] == f"using {two / OLD} instead"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, f"{NEW}: no manifest.json"),
        ("", "manifest.json: empty"),
        ('{"files": {"weights.bin": {"si', "manifest.json: altered"),
        ("[]", "manifest.json: altered"),
        ('{"files": {}}', "manifest.json: altered"),
        ('{"files": {"weights.bin": {"size": "much", "sha256": ""}}}', "manifest.json: altered"),
        ("\0\udcff", "manifest.json: altered"),
    ],
)
def test_a_damaged_manifest_too(two: Path, text: str | None, reason: str) -> None:
    manifest = two / NEW / "manifest.json"
    manifest.unlink()
    if text is not None:
        manifest.write_bytes(text.encode(errors="surrogateescape"))
    reports: list[str] = []
    assert store.newest_good(two, reports.append) == two / OLD
    assert reason in reports[0]


def test_every_damaged_file_is_named_and_nothing_is_returned_without_a_whole_one(two: Path) -> None:
    for name in FILES:
        (two / NEW / name).unlink()
    (two / OLD / "weights.bin").unlink()
    reports: list[str] = []
    assert store.newest_good(two, reports.append) is None
    assert len(reports) == 4
    assert reports[-1] == f"no checkpoint in {two} is whole"


def test_a_root_without_checkpoints_is_no_damage(tmp_path: Path) -> None:
    reports: list[str] = []
    assert store.newest_good(tmp_path / "none", reports.append) is None
    assert reports == []


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_single_changed_byte_or_cut_goes_unnoticed(one: Path, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        shutil.copytree(one, root, symlinks=True)
        before = contents(root / OLD)
        file = root / OLD / data.draw(st.sampled_from([*FILES, "manifest.json"]))
        held = bytearray(file.read_bytes())
        at = data.draw(st.integers(0, len(held) - 1))
        if data.draw(st.booleans()):
            held[at] ^= 1 << data.draw(st.integers(0, 7))
        else:
            del held[at:]
        file.write_bytes(held)
        after = contents(root / OLD)
        whole = not store.verify(root / OLD)
        # White space of the manifest may differ, files may not.
        assert not whole or all(before[name] == after[name] for name in FILES)
        if file.name != "manifest.json" or file.parent.name == "nested":
            assert not whole


# The pointer


def test_latest_is_preferred_to_a_newer_checkpoint(two: Path) -> None:
    (two / "latest").unlink()
    (two / "latest").symlink_to(OLD)
    assert newest(two) == OLD
    (two / OLD / "weights.bin").unlink()
    assert newest(two) == NEW


@pytest.mark.parametrize("text", ["", "\0", "step-00000009", None])
def test_a_pointer_to_nothing_falls_back_to_the_newest(two: Path, text: str | None) -> None:
    (two / "latest").unlink()
    if text is not None:
        (two / "latest").write_text(text)
    assert newest(two) == NEW


def test_a_dangling_pointer_is_reported(two: Path) -> None:
    shutil.rmtree(two / NEW)
    reports: list[str] = []
    assert store.newest_good(two, reports.append) == two / OLD
    assert reports == [f"damaged checkpoint: {two / NEW}: missing", f"using {two / OLD} instead"]


def test_without_links_the_pointer_is_a_text_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *arguments: object, **more: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    for name in (OLD, NEW):
        write(tmp_path, name)
        assert (tmp_path / "latest").read_text() == name
        assert store.latest(tmp_path) == tmp_path / name
    assert leftovers(tmp_path) == []


def test_a_folder_in_place_of_the_pointer_is_a_clear_error_and_no_loss(two: Path) -> None:
    (two / "latest").unlink()
    shutil.copytree(two / NEW, two / "latest")
    with pytest.raises(CheckpointError, match=r"`.*latest` is a folder"):
        write(two, NEXT)
    assert newest(two) == NEXT


def test_folders_that_cannot_be_synced_are_passed_over_and_files_are_not() -> None:
    if not Path("/proc/cpuinfo").exists():
        pytest.skip("there is no /proc, which can't be synced")
    store._sync(Path("/proc"))
    with pytest.raises(OSError, match="Invalid argument"):
        store._sync(Path("/proc/cpuinfo"))


# Retention


@pytest.mark.parametrize("keep_last", [None, 1, 2, 5])
def test_the_newest_are_kept(tmp_path: Path, keep_last: int | None) -> None:
    names = [f"step-{step:08d}" for step in range(1, 5)]
    for name in names:
        write(tmp_path, name, keep_last=keep_last)
    assert [path.name for path in store.saved(tmp_path)] == names[-(keep_last or 4) :]
    assert newest(tmp_path) == names[-1]
    assert leftovers(tmp_path) == []


def test_the_one_just_written_stays_though_others_have_higher_steps(two: Path) -> None:
    write(two, NEXT)
    shutil.rmtree(two / OLD)
    for file in (two / NEXT / "weights.bin", two / NEW / "weights.bin"):
        file.unlink()
    write(two, OLD, keep_last=1)
    assert newest(two) == OLD


def test_a_save_that_fails_deletes_nothing(two: Path) -> None:
    def fail(path: Path) -> None:
        raise CheckpointError("would not load")

    with pytest.raises(CheckpointError, match="would not load"):
        write(two, NEXT, verify=fail, keep_last=1)
    assert [path.name for path in store.saved(two)] == [OLD, NEW]


def test_folders_that_the_store_did_not_finish_are_neither_counted_nor_deleted(two: Path) -> None:
    (two / "step-by-step notes").mkdir()
    (two / "step-by-step notes" / "note").write_text("mine")
    write(two, NEXT, keep_last=2)
    assert [path.name for path in store.saved(two)] == [NEW, NEXT, "step-by-step notes"]


def test_an_old_checkpoint_that_cannot_be_deleted_stops_nothing(tmp_path: Path, mount: Callable[..., Path]) -> None:
    write(tmp_path, OLD)
    mount(tmp_path / OLD / "busy", "size=1m")
    reports = write(tmp_path, NEW, keep_last=1)
    assert len(reports) == 1
    assert f"the old checkpoint {tmp_path / OLD} could not be deleted" in reports[0]
    assert newest(tmp_path) == NEW
