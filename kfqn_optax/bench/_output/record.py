"""Records as JSON files."""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDERS = ("data_dir", "out")


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options of a command but for its folders: a record is the same wherever it is made."""
    return {name: value for name, value in vars(options).items() if name not in FOLDERS}


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """What is not finite becomes null: JSON has no word for it."""
    path.write_text(json.dumps(_finite(content), indent=1, allow_nan=False, default=str) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
