"""The package against other versions of what it needs: ``nox``, or ``nox -s floors-3.12`` for one.

Each session of ``floors`` and ``newest`` ends with a row of the table in docs/versions.md. Pythons that are
not on the machine are left out.
"""

import nox

nox.options.error_on_missing_interpreters = False

PYTHONS = ["3.11", "3.12", "3.13"]
FILES = ("golden", "methods", "conformance", "errors", "wrong_calls", "devices")
TESTS = [*(f"test_{name}.py" for name in FILES), "steps", "sides"]
SHOWN = ("jax", "jaxlib", "flax", "optax", "numpy")
DEPENDENCIES = nox.project.load_toml("pyproject.toml")["project"]["dependencies"]

VERSIONS = f"""
import importlib.metadata, platform
print(platform.python_version(), *map(importlib.metadata.version, {SHOWN}), sep=" | ")
"""


def lowest(requirement: str) -> str:
    """``name>=version; marker`` as ``name==version; marker``."""
    package, semicolon, marker = requirement.partition(";")
    return package.replace(">=", "==") + semicolon + marker


def check(session: nox.Session, name: str, *pins: str) -> None:
    session.install("--editable", ".", "pytest>=8.0", *pins)
    versions = session.run("python", "-c", VERSIONS, silent=True)
    paths = session.posargs or [f"tests/{path}" for path in TESTS]
    as_users_compile = {"XLA_FLAGS": ""}  # tests/conftest.py sets those of a quicker compiler
    told = session.run("python", "-m", "pytest", "-q", *paths, silent=True, env=as_users_compile)
    session.log(f"| {name} | {str(versions).strip()} | {str(told).strip().splitlines()[-1]} |")


@nox.session(python=PYTHONS)
def floors(session: nox.Session) -> None:
    """The lowest versions that pyproject.toml declares."""
    check(session, "floors", *map(lowest, DEPENDENCIES))


@nox.session(python=PYTHONS)
def newest(session: nox.Session) -> None:
    """The newest releases."""
    check(session, "newest", "--upgrade", "--upgrade-strategy=eager")


@nox.session
def build(session: nox.Session) -> None:
    """Wheel and sdist, built and tried."""
    session.install("build")
    session.run("bash", ".ci/package", "python", external=True)
