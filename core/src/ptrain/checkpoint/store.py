"""The crash-safe store: whatever moment the machine dies at, what can be resumed from is the old or the new, whole.

Files are written aside, fsynced, listed with sizes and hashes in a manifest, renamed into place, and only then
pointed to. Nothing here needs torch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from ptrain.errors import CheckpointError

MANIFEST = "manifest.json"
LATEST = "latest"
STAGED = ".tmp-"


def _no_fault(point: str) -> None:
    """Called before each write, fsync and rename; tests put a function here that kills the process."""


fault: Callable[[str], None] = _no_fault


def write(
    root: Path,
    name: str,
    fill: Callable[[Path], None],
    *,
    rank: int,
    agree: Callable[[bool], bool],
    report: Callable[[str], None],
    verify: Callable[[Path], None] | None = None,
    keep_last: int | None = None,
) -> Path:
    """Write the checkpoint `root/name` and point `latest` to it; every worker calls it.

    A whole one that is there already is kept, and `fill` is not called.

    Args:
        fill: puts the files into the folder that it is given, on every worker.
        agree: waits for all workers and returns what rank 0 gave it.
        verify: raises CheckpointError if the files would not load; on rank 0, before they are renamed.
        keep_last: how many of the newest checkpoints stay; the one just written does anyway. None keeps all.

    Raises:
        CheckpointError: it can't be written, or would not load; what was there before is untouched.
    """
    staged = root / f"{STAGED}{name}"
    with _explained(root, name, staged, rank):
        # Rank 0 decides for all: on a disk that several hosts share, the others may not see the folder yet.
        if agree(rank == 0 and _prepare(root / name, staged, report)):
            fill(staged)
            agree(True)
            if rank == 0:
                _commit(root / name, staged, verify)
        if rank == 0:
            _point(root, name)
            _retain(root, name, keep_last, report)
        agree(True)
    return root / name


@contextmanager
def _explained(root: Path, name: str, staged: Path, rank: int) -> Iterator[None]:
    """Whatever fails, leave nothing half-written, and say it in terms of the checkpoint and the disk."""
    try:
        yield
    except BaseException as error:
        if rank == 0:
            shutil.rmtree(staged, ignore_errors=True)
        message = f"the checkpoint `{name}` could not be written to `{root}`"
        if _disk_full(error):
            raise CheckpointError(
                f"{message}: the disk is full or its quota is used up: {_space(root)}",
                fix="free some space, or set another `output_dir`; earlier checkpoints are intact",
            ) from error
        if isinstance(error, OSError):
            raise CheckpointError(f"{message}: {error}", fix="earlier checkpoints are intact") from error
        raise


def _disk_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind it; safetensors says so in words alone, and plugins' errors are wrapped."""
    words = [os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)]
    seen = []  # code may raise an error from itself
    while error is not None and error not in seen:
        if any(word in str(error) for word in words):
            return True
        seen.append(error)
        error = error.__cause__
    return False


def _space(root: Path) -> str:
    """Needed and free bytes: as much as the checkpoint before, if that is more than there is."""
    free = shutil.disk_usage(next(path for path in [root, *root.absolute().parents] if path.exists())).free
    before = next((sum(size for size, _ in _entries(path).values()) for path in _finished(root)[::-1]), 0)
    need = f"about {before:,}" if before > free else f"more than {free:,}"
    return f"it needs {need} bytes, and {free:,} are free"


def _prepare(final: Path, staged: Path, report: Callable[[str], None]) -> bool:
    """Remove what dead saves left behind, and make the folder to fill.

    False, and no folder, where the checkpoint is there and whole.
    """
    _make(staged.parent)
    for leftover in staged.parent.glob(f"{STAGED}*"):
        _remove(leftover)
    if final.exists():
        found = verify(final)
        if not found:
            return False
        for damage in found:
            report(f"damaged checkpoint: {damage}")
        report(f"writing {final} anew")
    fault("make staging folder")
    staged.mkdir()
    return True


def _make(folder: Path) -> None:
    """Make the folder and its parents so that they outlast a power cut."""
    if folder.is_dir():
        return
    _make(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync(folder.parent)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _commit(final: Path, staged: Path, check: Callable[[Path], None] | None) -> None:
    """Check, sync and list the files of the staged folder, and give it its name."""
    if check is not None:
        check(staged)
    _write_manifest(staged)
    for folder in [*(path for path in staged.rglob("*") if path.is_dir()), staged]:
        fault(f"fsync {folder.name}")
        _sync(folder)
    damaged = _set_aside(final) if final.exists() else None
    fault("rename")
    staged.rename(final)
    fault("fsync root")
    _sync(final.parent)
    if damaged:
        shutil.rmtree(damaged, ignore_errors=True)


def _write_manifest(staged: Path) -> None:
    paths, manifest = _files(staged), staged / MANIFEST
    if manifest.exists():
        raise CheckpointError(
            f"a file of the checkpoint is named `{MANIFEST}`", fix="rename it: the store writes its own"
        )
    if not paths:
        raise CheckpointError(f"no worker wrote a file into `{staged}`, so there is no checkpoint")
    for path in paths:
        fault(f"fsync {path.name}")
        _sync(path)
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_hash, paths)
        entries = {
            path.relative_to(staged).as_posix(): {"size": path.stat().st_size, "sha256": digest}
            for path, digest in zip(paths, digests, strict=True)
        }
    fault("write manifest")
    manifest.write_text(json.dumps({"files": entries}, indent=1), encoding="utf-8")
    fault("fsync manifest")
    _sync(manifest)


def _files(folder: Path) -> list[Path]:
    """The files of a checkpoint, in order, without its manifest."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems can't sync a folder, and there is no other way.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _set_aside(path: Path) -> Path:
    """Rename the checkpoint so that no moment leaves half of it under its name."""
    aside = path.with_name(f"{STAGED}old-{path.name}")
    fault("rename old")
    path.rename(aside)
    return aside


def _point(root: Path, name: str) -> None:
    """Let `latest` name the checkpoint: a relative link, or a text file where there are no links."""
    pointer, temporary = root / LATEST, root / f"{STAGED}{LATEST}"
    if latest(root) == root / name:
        return
    if pointer.is_dir() and not pointer.is_symlink():
        raise CheckpointError(
            f"`{pointer}` is a folder, so it can't point to the checkpoint `{name}`, which is whole",
            expected="a link, or nothing",
            fix=f"move `{pointer}` away (a copy that follows links makes such folders), and resume",
        )
    fault("write pointer")
    try:
        temporary.symlink_to(name)
    except OSError:
        temporary.write_text(name, encoding="utf-8")
        _sync(temporary)
    fault("rename pointer")
    temporary.replace(pointer)
    fault("fsync pointer")
    _sync(root)


def latest(root: Path) -> Path | None:
    """What `latest` points to, there or not; None without a pointer."""
    pointer = root / LATEST
    if pointer.is_symlink():
        return root / pointer.readlink()
    name = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""
    return root / name if name and name.isprintable() else None


def saved(root: Path) -> list[Path]:
    """The checkpoints in `root`, oldest first, damaged ones too."""
    return sorted(path for path in root.glob("step-*") if path.is_dir())


def _finished(root: Path) -> list[Path]:
    """Those of `saved` whose manifest can be read."""
    found = []
    for path in saved(root):
        try:
            _entries(path)
        except (OSError, ValueError):
            continue
        found.append(path)
    return found


def _retain(root: Path, current: str, keep_last: int | None, report: Callable[[str], None]) -> None:
    """Delete old checkpoints; never the one just written, which `latest` names, nor a folder that is none of ours."""
    for path in _finished(root)[:-keep_last] if keep_last else []:
        if path.name == current:
            continue
        try:
            aside = _set_aside(path)
            fault("delete old")
            shutil.rmtree(aside)
        except OSError as error:
            report(f"the old checkpoint {path} could not be deleted: {error}")


def verify(path: Path) -> list[str]:
    """What is wrong with the checkpoint `path`, file by file; nothing where it is whole."""
    manifest = path / MANIFEST
    if not path.is_dir():
        return [f"{path}: missing"]
    if not manifest.is_file():
        return [f"{path}: no {MANIFEST}, so it was never finished"]
    try:
        entries = _entries(path)
    except (OSError, ValueError) as error:
        return [f"{manifest}: {'altered' if manifest.stat().st_size else 'empty'} ({error})"]
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: _damage(path / name, *entries[name]), entries)
    return [damage for damage in found if damage]


def _entries(path: Path) -> dict[str, tuple[int, str]]:
    """Size in bytes and SHA-256 of each file, by relative path, from the manifest.

    Raises:
        ValueError: it is no manifest.
    """
    content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    try:
        entries = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in content["files"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError("it lacks sizes and hashes") from error
    if not entries:
        raise ValueError("it lists no file")
    return entries


def _damage(file: Path, size: int, sha256: str) -> str | None:
    try:
        found = file.stat().st_size
        if found != size:
            what = "truncated" if found < size else "altered"
            return f"{file}: {what if found else 'empty'} ({found:,} bytes instead of {size:,})"
        return None if _hash(file) == sha256 else f"{file}: altered (another SHA-256)"
    except FileNotFoundError:
        return f"{file}: missing"
    except (OSError, ValueError) as error:
        return f"{file}: unreadable ({error})"


def newest_good(root: Path, report: Callable[[str], None]) -> Path | None:
    """The checkpoint that `latest` names, or else the newest that is whole; None where there is none.

    What is damaged is reported by name and reason.
    """
    pointed = latest(root)
    candidates = [path for path in saved(root)[::-1] if path != pointed]
    if pointed is not None:
        candidates.insert(0, pointed)
    for path in candidates:
        found = verify(path)
        if not found:
            if path != candidates[0]:
                report(f"using {path} instead")
            return path
        for damage in found:
            report(f"damaged checkpoint: {damage}")
    if candidates:
        report(f"no checkpoint in {root} is whole")
    return None
