"""What people on Discord see: the real client and its commands under simcord, which plays Discord and checks each call.

What needs real sockets (a gateway that drops, floods, tokens) is in test_discord_sockets.py.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import discord
import pytest
import simcord
from prometheus_client import REGISTRY
from simcord.backend.models import MessageSticker, Poll, PollAnswer
from simcord.enums import MessageType

from bot import discord as adapter
from bot import voice
from bot.discord import build_client
from bot.fish import Asleep, Busy, Confused, FishError, Reply
from bot.settings import Settings


class StandInFish:
    """Answers every question with itself, or as it is told."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.reply: Reply | Exception | None = None
        self.seconds = 0.0

    async def ask(self, prompt: str) -> Reply:
        self.asked.append(prompt)
        if self.seconds:
            await asyncio.sleep(self.seconds)
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply or Reply(f"blub. {prompt}")


@dataclass
class Aquarium:
    """A server with Guppy in it, a channel and a person."""

    env: Any
    fish: StandInFish
    guild: Any
    tank: Any
    alice: Any
    me: str
    """Guppy's mention."""

    def heard(self, channel: Any = None) -> list[str]:
        """What Guppy said in the channel, in order."""
        return [m.content for m in (channel or self.tank).history() if m.author.id == self.env.bot.user.id]

    def sent(self, ending: str = "/messages") -> list[Any]:
        """What Guppy's calls to an address carried."""
        return [r.json for r in self.env.http_requests if r.method == "POST" and r.path.endswith(ending)]


Fill = Callable[..., AbstractAsyncContextManager[Aquarium]]


@asynccontextmanager
async def aquarium(
    fish: StandInFish | None = None, *, intents: discord.Intents | None = None, **values: Any
) -> AsyncIterator[Aquarium]:
    """Guppy at home, with settings of the test. Without `intents` no privileged one is granted."""
    fish = fish or StandInFish()
    settings = Settings.model_validate({"person_per_minute": 1000, "person_burst": 100, **values})
    granted = intents or discord.Intents(**dict.fromkeys(discord.Intents.VALID_FLAGS, True) | PRIVILEGED)
    async with simcord.run(build_client(settings, fish), approved_intents=granted) as env:
        guild = env.create_guild()
        tank = guild.create_text_channel("tank")
        alice = guild.add_member(env.create_user("alice"))
        assert env.bot.user is not None
        yield Aquarium(env, fish, guild, tank, alice, env.bot.user.mention)


PRIVILEGED = {"message_content": False, "members": False, "presences": False}


def counted(outcome: str) -> float:
    return REGISTRY.get_sample_value("guppy_questions_total", {"platform": "discord", "outcome": outcome}) or 0


# --- when he speaks


async def test_he_asks_for_no_privileged_intent() -> None:
    async with aquarium() as a:
        asked = {name for name, on in a.env.bot.intents if on}
        assert asked == {"guilds", "guild_messages", "dm_messages"}


@pytest.mark.parametrize("form", ["{me} are you hungry", "are you hungry {me}", "<@!{id}> are you hungry"])
async def test_a_mention_is_answered(form: str) -> None:
    async with aquarium() as a:
        await a.alice.send(a.tank, form.format(me=a.me, id=a.env.bot.user.id))
        assert a.fish.asked == ["are you hungry"]
        assert a.heard() == ["blub. are you hungry"]


async def test_a_direct_message_is_answered() -> None:
    async with aquarium() as a:
        bob = a.env.create_user("bob")
        await bob.send_dm("are you hungry")
        assert a.heard(bob.dm_channel) == ["blub. are you hungry"]


async def test_a_reply_to_him_is_answered() -> None:
    async with aquarium() as a:
        await a.alice.send(a.tank, f"{a.me} hello")
        await a.alice.send(a.tank, "what do you eat", reply_to=a.tank.last_message)
        assert a.fish.asked == ["hello", "what do you eat"]
        assert a.heard()[-1] == "blub. what do you eat"


async def test_a_reply_that_discord_does_not_show_him_gets_a_line_of_its_own() -> None:
    async with aquarium() as a:
        told = await a.alice.slash(a.tank, "guppy", message="hello")
        await a.alice.send(a.tank, "what do you eat", reply_to=told.response)  # words withheld: it answers a command
        assert a.heard()[-1] in voice.variants("unheard")
        await a.alice.send(a.tank, "and now", reply_to=told.response)
        assert a.fish.asked == ["hello"]
        assert len(a.heard()) == 2  # told once


async def test_what_is_not_said_to_him_is_not_answered() -> None:
    async with aquarium() as a:
        bob = a.guild.add_member(a.env.create_user("bob"))
        role = a.guild.create_role("fish", permissions=discord.Permissions.all())
        admin = a.guild.add_member(a.env.create_user("admin"), roles=[role])
        talk = await a.alice.send(a.tank, "just talking")
        await bob.send(a.tank, "to alice", reply_to=talk)
        await admin.send(a.tank, "@everyone hello guppy")
        await admin.send(a.tank, "@here hello guppy")
        await admin.send(a.tank, f"{role.mention} {bob.mention} hello guppy")
        assert a.fish.asked == []
        assert a.heard() == []


async def test_bots_webhooks_and_system_messages_are_not_answered() -> None:
    async with aquarium() as a:
        robot = a.guild.add_member(a.env.create_user("robot", bot=True))
        await a.alice.send(a.tank, f"{a.me} hello")
        await robot.send(a.tank, f"{a.me} hello", reply_to=a.tank.last_message)
        await a.guild.create_webhook(a.tank).send(f"{a.me} hello")
        a.guild.create_system_message(a.tank, MessageType.NEW_MEMBER, author=a.alice)
        await a.env.settle()
        a.env.bot.dispatch("message", a.tank.history()[-1])  # what he said himself
        await a.env.settle()
        assert a.heard() == ["blub. hello"]


async def test_in_a_thread_and_a_forum_post_he_answers_there() -> None:
    async with aquarium() as a:
        backend, forum = a.env.backend, a.guild.create_forum_channel("forum")
        for parent in (a.tank, forum):
            backend.create_thread(parent.id, "a thread", a.alice.id)
            await a.env.settle()
            thread = parent.threads[0]
            await a.alice.send(thread, f"{a.me} hello")
            assert a.heard(thread) == ["blub. hello"]
        assert a.heard() == []


async def test_edits_are_not_answered() -> None:
    async with aquarium() as a:
        message = await a.alice.send(a.tank, "hello")
        await a.alice.edit(message, f"{a.me} hello")
        assert a.fish.asked == []


async def test_in_a_home_channel_everything_is_answered_and_only_there() -> None:
    async with aquarium() as plan:
        home = plan.tank.id  # the same in every aquarium
    async with aquarium(discord_home_channels=[home], discord_channels=[1], intents=discord.Intents.all()) as a:
        assert a.env.bot.intents.message_content
        other = a.guild.create_text_channel("other")
        await a.alice.send(other, "just talking")
        assert a.fish.asked == []
        await a.alice.send(a.tank, "just talking")
        assert a.heard() == ["blub. just talking"]


# --- how he speaks


async def test_he_answers_as_a_reply_that_pings_nobody() -> None:
    async with aquarium() as a:
        a.fish.reply = Reply("hello @everyone and <@123456789012345678>")
        question = await a.alice.send(a.tank, f"{a.me} hello")
        said = a.tank.last_message
        assert said.reference.message_id == question.id
        assert not said.mention_everyone
        [sent] = a.sent()
        assert sent["allowed_mentions"] == {"parse": [], "replied_user": False}
        assert (sent["nonce"], sent["enforce_nonce"]) == (str(question.id), True)
        assert a.alice.user.mention not in said.content


@pytest.mark.parametrize(
    "text",
    [
        *(
            "# big",
            "**bold** and *thin*",
            "`code`",
            "||hidden||",
            "> quoted",
            "- listed",
            "~~gone~~",
            "[look](https://x.org)",
        ),
        *("https://x.org/a_b_c", "http://x.org", "discord.gg/abc", "@everyone", "@here", "<@123456789012345678>"),
    ],
)
async def test_markup_mentions_and_links_in_a_reply_do_nothing(text: str) -> None:
    async with aquarium() as a:
        a.fish.reply = Reply(text)
        await a.alice.send(a.tank, f"{a.me} hello")
        [said] = a.heard()
        assert not re.search(
            r"(?<!\\)[*`|~]|^(#|>|-) |@(everyone|here)|<@\d|(?<!\\)\[.*\]\(|https?://|discord\.gg", said
        )
        plain = re.sub(r"[\\\u200b]", "", said)
        assert plain == text


async def test_an_ordinary_reply_is_left_as_it_is() -> None:
    async with aquarium() as a:
        a.fish.reply = Reply("yes. i'm hungry, even when i am full. is that a well-known thing?")
        await a.alice.send(a.tank, f"{a.me} hello")
        assert a.heard() == ["yes. i'm hungry, even when i am full. is that a well-known thing?"]


async def test_typing_shows_before_the_reply() -> None:
    async with aquarium() as a:
        await a.alice.send(a.tank, f"{a.me} hello")
        calls = [r.path.rsplit("/", 1)[1] for r in a.env.http_requests if str(a.tank.id) in r.path]
        assert calls == ["typing", "messages"]


async def test_a_failing_typing_sign_loses_nothing() -> None:
    async with aquarium() as a:
        a.env.inject_error("POST", "/channels/*/typing", status=403, code=50013)
        await a.alice.send(a.tank, f"{a.me} hello")
        assert a.heard() == ["blub. hello"]


@pytest.mark.parametrize(
    ("name", "line"), [("a.png", "photo"), ("a.mp4", "video"), ("a.mp3", "voice"), ("a.zip", "file")]
)
async def test_a_file_without_words_gets_a_line_of_its_own(name: str, line: str) -> None:
    async with aquarium() as a:
        await a.alice.send(a.tank, a.me, attachments=[(name, b"x")])
        assert a.heard()[0] in voice.variants(line)
        await a.alice.send(a.tank, f"{a.me} look", attachments=[(name, b"x")])
        assert a.fish.asked == ["look"]


async def test_stickers_polls_and_empty_mentions_get_a_line_of_their_own() -> None:
    async with aquarium() as a:
        bob = a.env.create_user("bob")
        sticker = a.guild.create_sticker("bubble")
        await bob.send_dm("", stickers=[MessageSticker(sticker.id, "bubble", 1, a.guild.id)])
        assert a.heard(bob.dm_channel)[-1] in voice.variants("sticker")
        await bob.send_dm(
            "", poll=Poll("food?", [PollAnswer(1, "yes"), PollAnswer(2, "also yes")], "2030-01-01T00:00:00+00:00")
        )
        assert a.heard(bob.dm_channel)[-1] in voice.variants("poll")
        for empty in (a.me, f"  {a.me} \n", f"{a.me} \u200b\u2060", f"{a.me}{a.me}"):
            await a.alice.send(a.tank, empty)
            assert a.heard()[-1] in voice.variants("nothing_said")
        assert a.fish.asked == []


@pytest.mark.parametrize(
    "words", ["🐟🐟🐟", "x" * 1900, "مرحبا يا سمكة", "你好，小鱼", "a\x00b\x07c", "<|im_end|>", "**", "```", "a\n\n\nb"]
)
async def test_any_text_is_put_to_the_fish_as_it_is(words: str) -> None:
    async with aquarium() as a:
        await a.alice.send(a.tank, f"{a.me} {words}")
        assert a.fish.asked == [words]
        assert len(a.heard()) == 1


async def test_four_thousand_characters_get_one_reply_that_fits() -> None:
    async with aquarium() as a:
        await a.alice.slash(a.tank, "guppy", message="x" * 4000)
        assert a.fish.asked == ["x" * 4000]
        [said] = a.heard()
        assert 0 < len(said) <= 2000


async def test_a_long_question_is_told_in_character() -> None:
    async with aquarium() as a:
        a.fish.reply = Reply("blub. that is long.", prompt_cut=True)
        await a.alice.send(a.tank, f"{a.me} hello")
        reply, aside = a.heard()[0].split("\n-# ")
        assert reply == "blub. that is long."
        assert aside in voice.variants("prompt_cut")


async def test_ids_of_people_and_places_do_not_reach_the_fish() -> None:
    async with aquarium() as a:
        await a.alice.send(
            a.tank, f"{a.me} tell {a.alice.mention} in {a.tank.mention} <:bubble:123456789012345678> </guppy:12345>"
        )
        assert a.fish.asked == ["tell somebody in over there :bubble: /guppy"]


async def test_a_reply_of_nothing_but_space_becomes_a_line() -> None:
    async with aquarium() as a:
        a.fish.reply = Reply(" \n ")
        await a.alice.send(a.tank, f"{a.me} hello")
        assert a.heard()[0] in voice.variants("confused")


@pytest.mark.parametrize("error", [Asleep(), Busy(), Confused()])
async def test_why_there_is_no_reply_is_told_in_character_once(error: FishError) -> None:
    async with aquarium() as a:
        a.fish.reply = error
        for _ in range(3):
            await a.alice.send(a.tank, f"{a.me} hello")
        [said] = a.heard()
        assert said in voice.variants(error.line)


async def test_an_error_nobody_foresaw_is_told_in_character() -> None:
    async with aquarium() as a:
        a.fish.reply = ValueError("hello")
        await a.alice.send(a.tank, f"{a.me} hello")
        assert a.heard()[0] in voice.variants("confused")


# --- commands


async def test_the_command_is_deferred_first_and_then_answered() -> None:
    async with aquarium() as a:
        result = await a.alice.slash(a.tank, "guppy", message="are you hungry")
        assert result.response.content == "blub. are you hungry"
        assert not result.ephemeral
        calls = [(r.method, r.path.rsplit("/", 1)[1]) for r in a.env.http_requests][-2:]
        assert calls == [("POST", "callback"), ("PATCH", "@original")]
        assert a.sent("/callback")[-1]["type"] == 5


async def test_a_hidden_answer_is_for_the_one_who_asked() -> None:
    async with aquarium() as a:
        result = await a.alice.slash(a.tank, "guppy", message="psst", hidden=True)
        assert result.ephemeral
        assert result.response.content == "blub. psst"


async def test_a_message_is_shown_to_him_from_its_menu() -> None:
    async with aquarium() as a:
        bob = a.guild.add_member(a.env.create_user("bob"))
        message = await bob.send(a.tank, "i had soup")  # not said to him, so he has not read it
        assert a.fish.asked == []
        result = await a.alice.context_menu(a.tank, "Ask Guppy", message)
        assert result.response.content == "blub. i had soup"
        picture = await bob.send(a.tank, "", attachments=[("a.png", b"x")])
        result = await a.alice.context_menu(a.tank, "Ask Guppy", picture)
        assert result.response.content in voice.variants("photo")


@pytest.mark.parametrize(("name", "key"), [("help", "help_discord"), ("about", "about"), ("privacy", "privacy")])
async def test_help_about_and_privacy_are_told_to_the_one_who_asked(name: str, key: str) -> None:
    async with aquarium() as a:
        for result in (await a.alice.slash(a.tank, name), await a.env.create_user("bob").slash(name)):
            assert result.ephemeral
            assert result.response.content == voice.say(key)


async def test_commands_work_in_direct_messages() -> None:
    async with aquarium() as a:
        result = await a.env.create_user("bob").slash("guppy", message="hello")
        assert result.response.content == "blub. hello"


async def test_a_command_is_told_each_time_why_there_is_no_reply() -> None:
    async with aquarium() as a:
        a.fish.reply = Asleep()
        for hidden in (False, False, True):
            result = await a.alice.slash(a.tank, "guppy", message="hello", hidden=hidden)
            assert result.response.content in voice.variants("asleep")
            assert result.ephemeral == hidden


# --- limits


async def test_a_person_who_is_too_fast_is_told_once_and_others_are_answered() -> None:
    async with aquarium(person_per_minute=1, person_burst=2) as a:
        bob = a.guild.add_member(a.env.create_user("bob"))
        for n in range(5):
            await a.alice.send(a.tank, f"{a.me} {n}")
        assert a.heard()[:2] == ["blub. 0", "blub. 1"]
        assert a.heard()[2] in voice.variants("too_fast")
        assert len(a.heard()) == 3
        await bob.send(a.tank, f"{a.me} me too")
        assert a.heard()[-1] == "blub. me too"


async def test_a_command_that_comes_too_fast_is_refused_to_that_person_alone() -> None:
    async with aquarium(person_per_minute=1, person_burst=2) as a:
        for _ in range(2):
            assert (await a.alice.slash(a.tank, "guppy", message="hello")).response.content == "blub. hello"
        result = await a.alice.slash(a.tank, "guppy", message="hello")
        assert result.ephemeral
        assert result.response.content in voice.variants("too_fast")
        assert len(a.fish.asked) == 2


async def test_messages_and_commands_share_a_persons_limit() -> None:
    async with aquarium(person_per_minute=1, person_burst=2) as a:
        for n in range(2):
            await a.alice.send(a.tank, f"{a.me} {n}")
        result = await a.alice.slash(a.tank, "guppy", message="hello")
        assert result.response.content in voice.variants("too_fast")
        assert len(a.fish.asked) == 2


async def test_a_loop_in_one_channel_is_broken_and_other_channels_go_on() -> None:
    async with aquarium(person_per_minute=100_000, person_burst=1000) as a:
        people = [a.guild.add_member(a.env.create_user(f"person{n}")) for n in range(3)]
        before = counted("loop")
        for n in range(40):
            await people[n % 3].send(a.tank, f"{a.me} {n}")
        assert len(a.heard()) == 30
        assert counted("loop") == before + 10
        other = a.guild.create_text_channel("other")
        await people[0].send(other, f"{a.me} hello")
        assert a.heard(other) == ["blub. hello"]


async def test_one_who_floods_does_not_silence_the_channel() -> None:
    async with aquarium(person_per_minute=1, person_burst=2) as a:
        bob = a.guild.add_member(a.env.create_user("bob"))
        for n in range(50):
            await a.alice.send(a.tank, f"{a.me} {n}")
        await bob.send(a.tank, f"{a.me} me too")
        assert a.heard()[-1] == "blub. me too"


async def test_so_many_questions_at_once_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "AT_ONCE", 2)
    fish = StandInFish()
    fish.seconds = 0.05
    client = build_client(Settings(), fish)
    asked = [asyncio.create_task(client._ask(str(n))) for n in range(3)]
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(result) for result in results] == [Reply, Reply, Busy]


async def test_the_same_message_twice_is_answered_once() -> None:
    async with aquarium() as a:
        message = await a.alice.send(a.tank, f"{a.me} hello")
        a.env.bot.dispatch("message", message)
        await a.env.settle()
        assert a.heard() == ["blub. hello"]


async def test_where_he_may_not_write_nothing_happens() -> None:
    async with aquarium() as a:
        deny = discord.PermissionOverwrite(send_messages=False)
        quiet = a.guild.create_text_channel("quiet", overwrites={a.env.bot.user: deny})
        before = counted("undeliverable")
        await a.alice.send(quiet, f"{a.me} hello")
        assert a.heard(quiet) == []
        assert counted("undeliverable") == before + 1
        assert len(a.sent()) == 1


# --- admins


async def test_only_in_the_channels_categories_and_forums_that_are_allowed() -> None:
    async with aquarium() as plan:
        ids = [plan.tank.id, plan.guild.create_category("pond").id, plan.guild.create_forum_channel("forum").id]
    async with aquarium(discord_channels=ids) as a:
        pond, forum = a.guild.create_category("pond"), a.guild.create_forum_channel("forum")
        assert [a.tank.id, pond.id, forum.id] == ids
        inside = [a.tank, a.guild.create_text_channel("in the pond", category=pond)]
        for parent in (a.tank, inside[1], forum):
            a.env.backend.create_thread(parent.id, "thread", a.alice.id)
            await a.env.settle()
            inside.append(parent.threads[0])
        outside = a.guild.create_text_channel("outside")
        for place in inside:
            await a.alice.send(place, f"{a.me} hello")
            assert a.heard(place) == ["blub. hello"]
        await a.alice.send(outside, f"{a.me} hello")
        assert a.heard(outside) == []
        result = await a.alice.slash(outside, "guppy", message="hello")
        assert result.ephemeral
        assert result.response.content == voice.say("not_here")
        assert (await a.alice.slash(inside[1], "guppy", message="hello")).response.content == "blub. hello"


async def test_direct_messages_can_be_off() -> None:
    async with aquarium(discord_dms=False) as a:
        bob = a.env.create_user("bob")
        for _ in range(3):
            await bob.send_dm("hello")
        assert a.heard(bob.dm_channel) == [voice.say("no_dms")]
        result = await bob.slash("guppy", message="hello")
        assert result.response.content == voice.say("no_dms")
        assert a.fish.asked == []
        assert (await bob.slash("privacy")).response.content == voice.say("privacy")


async def test_fixed_texts_follow_the_language_of_the_server() -> None:
    async with aquarium() as a:
        guild = a.env.create_guild("aquarium", preferred_locale="de")
        tank = guild.create_text_channel("becken")
        await guild.add_member(a.env.create_user("bob")).send(tank, a.me)
        assert a.heard(tank)[0] in voice.variants("nothing_said", "de")


# --- life


async def test_the_client_keeps_no_messages_and_no_members() -> None:
    async with aquarium() as a:
        await a.alice.send(a.tank, f"{a.me} hello")
        assert list(a.env.bot.cached_messages) == []
        assert {member.id for member in a.env.bot.get_guild(a.guild.id).members} <= {a.env.bot.user.id}


async def test_commands_are_registered_at_the_first_start_only() -> None:
    fish = StandInFish()
    async with simcord.run(build_client(Settings(), fish)) as env:
        await env.restart_bot(build_client(Settings(), fish))
        assert sum(r.method == "PUT" for r in env.http_requests) == 1


# --- what docs/discord.md says


def test_the_page_for_admins_names_the_settings_and_permissions_that_there_are() -> None:
    page = (Path(__file__).parents[2] / "docs" / "discord.md").read_text()
    for name in re.findall(r"GUPPY_\w+", page):
        assert name.removeprefix("GUPPY_").lower() in Settings.model_fields, name
    for field in Settings.model_fields:
        if field.startswith("discord_") and not field.endswith(("_api_base", "_gateway_url")):
            assert f"`GUPPY_{field.upper()}`" in page
    table = re.findall(r"^\| ((?:View|Send|Read) [A-Za-z ]+) \|", page, re.MULTILINE)
    names = [row.lower().replace(" ", "_").replace("view_channels", "view_channel") for row in table]
    assert discord.Permissions(**dict.fromkeys(names, True)) == adapter.PERMISSIONS
