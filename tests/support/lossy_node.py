"""`p2pdyn`, but its event link loses a share of its messages between SIGUSR1 and SIGUSR2: ``python lossy_node.py SHARE
ARGUMENTS...``."""

from __future__ import annotations

import random
import signal
import sys
from collections.abc import Sequence
from typing import Any

from p2pdyn.cli.main import main
from p2pdyn.net.sockets import Sockets

losing = False


def switch(number: int, frame: object) -> None:
    global losing
    losing = number == signal.SIGUSR1


def lossy(share: float) -> None:
    xpub = Sockets.xpub

    def made(self: Sockets, *args: Any, **more: Any) -> Any:
        link = xpub(self, *args, **more)
        send = link.send

        def sometimes(frames: Sequence[bytes]) -> bool:
            return (losing and random.random() < share) or send(frames)

        link.send = sometimes  # type: ignore[method-assign]
        return link

    Sockets.xpub = made  # type: ignore[method-assign]


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, switch)
    signal.signal(signal.SIGUSR2, switch)
    lossy(float(sys.argv[1]))
    main(sys.argv[2:])
