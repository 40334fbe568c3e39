"""A small Discord on this machine: the REST calls and the gateway that Guppy uses, over real sockets.

    async with DiscordServer() as discord:
        ... start a client with `discord.environment` in its settings ...
        await discord.connected()
        message = await discord.say("are you hungry", mention=True)
        reply = await discord.reply_to(message)

It keeps to what Discord documents where a bot can notice: a session's events are numbered and replayed after a RESUME,
words are withheld without the Message Content intent unless they are said to the bot, an interaction is acknowledged
once and expires, a nonce posts one message only, a reply to a deleted message is refused.
"""

import asyncio
import itertools
import json
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import WSMsgType, web

TOKEN = "a-token.of-the.stand-in"
BOT = 200_000_000_000_000_001
GUILD = 300_000_000_000_000_001
CHANNEL = 400_000_000_000_000_001
DIRECT = 400_000_000_000_000_002
ELSEWHERE = 300_000_000_000_000_002
PERSON = 500_000_000_000_000_001
MESSAGE_CONTENT = 1 << 15

_EPOCH = 1_420_070_400_000
_counter = itertools.count(1)


def snowflake(seconds_ago: float = 0.0) -> int:
    """An id as Discord makes them: its time is in it."""
    return (int((time.time() - seconds_ago) * 1000) - _EPOCH << 22) + next(_counter) % 4096


def person(id: int = PERSON, name: str = "alice", **fields: Any) -> dict[str, Any]:
    return {"id": str(id), "username": name, "discriminator": "0", "avatar": None, "global_name": name, **fields}


@dataclass
class Session:
    """What the gateway remembers of one shard of a client, connected or not."""

    id: str
    shard: list[int]
    intents: int
    presences: list[str]
    """Each status shown, in order."""
    events: list[dict[str, Any]] = field(default_factory=list)
    socket: "_Socket | None" = None


class _Socket:
    """A websocket of the gateway, compressed as the client asked."""

    def __init__(self, websocket: web.WebSocketResponse, request: web.Request) -> None:
        self.websocket = websocket
        self.transport = request.transport
        self._deflate = zlib.compressobj() if request.query.get("compress") == "zlib-stream" else None

    async def send(self, op: int, data: Any = None, **more: Any) -> None:
        text = json.dumps({"op": op, "d": data, "s": None, "t": None, **more})
        if self._deflate is None:
            await self.websocket.send_str(text)
        else:
            packed = self._deflate.compress(text.encode()) + self._deflate.flush(zlib.Z_SYNC_FLUSH)
            await self.websocket.send_bytes(packed)


class DiscordServer:
    """Discord with one server, one channel and one direct chat; `say`, `command` and `drop` are its outside world."""

    def __init__(self, *, shards: int = 1, flags: int = 1 << 23, allowed_intents: int = ~MESSAGE_CONTENT) -> None:
        self.shards = shards
        self.flags = flags
        self.allowed_intents = allowed_intents
        self.heartbeat = 41.25
        """Seconds between two heartbeats of a client."""
        self.starts_left = 1000
        self.sessions: dict[str, Session] = {}
        self.identifies: list[dict[str, Any]] = []
        self.resumes: list[dict[str, Any]] = []
        self.posted: list[dict[str, Any]] = []
        """Every message that stands in a channel because of the bot, in order."""
        self.requests: list[tuple[str, str]] = []
        """Method and path of every REST call, in order."""
        self.commands: list[dict[str, Any]] = []
        self.interactions: dict[str, dict[str, Any]] = {}
        self.deleted: set[str] = set()
        self.faults: list[Callable[[str, str], web.Response | str | None]] = []
        """Asked for each REST call: another response, "break" to cut the connection once it is done, or None."""
        self.hang: set[str] = set()
        """Endings of the paths of REST calls that are never answered."""
        self.acknowledges = True
        """Whether heartbeats are acknowledged."""
        self.refuse_gateway = False
        """Whether new connections of the gateway are turned away."""
        self.ignores_close = False
        """Whether the gateway leaves a client's farewell unanswered."""
        self._nonces: dict[str, dict[str, Any]] = {}
        self._runner: web.AppRunner | None = None
        self.port = 0

    # --- starting and stopping

    async def __aenter__(self) -> "DiscordServer":
        app = web.Application(middlewares=[self._middleware])
        app.add_routes(
            [
                web.get("/api/v10/users/@me", self._me),
                web.get("/api/v10/oauth2/applications/@me", self._application),
                web.get("/api/v10/gateway/bot", self._gateway_bot),
                web.get("/api/v10/applications/{app}/commands", self._get_commands),
                web.put("/api/v10/applications/{app}/commands", self._put_commands),
                web.post("/api/v10/channels/{channel}/typing", self._typing),
                web.post("/api/v10/channels/{channel}/messages", self._post),
                web.post("/api/v10/interactions/{id}/{token}/callback", self._callback),
                web.patch("/api/v10/webhooks/{app}/{token}/messages/@original", self._edit_original),
                web.delete("/api/v10/webhooks/{app}/{token}/messages/@original", self._delete_original),
                web.post("/api/v10/webhooks/{app}/{token}", self._follow_up),
                web.get("/gateway/", self._gateway),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        self.drop()
        await self._runner.cleanup()

    @property
    def environment(self) -> dict[str, str]:
        """The settings of a Guppy that lives here."""
        return {
            "GUPPY_DISCORD_TOKEN": TOKEN,
            "GUPPY_DISCORD_API_BASE": f"http://127.0.0.1:{self.port}/api/v10",
            "GUPPY_DISCORD_GATEWAY_URL": f"ws://127.0.0.1:{self.port}/gateway/",
        }

    # --- the outside world

    async def say(
        self,
        words: str,
        *,
        mention: bool = True,
        direct: bool = False,
        author: dict[str, Any] | None = None,
        seconds_ago: float = 0.0,
        **fields: Any,
    ) -> str:
        """Somebody writes a message. Its id."""
        message: dict[str, Any] = {
            "id": str(snowflake(seconds_ago)),
            "channel_id": str(DIRECT if direct else CHANNEL),
            "author": author or person(),
            "content": f"<@{BOT}> {words}" if mention and not direct else words,
            "mentions": [person(BOT, "guppy", bot=True)] if mention and not direct else [],
            **{"type": 0, "tts": False, "pinned": False, "mention_everyone": False, "mention_roles": []},
            **{"attachments": [], "embeds": [], "edited_timestamp": None, "timestamp": "2026-01-01T00:00:00+00:00"},
            **fields,
        }
        if not direct:
            message["guild_id"] = str(GUILD)
            message["member"] = {"roles": [], "joined_at": "2026-01-01T00:00:00+00:00", "deaf": False, "mute": False}
        await self.dispatch("MESSAGE_CREATE", message)
        return str(message["id"])

    async def command(self, name: str, locale: str = "en-US", where: str = "server", **options: Any) -> str:
        """Somebody uses a command in the "server", a "direct" chat, a "group", or "elsewhere": in a server that the
        bot isn't in, by a person who has added it for themselves. The interaction's id.
        """
        id = str(snowflake())
        kinds = {str: 3, int: 4, bool: 5}
        self.interactions[id] = {"token": f"interaction-{id}", "answer": None, "acknowledged": False, "hidden": False}
        registered = next(command for command in self.commands if command["name"] == name)
        data = {
            "id": registered["id"],
            "name": name,
            "type": 1,
            "options": [{"name": key, "type": kinds[type(value)], "value": value} for key, value in options.items()],
        }
        interaction: dict[str, Any] = {
            **{"id": id, "application_id": str(BOT), "type": 2, "token": self.interactions[id]["token"], "version": 1},
            **{"data": data, "locale": locale, "app_permissions": "0", "entitlements": [], "attachment_size_limit": 0},
        }
        if where in ("server", "elsewhere"):
            guild, channel = (GUILD, CHANNEL) if where == "server" else (ELSEWHERE, ELSEWHERE + 1)
            interaction |= {
                **{"guild_id": str(guild), "channel_id": str(channel), "context": 0, "guild_locale": "en-US"},
                "guild": {"id": str(guild), "locale": "en-US", "features": []},
                "channel": {"id": str(channel), "type": 0, "name": "tank", "permissions": "0", "position": 0},
                "member": {"user": person(), "roles": [], "joined_at": "2026-01-01T00:00:00+00:00", "permissions": "0"}
                | {"deaf": False, "mute": False, "flags": 0},
                "authorizing_integration_owners": {"0": str(guild)} if where == "server" else {"1": str(PERSON)},
            }
        else:
            interaction |= {
                **{"channel_id": str(DIRECT), "user": person(), "context": 1 if where == "direct" else 2},
                "channel": {"id": str(DIRECT), "type": 1 if where == "direct" else 3, "recipients": [person()]},
                "authorizing_integration_owners": {"1": str(PERSON)},
            }
        await self.dispatch("INTERACTION_CREATE", interaction)
        return id

    async def dispatch(self, event: str, data: dict[str, Any]) -> None:
        """Let an event happen, for every session that should hear of it, connected or not."""
        for session in self.sessions.values():
            if "guild_id" in data and (int(data["guild_id"]) >> 22) % session.shard[1] != session.shard[0]:
                continue
            if "guild_id" not in data and session.shard[0] != 0:
                continue
            shown = _withhold(data) if event == "MESSAGE_CREATE" and not session.intents & MESSAGE_CONTENT else data
            await self._emit(session, event, shown)

    async def connected(self, sessions: int = 1, within: float = 15.0) -> None:
        """Until so many shards have a session that is connected."""
        await _until(lambda: sum(s.socket is not None for s in self.sessions.values()) >= sessions, within)

    async def reply_to(self, id: str, within: float = 15.0) -> str:
        """What Guppy replied to the message with this id, once he has."""
        await _until(lambda: bool(self.replies(id)), within)
        return self.replies(id)[0]

    def replies(self, id: str) -> list[str]:
        """Every reply to the message with this id."""
        return [
            message["content"]
            for message in self.posted
            if str(message.get("message_reference", {}).get("message_id")) == id
        ]

    async def answer_to(self, interaction: str, within: float = 15.0) -> str:
        """The final answer to a command, once it is there."""
        await _until(lambda: self.interactions[interaction]["answer"] is not None, within)
        return str(self.interactions[interaction]["answer"])

    def drop(self) -> None:
        """Cut every connection of the gateway, as a network does: without a word."""
        for session in self.sessions.values():
            if session.socket is not None and session.socket.transport is not None:
                session.socket.transport.abort()
            session.socket = None

    async def close_sessions(self, code: int) -> None:
        """Close every connection of the gateway with a code of Discord's."""
        for session in self.sessions.values():
            if session.socket is not None:
                socket, session.socket = session.socket, None
                await socket.websocket.close(code=code)

    async def ask_to_reconnect(self) -> None:
        """RECONNECT, as before a restart of Discord's own gateways."""
        for session in self.sessions.values():
            if session.socket is not None:
                socket, session.socket = session.socket, None
                await socket.send(7)

    def forget_sessions(self) -> None:
        """What is resumed from now on is answered with INVALID_SESSION."""
        self.drop()
        self.sessions.clear()

    def count(self, method: str, ending: str) -> int:
        """How many REST calls there were so far."""
        return sum(m == method and path.endswith(ending) for m, path in self.requests)

    # --- REST

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path.startswith("/gateway"):
            upgraded: web.StreamResponse = await handler(request)
            return upgraded
        self.requests.append((request.method, request.path))
        public = request.path.startswith(("/api/v10/interactions", "/api/v10/webhooks"))
        if not public and request.headers.get("Authorization") != f"Bot {TOKEN}":
            return error(401, 0, "401: Unauthorized")
        if any(request.path.endswith(ending) for ending in self.hang):
            await asyncio.Event().wait()
        for fault in self.faults:
            instead = fault(request.method, request.path)
            if isinstance(instead, web.Response):
                return instead
            if instead == "break":
                await handler(request)
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
        answered: web.StreamResponse = await handler(request)
        return answered

    async def _me(self, _: web.Request) -> web.Response:
        return _json(person(BOT, "guppy", bot=True))

    async def _application(self, _: web.Request) -> web.Response:
        return _json(
            {
                **{"id": str(BOT), "name": "guppy", "description": "", "icon": None, "verify_key": "", "summary": ""},
                **{"bot_public": True, "bot_require_code_grant": False, "owner": person(), "flags": self.flags},
            }
        )

    async def _gateway_bot(self, _: web.Request) -> web.Response:
        limit = {"total": 1000, "remaining": self.starts_left, "reset_after": 1000, "max_concurrency": 1}
        url = f"ws://127.0.0.1:{self.port}/gateway/"
        return _json({"url": url, "shards": self.shards, "session_start_limit": limit})

    async def _get_commands(self, _: web.Request) -> web.Response:
        return _json(self.commands)

    async def _put_commands(self, request: web.Request) -> web.Response:
        fixed = {"application_id": str(BOT), "version": "1", "description": ""}
        self.commands = [{**fixed, "id": str(snowflake()), **command} for command in await request.json()]
        return _json(self.commands)

    async def _typing(self, _: web.Request) -> web.Response:
        return web.Response(status=204)

    async def _post(self, request: web.Request) -> web.Response:
        body = await request.json()
        nonce = body.get("nonce")
        if nonce is not None and body.get("enforce_nonce") and nonce in self._nonces:
            return _json(self._nonces[nonce])
        if not body.get("content"):
            return error(400, 50006, "Cannot send an empty message")
        if len(body["content"]) > 2000:
            return error(400, 50035, "Invalid Form Body")
        reference = body.get("message_reference")
        if reference and str(reference["message_id"]) in self.deleted and reference.get("fail_if_not_exists", True):
            return error(400, 50035, "Invalid Form Body")
        message = self._message(request.match_info["channel"], body)
        self.posted.append(message)
        if nonce is not None:
            self._nonces[nonce] = message
        return _json(message)

    def _message(self, channel: str, body: dict[str, Any]) -> dict[str, Any]:
        return {
            **{"id": str(snowflake()), "channel_id": channel, "author": person(BOT, "guppy", bot=True), "type": 19},
            **{"attachments": [], "embeds": [], "mentions": [], "mention_roles": [], "mention_everyone": False},
            **{"edited_timestamp": None, "timestamp": "2026-01-01T00:00:00+00:00", "tts": False, "pinned": False},
            "content": body.get("content", ""),
            "flags": body.get("flags", 0),
            **({"message_reference": body["message_reference"]} if body.get("message_reference") else {}),
            "sent": body,
        }

    async def _callback(self, request: web.Request) -> web.Response:
        interaction = self.interactions.get(request.match_info["id"])
        if interaction is None or interaction.get("expired"):
            return error(404, 10062, "Unknown interaction")
        if interaction["acknowledged"]:
            return error(400, 40060, "Interaction has already been acknowledged.")
        body = await request.json()
        data = body.get("data") or {}
        interaction["acknowledged"] = True
        interaction["hidden"] = bool(data.get("flags", 0) & 64)
        if body["type"] == 4:
            interaction["answer"] = data["content"]
        seen = {"id": request.match_info["id"], "type": 2, "response_message_id": str(snowflake())}
        return _json({"interaction": seen})

    def _by_token(self, request: web.Request) -> dict[str, Any]:
        return next(i for i in self.interactions.values() if i["token"] == request.match_info["token"])

    async def _edit_original(self, request: web.Request) -> web.Response:
        body = await request.json()
        self._by_token(request)["answer"] = body["content"]
        return _json(self._message(str(CHANNEL), body))

    async def _delete_original(self, request: web.Request) -> web.Response:
        self._by_token(request)["answer"] = None
        return web.Response(status=204)

    async def _follow_up(self, request: web.Request) -> web.Response:
        body = await request.json()
        interaction = self._by_token(request)
        interaction["answer"] = body["content"]
        interaction["hidden"] = bool(body.get("flags", 0) & 64)
        return _json(self._message(str(CHANNEL), body))

    # --- the gateway

    async def _gateway(self, request: web.Request) -> web.WebSocketResponse:
        if self.refuse_gateway:
            raise web.HTTPServiceUnavailable
        websocket = web.WebSocketResponse(autoclose=False)
        await websocket.prepare(request)
        socket = _Socket(websocket, request)
        session: Session | None = None
        await socket.send(10, {"heartbeat_interval": self.heartbeat * 1000})
        async for frame in websocket:
            if frame.type is not WSMsgType.TEXT:
                break
            message = json.loads(frame.data)
            op, data = message["op"], message["d"]
            if op == 1:
                if self.acknowledges:
                    await socket.send(11)
            elif op == 2:
                session = await self._identify(socket, data)
            elif op == 3 and session is not None:
                session.presences.append(data["status"])
            elif op == 6:
                session = await self._resume(socket, data)
        if self.ignores_close:
            await asyncio.sleep(60)
        await websocket.close()
        if session is not None and session.socket is socket:
            session.socket = None
        return websocket

    async def _identify(self, socket: _Socket, data: dict[str, Any]) -> Session | None:
        self.identifies.append(data)
        if data["token"] != TOKEN:
            await socket.websocket.close(code=4004)
            return None
        if data["intents"] & ~self.allowed_intents:
            await socket.websocket.close(code=4014)
            return None
        shard = data.get("shard", [0, 1])
        session = Session(f"session-{snowflake()}", shard, data["intents"], [data["presence"]["status"]])
        session.socket = socket
        self.sessions = {id: s for id, s in self.sessions.items() if s.shard != shard or s.socket is not None}
        self.sessions[session.id] = session
        await self._emit(
            session,
            "READY",
            {
                **{"v": 10, "user": person(BOT, "guppy", bot=True), "session_id": session.id, "shard": shard},
                "guilds": [{"id": str(GUILD), "unavailable": True}],
                "resume_gateway_url": f"ws://127.0.0.1:{self.port}/gateway/",
                "application": {"id": str(BOT), "flags": self.flags},
            },
        )
        if (GUILD >> 22) % shard[1] == shard[0]:
            channel = {"id": str(CHANNEL), "type": 0, "name": "tank", "position": 0, "permission_overwrites": []}
            everyone = {"id": str(GUILD), "name": "@everyone", "permissions": "0", "position": 0, "color": 0}
            await self._emit(
                session,
                "GUILD_CREATE",
                {
                    **{"id": str(GUILD), "name": "aquarium", "owner_id": str(PERSON), "preferred_locale": "en-US"},
                    **{"channels": [channel], "members": [], "threads": [], "emojis": [], "features": []},
                    **{"member_count": 2, "large": False, "unavailable": False, "voice_states": [], "presences": []},
                    "roles": [everyone | {"hoist": False, "managed": False, "mentionable": False}],
                },
            )
        return session

    async def _resume(self, socket: _Socket, data: dict[str, Any]) -> Session | None:
        self.resumes.append(data)
        session = self.sessions.get(data["session_id"] or "")
        if session is None:
            await socket.send(9, False)
            return None
        session.socket = socket
        for event in list(session.events):
            if event["s"] > data["seq"]:
                await socket.send(0, event["d"], s=event["s"], t=event["t"])
        await self._emit(session, "RESUMED", {})
        return session

    async def _emit(self, session: Session, event: str, data: dict[str, Any]) -> None:
        numbered = {"t": event, "s": len(session.events) + 1, "d": data}
        session.events.append(numbered)
        if session.socket is not None:
            try:
                await session.socket.send(0, data, s=numbered["s"], t=event)
            except ConnectionError:
                session.socket = None


def _withhold(message: dict[str, Any]) -> dict[str, Any]:
    """A message as a bot without the Message Content intent sees it."""
    mentioned = any(user["id"] == str(BOT) for user in message["mentions"])
    if "guild_id" not in message or mentioned or message["author"]["id"] == str(BOT):
        return message
    return message | {"content": "", "attachments": [], "embeds": []}


def _json(data: Any, status: int = 200) -> web.Response:
    # Not aiohttp's own: Discord names no charset, and discord.py looks closely.
    return web.Response(body=json.dumps(data).encode(), status=status, content_type="application/json")


def error(status: int, code: int, message: str = "an error") -> web.Response:
    return _json({"code": code, "message": message}, status=status)


def too_many(retry_after: float) -> web.Response:
    """A 429: as Discord limits floods, in the words that discord.py waits for."""
    body = {"message": "You are being rate limited.", "retry_after": retry_after, "global": False}
    response = _json(body, 429)
    response.headers.update({"Via": "1.1 google", "X-RateLimit-Remaining": "0", "X-RateLimit-Bucket": "b"})
    return response


async def _until(condition: Callable[[], bool], within: float) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)
