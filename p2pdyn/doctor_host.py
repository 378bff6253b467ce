"""What `p2pdyn doctor` asks of this host alone: interfaces, multicast, ports, clock, limits, memory, GPUs, engines.

Each check reads one thing and judges it; judging is pure, so that tests give it hosts that are not at hand.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import resource
import secrets
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from p2pdyn.net.interfaces import Interface

OK, WARN, FAIL = "ok", "warn", "fail"

MDNS_PORT = 5353
ECHO_S = 1.0
NVIDIA_SMI_S = 10.0
MIN_FILES = 4096
"""Descriptors that a peer of a large cluster with many clients may need; many systems start at 1024."""
MIN_SHM = 2**30
"""Bytes of /dev/shm: engines with several GPUs exchange tensors there; Docker's default of 64 MiB is too small."""
EPOCH_2025 = 1_735_689_600
"""A clock before this was never set. Boot epochs are wall-clock milliseconds."""

PACKAGES = {
    "builtin": ("numpy", "gguf"),
    "vllm": ("vllm",),
    "sglang": ("sglang",),
    "trtllm": ("tensorrt-llm",),
    "nixl": ("nixl",),
}
"""What each engine, and KV transfer, comes from. Only their metadata is read: importing one takes seconds and a GPU."""
UNTRIED = {"trtllm": " (its adapter is written to the API of 1.2 and 1.3, not run on hardware by us)"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ``mend`` is what to do about it, empty when there is nothing to do."""

    check: str
    level: str
    message: str
    mend: str = ""


# ---- interfaces and multicast ----


def judge_interfaces(found: Sequence[Interface], chosen: Sequence[str]) -> list[Finding]:
    """Every interface with its rank and why; ``chosen`` are the names that a node would listen on."""
    findings = []
    for i in found:
        label = " ".join([i.name, ", ".join(i.addresses)]).rstrip()
        place = "chosen" if i.name in chosen else f"rank {i.rank}" if i.usable else "not used"
        findings.append(Finding("interfaces", OK, f"{label}: {place} ({i.why})"))
    if not any(i.usable for i in found):
        mend = "bring a network interface up and give it an address, or name one with --listen"
        findings.append(Finding("interfaces", FAIL, "no interface can be reached by other hosts", mend))
    return findings


async def check_multicast(interface: Interface) -> Finding:
    """Does what this host sends to the mDNS group through ``interface`` come back to it?"""
    try:
        heard = await asyncio.to_thread(multicast_echo, interface)
    except OSError as error:
        mend = "use --seed HOST:PORT instead of mDNS, or enable multicast: ip link set dev NAME multicast on"
        return Finding("multicast", WARN, f"{interface.name} cannot do multicast ({error.strerror})", mend)
    if heard:
        return Finding("multicast", OK, f"{interface.name} hears its own multicast")
    mend = "allow UDP port 5353 to 224.0.0.251 in the firewall, or use --seed HOST:PORT instead of mDNS"
    return Finding("multicast", WARN, f"{interface.name} does not hear its own multicast within {ECHO_S:g} s", mend)


def multicast_echo(interface: Interface) -> bool:
    """Send an mDNS question for a random name through the interface and wait to hear it. Blocks up to ECHO_S."""
    from p2pdyn.net.mdns import GROUP4, GROUP6, join_group

    v4 = [a for a in interface.addresses if ":" not in a]
    choice, group = (v4[0], GROUP4) if v4 else (interface.index, GROUP6)
    label = secrets.token_hex(8).encode()
    question = struct.pack("!6H", 0, 0, 1, 0, 0, 0) + b"\x10" + label + b"\x07_p2pdyn\x04_tcp\x05local\x00"
    packet = question + struct.pack("!2H", 12, 1)
    with join_group(choice) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("" if v4 else "::", MDNS_PORT))
        sock.sendto(packet, (group, MDNS_PORT))
        deadline = time.monotonic() + ECHO_S
        while (left := deadline - time.monotonic()) > 0:
            sock.settimeout(left)
            try:
                if sock.recv(9000) == packet:
                    return True
            except TimeoutError:
                break
    return False


# ---- ports ----


def check_port(host: str, port: int, purpose: str, flag: str) -> Finding:
    """Is the port free on this address? If not, by whom it is held, where /proc tells."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    where = f"port {port} on {host} ({purpose})"
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError as error:
            return judge_port(where, error.errno or 0, port_owner(port), flag)
    return Finding("ports", OK, f"{where} is free")


def judge_port(where: str, error: int, owner: tuple[int, str] | None, flag: str) -> Finding:
    """``owner`` is (process id, command line). A port held by p2pdyn itself is as it should be."""
    if error == errno.EADDRINUSE:
        if owner and "p2pdyn" in owner[1]:
            return Finding("ports", OK, f"{where} is held by a running p2pdyn (process {owner[0]})")
        by = f"process {owner[0]} ({owner[1][:80]})" if owner else "another process"
        return Finding("ports", FAIL, f"{where} is taken by {by}", f"stop it, or give another port with {flag}")
    if error == errno.EADDRNOTAVAIL:
        return Finding("ports", FAIL, f"{where}: this host has no such address", "correct the address")
    if error == errno.EACCES:
        return Finding("ports", FAIL, f"{where} needs privileges", f"give a port above 1023 with {flag}")
    return Finding("ports", FAIL, f"{where} cannot be used ({os.strerror(error)})", f"give another with {flag}")


def port_owner(port: int, proc: Path = Path("/proc")) -> tuple[int, str] | None:
    """(process id, command line) of who listens on a TCP port, as far as we may see."""
    inodes = set()
    for table in ("net/tcp", "net/tcp6"):
        for line in _lines(proc / table)[1:]:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for process in proc.glob("[0-9]*"):
        try:
            if any(os.readlink(fd) in inodes for fd in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return int(process.name), command
        except OSError:  # gone, or not ours to see
            continue
    return None


# ---- clock, limits, memory ----


def judge_clock(now: float, synchronised: bool | None) -> Finding:
    """``now`` in Unix seconds; ``synchronised`` as the kernel knows it, None when it does not tell."""
    date = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now < EPOCH_2025:
        return Finding("clock", FAIL, f"the clock says {date}", "set it: timedatectl set-ntp true, or date -s")
    if synchronised is False:
        mend = "enable NTP (timedatectl set-ntp true, or chrony with a server of your own behind an air gap)"
        return Finding("clock", WARN, f"the clock says {date} and is not synchronised", mend)
    known = "synchronised" if synchronised else "synchronisation unknown"
    return Finding("clock", OK, f"the clock says {date} ({known})")


def clock_synchronised() -> bool | None:
    """The kernel's own view (adjtimex(2), status bit STA_UNSYNC); None where it cannot be asked."""
    if ctypes.sizeof(ctypes.c_long) != 8:
        return None
    timex = ctypes.create_string_buffer(512)  # struct timex with modes = 0: read only
    try:
        if ctypes.CDLL(None, use_errno=True).adjtimex(timex) < 0:
            return None
    except (OSError, AttributeError):
        return None
    status = int(struct.unpack_from("i", timex.raw, 40)[0])
    return not status & 0x40


def judge_files(soft: int, hard: int) -> Finding:
    """Of RLIMIT_NOFILE; -1 is no limit."""
    if soft == -1 or soft >= MIN_FILES:
        return Finding("files", OK, f"open files: {'unlimited' if soft == -1 else soft}")
    higher = f"ulimit -n {MIN_FILES}" if hard == -1 or hard >= MIN_FILES else "raise the hard limit too"
    mend = f"{higher}, or LimitNOFILE=65536 in the systemd unit"
    return Finding("files", WARN, f"open files are limited to {soft}, few for a large cluster or many clients", mend)


def judge_shm(size: int | None) -> Finding:
    """``size`` of /dev/shm in bytes, None when there is none."""
    if size is None:
        return Finding("shm", WARN, "there is no /dev/shm", "mount a tmpfs there: engines with several GPUs need it")
    if size < MIN_SHM:
        mend = "docker run --shm-size 8g, or mount -o remount,size=8G /dev/shm, if an engine uses several GPUs"
        return Finding("shm", WARN, f"/dev/shm has {size / 2**20:.0f} MiB", mend)
    return Finding("shm", OK, f"/dev/shm has {size / 2**30:.1f} GiB")


def shm_size() -> int | None:
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return None
    return status.f_frsize * status.f_blocks


def check_machine() -> list[Finding]:
    fields = dict(line.split(":", 1) for line in _lines(Path("/proc/meminfo")) if ":" in line)
    total, free = (int(fields.get(key, "0").split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    cpus = len(os.sched_getaffinity(0))
    memory = f"{total / 2**30:.1f} GiB of memory, {free / 2**30:.1f} free"
    limit = "".join(_lines(Path("/sys/fs/cgroup/memory.max")))
    if limit.isdigit() and int(limit) < total:
        memory += f", limited to {int(limit) / 2**30:.1f} GiB by its cgroup"
    return [Finding("machine", OK, f"{cpus} CPUs, {memory}"), *check_gpus()]


def check_gpus() -> list[Finding]:
    """What nvidia-smi lists, within NVIDIA_SMI_S: on a sick GPU it hangs."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return [Finding("gpu", OK, "no NVIDIA driver here: builtin and sim run without")]
    query = [command, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    mend = "see dmesg for Xid errors, and reload or reinstall the driver"
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=False)
    except subprocess.TimeoutExpired:
        return [Finding("gpu", FAIL, f"nvidia-smi does not answer within {NVIDIA_SMI_S:g} s", mend)]
    if done.returncode:
        return [Finding("gpu", FAIL, f"nvidia-smi fails: {(done.stdout + done.stderr).strip()[:200]}", mend)]
    return [Finding("gpu", OK, f"GPU {i}: {line.strip()}") for i, line in enumerate(done.stdout.splitlines())]


# ---- engines ----


def judge_packages(versions: Mapping[str, str | None]) -> list[Finding]:
    """``versions`` by distribution, None when it is not installed. Only what a bare install lacks is missing."""
    findings = []
    for extra, names in PACKAGES.items():
        have = {name: versions.get(name) for name in names}
        if all(have.values()):
            found = f"{extra}: " + ", ".join(f"{n} {v}" for n, v in have.items())
            findings.append(Finding("engines", OK, found + UNTRIED.get(extra, "")))
        elif extra == "builtin":
            lack = ", ".join(n for n, v in have.items() if not v)
            findings.append(
                Finding("engines", FAIL, f"builtin lacks {lack}", "install p2pdyn again with its dependencies")
            )
        else:
            findings.append(
                Finding("engines", OK, f"{extra} is not installed", f"pip install 'p2pdyn[{extra}]' to use it")
            )
    return findings


def installed_versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in (name for names in PACKAGES.values() for name in names):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def check_zeromq() -> Finding:
    import zmq

    what = f"ZeroMQ {zmq.zmq_version()} (pyzmq {zmq.__version__})"
    if not zmq.has("curve"):
        return Finding("zeromq", FAIL, f"{what} was built without CURVE", "install the pyzmq wheel from PyPI")
    return Finding("zeromq", OK, f"{what} with CURVE")


def host_findings() -> list[Finding]:
    """The checks of this host that need no settings."""
    return [
        judge_clock(time.time(), clock_synchronised()),
        judge_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        judge_shm(shm_size()),
        *check_machine(),
        check_zeromq(),
        *judge_packages(installed_versions()),
    ]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
