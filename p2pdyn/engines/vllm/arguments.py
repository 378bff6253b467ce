"""vLLM's own flags, from after ``--``, with defaults where the user gives none."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from p2pdyn.engines import side_port
from p2pdyn.engines.base import EngineOptions, EngineUsageError
from p2pdyn.engines.hosted import adapters, one_line

LEASE_S = 12
"""How long vLLM's NIXL connector keeps a prefill's blocks without a sign of life from who is to read them."""
ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}
"""A node's role, and what vLLM calls it. One that is neither gets no connector."""
MAX_IPC_PATH = 90
"""Bytes: the kernel takes 107, the rank is appended."""
CPU_BLOCK_SIZE = 32
"""vLLM's kernels for CPUs want multiples of it; its own default there, 128, makes prefixes coarse."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """``engine`` is vLLM's AsyncEngineArgs. ``publishers`` are the KV events' (events, replay, topic), one a rank, none
    if they are off. ``loras`` are adapters' folders by name. ``sockets`` is a folder of ours, to be removed."""

    engine: Any
    publishers: tuple[tuple[str, str, str], ...]
    loras: dict[str, str]
    moves_kv: str
    sockets: Path | None


def environment(options: EngineOptions) -> None:
    """What vLLM and its libraries read from the environment. Call it before vLLM is imported."""
    environ = os.environ
    environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # this process has threads
    environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
    environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.offline:
        environ["HF_HUB_OFFLINE"] = environ["TRANSFORMERS_OFFLINE"] = "1"


def parse(options: EngineOptions) -> Arguments:
    """Read ``options.args`` as vLLM does. Raises EngineUsageError with a sentence."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if not options.model:
        raise EngineUsageError("the vllm engine needs --model: a folder in Hugging Face's layout, or a name there")
    cpu = bool(current_platform.is_cpu())
    parser = FlexibleArgumentParser(prog="vllm", add_help=False)
    parser.error = _refuse
    parser = AsyncEngineArgs.add_cli_args(parser)
    parser.add_argument("--lora-modules", nargs="*", default=[])
    try:
        parsed = parser.parse_args([*_defaults(options, cpu), *options.args])
        engine = AsyncEngineArgs.from_cli_args(parsed)
    except EngineUsageError:
        raise
    except (Exception, SystemExit) as error:
        raise EngineUsageError(f"vLLM does not take the arguments after --: {one_line(error)}") from error
    if "--disable-log-stats" not in _given(options.args):
        engine.disable_log_stats = True  # its own log; the statistics are on all the same
    if cpu and engine.enforce_eager:  # else the first request for logprobs waits half a minute for a C++ compiler
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    publishers, sockets = _publish(engine, options)
    return Arguments(engine, publishers, adapters(parsed.lora_modules), _transfer(engine, options, cpu), sockets)


def _refuse(message: str) -> NoReturn:
    raise EngineUsageError(f"vLLM does not take the arguments after --: {message}")


def _given(args: Sequence[str]) -> set[str]:
    """The names of the flags in ``args``, as vLLM spells them."""
    flags = (arg.partition("=")[0].partition(".")[0] for arg in args if arg.startswith("--"))
    return {"--" + flag[2:].replace("_", "-") for flag in flags}


def _defaults(options: EngineOptions, cpu: bool) -> list[str]:
    given = _given(options.args)
    defaults = [] if "--model" in given else ["--model", str(options.model)]
    if not given & {"--enable-prefix-caching", "--no-enable-prefix-caching"}:
        defaults.append("--enable-prefix-caching")
    if cpu and "--block-size" not in given:
        defaults += ["--block-size", str(CPU_BLOCK_SIZE)]
    if "--kv-events-config" not in given and "--no-enable-prefix-caching" not in given:
        defaults += ["--kv-events-config", json.dumps({"enable_kv_cache_events": True, "publisher": "zmq"})]
    if options.role in ROLES and "--kv-transfer-config" not in given:
        transfer = {"kv_connector": "NixlConnector", "kv_role": ROLES[options.role]}
        if cpu:
            transfer["kv_buffer_device"] = "cpu"
        defaults += ["--kv-transfer-config", json.dumps({**transfer, "kv_load_failure_policy": "recompute"})]
    if "--worker-extension-cls" not in given:
        defaults += ["--worker-extension-cls", "p2pdyn.engines.vllm.worker.Extension"]
    return defaults


# ---- KV events


def _publish(engine: Any, options: EngineOptions) -> tuple[tuple[tuple[str, str, str], ...], Path | None]:
    """Have KV events published on sockets in a folder that only this user can enter, whatever endpoint was asked for:
    they carry prompts. vLLM connects to a tcp endpoint without a wildcard instead of binding it, and gives each rank a
    socket of its own only if the endpoint looks like tcp with a port; hence the names."""
    config = engine.kv_events_config
    if config is None or not config.enable_kv_cache_events or config.publisher != "zmq":
        return (), None
    folder = own = options.data_dir / "vllm"
    if len(os.fsencode(folder.absolute())) > MAX_IPC_PATH - 20:
        folder = Path(tempfile.mkdtemp(prefix="p2pdyn-vllm-"))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = folder.absolute()
    for old in folder.glob("*.tcp:*"):
        old.unlink()
    config.endpoint, config.replay_endpoint = f"ipc://{folder}/events.tcp:1", f"ipc://{folder}/replay.tcp:1"
    publishers = tuple(
        (f"ipc://{folder}/events.tcp:{1 + rank}", f"ipc://{folder}/replay.tcp:{1 + rank}", str(config.topic))
        for rank in range(engine.data_parallel_size)
    )
    return publishers, None if folder == own.absolute() else folder


# ---- prefill and decode


def _transfer(engine: Any, options: EngineOptions, cpu: bool) -> str:
    """Complete the connector's configuration; "nixl" if there is one that moves KV by it."""
    config = engine.kv_transfer_config
    if config is None or "Nixl" not in json.dumps([config.kv_connector, config.kv_connector_extra_config], default=str):
        return ""
    if options.node:
        config.engine_id = f"{options.node}-{options.epoch}"
    config.kv_connector_extra_config.setdefault("kv_lease_duration", LEASE_S)
    ranks = engine.data_parallel_size
    wanted = options.side_port or int(os.environ.get("VLLM_NIXL_SIDE_CHANNEL_PORT") or 0)
    port = side_port.choose(options.host, wanted, ranks, "vLLM's NIXL side channel")
    os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"] = options.host
    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(port)
    if cpu:
        os.environ.setdefault("UCX_TLS", "tcp,self,sm")
    return "nixl"
