"""Of small changes to what computes the paper's quantities, the tests find at least 85 %.

A sample of the changes that tests/mutate.py can make: $QTALE_MUTANTS (40), by $QTALE_MUTANTS_SEED (0).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import mutate
import pytest

from qtale_lib.provenance import ROOT

COUNT, SEED = (
    int(os.environ.get(name, usual)) for name, usual in (("QTALE_MUTANTS", 40), ("QTALE_MUTANTS_SEED", 0))
)
LEAST = 0.85


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_changes_of_a_line_fail_a_test():
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "mutate.py", "--sample", str(COUNT), "--seed", str(SEED)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tried"] == min(COUNT, found["of"])
    assert found["killed"] >= LEAST * found["tried"], "\n".join(found["survived"])


@pytest.mark.parametrize("module", mutate.TESTS)
def test_every_module_has_changes_and_each_is_another_module(module):
    found = mutate.mutants(module)
    assert len(found) > 20
    sound = mutate.source(module).read_text()
    code = {mutate.ast.unparse(mutant.tree) for mutant in found}
    assert mutate.ast.unparse(mutate.ast.parse(sound)) not in code
    for mutant in found:
        compile(mutant.tree, "mutant", "exec")
