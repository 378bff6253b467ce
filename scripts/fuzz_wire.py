"""Fuzz the wire decoder: python scripts/fuzz_wire.py [SECONDS] [SEED]

Mutates real messages of every kind (cut, splice, flip, repeat, odd msgpack heads) and feeds them, and plain noise, to
every decoder.  Anything but WireError, an accepted value that does not encode again, or an input that takes over a
second of CPU stops it with the input in hex.  With atheris installed, `python scripts/fuzz_wire.py --atheris ...`
drives the same target by coverage, with libFuzzer's options.
"""

from __future__ import annotations

import random
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from hypothesis import HealthCheck, Phase, given, seed, settings
from support import messages

from p2pdyn.core.kvindex import KvIndex
from p2pdyn.core.kvtarget import TargetBlocks
from p2pdyn.wire.codec import (
    WireError,
    decode,
    decode_info,
    decode_logprobs,
    decode_params,
    encode,
    encode_info,
    encode_params,
)
from p2pdyn.wire.events import KvBatch
from p2pdyn.wire.kvbatch import batch_tag
from p2pdyn.wire.kvpack import DEVICE, REMOVED, STORED, Op, pack_ops

SLOW_S = 1.0
ODD = [bytes([head]) for head in (*range(0x80, 0xA0), *range(0xC0, 0xE0), 0xFF)]
ODD += [
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\x00\xff\xff\xff",
    b"\xca\x7f\xc0\0\0",
]

WORKER, EPOCH = "0123456789abcdef", 7
HELD = TargetBlocks(KvIndex(), 0, 2**16)
HELD.tag = batch_tag(WORKER, EPOCH, 0)


def take(data: bytes) -> None:
    """The short way of KV batches, which decodes nothing: what it takes must decode to the stream's next batch."""
    if not HELD.take(data):
        raise WireError("not for the short way")
    HELD.seq = 0
    batch = decode("events", data)
    if not isinstance(batch, KvBatch) or batch[:4] != (WORKER, EPOCH, 0, 1):
        raise AssertionError(f"taken, but it is {batch}")


LINKS = ("control", "requests", "events")
TARGETS: list[Callable[[bytes], object]] = [
    *((lambda data, link=link: encode(decode(link, data))) for link in LINKS),
    lambda data: encode_info(decode_info(data)),
    lambda data: encode_params(decode_params(data)),
    decode_logprobs,
    take,
]


def check(data: bytes) -> int:
    """Feed one input to every decoder; how many accepted it."""
    accepted = 0
    for target in TARGETS:
        try:
            target(data)
        except WireError:
            continue
        accepted += 1
    return accepted


def corpus(start: int, count: int = 400) -> list[bytes]:
    """Real messages to mutate, from the schema."""
    found: list[bytes] = []

    @seed(start)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(messages.messages, messages.infos, messages.params)
    def collect(sent: tuple[str, object], info: object, params: object) -> None:
        found.extend((encode(sent[1]), encode_info(info), encode_params(params)))  # type: ignore[arg-type]

    collect()
    rng = random.Random(start)
    for blocks in range(100):
        changes = [Op(kind, DEVICE, array("Q", range(rng.randrange(1 + blocks)))) for kind in (REMOVED, STORED)]
        found.append(encode(KvBatch(WORKER, EPOCH, 0, 1, pack_ops([op for op in changes if op.hashes]))))
    return found


def mutate(rng: random.Random, seeds: list[bytes]) -> bytes:
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(7):
            case 0:
                del data[at:]
            case 1:
                data[at:at] = rng.choice(ODD)
            case 2 if at < len(data):
                data[at] = rng.randrange(256)
            case 3 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 4:
                other = rng.choice(seeds)
                data[at:] = other[rng.randrange(len(other) + 1) :]
            case 5:
                data[at:at] = data[at : at + 16] * rng.randint(1, 200)
            case _:
                data[at:at] = rng.randbytes(rng.randint(1, 12))
    return bytes(data)


def main(seconds: float, start: int) -> int:
    rng, seeds, counts = random.Random(start), corpus(start), Counter[str]()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = mutate(rng, seeds)
        began = time.process_time()
        try:
            accepted = check(data)
        except Exception as error:
            print(f"{type(error).__name__}: {error}\ninput {data.hex()}", file=sys.stderr)
            raise
        if time.process_time() - began > SLOW_S:
            print(f"slow: {time.process_time() - began:.1f} s\ninput {data[:2000].hex()}", file=sys.stderr)
            return 1
        counts["accepted" if accepted else "refused"] += 1
        if accepted and len(seeds) < 20_000:
            seeds.append(data[:4096])
    print(f"seed {start}: {counts.total()} inputs in {seconds:g} s, {counts['accepted']} accepted, no crash")
    return 0


def atheris_main() -> None:
    import atheris  # type: ignore[import-not-found]

    atheris.instrument_all()
    atheris.Setup([sys.argv[0], *sys.argv[2:]], check)
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--atheris"]:
        atheris_main()
    else:
        arguments = sys.argv[1:]
        seconds = float(arguments[0]) if arguments else 60.0
        sys.exit(main(seconds, int(arguments[1]) if len(arguments) > 1 else random.randrange(2**32)))
