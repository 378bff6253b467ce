"""What vLLM's processes print of their loading and their errors (:mod:`p2pdyn.engines.logtap`)."""

from __future__ import annotations

import re

STAGES = (
    (re.compile(rb"Initializing a V\d+ LLM engine"), 0.25, "starting vLLM's engine core"),
    (re.compile(rb"Starting to load model"), 0.35, "loading weights"),
    (re.compile(rb"Loading weights took"), 0.6, "profiling"),
    (re.compile(rb"(GPU|CPU) KV cache size"), 0.8, "warming up"),
    (re.compile(rb"init engine \(profile"), 0.95, "starting"),
)
ERROR = re.compile(rb"ERROR.*?\] ((?:[\w.]+\.)?\w*(?:Error|Exception): .+)")
VAGUE = (b"See root cause above", b"EngineCore encountered an issue", b"WorkerProc initialization failed")
