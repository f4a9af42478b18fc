"""Mutation testing of what computes the paper's quantities: a small change of a line must fail a test.

    python tests/mutate.py --sample 40 --seed 0 [--module routing] [--at-once 2]

A seeded sample of all the changes that `changes` can make. Each is tried in a fork of this process, which has
imported what is slow and nothing of the library; the changed module is compiled in memory, and no file is
touched. Prints a JSON object: {"of": n, "tried": n, "killed": n, "survived": [what was changed, ...]}.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import importlib.machinery
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TESTS = {
    "routing": ["test_routing.py"],
    "losses": ["test_losses.py", "test_training.py"],
    "calibration": ["test_calibration.py"],
    "kv_cache": ["test_skipping.py"],
    "quantization.rtn": ["test_quantization.py", "test_gptq.py"],
    "quantization.awq": ["test_quantization.py"],
    "quantization.bitpack": ["test_packed.py"],
}
SLOW_IMPORTS = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "hypothesis",
    "safetensors.torch",
    "pandas",
    "pytest",
)
LIMIT = 600.0  # seconds of a mutant's tests; what takes longer is killed, as a test that hangs fails

SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
CALLS = {
    "min": "max", "max": "min", "amin": "amax", "amax": "amin", "sum": "mean", "mean": "sum",
    "ceil": "floor", "any": "all", "all": "any", "round": "ceil", "cumsum": "flip",
}  # fmt: skip


class Mutant(NamedTuple):
    """A module with one change, and what the change is."""

    module: str
    what: str
    tree: ast.Module


def changes(node: ast.AST) -> Iterator[Callable[[ast.AST], None]]:
    """What can be changed in one node, as functions on its copy."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield lambda n: n.ops.__setitem__(0, SWAPS[type(n.ops[0])]())
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPS:
        yield lambda n: setattr(n, "op", SWAPS[type(n.op)]())
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield lambda n: setattr(n, "value", not n.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield lambda n: setattr(n, "value", n.value + 1)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield lambda n: setattr(n, "op", ast.UAdd() if isinstance(n.op, ast.USub) else ast.Not())
    if isinstance(node, ast.Attribute) and node.attr in CALLS:
        yield lambda n: setattr(n, "attr", CALLS[n.attr])
    if isinstance(node, ast.Name) and node.id in CALLS:
        yield lambda n: setattr(n, "id", CALLS[n.id])
    if isinstance(node, ast.IfExp):
        yield lambda n: (body := n.body, setattr(n, "body", n.orelse), setattr(n, "orelse", body))
    if isinstance(node, ast.If):
        yield lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))


def mutants(module: str) -> list[Mutant]:
    """Every change of a module's functions; annotations, docstrings and messages are left alone."""
    path = source(module)
    text = path.read_text()
    lines, tree = text.splitlines(), ast.parse(text)
    found, annotations = [], _annotations(tree)
    for index, node in enumerate(ast.walk(tree)):
        for number, _ in enumerate(changes(node)):
            if node in annotations or _is_left_alone(lines[node.lineno - 1]):
                continue
            mutated = copy.deepcopy(tree)
            target = next(n for i, n in enumerate(ast.walk(mutated)) if i == index)
            before = ast.unparse(target).splitlines()[0]
            list(changes(target))[number](target)
            ast.fix_missing_locations(mutated)
            after = ast.unparse(target).splitlines()[0]
            if ast.unparse(mutated) == ast.unparse(tree):
                continue
            found.append(
                Mutant(
                    module, f"{module}: {before}  →  {after}  in: {lines[node.lineno - 1].strip()}", mutated
                )
            )
    return found


def _annotations(tree: ast.Module) -> set[ast.AST]:
    """Every node within an annotation."""
    roots = [getattr(node, name, None) for node in ast.walk(tree) for name in ("annotation", "returns")]
    return {node for root in roots if root for node in ast.walk(root)}


def _is_left_alone(line: str) -> bool:
    return line.strip().startswith(("raise ", 'f"', '"', "from ", "import "))


def source(module: str) -> Path:
    """The file of a module of the library."""
    return ROOT / "qtale_lib" / f"{module.replace('.', '/')}.py"


class Loader(importlib.machinery.SourceFileLoader):
    """Loads a module from a changed tree."""

    tree: ast.Module

    def get_code(self, fullname: str):
        """The changed code."""
        return compile(self.tree, self.path, "exec", dont_inherit=True)


class Finder:
    """Finds the changed module before the file is found."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(self, name: str, path=None, target=None):
        """The changed module's spec; None for every other."""
        if name != f"qtale_lib.{self.mutant.module}":
            return None
        loader = Loader(name, str(source(self.mutant.module)))
        loader.tree = self.mutant.tree
        return importlib.util.spec_from_loader(name, loader)


def attempt(mutant: Mutant | None, module: str) -> int:
    """Fork, and run the module's tests on the mutant, or on the library as it is; the fork's number."""
    if child := os.fork():
        return child
    status = 1
    try:
        os.setsid()
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if mutant:
            sys.meta_path.insert(0, Finder(mutant))
        import pytest

        files = [str(ROOT / "tests" / name) for name in TESTS[module]]
        plugins = ["-p", "no:xdist", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
        status = int(pytest.main([*files, "-x", "-q", "-m", "not slow", *plugins]))
    finally:
        os._exit(status)


def verdict(child: int, deadline: float) -> bool | None:
    """Whether the tests of a fork all passed; None while they run. At the deadline it is killed."""
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        return os.waitstatus_to_exitcode(status) == 0
    if time.monotonic() < deadline:
        return None
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def survivors(attempts: list[tuple[Mutant | None, str]], at_once: int) -> list[int]:
    """Which of the attempts, by their place, the tests all pass; so many forks at once."""
    waiting, running, survived = list(enumerate(attempts))[::-1], {}, []
    while waiting or running:
        while waiting and len(running) < at_once:
            place, wanted = waiting.pop()
            running[attempt(*wanted)] = place, time.monotonic() + LIMIT
        for child, (place, deadline) in list(running.items()):
            passed = verdict(child, deadline)
            if passed is not None:
                del running[child]
                survived += [place] if passed else []
        time.sleep(0.05)
    return sorted(survived)


def main(count: int, seed: int, modules: list[str], at_once: int) -> None:
    """Try a seeded sample of all changes of the modules."""
    for name in SLOW_IMPORTS:
        importlib.import_module(name)
    sound = survivors([(None, module) for module in modules], at_once)
    failing = [module for place, module in enumerate(modules) if place not in sound]
    assert not failing, f"the tests of {', '.join(failing)} fail as they are"
    everything = [mutant for module in modules for mutant in mutants(module)]
    sample = random.Random(seed).sample(everything, min(count, len(everything)))
    found = survivors([(mutant, mutant.module) for mutant in sample], at_once)
    survived = [sample[place].what for place in found]
    print(json.dumps({"of": len(everything), "tried": len(sample), "killed": len(sample) - len(survived),
                      "survived": survived}, ensure_ascii=False, indent=1))  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, default=40, help="how many changes are tried (40)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (0)")
    parser.add_argument("--module", choices=TESTS, action="append", help="these alone; all, if not given")
    parser.add_argument("--at-once", type=int, default=max(1, (os.cpu_count() or 2) // 2),
                        help="forks that run beside each other (half the cores)")  # fmt: skip
    asked = parser.parse_args()
    main(asked.sample, asked.seed, asked.module or list(TESTS), asked.at_once)
