"""Where a prompt would go now, and why: the body of ``POST /p2p/explain`` and of `p2pdyn explain`, running nothing."""

from __future__ import annotations

import asyncio
from typing import Any

from p2pdyn.core.request import Failure, Job, Rejected
from p2pdyn.http.backend import Backend
from p2pdyn.http.errors import bad
from p2pdyn.http.generate import encode_prompts, prompt_texts
from p2pdyn.http.openai import chat_ask, completion_ask
from p2pdyn.http.speech import Speech, Speeches

LINK_S = 5.0
"""The first question about a model opens the links to its workers, as its first request would."""
POLL_S = 0.05


class Explanations:
    def __init__(self, backend: Backend, speeches: Speeches) -> None:
        self._backend = backend
        self._speeches = speeches

    async def request(self, content: dict[str, Any], *, pin: str = "", session: str = "") -> dict[str, Any]:
        """Of a request's body, as the generation routes take it. ``model`` may be left out where there is one.

        Raises HttpError 400 and Rejected (404, 503).
        """
        content = {**content, "model": self._model(content.get("model"))}
        speech = await self._speeches.of(content["model"])
        return await self._of(content, speech, pin, session)

    async def prompt(self, text: str, model: str | None, form: str) -> dict[str, Any]:
        """Of a plain text, as ``form``: a "chat" message, the prompt of a "completion", or, with "auto", whichever of
        the two has more of it cached; "form" in the answer says which."""
        base = {"model": self._model(model)}
        speech = await self._speeches.of(base["model"])
        bodies: dict[str, dict[str, Any]] = {
            "chat": {**base, "messages": [{"role": "user", "content": text}]},
            "completion": {**base, "prompt": text},
        }
        if speech.template is None or form == "completion":
            del bodies["chat"]
        if form == "chat" and "chat" in bodies:
            del bodies["completion"]
        found = [{**await self._of(body, speech, "", ""), "form": name} for name, body in bodies.items()]
        return max(found, key=lambda one: max((row["matched"] for row in one["candidates"]), default=0))

    async def _of(self, content: dict[str, Any], speech: Speech, pin: str, session: str) -> dict[str, Any]:
        ask = chat_ask(content, speech.card) if "messages" in content else completion_ask(content, speech.card)
        prompts = await asyncio.to_thread(encode_prompts, ask, prompt_texts(ask, speech), speech.tokenizer)
        job = Job(ask.model, prompts[0][0], ask.params, pin=pin, session=session)
        until = asyncio.get_running_loop().time() + LINK_S
        while (found := self._backend.explain(job)) is None:
            if asyncio.get_running_loop().time() > until:
                message = f"Model {ask.model!r} has no ready worker at present; retry in a moment."
                raise Rejected(Failure(503, "no_ready_worker", message, 1))
            await asyncio.sleep(POLL_S)
        return found

    def _model(self, given: object) -> str:
        if isinstance(given, str):
            return given
        names = [model.name for model in self._backend.models()]
        if given is None and len(names) == 1:
            return names[0]
        known = ", ".join(sorted(names)) or "none yet"
        raise bad(f"model must be given as a string; models: {known}.", "model")
