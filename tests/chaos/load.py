"""Users of the cluster: each has conversations, one request after the other, and knows every right answer.

A user has both frontends' addresses and tries them in turn until it has its answer, as a client with a list of base
URLs or a retrying proxy does.
"""

from __future__ import annotations

import asyncio
import random
import string
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from chaos.answers import Answer, Message, Question, answer_to
from chaos.client import Attempt, attempt
from netns.inside import thread_in

TRIES = 8
RETRY_S = 0.5
SYSTEM_PROMPTS = 3
END_S = 60.0
"""After the users were asked to stop, their last requests are over."""


@dataclass
class Asked:
    """One request: all attempts at it, the last of them right unless it was given up."""

    question: Question
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def answered(self) -> bool:
        return bool(self.attempts) and self.attempts[-1].right


def words(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase + "    ", k=length))


class Load:
    """``with Load(space, urls, users): ...`` in the network namespace ``space``; ``urls`` are "HOST:PORT" by frontend.
    After the block all requests are over and ``asked`` has them. ``stick`` keeps each user at one frontend."""

    def __init__(
        self, space: str, urls: Mapping[str, str], users: int, seed: int = 0, *, stick: bool = False, pause: float = 0.1
    ) -> None:
        self.asked: list[Asked] = []
        self._space, self._urls, self._users, self._seed = space, dict(urls), users, seed
        self._stick, self._pause = stick, pause
        self._stop = threading.Event()
        self._done: Future[None] | None = None

    def __enter__(self) -> Load:
        self._thread = thread_in(self._space)
        self._done = self._thread.submit(lambda: asyncio.run(self._run()))
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """No new requests; returns when those that run are over."""
        self._stop.set()
        if self._done is not None:
            done, self._done = self._done, None
            try:
                done.result(END_S)
            finally:
                self._thread.shutdown()

    @property
    def attempts(self) -> list[Attempt]:
        return [made for asked in list(self.asked) for made in list(asked.attempts)]

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for user in range(self._users):
                group.create_task(self._user(user))

    async def _user(self, user: int) -> None:
        rng = random.Random(self._seed * 1009 + user)
        while not self._stop.is_set():
            if rng.random() < 0.5:
                await self._converse(rng, user)
            else:
                await self._ask(rng, user, self._completion(rng))

    async def _converse(self, rng: random.Random, user: int) -> None:
        """A chat of some turns behind one of a few system prompts that all users share."""
        system = words(random.Random(rng.randrange(SYSTEM_PROMPTS)), 300)
        messages: list[Message] = [("system", system)]
        for _ in range(rng.randint(1, 4)):
            if self._stop.is_set():
                return
            messages.append(("user", words(rng, rng.randint(10, 120))))
            question = Question(rng.randint(10, 80), messages=tuple(messages), stream=rng.random() < 0.8)
            said = await self._ask(rng, user, question)
            messages.append(("assistant", said.text))

    def _completion(self, rng: random.Random) -> Question:
        prompt = words(random.Random(rng.randrange(40)), 200) + words(rng, rng.randint(1, 400))
        sampled = rng.random() < 0.4
        return Question(
            rng.randint(1, 120),
            prompt=prompt,
            temperature=rng.choice((0.7, 1.0)) if sampled else 0.0,
            seed=rng.getrandbits(40) if sampled else 0,
            stop=words(rng, 2).strip() if rng.random() < 0.2 else "",
            stream=rng.random() < 0.75,
        )

    async def _ask(self, rng: random.Random, user: int, question: Question) -> Answer:
        right = answer_to(question)
        asked = Asked(question)
        self.asked.append(asked)
        names = sorted(self._urls)
        first = (user if self._stick else rng.randrange(len(names))) % len(names)
        for turn in range(TRIES):
            name = names[(first + (0 if self._stick else turn)) % len(names)]
            made = await attempt(name, self._urls[name], question, right)
            asked.attempts.append(made)
            if made.right or made.wrong:
                break
            await asyncio.sleep(RETRY_S)
        await asyncio.sleep(rng.uniform(0, 2 * self._pause))
        return right
