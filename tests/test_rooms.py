"""The order of the rooms: a module imports only rooms below its own, and there is no circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import jax.numpy as jnp
import pytest
from rooms import CHECKED, ORDER

import specmemo_jax

PACKAGE = Path(specmemo_jax.__file__).parent
DOORS = {"__init__", "__main__"}  # they only hand on
MOST_LINES = 400


def modules() -> dict[str, Path]:
    """Every module by its dotted name below the package."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(path: Path, names: set[str]) -> set[str]:
    """The package's modules that a file imports, inside functions and for types alone, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "specmemo_jax":
            base = node.module.split(".", 1)[1] + "." if "." in node.module else ""
            for alias in node.names:
                whole = base + alias.name
                found.add(whole if whole in names else base[:-1] or "__init__")
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".", 1)[1] for alias in node.names if "specmemo_jax." in alias.name}
    return found


MODULES = modules()
GRAPH = {name: imports(path, set(MODULES)) for name, path in MODULES.items() if name not in DOORS}


def test_rooms_every_folder_is_in_the_order():
    assert {name.split(".")[0] for name in GRAPH} == set(ORDER)


@pytest.mark.parametrize("room", ORDER)
def test_imports_of_a_room_go_down(room):
    allowed = {*ORDER[: ORDER.index(room) + 1], *DOORS}
    upward = [
        (name, other)
        for name, others in GRAPH.items()
        if name.split(".")[0] == room
        for other in others
        if other.split(".")[0] not in allowed
    ]
    assert upward == []


def test_imports_have_no_circle():
    # A package's own file imports its modules; those that import a sibling do not go through it.
    TopologicalSorter(GRAPH).prepare()


def test_modules_stay_short():
    assert [name for name, path in MODULES.items() if len(path.read_text().splitlines()) > MOST_LINES] == []


@pytest.mark.parametrize("room", CHECKED)
def test_shape_checks_are_on_in_a_room(room):
    names = [name for name in MODULES if name == room or name.startswith(f"{room}.")]
    assert names
    specs = [_module(name).__spec__ for name in names]
    loaders = [type(spec.loader).__module__ for spec in specs if spec is not None]
    assert all(loader.startswith("jaxtyping") for loader in loaders), loaders


def test_shape_checks_refuse_a_wrong_shape():
    from specmemo_jax.draft.tree import ancestor_mask

    with pytest.raises(Exception, match="parents"):
        ancestor_mask(jnp.zeros((3,), jnp.int32), 2)


def _module(name: str):
    from importlib import import_module

    return import_module(f"specmemo_jax.{name}")
