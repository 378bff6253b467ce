"""`p2pdyn`, but its engine names its KV blocks as another model's, as if each were another prompt's of the same routing
hash: ``foreign_node.py ARGUMENTS...``"""

from __future__ import annotations

import sys
from typing import Any

from p2pdyn.cli.main import main
from p2pdyn.engines import sim

if __name__ == "__main__":
    names = sim.BlockNames

    def foreign(card: bytes, weights: str, block_size: int) -> Any:
        return names(card, f"not {weights}", block_size)

    sim.BlockNames = foreign  # type: ignore[misc,assignment]
    main(sys.argv[1:])
