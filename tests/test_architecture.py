"""The shape of the project, held: imports run downwards, collectives live in one file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"errors"},
    {"functional", "config", "parsing"},
    {"data", "models", "runtime"},
    {"reward", "generation"},
    {"ppo", "evaluation"},
    {"reporting", "ratings", "benchmark"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
FILES = sorted((ROOT / "rlhf").rglob("*.py"))


def part(path):
    relative = path.relative_to(ROOT / "rlhf")
    return relative.parts[0].removesuffix(".py")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards(path):
    if part(path) == "__init__":
        return
    for module in imported(path):
        if module.startswith("rlhf."):
            other = module.split(".")[1]
            assert other == part(path) or FLOOR[other] <= FLOOR[part(path)], f"{path.name} reaches up to {module}"
            assert {other, part(path)} != {"ppo", "evaluation"}, "ppo and evaluation know nothing of each other"


def test_functional_imports_torch_only():
    for path in (ROOT / "rlhf" / "functional").glob("*.py"):
        assert {module.split(".")[0] for module in imported(path)} <= {"torch", "typing", "collections", "functools"}, (
            path
        )


def test_one_file_names_collectives():
    for path in FILES:
        if path.name != "distributed.py":
            text = path.read_text()
            for word in ("torch.distributed", "gather_object(", ".gather_for_metrics", "accelerator.reduce"):
                assert word not in text, f"{path} names {word}"
