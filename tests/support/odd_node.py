"""`p2pdyn` whose engine `sim` is :mod:`support.odd_engine`: ``odd_node.py ARGUMENTS...``

With `child` before the arguments the engine runs in a process of its own, as most do, and stands still for its
node once it has made no step for STALL_S.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from p2pdyn.cli.main import main
from p2pdyn.core import speed
from p2pdyn.engines.registry import ENGINES, EngineKind

STALL_S = 1.0

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    child = sys.argv[1:2] == ["child"]
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # the engine's process must find it too
    ENGINES["sim"] = EngineKind("support.odd_engine", child=child, help="")
    if child:
        speed.STALL_S = speed.COLD_STALL_S = STALL_S
    main(sys.argv[1 + child :])
