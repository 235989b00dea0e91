"""The folder of a run: a new one, or that of a run to resume."""

from __future__ import annotations

import re
import time
from pathlib import Path

from .history import HistoryError


def run_folder(
    runs: Path | str = "runs", name: str | None = None, resume: Path | str | None = None
) -> Path:
    """The folder of a new run, or of the one that is resumed.

    Raises:
        HistoryError: If there is no such folder, or it cannot be made.
    """
    if resume is None:
        return new_run_folder(runs, name)
    if name is not None:
        raise HistoryError(f"Run {str(resume)!r} has its name: leave out --name to resume it.")
    return _folder_to_resume(runs, resume)


def new_run_folder(runs: Path | str = "runs", name: str | None = None) -> Path:
    """Makes a new folder for a run, named by the time unless it has a name.

    Raises:
        HistoryError: If the name is not a plain one, is in use, or the folder cannot be made.
    """
    if name is not None and not re.fullmatch(r"[\w][\w.-]*", name):
        raise HistoryError(f"A run's name has letters, digits, '.', '_' and '-': not {name!r}.")
    base = name or time.strftime("%Y-%m-%d-%H%M%S")
    candidates = [base] if name else [base, *(f"{base}-{number}" for number in range(2, 100))]
    for candidate in candidates:
        folder = Path(runs) / candidate
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise HistoryError(
                f"Cannot make the run's folder {folder}: {error.strerror or error}. "
                "Choose another place with --runs."
            ) from error
        return folder
    raise HistoryError(f"There is a run named {base!r} in {runs}/ already: choose another name.")


def _folder_to_resume(runs: Path | str, name: Path | str) -> Path:
    """The folder of a run to resume, by its name below ``runs`` or by its path.

    Raises:
        HistoryError: If there is no such run.
    """
    for folder in (Path(runs) / name, Path(name)):
        if (folder / "settings.json").exists():
            return folder
        # It may have been killed before anything was written.
        if folder.is_dir() and not any(p for p in folder.iterdir() if ".part" not in p.name):
            return folder
    raise HistoryError(
        f"There is no run {str(name)!r} to resume, neither in {runs}/ nor as a path: a run's "
        "folder has a settings.json."
    )
