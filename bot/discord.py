"""Guppy on Discord: what people say to him goes to a `Fish`, what it replies goes back to where it was said.

He listens where he is called: an @mention (never @everyone, @here or a role), a direct message, a reply to him,
`/guppy`, and "Ask Guppy" in a message's menu. For all of these Discord shows a bot the words without any privileged
intent. Home channels, where he answers everything, are the exception and ask for the Message Content intent.

What holds: one reply at most to each question, also after a reconnect that replays events; nobody is pinged and no
markup or link in a reply does anything; a reply that Discord refuses is counted and dropped, never retried against a
refusal; bots, webhooks and system messages get no answer, ever; nothing of a message is kept.

`build_client(settings, fish)` makes the client without starting it, `serve` runs it, `invite` makes the links by which
people add it.
"""

import asyncio
import re
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
import discord
import yarl
from discord import app_commands
from discord.ext.commands import CooldownMapping
from discord.http import Route

from bot import health, limits, logs, metrics, voice
from bot.fish import Asleep, Busy, Confused, Fish, FishError, Reply
from bot.limits import Verdict
from bot.refusal import ExitCode, Refusal
from bot.settings import Settings

PERMISSIONS = discord.Permissions(
    view_channel=True, send_messages=True, send_messages_in_threads=True, read_message_history=True
)
"""All he needs: to see where he is called, and to answer as a reply (which takes the history)."""
LONGEST_QUESTION = 4000
"""Characters that `/guppy` takes: Discord's longest message."""
LONGEST_REPLY = 2000
"""Characters of a bot's message at most."""
STALE = 120.0
"""Seconds after which a question is not answered any more: who reads a reply to what was said before the outage?"""
REPLAYED = 86_400.0
"""Seconds beyond which a message's age means nothing: Discord replays minutes, and another server counts otherwise."""
AT_ONCE = 256
"""Questions that this process has open at most; one more is refused as busy."""
TYPING = 8.0
"""Seconds between two typing signs. Each shows for ten."""
DELIVERY = 5.0
"""Seconds for delivering a reply at least, when thinking has taken most of the deadline."""
KNOCK = 10.0
"""Seconds between two looks whether a fish that slept is awake again."""
SYNC = 15.0
"""Seconds for bringing the commands up to date before going on without."""
LASTING = 3600.0
"""Seconds of a connection after which the next start may come at once again."""
DRAIN = 6.0
"""Seconds for the questions in hand when asked to stop."""
CLOSE = 1.5
"""Seconds for a farewell to the gateway, which may not say a word any more."""

_DISCORD = str(Settings.model_fields["discord_api_base"].default)
_NETWORK = (aiohttp.ClientError, OSError)  # OSError: TimeoutError too

log = logs.get("discord")

discord.VoiceClient.warn_nacl = discord.VoiceClient.warn_dave = False  # that voice would need more: he only writes


def build_client(settings: Settings, fish: Fish) -> "Guppy":
    """The client of `settings`, not started, which answers with `fish`."""
    Route.BASE = settings.discord_api_base
    return Guppy(settings, fish)


async def serve(settings: Settings, fish: Fish, stop: asyncio.Event) -> None:
    """Be on Discord until `stop` is set, then answer what is in hand. Raises `Refusal` when a person must act.

    Waits with back-off for a Discord that is away. Every start of a session counts against 1,000 a day, beyond which
    Discord resets the token; hence the long pauses.
    """
    pause = 1.0
    while not stop.is_set():
        began = time.monotonic()
        client = build_client(settings, fish)
        async with health.pulse("discord", client.progressing):
            running = asyncio.create_task(client.run_until_closed(), name="discord")
            stopped = asyncio.create_task(stop.wait())
            try:
                await asyncio.wait([running, stopped], return_when=asyncio.FIRST_COMPLETED)
                if stop.is_set():
                    await client.finish(DRAIN)
                    return
                running.result()
            except (discord.DiscordException, KeyError, *_NETWORK) as error:
                if refusal := _refusal(error, settings):
                    raise refusal from None
                if time.monotonic() - began > LASTING:
                    pause = 1.0
                log.warning("discord is away", seconds=pause, exc_info=error)
            finally:
                for task in (running, stopped):
                    task.cancel()
                await asyncio.gather(running, stopped, return_exceptions=True)
                with suppress(TimeoutError):
                    await asyncio.wait_for(client.close(), CLOSE)
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), pause)
        pause = min(pause * 2, 300.0)


async def invite(settings: Settings) -> str:
    """How to add the bot of the token: the links into a server and to oneself, a line each. Raises `Refusal`."""
    client = build_client(settings, _NoFish())
    try:
        async with client:
            await client.http.static_login(client.token)
            application = (await client.application_info()).id
    except (discord.DiscordException, *_NETWORK) as error:
        raise _refusal(error, settings) or Refusal(
            f"Discord does not answer at {settings.discord_api_base}; try again later.", ExitCode.TOKEN
        ) from None
    to_server = _link_to_server(application)
    to_oneself = discord.utils.oauth_url(application, scopes=("applications.commands",)) + "&integration_type=1"
    return (
        f"Add Guppy to a server that you manage:\n{to_server}\n"
        f"Add Guppy to yourself, to use /guppy everywhere:\n{to_oneself}"
    )


def _link_to_server(application: int) -> str:
    return discord.utils.oauth_url(application, permissions=PERMISSIONS, scopes=("bot", "applications.commands"))


class _NoFish:
    async def ask(self, prompt: str) -> Reply:
        raise Asleep


def _refusal(error: Exception, settings: Settings) -> Refusal | None:
    """What a person must change before another start could go better; None when waiting may help."""
    portal = "https://discord.com/developers/applications"
    code = error.code if isinstance(error, discord.ConnectionClosed) else None
    if isinstance(error, discord.LoginFailure) or code == 4004:
        return Refusal(
            f"Discord refuses GUPPY_DISCORD_TOKEN. Make a new one with Reset Token on the Bot page of {portal}.",
            ExitCode.TOKEN,
        )
    if isinstance(error, discord.PrivilegedIntentsRequired) or code == 4014:
        return Refusal(
            "GUPPY_DISCORD_HOME_CHANNELS needs the Message Content intent: switch it on on the Bot page of "
            f"{portal}, or leave the setting out.",
            ExitCode.TOKEN,
        )
    if code in (4010, 4011):
        return Refusal(
            "Discord refuses this number of shards: leave GUPPY_DISCORD_SHARDS out to take what it recommends.",
            ExitCode.SETTINGS,
        )
    elsewhere = settings.discord_api_base != _DISCORD
    if elsewhere and isinstance(error, discord.HTTPException) and 400 <= error.status < 500 and error.status != 429:
        return Refusal(
            f"{settings.discord_api_base} answers {error.status} to the login. Check GUPPY_DISCORD_API_BASE.",
            ExitCode.SETTINGS,
        )
    return None


def _kind(error: BaseException) -> dict[str, Any]:
    """What a log may say of an error of Discord's: never its message, which may quote ours."""
    kind: dict[str, Any] = {"error": type(error).__name__}
    if isinstance(error, discord.HTTPException):
        kind |= {"status": error.status, "code": error.code}
    return kind


# --- what is said, on the way in and on the way out ------------------------------------------------------------------

_NAMES: list[tuple[re.Pattern[str], str]] = [
    (re.compile(r"<@!?\d+>"), "somebody"),
    (re.compile(r"<@&\d+>"), "everybody"),
    (re.compile(r"<#\d+>|<id:\w+>"), "over there"),
    (re.compile(r"<a?:(\w+):\d+>"), r":\1:"),
    (re.compile(r"</([^:>]+):\d+>"), r"/\1"),
    (re.compile(r"<t:-?\d+(?::\w)?>"), "some time"),
]
"""Discord's markup for people and things. What it names is an id, which no fish needs and no queue should carry."""


def _words(content: str, me: int) -> str:
    """What was said to him: without his own mention, with words for the ids of others; empty if nothing is visible."""
    text = re.sub(rf"<@!?{me}>", " ", content)
    for markup, word in _NAMES:
        text = markup.sub(word, text)
    return text.strip() if any(c.isprintable() and not c.isspace() for c in text) else ""


def _plain(text: str) -> str:
    """`text` so that Discord shows it as it is: no markup, no mention, no link."""
    text = discord.utils.escape_mentions(discord.utils.escape_markdown(text, ignore_links=False))
    text = re.sub(r"(?i)(https?:)(?=//)|(discord)(?=\.gg/)", "\\g<0>\u200b", text)
    return text[:LONGEST_REPLY]


def _speech(reply: Reply, locale: str | None) -> str:
    text = _plain(reply.text.strip()) or voice.say(Confused.line, locale)
    if reply.prompt_cut:
        aside = "\n-# " + voice.say("prompt_cut", locale)
        text = text[: LONGEST_REPLY - len(aside)] + aside
    return text


def _wordless(message: discord.Message, me: int) -> str:
    """The line for a message in which there is nothing to read."""
    if message.poll is not None:
        return "poll"
    if message.stickers:
        return "sticker"
    if message.attachments:
        first = message.attachments[0]
        kind = (first.content_type or "").split("/")[0]
        if first.is_voice_message():
            return "voice"
        return {"image": "photo", "video": "video", "audio": "voice"}.get(kind, "file")
    if message.message_snapshots or message.embeds:
        return "something_else"
    if _replies_to(message, me) and not re.search(rf"<@!?{me}>", message.content):
        return "unheard"
    return "nothing_said"


def _replies_to(message: discord.Message, me: int) -> bool:
    parent = message.reference.resolved if message.reference is not None else None
    return isinstance(parent, discord.Message) and parent.author.id == me


# --- the client ------------------------------------------------------------------------------------------------------


class DeliveryError(Exception):
    """The reply was not delivered: Discord refused it, or did not take it in time."""


@dataclass(frozen=True, slots=True)
class _Question:
    """Something said to him, and the way back: `say`, which raises `DeliveryError`."""

    id: int
    person: int
    words: str
    wordless: str
    """The line to say where there are no words."""
    locale: str | None
    say: Callable[[str], Awaitable[None]]
    answer_always: bool
    """Also where there is no reply and no notice is due: Discord shows a command as failed that nothing answers."""
    typing_in: discord.abc.Messageable | None


class Guppy(discord.AutoShardedClient):
    """One connection to Discord for a `Fish`. Caches no messages and no members."""

    def __init__(self, settings: Settings, fish: Fish) -> None:
        intents = discord.Intents.none()
        intents.guilds = intents.guild_messages = intents.dm_messages = True
        intents.message_content = bool(settings.discord_home_channels)
        self._presence = discord.CustomActivity(voice.say("presence"))
        super().__init__(
            intents=intents,
            # 1 until Discord recommends another number (in `connect`).
            shard_count=settings.discord_shards or 1,
            allowed_mentions=discord.AllowedMentions.none(),
            activity=self._presence,
            status=discord.Status.online,
            max_messages=None,
            member_cache_flags=discord.MemberCacheFlags.none(),
            chunk_guilds_at_startup=False,
            max_ratelimit_timeout=30.0,
            http_trace=_count_rate_limits(),
        )
        self.tree = _commands(self)
        self.token = settings.discord_token.get_secret_value() if settings.discord_token else ""
        self._settings = settings
        self._fish = fish
        self._limiter = limits.limiter(settings, "discord")
        self._breaker = _Breaker()
        salt = secrets.token_bytes(16)  # a person's id isn't kept, here neither
        self._cooldowns: CooldownMapping[discord.Interaction] = CooldownMapping.from_cooldown(
            settings.person_burst,
            settings.person_burst * 60.0 / settings.person_per_minute,
            lambda interaction: hash((salt, interaction.user.id)),
        )
        self._in_hand: set[asyncio.Task[Any]] = set()
        self._thinking = 0
        self._stopping = False
        self._asleep = False
        self._background: set[asyncio.Task[None]] = set()

    # -- life

    async def run_until_closed(self) -> None:
        """Log in and stay connected; the caller closes. Raises what discord.py raises."""
        await self.login(self.token)
        await self.connect()

    async def setup_hook(self) -> None:
        assert self.application_id is not None
        log.info("who manages a server adds him here", link=_link_to_server(self.application_id))
        homes = self._settings.discord_home_channels
        if homes:
            log.info("home channels: every message there is read, with the Message Content intent", channels=len(homes))
            flags = self.application_flags
            # Asked before the gateway is, because each refused start of a session counts. A new application has no
            # flags at all.
            if flags.value and not (flags.gateway_message_content or flags.gateway_message_content_limited):
                raise discord.PrivilegedIntentsRequired(None)
        else:
            log.info("no privileged intent: he hears what is said to him, and nothing else")
        await self.tree.set_translator(_Translator())
        await self._sync()

    async def connect(self, *, reconnect: bool = True) -> None:
        gateway = self._settings.discord_gateway_url
        try:
            shards, named, starts = await self.http.get_bot_gateway()
        except (discord.GatewayNotFound, KeyError, TypeError) as error:
            if gateway is None:
                raise
            log.warning("the API names no gateway; one shard at GUPPY_DISCORD_GATEWAY_URL", **_kind(error))
        else:
            self.shard_count = self._settings.discord_shards or shards
            if self._settings.discord_api_base != _DISCORD:
                gateway = gateway or named
            if starts.get("remaining", 1000) < self.shard_count:
                seconds = starts.get("reset_after", 0) / 1000
                log.warning("today's starts of sessions are used up; waiting", seconds=seconds)
                await asyncio.sleep(seconds)
        if gateway is not None:
            self._go_to(gateway)
        await super().connect(reconnect=reconnect)

    def _go_to(self, gateway: str) -> None:
        """Open every connection there: the first, those that resume, those after a lost session."""
        ws_connect = self.http.ws_connect

        async def elsewhere(url: str, *, compress: int = 0) -> aiohttp.ClientWebSocketResponse:
            there = yarl.URL(gateway).update_query(yarl.URL(url).query)
            return await ws_connect(str(there), compress=compress)

        self.http.ws_connect = elsewhere  # type: ignore[method-assign]
        # Discord says which shard is ready; another gateway with a single one may leave it out.
        ready = self._connection.parsers["READY"]
        self._connection.parsers["READY"] = lambda data: ready({"shard": [0, 1], **data})

    async def on_ready(self) -> None:
        log.info("awake", shards=self.shard_count, servers=len(self.guilds))

    def progressing(self) -> bool:
        """Whether every shard is connected and has had its say."""
        shards = self.shards.values()
        return self.is_ready() and bool(shards) and not any(shard.is_closed() for shard in shards)

    async def finish(self, within: float) -> None:
        """Take no more questions; wait for those in hand, `within` seconds at most."""
        self._stopping = True
        log.info("stopping", in_hand=len(self._in_hand))
        if self._in_hand:
            await asyncio.wait(self._in_hand, timeout=within)

    async def close(self) -> None:
        for task in self._background:
            task.cancel()
        await self._limiter.aclose()
        await super().close()

    async def on_error(self, event_method: str, /, *args: Any, **kwargs: Any) -> None:
        log.error("failed", at=event_method, exc_info=True)

    async def _sync(self) -> None:
        """Register the commands if they are not what Discord has: 200 creations a day, and each start would count."""
        try:
            async with asyncio.timeout(SYNC):
                translator = self.tree.translator
                assert translator is not None
                assert self.application_id is not None
                ours = [await c.get_translated_payload(self.tree, translator) for c in self.tree.get_commands()]
                path = Route("GET", "/applications/{id}/commands", id=self.application_id)
                try:
                    theirs = await self.http.request(path, params={"with_localizations": "true"})
                except discord.HTTPException:
                    theirs = None
                if _fingerprint(theirs) == _fingerprint(ours):
                    log.info("commands are up to date")
                    return
                await self.tree.sync()
                log.info("commands registered", commands=len(ours))
        except (discord.DiscordException, *_NETWORK) as error:
            log.warning("could not register the commands; mentions, replies and messages work", **_kind(error))

    # -- whether a worker answers, shown as presence

    async def on_shard_ready(self, shard_id: int) -> None:
        if self._asleep:
            await self._show(discord.Status.idle)

    def _set_asleep(self, asleep: bool) -> None:
        if asleep != self._asleep:
            self._asleep = asleep
            log.info("asleep" if asleep else "awake again")
            self._run(self._knock() if asleep else self._show(discord.Status.online))

    async def _knock(self) -> None:
        await self._show(discord.Status.idle)
        while self._asleep:
            await asyncio.sleep(KNOCK)
            try:
                if self._asleep:
                    await self._fish.ask("hello")
            except Asleep:
                continue
            except FishError:
                pass  # whoever refuses is awake
            self._set_asleep(False)

    async def _show(self, status: discord.Status) -> None:
        try:
            await self.change_presence(activity=self._presence, status=status)
        except (discord.DiscordException, *_NETWORK) as error:
            log.warning("could not show the presence", **_kind(error))

    def _run(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # -- messages

    async def on_message(self, message: discord.Message) -> None:
        if self._called(message):
            with self._holding():
                await self._hear(message)

    async def _hear(self, message: discord.Message) -> None:
        age = (discord.utils.utcnow() - message.created_at).total_seconds()
        if STALE < age < REPLAYED:
            self._count("stale")
            return
        private = isinstance(message.channel, discord.DMChannel)
        if not self._breaker.allows(message.channel.id):
            self._count("loop")
            return
        assert self.user is not None
        started = time.monotonic()

        async def say(text: str) -> None:
            await self._deliver(started, lambda: self._reply(message, text))

        locale = message.guild.preferred_locale.value if message.guild is not None else None
        question = _Question(
            id=message.id,
            person=message.author.id,
            words=_words(message.content, self.user.id),
            wordless=_wordless(message, self.user.id),
            locale=locale,
            say=say,
            answer_always=False,
            typing_in=message.channel,
        )
        refusal = None
        if private and not self._settings.discord_dms:
            refusal = "no_dms"
        elif not question.words and question.wordless == "unheard":
            refusal = "unheard"  # perhaps not meant for him: once is enough
        await self._attend(question, started, refusal)

    def _called(self, message: discord.Message) -> bool:
        """Whether it is said to him, by a person, where he may speak."""
        if self._stopping or self.user is None:
            return False
        if message.author.bot or message.webhook_id is not None or message.author.id == self.user.id:
            return False
        if message.type not in (discord.MessageType.default, discord.MessageType.reply):
            return False
        if isinstance(message.channel, discord.DMChannel):
            return True
        places = _places(message.channel)
        if not self._allowed(places):
            return False
        return (
            bool(places & self._settings.discord_home_channels)
            # Not `mentioned_in`, which is true of @everyone and @here.
            or self.user in message.mentions
            or _replies_to(message, self.user.id)
        )

    async def _reply(self, message: discord.Message, text: str) -> None:
        self._breaker.count(message.channel.id)
        try:
            # With a nonce, Discord takes a second attempt for the first and posts nothing.
            await message.reply(text, mention_author=False, nonce=str(message.id), suppress_embeds=True)
        except discord.Forbidden:
            self._breaker.count(message.channel.id, 10)
            raise

    @asynccontextmanager
    async def _typing(self, channel: discord.abc.Messageable | None) -> AsyncIterator[None]:
        """Show that he types for as long as the block runs. A nicety: it holds up nothing, and may fail."""

        async def type_on() -> None:
            assert channel is not None
            try:
                while True:
                    await channel.typing()
                    await asyncio.sleep(TYPING)
            except (discord.DiscordException, *_NETWORK) as error:
                log.warning("could not show typing", **_kind(error))

        task = asyncio.create_task(type_on()) if channel is not None else None
        await asyncio.sleep(0)  # so that the sign is on its way before the thinking begins
        try:
            yield
        finally:
            if task is not None:
                task.cancel()
                await asyncio.wait([task])

    # -- commands

    async def answer(self, interaction: discord.Interaction, words: str, wordless: str, hidden: bool) -> None:
        """Answer `/guppy` and "Ask Guppy"."""
        with self._holding():
            await self._answer(interaction, words, wordless, hidden)

    async def _answer(self, interaction: discord.Interaction, words: str, wordless: str, hidden: bool) -> None:
        started = time.monotonic()
        locale = interaction.locale.value
        refusal = self._no_place(interaction)
        if refusal is None and self._cooldowns.update_rate_limit(interaction) is not None:
            refusal = Verdict.TOO_FAST.value
        if refusal is None and self._stopping:
            refusal = Asleep.line
        if refusal is not None:
            self._count(refusal)
            await self.respond(interaction, voice.say(refusal, locale))
            return
        try:
            await interaction.response.defer(thinking=True, ephemeral=hidden)
        except (discord.DiscordException, *_NETWORK) as error:  # expired, or taken by another process
            self._count("undeliverable", error)
            return

        async def edit(text: str) -> None:
            await interaction.edit_original_response(content=text, allowed_mentions=discord.AllowedMentions.none())

        async def say(text: str) -> None:
            await self._deliver(started, lambda: edit(text))

        question = _Question(
            id=interaction.id,
            person=interaction.user.id,
            words=words,
            wordless=wordless,
            locale=locale,
            say=say,
            answer_always=True,
            typing_in=None,  # Discord shows that he is thinking
        )
        await self._attend(question, started)

    async def respond(self, interaction: discord.Interaction, text: str) -> None:
        """Answer a command at once, to that person only."""
        try:
            await interaction.response.send_message(text, ephemeral=True)
        except (discord.DiscordException, *_NETWORK) as error:
            self._count("undeliverable", error)

    def _no_place(self, interaction: discord.Interaction) -> str | None:
        if interaction.guild_id is None:
            return None if self._settings.discord_dms else "no_dms"
        places = _places(interaction.channel) if interaction.channel else {interaction.channel_id or 0}
        return None if self._allowed(places) else "not_here"

    def _allowed(self, places: set[int]) -> bool:
        allowed = self._settings.discord_channels
        return not allowed or bool(places & (allowed | self._settings.discord_home_channels))

    # -- both

    async def _attend(self, question: _Question, started: float, refusal: str | None = None) -> None:
        """Answer `question`, or tell why not, and count what became of it."""
        try:
            outcome = await self._outcome(question, refusal)
        except DeliveryError as failed:
            self._count("undeliverable", failed.__cause__)
            return
        seconds = time.monotonic() - started
        if outcome == "answered":
            metrics.REPLY_SECONDS.labels("discord").observe(seconds)
        self._count(outcome, seconds=round(seconds, 3))

    async def _outcome(self, question: _Question, refusal: str | None) -> str:
        reply: Reply | None = None
        # The person's place is free again when the thinking ends: who reads the reply may ask on at once.
        async with self._limiter.turn(str(question.person), str(question.id)) as turn:
            if turn.verdict is Verdict.DUPLICATE:
                return turn.verdict.value
            if turn.verdict is not Verdict.WELCOME:
                refusal = turn.verdict.value
            elif refusal is None and question.words:
                try:
                    async with self._typing(question.typing_in):
                        reply = await self._ask(question.words)
                except FishError as error:
                    refusal = error.line
        if reply is not None:
            await question.say(_speech(reply, question.locale))
            return "answered"
        if refusal is None:
            await question.say(voice.say(question.wordless, question.locale))
            return question.wordless
        if question.answer_always or await turn.may_notice():
            await question.say(voice.say(refusal, question.locale))
        return refusal

    async def _ask(self, words: str) -> Reply:
        if self._thinking >= AT_ONCE:
            raise Busy
        self._thinking += 1
        try:
            reply = await self._fish.ask(words)
        except Asleep:
            self._set_asleep(True)
            raise
        except FishError:
            raise
        except Exception as error:  # the person gets a line, the operator the place
            log.error("failed", exc_info=error)
            raise Confused from None
        finally:
            self._thinking -= 1
        self._set_asleep(False)
        return reply

    async def _deliver(self, started: float, send: Callable[[], Awaitable[None]]) -> None:
        """`send` within what is left of the deadline, a second time if the connection broke. Raises `DeliveryError`.

        Sending twice is safe: a nonce or an edit makes the second the same as the first.
        """
        left = max(DELIVERY, self._settings.deadline - (time.monotonic() - started))
        try:
            async with asyncio.timeout(left):
                try:
                    await send()
                except _NETWORK:
                    await asyncio.sleep(0.5)
                    await send()
        except (discord.DiscordException, *_NETWORK) as error:
            raise DeliveryError from error

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """Something is in hand for as long as the block runs, and `finish` waits for it."""
        task = asyncio.current_task()
        assert task is not None
        self._in_hand.add(task)
        try:
            yield
        finally:
            self._in_hand.discard(task)

    def _count(self, outcome: str, error: BaseException | None = None, **numbers: float) -> None:
        metrics.QUESTIONS.labels("discord", outcome).inc()
        if error is None:
            log.info("asked", outcome=outcome, **numbers)
        else:
            log.warning("asked", outcome=outcome, **_kind(error))


class _Breaker:
    """Stops a loop in a channel, whoever is in it and whyever: so many answers a minute, then none until it is over.

    Far above what a lively channel of people asks for; a refusal by Discord weighs more than an answer.
    """

    ANSWERS = 30
    WINDOW = 60.0

    def __init__(self) -> None:
        self._answers: dict[int, deque[float]] = {}

    def allows(self, channel: int) -> bool:
        now = time.monotonic()
        for known in list(self._answers) if len(self._answers) > 1000 else [channel]:
            times = self._answers.get(known, deque())
            while times and times[0] < now - self.WINDOW:
                times.popleft()
            if not times:
                self._answers.pop(known, None)
        return len(self._answers.get(channel, ())) < self.ANSWERS

    def count(self, channel: int, weight: int = 1) -> None:
        times = self._answers.setdefault(channel, deque())
        times.extend([time.monotonic()] * weight)
        if len(times) - weight < self.ANSWERS <= len(times):
            log.warning("too many answers in one channel: silent there for a minute")


def _places(channel: Any) -> set[int]:
    """The ids under which a channel may stand in the settings: its own, its parent's, its category's."""
    parent = channel.parent if isinstance(channel, discord.Thread) else channel
    ids = {channel.id, getattr(channel, "parent_id", None), getattr(parent, "category_id", None)}
    return {id for id in ids if id is not None}


def _count_rate_limits() -> aiohttp.TraceConfig:
    trace = aiohttp.TraceConfig()

    async def ended(_: Any, __: Any, request: aiohttp.TraceRequestEndParams) -> None:
        if request.response.status == 429:
            metrics.RATE_LIMITED.labels("discord").inc()

    trace.on_request_end.append(ended)
    return trace


# --- the commands ----------------------------------------------------------------------------------------------------


def _text(key: str) -> app_commands.locale_str:
    return app_commands.locale_str(voice.say(key), key=key)


class _Translator(app_commands.Translator):
    """The texts of the commands in the languages that `voice` has beside English."""

    async def translate(
        self,
        string: app_commands.locale_str,
        locale: discord.Locale,
        context: app_commands.TranslationContextTypes,
    ) -> str | None:
        key = string.extras.get("key")
        if key is None or locale.value.split("-")[0] not in voice.languages()[1:]:
            return None
        return voice.say(key, locale.value)


def _commands(client: Guppy) -> "app_commands.CommandTree[Guppy]":
    """What people find under / and in the menu of a message, in servers, direct messages and groups."""
    tree: app_commands.CommandTree[Guppy] = app_commands.CommandTree(
        client,
        allowed_installs=app_commands.AppInstallationType(guild=True, user=True),
        allowed_contexts=app_commands.AppCommandContext(guild=True, dm_channel=True, private_channel=True),
    )

    @tree.command(name="guppy", description=_text("describe_guppy"))
    @app_commands.describe(message=_text("describe_guppy_message"), hidden=_text("describe_guppy_hidden"))
    async def guppy(
        interaction: discord.Interaction,
        message: app_commands.Range[str, 1, LONGEST_QUESTION],
        hidden: bool = False,
    ) -> None:
        assert client.user is not None
        await client.answer(interaction, _words(message, client.user.id), "nothing_said", hidden)

    @tree.context_menu(name=_text("describe_ask_guppy"))
    async def ask_guppy(interaction: discord.Interaction, message: discord.Message) -> None:
        assert client.user is not None
        me = client.user.id
        await client.answer(interaction, _words(message.content, me), _wordless(message, me), False)

    def tells(name: str, key: str) -> None:
        @tree.command(name=name, description=_text(f"describe_{name}"))
        async def tell(interaction: discord.Interaction) -> None:
            await client.respond(interaction, voice.say(key, interaction.locale.value))

    tells("help", "help_discord")
    tells("about", "about")
    tells("privacy", "privacy")
    return tree


_REGISTERED = (
    *("name", "description", "name_localizations", "description_localizations", "options", "required"),
    *("min_length", "max_length", "default_member_permissions", "nsfw", "contexts", "integration_types"),
)


def _fingerprint(commands: Any) -> Any:
    """What of a list of commands (ours, or as Discord has it) people can notice."""
    if not isinstance(commands, list):
        return None
    shown = []
    for command in commands:
        entry: dict[str, Any] = {"type": int(command.get("type", 1))}
        for key in _REGISTERED:
            value = command.get(key)
            if key == "options":
                value = _fingerprint(value)
            elif key in ("contexts", "integration_types"):
                value = sorted(value or [])
            entry[key] = value or None
        shown.append(entry)
    return sorted(shown, key=lambda entry: (entry["type"], entry["name"]))
