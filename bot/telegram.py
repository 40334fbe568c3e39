"""Guppy on Telegram: what people say to him goes to a `Fish`, what it replies goes back to where it was said.

He listens where he is called: a private message, `/guppy` in a group, a reply to him, an @mention where Telegram lets
him hear it (with group privacy on, the default, it does not), the same in captions; where he is no member (guest mode)
and in other people's message boxes (inline) if the settings say so. Edits, other bots, what came through a bot, and
what a channel posted or was forwarded from one get no answer.

What holds: at most one reply to a question, because a send that may have arrived is never repeated; replies leave in
the order in which a chat's questions came, and no chat waits for another; a reply that Telegram refuses or holds back
beyond the deadline is counted and dropped; nothing of a message is kept.

`build_application(settings, fish)` makes the application without starting it, `serve` runs it.
"""

import asyncio
import json
import os
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import httpx
from telegram import (
    Bot,
    BotCommand,
    BotCommandScope,
    BotCommandScopeAllGroupChats,
    BotCommandScopeAllPrivateChats,
    InlineQueryResultArticle,
    InputTextMessageContent,
    LinkPreviewOptions,
    Message,
    MessageOriginChannel,
    ReplyParameters,
    Update,
    User,
)
from telegram.constants import ChatAction, ChatType, MessageEntityType, MessageLimit
from telegram.error import (
    BadRequest,
    ChatMigrated,
    Conflict,
    Forbidden,
    InvalidToken,
    NetworkError,
    RetryAfter,
    TelegramError,
)
from telegram.ext import (
    AIORateLimiter,
    Application,
    CallbackContext,
    InlineQueryHandler,
    MessageHandler,
    TypeHandler,
    filters,
)
from telegram.request import HTTPXRequest

from bot import health, limits, logs, metrics, voice
from bot.fish import Asleep, Confused, Fish, FishError, Reply
from bot.lifetime import Stopped, unless_stopped
from bot.limits import Verdict
from bot.refusal import ExitCode, Refusal
from bot.settings import Settings

os.environ["PTB_TIMEDELTA"] = "true"  # python-telegram-bot's opt-in to what becomes the only way: spans of time as such

STALE = 120.0
"""Seconds after which a question is not answered any more: who reads a reply to what was said before the outage?"""
BACKLOG = 86_400.0
"""Seconds for which Telegram keeps what nobody fetched. An age beyond says that two clocks differ, and nothing else."""
SLOW = 0.7
"""Seconds of thinking after which he is seen typing."""
DELIVERY = 3.0
"""Seconds for delivering a reply at least, when thinking has taken the whole deadline."""
PAUSE = 0.8
"""Seconds without another key stroke after which an inline query is a question."""
AT_ONCE = 1024
"""Questions that this process has open at most; further ones wait in line."""
POLL = 10
"""Seconds for which Telegram holds a poll that has nothing to tell."""
AWAY = 1.0
"""Seconds before the second try to reach a Telegram that is away at the start; each further one waits twice as long."""
SILENT = 30.0
"""Seconds without the return of a poll after which something is wrong."""
CONFLICT = 300.0
"""Seconds without a conflict after which the next one is news."""
HANG_UP = 2.0
"""Seconds for ending the last poll (or closing the webhook) when asked to stop."""
DRAIN = 5.0
"""Seconds for the questions in hand when asked to stop."""

MENUS: list[tuple[BotCommandScope, list[str]]] = [
    (BotCommandScopeAllPrivateChats(), ["start", "help", "about", "privacy"]),
    (BotCommandScopeAllGroupChats(), ["guppy", "help", "about", "privacy"]),
]
FIXED = {"start", "help", "about", "privacy"}
"""The commands that are answered with a fixed text."""

KINDS = {
    "sticker": "sticker",
    "photo": "photo",
    "voice": "voice",
    "audio": "voice",
    "video": "video",
    "video_note": "video",
    "animation": "video",
    "document": "file",
    "poll": "poll",
    "dice": "dice",
    "venue": "location",
    "location": "location",
    "contact": "contact",
    "story": "something_else",
    "game": "something_else",
    "paid_media": "something_else",
    "checklist": "something_else",
    "invoice": "something_else",
}
"""What a message may be instead of words (an animation is a document too, so order counts), and the line for it."""

App = Application[Any, Any, Any, Any, Any, Any]
Context = CallbackContext[Any, Any, Any, Any]

log = logs.get("telegram")


def build_application(settings: Settings, fish: Fish) -> App:
    """The application of `settings`, not started, which answers with `fish`."""
    return _Guppy(settings, fish).application


async def serve(settings: Settings, fish: Fish, stop: asyncio.Event) -> None:
    """Be on Telegram until `stop` is set, then answer what is in hand. Raises `Refusal` when a person must act.

    Waits with back-off for a Telegram that is away.
    """
    guppy = _Guppy(settings, fish)
    try:
        await unless_stopped(stop, guppy.connect())
        async with health.pulse("telegram", guppy.progressing):
            await unless_stopped(stop, guppy.poll.refused.wait())
            raise guppy.refusal(InvalidToken())
    except Stopped:
        pass
    finally:
        await guppy.close()


# --- what is said to him ---------------------------------------------------------------------------------------------


def _from_a_person(message: Message) -> bool:
    """Whether a person wrote `message`, here and for this chat: no bot, no channel, nothing that came through a bot."""
    if message.via_bot is not None or message.is_automatic_forward:
        return False
    if isinstance(message.forward_origin, MessageOriginChannel):
        return False
    if message.sender_chat is not None:  # an anonymous admin speaks as the group; anybody else as a channel
        return message.sender_chat.id == message.chat.id
    return message.from_user is not None and not message.from_user.is_bot


def _command(message: Message, me: User) -> str | None:
    """The command at the head of `message` that is meant for `me` ("help"); "" if it is meant for another bot."""
    for entity, text in {**message.parse_entities(), **message.parse_caption_entities()}.items():
        if entity.type == MessageEntityType.BOT_COMMAND and entity.offset == 0:
            name, _, addressee = text[1:].lower().partition("@")
            ours = name in FIXED or name == "guppy" or message.chat.type == ChatType.PRIVATE
            return name if addressee == (me.username or "").lower() or (ours and not addressee) else ""
    return None


def _words(message: Message, me: User) -> tuple[str, bool]:
    """What `message` says, without `/guppy` and mentions of `me`, and whether it mentions `me`."""
    text = message.text or message.caption or ""
    raw = text.encode("utf-16-le", "surrogatepass")  # entities count UTF-16 units, in which an emoji is two
    mentioned = False
    for entity in reversed(message.entities or message.caption_entities):
        begin, end = 2 * entity.offset, 2 * (entity.offset + entity.length)
        part = raw[begin:end].decode("utf-16-le", "surrogatepass").lower()
        mention = part == f"@{me.username}".lower() or (entity.user is not None and entity.user.id == me.id)
        if mention or (entity.offset == 0 and part.partition("@")[0] == "/guppy"):
            raw = raw[:begin] + (b"" if begin == 0 else b" \0") + raw[end:]
        mentioned = mentioned or mention
    words = raw.decode("utf-16-le", "surrogatepass")
    if len(words) != len(text):  # mend the seams: "hey @guppy, are you there" was "hey , are you there" up to here
        words = re.sub(r" +(?=[ ,])", "", re.sub(r"^[,:;]\s", "", words))
    return words.strip(), mentioned


def _is_reply_to(message: Message, me: User) -> bool:
    parent = message.reply_to_message
    # In a topic every message counts as a reply to the one that opened it.
    return (
        parent is not None
        and parent.from_user is not None
        and parent.from_user.id == me.id
        and not (parent.forum_topic_created)
    )


def _kind(message: Message) -> str | None:
    """The line for a message without words; None if it is none but a notice of Telegram's (joined, pinned...)."""
    return next((line for name, line in KINDS.items() if getattr(message, name)), None)


def _speech(reply: Reply, locale: str | None) -> str:
    text = reply.text.strip() or voice.say(Confused.line, locale)
    aside = "\n\n" + voice.say("prompt_cut", locale) if reply.prompt_cut else ""
    return text[: MessageLimit.MAX_TEXT_LENGTH - len(aside)] + aside


@dataclass(frozen=True, slots=True)
class _Question:
    """Something said to him, and the ways back. `say`, `tell` and `typing` raise `TelegramError`."""

    id: str
    person: int
    chat: Hashable
    """Where replies keep their order."""
    locale: str | None
    words: str
    line: str | None
    """The key of the text to say when there is nothing to think about."""
    say: Callable[[str], Awaitable[object]]
    tell: Callable[[str], Awaitable[object]] | None
    """To say why there is no reply; None where that has no place."""
    typing: Callable[[], Awaitable[object]] | None


class _Lines:
    """First come, first served, in each of any number of lines."""

    def __init__(self) -> None:
        self._lines: dict[Hashable, deque[asyncio.Event]] = {}

    def length(self, key: Hashable) -> int:
        return len(self._lines.get(key, ()))

    @asynccontextmanager
    async def place(self, key: Hashable) -> AsyncIterator[asyncio.Event]:
        """A place at the end of the line `key`, until the block ends. The event is set when it is the first."""
        line = self._lines.setdefault(key, deque())
        first = asyncio.Event()
        line.append(first)
        line[0].set()
        try:
            yield first
        finally:
            line.remove(first)
            if line:
                line[0].set()
            else:
                del self._lines[key]


class _Poll(HTTPXRequest):
    """The connection that fetches updates, and what an operator would ask about it."""

    def __init__(self) -> None:
        super().__init__(connection_pool_size=2)  # the last poll, which confirms, while the one before is cut off
        self.returned_at = time.monotonic()
        self.refused = asyncio.Event()
        """Set when Telegram does not know the token (any more)."""

    async def do_request(self, *args: Any, **kwargs: Any) -> tuple[int, bytes]:
        code, payload = await super().do_request(*args, **kwargs)
        if code == 200:
            self.returned_at = time.monotonic()
            payload = _readable(payload)
        elif code in (401, 404):
            self.refused.set()
        return code, payload


def _readable(payload: bytes) -> bytes:
    """The answer of getUpdates without the insides of updates that this client is too old to read.

    One such update would fail the whole poll, which would bring it again, and again.
    """
    answer = json.loads(payload)
    unreadable = 0
    for n, update in enumerate(answer["result"]):
        try:
            Update.de_json(update, None)
        except Exception:  # whatever the insides are, Telegram will not change them
            answer["result"][n] = {"update_id": update["update_id"]}
            unreadable += 1
    if not unreadable:
        return payload
    log.warning("updates of an unknown form are skipped; a newer python-telegram-bot may know it", updates=unreadable)
    return json.dumps(answer).encode()


# --- the bot ---------------------------------------------------------------------------------------------------------


class _Guppy:
    """One bot on Telegram for a `Fish`."""

    def __init__(self, settings: Settings, fish: Fish) -> None:
        self._settings = settings
        self._fish = fish
        self._limiter = limits.limiter(settings, "telegram")
        self.poll = _Poll()
        self._people = _Lines()
        self._chats = _Lines()
        self._in_hand: set[asyncio.Task[Any]] = set()
        self._inline: dict[int, str] = {}
        """Whose inline query stands still since when: person -> id of the last one."""
        self._closed: dict[Hashable, float] = {}
        """Chats that Telegram takes nothing for (flood control) until a time of the event loop's clock."""
        self._introduction: asyncio.Task[None] | None = None
        self._conflict_at = -CONFLICT

        token = settings.telegram_token.get_secret_value() if settings.telegram_token else ""
        self.application: App = (
            Application.builder()
            .token(token)
            .base_url(settings.telegram_api_base)
            .base_file_url(settings.telegram_api_base.removesuffix("bot") + "file/bot")
            .concurrent_updates(AT_ONCE)
            .rate_limiter(AIORateLimiter())
            .pool_timeout(DELIVERY)
            .get_updates_request(self.poll)
            .job_queue(None)
            .post_init(self._post_init)
            .post_stop(self._post_stop)
            .post_shutdown(self._post_shutdown)
            .build()
        )
        self.application.add_handler(MessageHandler(filters.UpdateType.MESSAGE, self._on_message))
        self.allowed_updates = ["message"]
        if settings.telegram_guest:
            self.allowed_updates.append("guest_message")
            self.application.add_handler(TypeHandler(Update, self._on_guest_message), group=1)
        if settings.telegram_inline:
            self.allowed_updates.append("inline_query")
            self.application.add_handler(InlineQueryHandler(self._on_inline_query))
        self.application.add_error_handler(self._on_error)

    # -- life

    async def connect(self) -> None:
        """Reach Telegram, however long that takes, and begin to listen. Raises `Refusal`."""
        await self._reach(self.application.initialize)
        await self._post_init(self.application)
        await self.application.start()
        await self._reach(self._listen)
        me = self.application.bot.bot
        log.info("awake", webhook=self._webhook, hears_all_in_groups=bool(me.can_read_all_group_messages))
        if self._settings.telegram_guest and not me.supports_guest_queries:
            log.warning("GUPPY_TELEGRAM_GUEST is set, but guest mode is off: switch it on at @BotFather")
        if self._settings.telegram_inline and not me.supports_inline_queries:
            log.warning("GUPPY_TELEGRAM_INLINE is set, but inline mode is off: switch it on at @BotFather")

    @property
    def _webhook(self) -> bool:
        return self._settings.telegram_webhook_url is not None

    async def _listen(self) -> None:
        updater = self.application.updater
        assert updater is not None
        if not self._webhook:
            await updater.start_polling(
                timeout=timedelta(seconds=POLL),
                allowed_updates=self.allowed_updates,
                error_callback=self._on_poll_error,
            )
            return
        secret = self._settings.telegram_webhook_secret
        assert self._settings.telegram_webhook_url is not None
        assert secret is not None
        try:
            await updater.start_webhook(
                listen=self._settings.telegram_webhook_listen,
                port=self._settings.telegram_webhook_port,
                url_path=urlsplit(self._settings.telegram_webhook_url).path,
                webhook_url=self._settings.telegram_webhook_url,
                secret_token=secret.get_secret_value(),
                allowed_updates=self.allowed_updates,
                max_connections=100,
            )
        except OSError as error:
            raise Refusal(
                f"Cannot listen on {self._settings.telegram_webhook_listen}:{self._settings.telegram_webhook_port} "
                f"({error.strerror}). Check GUPPY_TELEGRAM_WEBHOOK_LISTEN and GUPPY_TELEGRAM_WEBHOOK_PORT.",
                ExitCode.SETTINGS,
            ) from None

    async def _reach(self, call: Callable[[], Awaitable[None]]) -> None:
        """Do `call`, again and again while Telegram is away. Raises `Refusal` when waiting would not help."""
        pause, away = AWAY, False
        while True:
            try:
                await call()
            except (InvalidToken, BadRequest, Forbidden) as error:
                raise self.refusal(error) from None
            except TelegramError as error:
                if not away:
                    log.warning("telegram is away; waiting for it", reason=_reason(error))
                away = True
                await asyncio.sleep(_seconds(error) if isinstance(error, RetryAfter) else pause)
                pause = min(pause * 2, 30.0)
            else:
                if away:
                    log.info("telegram is back")
                return

    def refusal(self, error: TelegramError) -> Refusal:
        """What a person must change after `error`."""
        where = urlsplit(self._settings.telegram_api_base).hostname
        if isinstance(error, InvalidToken):
            hint = "" if where == "api.telegram.org" else f" Or check GUPPY_TELEGRAM_API_BASE: this was {where}."
            return Refusal(
                f"Telegram refuses GUPPY_TELEGRAM_TOKEN. @BotFather tells you the right one with /token.{hint}",
                ExitCode.TOKEN,
            )
        what = "GUPPY_TELEGRAM_WEBHOOK_URL" if self._webhook else "the bot of GUPPY_TELEGRAM_TOKEN"
        return Refusal(f"Telegram ({where}) does not accept {what}: {error.message.rstrip('.')}.", ExitCode.SETTINGS)

    def progressing(self) -> bool:
        """Whether updates reach us: polls return, or the webhook is open."""
        updater = self.application.updater
        if updater is None or not (updater.running and self.application.running):
            return False
        return self._webhook or time.monotonic() - self.poll.returned_at < SILENT

    async def close(self) -> None:
        """Take no more questions, answer those in hand, and hang up."""
        log.info("stopping", in_hand=len(self._in_hand))
        updater = self.application.updater
        if updater is not None and updater.running:
            with suppress(TimeoutError, TelegramError):
                async with asyncio.timeout(HANG_UP):
                    await updater.stop()
        if self.application.running:
            try:
                async with asyncio.timeout(DRAIN):
                    await self.application.stop()
            except TimeoutError:
                log.warning("cut off", questions=len(self._in_hand))
                for task in self._in_hand:
                    task.cancel()
                await asyncio.gather(*self._in_hand, return_exceptions=True)
        await self._post_stop(self.application)
        await self.application.shutdown()
        await self.application.bot.shutdown()  # the application leaves it open when it never got as far as starting
        await self._post_shutdown(self.application)

    async def _post_init(self, application: App) -> None:
        # Beside everything else: who writes to him should not wait for his menus.
        self._introduction = asyncio.create_task(_introduce(application.bot), name="menus and descriptions")

    async def _post_stop(self, _: App) -> None:
        if self._introduction is not None:
            self._introduction.cancel()
            await asyncio.gather(self._introduction, return_exceptions=True)

    async def _post_shutdown(self, _: App) -> None:
        await self._limiter.aclose()

    def _on_poll_error(self, error: TelegramError) -> None:
        if not isinstance(error, Conflict):
            log.warning("a poll failed", reason=_reason(error))
            return
        now = time.monotonic()
        if now - self._conflict_at > CONFLICT:
            log.critical(
                "another process fetches this bot's messages, or a webhook is set: only one may. Stop the other one, "
                "or give each bot a token of its own. Trying again more and more seldom"
            )
        self._conflict_at = now

    async def _on_error(self, _: object, context: Context) -> None:
        log.error("failed", exc_info=context.error)

    # -- questions

    async def _on_message(self, update: Update, context: Context) -> None:
        message = update.message
        if message is None or not _from_a_person(message):
            return
        me: User = context.bot.bot
        command = _command(message, me)
        words, mentioned = _words(message, me)
        private = message.chat.type == ChatType.PRIVATE
        called = private or command or mentioned or _is_reply_to(message, me)
        if command == "" or not called:
            return
        line = command if command in FIXED else None
        if line is None and not words:
            if not (private or mentioned or command):
                return  # a sticker in reply to him, in a group: not worth a noise
            line = "nothing_said" if mentioned or command else _kind(message)
            if line is None:
                return
        await self._hear(message, words, line, guest=False)

    async def _on_guest_message(self, update: Update, context: Context) -> None:
        message = update.guest_message
        if message is None or message.guest_query_id is None or not _from_a_person(message):
            return
        words, _ = _words(message, context.bot.bot)
        await self._hear(message, words, None if words else "nothing_said", guest=True)

    async def _hear(self, message: Message, words: str, line: str | None, *, guest: bool) -> None:
        age = (datetime.now(UTC) - message.date).total_seconds()
        if STALE < age < BACKLOG:
            metrics.QUESTIONS.labels("telegram", "stale").inc()
            log.info("stale", seconds=round(age))
            return

        async def say(text: str) -> None:
            await message.reply_text(
                text,
                do_quote=False,
                reply_parameters=ReplyParameters(message.message_id, allow_sending_without_reply=True),
                link_preview_options=LinkPreviewOptions(is_disabled=True),
            )

        async def say_as_a_guest(text: str) -> None:
            await message.answer_guest_query(_article(text, text))

        async def typing() -> None:
            thread = message.message_thread_id if message.is_topic_message else None
            await message.chat.send_action(ChatAction.TYPING, message_thread_id=thread)

        speaker = message.sender_chat or message.from_user
        assert speaker is not None
        await self._answer(
            _Question(
                id=f"{message.chat.id}:{message.message_id}" if not guest else f"guest:{message.guest_query_id}",
                person=speaker.id,
                chat=message.chat.id,
                locale=message.from_user.language_code if message.from_user else None,
                words=words,
                line=line,
                say=say if not guest else say_as_a_guest,
                tell=say if not guest else say_as_a_guest,
                typing=typing if not guest else None,
            )
        )

    async def _on_inline_query(self, update: Update, _: Context) -> None:
        """A query comes with every key stroke; the fish hears the one that stands still."""
        query = update.inline_query
        if query is None:
            return
        person, words = query.from_user.id, query.query.strip()
        self._inline[person] = query.id
        try:
            await asyncio.sleep(PAUSE)
            if self._inline.get(person) != query.id:
                return
        finally:
            if self._inline.get(person) == query.id:
                del self._inline[person]
        locale = query.from_user.language_code

        async def say(text: str) -> None:
            article = _article(text, f"{words}\n\nguppy: {text}", voice.say("inline_title", locale))
            await query.answer([article], cache_time=0, is_personal=True)

        if not words:
            with suppress(TelegramError):
                await query.answer([], cache_time=0, is_personal=True)
            return
        await self._answer(
            _Question(
                id=f"inline:{query.id}",
                person=person,
                chat=f"inline:{query.id}",
                locale=locale,
                words=words,
                line=None,
                say=say,
                tell=None,
                typing=None,
            )
        )

    # -- replies

    async def _answer(self, question: _Question) -> None:
        """Answer `question`, or tell why not, and count what became of it."""
        task = asyncio.current_task()
        assert task is not None
        self._in_hand.add(task)
        try:
            started = time.perf_counter()
            outcome = await self._outcome(question)
            metrics.QUESTIONS.labels("telegram", outcome).inc()
            seconds = time.perf_counter() - started
            if outcome == "answered":
                metrics.REPLY_SECONDS.labels("telegram").observe(seconds)
            log.info(outcome, seconds=round(seconds, 3))
        finally:
            self._in_hand.discard(task)
            # The application holds on to the last update until the next one comes: give it one that says nothing. While
            # it stops it takes no more, and would wait in vain for this one to be taken.
            if self.application.running:
                self.application.update_queue.put_nowait(None)

    async def _outcome(self, question: _Question) -> str:
        clock = asyncio.get_running_loop().time
        think_by = clock() + self._settings.deadline
        deliver_by = think_by + DELIVERY
        if self._closed.get(question.chat, 0.0) > deliver_by:
            return "undeliverable"
        async with self._people.place(question.person) as next_of_person:
            # Several messages in a row are no crime: they wait for each other, up to what one may ask at once.
            if self._people.length(question.person) <= self._settings.person_burst:
                try:
                    async with asyncio.timeout_at(think_by):
                        await next_of_person.wait()
                except TimeoutError:
                    return Asleep.line
            async with self._limiter.turn(str(question.person), question.id) as turn:
                if turn.verdict is Verdict.DUPLICATE:
                    return turn.verdict.value
                if turn.verdict is not Verdict.WELCOME:
                    await self._tell(question, turn, turn.verdict.value)
                    return turn.verdict.value
                async with self._chats.place(question.chat) as next_in_chat:
                    try:
                        text = await self._text(question, think_by)
                    except FishError as error:
                        await self._tell(question, turn, error.line)
                        return error.line
                    with suppress(TimeoutError):
                        async with asyncio.timeout_at(deliver_by):
                            await next_in_chat.wait()
                            if await self._deliver(question.say, text, question.chat, deliver_by):
                                return "answered"
                    return "undeliverable"

    async def _text(self, question: _Question, think_by: float) -> str:
        """What to say to `question`. Raises a `FishError`."""
        if question.line == "help":
            return await self._help(question.locale)
        if question.line is not None:
            return voice.say(question.line, question.locale)
        typing = asyncio.create_task(_show_typing(question), name="typing")
        try:
            async with asyncio.timeout_at(think_by):
                reply = await self._fish.ask(question.words)
        except TimeoutError:
            raise Asleep from None
        except FishError:
            raise
        except Exception as error:  # the person gets a line, the operator the place; the other chats go on
            log.error("the fish failed", exc_info=error)
            raise Confused from None
        finally:
            typing.cancel()
        return _speech(reply, question.locale)

    async def _help(self, locale: str | None) -> str:
        with suppress(TelegramError):  # what Telegram said before is good enough
            await self.application.bot.get_me()  # group privacy can be switched while we run
        me = self.application.bot.bot
        hears_all = me.can_read_all_group_messages
        mentions = voice.say("help_mentions_on" if hears_all else "help_mentions_off", locale)
        return voice.say("help_telegram", locale, mentions=mentions, name=me.username or "")

    async def _tell(self, question: _Question, turn: limits.Turn, line: str) -> None:
        """Say why there is no reply, unless this person has just been told."""
        if question.tell is None or not await turn.may_notice():
            return
        until = asyncio.get_running_loop().time() + DELIVERY
        with suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await self._deliver(question.tell, voice.say(line, question.locale), question.chat, until)

    async def _deliver(self, say: Callable[[str], Awaitable[object]], text: str, chat: Hashable, until: float) -> bool:
        """Whether Telegram took `text`. It is offered again only if it certainly did not, and before `until`."""
        clock = asyncio.get_running_loop().time
        while True:
            try:
                await say(text)
                return True
            except RetryAfter as flood:
                metrics.RATE_LIMITED.labels("telegram").inc()
                pause = _seconds(flood)
                if clock() + pause >= until:
                    log.warning("flood control: a reply is dropped", seconds=pause)
                    self._closed[chat] = clock() + pause
                    asyncio.get_running_loop().call_later(pause, self._closed.pop, chat, None)
                    return False
                await asyncio.sleep(pause)
            except (Forbidden, BadRequest, ChatMigrated) as error:  # blocked, removed, closed, gone
                log.info("telegram takes no reply there", reason=_reason(error))
                return False
            except TelegramError as error:
                if not _never_arrived(error):
                    log.warning("a reply may not have arrived; it is not repeated", reason=_reason(error))
                    return False
                await asyncio.sleep(0.5)


def _article(preview: str, text: str, title: str = "Guppy") -> InlineQueryResultArticle:
    content = InputTextMessageContent(
        text[: MessageLimit.MAX_TEXT_LENGTH], link_preview_options=LinkPreviewOptions(is_disabled=True)
    )
    return InlineQueryResultArticle("reply", title, content, description=preview[:200])


async def _show_typing(question: _Question) -> None:
    """Once, and only when it takes a while: each such call counts against what he may say in a group."""
    await asyncio.sleep(SLOW)
    if question.typing is not None:
        try:
            await question.typing()
        except TelegramError as error:
            log.warning("could not show that he is typing", reason=_reason(error))


async def _introduce(bot: Bot) -> None:
    """Set menus and descriptions, in each language, where they are not what Telegram has."""
    try:
        for language in voice.languages():
            code = None if language == voice.FALLBACK else language
            for scope, names in MENUS:
                menu = tuple(BotCommand(name, voice.say(f"describe_{name}", language)) for name in names)
                if await bot.get_my_commands(scope, code) != menu:
                    await bot.set_my_commands(menu, scope, code)
            description = voice.say("bot_description", language)
            if (await bot.get_my_description(code)).description != description:
                await bot.set_my_description(description, code)
            short = voice.say("bot_short_description", language)
            if (await bot.get_my_short_description(code)).short_description != short:
                await bot.set_my_short_description(short, code)
    except TelegramError as error:
        log.warning("could not set menus and descriptions; he talks without", reason=_reason(error))


def _never_arrived(error: TelegramError) -> bool:
    """Whether the request that ended so cannot have been executed: no connection was there to carry it."""
    return isinstance(error, NetworkError) and isinstance(
        error.__cause__, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout
    )


def _reason(error: TelegramError) -> str:
    """What went wrong, in words that quote nothing."""
    return type(error.__cause__ or error).__name__


def _seconds(flood: RetryAfter) -> float:
    pause = flood.retry_after
    return pause.total_seconds() if isinstance(pause, timedelta) else float(pause)
