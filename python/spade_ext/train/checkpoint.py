"""Checkpoints that are whole or absent.

The Trainer writes a checkpoint into the folder .saving of a run. There its files are listed with their sizes and
checksums in manifest.json and flushed to the disk, and then the folder is renamed: whatever interrupts a run, its
checkpoint-N was whole once, and the manifest tells whether it still is.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path

from safetensors import SafetensorError

from ..data.files import flush, sha256, write_text

STAGING = ".saving"
MANIFEST_FILE = "manifest.json"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, whole or not, by step."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(filter(Path.is_dir, found), key=step_of)


@contextmanager
def saving(staged: Path, what: str) -> Iterator[None]:
    """Turn what goes wrong while `staged` is written into one sentence, and leave nothing of it.

    Raises:
        OSError: `what` could not be saved.
    """
    run = staged.parent.parent
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is any of them, as the writer may be
        reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), "")
        shutil.rmtree(staged, ignore_errors=True)
        free = shutil.disk_usage(run).free / 1e6 if run.is_dir() else 0
        raise OSError(
            f"{run}: {what} could not be saved ({reason}; {free:,.1f} MB are free), what was saved before is as it was"
        ) from error


def publish(staged: Path) -> None:
    """Move a complete checkpoint from the staging folder to the run's, where it appears whole."""
    content = sorted(staged.rglob("*"))
    files = {
        path.relative_to(staged).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in content
        if path.is_file()
    }
    for path in content:
        flush(path)
    write_text(staged / MANIFEST_FILE, json.dumps({"files": files}, indent=2) + "\n")
    run = staged.parent.parent
    os.rename(staged, run / staged.name)
    flush(run)


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is whole."""
    try:
        files = json.loads((checkpoint / MANIFEST_FILE).read_bytes())["files"]
        for name, expected in files.items():
            path = checkpoint / name
            size = path.stat().st_size
            if size != expected["size"]:
                return f"{name} has {size:,} bytes, expected {expected['size']:,}"
            if sha256(path) != expected["sha256"]:
                return f"{name} is not what was written, by its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(checkpoint)} is missing"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"{MANIFEST_FILE} is not what was written"
    return None


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """The last whole checkpoint of a run, and sentences about later ones that are not whole."""
    problems = [f"{path} was not saved to its end" for path in checkpoints(run / STAGING)]
    for checkpoint in reversed(checkpoints(run)):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint, problems
        problems.append(f"{checkpoint} is not whole: {damage}")
    return None, problems


def set_aside(run: Path, step: int) -> None:
    """Rename the checkpoints after `step` to checkpoint-N.skipped, out of the way of those to come."""
    for checkpoint in checkpoints(run):
        if step_of(checkpoint) > step:
            names = chain([f"{checkpoint.name}.skipped"], (f"{checkpoint.name}.skipped-{n}" for n in count(2)))
            os.rename(checkpoint, next(run / name for name in names if not (run / name).exists()))


def prune(run: Path, limit: int | None, best: Path | None) -> None:
    """Delete the oldest checkpoints but `limit`, the newest and the best; and what interrupted saves left."""
    stored = [path for path in checkpoints(run) if (path / MANIFEST_FILE).is_file()]
    kept = {path for path in (stored[-1], best) if path in stored}
    surplus = max(0, len(stored) - max(limit, len(kept))) if limit and limit > 0 else 0
    for checkpoint in [path for path in stored if path not in kept][:surplus]:
        os.rename(checkpoint, run / STAGING / f"pruned-{checkpoint.name}")  # never half deleted under its name
    shutil.rmtree(run / STAGING, ignore_errors=True)
