from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fuzz_http.py"


def test_three_seconds_of_fuzzing_find_nothing() -> None:
    run = subprocess.run([sys.executable, SCRIPT, "--seconds", "3"], capture_output=True, text=True, timeout=50)
    assert run.returncode == 0, run.stdout + run.stderr
    assert json.loads(run.stdout)["tries"] > 50
