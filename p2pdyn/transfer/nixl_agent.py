"""NIXL's bindings as we use them: one agent with the UCX backend, host memory, READs of descriptor lists.

The bindings are used directly, not ``nixl_agent`` of NIXL's Python API: that one leaves the progress thread's pause at
0, and then it spins on a core for as long as the process lives.  An agent belongs to one thread.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from p2pdyn.constants import UCX_PORTS
from p2pdyn.transfer.base import Region, TransferError

PAUSE_US = 10_000
"""Longest sleep of the progress thread, which sockets wake. It matters while connections are set up."""

DEFAULTS = {
    "NIXL_LOG_LEVEL": "FATAL",  # each poll of a broken transfer is a line otherwise; its errors reach us anyway
    "UCX_LOG_LEVEL": "fatal",
    "UCX_TCP_PORT_RANGE": UCX_PORTS,
}
"""Environment that UCX and NIXL read, where the user has not set it."""

Descriptors = Any
"""A numpy array of n rows (address, bytes, 0), uint64."""

DONE, UNDERWAY = "DONE", "UNDERWAY"


class Agent:
    """Raises TransferError everywhere. ``name`` is known to peers; ``devices`` are the network devices that UCX may
    use, none: all."""

    def __init__(self, name: str, devices: Sequence[str] = ()) -> None:
        for key, value in DEFAULTS.items():
            os.environ.setdefault(key, value)
        if devices:
            os.environ.setdefault("UCX_NET_DEVICES", ",".join(devices))
        self._nixl = nixl = _bindings()
        config = nixl.nixlAgentConfig()
        config.useProgThread, config.useListenThread = True, False
        config.pthrDelay = PAUSE_US
        config.syncMode = nixl.NIXL_THREAD_SYNC_NONE
        try:
            self._agent = nixl.nixlAgent(name, config)
            self._backend = [self._agent.createBackend("UCX", {})]
        except Exception as error:
            raise TransferError(f"NIXL cannot start its UCX backend ({_kind(error)})") from None
        self._keep: list[memoryview] = []

    def register(self, regions: Sequence[Region]) -> list[int]:
        """Let peers read these, and read into them. Their addresses."""
        bases = [address_of(region.memory) for region in regions]
        rows = [(base, len(region.memory), 0, "") for base, region in zip(bases, regions, strict=True)]
        try:
            self._agent.registerMem(self._nixl.nixlRegDList(self._nixl.DRAM_SEG, rows), self._backend)
        except Exception as error:
            raise TransferError(f"NIXL cannot register KV memory ({_kind(error)}): raise `ulimit -l`") from None
        self._keep += [region.memory for region in regions]
        return bases

    def metadata(self) -> bytes:
        return bytes(self._agent.getLocalMD())

    def load(self, peer: str, metadata: bytes) -> None:
        """Take up a peer's metadata, which must name it. 10 to 50 ms."""
        try:
            named = self._agent.loadRemoteMD(metadata).decode(errors="replace")
        except Exception as error:
            raise TransferError(f"NIXL does not take its agent's description ({_kind(error)})") from None
        if named != peer:
            self.unload(named)
            raise TransferError("its NIXL agent has another name than the peer")

    def unload(self, peer: str) -> None:
        """Only while no read from this peer is under way: NIXL tells nothing of those then, and they go on writing."""
        try:
            self._agent.invalidateRemoteMD(peer)
        except Exception:  # it never was there
            return

    def prepare(self, peer: str, rows: Descriptors) -> int:
        """A list of descriptors at ``peer``, "" for this process, that reads can name by their indices. 0.3 us and some
        100 bytes a row, until :meth:`forget`."""
        descriptors = self._nixl.nixlXferDList(self._nixl.DRAM_SEG, rows)
        try:
            return int(self._agent.prepXferDlist(peer, descriptors, self._backend))
        except Exception as error:
            raise TransferError(f"NIXL cannot prepare to read ({_kind(error)})") from None

    def forget(self, prepared: int) -> None:
        """Only while no read that names it is under way."""
        self._agent.releasedDlistH(prepared)

    def begin(self, peer: str, local: Descriptors, remote: Descriptors) -> tuple[int, bool]:
        """Post a READ; (its handle, is it over). Between processes of one host it is over when this returns."""
        nixl = self._nixl
        try:
            here, there = nixl.nixlXferDList(nixl.DRAM_SEG, local), nixl.nixlXferDList(nixl.DRAM_SEG, remote)
            handle = int(self._agent.createXferReq(nixl.NIXL_READ, here, there, peer, "", self._backend))
        except Exception as error:
            raise TransferError(_sentence(error)) from None
        return self._post(handle)

    def begin_prepared(self, here: int, local: Sequence[int], there: int, remote: Sequence[int]) -> tuple[int, bool]:
        """The same for rows ``remote[i]`` -> ``local[i]`` of two prepared lists."""
        try:
            handle = int(self._agent.makeXferReq(self._nixl.NIXL_READ, here, local, there, remote, "", self._backend))
        except Exception as error:
            raise TransferError(_sentence(error)) from None
        return self._post(handle)

    def _post(self, handle: int) -> tuple[int, bool]:
        try:
            return handle, self._agent.postXferReq(handle, "") == self._nixl.NIXL_SUCCESS
        except Exception as error:
            self.release(handle)
            raise TransferError(_sentence(error)) from None

    def state(self, handle: int) -> str:
        """DONE or UNDERWAY; TransferError: it failed, and is over."""
        try:
            return UNDERWAY if self._agent.getXferStatus(handle) == self._nixl.NIXL_IN_PROG else DONE
        except Exception as error:
            raise TransferError(_sentence(error)) from None

    def release(self, handle: int) -> None:
        """Of a read that is over. One that is not would go on writing, unseen."""
        self._agent.releaseXferReq(handle)

    def close(self) -> None:
        """Ends its threads and connections, and whatever was under way."""
        self._agent = None
        self._keep.clear()


def address_of(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


@cache
def has_rdma() -> bool:
    """Has this host a device with which UCX reads remote memory without the other process's help?"""
    return any(Path("/sys/class/infiniband").glob("*"))


@cache
def machine() -> int:
    """Processes with the same number can read each other's memory, if the kernel lets them: same boot, same PIDs."""
    from hashlib import blake2b

    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return 0
    return int.from_bytes(blake2b(boot.encode(), digest_size=8).digest())


def _bindings() -> Any:
    try:
        import nixl  # noqa: F401  # chooses between the builds for CUDA 12 and 13
        from nixl import _bindings as bindings
    except ImportError as error:
        raise TransferError(f"NIXL cannot be loaded: {error}") from None
    return bindings


def _kind(error: Exception) -> str:
    return str(error).strip() or type(error).__name__


def _sentence(error: Exception) -> str:
    kind = _kind(error)
    if "DISCONNECT" in kind:
        return "the connection to the peer broke"
    return f"NIXL could not read ({kind})"
