"""SGLang's own flags, from after ``--``, with defaults where the user gives none."""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from p2pdyn.core.types import DECODE, PREFILL
from p2pdyn.engines import side_port
from p2pdyn.engines.base import EngineOptions, EngineUsageError
from p2pdyn.engines.hosted import one_line

log = logging.getLogger(__name__)

CPU_SHIM = "--cpu-shim"
"""Ours: run without a GPU and without SGLang's CPU kernels (:mod:`p2pdyn.engines.sglang.cpu_shim`)."""
PAGE_SIZE = 16
"""Tokens of a KV block. SGLang's own default, 1, would have an event and a hash for each token."""
ROLES = (PREFILL, DECODE)
BACKENDS = {"nixl": "sglang-nixl", "mooncake": "sglang-mooncake"}
"""What moves KV, and how it is called among workers."""
MAX_IPC_PATH = 90
"""Bytes: the kernel takes 107; the rank, or a random name, is appended."""
ROOM_S = 60
"""How long a prefill waits in its room for the decode side. It holds no KV block meanwhile, and the decode side may be
waiting for room in its batch."""
PULL_S = 120
"""How long the decode side waits for blocks, in which the prompt is computed too. What ends it earlier is a prefill
worker that is gone."""
RELEASE_S = 300
"""How long the decode side keeps blocks out of use that a prefill worker may still write into, without a word from it:
it has died, or stands still. SGLang's own default, 30 s, is less than a suspended host sleeps."""
HEARTBEAT_S, MISSED = 2.0, 2
"""The decode side looks after its prefill servers so often, and gives up one that did not answer so many times."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """``server`` is SGLang's ServerArgs. ``publishers`` are the KV events' (events, replay, topic), one a rank, none if
    they are off. ``moves_kv`` as in EngineInfo; ``bootstrap`` is where a prefill's partners come to. ``folder`` is
    ours, for sockets and whatever else SGLang leaves."""

    server: Any
    publishers: tuple[tuple[str, str, str], ...]
    moves_kv: str
    bootstrap: tuple[str, int]
    folder: Path


def environment(options: EngineOptions) -> None:
    """What SGLang and its libraries read from the environment. Call it before SGLang is imported."""
    environ = os.environ
    environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    environ.setdefault("SGLANG_HOST_IP", options.host)
    environ.setdefault("SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT", str(ROOM_S))
    environ.setdefault("SGLANG_DISAGGREGATION_WAITING_TIMEOUT", str(PULL_S))
    environ.setdefault("SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT", str(RELEASE_S))
    environ.setdefault("SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL", str(HEARTBEAT_S))
    environ.setdefault("SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE", str(MISSED))
    if options.offline:
        environ["HF_HUB_OFFLINE"] = environ["TRANSFORMERS_OFFLINE"] = "1"
    if CPU_SHIM in options.args:
        from p2pdyn.engines.sglang import cpu_shim

        cpu_shim.install()


def parse(options: EngineOptions) -> Arguments:
    """Read ``options.args`` as SGLang does. Raises EngineUsageError with a sentence."""
    if not options.model:
        raise EngineUsageError("the sglang engine needs --model: a folder in Hugging Face's layout, or a name there")
    try:
        from sglang.srt.server_args import ServerArgs
    except ImportError as error:
        raise EngineUsageError(
            f"SGLang cannot be imported here ({one_line(error)}): install its kernels for this host's GPUs, or add "
            f"{CPU_SHIM} after -- to try a small model without one"
        ) from error
    parser = _Parser(prog="sglang", add_help=False, allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    folder = _folder(options.data_dir)
    given = [arg for arg in options.args if arg != CPU_SHIM]
    bootstrap = _bootstrap(options, _names(given))
    try:
        parsed = parser.parse_args([*_defaults(options, bootstrap[1]), *given])
        publishers = _publish(parsed, folder)
        server = ServerArgs.from_cli_args(parsed)
    except EngineUsageError:
        raise
    except (Exception, SystemExit) as error:
        raise EngineUsageError(f"SGLang does not take the arguments after --: {one_line(error)}") from error
    if options.role in ROLES:
        bootstrap = parsed.host, parsed.disaggregation_bootstrap_port
    moves_kv = _moves_kv(parsed)
    return Arguments(server, publishers, moves_kv, bootstrap, folder)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise EngineUsageError(f"SGLang does not take the arguments after --: {message}")


def _names(args: Sequence[str]) -> set[str]:
    return {arg.partition("=")[0].replace("_", "-") for arg in args if arg.startswith("--")}


def _defaults(options: EngineOptions, bootstrap_port: int) -> list[str]:
    """Those flags that the user did not give. What is given twice counts the second time, but some exclude others."""
    given = _names(options.args)
    events = {"publisher": "zmq", "buffer_steps": 10_000}
    flags: dict[str, tuple[str, ...]] = {
        "--model-path": (str(options.model),),
        "--page-size": (str(PAGE_SIZE),),
        "--incremental-streaming-output": (),
        "--log-level": ("warning",),
        "--host": (options.host,),
        "--kv-events-config": (json.dumps(events),),
    }
    if CPU_SHIM in given:
        flags |= {
            "--device": ("cpu",),
            "--attention-backend": ("torch_native",),
            "--disable-cuda-graph": (),
            "--disable-overlap-schedule": (),
            "--mem-fraction-static": ("0.1",),
            "--sleep-on-idle": (),  # else an idle scheduler keeps a core busy, which others compute on here
        }
    if options.role in ROLES:
        flags |= {
            "--disaggregation-mode": (options.role,),
            "--disaggregation-transfer-backend": ("nixl",),
            "--disaggregation-bootstrap-port": (str(bootstrap_port),),
        }
        if options.role == DECODE and CPU_SHIM in given:
            flags["--disaggregation-decode-retraction-backup"] = ("none",)  # the others pin host memory for CUDA
    same = {"--model-path": "--model"}
    wanted = {name: values for name, values in flags.items() if not given & {name, same.get(name, name)}}
    if "--disable-radix-cache" in given:
        wanted.pop("--kv-events-config", None)
    return [part for name, values in wanted.items() for part in (name, *values)]


def _folder(data_dir: Path) -> Path:
    """A folder that only this user can enter, emptied, with a path short enough for sockets."""
    folder = (data_dir / "sglang").absolute()
    if len(os.fsencode(folder)) > MAX_IPC_PATH - 20:
        folder = Path(tempfile.mkdtemp(prefix="p2pdyn-sglang-"))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for old in folder.iterdir():
        if not old.is_dir():
            old.unlink()
    tempfile.tempdir = str(folder)  # SGLang makes its sockets as temporary files, and leaves them
    return folder


# ---- KV events


def _publish(parsed: argparse.Namespace, folder: Path) -> tuple[tuple[str, str, str], ...]:
    """Have KV events published on sockets in ``folder``, whatever endpoint was asked for: they carry prompts. SGLang
    gives each rank a socket of its own only if the endpoint looks like tcp with a port; hence the names."""
    text = parsed.kv_events_config
    if not text:
        return ()
    try:
        config = json.loads(text)
        publisher = config.get("publisher")
    except (ValueError, AttributeError) as error:
        raise EngineUsageError("--kv-events-config takes a JSON object, as SGLang documents it") from error
    if publisher != "zmq":
        return ()
    config |= {"endpoint": f"ipc://{folder}/events.tcp:1", "replay_endpoint": f"ipc://{folder}/replay.tcp:1"}
    config.pop("bind", None)
    if config.get("format", "default") != "default":
        raise EngineUsageError('--kv-events-config takes no "format" here: p2pdyn reads SGLang\'s own')
    parsed.kv_events_config = json.dumps(config)
    topic = str(config.get("topic", ""))
    ranks = range(parsed.data_parallel_size if hasattr(parsed, "data_parallel_size") else parsed.dp_size)
    return tuple((f"ipc://{folder}/events.tcp:{1 + n}", f"ipc://{folder}/replay.tcp:{1 + n}", topic) for n in ranks)


# ---- prefill and decode


def _bootstrap(options: EngineOptions, given: set[str]) -> tuple[str, int]:
    """Where a prefill worker's bootstrap server listens."""
    if options.role != PREFILL or "--disaggregation-bootstrap-port" in given:
        return options.host, 0
    return options.host, side_port.choose(options.host, options.side_port, 1, "SGLang's bootstrap server")


def _moves_kv(parsed: argparse.Namespace) -> str:
    """Its own name for each backend and version: SGLang's two sides talk to their like."""
    if parsed.disaggregation_mode not in ROLES:
        return ""
    from sglang.version import __version__

    _look_for_late_release()
    backend = parsed.disaggregation_transfer_backend
    return f"{BACKENDS.get(backend, f'sglang-{backend}')}-{__version__}"[:63] + "!"


def _look_for_late_release() -> None:
    """Older versions give blocks back at once when a pull is given up."""
    from sglang.srt.environ import envs

    if not hasattr(envs, "SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE"):
        log.warning(
            "this version of SGLang uses KV blocks again while an abandoned transfer may still write into them: "
            "answers may be wrong after aborted requests; use 0.5.23 for prefill and decode apart"
        )
