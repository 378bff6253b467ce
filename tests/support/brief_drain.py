"""`p2pdyn`, but a drain's deadlines come sooner: ``brief_drain.py FINISH_S LIMIT_S ARGUMENTS...``"""

from __future__ import annotations

import sys

from p2pdyn.cli.main import main
from p2pdyn.core import drain

if __name__ == "__main__":
    finish, limit, *arguments = sys.argv[1:]
    drain.FINISH_S, drain.LIMIT_S = float(finish), float(limit)
    main(arguments)
