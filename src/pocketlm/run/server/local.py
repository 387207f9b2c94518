"""A model of this machine: its engine's process, the line before it, and what it answers."""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path

import aiohttp

from pocketlm.errors import BadInputError, PocketlmError
from pocketlm.run.server.answers import Answer, assemble
from pocketlm.run.server.engine_process import EngineSettings, Ready
from pocketlm.run.server.line import Line
from pocketlm.run.server.refusals import RefusalError, from_engine

_LONGEST_PAUSE = 30.0  # seconds between two attempts to start an engine that keeps dying
_EMBEDDINGS = "/v1/embeddings"
_PROMPT = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", _EMBEDDINGS: "input"}
_QUICK_DEATH = 60.0  # an engine that lived longer than these seconds is started again at once


class LocalModel:
    """A file in an engine's process, which is started again where it dies.

    Attributes:
        name: What clients call it.
        line: Who waits for it.
        ready: What the engine said when it was up; None while it is not.
        starts: How often the engine was started.
        size: Bytes of the file.
    """

    def __init__(self, settings: EngineSettings, queue: int) -> None:
        """Prepare a model; `queue` requests may wait for one of its slots."""
        self._settings = settings
        self.name, self.line = settings.name, Line(settings.slots, queue)
        self.ready: Ready | None = None
        self.starts = self.size = 0
        self._embedding = asyncio.Lock()
        self._process: Process | None = None
        self._watching: asyncio.Task | None = None

    async def start(self) -> None:
        """Load the model and keep its engine alive from then on.

        Raises:
            BadInputError: The engine cannot load the file.
            PocketlmError: The engine died while it tried.
        """
        await self._launch()
        self.size = Path(self._settings.path).stat().st_size
        self._session = self.session()
        self._watching = asyncio.create_task(self._watch())

    def session(self) -> aiohttp.ClientSession:
        """Return a client that knows the engine's key."""
        return aiohttp.ClientSession(
            # The engine closes connections when it likes: one that is kept may be closed just when it is used again.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None),
            headers={"Authorization": f"Bearer {self._settings.key}", "Content-Type": "application/json"},
            read_bufsize=2**20,
        )

    async def stop(self) -> None:
        """End the engine."""
        if self._watching:
            self._watching.cancel()
            await self._session.close()
        await self._end()

    async def _launch(self) -> None:
        command = (sys.executable, "-m", "pocketlm.run.server.engine_process")
        # A session of its own: Ctrl-C in the terminal is for the server, which lets answers finish first.
        self._process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, start_new_session=True)
        self.starts += 1
        try:
            self._process.stdin.write(json.dumps(asdict(self._settings)).encode() + b"\n")
            said = await self._process.stdout.readline()
            if not said:
                code = await self._process.wait()
                raise PocketlmError(f"The engine died with {code} while it loaded {self._settings.path}")
            if "error" in (found := json.loads(said)):
                await self._process.wait()
                raise BadInputError(found["error"])
            self.ready = Ready(**found)
        except BaseException:
            await self._end()
            raise

    async def _end(self) -> None:
        self.ready = None
        if self._process and self._process.returncode is None:
            self._process.stdin.close()
            try:
                await asyncio.wait_for(self._process.wait(), 5)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()

    async def _watch(self) -> None:
        """Start the engine anew whenever it has died, with longer and longer pauses where it dies at once."""
        now, pause = asyncio.get_running_loop().time, 0.5
        while True:
            began = now()
            await self._process.wait()
            self.ready = None
            pause = 0.5 if now() - began > _QUICK_DEATH else min(2 * pause, _LONGEST_PAUSE)
            await asyncio.sleep(pause)
            try:
                await self._launch()
            except PocketlmError as error:
                sys.stderr.write(f"pocketlm: {error}\n")
            except (OSError, ValueError, TypeError) as error:  # no memory for a process, or a line that is none of ours
                sys.stderr.write(f"pocketlm: the engine does not start: {error}. It is tried again\n")

    @asynccontextmanager
    async def post(self, path: str, body: dict) -> AsyncIterator[aiohttp.ClientResponse]:
        """Ask the engine; leaving the context before the end stops its work.

        Raises:
            RefusalError: The engine is down (503), or refuses.
        """
        ready = self.ready  # the engine may die while it is asked
        if not ready:
            raise down()
        try:
            async with self._session.post(ready.address + path, data=json.dumps(body)) as response:
                if response.status != 200:
                    answer = json.loads(await response.read() or b"null")
                    raise from_engine(response.status, answer, ready.context, _PROMPT[path])
                yield response
        except (aiohttp.ClientError, ConnectionError, json.JSONDecodeError) as error:
            raise down() from error

    async def answer(self, path: str, body: dict) -> Answer:
        """Ask for a completion and return it whole.

        Raises:
            RefusalError: As `post`; or the engine failed on the way.
        """
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        whole = body.get("tools") and body.get("logprobs")  # which the engine refuses to stream
        async with self.post(path, body | ({"stream": False} if whole else usage)) as response:
            if whole:
                answer = await response.json()
            else:
                answer = await assemble(response.content.iter_any(), chat="chat" in path)
        if "error" in answer:
            raise from_engine(500, answer, self.ready.context if self.ready else 0)
        if not answer["choices"][0]["finish_reason"]:
            raise down()
        return answer

    async def embed(self, inputs: list[str] | list[list[int]], encoding: str) -> Answer:
        """Return the embeddings of texts or of lists of tokens, with their usage.

        Raises:
            RefusalError: As `post`.
        """
        data, tokens = [], 0
        for index, one in enumerate(inputs):
            # In a batch of texts of different lengths the engine pools over the end of the longer ones alone.
            async with self._embedding, self.post(_EMBEDDINGS, {"input": one, "encoding_format": encoding}) as response:
                found = await response.json()
            data.append(found["data"][0] | {"index": index, "object": "embedding"})
            tokens += found["usage"]["prompt_tokens"]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": self.name, "usage": usage}


def down() -> RefusalError:
    """Return the refusal of a request whose engine is not there."""
    message = "The engine is not running; it is being started again. Try again in some seconds"
    return RefusalError(503, message, code="engine_down", headers={"Retry-After": "5"})
