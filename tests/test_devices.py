"""What needs several devices or processes: the CPU is made to look like them."""

import pathlib
import socket
import subprocess
import sys

import numpy as np

from kfqn_optax.bench._simulated import simulated

HERE = pathlib.Path(__file__).parent
MANY_HOSTS = HERE.parent / "docs" / "many_hosts.py"


def start(*command, devices):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([sys.executable, *map(str, command)], env=simulated(devices), **pipes)


def output(process):
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text[-5000:]
    return text


def test_eight_devices():
    output(start("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", HERE / "on_devices.py", devices=8))


def losses_on(hosts):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    processes = [start(MANY_HOSTS, address, hosts, host, devices=4 // hosts) for host in range(hosts)]
    first, *_ = [output(process) for process in processes]
    words = [line.split() for line in first.splitlines()]
    return [float(line[1]) for line in words if len(line) == 2 and line[0].isdigit()]


def test_two_hosts_train_as_one():
    """The script of the documentation, in two processes of two devices and in one of four."""
    one, two = losses_on(1), losses_on(2)
    assert len(one) == 10
    assert one[-1] < one[0]
    np.testing.assert_allclose(two, one, rtol=1e-3)
