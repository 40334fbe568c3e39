"""Telegram's Bot API as bots see it, over HTTP on this machine, with people and chats that a test moves.

    async with TelegramServer() as telegram:             # GUPPY_TELEGRAM_API_BASE=telegram.base
        anna = telegram.person("Anna")
        await telegram.say(telegram.private(anna), "hi guppy", by=anna)
        [reply] = await telegram.heard(telegram.private(anna))

It is as strict as the real one, and says so louder: every parameter of every call is held against the Bot API's
documented types and limits, an unknown one is refused, and whatever was wrong stands in `violations`. It can be as
nasty too: `telegram.fail("sendMessage", Fault(retry_after=3))` for 429, `Fault(status=500)`, `Fault(seconds=2)` for a
slow answer, `Fault(cut="before")` and `Fault(cut="after")` for a connection that breaks before and after the call was
executed. Two pollers get 409, a wrong token 401.
"""

import asyncio
import itertools
import json
import re
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp
from aiohttp import web

Json = dict[str, Any]

TOKEN = "123456789:stand-in_TOKEN-of-35-characters-abcd"


# --- what the Bot API takes ------------------------------------------------------------------------------------------


class Wrong(Exception):
    """A parameter is not what the documentation says."""


@dataclass(frozen=True)
class Integer:
    low: int | None = None
    high: int | None = None

    def check(self, value: Any) -> None:
        if not isinstance(value, int) or isinstance(value, bool):
            raise Wrong(f"{value!r} is no Integer")
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            raise Wrong(f"{value} is not within {self.low}..{self.high}")


@dataclass(frozen=True)
class Boolean:
    def check(self, value: Any) -> None:
        if not isinstance(value, bool):
            raise Wrong(f"{value!r} is no Boolean")


@dataclass(frozen=True)
class String:
    low: int = 0
    high: int | None = None
    pattern: str | None = None
    among: tuple[str, ...] = ()
    bytes: bool = False

    def check(self, value: Any) -> None:
        if not isinstance(value, str):
            raise Wrong(f"{value!r} is no String")
        length = len(value.encode()) if self.bytes else len(value)
        if length < self.low or (self.high is not None and length > self.high):
            raise Wrong(f"{length} characters are not {self.low}-{self.high}")
        if self.pattern is not None and not re.fullmatch(self.pattern, value):
            raise Wrong(f"{value!r} does not match {self.pattern}")
        if self.among and value not in self.among:
            raise Wrong(f"{value!r} is none of {self.among}")


@dataclass(frozen=True)
class Array:
    of: "Type"
    low: int = 0
    high: int | None = None

    def check(self, value: Any) -> None:
        if not isinstance(value, list):
            raise Wrong(f"{value!r} is no Array")
        if len(value) < self.low or (self.high is not None and len(value) > self.high):
            raise Wrong(f"{len(value)} elements are not {self.low}-{self.high}")
        for element in value:
            self.of.check(element)


@dataclass(frozen=True)
class Object:
    """Its fields by name; a `?` at the end marks an optional one."""

    fields: "dict[str, Type]"

    def check(self, value: Any) -> None:
        if not isinstance(value, dict):
            raise Wrong(f"{value!r} is no object")
        known = {name.rstrip("?"): kind for name, kind in self.fields.items()}
        for name in value:
            if name not in known:
                raise Wrong(f"there is no {name}")
        for name, kind in self.fields.items():
            if name in value or name.rstrip("?") in value:
                try:
                    kind.check(value[name.rstrip("?")])
                except Wrong as wrong:
                    raise Wrong(f"{name.rstrip('?')}: {wrong}") from None
            elif not name.endswith("?"):
                raise Wrong(f"{name} is missing")


Type = Integer | Boolean | String | Array | Object

KINDS_OF_UPDATES = (
    *("message", "edited_message", "channel_post", "edited_channel_post", "business_connection", "business_message"),
    *("edited_business_message", "deleted_business_messages", "guest_message", "message_reaction"),
    *("message_reaction_count", "inline_query", "chosen_inline_result", "callback_query", "shipping_query"),
    *("pre_checkout_query", "purchased_paid_media", "poll", "poll_answer", "my_chat_member", "chat_member"),
    *("chat_join_request", "chat_boost", "removed_chat_boost", "managed_bot"),
)
ACTIONS = (
    *("typing", "upload_photo", "record_video", "upload_video", "record_voice", "upload_voice", "upload_document"),
    *("choose_sticker", "find_location", "record_video_note", "upload_video_note"),
)
SCOPES = (
    *("default", "all_private_chats", "all_group_chats", "all_chat_administrators"),
    *("chat", "chat_administrators", "chat_member"),
)
PARSE_MODE = String(among=("Markdown", "MarkdownV2", "HTML"))
LANGUAGE = String(pattern="([a-z]{2})?")
LINK_PREVIEW = Object(
    {
        "is_disabled?": Boolean(),
        "url?": String(1),
        "prefer_small_media?": Boolean(),
        "prefer_large_media?": Boolean(),
        "show_above_text?": Boolean(),
    }
)
ENTITIES = Array(Object({"type": String(1), "offset": Integer(0), "length": Integer(1), "url?": String(1)}))
REPLY = Object(
    {
        "message_id": Integer(1),
        "chat_id?": Integer(),
        "allow_sending_without_reply?": Boolean(),
        "quote?": String(0, 1024),
        "quote_position?": Integer(0),
    }
)
SCOPE = Object({"type": String(among=SCOPES), "chat_id?": Integer(), "user_id?": Integer()})
ARTICLE = Object(
    {
        "type": String(among=("article",)),
        "id": String(1, 64, bytes=True),
        "title": String(1),
        "input_message_content": Object(
            {
                "message_text": String(1, 4096),
                "parse_mode?": PARSE_MODE,
                "entities?": ENTITIES,
                "link_preview_options?": LINK_PREVIEW,
            }
        ),
        "url?": String(1),
        "description?": String(),
    }
)

METHODS: dict[str, Object] = {
    "getMe": Object({}),
    "getUpdates": Object(
        {
            "offset?": Integer(),
            "limit?": Integer(1, 100),
            "timeout?": Integer(0),
            "allowed_updates?": Array(String(among=KINDS_OF_UPDATES)),
        }
    ),
    "setWebhook": Object(
        {
            "url": String(pattern="https://.+|"),
            "ip_address?": String(),
            "max_connections?": Integer(1, 100),
            "allowed_updates?": Array(String(among=KINDS_OF_UPDATES)),
            "drop_pending_updates?": Boolean(),
            "secret_token?": String(1, 256, "[A-Za-z0-9_-]+"),
        }
    ),
    "deleteWebhook": Object({"drop_pending_updates?": Boolean()}),
    "getWebhookInfo": Object({}),
    "sendMessage": Object(
        {
            "chat_id": Integer(),
            "message_thread_id?": Integer(1),
            "direct_messages_topic_id?": Integer(1),
            "text": String(1, 4096),
            "parse_mode?": PARSE_MODE,
            "entities?": ENTITIES,
            "link_preview_options?": LINK_PREVIEW,
            "disable_notification?": Boolean(),
            "protect_content?": Boolean(),
            "reply_parameters?": REPLY,
        }
    ),
    "sendChatAction": Object({"chat_id": Integer(), "message_thread_id?": Integer(1), "action": String(among=ACTIONS)}),
    "setMyCommands": Object(
        {
            "commands": Array(Object({"command": String(1, 32, "[a-z0-9_]+"), "description": String(1, 256)}), 0, 100),
            "scope?": SCOPE,
            "language_code?": LANGUAGE,
        }
    ),
    "getMyCommands": Object({"scope?": SCOPE, "language_code?": LANGUAGE}),
    "setMyDescription": Object({"description?": String(0, 512), "language_code?": LANGUAGE}),
    "getMyDescription": Object({"language_code?": LANGUAGE}),
    "setMyShortDescription": Object({"short_description?": String(0, 120), "language_code?": LANGUAGE}),
    "getMyShortDescription": Object({"language_code?": LANGUAGE}),
    "answerInlineQuery": Object(
        {
            "inline_query_id": String(1),
            "results": Array(ARTICLE, 0, 50),
            "cache_time?": Integer(0),
            "is_personal?": Boolean(),
            "next_offset?": String(0, 64, bytes=True),
        }
    ),
    "answerGuestQuery": Object({"guest_query_id": String(1), "result": ARTICLE}),
}


# --- people, chats, calls --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one call; several things may."""

    status: int | None = None
    """Refused with this status, and not executed."""
    retry_after: int | None = None
    """429: refused, with these seconds to wait."""
    description: str = "Internal Server Error"
    seconds: float = 0.0
    """Time that passes before anything else."""
    cut: Literal["before", "after", None] = None
    """The connection breaks before or after the call is executed."""


@dataclass(frozen=True)
class Call:
    method: str
    params: Json


@dataclass
class Chat:
    json: Json
    messages: dict[int, Json] = field(default_factory=dict)
    topics: dict[int, Json] = field(default_factory=dict)
    """Its threads, and the message that opened each."""
    closed_to_bot: str | None = None
    """Why the bot may not write here: the description of a 403."""

    @property
    def id(self) -> int:
        return int(self.json["id"])

    @property
    def is_private(self) -> bool:
        return bool(self.json["type"] == "private")


class Refused(Exception):
    def __init__(self, status: int, description: str, retry_after: int | None = None) -> None:
        super().__init__(description)
        self.status, self.description, self.retry_after = status, description, retry_after


class TelegramServer:
    """One bot's Telegram. Leaves no group privacy off unless `me["can_read_all_group_messages"]` says so."""

    def __init__(self, port: int = 0) -> None:
        self.port = port
        self.token = TOKEN
        self.me: Json = {
            "id": 123456789,
            "is_bot": True,
            "first_name": "Guppy",
            "username": "guppy_test_bot",
            "can_join_groups": True,
            "can_read_all_group_messages": False,
            "supports_inline_queries": True,
            "supports_guest_queries": True,
        }
        self.calls: list[Call] = []
        self.violations: list[str] = []
        self.chats: dict[int, Chat] = {}
        self.inline_answers: dict[str, list[Json]] = {}
        self.guest_answers: dict[str, Json] = {}
        self.texts: dict[tuple[str, str, str], Any] = {}
        """(what, scope, language) -> menus and descriptions."""
        self.webhook: Json = {}
        self.replicas: list[str] = []
        """Where a reverse proxy would pass a webhook's calls on to: http://127.0.0.1:PORT, taken in turn."""
        self.refused_by_webhook = 0
        self.polls = 0
        """How many have begun."""
        self._faults: dict[str, deque[Fault]] = defaultdict(deque)
        self._updates: deque[Json] = deque()
        self._allowed: list[str] | None = None
        self._news = asyncio.Event()
        self._poll: asyncio.Event | None = None
        self._ids = itertools.count(1000)
        self._update_ids = itertools.count(70_000)
        self._runner: web.AppRunner | None = None
        self._calling: asyncio.Task[None] | None = None

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}/bot"

    async def __aenter__(self) -> "TelegramServer":
        await self.open()
        return self

    async def open(self) -> None:
        """Take calls, at the same address as before."""
        app = web.Application()
        app.router.add_route("*", "/bot{token}/{method}", self._call)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Be gone: connections break, and new ones are refused."""
        if self._calling is not None:
            self._calling.cancel()
        if self._poll is not None:
            self._poll.set()
        assert self._runner is not None
        await self._runner.cleanup()

    # -- what people do

    def person(self, name: str, language: str | None = "en", **more: Any) -> Json:
        person = {"id": next(self._ids), "is_bot": False, "first_name": name, **more}
        return {**person, "language_code": language} if language else person

    def private(self, person: Json) -> Chat:
        json = {"id": person["id"], "type": "private", "first_name": person["first_name"]}
        return self.chats.setdefault(person["id"], Chat(json))

    def group(self, title: str = "the tank", *, forum: bool = False) -> Chat:
        json: Json = {"id": -1_000_000_000_000 - next(self._ids), "type": "supergroup", "title": title}
        chat = Chat({**json, "is_forum": True} if forum else json)
        self.chats[chat.id] = chat
        return chat

    def topic(self, chat: Chat, *, by: Json) -> int:
        thread = next(self._ids)
        opened = {"name": "a topic", "icon_color": 0}
        chat.topics[thread] = {
            "message_id": thread,
            "date": int(time.time()),
            "chat": chat.json,
            "from": by,
            "forum_topic_created": opened,
        }
        return thread

    async def say(
        self,
        chat: Chat,
        text: str | None = None,
        *,
        by: Json,
        reply_to: Json | None = None,
        topic: int | None = None,
        age: float = 0.0,
        deliver: bool = True,
        **more: Any,
    ) -> Json:
        """A message in `chat`; `more` are fields of the Message. The bot gets it if Telegram would show it to it."""
        message: Json = {
            "message_id": next(self._ids),
            "date": int(time.time() - age),
            "chat": chat.json,
            "from": by,
            **more,
        }
        if text is not None:
            message["text"] = text
        for name, entities in (("text", "entities"), ("caption", "caption_entities")):
            if name in message and entities not in message and (found := entities_of(message[name])):
                message[entities] = found
        if topic is not None:
            message |= {"message_thread_id": topic, "is_topic_message": True}
            message["reply_to_message"] = chat.topics[topic]  # that is how Telegram marks them
        if reply_to is not None:
            message["reply_to_message"] = {k: v for k, v in reply_to.items() if k != "reply_to_message"}
        chat.messages[message["message_id"]] = message
        if deliver and (chat.is_private or self._shown(message)):
            self.update("message", message)
        return message

    def _shown(self, message: Json) -> bool:
        """Group privacy: commands, and replies to the bot."""
        text = str(message.get("text", message.get("caption", "")))
        reply = message.get("reply_to_message", {}).get("from", {}).get("id") == self.me["id"]
        command = re.match(r"/\w+(@\w+)?", text)
        for_us = command and command[1] in (None, f"@{self.me['username']}")
        return bool(self.me["can_read_all_group_messages"] or reply or for_us)

    def update(self, kind: str, payload: Json) -> Json:
        """Any update whatever, for what `say` does not cover."""
        update = {"update_id": next(self._update_ids), kind: payload}
        self._updates.append(update)
        self._news.set()
        return update

    def again(self, update: Json) -> None:
        """Hand out an update once more, as after a poller that died before it confirmed."""
        self._updates.append({**update, "update_id": next(self._update_ids)})
        self._news.set()

    async def ask_as_guest(self, chat: Chat, text: str, *, by: Json) -> str:
        """Mention the bot where it is no member. Returns the guest query's id."""
        query = f"guest{next(self._ids)}"
        message = await self.say(chat, text, by=by, deliver=False)
        self.update("guest_message", {**message, "guest_query_id": query})
        return query

    def type_inline(self, person: Json, text: str) -> str:
        """One key stroke in somebody's message box. Returns the query's id."""
        query = f"inline{next(self._ids)}"
        self.update("inline_query", {"id": query, "from": person, "query": text, "offset": ""})
        return query

    async def delete(self, chat: Chat, message: Json) -> None:
        del chat.messages[message["message_id"]]

    # -- what the bot does

    def fail(self, method: str, *faults: Fault) -> None:
        """The next calls of `method` go wrong, each in its way."""
        self._faults[method].extend(faults)

    def made(self, method: str) -> list[Call]:
        return [call for call in self.calls if call.method == method]

    def said_in(self, chat: Chat) -> list[Json]:
        """What the bot has said there, oldest first."""
        return [message for message in chat.messages.values() if message["from"]["id"] == self.me["id"]]

    async def heard(self, chat: Chat, count: int = 1, within: float = 15.0) -> list[Json]:
        """Wait until the bot has said so much in `chat`."""
        await self.until(lambda: len(self.said_in(chat)) >= count, within)
        return self.said_in(chat)

    async def until(self, condition: Any, within: float = 15.0) -> None:
        end = time.monotonic() + within
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            await asyncio.sleep(0.01)

    async def idle(self, seconds: float = 0.5) -> None:
        """Wait until every update is fetched, and then some."""
        await self.until(lambda: not self._updates)
        await asyncio.sleep(seconds)

    # -- HTTP

    async def _call(self, request: web.Request) -> web.StreamResponse:
        method, token = request.match_info["method"], request.match_info["token"]
        form = await request.post() if request.method == "POST" else request.query
        fault = self._faults[method].popleft() if self._faults[method] else Fault()
        try:
            if token != self.token:
                raise Refused(401, "Unauthorized")
            if method not in METHODS:
                raise Refused(404, "Not Found: method not found")
            params = self._params(method, dict(form))
            self.calls.append(Call(method, params))
            await asyncio.sleep(fault.seconds)
            if fault.cut == "before":
                return _cut(request)
            if fault.retry_after is not None:
                wait = fault.retry_after
                raise Refused(429, f"Too Many Requests: retry after {wait}", wait)
            if fault.status is not None:
                raise Refused(fault.status, fault.description)
            result = await getattr(self, f"_{method}")(**params)
        except Refused as refused:
            body: Json = {"ok": False, "error_code": refused.status, "description": refused.description}
            if refused.retry_after is not None:
                body["parameters"] = {"retry_after": refused.retry_after}
            return web.json_response(body, status=refused.status)
        if fault.cut == "after":
            return _cut(request)
        return web.json_response({"ok": True, "result": result})

    def _params(self, method: str, form: Json) -> Json:
        kinds = {name.rstrip("?"): kind for name, kind in METHODS[method].fields.items()}
        try:
            params = {}
            for name, value in form.items():
                if name not in kinds:
                    raise Wrong(f"there is no parameter {name}")
                params[name] = value if isinstance(kinds[name], String) else json.loads(value)
            METHODS[method].check(params)
        except (Wrong, ValueError) as wrong:
            self.violations.append(f"{method}: {wrong}")
            raise Refused(400, f"Bad Request: {wrong}") from None
        return params

    # -- the methods

    async def _getMe(self) -> Json:  # noqa: N802
        return self.me

    async def _getUpdates(  # noqa: N802
        self,
        offset: int = 0,
        limit: int = 100,
        timeout: int = 0,  # noqa: ASYNC109
        allowed_updates: list[str] | None = None,
    ) -> list[Json]:
        if self.webhook.get("url"):
            raise Refused(409, "Conflict: can't use getUpdates method while webhook is active; use deleteWebhook first")
        if self._poll is not None:
            self._poll.set()
        poll = self._poll = asyncio.Event()
        self.polls += 1
        if allowed_updates is not None:
            self._allowed = allowed_updates
        while self._updates and self._updates[0]["update_id"] < offset:
            self._updates.popleft()
        end = time.monotonic() + timeout
        while True:
            found = [update for update in self._updates if self._is_allowed(update)]
            if found or (left := end - time.monotonic()) <= 0:
                if self._poll is poll:
                    self._poll = None
                return found[:limit]
            self._updates.clear()  # what is not allowed is never sent
            self._news.clear()
            waits = [asyncio.create_task(event.wait()) for event in (self._news, poll)]
            await asyncio.wait(waits, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            if poll.is_set():
                raise Refused(
                    409,
                    "Conflict: terminated by other getUpdates request; make sure that only one bot instance is running",
                )

    def _is_allowed(self, update: Json) -> bool:
        return not self._allowed or bool(set(update) & set(self._allowed))

    async def _setWebhook(self, url: str, **more: Any) -> bool:  # noqa: N802
        self.webhook = {"url": url, **more}
        self._allowed = more.get("allowed_updates", self._allowed)
        if self._calling is not None:
            self._calling.cancel()
        self._calling = asyncio.create_task(self._keep_calling()) if url else None
        return True

    async def _deleteWebhook(self, drop_pending_updates: bool = False) -> bool:  # noqa: N802
        if drop_pending_updates:
            self._updates.clear()
        await self._setWebhook("")
        return True

    async def _getWebhookInfo(self) -> Json:  # noqa: N802
        return {
            "url": self.webhook.get("url", ""),
            "has_custom_certificate": False,
            "pending_update_count": len(self._updates),
        }

    async def _keep_calling(self) -> None:
        """Deliver updates to the webhook, each until it is taken, as the reverse proxy would pass them on."""
        path = "/" + self.webhook["url"].split("/", 3)[3] if self.webhook["url"].count("/") > 2 else "/"
        async with aiohttp.ClientSession() as session:
            for n in itertools.count():
                while not (self._updates and self.replicas):
                    self._news.clear()
                    await asyncio.sleep(0.01)
                if not self._is_allowed(self._updates[0]):
                    self._updates.popleft()
                    continue
                secret = {"X-Telegram-Bot-Api-Secret-Token": self.webhook.get("secret_token", "")}
                try:
                    there = self.replicas[n % len(self.replicas)] + path
                    async with session.post(there, json=self._updates[0], headers=secret) as response:
                        if response.status == 200:
                            self._updates.popleft()
                            continue
                        self.refused_by_webhook += 1
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.05)

    async def _sendMessage(self, chat_id: int, text: str, **more: Any) -> Json:  # noqa: N802
        chat = self._open_chat(chat_id, more)
        message: Json = {
            "message_id": next(self._ids),
            "date": int(time.time()),
            "chat": chat.json,
            "from": self.me,
            "text": text,
        }
        if "message_thread_id" in more:
            message |= {"message_thread_id": more["message_thread_id"], "is_topic_message": True}
        if reply := more.get("reply_parameters"):
            parent = chat.messages.get(reply["message_id"])
            if parent is None and not reply.get("allow_sending_without_reply"):
                raise Refused(400, "Bad Request: message to be replied not found")
            if parent is not None:
                message["reply_to_message"] = {k: v for k, v in parent.items() if k != "reply_to_message"}
        chat.messages[message["message_id"]] = message
        return message

    async def _sendChatAction(self, chat_id: int, action: str, **more: Any) -> bool:  # noqa: N802
        self._open_chat(chat_id, more)
        return True

    def _open_chat(self, chat_id: int, more: Json) -> Chat:
        chat = self.chats.get(chat_id)
        if chat is None:
            raise Refused(400, "Bad Request: chat not found")
        if chat.closed_to_bot is not None:
            raise Refused(403, f"Forbidden: {chat.closed_to_bot}")
        if more.get("message_thread_id", 0) and more["message_thread_id"] not in chat.topics:
            raise Refused(400, "Bad Request: message thread not found")
        return chat

    async def _setMyCommands(self, commands: list[Json], **where: Any) -> bool:  # noqa: N802
        self.texts["commands", *_place(**where)] = commands
        return True

    async def _getMyCommands(self, **where: Any) -> Any:  # noqa: N802
        return self.texts.get(("commands", *_place(**where)), [])

    async def _setMyDescription(self, description: str = "", **where: Any) -> bool:  # noqa: N802
        self.texts["description", *_place(**where)] = description
        return True

    async def _getMyDescription(self, **where: Any) -> Json:  # noqa: N802
        return {"description": self.texts.get(("description", *_place(**where)), "")}

    async def _setMyShortDescription(self, short_description: str = "", **where: Any) -> bool:  # noqa: N802
        self.texts["short_description", *_place(**where)] = short_description
        return True

    async def _getMyShortDescription(self, **where: Any) -> Json:  # noqa: N802
        return {"short_description": self.texts.get(("short_description", *_place(**where)), "")}

    async def _answerInlineQuery(self, inline_query_id: str, results: list[Json], **_: Any) -> bool:  # noqa: N802
        self.inline_answers[inline_query_id] = results
        return True

    async def _answerGuestQuery(self, guest_query_id: str, result: Json) -> Json:  # noqa: N802
        if guest_query_id in self.guest_answers:
            raise Refused(400, "Bad Request: query is too old and response timeout expired or query ID is invalid")
        self.guest_answers[guest_query_id] = result
        return {"inline_message_id": f"message{guest_query_id}"}


def _place(scope: Json | None = None, language_code: str = "") -> tuple[str, str]:
    return (scope or {"type": "default"})["type"], language_code


def _cut(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


def entities_of(text: str) -> list[Json]:
    """The commands and mentions in `text`, with offsets in UTF-16 units as Telegram counts them."""

    def units(part: str) -> int:
        return len(part.encode("utf-16-le")) // 2

    found = re.finditer(r"(?<![\w/])/\w{1,32}(?:@\w+)?|(?<!\w)@\w{3,32}", text)
    return [
        {
            "type": "bot_command" if match[0].startswith("/") else "mention",
            "offset": units(text[: match.start()]),
            "length": units(match[0]),
        }
        for match in found
    ]
