"""Questions on their way from the adapters to the workers and replies on their way back, over Redis Streams.

What holds, whoever dies (an adapter, a worker, Redis, any of them at any moment):

- **At least once to a worker.** A question that was accepted is worked on until it is answered, expires, or was given
  up after its second try. A worker's death costs a retry; a Redis that restarts empty gets the open questions again.
- **At most one visible reply.** The first worker to answer takes the question off the queue in the same step; whoever
  comes later finds it gone. The adapter that asks is the only one that can read the reply, and waits for one.
- **Nothing after the deadline.** A question's text is a key that Redis itself removes at the deadline, and an answer
  needs that key. All times are Redis' clock or relative; no two hosts' clocks are compared.
- **No text left.** A question's text and its reply live in that one key, one after the other: gone when the reply is
  collected or the question withdrawn, gone at the deadline if nobody is left to do it. The streams carry no text.
- **No identity.** An id is random; who asked, where and in which chat stays in the adapter's memory.

Every key of the service, and how long it lives. All share one hash tag, so a cluster keeps them on one node.

    key                        type    what                              lives until
    {guppy}:requests           stream  v, id, replies, deadline          entry: answered, given up or expired
                                       of every open question            key: 60 s without adapters and workers
    {guppy}:text:ID            string  the prompt, then the reply        collected, withdrawn, or the deadline
    {guppy}:replies:ADAPTER    stream  v, id, outcome of what is ready   entry: collected; key: the last deadline in it
    {guppy}:workers            zset    worker -> last sign of progress   member: 5 s; key: 60 s without workers
    {guppy}:limit:seen:HASH    string  a message was taken               3 minutes              (bot/limits.py)
    {guppy}:limit:open:HASH    string  a person's question is open       answered, or the deadline
    {guppy}:limit:rate:HASH    string  how much a person asked lately    a minute or so
    {guppy}:limit:told:HASH    string  a person was told why not         a minute

Every version of this protocol keeps the names and meaning of `v`, `id`, `replies` and `deadline` in a request, so that
old and new processes can share a queue: a worker refuses what it can't read as busy, and the person tries again.
"""

import asyncio
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

from bot import logs, metrics
from bot.fish import Asleep, Busy, Confused, FishError, Reply
from bot.link import BLOCK, Away, Full, Link, Script
from bot.settings import Settings

VERSION = b"1"
TAG = "{guppy}"
REQUESTS = f"{TAG}:requests"
WORKERS = f"{TAG}:workers"
GROUP = "workers"
CONSUMER = "worker"
"""One name for all workers: whose an entry is doesn't matter, only how long nobody has shown progress on it."""

TRIES = 2
"""Deliveries of one question. A second worker that dies of it should be the last."""
CLAIM_AFTER = 4000
"""Milliseconds without a sign of progress after which a question is taken over. A worker gives one each second."""
KEEP = 60_000
"""Milliseconds for which the queue's own keys outlive the last process that uses them."""
AWAKE = 5_000
"""Milliseconds for which a worker counts as awake after its last sign."""
PATIENCE = 5.0
"""Seconds for which open questions wait for a lost Redis to come back; then all of them fail at once."""
COLLECT = 64
"""Replies collected in one step."""

log = logs.get("queue")


def _text(id: str) -> str:
    return f"{TAG}:text:{id}"


class Outcome(StrEnum):
    """What a worker says of a question."""

    ANSWERED = "answered"
    CUT = "cut"
    """Answered, but the prompt was longer than the model's window."""
    BUSY = "busy"
    CONFUSED = "confused"
    """Given up: every worker that tried failed or died."""


_ERRORS: dict[str, type[FishError]] = {"busy": Busy, "confused": Confused, "asleep": Asleep}


# --- the steps, each atomic in Redis -------------------------------------------------------------------------------

_NOW = """
local function now()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
local function outlive(key, ms)
  if redis.call('PTTL', key) < ms then redis.call('PEXPIRE', key, string.format('%.0f', ms)) end
end
local function field(entry, name)
  for i = 1, #entry[2], 2 do
    if entry[2][i] == name then return entry[2][i + 1] end
  end
  return nil
end
"""

ENQUEUE = Script(
    _NOW
    + """
-- requests, text, workers | group, version, id, replies, prompt, ms left, cap, keep, awake
local requests, text, workers = KEYS[1], KEYS[2], KEYS[3]
local left, cap, keep = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
if redis.call('EXISTS', text) == 1 then return 'duplicate' end
local at = now()
while true do  -- the oldest come first and all wait equally long, so the expired stand at the head
  local head = redis.call('XRANGE', requests, '-', '+', 'COUNT', 1)[1]
  local deadline = head and tonumber(field(head, 'deadline'))
  if not deadline or deadline > at then break end
  redis.call('XACK', requests, ARGV[1], head[1])
  redis.call('XDEL', requests, head[1])
end
if redis.call('XLEN', requests) >= cap then
  local awake = redis.call('ZCOUNT', workers, string.format('%.0f', at - ARGV[9]), '+inf')
  return awake > 0 and 'busy' or 'asleep'
end
if redis.call('EXISTS', requests) == 0 then
  redis.call('XGROUP', 'CREATE', requests, ARGV[1], '0', 'MKSTREAM')
end
redis.call('SET', text, ARGV[5], 'PX', left)
redis.call('XADD', requests, '*', 'v', ARGV[2], 'id', ARGV[3], 'replies', ARGV[4],
           'deadline', string.format('%.0f', at + left))
outlive(requests, math.max(keep, left))
return 'queued'
"""
)

TAKE = Script(
    _NOW
    + """
-- text...                                          -> now in ms, each text or nothing
return {string.format('%.0f', now()), redis.call('MGET', unpack(KEYS))}
"""
)

ANSWER = Script(
    _NOW
    + """
-- requests, text, replies | group, entry, version, id, outcome, reply
local requests, text, replies = KEYS[1], KEYS[2], KEYS[3]
if redis.call('XACK', requests, ARGV[1], ARGV[2]) == 0 then return 'overtaken' end
redis.call('XDEL', requests, ARGV[2])
local left = redis.call('PTTL', text)
if left <= 0 then return 'expired' end
redis.call('SET', text, ARGV[6], 'PX', left)
redis.call('XADD', replies, '*', 'v', ARGV[3], 'id', ARGV[4], 'outcome', ARGV[5])
outlive(replies, left)
return 'answered'
"""
)

DROP = Script(
    """
-- requests | group, entry
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
return redis.call('XDEL', KEYS[1], ARGV[2])
"""
)

COLLECT_REPLIES = Script(
    """
-- replies, text... | entry...                      -> each reply or nothing
local texts = {}
for i = 2, #KEYS do
  texts[i - 1] = redis.call('GET', KEYS[i])
  redis.call('DEL', KEYS[i])
end
redis.call('XDEL', KEYS[1], unpack(ARGV))
return texts
"""
)

TEND = Script(
    _NOW
    + """
-- requests, workers | group, consumer, worker, claim after ms, claim how many, keep, awake, entry in hand...
local requests, workers, group, consumer = KEYS[1], KEYS[2], ARGV[1], ARGV[2]
local keep, at = tonumber(ARGV[6]), now()
-- A full Redis refuses a script's first write if that takes memory; this one doesn't, and work must go on.
redis.call('ZREMRANGEBYSCORE', workers, '-inf', string.format('(%.0f', at - ARGV[7]))
redis.call('ZADD', workers, string.format('%.0f', at), ARGV[3])
outlive(workers, keep)
redis.pcall('XGROUP', 'CREATE', requests, group, '0', 'MKSTREAM')  -- an error where it is there already
outlive(requests, keep)
if #ARGV > 7 then  -- still being worked on
  local claim = {'XCLAIM', requests, group, consumer, 0}
  for i = 8, #ARGV do claim[#claim + 1] = ARGV[i] end
  claim[#claim + 1] = 'JUSTID'
  redis.call(unpack(claim))
end
local taken = {}
if tonumber(ARGV[5]) > 0 then
  for _, left in ipairs(redis.call('XPENDING', requests, group, 'IDLE', ARGV[4], '-', '+', ARGV[5])) do
    local entry = redis.call('XCLAIM', requests, group, consumer, ARGV[4], left[1])[1]
    if entry then
      taken[#taken + 1] = {entry[1], entry[2], left[4]}
    else  -- its text and fields are gone, only its name was left
      redis.call('XACK', requests, group, left[1])
    end
  end
end
local head, age = redis.call('XRANGE', requests, '-', '+', 'COUNT', 1)[1], 0
if head then age = at - string.match(head[1], '^%d+') end
return {redis.call('XLEN', requests), age, redis.call('ZCARD', workers), taken}
"""
)


# --- the adapter's end ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Question:
    id: str
    prompt: bytes = field(repr=False)
    deadline: float
    """In this process's `time.monotonic`."""
    reply: asyncio.Future[Reply]


_HALF_CHARACTERS = re.compile("[\ud800-\udfff]")


class QueuedFish:
    """The fish at the far end of the queue: any number of questions at once over two connections.

    To be entered (`async with`) before it is asked; that waits for Redis, and raises `Refusal` if Redis refuses us.
    """

    def __init__(self, settings: Settings) -> None:
        self._link = Link(settings)
        self._deadline = settings.deadline
        self._cap = settings.queue_cap
        self._replies = f"{TAG}:replies:{secrets.token_hex(16)}"
        self._open: dict[str, _Question] = {}
        self._away_since: float | None = None
        self._in_doubt = False
        self._listener: asyncio.Task[None] | None = None
        self._withdrawals: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "QueuedFish":
        await self._link.ready()
        self._listener = asyncio.create_task(self._listen(), name="replies from the queue")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._listener is not None:
            self._listener.cancel()
            with suppress(asyncio.CancelledError):
                await self._listener
        self._fail_open()
        if self._withdrawals:
            await asyncio.wait(self._withdrawals)
        with suppress(Away):  # the key ends by itself
            await self._link.call("DEL", self._replies)
        await self._link.aclose()

    async def ask(self, prompt: str) -> Reply:
        """As `Fish.ask`: a reply within the deadline of the settings, or a `FishError`."""
        if self._given_up():
            raise Asleep
        started = time.monotonic()
        question = _Question(
            secrets.token_hex(16),
            _HALF_CHARACTERS.sub("\ufffd", prompt).encode(),  # as the fish hears them
            started + self._deadline,
            asyncio.get_running_loop().create_future(),
        )
        self._open[question.id] = question
        outcome = "cancelled"
        try:
            async with asyncio.timeout(self._deadline):
                await self._submit(question)
                reply = await question.reply
            outcome = "answered"
            return reply
        except TimeoutError:
            outcome = "late"
            raise Asleep from None
        except FishError as error:
            outcome = error.line
            raise
        finally:
            del self._open[question.id]
            if outcome == "cancelled":
                withdrawal = asyncio.create_task(self._withdraw(question.id))
                self._withdrawals.add(withdrawal)
                withdrawal.add_done_callback(self._withdrawals.discard)
            log.info("asked", id=question.id, outcome=outcome, seconds=round(time.monotonic() - started, 3))

    async def _submit(self, question: _Question) -> None:
        """Put the question on the queue; a refusal becomes its reply. What Redis can't take now is put there later."""
        left = int((question.deadline - time.monotonic()) * 1000)
        if left <= 0 or question.reply.done():
            return
        try:
            answer: bytes = await self._link.run(
                ENQUEUE,
                [REQUESTS, _text(question.id), WORKERS],
                *(GROUP, VERSION, question.id, self._replies, question.prompt, left, self._cap, KEEP, AWAKE),
            )
        except Full:
            _refuse(question, Busy())
        except Away:
            self._in_doubt = True
        else:
            # "duplicate": it got there although the connection broke before we heard so.
            if error := _ERRORS.get(answer.decode()):
                _refuse(question, error())

    async def _withdraw(self, id: str) -> None:
        """Nobody waits any more: the text goes now, and the worker that meets its id drops it."""
        with suppress(Away):  # it goes at the deadline
            await self._link.call("DEL", _text(id))

    async def _listen(self) -> None:
        """Hand each reply to who waits for it, until cancelled; after each loss, submit again what is open."""
        pause = 0.05
        while True:
            try:
                self._in_doubt = False
                # A Redis that came back empty has lost the questions, one that did not refuses the duplicates; and
                # replies that were collected when the connection broke are lost as well, so ask anew.
                await asyncio.gather(*(self._submit(question) for question in list(self._open.values())))
                if self._in_doubt:  # a replica, say, lets us read and not write
                    raise Away
                while not self._in_doubt:
                    answer = await self._link.block(
                        *("XREAD", "COUNT", COLLECT, "BLOCK", BLOCK, "STREAMS", self._replies, "0")
                    )
                    self._away_since, pause = None, 0.05
                    if answer:
                        await self._collect(answer[0][1])
            except Away:
                if self._away_since is None:
                    self._away_since = time.monotonic()
            except Exception as error:  # a reply that is a bug must not cost everybody else theirs
                log.error("replies failed", exc_info=error)
            if self._given_up():
                self._fail_open()
            await asyncio.sleep(pause)
            pause = min(pause * 2, 1.0)

    async def _collect(self, notices: Sequence[tuple[bytes, Sequence[bytes]]]) -> None:
        entries = [(entry, dict(_pairs(fields))) for entry, fields in notices]
        ids = [fields.get(b"id", b"").decode("ascii", "replace") for _, fields in entries]
        texts = await self._link.run(
            COLLECT_REPLIES, [self._replies, *map(_text, ids)], *(entry for entry, _ in entries)
        )
        for id, (_, fields), text in zip(ids, entries, texts, strict=True):
            question = self._open.get(id)
            if question is None or question.reply.done():
                continue  # expired or withdrawn meanwhile
            if text is None:
                self._in_doubt = True
                continue
            outcome = fields.get(b"outcome", b"").decode("ascii", "replace")
            if fields.get(b"v") == VERSION and outcome in (Outcome.ANSWERED, Outcome.CUT) and text:
                question.reply.set_result(Reply(text.decode("utf-8", "replace"), outcome == Outcome.CUT))
            else:
                _refuse(question, _ERRORS.get(outcome, Busy)())

    def _given_up(self) -> bool:
        return self._away_since is not None and time.monotonic() - self._away_since > PATIENCE

    def _fail_open(self) -> None:
        for question in self._open.values():
            _refuse(question, Asleep())


def _refuse(question: _Question, error: FishError) -> None:
    if not question.reply.done():
        question.reply.set_exception(error)


# --- the worker's end ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """One question as a worker holds it. `entry` names it on the queue, `id` in the logs of both ends."""

    entry: bytes
    id: str
    replies: str
    prompt: str = field(default="", repr=False)
    waited: float = 0.0
    """Seconds from the queue's acceptance to this worker."""
    tries: int = 1


class Unreadable(Exception):
    """An entry that no version of an adapter writes."""


class UnknownVersion(Exception):
    """An entry of another version of the protocol; `request` is what every version says."""

    def __init__(self, request: Request) -> None:
        super().__init__()
        self.request = request


_ID = re.compile(rb"[0-9a-f]{32}")
_REPLIES = re.compile(re.escape(TAG).encode() + rb":replies:[0-9a-f]{32}")


def decode(entry: bytes, fields: Sequence[bytes] | None, tries: int = 1) -> Request:
    """The request in a stream entry (names and values in turn). Raises `Unreadable` or `UnknownVersion`."""
    named = dict(_pairs(fields or ()))
    id, replies = named.get(b"id", b""), named.get(b"replies", b"")
    # Both become names of keys, so they must be what an adapter makes and nothing else.
    if not _ID.fullmatch(id) or not _REPLIES.fullmatch(replies):
        raise Unreadable
    request = Request(entry, id.decode(), replies.decode(), tries=tries)
    if named.get(b"v") != VERSION:
        raise UnknownVersion(request)
    return request


def _pairs(fields: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    return zip(fields[::2], fields[1::2], strict=False)


class Intake:
    """A worker's end of the queue. Every method raises `Away` when Redis does not serve."""

    def __init__(self, settings: Settings) -> None:
        self._link = Link(settings)
        self._name = secrets.token_hex(8)

    async def ready(self) -> None:
        """As `Link.ready`."""
        await self._link.ready()

    async def take(self, count: int) -> list[Request]:
        """Up to `count` new questions; waits for one up to `link.BLOCK`, then returns none."""
        answer = await self._link.block(
            *("XREADGROUP", "GROUP", GROUP, CONSUMER, "COUNT", count, "BLOCK", BLOCK, "STREAMS", REQUESTS, ">")
        )
        return await self._read([(entry, fields, 1) for entry, fields in answer[0][1]]) if answer else []

    async def tend(self, in_hand: Sequence[Request], claim: int) -> list[Request]:
        """Show progress on the questions `in_hand`, and take over up to `claim` that nobody shows progress on.

        To be called each second in which the engine makes progress. Makes the queue's group where it is missing.
        """
        depth, age, workers, taken = await self._link.run(
            TEND,
            [REQUESTS, WORKERS],
            *(GROUP, CONSUMER, self._name, CLAIM_AFTER, claim, KEEP, AWAKE),
            *(request.entry for request in in_hand),
        )
        metrics.QUEUE_DEPTH.set(depth)
        metrics.QUEUE_AGE.set(age / 1000)
        metrics.WORKERS.set(workers)
        return await self._read([(entry, fields, 1 + tries) for entry, fields, tries in taken])

    async def answer(self, request: Request, reply: Reply) -> str:
        """Give `reply`: "answered"; or "expired", or "overtaken" when another worker was first."""
        return await self._settle(request, Outcome.CUT if reply.prompt_cut else Outcome.ANSWERED, reply.text)

    async def give_up(self, request: Request) -> None:
        """Say that no worker can answer this."""
        await self._settle(request, Outcome.CONFUSED)
        metrics.WORK.labels("failed").inc()

    async def aclose(self) -> None:
        with suppress(Away):  # it is forgotten after AWAKE
            await self._link.call("ZREM", WORKERS, self._name)
        await self._link.aclose()

    async def _read(self, entries: Sequence[tuple[bytes, Sequence[bytes] | None, int]]) -> list[Request]:
        """What is left to work on of stream entries; the others are settled here."""
        readable: list[Request] = []
        for entry, fields, tries in entries:
            try:
                request = decode(entry, fields, tries)
            except Unreadable:
                await self._drop(entry, "unreadable")
            except UnknownVersion as unknown:
                await self._settle(unknown.request, Outcome.BUSY)
                metrics.WORK.labels("unknown_version").inc()
            else:
                if tries > TRIES:
                    await self.give_up(request)
                else:
                    readable.append(request)
        if not readable:
            return []
        now, texts = await self._link.run(TAKE, [_text(request.id) for request in readable])
        requests = []
        for request, text in zip(readable, texts, strict=True):
            if text is None:
                await self._drop(request.entry, "expired")
                continue
            waited = (int(now) - int(request.entry.split(b"-")[0])) / 1000
            metrics.QUEUE_WAIT.observe(waited)
            requests.append(
                Request(
                    request.entry, request.id, request.replies, text.decode("utf-8", "replace"), waited, request.tries
                )
            )
        metrics.RETRIES.inc(sum(request.tries > 1 for request in requests))
        return requests

    async def _settle(self, request: Request, outcome: Outcome, text: str = "") -> str:
        answer: bytes = await self._link.run(
            ANSWER,
            [REQUESTS, _text(request.id), request.replies],
            *(GROUP, request.entry, VERSION, request.id, outcome.value, text.encode("utf-8", "replace")),
        )
        settled = answer.decode()
        if outcome in (Outcome.ANSWERED, Outcome.CUT) or settled != "answered":
            metrics.WORK.labels(settled).inc()
        return settled

    async def _drop(self, entry: bytes, why: str) -> None:
        await self._link.run(DROP, [REQUESTS], GROUP, entry)
        metrics.WORK.labels(why).inc()
        log.info("dropped", why=why)
