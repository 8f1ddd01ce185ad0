"""What the numbers were measured with."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

import kfqn_optax as kfqn


def environment() -> dict[str, Any]:
    """Versions, the commit where the package lies in a git checkout, the machine and the date."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "versions": {
            "kfqn_optax": kfqn.__version__,
            **{name: importlib.metadata.version(name) for name in packages},
            "python": platform.python_version(),
        },
        "commit": _commit(),
        "device": str(jax.devices()[0].device_kind),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """As ``git describe`` has it, with ``-dirty`` for a changed checkout; None outside of one."""
    package = Path(kfqn.__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        tracked = subprocess.run(
            ["git", "ls-files", "--error-unmatch", "__init__.py"],
            cwd=package,
            capture_output=True,
            timeout=10,
        )
        done = subprocess.run(command, cwd=package, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if tracked.returncode == 0 else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
