"""Our command line in this process, with what it says."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

from lib_precision_lora.cli import main
from tests.fuzz.target import Fault
from tests.fuzz.texts import check_said


def command(folder: Path, *arguments: str) -> int:
    """Its exit code. Raises `Fault` for an answer that is none."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    if code not in (0, 1, 2):
        raise Fault(f"the exit code is {code}")
    check_said(out.getvalue(), folder, lines=True)
    check_said(err.getvalue(), folder, lines=True)
    if err.getvalue().count("\n") != (code == 2):
        raise Fault(f"the exit code is {code}, and the errors are {err.getvalue()[:300]!r}")
    if "--json" in arguments:
        answer = json.loads(out.getvalue())
        if ("error" in answer) != (code == 2):
            raise Fault(f"the exit code is {code}, and the answer is {out.getvalue()[:300]!r}")
    return code
