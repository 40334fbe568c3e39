"""Make the pictures of the README anew, with the fish that ships: `.venv/bin/python docs/pictures.py`.

docs/chat.svg is a session of `guppy chat`, typed into a real terminal. docs/discord.svg is a conversation of the real
Discord client with simulated people. `--seed` takes another sample of what he says to the same words.
"""

import argparse
import asyncio
import os
import pty
import subprocess
import sys
import textwrap
import time
from html import escape
from io import StringIO
from pathlib import Path

import simcord
from rich.console import Console
from rich.text import Text

from bot.discord import build_client
from bot.fish import Reply
from bot.settings import Settings
from guppylm.engine import Engine, Sampling

HERE = Path(__file__).parent
TYPED = ["hi guppy", "are you hungry", "what is on the internet", "do you like the cat", "good night", "/quit"]


# --- a terminal ------------------------------------------------------------------------------------------------------

TERMINAL = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">
<style>
.{unique_id}-matrix {{ font: {char_height}px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; line-height: \
{line_height}px; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
"""Rich's own frame of a terminal, without the fonts that it would fetch."""


def chat(seed: int) -> str:
    """What a terminal shows of `guppy chat` when TYPED is typed into it, as SVG."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "84", "LINES": "30"}
    command = [sys.executable, "-m", "guppylm", "chat", "--seed", str(seed)]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = ""
    for line in TYPED:
        shown += _read_until(ours, "you   > ")
        time.sleep(0.3)  # so that what is typed stands behind the prompt
        os.write(ours, f"{line}\n".encode())
    shown += _read_until(ours, None)
    process.wait()
    os.close(ours)

    terminal = Console(record=True, width=84, file=StringIO(), force_terminal=True)
    terminal.print(Text.assemble("$ ", ("guppy chat", "bold")))
    terminal.print(Text.from_ansi(shown.replace("\r\n", "\n").strip("\n")))
    return terminal.export_svg(title="guppy chat", code_format=TERMINAL, unique_id="guppy")


def _read_until(terminal: int, prompt: str | None) -> str:
    """What the terminal shows up to `prompt`, or to the end."""
    shown = b""
    while prompt is None or prompt not in Text.from_ansi(shown.decode(errors="ignore")).plain:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # Linux's way of saying that nobody is there any more
            piece = b""
        if not piece:
            break
        shown += piece
    return shown.decode()


# --- Discord ---------------------------------------------------------------------------------------------------------


class SeededFish:
    """The fish that ships, who says the same to the same words."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self._engine, self._seed = engine, seed

    async def ask(self, prompt: str) -> Reply:
        completion = await self._engine.ask(prompt, Sampling(), seed=self._seed)
        return Reply(completion.text, completion.prompt_cut)


async def talk(seed: int) -> list[tuple[str, str, str]]:
    """(who, words, what stands above them) of each message in the channel, in order."""
    engine = Engine.load()
    settings = Settings.model_validate({"discord_token": "none", "person_per_minute": 1000, "person_burst": 100})
    async with simcord.run(build_client(settings, SeededFish(engine, seed))) as env:
        guild = env.create_guild()
        tank = guild.create_text_channel("aquarium")
        ada, ben, cleo = (guild.add_member(env.create_user(name)) for name in ("ada", "ben", "cleo"))
        assert env.bot.user is not None
        names = {env.bot.user.id: "Guppy", **{member.id: member.name for member in (ada, ben, cleo)}}
        guppy = env.bot.user.mention
        await ada.send(tank, f"{guppy} hi, are you hungry")
        await cleo.send(tank, "how is the light in there", reply_to=tank.last_message)
        await ben.slash(tank, "guppy", message="do you like the cat")
        await ben.send(tank, guppy, attachments=[("lunch.png", b"a picture")])
        said, by_id = [], {}
        for message in tank.history():
            who = names[message.author.id]
            words = message.content.replace(guppy, "@Guppy")
            words += "".join(f" [{attachment.filename}]" for attachment in message.attachments)
            above = ""
            if message.interaction_metadata is not None:
                above = f"{names[message.interaction_metadata.user.id]} used /guppy message: do you like the cat"
            elif message.reference is not None and message.reference.message_id in by_id:
                above = "{}: {}".format(*by_id[message.reference.message_id])
            by_id[message.id] = (who, words)
            said.append((who, words, above))
    await engine.aclose()
    return said


WIDTH, LINE, LETTERS = 720, 21, 78
COLORS = {"Guppy": "#f2a93b", "ada": "#e07a9b", "ben": "#6fb4e8", "cleo": "#8fd07a"}
FISH = '<path d="M-9 0C-5 -8 5 -8 8 -1L14 -6V6L8 1C5 8 -5 8 -9 0Z" fill="#1f2a38"/><circle cx="-4" cy="-1.5" r="1.3" \
fill="#fff"/>'


def discord(said: list[tuple[str, str, str]]) -> str:
    """The conversation as a chat, as SVG."""
    rows: list[str] = []
    y = 70
    for who, words, above in said:
        if above:
            rows.append(
                f'<path d="M38 {y + 10}V{y}Q38 {y - 6} 44 {y - 6}H66" fill="none" stroke="#4e5058" stroke-width="2"/>'
            )
            above = textwrap.shorten(above, LETTERS, placeholder=" …")
            rows.append(f'<text x="74" y="{y - 2}" class="dim">{escape(above)}</text>')
            y += 20
        rows.append(f'<circle cx="38" cy="{y + 10}" r="18" fill="{COLORS[who]}"/>')
        if who == "Guppy":
            rows.append(f'<g transform="translate(37 {y + 10})">{FISH}</g>')
        else:
            rows.append(f'<text x="38" y="{y + 16}" class="letter">{who[0].upper()}</text>')
        rows.append(f'<text x="74" y="{y + 5}" class="name" style="fill:{COLORS[who]}">{who}</text>')
        if who == "Guppy":
            rows.append(f'<rect x="126" y="{y - 8}" width="36" height="16" rx="4" fill="#5865f2"/>')
            rows.append(f'<text x="144" y="{y + 4}" class="tag">APP</text>')
        for line in textwrap.wrap(words, LETTERS):
            y += LINE
            rows.append(f'<text x="74" y="{y + 5}">{_with_mentions(line)}</text>')
        y += 42
    height = y - 8
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">
<style>
text {{ font: 15px "Noto Sans", "Helvetica Neue", Helvetica, Arial, sans-serif; fill: #dbdee1; }}
.dim {{ font-size: 13px; fill: #949ba4; }}
.name {{ font-weight: 600; }}
.letter {{ font-weight: 600; text-anchor: middle; fill: #1f2a38; }}
.tag {{ font-size: 10px; font-weight: 600; text-anchor: middle; fill: #fff; }}
.mention {{ fill: #c9cdfb; }}
</style>
<rect width="{WIDTH}" height="{height}" rx="8" fill="#313338"/>
<text x="20" y="30" font-weight="600"># aquarium</text>
<path d="M0 46H{WIDTH}" stroke="#26282c"/>
{chr(10).join(rows)}
</svg>
"""


def _with_mentions(line: str) -> str:
    return escape(line).replace("@Guppy", '<tspan class="mention">@Guppy</tspan>')


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--seed", type=int, default=1)
    seed = parser.parse_args().seed
    (HERE / "chat.svg").write_text(chat(seed))
    (HERE / "discord.svg").write_text(discord(asyncio.run(talk(seed))))
