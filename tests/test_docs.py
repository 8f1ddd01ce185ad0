"""The pages are true: every Python block runs by itself, links lead somewhere, the API is all there."""

import functools
import pathlib
import re

import jax
import numpy as np
import pytest

import kfqn_optax as kfqn
from kfqn_optax.bench._quick import compiler_options

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]  # those of notebooks are made by them


def blocks():
    """Each block once, with the first page that has it and its number there."""
    found = {}
    for page in PAGES:
        texts = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        for number, text in enumerate(texts):
            found.setdefault(text, f"{page.relative_to(ROOT)}, block {number + 1}")
    return [pytest.param(text, place, id=place) for text, place in found.items()]


@pytest.mark.parametrize(("text", "place"), blocks())
def test_a_block_runs_by_itself(text, place, monkeypatch, capsys):
    namespace = {}
    with monkeypatch.context() as patch:  # compiling is most of the time
        patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=compiler_options()))
        exec(compile(text, place, "exec"), namespace)
    assert np.isfinite(namespace.get("loss", 0.0)) or "jnp.nan" in text
    if place == "README.md, block 1":
        ours, shown = (np.log10(losses(text)) for text in (capsys.readouterr().out, printed()))
        np.testing.assert_allclose(ours, shown, atol=0.5)


def printed():
    """What README.md says its first block prints."""
    return re.findall(r"^```text\n(.*?)^```", PAGES[0].read_text(), re.MULTILINE | re.DOTALL)[0]


def losses(text):
    return [float(line.split()[1]) for line in text.splitlines()]


def test_the_blocks_are_found():
    assert len(blocks()) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_api_page_has_all_public_names():
    page = (ROOT / "docs" / "api.md").read_text()
    listed = re.findall(r"^::: kfqn_optax\.(\w+)$", page, re.MULTILINE)
    public = [name for name in vars(kfqn) if not name.startswith("_") and name != "bench"]
    assert sorted(listed) == sorted(public)


def test_the_test_command_is_what_ci_runs():
    assert "bash .ci/run" in (ROOT / "README.md").read_text()
    assert (ROOT / ".ci" / "run").is_file()
