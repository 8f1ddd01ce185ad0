"""The shape of the package: imports point one way, and public names explain themselves."""

import ast
import inspect
import pathlib

import pytest

import kfqn_optax as kfqn

PACKAGE = pathlib.Path(kfqn.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
}
LIBRARY = [name for name in MODULES if not name.startswith("bench") and name != "__init__"]
PUBLIC = [
    name for name in vars(kfqn) if not name.startswith("_") and not inspect.ismodule(getattr(kfqn, name))
]

ROOMS = {  # what the files of each folder may import of the package, besides their own folder
    "_meshes": set(),
    "_numerics": {"_meshes"},
    "_shown": set(),
    "_warnings": set(),
    "_returned": {"_shown"},
    "_constants": {"_shown"},
    "_divided": {"_meshes"},
    "_capture": {"_meshes", "_numerics", "_constants", "_shown", "_warnings"},
    "_sides": {"_capture", "_numerics", "_constants", "_returned", "_warnings"},
    "_steps": {"_capture", "_numerics", "_constants", "_returned", "_warnings"},
    "_over_layers": {"_capture", "_sides", "_divided", "_returned"},
    "_usual": {"_capture", "_steps", "_numerics"},
    "_state": {"_sides", "_usual"},
    "_views": {"_capture"},
    "_method": {"_capture", "_sides", "_steps"},
    "_learning": {"_capture", "_sides", "_method", "_numerics", "_over_layers", "_state", "_views"},
    "_objective": {"_capture", "_numerics"},
    "_transform": {
        "_objective",
        "_method",
        "_learning",
        "_over_layers",
        "_usual",
        "_state",
        "_views",
        "_capture",
        "_sides",
        "_steps",
        "_divided",
        "_meshes",
        "_numerics",
        "_constants",
        "_warnings",
    },
    "_diagnostics": {"_capture", "_state"},
    "_warm_start": {"_capture", "_sides", "_state", "_shown"},
    "_train_state": {"_capture", "_warnings"},
    "_alias": {"_capture", "_sides", "_steps", "_state", "_transform", "_constants", "_warnings"},
}


def imported(module):
    """Dotted names of all modules (or names in them) that a module imports, anywhere in its text."""
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def siblings(module):
    """The modules of the package that a module imports."""
    for name in imported(module):
        parts = name.split(".")
        if parts[0] != "kfqn_optax":
            continue
        candidates = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
        found = [c for c in candidates if c in MODULES or f"{c}.__init__" in MODULES]
        yield found[0] if found else "__init__"


def test_imports_have_no_cycle():
    arrows = {module: set(siblings(module)) for module in MODULES}
    for module in arrows:
        reached, waiting = set(), list(arrows[module])
        while waiting:
            other = waiting.pop()
            if other not in reached:
                reached.add(other)
                waiting += arrows.get(other, arrows.get(f"{other}.__init__", ()))
        assert module not in reached, f"{module} imports itself through {sorted(reached)}"


@pytest.mark.parametrize("module", LIBRARY)
def test_arrows_point_one_way(module):
    room = module.split(".")[0]
    assert {name.split(".")[0] for name in siblings(module)} - {room} <= ROOMS[room]


@pytest.mark.parametrize("module", LIBRARY)
def test_the_library_imports_neither_its_front_nor_its_bench(module):
    assert not {name for name in siblings(module) if name == "__init__" or name.startswith("bench")}


@pytest.mark.parametrize("module", LIBRARY)
def test_only_the_capture_knows_flax(module):
    knows_flax = any(name.split(".")[0] == "flax" for name in imported(module))
    assert (
        not knows_flax or module.startswith(("_capture.linen", "_capture.nnx")) or module == "_train_state"
    )


@pytest.mark.parametrize("module", MODULES)
def test_no_private_import_of_another_package(module):
    for name in imported(module):
        package, *parts = name.split(".")
        if package != "kfqn_optax":
            private = [part for part in parts if part.startswith("_") or part == "internal"]
            assert not private, f"{module} imports {name}"


def test_the_front_has_no_logic():
    docstring, *statements = MODULES["__init__"].body
    assert isinstance(docstring, ast.Expr)
    assert isinstance(docstring.value, ast.Constant)
    for statement in statements:
        if isinstance(statement, ast.ImportFrom):
            assert all(alias.asname == alias.name for alias in statement.names)
        else:
            assert isinstance(statement, ast.Assign)
            assert [target.id for target in statement.targets] == ["__version__"]
            assert isinstance(statement.value, ast.Constant)


@pytest.mark.parametrize("module", LIBRARY)
def test_every_module_says_what_it_is(module):
    assert ast.get_docstring(MODULES[module])


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    """A function shows an example, which the doctests run; a type, or one value of it, has attributes."""
    value = getattr(kfqn, name)
    documentation = inspect.getdoc(value) or ""
    assert documentation
    if inspect.isfunction(value):
        assert "Example:" in documentation
        assert ">>>" in documentation


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").exists()
