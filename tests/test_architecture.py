"""The shape of the project, held: imports run downwards, in no circle; collectives live in one file."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Rooms, from the ground up: a room uses those below it and itself.
FLOORS = [
    {"errors", "file_types", "console"},
    {"functional", "distributed"},
    {"config", "data"},
    {"models"},
    {"perf"},
    {"generation", "storage"},
    {"tracking", "model_card"},
    {"reward"},
    {"ppo", "evaluation"},
    {"memory_estimate", "reporting", "ratings", "benchmark"},
    {"cli"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
FILES = sorted((ROOT / "rlhf").rglob("*.py"))


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def room(module):
    return module.split(".")[1]


def imported(path):
    """Names of modules as the file imports them, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"rlhf"}))
def test_imports_run_downwards(module):
    for other in imported(MODULES[module]):
        if other in MODULES and other != "rlhf":
            mine, theirs = room(module), room(other)
            assert mine == theirs or FLOOR[theirs] <= FLOOR[mine], f"{module} reaches up to {other}"
            assert {mine, theirs} != {"ppo", "evaluation"}, "ppo and evaluation know nothing of each other"


def test_no_module_imports_itself_by_a_detour():
    graph = {name: {other for other in imported(path) if other in MODULES} for name, path in MODULES.items()}
    graph["rlhf"] = set()  # loads its few names when they are asked for
    TopologicalSorter(graph).prepare()  # a CycleError names the circle


def test_no_room_needs_one_that_needs_it():
    """Two rooms that import each other are one room."""
    graph = {}
    for name, path in MODULES.items():
        if name != "rlhf":
            others = {room(other) for other in imported(path) if other in MODULES and other != "rlhf"}
            graph.setdefault(room(name), set()).update(others - {room(name)})
    TopologicalSorter(graph).prepare()


def test_functional_imports_torch_only():
    for path in (ROOT / "rlhf" / "functional").glob("*.py"):
        assert {module.split(".")[0] for module in imported(path)} <= {
            "torch",
            "typing",
            "collections",
            "functools",
            "math",
        }, path


def test_one_file_names_collectives():
    for path in FILES:
        if path.name != "collectives.py":
            text = path.read_text()
            for word in ("torch.distributed", "gather_object(", ".gather_for_metrics", "accelerator.reduce"):
                assert word not in text, f"{path} names {word}"
