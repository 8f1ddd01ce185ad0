"""The examples of README.md run, in order and in one namespace, and its commands are those that CI runs."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_examples_run():
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert blocks
    namespace = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, example {number}", "exec"), namespace)


def test_the_test_command_is_what_ci_runs():
    assert "bash .ci/run" in README
    assert (ROOT / ".ci" / "run").is_file()
