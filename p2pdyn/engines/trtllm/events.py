"""TensorRT-LLM's KV events, as they are polled from it, to our :data:`KvEvent`.

Events are numbered without a hole.  TensorRT-LLM drops the oldest ones when its buffer is full, tells nobody, and has
no replay and no snapshot: after a gap a removal may be among the lost, so all is forgotten, and blocks told from there
on count.  Whatever is used is a lower bound of the cache:

*Windows.*  A model with sliding windows tells each block once a window. Only the widest one, that of global attention,
counts: without its blocks no prefix can be reused.
*Partial blocks* are told, too; they are left out, with what lies behind them.
*Tiers.*  Cache level 0 is the device, 1 the host, those behind it disks. A block that moves is told without its tokens,
so these are kept here where there is more than one level.
*Salt and adapter* are told from 1.3 on. In what 1.2 tells, salted blocks and those of adapters look like others: a
frontend may expect a hit that does not come.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from p2pdyn.engines.base import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent

LOST = (
    "{} KV events were lost, as TensorRT-LLM's buffer holds only the last ones: blocks cached before are unknown until "
    "it stores them again; a larger --kv-cache-config.event-buffer-max-size helps"
)
UNREADABLE = "a KV event of TensorRT-LLM could not be read: blocks cached before are unknown until it stores them again"

_U64 = 2**64 - 1
_TIERS = 3


@dataclass(slots=True)
class _Block:
    tier: int
    parent: int | None
    tokens: array[int]
    """Empty where blocks cannot move."""
    salt: str
    lora: str


class _Unreadable(Exception):
    pass


class Events:
    """One engine's events. ``loras`` are adapters' names by TensorRT-LLM's number. ``dropped`` counts what was left
    out, by why. ``problems`` are for the log; the caller empties them."""

    def __init__(self, block_size: int, loras: Mapping[int, str] | None = None) -> None:
        self.dropped: Counter[str] = Counter()
        self.problems: list[str] = []
        self.capacity = 0
        """Blocks on the device, once it was told."""
        self._size = block_size
        self._loras = dict(loras or {})
        self._next: int | None = None
        self._window = -1
        self._movable = False
        self._known: dict[int, _Block] = {}

    def __len__(self) -> int:
        """Blocks known."""
        return len(self._known)

    def read(self, raw: Iterable[Mapping[str, Any]]) -> list[KvEvent]:
        """These are the next events; ours, in order."""
        told: list[KvEvent] = []
        for event in raw:
            try:
                told += self._read(event)
            except (_Unreadable, KeyError, TypeError, ValueError, OverflowError):
                self.problems.append(UNREADABLE)
                told += self.forget()
        return told

    def forget(self) -> list[KvEvent]:
        """Nothing is known any more."""
        known = bool(self._known)
        self._known.clear()
        return [BlocksCleared()] if known else []

    def _read(self, event: Mapping[str, Any]) -> list[KvEvent]:
        told = self._follow(int(event["event_id"]))
        data = event["data"]
        kind, window = data["type"], event.get("window_size")
        if kind == "created":
            self._created(data["num_blocks_per_cache_level"], window)
            return told
        if window is not None and window != self._window:
            if window < self._window:
                self.dropped["window"] += 1
                return told
            told += self.forget()  # its creation was lost
            self._window = window
        match kind:
            case "stored":
                return told + self._stored(data)
            case "removed":
                return told + self._removed([_id(one) for one in data["block_hashes"]])
            case "updated":
                return told + self._updated(_id(data["block_hash"]), data.get("cache_level"))
        self.dropped["type"] += 1
        return told

    def _follow(self, number: int) -> list[KvEvent]:
        """Count; a number that is not the next one means that events are lost, or that another engine counts."""
        expected, self._next = self._next, number + 1
        if number == expected or (expected is None and number == 0):
            return []
        self.problems.append(LOST.format(max(1, number - (expected or 0))))
        return self.forget()

    def _created(self, blocks: Sequence[int], window: int | None) -> None:
        if window is None or window > self._window:
            self._window = -1 if window is None else window
            self.capacity = int(blocks[0])
            self._movable = any(blocks[1:])

    # ---- stored

    def _stored(self, data: Mapping[str, Any]) -> list[KvEvent]:
        parent = None if data["parent_hash"] is None else _id(data["parent_hash"])
        if parent is not None and parent not in self._known:
            self.dropped["parent"] += len(data["blocks"])
            return []
        told: list[KvEvent] = []
        run: list[tuple[int, _Block]] = []
        for block in data["blocks"]:
            read = self._block(block, data, parent)
            if read is None:  # nothing behind it can be named
                break
            name, here = read
            known = self._known.get(name)
            if (known is not None and known.tier == here.tier) or (run and not _alike(run[-1][1], here)):
                told += self._tell(run)
                run = []
            if known is None or known.tier != here.tier:
                run.append((name, here))
            parent = name
        return told + self._tell(run)

    def _block(
        self, block: Mapping[str, Any], data: Mapping[str, Any], parent: int | None
    ) -> tuple[int, _Block] | None:
        tokens = block["tokens"]
        if len(tokens) != self._size:
            if len(tokens) > self._size:
                raise _Unreadable
            self.dropped["partial"] += 1
            return None
        ids = [token["token_id"] for token in tokens]
        if block.get("mm_keys") or any(token.get("token_extra_id") for token in tokens) or set(map(type, ids)) != {int}:
            self.dropped["keys"] += 1  # images, embeddings: token ids do not tell them apart
            return None
        lora = data.get("lora_name") or block.get("lora_name") or ""
        number = block.get("lora_id", data.get("lora_id"))
        if not lora and number:
            lora = self._loras.get(number, "")
            if not lora:
                self.dropped["lora"] += 1
                return None
        salt = block.get("cache_salt") or data.get("cache_salt") or ""
        tier = min(int(block.get("cache_level") or 0), _TIERS - 1)
        return _id(block["block_hash"]), _Block(tier, parent, array("I", ids), str(salt), str(lora))

    def _tell(self, run: list[tuple[int, _Block]]) -> list[KvEvent]:
        """One event for blocks that lie behind each other; a block that was elsewhere is there no more."""
        if not run:
            return []
        first = run[0][1]
        tokens = tuple(token for _, block in run for token in block.tokens)
        names = tuple(name for name, _ in run)
        told: list[KvEvent] = [BlocksStored(names, first.parent, tokens, first.salt, first.lora, first.tier)]
        for name, block in run:
            known = self._known.get(name)
            if known is not None:
                told.append(BlocksRemoved((name,), known.tier))
            if not self._movable:
                block.tokens = array("I")
            self._known[name] = block
        return told

    # ---- removed, moved

    def _removed(self, names: list[int]) -> list[KvEvent]:
        gone: dict[int, list[int]] = {}
        for name in names:
            known = self._known.pop(name, None)  # those of partial blocks are not known
            if known is not None:
                gone.setdefault(known.tier, []).append(name)
        return [BlocksRemoved(tuple(blocks), tier) for tier, blocks in gone.items()]

    def _updated(self, name: int, level: Mapping[str, Any] | None) -> list[KvEvent]:
        known = self._known.get(name)
        if level is None or level.get("new_value") is None or known is None:
            return []  # its priority, or a block that we left out
        tier = min(int(level["new_value"]), _TIERS - 1)
        if tier == known.tier:
            return []
        if not known.tokens or (known.parent is not None and known.parent not in self._known):
            return self._removed([name])
        return self._tell([(name, _Block(tier, known.parent, known.tokens, known.salt, known.lora))])


def _alike(one: _Block, other: _Block) -> bool:
    return (one.tier, one.salt, one.lora) == (other.tier, other.salt, other.lora)


def _id(name: Any) -> int:
    """Block ids are u64; those of its second cache manager may be hexadecimal digests. Raises _Unreadable."""
    if type(name) is int:
        return name & _U64
    if isinstance(name, str) and len(name) >= 16:
        return int(name[-16:], 16)
    raise _Unreadable
