"""A dispatch as the worker gets it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from p2pdyn.core.flight_parts import Dispatch, Transfer
from p2pdyn.core.types import NodeId
from p2pdyn.wire.codec import encode, encode_params
from p2pdyn.wire.requests import Generate


def generate(action: Dispatch, epoch: int, epoch_of: Callable[[NodeId], int]) -> bytes:
    """The encoded Generate for a worker of ``epoch``; ``epoch_of`` gives that of another live peer, or 0."""
    job = action.job
    message = Generate(
        action.rid,
        action.attempt,
        epoch,
        job.model,
        len(job.tokens),
        action.tokens.tobytes(),
        encode_params(job.params),
        job.whole,
        job.traceparent,
        action.rank,
        action.uncached,
    )
    if action.hand_over or action.transfer is not None:
        message = _with_transfer(message, action.hand_over, action.transfer, epoch_of)
    return encode(message)


def _with_transfer(
    message: Generate, hand_over: bool, transfer: Transfer | None, epoch_of: Callable[[NodeId], int]
) -> Generate:
    message = replace(message, hand_over=hand_over)
    if transfer is None:
        return message
    source, epoch, lease, blocks, remote = transfer
    epoch = epoch or epoch_of(source)
    if not epoch:
        return message
    return replace(message, source=source, source_epoch=epoch, lease=lease, pull=blocks, remote=remote)
