"""The crash-safe store: whatever moment the machine dies at, `latest` is a whole checkpoint, the old or the new.

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
    barrier: Callable[[], None],
    report: Callable[[str], None],
    verify: Callable[[Path], None] | None = None,
    keep_last: int | None = None,
) -> Path:
    """Write the checkpoint `root/name` and point `latest` to it; every worker calls it.

    Args:
        fill: puts the files into the folder that it is given, on every worker.
        verify: raises CheckpointError if the files would not load; on rank 0, before they are renamed.
        keep_last: how many of the newest checkpoints stay; None keeps all.

    Raises:
        CheckpointError: it can't be written, or would not load; what was there before is untouched.
    """
    final, staged = root / name, root / f"{STAGED}{name}"
    if rank == 0:
        _prepare(root, staged)
    barrier()
    if not (final / MANIFEST).exists():
        try:
            fill(staged)
            barrier()
            if rank == 0:
                _commit(root, staged, final, verify)
        except BaseException as error:
            if rank == 0:
                shutil.rmtree(staged, ignore_errors=True)
            if isinstance(error, OSError):
                raise _unwritten(final, error) from error
            raise
    if rank == 0:
        shutil.rmtree(staged, ignore_errors=True)
        _point(root, name)
        _retain(root, keep_last, report)
    barrier()
    return final


def _prepare(root: Path, staged: Path) -> None:
    """Make the root and an empty staging folder; what dead saves left behind goes."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(f"{STAGED}*"):
            _remove(leftover)
        fault("make staging folder")
        staged.mkdir()
    except OSError as error:
        raise _unwritten(staged, error) from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _commit(root: Path, staged: Path, final: Path, verify: Callable[[Path], None] | None) -> None:
    if verify is not None:
        verify(staged)
    entries = {}
    for path in files(staged):
        fault(f"fsync {path.name}")
        _sync(path)
        entries[path.relative_to(staged).as_posix()] = {"size": path.stat().st_size, "sha256": _hash(path)}
    fault("write manifest")
    manifest = staged / MANIFEST
    manifest.write_text(json.dumps({"files": entries}, indent=1), encoding="utf-8")
    fault("fsync manifest")
    _sync(manifest)
    for folder in [staged, *(path for path in staged.rglob("*") if path.is_dir())]:
        _sync(folder)
    if final.exists():
        # Without a manifest it never was a whole checkpoint.
        shutil.rmtree(final)
    fault("rename")
    staged.rename(final)
    fault("fsync root")
    _sync(root)


def _unwritten(path: Path, error: OSError) -> CheckpointError:
    parent = next(p for p in path.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free / 1e9
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = f"the disk is full ({free:.2f} GB free)" if full else str(error)
    return CheckpointError(
        f"the checkpoint `{path.name.removeprefix(STAGED)}` could not be written to `{path.parent}`: {what}",
        fix="free some space, or set another `output_dir`; earlier checkpoints are intact" if full else None,
    )


def files(folder: Path) -> Iterator[Path]:
    """The files of a checkpoint, in order, without the manifest."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _point(root: Path, name: str) -> None:
    """Let `latest` name the checkpoint: a relative link, or a text file where there are no links."""
    if _pointed(root) == name:
        return
    temporary = root / f"{STAGED}{LATEST}"
    _remove(temporary)
    fault("write pointer")
    try:
        temporary.symlink_to(name)
    except OSError:
        temporary.write_text(name, encoding="utf-8")
        _sync(temporary)
    fault("rename pointer")
    temporary.replace(root / LATEST)
    fault("fsync pointer")
    _sync(root)


def _pointed(root: Path) -> str | None:
    pointer = root / LATEST
    if pointer.is_symlink():
        return str(pointer.readlink())
    return pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None


def saved(root: Path) -> list[Path]:
    """The checkpoints in `root`, oldest first."""
    return sorted(path for path in root.glob("step-*") if path.is_dir())


def _retain(root: Path, keep_last: int | None, report: Callable[[str], None]) -> None:
    """Delete old checkpoints; never the one that `latest` names, and none unless a newer one is whole."""
    if keep_last is None:
        return
    kept = saved(root)[-keep_last:]
    if not any(not damages(path) for path in kept):
        report(f"no checkpoint among the last {keep_last} in `{root}` is whole, so older ones are kept")
        return
    for path in saved(root)[:-keep_last]:
        if path.name != _pointed(root):
            aside = root / f"{STAGED}old-{path.name}"
            fault("rename old")
            path.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)


def damages(path: Path) -> list[str]:
    """What is wrong with the checkpoint `path`, file by file; nothing where it is whole."""
    try:
        entries = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{path / MANIFEST}: missing or broken, so it was never finished"]
    found = []
    for name, entry in entries.items():
        file = path / name
        if not file.is_file():
            found.append(f"{file}: missing")
        elif (size := file.stat().st_size) != entry["size"]:
            found.append(f"{file}: {size} bytes instead of {entry['size']}")
        elif _hash(file) != entry["sha256"]:
            found.append(f"{file}: altered")
    return found


def newest_good(root: Path, report: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint in `root`, or None; what is damaged is reported by name."""
    candidates = saved(root)[::-1]
    for path in candidates:
        found = damages(path)
        if not found:
            if path != candidates[0]:
                report(f"using {path} instead")
            return path
        for damage in found:
            report(f"damaged checkpoint: {damage}")
    return None
