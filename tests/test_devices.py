"""What needs several devices or processes: the CPU is made to look like them."""

import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


def test_eight_devices():
    environment = dict(
        os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=8", JAX_PLATFORMS="cpu"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", HERE / "on_devices.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
