"""Pairs of save and load nodes: what fits, searches and trainings found, as files below the host's ``models`` folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from .progress import writer
from .schema import HIDDEN
from .training_inputs import CATEGORY


@dataclass(frozen=True)
class Kind:
    """A kind of file: its folder in ``models``, how its names end, and what those of new files begin with unless the user says so.

    made_by: the node whose results such files hold.
    """

    folder: str
    suffix: str
    prefix: str
    made_by: str

    def names(self) -> list[str]:
        """The files there are."""
        return [name for name in folder_paths.get_filename_list(self.folder) if name.endswith(self.suffix)]

    def choices(self) -> list[str]:
        """What a list of the files offers. The front end shows an empty one as ``undefined``."""
        return self.names() or [f"nothing to load yet: run {self.made_by} first"]

    def missing(self, name: str) -> str | None:
        """A sentence for a name that no file has."""
        names = self.names()
        if name in names:
            return None
        if names:
            return f"models/{self.folder} has no file {name!r}; choose one of the list (R refreshes it)."
        return f"There is nothing to load in models/{self.folder} yet; run {self.made_by} and save its result first."

    def path(self, name: str) -> Path:
        """Where one of them is."""
        return Path(folder_paths.get_full_path_or_raise(self.folder, name))

    def fresh(self, prefix: str) -> Path:
        """A path that no file has yet. Raises ValueError for one outside of the folder."""
        if Path(prefix).is_absolute() or ".." in Path(prefix).parts:
            raise ValueError(f"filename_prefix {prefix!r} leads out of models/{self.folder}; give a name inside of it.")
        folder, name, counter, *_ = folder_paths.get_save_image_path(prefix, self.root)
        return Path(folder) / f"{name}_{counter:05}_{self.suffix}"

    @property
    def root(self) -> str:
        """The folder that new files are written to."""
        return folder_paths.get_folder_paths(self.folder)[0]


@dataclass(frozen=True)
class About:
    """What a node's schema says of it."""

    node_id: str
    display_name: str
    description: str
    search_aliases: list[str]


def save_and_load(
    kind: Kind,
    *,
    save: About,
    load: About,
    value: io.Input,
    outputs: list[io.Output],
    write: Callable[[Any, Path], None],
    read: Callable[[Path], tuple],
) -> tuple[type[io.ComfyNode], type[io.ComfyNode]]:
    """Two node classes: one writes its input ``value`` to a new file, the other reads a file and has ``outputs``.

    write(value, path) writes; read(path) gives one thing for each output, and raises ValueError for what it cannot read.
    """
    folder_paths.add_model_folder_path(kind.folder, str(Path(folder_paths.models_dir) / kind.folder))

    class Save(io.ComfyNode):
        """Writes a new file and never overwrites one."""

        @classmethod
        def define_schema(cls) -> io.Schema:
            """Schema."""
            prefix = io.String.Input(
                "filename_prefix", default=kind.prefix,
                tooltip=f"Name of the file in models/{kind.folder}; a number is appended. A/B makes a folder A.",
            )  # fmt: skip
            name = io.String.Output("file", tooltip=f"The file's name, as {load.display_name} lists it.")
            sockets: dict[str, Any] = {"inputs": [value, prefix], "outputs": [name], "hidden": list(HIDDEN)}
            return io.Schema(**vars(save), category=CATEGORY, is_output_node=True, **sockets)

        @classmethod
        def execute(cls, filename_prefix: str, **inputs: Any) -> io.NodeOutput:
            """Write, and show where."""
            path = kind.fresh(filename_prefix)
            write(inputs[value.id], path)
            writer(cls)(f"Saved: {path}")
            name = str(path.relative_to(kind.root))
            return io.NodeOutput(name, ui={"text": (name,)})

    class Load(io.ComfyNode):
        """Reads a file."""

        @classmethod
        def define_schema(cls) -> io.Schema:
            """Schema."""
            tooltip = f"A {kind.suffix} file in the folder models/{kind.folder}."
            file = io.Combo.Input("file", options=kind.choices(), tooltip=tooltip)
            return io.Schema(**vars(load), category=CATEGORY, inputs=[file], outputs=outputs)

        @classmethod
        def execute(cls, file: str) -> io.NodeOutput:
            """Read."""
            return io.NodeOutput(*read(kind.path(file)))

        @classmethod
        def validate_inputs(cls, file: str | None = None) -> bool | str:
            """Whether there is such a file, else one sentence. None: another node gives the name."""
            return file is None or kind.missing(file) or True

        @classmethod
        def fingerprint_inputs(cls, file: str) -> str:
            """Changes with the file's content, so that the host reads it again."""
            return hashlib.sha256(kind.path(file).read_bytes()).hexdigest()

    Save.__name__, Load.__name__ = Save.__qualname__, Load.__qualname__ = save.node_id, load.node_id
    return Save, Load
