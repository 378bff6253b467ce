"""Every setting of a peer: one frozen :class:`Config`, one :func:`load`.

A setting has one name: ``--seeds-file`` on the command line, ``P2PDYN_SEEDS_FILE`` in the environment, ``seeds_file``
in the TOML file named by ``--config``.  Flags win over the environment, that over the file, that over the default.  Of
two settings that exclude each other (see ``EXCLUSIVE``) the stronger source decides; in one source they are an error.
Relative paths in the TOML file start at its folder.  No other module reads settings from the environment.
"""

from __future__ import annotations

import difflib
import socket
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from p2pdyn import settings
from p2pdyn.constants import DEFAULT_PORT
from p2pdyn.core.router_cost import DEFAULT_POLICY
from p2pdyn.core.types import AGGREGATED, FRONTEND, Address
from p2pdyn.settings import GPU_ENGINES, SETTINGS, BadValue

ENV_PREFIX = "P2PDYN_"
DEFAULT_HTTP = Address("127.0.0.1", 8000)
LOOPBACK = "127.0.0.1"
WORKER_PORT_STEP = 10
"""Worker i of a supervisor listens at BASE + 10 * i."""
PORTS_PER_NODE = 4
"""Control, requests, events, tcp KV fallback."""

EXCLUSIVE = (("http", "no_http"), ("cluster_key", "insecure"), ("mdns", "no_mdns"))

AS_GIVEN = (
    *(
        "model",
        "served_model_name",
        "engine_args",
        "offline",
        "router",
        "kv_transfer",
        "log_level",
        "port",
        "seeds",
        "seeds_file",
    ),
    *("cluster", "cluster_key", "insecure", "api_key_file", "tls_cert", "tls_key"),
)
"""Settings whose default depends on nothing else."""


class ConfigError(Exception):
    """Bad usage or configuration (exit code 2): one sentence with the mend."""


class StartError(Exception):
    """A failure at run time that ends the node (exit code 1): one sentence with the mend."""


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One worker of a supervisor. ``gpus``: what CUDA_VISIBLE_DEVICES is to hold; None leaves it alone."""

    name: str
    engine: str
    model: str | None
    served_model_name: str | None
    role: str
    engine_args: tuple[str, ...]
    gpus: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """What one peer runs with, everything resolved and checked.

    ``http`` None: no endpoint; ``http_given``: its address was named, so the peer subscribes to workers from the start.
    ``listen``: an address or an interface's name; None: the best ranked interface, plus 127.0.0.1 for control.
    ``port`` 0: free ports.  ``role`` is ``frontend`` when ``engine`` is ``none``.  ``workers`` not empty: this process
    is their supervisor, and ``engine`` and what belongs to it are the workers' defaults.
    """

    data_dir: Path
    name: str
    engine: str = "builtin"
    model: str | None = None
    served_model_name: str | None = None
    role: str = AGGREGATED
    http: Address | None = DEFAULT_HTTP
    http_given: bool = False
    listen: str | None = LOOPBACK
    port: int = DEFAULT_PORT
    seeds: tuple[str, ...] = ()
    seeds_file: Path | None = None
    mdns: bool = False
    cluster: str = "default"
    cluster_key: Path | None = None
    insecure: bool = False
    router: str = DEFAULT_POLICY
    kv_transfer: str = "auto"
    workers: tuple[WorkerConfig, ...] = ()
    api_key_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    offline: bool = False
    engine_args: tuple[str, ...] = ()
    log_level: str = "info"

    @property
    def loopback_only(self) -> bool:
        return self.listen is not None and is_loopback(self.listen)

    def ports(self) -> list[int]:
        """First ports: this node's, then each worker's (0: any free one)."""
        return [self.port and self.port + WORKER_PORT_STEP * i for i in range(len(self.workers) + 1)]

    def frontend(self) -> Config:
        """The supervisor's own peer: no engine, the same endpoint and mesh."""
        return replace(
            self, engine="none", role=FRONTEND, model=None, served_model_name=None, engine_args=(), workers=()
        )


@dataclass(frozen=True, slots=True)
class ReadyInfo:
    """What a peer tells once it is ready. ``mesh`` is host:port of its control link, ``http`` its URL."""

    node: str
    mesh: str
    http: str | None
    model: str | None
    role: str

    @property
    def line(self) -> str:
        """The one line that `node` prints on stdout."""
        return (
            f"ready node={self.node} mesh={self.mesh} http={self.http or 'off'} "
            f"model={self.model or 'none'} role={self.role}"
        )


def is_loopback(listen: str) -> bool:
    return listen == "lo" or Address(listen, 0).is_loopback


@dataclass(frozen=True, slots=True)
class _Source:
    """Where values come from. ``label`` names a setting as its author wrote it; ``folder`` starts relative paths."""

    values: Mapping[str, object]
    label: Callable[[str], str]
    folder: Path | None = None

    def parse(self, key: str) -> Any:
        try:
            return SETTINGS[key](self.values[key], self.folder)
        except BadValue as why:
            raise ConfigError(f"{self.label(key)} {why}") from None


def load(flags: Mapping[str, object], env: Mapping[str, str]) -> Config:
    """Resolve all settings. ``flags``: by setting name, None (or absent) where the flag was not given.

    Raises ConfigError.
    """
    sources = [_flag_source(flags), _env_source(env)]
    for source in sources:
        if "config" in source.values:
            sources.append(_toml_source(source.parse("config"), source.label("config")))
            break
    given, labels = _merge(sources)
    config = _resolve(given, labels, env)
    _check(config, given)
    return config


def _flag_source(flags: Mapping[str, object]) -> _Source:
    # An empty tuple is a repeatable flag that was not given.
    values = {key: value for key, value in flags.items() if value is not None and value != ()}
    if unknown := values.keys() - SETTINGS.keys():
        raise TypeError(f"no such settings: {sorted(unknown)}")
    return _Source(values, _flag)


def _flag(key: str) -> str:
    return "an engine argument" if key == "engine_args" else "--" + key.replace("_", "-")


def _env_source(env: Mapping[str, str]) -> _Source:
    values: dict[str, object] = {}
    for variable, value in env.items():
        if not variable.startswith(ENV_PREFIX) or not value:
            continue
        key = variable.removeprefix(ENV_PREFIX).lower()
        if key in SETTINGS:
            values[key] = value
        # Other P2PDYN_ variables are somebody else's, unless one looks like a slip of the pen.
        elif near := difflib.get_close_matches(key, SETTINGS, 1, 0.85):
            raise ConfigError(f"{variable} is no setting: did you mean {ENV_PREFIX}{near[0].upper()}?")
    return _Source(values, lambda key: ENV_PREFIX + key.upper())


def _toml_source(path: Path, label: str) -> _Source:
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except OSError as why:
        raise ConfigError(f"{label}: cannot read {path} ({why.strerror}): give an existing TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as why:
        raise ConfigError(f"{label}: {path} is not valid TOML ({why}): mend that line") from None
    table.pop("config", None)
    try:
        values = settings.known(table, SETTINGS)
    except BadValue as why:
        raise ConfigError(f"{path} {why}") from None
    return _Source(values, lambda key: f"{key} in {path}", path.parent.resolve())


def _merge(sources: Sequence[_Source]) -> tuple[dict[str, Any], dict[str, str]]:
    """The strongest value of each setting, parsed, and what to call it in an error. False switches count as absent."""
    given: dict[str, Any] = {}
    labels: dict[str, str] = {}
    for source in reversed(sources):
        values = {key: source.parse(key) for key in source.values}
        for alias, key in settings.ALIASES.items():
            if alias in values:
                values[key] = (*values.get(key, ()), *values.pop(alias))
        for pair in EXCLUSIVE:
            said = [key for key in pair if values.get(key) not in (None, False)]
            if len(said) == 2:
                raise ConfigError(
                    f"{source.label(said[0])} and {source.label(said[1])} exclude each other: give one of them"
                )
            if said:
                given = {key: value for key, value in given.items() if key not in pair}
        given |= values
        labels |= {key: source.label(key) for key in values}
    return given, labels


def _resolve(given: dict[str, Any], labels: dict[str, str], env: Mapping[str, str]) -> Config:
    """Fill in the defaults that depend on other settings."""
    engine = given.get("engine", "builtin")
    if engine == "none":
        for key in ("role", "model", "served_model_name", "engine_args", "workers"):
            if given.get(key):
                raise ConfigError(f"{labels[key]} needs an engine: give --engine, or leave it out for a frontend")
    name = given.get("name") or settings.as_name(socket.gethostname())
    data_dir = given.get("data_dir") or Path.home() / ".local/share/p2pdyn" / given.get("name", "node")
    open_mesh = "cluster_key" in given or given.get("insecure", False)
    listen = given.get("listen", None if open_mesh else LOOPBACK)
    loopback_only = listen is not None and is_loopback(listen)
    mdns = given.get("mdns", not (loopback_only or given.get("seeds") or given.get("seeds_file")))
    config = Config(
        data_dir=data_dir,
        name=name,
        engine=engine,
        role=FRONTEND if engine == "none" else given.get("role", AGGREGATED),
        http=None if given.get("no_http") else given.get("http", DEFAULT_HTTP),
        http_given="http" in given,
        listen=listen,
        mdns=mdns and not given.get("no_mdns", False),
        **{key: given[key] for key in AS_GIVEN if key in given},
    )
    return replace(config, workers=_workers(config, given, labels, env))


def _workers(
    config: Config, given: Mapping[str, Any], labels: Mapping[str, str], env: Mapping[str, str]
) -> tuple[WorkerConfig, ...]:
    """The workers' own settings over the node's, and each one's GPUs: its own list, else the next slice of the visible
    ones, ``gpus_per_worker`` long (default 1 for engines that need a GPU)."""
    asked = given.get("workers")
    if not asked:
        if "gpus_per_worker" in given:
            raise ConfigError(f"{labels['gpus_per_worker']} divides GPUs between workers: give --workers too")
        return ()
    tables: list[dict[str, Any]] = [{} for _ in range(asked)] if isinstance(asked, int) else asked
    visible = [gpu.strip() for gpu in env["CUDA_VISIBLE_DEVICES"].split(",")] if "CUDA_VISIBLE_DEVICES" in env else None
    workers: list[WorkerConfig] = []
    next_gpu = 0
    for number, own in enumerate(tables, 1):
        gpus = own.get("gpus")
        worker = WorkerConfig(
            name=own.get("name", f"{config.name}-w{number}"),
            **{
                key: own.get(key, getattr(config, key))
                for key in ("engine", "model", "served_model_name", "role", "engine_args")
            },
        )
        per_worker = given.get("gpus_per_worker", 1 if worker.engine in GPU_ENGINES else None)
        if gpus is None and per_worker is not None:
            gpus = _slice(visible, next_gpu, per_worker, worker.name)
            next_gpu += per_worker
        workers.append(replace(worker, gpus=gpus))
    return tuple(workers)


def _slice(visible: Sequence[str] | None, start: int, count: int, worker: str) -> tuple[str, ...]:
    if visible is None:
        return tuple(str(index) for index in range(start, start + count))
    if start + count > len(visible):
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES names {len(visible)} GPUs, too few for {worker}: "
            "lower --workers or --gpus-per-worker, or name more GPUs"
        )
    return tuple(visible[start : start + count])


def _check(config: Config, given: Mapping[str, Any]) -> None:
    """What single values cannot show."""
    if not (config.cluster_key or config.insecure):
        if not config.loopback_only:
            raise ConfigError(
                f"listening on {config.listen} without a key lets anybody in: give --cluster-key FILE "
                f"(made by `p2pdyn keygen FILE`), or --insecure if that is meant"
            )
        if config.http and not config.http.is_loopback and not config.api_key_file:
            raise ConfigError(
                f"HTTP on {config.http} without a key lets anybody in: give --api-key-file or --cluster-key, "
                f"or --insecure if that is meant"
            )
    if bool(config.tls_cert) != bool(config.tls_key):
        have, lack = ("--tls-cert", "--tls-key") if config.tls_cert else ("--tls-key", "--tls-cert")
        raise ConfigError(f"{have} needs {lack}: give both")
    if config.http is None:
        for key in ("api_key_file", "tls_cert"):
            if given.get(key):
                raise ConfigError(f"{_flag(key)} is for the HTTP endpoint: give --http HOST:PORT, or leave it out")
    names = [worker.name for worker in config.workers]
    if len(set(names)) < len(names):
        raise ConfigError("two [[workers]] have one name: give each its own")
    if config.port:
        last = config.ports()[-1] + PORTS_PER_NODE - 1
        if last > 65535:
            raise ConfigError(f"--port {config.port} needs the ports up to {last}: give a lower one")
        if config.http and any(0 <= config.http.port - base < PORTS_PER_NODE for base in config.ports()):
            raise ConfigError(
                f"--http {config.http} is one of the mesh ports from {config.port} on: give another --http or --port"
            )


def child_environment(inherited: Mapping[str, str], gpus: Sequence[str] | None = None) -> dict[str, str]:
    """For a node that this process starts with all its settings on the command line: no settings, only these GPUs."""
    own = {ENV_PREFIX + key.upper() for key in SETTINGS}
    env = {key: value for key, value in inherited.items() if key not in own}
    return env if gpus is None else env | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
