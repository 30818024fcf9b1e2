"""`python -m lib_precision_lora`."""

import io
import os
import sys

from lib_precision_lora.cli import main

if __name__ == "__main__":
    # Before torch is imported: threads that wait sleep, so that a busy machine does not stretch the demo.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # A console of an older code page shows a question mark instead of ‖Δ‖, and does not fail.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.exit(main())
