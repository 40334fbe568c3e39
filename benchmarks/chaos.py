"""Nothing lost, nothing doubled, nothing late, nothing left, while workers and Redis die.

    python -m benchmarks.chaos --simulated

Adapter processes ask through the queue while workers are killed at random (SIGKILL, and started again as a restart
policy would) and Redis is killed twice and comes back empty. Afterwards each question is accounted for:

    sent        questions asked
    answered    replies that a person saw, each the right one and before the deadline
    refused     a person was told at once or soon why there is no reply (busy, asleep, confused)
    lost        a person waited until the deadline for nothing, or was never told anything
    duplicated  a person saw more than one reply, or one to another's question
    late        a reply came after the deadline
    keys left   what is in Redis when all processes have stopped and a minute has passed

The last four must be 0; the exit code says whether they are. `--simulated` replaces the model with its time (tests/
standins/engine.py), so that any machine can do it in a minute or two.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from bot.queue import KEEP
from bot.settings import Settings
from tests.standins.processes import Process
from tests.standins.redis_server import RedisServer

SIMULATED = ["-m", "tests.standins.engine", "--step-ms", "4", "--tokens", "12"]
REAL = ["-m", "bot", "worker"]
DEADLINE: float = Settings.model_fields["deadline"].default
SLACK = 0.5
"""Seconds by which a busy machine may wake an adapter late at its deadline."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--simulated", action="store_true", help="an engine that only takes the time of one")
    parser.add_argument("--questions", type=int, default=10_000)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--per-second", type=float, default=150, help="questions a second, of all adapters together")
    parser.add_argument("--restarts", type=int, default=2, help="of Redis")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    folder = Path(tempfile.mkdtemp(prefix="guppy-chaos-"))
    redis = RedisServer(folder).start()
    started = 0

    def start(command: list[str]) -> Process:
        nonlocal started
        started += 1
        return Process(command, folder / f"{started}", {"GUPPY_REDIS_URL": redis.url, "GUPPY_LOG_LEVEL": "INFO"})

    worker = SIMULATED if arguments.simulated else REAL
    workers = [start(worker) for _ in range(arguments.workers)]
    each = arguments.questions // arguments.adapters
    load = [
        "--questions",
        str(each),
        "--per-second",
        str(arguments.per_second / arguments.adapters),
        "--at-once",
        "100",
    ]
    adapters = [
        start(["-m", "tests.standins.asker", "--name", f"adapter{n}", *load]) for n in range(arguments.adapters)
    ]
    seconds = arguments.questions / arguments.per_second
    begun = time.monotonic()
    restarts = [begun + seconds * (n + 1) / (arguments.restarts + 1) for n in range(arguments.restarts)]
    killed = 0
    next_kill = begun + 5
    while any(adapter.process.poll() is None for adapter in adapters):
        now = time.monotonic()
        if restarts and now > restarts[0]:
            restarts.pop(0)
            redis.restart_empty(away=chance.uniform(0.2, 2.0))
            print(f"{now - begun:5.1f} s  Redis was killed and is back, empty", flush=True)
        if now > next_kill and now < begun + seconds:
            index = chance.randrange(len(workers))
            workers[index].process.kill()
            workers[index] = start(worker)
            killed += 1
            next_kill = now + chance.uniform(2, 8)
            print(f"{now - begun:5.1f} s  worker {index + 1} was killed and started again", flush=True)
        time.sleep(0.05)
    print(f"{time.monotonic() - begun:5.1f} s  the last question is settled; stopping the workers")
    for process in workers:
        process.process.terminate()
    clean = sum(process.exit_code() == 0 for process in workers)
    return _account(redis, adapters, each * arguments.adapters, killed, clean == len(workers), arguments.simulated)


def _account(
    redis: RedisServer, adapters: list[Process], sent: int, killed: int, stopped_clean: bool, echoes: bool
) -> int:
    results = [
        json.loads(line)
        for adapter in adapters
        for line in adapter.log.read_text().splitlines()
        if line.startswith('{"question"')
    ]
    told = Counter(result["question"] for result in results)
    answered = [result for result in results if result["outcome"] == "answered"]
    waited_in_vain = [r for r in results if r["outcome"] == "asleep" and r["seconds"] >= DEADLINE - SLACK]
    refused = Counter(r["outcome"] for r in results if r["outcome"] != "answered" and r not in waited_in_vain)
    late = sum(result["seconds"] > DEADLINE + SLACK for result in answered)
    lost = sent - len(told) + len(waited_in_vain)
    doubled = sum(told.values()) - len(told)
    if echoes:  # only then can a reply be told from another's
        doubled += sum(not result["right"] for result in answered)
    times = sorted(result["seconds"] for result in answered)
    with redis.client() as client:
        patience = time.monotonic() + KEEP / 1000 + 5
        while client.dbsize() and time.monotonic() < patience:
            time.sleep(0.5)
        left = client.dbsize()
    redis.kill()
    reasons = ", ".join(f"{count} {reason}" for reason, count in refused.items())
    print(f"\nworkers killed {killed}\nsent       {sent}\nanswered   {len(answered)}")
    print(f"           p50 {times[len(times) // 2]:.3f} s, p99 {times[len(times) * 99 // 100]:.3f} s")
    print(f"refused    {refused.total()}{f'  ({reasons})' if reasons else ''}")
    print(f"lost       {lost}\nduplicated {doubled}\nlate       {late}\nkeys left  {left}")
    if not stopped_clean:
        print("a worker did not stop cleanly")
    return 0 if (lost, doubled, late, left) == (0, 0, 0, 0) and stopped_clean else 1


if __name__ == "__main__":
    sys.exit(main())
