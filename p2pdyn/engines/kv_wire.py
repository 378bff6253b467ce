"""KV events as vLLM, SGLang and TensorRT-LLM publish them: one message's bytes to our :data:`KvEvent`.

A message is the frames ``topic, seq (8 bytes, big-endian), payload``; the payload is msgpack, ``[timestamp, events,
data-parallel rank]`` or a map of the same.  An event is a map with ``type`` (vLLM now, SGLang from 0.5.20) or an
array that begins with it (before then); fields that are not known here are ignored.  Read against the classes of
vLLM 0.10.2, 0.26.0 and 0.32.0 and of SGLang 0.5.18 and 0.5.23.

What cannot be used is dropped and counted, so that what comes out is a lower bound of the cache: a frontend that
misses a block loses a hit; one that believes in a block that is gone sends a request to the wrong worker.  Therefore a
removal that cannot be read clears everything instead.

*Blocks.*  The engine's ids are opaque; of the ids in bytes the last eight count, as in vLLM's own integers.
*Groups.*  A model with several kinds of attention tells each block once a group.  Only the first group of full
attention counts, for each tier: without it no prefix can be reused.
*Salt.*  From ``cache_salt`` (SGLang), or the one string in the extra keys of a sequence's first block (vLLM; older ones
than 0.10.3 tell none, and their salted blocks look unsalted).  Blocks with images or embeddings in their keys are
dropped: token ids do not tell them apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack

from p2pdyn.engines.base import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent

MAX_PAYLOAD = 64 * 2**20
"""Bytes of one message: a step that stores ten million tokens."""
END_SEQ = -1
"""The seq of the message that ends a replay."""

_U64 = 2**64 - 1
_MAX_ID = 64
"""Bytes of a block's id: the longest digest in use."""

_STORED = (
    "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name", "extra_keys",
    "group_idx", "kv_cache_spec_kind", "kv_cache_spec_sliding_window", "locality",
)  # fmt: skip
_REMOVED = ("block_hashes", "medium", "group_idx", "locality")

_TIERS = {
    "GPU": 0, "DEVICE": 0,
    "CPU": 1, "CPU_PINNED": 1, "CPU_TIER1": 1,
    "DISK": 2, "NVME": 2, "STORAGE": 2, "FS": 2, "CPU_TIER2": 2,
}  # fmt: skip
_FULL_ATTENTION = frozenset({"full_attention", "mla_attention", "sink_full_attention"})

DROPPED = {
    "unreadable": "a message of the engine could not be read; its blocks are forgotten",
    "type": "the engine tells events of a type that is not known here",
    "malformed": "the engine told blocks without ids, or with ids of a wrong type",
    "tokens": "the engine told blocks without their token ids",
    "block-size": "the engine told blocks of another size than its own",
    "tier": "the engine tells of a storage tier that is shared or not known here",
    "group": "blocks of another group than the first one of full attention",
    "lora": "the engine told blocks of an adapter without its name",
    "keys": "blocks with images or embeddings cannot be told apart by their token ids",
}
"""Why events, or parts of them, were dropped."""


@dataclass(slots=True)
class Batch:
    """One message's events. ``complete``: True when the engine cleared its whole cache, so that from here on all is
    known; False when something could not be read that may have removed blocks (a BlocksCleared stands in its place)."""

    rank: int | None = None
    events: list[KvEvent] = field(default_factory=list)
    complete: bool | None = None


class _Drop(Exception):
    """Carries the key in DROPPED."""


def split(frames: Sequence[bytes]) -> tuple[int, bytes] | None:
    """(seq, payload) of a live message (topic, seq, payload) or of a replay's answer, which has an empty frame first
    and in older engines no topic. None for anything else."""
    if not 2 <= len(frames) <= 4 or len(frames[-2]) != 8:
        return None
    seq = int.from_bytes(frames[-2], "big", signed=True)
    return (seq, frames[-1]) if seq >= END_SEQ else None


class Decoder:
    """Decodes one publisher's payloads in their order. ``block_size`` is the engine's, in tokens."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.dropped: Counter[str] = Counter()
        """How often each key of DROPPED happened."""
        self.error = ""
        """A sentence while the engine tells blocks of another size only; nothing is known then."""
        self._groups: dict[int, int] = {}
        self._seen_size = False

    def decode(self, payload: bytes) -> Batch:
        """Never raises; what cannot be read is counted in ``dropped``."""
        batch = Batch()
        try:
            batch.rank, events = _open(payload)
        except _Drop:
            self.dropped["unreadable"] += 1
            batch.events.append(BlocksCleared())
            batch.complete = False
            return batch
        for event in events:
            self._event(event, batch)
        return batch

    def _event(self, event: Any, batch: Batch) -> None:
        tag = event[0] if isinstance(event, list) and event else event.get("type") if isinstance(event, dict) else None
        try:
            if tag == "BlockStored":
                batch.events.append(self._stored(_fields(event, _STORED)))
            elif tag == "BlockRemoved":
                batch.events.append(self._removed(_fields(event, _REMOVED)))
            elif tag == "AllBlocksCleared":
                batch.events.append(BlocksCleared())
                batch.complete = True
            else:
                raise _Drop("type")
        except _Drop as drop:
            reason = str(drop)
            self.dropped[reason] += 1
            if tag == "BlockRemoved" and reason == "malformed":
                batch.events.append(BlocksCleared())
                batch.complete = False

    def _stored(self, fields: dict[str, Any]) -> BlocksStored:
        tier = self._tier(fields, stored=True)
        hashes, parent = _ids(fields.get("block_hashes")), fields.get("parent_block_hash")
        if parent is not None:
            (parent,) = _ids([parent])
        tokens = self._tokens(fields, len(hashes))
        lora = fields.get("lora_name") or ""
        if not isinstance(lora, str):
            raise _Drop("malformed")
        if not lora and fields.get("lora_id") is not None:
            raise _Drop("lora")
        salt, usable = _keys(fields.get("extra_keys"), len(hashes), lora, parent is None)
        if usable < len(hashes):
            if not usable:
                raise _Drop("keys")
            self.dropped["keys"] += 1
            hashes, tokens = hashes[:usable], tokens[: usable * self.block_size]
        own = fields.get("cache_salt")
        return BlocksStored(hashes, parent, tokens, own if isinstance(own, str) else salt, lora, tier)

    def _removed(self, fields: dict[str, Any]) -> BlocksRemoved:
        tier = self._tier(fields, stored=False)
        return BlocksRemoved(_ids(fields.get("block_hashes")), tier)

    def _tier(self, fields: dict[str, Any], *, stored: bool) -> int:
        """The tier of a block that counts. Raises _Drop for other tiers, and for other groups than the tier's first
        one of full attention (which older engines do not name: group 0)."""
        medium = fields.get("medium")
        tier = 0 if medium is None else _TIERS.get(medium.upper()) if isinstance(medium, str) else None
        if tier is None or fields.get("locality") == "REMOTE":
            raise _Drop("tier")
        group = fields.get("group_idx")
        if group is None:
            return tier
        if stored and tier not in self._groups:
            kind = fields.get("kv_cache_spec_kind")
            main = group == 0 if kind is None else isinstance(kind, str) and kind in _FULL_ATTENTION
            if main and type(group) is int:
                self._groups[tier] = group
        if self._groups.get(tier) != group:
            raise _Drop("group")
        return tier

    def _tokens(self, fields: dict[str, Any], blocks: int) -> tuple[int, ...]:
        tokens, size = fields.get("token_ids"), fields.get("block_size")
        if not isinstance(tokens, list) or type(size) is not int or size < 1 or len(tokens) != size * blocks:
            raise _Drop("tokens")
        if size != self.block_size:  # vLLM also tells the part of a block that a shorter prompt filled
            if not self._seen_size:
                self.error = (
                    f"the engine's KV events have blocks of {size} tokens, its configuration says {self.block_size}: "
                    f"give the engine --block-size (SGLang: --page-size) {self.block_size}"
                )
            raise _Drop("block-size")
        self._seen_size, self.error = True, ""
        if list in set(map(type, tokens)):  # speculative decoding in SGLang pairs each token with the next
            tokens = [pair[0] if isinstance(pair, list) and len(pair) == 2 else None for pair in tokens]
        if set(map(type, tokens)) != {int} or min(tokens) < 0 or max(tokens) > 2**32 - 1:
            raise _Drop("tokens")
        return tuple(tokens)


def _open(payload: bytes) -> tuple[int | None, list[Any]]:
    """The rank and the events of a payload. Raises _Drop."""
    try:
        if len(payload) > MAX_PAYLOAD:
            raise _Drop("unreadable")
        content = msgpack.unpackb(payload, strict_map_key=False)
    except Exception:  # msgpack raises several unrelated classes
        raise _Drop("unreadable") from None
    if isinstance(content, dict):
        events, rank = content.get("events"), content.get("data_parallel_rank")
    elif isinstance(content, list) and len(content) >= 2:
        events, rank = content[1], content[2] if len(content) > 2 else None
    else:
        raise _Drop("unreadable")
    if not isinstance(events, list) or not (rank is None or type(rank) is int):
        raise _Drop("unreadable")
    return rank, events


def _fields(event: list[Any] | dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    if isinstance(event, dict):
        return event
    fields = dict(zip(names, event[1:], strict=False))
    extra = fields.get("lora_name")
    if isinstance(extra, dict):  # SGLang until 0.5.18 puts the salt here
        fields["lora_name"], fields["cache_salt"] = None, extra.get("cache_salt")
    return fields


def _ids(ids: Any) -> tuple[int, ...]:
    """Block ids as u64. Raises _Drop."""
    if not isinstance(ids, list) or not ids:
        raise _Drop("malformed")
    kinds = set(map(type, ids))
    if kinds == {int}:
        return tuple([one & _U64 for one in ids])
    if kinds == {bytes} and all(0 < len(one) <= _MAX_ID for one in ids):
        return tuple([int.from_bytes(one[-8:], "big") for one in ids])
    raise _Drop("malformed")


def _keys(keys: Any, blocks: int, lora: str, first: bool) -> tuple[str, int]:
    """(salt, how many of the event's blocks have no keys but the adapter's name and the salt). Raises _Drop."""
    if keys is None:
        return "", blocks
    if not isinstance(keys, list) or len(keys) != blocks:
        raise _Drop("malformed")
    salt = ""
    for index, own in enumerate(keys):
        if not own:
            continue
        if not isinstance(own, list):
            raise _Drop("malformed")
        rest = own[1:] if lora and own[0] == lora else own
        if index == 0 and first and len(rest) == 1 and isinstance(rest[0], str):
            salt = rest[0]
        elif rest:
            return salt, index
    return salt, blocks
