"""benchmarks/card.py counts Neo's own way: in a process of its own, since importing a host changes one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.docs.named_tests import ROOT

COUNT = """
import json, torch
from benchmarks.card_layers import Layer
from benchmarks.card_ways import Files, counting, neo, _neo_merge
_neo_merge()
layer = Layer("linear", (48, 64), (2, 20, 64), torch.float16)
with counting():
    kernels = [neo(layer, Files(count, 4, layer.dtype)) for count in (1, 3)]
print(json.dumps([[kernel.name for kernel in found] for found in kernels]))
"""


def test_a_merge_in_each_forward_starts_the_same_kernels_for_each_file(neo_root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNT],
        cwd=ROOT,
        env={**os.environ, "NEO_ROOT": str(neo_root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, three = json.loads(done.stdout.splitlines()[-1])
    assert sum("mm" in name for name in one) == 1
    assert sum("mm" in name for name in three) == 3
    copy = 1
    assert len(three) - copy == 3 * (len(one) - copy)
