"""Files in the host's ``models/guidance`` folder: what fits and searches found."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import folder_paths
from comfy_api.latest import io

FOLDER = "guidance"

folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def listed(suffix: str) -> list[str]:
    """The files of one kind."""
    return [name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(suffix)]


def file_input(suffix: str) -> io.Input:
    """A choice among the files of one kind."""
    return io.Combo.Input("file", options=listed(suffix), tooltip=f"A {suffix} file in the folder models/{FOLDER}.")


def prefix_input(default: str) -> io.Input:
    """What a new file's name begins with."""
    return io.String.Input(
        "filename_prefix", default=default, tooltip=f"Name of the file in models/{FOLDER}; a number is appended. A/B makes a folder A."
    )


def existing(file: str) -> Path:
    """Where a listed file is."""
    return Path(folder_paths.get_full_path_or_raise(FOLDER, file))


def saved(filename_prefix: str, suffix: str, save: Callable[[Path], None]) -> io.NodeOutput:
    """A save node's output: the name of the new file that ``save`` has written."""
    path = fresh(filename_prefix, suffix)
    save(path)
    name = str(path.relative_to(folder_paths.get_folder_paths(FOLDER)[0]))
    return io.NodeOutput(name, ui={"text": (name,)})


def fresh(filename_prefix: str, suffix: str) -> Path:
    """A path that no file has yet. Raises ValueError for one outside of the folder."""
    root = folder_paths.get_folder_paths(FOLDER)[0]
    if Path(filename_prefix).is_absolute() or ".." in Path(filename_prefix).parts:
        raise ValueError(f"filename_prefix {filename_prefix!r} leads out of models/{FOLDER}; give a name inside of it.")
    folder, name, counter, *_ = folder_paths.get_save_image_path(filename_prefix, root)
    return Path(folder) / f"{name}_{counter:05}_{suffix}"


def fingerprint(file: str) -> str:
    """Changes with the file's content, so that the host loads it again."""
    return hashlib.sha256(existing(file).read_bytes()).hexdigest()
