"""The settings' names and how each value is read, whatever its source: a flag, the environment (text) or TOML."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from p2pdyn.constants import DEFAULT_PORT
from p2pdyn.core.router_cost import POLICIES
from p2pdyn.core.types import ROLES, Address

ENGINES = ("builtin", "sim", "vllm", "sglang", "trtllm", "none")
GPU_ENGINES = ("vllm", "sglang", "trtllm")
ROUTERS = tuple(POLICIES)

TRANSFERS = ("auto", "nixl", "tcp", "off")
LOG_LEVELS = ("debug", "info", "warning", "error")
MAX_WORKERS = 64
MAX_GPUS = 64

Parser = Callable[[object, Path | None], Any]
"""``parse(value, folder)``: ``folder`` is where relative paths start (None: the working directory). Raises BadValue."""


class BadValue(ValueError):
    """The rest of a sentence that starts with the setting's name."""


def as_name(text: str) -> str:
    """The nearest valid node name, as for a host's."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", text)[:63] or "node"


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise BadValue(f"must be text, not {value!r}")
    return value


def _name(value: object, _: Path | None) -> str:
    text = _text(value)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", text):
        raise BadValue(f"must be 1 to 63 letters, digits, '.', '_' or '-', not {text!r}")
    return text


def _model_name(value: object, _: Path | None) -> str:
    text = _text(value)
    if not text or len(text.encode()) > 128 or not text.isprintable() or " " in text:
        raise BadValue(f"must be 1 to 128 bytes without spaces, not {text!r}")
    return text


def _model(value: object, folder: Path | None) -> str:
    """A name or a path; only what is plainly a path is resolved."""
    text = _text(value)
    if not text or len(text.encode()) > 4096:
        raise BadValue("must name a model or its folder")
    if text.startswith("~"):
        return str(Path(text).expanduser())
    return str(folder / text) if folder and text.startswith(("./", "../")) else text


def _choice(choices: Sequence[str]) -> Parser:
    def parse(value: object, _: Path | None) -> str:
        if value not in choices:
            raise BadValue(f"must be one of {', '.join(choices)}, not {value!r}")
        return _text(value)

    return parse


def _engine(choices: Sequence[str]) -> Parser:
    """One of ``choices``, or an engine of another distribution (:mod:`p2pdyn.engines.registry`)."""

    def parse(value: object, _: Path | None) -> str:
        if value not in choices:
            from p2pdyn.engines.registry import FACTORY, installed

            if not isinstance(value, str) or not (FACTORY.fullmatch(value) or value in installed()):
                raise BadValue(f"must be one of {', '.join(choices)}, or MODULE:FACTORY, not {value!r}")
        return _text(value)

    return parse


def _whole(low: int, high: int) -> Parser:
    def parse(value: object, _: Path | None) -> int:
        number = int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value) else value
        if not isinstance(number, int) or isinstance(number, bool) or not low <= number <= high:
            raise BadValue(f"must be a whole number from {low} to {high}, not {value!r}")
        return number

    return parse


def _switch(value: object, _: Path | None) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    if not isinstance(value, bool):
        raise BadValue(f"must be true or false, not {value!r}")
    return value


def _address(value: object, _: Path | None) -> Address:
    text = _text(value)
    try:
        return Address.parse(text)
    except ValueError as why:
        raise BadValue(f"is wrong: {why}") from None


def _seeds(value: object, _: Path | None) -> tuple[str, ...]:
    """A list, or text with commas; a seed without a port has the default one."""
    seeds = []
    for item in re.split(r"[,\s]+", value.strip()) if isinstance(value, str) else _list(value):
        text = _text(item)
        try:
            address = Address.parse(text, DEFAULT_PORT)
        except ValueError as why:
            raise BadValue(f"is wrong: {why}") from None
        if not address.port:
            raise BadValue(f"is wrong: seed {item!r} has port 0: give the port that the peer listens on")
        seeds.append(str(address))
    return tuple(seeds)


def _listen(value: object, _: Path | None) -> str:
    text = _text(value).strip()
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if not re.fullmatch(r"[A-Za-z0-9_.:%@*-]{1,255}", bare):
        raise BadValue(f"must be an address or an interface's name, without a port, not {text!r}")
    if bare.count(":") == 1:
        raise BadValue(f"takes no port: give {bare.partition(':')[0]!r}, and the port with --port")
    return bare


def _path(value: object, folder: Path | None) -> Path:
    text = _text(value)
    if not text or "\0" in text:
        raise BadValue("must be a path")
    return (folder or Path()) / Path(text).expanduser()


def _file(value: object, folder: Path | None) -> Path:
    path = _path(value, folder)
    try:
        with path.open("rb"):
            return path
    except OSError as why:
        raise BadValue(f"cannot be read: {path} ({why.strerror}): give a readable file") from None


def _list(value: object) -> Sequence[object]:
    if not isinstance(value, (list, tuple)):
        raise BadValue(f"must be a list, not {value!r}")
    return value


def _arguments(value: object, _: Path | None) -> tuple[str, ...]:
    """A list (numbers are taken as text), or one text that is split as a shell would."""
    if isinstance(value, str):
        try:
            return tuple(shlex.split(value))
        except ValueError as why:
            raise BadValue(f"cannot be split into arguments ({why}): mend the quotes") from None
    return tuple(str(item) for item in _list(value))


def _gpus(value: object, _: Path | None) -> tuple[str, ...]:
    items = [str(item).strip() for item in (value.split(",") if isinstance(value, str) else _list(value))]
    if any(not re.fullmatch(r"[A-Za-z0-9/-]{1,64}", item) for item in items):
        raise BadValue(f"must be a list of GPU numbers or UUIDs, not {value!r}")
    return tuple(items)


def known(table: Mapping[str, object], parsers: Mapping[str, Parser]) -> dict[str, object]:
    """A TOML table with its keys in one spelling (``-`` and ``_`` are one). Raises BadValue for an unknown key."""
    values = {}
    for written, value in table.items():
        key = written.replace("-", "_")
        if key not in parsers:
            near = difflib.get_close_matches(key, parsers, 1, 0.6)
            raise BadValue(f"has an unknown setting {written}: {f'did you mean {near[0]}?' if near else 'remove it'}")
        values[key] = value
    return values


def _workers(value: object, folder: Path | None) -> int | list[dict[str, Any]]:
    """How many like ones, or the settings of unlike ones."""
    if not isinstance(value, list):
        return int(_whole(0, MAX_WORKERS)(value, folder))
    if not all(isinstance(item, dict) for item in value) or not 1 <= len(value) <= MAX_WORKERS:
        raise BadValue(f"must be a number or 1 to {MAX_WORKERS} [[workers]] tables")
    return [_worker(number, table, folder) for number, table in enumerate(value, 1)]


def _worker(number: int, table: Mapping[str, object], folder: Path | None) -> dict[str, Any]:
    own: dict[str, Any] = {}
    key = ""
    try:
        for key, value in known(table, WORKER_SETTINGS).items():
            own[key] = WORKER_SETTINGS[key](value, folder)
    except BadValue as why:
        raise BadValue(" ".join(filter(None, (f"(number {number})", key, str(why))))) from None
    return own


_WORKER_ENGINES = tuple(engine for engine in ENGINES if engine != "none")

SETTINGS: dict[str, Parser] = {
    "config": _path,
    "engine": _engine(ENGINES),
    "model": _model,
    "served_model_name": _model_name,
    "role": _choice(ROLES),
    "http": _address,
    "no_http": _switch,
    "listen": _listen,
    "port": _whole(0, 65532),
    "seed": _seeds,
    "seeds": _seeds,
    "seeds_file": _file,
    "mdns": _switch,
    "no_mdns": _switch,
    "cluster": _name,
    "cluster_key": _file,
    "insecure": _switch,
    "data_dir": _path,
    "name": _name,
    "router": _choice(ROUTERS),
    "kv_transfer": _choice(TRANSFERS),
    "workers": _workers,
    "gpus_per_worker": _whole(0, MAX_GPUS),
    "api_key_file": _file,
    "tls_cert": _file,
    "tls_key": _file,
    "offline": _switch,
    "engine_args": _arguments,
    "log_level": _choice(LOG_LEVELS),
}

ALIASES = {"seed": "seeds"}
"""The flag is repeated and singular; in a file the list reads better in plural."""

WORKER_SETTINGS: dict[str, Parser] = {
    "name": _name,
    "engine": _engine(_WORKER_ENGINES),
    "model": _model,
    "served_model_name": _model_name,
    "role": _choice(ROLES),
    "gpus": _gpus,
    "engine_args": _arguments,
}
"""Of one ``[[workers]]`` table."""
