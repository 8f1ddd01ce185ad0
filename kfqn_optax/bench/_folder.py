"""The folder for the results."""

import tempfile
from pathlib import Path

from kfqn_optax.bench._errors import UserError


def prepare_folder(folder: Path) -> None:
    """Make it; find out before training whether it can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written to: {error}") from error
