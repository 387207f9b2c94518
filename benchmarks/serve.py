"""The server under load, told to end, left by clients, given nonsense, and beside the bare engine.

    python benchmarks/serve.py FILE.gguf

Five checks on loopback: (a) many requests by many clients, every answer checked; (b) SIGTERM in the middle;
(c) clients that leave; (d) malformed requests; (e) decode speed through the server and straight from the engine, in
turns.

An answer is checked in one of two ways. Half of the requests carry a number that a JSON schema makes the model say:
an answer that went to the wrong client shows. The other half are free and greedy, and were answered alone before: a
token may differ only where the model was near a tie then (a batch rounds differently), anything else is wrong.
"""

import argparse
import asyncio
import json
import platform
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from common import command_line, write_results

from pocketlm.run.server.engine_process import EngineSettings
from pocketlm.run.server.local import LocalModel

NEAR_TIE = 0.1  # nats between the two likeliest tokens
TOKENS = 8
QUESTIONS = [f"What is {a} plus {b}?" for a in range(2, 8) for b in range(1, 6)] + [
    f"Name {thing}." for thing in ("a fruit", "a river", "a colour", "a city in France", "an animal", "a planet")
]


@dataclass
class Said:
    """An answer, its tokens as (token, the logs of the probabilities of the likeliest), and when it came."""

    status: int
    text: str = ""
    reason: str | None = None
    tokens: tuple[tuple[str, dict[str, float]], ...] = ()
    first: float = 0.0
    last: float = 0.0
    error: str = ""


@asynccontextmanager
async def server(file: Path, *arguments: object) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """Run `pocketlm serve` on a free port."""
    command = (sys.executable, "-m", "pocketlm", "serve", str(file), "--port", "0", *map(str, arguments))
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        line = (await process.stdout.readline()).decode()
        yield line.split(" at ")[1].split()[0], process
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


async def ask(session: aiohttp.ClientSession, address: str, stream: bool, **options: object) -> Said:
    """Ask for a chat completion; a refusal is an answer too."""
    body = {"stream": stream, "temperature": 0, "max_tokens": TOKENS} | options
    async with session.post(f"{address}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            return Said(response.status, error=(await response.json())["error"]["message"])
        if not stream:
            choice = (await response.json())["choices"][0]
            return Said(200, choice["message"]["content"], choice["finish_reason"], _tokens(choice))
        said = Said(200)
        async for line in response.content:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    return Said(200, error=event["error"]["message"])
                said.last = time.perf_counter()
                (choice,) = event["choices"]
                if choice["delta"].get("content"):
                    said.first = said.first or said.last
                    said.text += choice["delta"]["content"]
                said.tokens += _tokens(choice)
                said.reason = choice["finish_reason"] or said.reason
            elif line.startswith(b"data: [DONE]"):
                return said
        return Said(200, error="the stream has no end")


def _tokens(choice: dict) -> tuple:
    content = (choice.get("logprobs") or {}).get("content") or ()
    return tuple((one["token"], {top["token"]: top["logprob"] for top in one["top_logprobs"]}) for one in content)


def question(text: str) -> dict:
    """Return the request's part that asks."""
    return {"messages": [{"role": "user", "content": text}]}


def number_request(number: int) -> dict:
    """Return a request whose answer can be nothing but its number."""
    form = {"type": "json_schema", "json_schema": {"schema": {"const": number}}}
    return question(f"Say {number}.") | {"response_format": form, "max_tokens": 16}


def compared(said: Said, alone: Said) -> str:
    """Return `same`, `near tie` where it parts from the answer given alone at a near tie, or `wrong`."""
    for (token, _), (expected, likeliest) in zip(said.tokens, alone.tokens, strict=False):
        if token != expected:
            lead = likeliest[expected] - likeliest.get(token, -float("inf"))
            return "near tie" if lead < NEAR_TIE else "wrong"
    return "same" if said.text == alone.text and said.reason == alone.reason else "wrong"


def resident(pid: int) -> int:
    """Return the resident bytes of a process and its children."""
    status = Path(f"/proc/{pid}/status").read_text()
    own = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own + sum(resident(int(child)) for child in children)


def loopback() -> aiohttp.ClientSession:
    """Return a client with a connection of its own for every request, so that none is closed just when it is used."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600))


async def load(file: Path, requests: int, clients: int, threads: int) -> dict:
    """(a) Many requests by many clients; half of the questions were answered alone before."""
    async with server(file, "--threads", threads) as (address, process), loopback() as session:
        free = {"logprobs": True, "top_logprobs": 5, "logit_bias": {}}
        alone = {text: await ask(session, address, stream=False, **free, **question(text)) for text in QUESTIONS}
        verdicts, memory, numbers = Counter(), {}, iter(range(requests))
        warm_up = max(clients, requests // 10)

        async def client() -> None:
            for number in numbers:
                stream, text = number % 2 == 0, QUESTIONS[number % len(QUESTIONS)]
                if number % 4 < 2:
                    said = await ask(session, address, stream, **number_request(number))
                    verdict = "same" if said.text == str(number) and said.reason == "stop" else "wrong"
                else:
                    said = await ask(session, address, stream, **free, **question(text))
                    verdict = compared(said, alone[text])
                verdicts[verdict if said.status == 200 and not said.error else f"{said.status} {said.error}"] += 1
                done = sum(verdicts.values())
                if done >= warm_up and done % 50 == 0:
                    memory[done] = resident(process.pid)

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        seconds = time.perf_counter() - began
    levels = [memory[done] for done in sorted(memory)]
    return {
        "requests": requests,
        "clients": clients,
        "seconds": seconds,
        "verdicts": dict(verdicts),
        "memory_after_warm_up": levels[0],
        "memory_most": max(levels),
        "memory_growth": max(levels) / levels[0] - 1,
    }


async def overflow(file: Path, clients: int, threads: int, seconds: float = 20) -> dict:
    """More clients than slots and queue: 429 must come, and only where the queue is full."""
    slots, places = 2, 8
    verdicts, end = Counter(), time.monotonic() + seconds
    async with server(file, "--threads", threads, "--slots", slots, "--queue", places) as (address, _):

        async def client(number: int) -> None:
            async with loopback() as session:
                while time.monotonic() < end:
                    said = await ask(session, address, number % 2 == 0, **number_request(number))
                    full = f"{places} requests wait" in said.error
                    right = said.text == str(number) and said.reason == "stop"
                    verdicts["answered" if right else "429, full" if full else f"{said.status} {said.error}"] += 1
                    await asyncio.sleep(0.2 if full else 0)

        await asyncio.gather(*(client(number) for number in range(clients)))
    return {"slots": slots, "queue": places, "clients": clients, "verdicts": dict(verdicts)}


async def terminate(file: Path, clients: int, threads: int) -> dict:
    """(b) SIGTERM while all clients are being answered: what was accepted is answered, what comes later is refused."""
    verdicts = Counter()
    async with server(file, "--threads", threads) as (address, process), loopback() as session:

        async def client(number: int) -> None:
            while True:
                try:
                    said = await ask(session, address, number % 2 == 0, **number_request(number))
                except aiohttp.ClientConnectorError:
                    verdicts["not accepted: no connection"] += 1
                    return
                except aiohttp.ClientError as error:
                    verdicts[f"lost: {error!r}"] += 1
                    return
                if said.status == 503:
                    verdicts["not accepted: 503"] += 1
                    return
                right = said.text == str(number) and said.reason == "stop"
                verdicts["answered" if right else f"lost: {said.status} {said.error}"] += 1

        running = [asyncio.create_task(client(number)) for number in range(clients)]
        await asyncio.sleep(3)
        process.send_signal(signal.SIGTERM)
        before = verdicts["answered"]
        await asyncio.gather(*running)
        code = await process.wait()
    return {"answered_after": verdicts["answered"] - before, "verdicts": dict(verdicts), "exit_code": code}


async def leave(file: Path, threads: int, repeat: int) -> dict:
    """(c) A client leaves the only slot: how long until the next in line has its first token?"""
    waits = {}
    long = question("Write a very long story about the sea.") | {"max_tokens": 3000}
    async with server(file, "--threads", threads, "--slots", 1) as (address, _), loopback() as session:

        async def next_one() -> float:
            asked = time.perf_counter()
            return (await ask(session, address, stream=True, **question("Hi"))).first - asked

        waits["nobody before"] = [await next_one() for _ in range(repeat)]
        for stream in (True, False):
            waits[f"{'stream' if stream else 'whole answer'} left"] = found = []
            for _ in range(repeat):
                first = asyncio.create_task(ask(session, address, stream, **long))
                await asyncio.sleep(1)
                second = asyncio.create_task(next_one())
                await asyncio.sleep(0.3)
                assert not second.done(), "the slot was not taken"
                left = time.perf_counter()
                first.cancel()
                await second
                found.append(time.perf_counter() - left)
    return {name: {"median": statistics.median(found), "most": max(found)} for name, found in waits.items()}


def malformed(count: int, context: int) -> list[bytes]:
    """Return requests of which none is right; the same ones each time."""
    draw, made = random.Random(0), []
    valid = question("Hi") | {"max_tokens": 2, "temperature": 0.5, "stop": ["x"], "seed": 1, "stream": False}
    wrong = [[], {}, "x", -7, 1e300, [[]], {"a": 1}, [None], "9" * 100_000, True]
    wrong_for = {
        "messages": [
            *wrong, [{}], [{"role": "user"}], [{"role": "x", "content": "y"}], [{"role": "user", "content": 1}],
        ],
        "max_tokens": [*wrong, 0, 1.5], "temperature": [w for w in wrong if w is not True] + [3],
        "top_p": [*wrong, 2], "stop": [[], {}, 7, [[]], ["x"] * 99, [""]][1:], "seed": [*wrong[:4][:3], 1.5, 2**80],
        "stream": wrong[:-1], "tools": [w for w in wrong if w != []], "response_format": wrong,
        "n": [*wrong[:-1], 5], "model": ["gpt-4o", 5, []], "logit_bias": [{"a": 1}, {"1": 1000}, 5],
        "unknown": wrong,
    }  # fmt: skip
    while len(made) < count:
        text = json.dumps(valid).encode()
        kind = len(made) % 6
        if kind == 0:  # cut off
            made.append(text[: draw.randrange(len(text))])
        elif kind == 1:  # bytes that are no UTF-8
            place = text.index(b"Hi")
            made.append(text[:place] + bytes([draw.randrange(0x80, 0xC0)]) + text[place:])
        elif kind == 2:  # noise
            made.append(draw.randbytes(draw.randrange(1, 2000)))
        elif kind == 3:  # too long for the context, or for the server
            words = draw.choice([context, 3 * context, 1_200_000])
            made.append(json.dumps(question("word " * words)).encode())
        elif kind == 4:  # nested without end
            depth = draw.randrange(300, 100_000)
            made.append(text[:-1] + b', "tools": ' + b"[" * depth + b"]" * depth + b"}")
        else:
            field = draw.choice(sorted(wrong_for))
            made.append(json.dumps(valid | {field: draw.choice(wrong_for[field])}).encode())
    return made


async def nonsense(file: Path, count: int, threads: int) -> dict:
    """(d) Malformed requests: each is a 4xx in OpenAI's shape, and the server stays up."""
    statuses, wrong, context = Counter(), [], 1024
    async with server(file, "--threads", threads, "--context", context) as (address, _), loopback() as session:
        for body in malformed(count, context):
            headers = {"Content-Type": "application/json"}
            async with session.post(f"{address}/v1/chat/completions", data=body, headers=headers) as response:
                try:
                    shaped = set((await response.json())["error"]) == {"message", "type", "param", "code"}
                except (ValueError, TypeError, KeyError, aiohttp.ClientError):
                    shaped = False
                statuses[response.status] += 1
                if not (400 <= response.status < 500 and shaped):
                    wrong.append(f"{response.status} {body[:200]!r}")
        said = await ask(session, address, stream=False, **number_request(1))
        async with session.get(f"{address}/metrics") as response:
            starts = next(
                line for line in (await response.text()).splitlines() if line.startswith("pocketlm_engine_st")
            )
    return {
        "requests": count,
        "statuses": {str(status): number for status, number in sorted(statuses.items())},
        "not_refused_in_shape": wrong,
        "answers_afterwards": said.text == "1",
        "engine_starts": float(starts.rsplit(" ", 1)[1]),
    }


async def overhead(file: Path, threads: int, rounds: int, tokens: int) -> dict:
    """(e) One client's decode tokens/s through the server and straight from an engine of the same settings."""
    rates = {"engine": [], "server": []}
    options = question("Write a very long story about the sea.") | {"max_tokens": tokens, "seed": 1}
    bare = LocalModel(EngineSettings(str(file), "bare", threads=threads), queue=0)
    await bare.start()
    try:
        async with server(file, "--threads", threads) as (address, _), bare.session() as direct, loopback() as session:
            for turn in range(-1, rounds):
                for name in sorted(rates, reverse=bool(turn % 2)):
                    through = name == "server"
                    whom = (session, address) if through else (direct, bare.ready.address)
                    said = await ask(*whom, stream=True, **options)
                    if turn >= 0:  # one round to warm up
                        # The first token comes with the end of reading the prompt.
                        rates[name].append((tokens - 1) / (said.last - said.first))
    finally:
        await bare.stop()
    ratios = [mine / theirs for mine, theirs in zip(rates["server"], rates["engine"], strict=True)]
    return {
        "rounds": rounds,
        "tokens": tokens,
        "rates": rates,
        "ratio": statistics.mean(ratios),
        "ratio_deviation": statistics.stdev(ratios),
        "ratio_median": statistics.median(ratios),
    }


def page(found: dict, args: argparse.Namespace) -> list[str]:
    """Say what was found."""
    lines = ["# The server under load", "", f"`{command_line()}`", ""]
    lines += [
        f"{platform.processor() or platform.machine()}, {args.threads} threads of the engine, `{args.file.name}`.",
        "",
    ]
    if one := found.get("load"):
        lines += [
            f"**{one['requests']} requests by {one['clients']} clients**, {one['seconds']:.0f} s: {one['verdicts']}. "
            f"Resident memory of server and engine: {one['memory_after_warm_up'] / 1e6:.0f} MB after the first tenth, "
            f"at most {one['memory_most'] / 1e6:.0f} MB later (growth {one['memory_growth']:+.1%}).",
            "",
        ]
    if one := found.get("overflow"):
        lines += [
            f"**{one['clients']} clients, {one['slots']} slots, queue of {one['queue']}**: {one['verdicts']}.",
            "",
        ]
    if one := found.get("terminate"):
        lines += [
            f"**SIGTERM in the middle**: {one['verdicts']}; {one['answered_after']} answered after the signal, "
            f"exit code {one['exit_code']}.",
            "",
        ]
    if one := found.get("leave"):
        waits = "; ".join(f"{name}: {w['median']:.2f} s, at most {w['most']:.2f}" for name, w in one.items())
        lines += [
            f"**A client leaves the only slot**, until the next one's whole answer of {TOKENS} tokens: {waits}.",
            "",
        ]
    if one := found.get("nonsense"):
        lines += [
            f"**{one['requests']} malformed requests**: statuses {one['statuses']}, not a 4xx in OpenAI's shape: "
            f"{len(one['not_refused_in_shape'])}; the engine was started {one['engine_starts']:.0f} time.",
            "",
        ]
    if one := found.get("overhead"):
        rates = {name: f"{statistics.mean(r):.1f} ± {statistics.stdev(r):.1f}" for name, r in one["rates"].items()}
        lines += [
            f"**Decode, one client**, {one['rounds']} rounds of {one['tokens']} tokens in turns: "
            f"{rates['server']} tokens/s through the server, {rates['engine']} straight from the engine; "
            f"ratio {one['ratio']:.3f} ± {one['ratio_deviation']:.3f} (median {one['ratio_median']:.3f}).",
        ]
    return lines


async def measure(args: argparse.Namespace) -> dict:
    """Do the checks that were asked for, one after another."""
    checks = {
        "load": lambda: load(args.file, args.requests, args.clients, args.threads),
        "overflow": lambda: overflow(args.file, args.clients, args.threads),
        "terminate": lambda: terminate(args.file, args.clients, args.threads),
        "leave": lambda: leave(args.file, args.threads, args.rounds),
        "nonsense": lambda: nonsense(args.file, args.malformed, args.threads),
        "overhead": lambda: overhead(args.file, args.threads, args.rounds, args.tokens),
    }
    found = {}
    for name in args.only or checks:
        found[name] = await checks[name]()
        print(name, json.dumps({key: value for key, value in found[name].items() if key != "rates"}), flush=True)
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--malformed", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="Checks to do; all if not given.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serve.md"))
    args = parser.parse_args()
    found = asyncio.run(measure(args))
    write_results(args.out, page(found, args), [found])


if __name__ == "__main__":
    main()
