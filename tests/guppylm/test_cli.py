"""The command, as real processes with real terminals."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from guppylm import __version__

ODD = ["hi guppy", "two\nlines", "", "a\u2028b", "\0\x07\x1b[2J", "🐟 你好", "<|im_end|>", '"quotes" \\ and {braces}']


def guppy(*arguments: str | Path, typed: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run the command with `typed` piped in."""
    return subprocess.run(
        [sys.executable, "-m", "guppylm", *map(str, arguments)],
        input=typed,
        capture_output=True,
        env={**os.environ, "COLUMNS": "400", "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=600,
    )


class Terminal:
    """A conversation in a terminal of its own."""

    def __init__(self, *arguments: str | Path) -> None:
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "xterm"
            os.execv(sys.executable, [sys.executable, "-m", "guppylm", *map(str, arguments)])
        self.seen = ""

    def wait_for(self, text: str, after: int = 0) -> int:
        """Read until `text` is on the screen; returns where it ends."""
        while text not in self.seen[after:]:
            try:
                self.seen += os.read(self.terminal, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(f"it ended without {text!r}: {self.seen}") from None
        return self.seen.index(text, after) + len(text)

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def exit_code(self) -> int:
        """Read what is left until it has ended."""
        while True:
            try:
                if not (more := os.read(self.terminal, 4096)):
                    break
                self.seen += more.decode(errors="replace")
            except OSError:  # the other end is closed
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@contextmanager
def conversation(model: Path) -> Iterator[Terminal]:
    terminal = Terminal("chat", "--model", model, "--seed", "1")
    try:
        terminal.wait_for("> ", terminal.wait_for("you"))
        yield terminal
    finally:
        os.close(terminal.terminal)


def test_p_prints_the_reply_and_nothing_else(small_fish: Path) -> None:
    first, second = (guppy("chat", "-p", "are you hungry", "-m", small_fish, "--seed", "4") for _ in range(2))
    assert first.returncode == 0
    assert first.stderr == b""
    assert first.stdout.count(b"\n") == 1
    assert first.stdout.strip()
    assert first.stdout == second.stdout


def test_the_fish_that_ships_has_replied_three_seconds_after_the_start() -> None:
    """The best of three. Where the machine is so busy that torch alone takes two seconds to import, twice that."""

    def seconds(*arguments: str) -> float:
        started = time.monotonic()
        subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
        return time.monotonic() - started

    assert any(
        seconds("-m", "guppylm", "chat", "-p", "hi") < max(3, 2 * seconds("-c", "import torch")) for _ in range(3)
    )


@pytest.mark.parametrize("prompt", ["", "<|im_end|> 🐟" * 400])
def test_p_takes_anything(small_fish: Path, prompt: str) -> None:
    result = guppy("chat", "-p", prompt, "-m", small_fish, "--device", "cpu")
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.strip()


def test_a_piped_line_gets_a_line(small_fish: Path) -> None:
    typed = "hi guppy\r\n\n  \nare you hungry\nnot \xff utf-8\nno new line at the end".encode("latin-1")
    result = guppy("chat", "-m", small_fish, "--seed", "1", typed=typed)
    assert (result.returncode, result.stderr) == (0, b"")
    lines = result.stdout.decode().split("\n")
    assert len(lines) == 5
    assert all(lines[:4])
    assert guppy("chat", "-m", small_fish, typed=b"").stdout == b""


def test_a_batch_comes_back_row_by_row(small_fish: Path, tmp_path: Path) -> None:
    rows = [{"id": number, "prompt": ODD[number % len(ODD)], "more": ["kept"]} for number in range(60)]
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + '\n\n{"id": 60, "prompt": "half \\ud83d"}\n'
    )
    result = guppy("chat", "--batch", path, "-m", small_fish, "--seed", "1")
    assert (result.returncode, result.stderr) == (0, b"")
    answered = [json.loads(line) for line in result.stdout.decode().split("\n")[:-1]]
    assert [{key: row[key] for key in row if key != "reply"} for row in answered] == [
        *rows,
        {"id": 60, "prompt": "half \ud83d"},
    ]
    assert all(row["reply"] for row in answered)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"prompt": "hi"}\n{"prompt": 3}\n', ':2 has no "prompt" text'),
        ('{"prompt": "hi"}\n{\n', ":2 is not JSON"),
        ("[]", ':1 has no "prompt" text'),
        (None, "Cannot read"),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, text: str | None, complaint: str) -> None:
    path = tmp_path / "prompts.jsonl"
    if text is not None:
        path.write_text(text)
    result = guppy("chat", "--batch", path)
    assert (result.returncode, result.stdout) == (1, b"")
    assert complaint in result.stderr.decode()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["chat", "--temperature", "nan"], "temperature is nan"),
        (["chat", "--top-k", "many"], "'--top-k'"),
        (["chat", "--loud"], "No such option: --loud"),
        (["chat", "-p", "hi", "--batch", "x"], "--prompt and --batch exclude each other"),
        (["sing"], "No such command 'sing'"),
        (["data", "-n", "3"], "'--conversations'"),
    ],
)
def test_a_wrong_option_is_named(arguments: list[str], complaint: str) -> None:
    result = guppy(*arguments)
    assert (result.returncode, result.stdout) == (2, b"")
    assert complaint in result.stderr.decode()


@pytest.mark.parametrize(
    ("option", "complaint"), [(("--model", "nemo"), "There is no model 'nemo'"), (("--device", "moon"), "'moon'")]
)
def test_a_fish_that_cannot_speak_says_why(small_fish: Path, option: tuple[str, str], complaint: str) -> None:
    result = guppy("chat", "-p", "hi", "--model", small_fish, *option)
    assert (result.returncode, result.stdout) == (1, b"")
    assert complaint in result.stderr.decode()
    assert result.stderr.count(b"\n") == 1


def test_version_and_help() -> None:
    assert guppy("--version").stdout.decode() == f"guppy {__version__}\n"
    assert b"evaluate" in guppy("--help").stdout


@pytest.mark.parametrize("way", ["/quit\n", "\x04", "\x03"])
def test_a_conversation_is_left_by_word_or_key(small_fish: Path, way: str) -> None:
    with conversation(small_fish) as terminal:
        terminal.type("are you hungry\n")
        at = terminal.wait_for("guppy")
        terminal.wait_for("you", at)
        terminal.type("   \n")
        at = terminal.wait_for("say something", at)
        at = terminal.wait_for("> ", terminal.wait_for("you", at))
        time.sleep(1)  # nobody presses a key in the instant in which the line begins
        terminal.type(way)
        assert terminal.exit_code() == 0
        assert "forgotten" in terminal.seen[at:]
        assert "Traceback" not in terminal.seen
        assert "Warning" not in terminal.seen


def test_a_long_message_is_said_to_be_long(small_fish: Path) -> None:
    with conversation(small_fish) as terminal:
        terminal.type("crumbs and " * 80 + "\n")
        terminal.wait_for("that was long")
        terminal.type("/quit\n")
        assert terminal.exit_code() == 0


def test_ctrl_c_while_lines_are_awaited_ends_at_once(small_fish: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "guppylm", "chat", "-m", str(small_fish)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdin, process.stdout, process.stderr:
        process.stdin.write(b"hi\n")
        process.stdin.flush()
        assert process.stdout.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.stderr.read() == b""


def test_data_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        result = guppy("data", "--out", tmp_path / name, "-n", "200", "--report")
        assert (result.returncode, result.stderr) == (0, b"")
    for name in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "a" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 190
    assert {"input", "output", "category"} <= set(rows[0])
    said = result.stdout.decode()
    assert "prompts in both: 0" in said
    assert "distinct replies" in said


def test_data_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = guppy("data", "-n", "100", "--out", tmp_path / "file" / "data")
    assert result.returncode == 1
    assert b"Cannot write to" in result.stderr
