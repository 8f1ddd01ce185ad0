"""Where a data set is under ``--data-dir``."""

from pathlib import Path

from kfqn_optax.bench._datasets import require_folder


def folder_of(data_dir: Path | None, name: str) -> Path | None:
    """The folder ``name`` in ``data_dir``, or ``data_dir`` itself where there is none."""
    if data_dir is None:
        return None
    folder = require_folder(data_dir) / name
    return folder if folder.is_dir() else data_dir
