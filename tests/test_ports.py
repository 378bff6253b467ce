"""The line that a node logs at its start for whoever opens the firewall."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from p2pdyn import ports
from p2pdyn.config import Config
from p2pdyn.core.types import DECODE, PREFILL, PeerInfo

CONFIG = Config(Path("/nowhere"), "n", engine="sim", kv_transfer="tcp")
WORKER = PeerInfo("n", "1", requests_port=7401, events_port=7402)


@pytest.mark.parametrize(
    ("config", "info", "env", "line"),
    [
        (CONFIG, WORKER, {}, "control 7400/tcp; requests 7401/tcp; events 7402/tcp; KV blocks over tcp 7403/tcp"),
        (replace(CONFIG, kv_transfer="off"), WORKER, {}, "control 7400/tcp; requests 7401/tcp; events 7402/tcp"),
        (
            replace(CONFIG, engine="none", mdns=True),
            PeerInfo("n", "1", http="https://[::1]:8443"),
            {},
            "control 7400/tcp; mDNS 5353/udp; HTTP 8443/tcp",
        ),
        (
            replace(CONFIG, engine="vllm", role=PREFILL),
            WORKER,
            {},
            "control 7400/tcp; requests 7401/tcp; events 7402/tcp; vLLM's NIXL side channel 7404/tcp and on, one a "
            "data-parallel rank (neither encrypted nor authenticated); KV blocks over NIXL 7410-7499/tcp, UCX's "
            "(neither encrypted nor authenticated)",
        ),
        (
            replace(CONFIG, engine="trtllm"),
            WORKER,
            {},
            "control 7400/tcp; requests 7401/tcp; events 7402/tcp",
        ),
        (
            replace(CONFIG, engine="trtllm", role=DECODE),
            WORKER,
            {},
            "control 7400/tcp; requests 7401/tcp; events 7402/tcp; ports that TensorRT-LLM's cache transceiver chooses "
            "(neither encrypted nor authenticated)",
        ),
    ],
)
def test_every_port_of_a_role_is_named(config: Config, info: PeerInfo, env: dict[str, str], line: str) -> None:
    assert ports.listing(config, 7400, info, env) == line


def test_ucx_ports_and_free_ports_are_as_they_will_be() -> None:
    line = ports.listing(
        replace(CONFIG, engine="vllm", role=DECODE, port=0), 5000, WORKER, {"UCX_TCP_PORT_RANGE": "9000-9009"}
    )
    assert "side channel a free port and on" in line
    assert "9000-9009/tcp" in line
