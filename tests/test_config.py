from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from p2pdyn.config import Config, ConfigError, ReadyInfo, child_environment, load
from p2pdyn.core.types import Address
from p2pdyn.settings import SETTINGS


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.key"
    path.touch()
    return path


def toml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "node.toml"
    path.write_text(text)
    return str(path)


def test_defaults_are_the_contracts() -> None:
    config = load({}, {})
    assert (config.engine, config.model, config.role) == ("builtin", None, "aggregated")
    assert (config.http, config.http_given) == (Address("127.0.0.1", 8000), False)
    assert (config.listen, config.port, config.mdns, config.seeds) == ("127.0.0.1", 7400, False, ())
    assert config.data_dir == Path.home() / ".local/share/p2pdyn/node"
    assert config.workers == ()
    assert config.name


def test_name_chooses_the_data_dir() -> None:
    config = load({"name": "gpu7"}, {})
    assert config.name == "gpu7"
    assert config.data_dir == Path.home() / ".local/share/p2pdyn/gpu7"


@pytest.mark.parametrize(
    ("flag", "env", "file", "expected"),
    [(1, 2, 3, 1), (None, 2, 3, 2), (None, None, 3, 3), (None, None, None, 7400)],
)
def test_flags_win_over_environment_over_file_over_default(
    tmp_path: Path, flag: int | None, env: int | None, file: int | None, expected: int
) -> None:
    path = toml(tmp_path, f"port = {file}" if file else "")
    config = load({"port": flag, "config": path}, {"P2PDYN_PORT": str(env)} if env else {})
    assert config.port == expected


VALUES: dict[str, tuple[str, str, object]] = {
    "engine": ("sim", '"sim"', "sim"),
    "model": ("org/model", '"org/model"', "org/model"),
    "served_model_name": ("chat", '"chat"', "chat"),
    "role": ("prefill", '"prefill"', "prefill"),
    "http": ("127.0.0.1:81", '"127.0.0.1:81"', Address("127.0.0.1", 81)),
    "listen": ("::1", '"::1"', "::1"),
    "port": ("0", "0", 0),
    "seeds": ("a, b:1 [::1]:2", '["a", "b:1", "[::1]:2"]', ("a:7400", "b:1", "[::1]:2")),
    "seed": ("a:1", '["a:1"]', ("a:1",)),
    "mdns": ("on", "true", True),
    "cluster": ("lab", '"lab"', "lab"),
    "insecure": ("1", "true", True),
    "data_dir": ("/d", '"/d"', Path("/d")),
    "name": ("n1", '"n1"', "n1"),
    "router": ("random", '"random"', "random"),
    "offline": ("yes", "true", True),
    "engine_args": ("--itl-ms 5 --name 'a b'", '["--itl-ms", 5, "--name", "a b"]', ("--itl-ms", "5", "--name", "a b")),
    "log_level": ("debug", '"debug"', "debug"),
}


@pytest.mark.parametrize("setting", VALUES)
def test_every_setting_reads_the_same_from_environment_and_file(tmp_path: Path, setting: str) -> None:
    text, written, expected = VALUES[setting]
    from_env = load({}, {f"P2PDYN_{setting.upper()}": text})
    from_file = load({"config": toml(tmp_path, f"{setting.replace('_', '-')} = {written}")}, {})
    field = {"seed": "seeds"}.get(setting, setting)
    assert getattr(from_env, field) == expected
    assert dataclasses.asdict(from_env) == dataclasses.asdict(from_file)


def test_every_field_is_a_setting() -> None:
    derived = {"http_given"}
    assert {field.name for field in dataclasses.fields(Config)} - derived <= SETTINGS.keys()


def test_paths_in_the_file_start_at_its_folder(tmp_path: Path, key: Path) -> None:
    config = load({"config": toml(tmp_path, 'cluster_key = "cluster.key"\nmodel = "./m"\ndata_dir = "d"')}, {})
    assert config.cluster_key == key
    assert config.model == str(tmp_path / "m")
    assert config.data_dir == tmp_path / "d"


@pytest.mark.parametrize(
    ("flags", "listen", "mdns"),
    [
        ({}, "127.0.0.1", False),
        ({"insecure": True}, None, True),
        ({"cluster_key": "KEY"}, None, True),
        ({"cluster_key": "KEY", "seed": ("h:1",)}, None, False),
        ({"cluster_key": "KEY", "seed": ("h:1",), "mdns": True}, None, True),
        ({"cluster_key": "KEY", "listen": "::1"}, "::1", False),
        ({"cluster_key": "KEY", "listen": "eth0"}, "eth0", True),
        ({"cluster_key": "KEY", "listen": "10.0.0.1", "mdns": False}, "10.0.0.1", False),
    ],
)
def test_listen_and_mdns_follow_from_key_and_seeds(
    key: Path, flags: dict[str, Any], listen: str | None, mdns: bool
) -> None:
    config = load({k: str(key) if v == "KEY" else v for k, v in flags.items()}, {})
    assert (config.listen, config.mdns) == (listen, mdns)


def test_of_excluding_settings_the_stronger_source_decides(tmp_path: Path, key: Path) -> None:
    path = toml(tmp_path, 'http = "127.0.0.1:81"\ncluster_key = "cluster.key"')
    config = load({"config": path, "no_http": True, "insecure": True}, {})
    assert (config.http, config.cluster_key, config.insecure) == (None, None, True)
    config = load({"http": "127.0.0.1:82"}, {"P2PDYN_NO_HTTP": "1"})
    assert config.http == Address("127.0.0.1", 82)


def test_a_frontend_has_the_role_of_one() -> None:
    config = load({"engine": "none"}, {})
    assert config.role == "frontend"


ERRORS = [
    ({"port": "x"}, {}, "--port must be a whole number from 0 to 65532, not 'x'"),
    ({"port": "65533"}, {}, "--port must be a whole number from 0 to 65532, not '65533'"),
    ({"port": -1}, {}, "--port must be a whole number"),
    ({"engine": "foo"}, {}, "--engine must be one of builtin, sim,"),
    ({}, {"P2PDYN_ROUTER": "fastest"}, "P2PDYN_ROUTER must be one of"),
    ({"http": "8000"}, {}, "--http is wrong: address '8000' has no port: write HOST:PORT"),
    ({"seed": ("a:0",)}, {}, "give the port that the peer listens on"),
    (
        {"seed": ("host:7400:7400",)},
        {},
        "--seed is wrong: address 'host:7400:7400' has no valid host: write HOST:PORT, or [IPV6]:PORT",
    ),
    ({"listen": "127.0.0.1:7400"}, {}, "--listen takes no port: give '127.0.0.1', and the port with --port"),
    ({"listen": "0.0.0.0"}, {}, "without a key lets anybody in: give --cluster-key FILE"),
    ({"http": "0.0.0.0:8000"}, {}, "without a key lets anybody in: give --api-key-file"),
    ({"http": "127.0.0.1:7402"}, {}, "is one of the mesh ports from 7400 on"),
    ({"name": "a/b"}, {}, "--name must be 1 to 63 letters"),
    ({"cluster_key": "/nonexistent"}, {}, "--cluster-key cannot be read: /nonexistent (No such file or directory)"),
    ({"tls_cert": __file__}, {}, "--tls-cert needs --tls-key: give both"),
    ({"tls_key": __file__}, {}, "--tls-key needs --tls-cert: give both"),
    ({"no_http": True, "http": "127.0.0.1:1"}, {}, "--http and --no-http exclude each other: give one of them"),
    ({"insecure": True, "cluster_key": __file__}, {}, "--cluster-key and --insecure exclude each other"),
    ({}, {"P2PDYN_HTTP": "h:1", "P2PDYN_NO_HTTP": "1"}, "P2PDYN_HTTP and P2PDYN_NO_HTTP exclude each other"),
    ({"no_http": True, "api_key_file": __file__}, {}, "--api-key-file is for the HTTP endpoint"),
    ({"engine": "none", "role": "decode"}, {}, "--role needs an engine"),
    ({"engine": "none", "engine_args": ("--x",)}, {}, "an engine argument needs an engine"),
    ({"engine": "none", "workers": "2"}, {}, "--workers needs an engine"),
    ({"workers": "65"}, {}, "--workers must be a whole number from 0 to 64, not '65'"),
    ({"workers": "64", "port": "65000"}, {}, "needs the ports up to 65643: give a lower one"),
    ({"gpus_per_worker": "1"}, {}, "give --workers too"),
    ({"config": "/nonexistent.toml"}, {}, "--config: cannot read /nonexistent.toml"),
    ({}, {"P2PDYN_OFFLINE": "maybe"}, "P2PDYN_OFFLINE must be true or false, not 'maybe'"),
    ({}, {"P2PDYN_CLUSTERKEY": "x"}, "P2PDYN_CLUSTERKEY is no setting: did you mean P2PDYN_CLUSTER_KEY?"),
    ({}, {"P2PDYN_ENGINE_ARGS": "'open"}, "cannot be split into arguments"),
]


@pytest.mark.parametrize(("flags", "env", "sentence"), ERRORS)
def test_bad_settings_are_one_sentence_with_the_mend(
    flags: dict[str, object], env: dict[str, str], sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(flags, env)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


FILE_ERRORS = [
    ("port = 'x'", "port in FILE must be a whole number"),
    ("prot = 1", "FILE has an unknown setting prot: did you mean port?"),
    ("zzzzzz = 1", "FILE has an unknown setting zzzzzz: remove it"),
    ("port = ", "FILE is not valid TOML"),
    ("insecure = 1", "insecure in FILE must be true or false, not 1"),
    ("http = false", "http in FILE must be text, not False"),
    ("[[workers]]\nmodle = 'x'", "(number 1) has an unknown setting modle: did you mean model?"),
    ("[[workers]]\n[[workers]]\nengine = 'none'", "workers in FILE (number 2) engine must be one of builtin,"),
    ("[[workers]]\nname = 'a'\n[[workers]]\nname = 'a'", "two [[workers]] have one name"),
]


@pytest.mark.parametrize(("text", "sentence"), FILE_ERRORS)
def test_bad_files_are_one_sentence_with_the_mend(tmp_path: Path, text: str, sentence: str) -> None:
    path = toml(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load({"config": path}, {})
    assert sentence.replace("FILE", path) in str(caught.value)


def test_like_workers_take_the_nodes_settings_and_ten_ports_each() -> None:
    flags = {"engine": "sim", "name": "n", "workers": "2", "engine_args": ("--itl-ms", "5"), "role": "decode"}
    config = load(flags, {})
    assert [worker.name for worker in config.workers] == ["n-w1", "n-w2"]
    assert {(w.engine, w.role, w.engine_args, w.gpus) for w in config.workers} == {
        ("sim", "decode", ("--itl-ms", "5"), None)
    }
    assert config.ports() == [7400, 7410, 7420]
    frontend = config.frontend()
    assert (frontend.engine, frontend.role, frontend.workers, frontend.http) == ("none", "frontend", (), config.http)


def test_free_ports_are_free_for_workers_too() -> None:
    assert load({"engine": "sim", "workers": 2, "port": 0}, {}).ports() == [0, 0, 0]


def test_unlike_workers_come_from_the_file(tmp_path: Path) -> None:
    text = """
engine = "sim"
[[workers]]
name = "big"
engine = "vllm"
model = "./big"
gpus = [0, 1]
[[workers]]
engine-args = ["--itl-ms", 20]
role = "prefill"
"""
    big, small = load({"config": toml(tmp_path, text), "name": "n"}, {}).workers
    assert (big.name, big.engine, big.model, big.gpus) == ("big", "vllm", str(tmp_path / "big"), ("0", "1"))
    assert (small.name, small.engine, small.role, small.gpus) == ("n-w2", "sim", "prefill", None)
    assert small.engine_args == ("--itl-ms", "20")


@pytest.mark.parametrize(
    ("visible", "per_worker", "expected"),
    [
        (None, None, [("0",), ("1",)]),
        (None, 2, [("0", "1"), ("2", "3")]),
        ("4,5,6,7", 2, [("4", "5"), ("6", "7")]),
        ("GPU-ab, GPU-cd", 1, [("GPU-ab",), ("GPU-cd",)]),
        (None, 0, [(), ()]),
    ],
)
def test_each_worker_gets_its_own_gpus(visible: str | None, per_worker: int | None, expected: list[Any]) -> None:
    env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    config = load({"engine": "vllm", "workers": 2, "gpus_per_worker": per_worker}, env)
    assert [worker.gpus for worker in config.workers] == expected


def test_too_few_gpus_are_told() -> None:
    with pytest.raises(ConfigError, match="names 3 GPUs, too few for"):
        load({"engine": "vllm", "workers": 2, "gpus_per_worker": 2}, {"CUDA_VISIBLE_DEVICES": "0,1,2"})


def test_a_childs_environment_holds_no_settings() -> None:
    env = {"PATH": "/bin", "P2PDYN_WORKERS": "2", "P2PDYN_CACHE": "/c", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert child_environment(env) == {"PATH": "/bin", "P2PDYN_CACHE": "/c", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert child_environment(env, ("1",))["CUDA_VISIBLE_DEVICES"] == "1"


def test_ready_line() -> None:
    info = ReadyInfo("ab" * 8, "127.0.0.1:7400", None, None, "frontend")
    assert info.line == "ready node=abababababababab mesh=127.0.0.1:7400 http=off model=none role=frontend"
