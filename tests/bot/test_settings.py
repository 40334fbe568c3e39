"""Settings are checked before anything connects, and a mistake is told in one sentence: `bot/settings.py`."""

import os
from pathlib import Path

import pytest

from bot import settings as module
from bot.refusal import ExitCode, Refusal
from bot.settings import Settings, load

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("GUPPY_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def refused() -> str:
    with pytest.raises(Refusal) as refusal:
        load()
    assert refusal.value.exit_code is ExitCode.SETTINGS
    return refusal.value.sentence


def test_everything_has_a_default_that_works() -> None:
    settings = load()
    assert settings.discord_token is settings.telegram_token is settings.redis_url is None
    assert settings.telegram_api_base == "https://api.telegram.org/bot"


def test_the_environment_comes_before_dotenv(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("GUPPY_DEADLINE=7\nGUPPY_QUEUE_CAP=5\nCOMPOSE_PROFILES=discord\n")
    monkeypatch.setenv("GUPPY_DEADLINE", "9")
    settings = load()
    assert (settings.deadline, settings.queue_cap) == (9.0, 5)


def test_a_secret_may_stand_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "guppy_discord_token").write_text("from-a-file\n")
    monkeypatch.setattr(module, "SECRETS", tmp_path)
    monkeypatch.setitem(Settings.model_config, "secrets_dir", tmp_path)
    token = load().discord_token
    assert token is not None
    assert token.get_secret_value() == "from-a-file"
    (tmp_path / "guppy_discord_tokne").write_text("a typing mistake")
    assert "GUPPY_DISCORD_TOKNE" in refused()
    assert "GUPPY_DISCORD_TOKEN?" in refused()


def test_an_empty_value_means_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUPPY_DISCORD_TOKEN", "")
    assert load().discord_token is None


@pytest.mark.parametrize("where", ["environment", ".env"])
def test_an_unknown_setting_is_named_and_the_nearest_one_offered(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    if where == "environment":
        monkeypatch.setenv("GUPPY_TELEGRAM_TOKN", "x")
    else:
        Path(".env").write_text("GUPPY_TELEGRAM_TOKN=x\n")
    sentence = refused()
    assert "GUPPY_TELEGRAM_TOKN" in sentence
    assert where in sentence
    assert "GUPPY_TELEGRAM_TOKEN?" in sentence


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DEADLINE", "soon"),
        ("DEADLINE", "0"),
        ("QUEUE_CAP", "-1"),
        ("LOG_LEVEL", "LOUD"),
        ("DISCORD_CHANNELS", "12,general"),
        ("DISCORD_SHARDS", "0"),
        ("DISCORD_DMS", "perhaps"),
        ("DISCORD_GATEWAY_URL", "https://gateway"),
        ("DISCORD_API_BASE", "discord.com"),
        ("TELEGRAM_API_BASE", "https://api.telegram.org"),
        ("TELEGRAM_WEBHOOK_URL", "http://insecure.example"),
        ("TELEGRAM_WEBHOOK_URL", "https://without.a.secret.example"),
        ("TELEGRAM_WEBHOOK_SECRET", "with spaces in it"),
        ("REDIS_URL", "localhost:6379"),
        ("METRICS_PORT", "100000"),
    ],
)
def test_a_wrong_value_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"GUPPY_{name}", value)
    assert f"GUPPY_{name}" in refused()


@pytest.mark.parametrize("name", ["DISCORD_TOKEN", "TELEGRAM_TOKEN", "TELEGRAM_WEBHOOK_SECRET", "REDIS_URL"])
def test_a_wrong_secret_is_refused_without_being_shown(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"GUPPY_{name}", "hunter2 ")
    assert "hunter2" not in refused()


def test_lists_of_ids_are_written_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUPPY_DISCORD_CHANNELS", " 12, 34 ,")
    assert load().discord_channels == {12, 34}


def test_a_secret_never_shows_in_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUPPY_DISCORD_TOKEN", "hunter2")
    monkeypatch.setenv("GUPPY_REDIS_URL", "redis://:hunter2@localhost")
    settings = load()
    assert "hunter2" not in f"{settings} {settings!r} {settings.model_dump()}"


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().deadline = 1.0


def test_the_example_names_every_setting_with_its_default() -> None:
    """`.env.example` is the documentation: copied as it is, it changes nothing."""
    example = (ROOT / ".env.example").read_text()
    lines = [line.removeprefix("#") for line in example.splitlines() if "=" in line and "GUPPY_" in line]
    named = dict(line.split("=", 1) for line in lines)
    assert set(named) == {f"GUPPY_{name.upper()}" for name in Settings.model_fields}
    Path(".env").write_text("\n".join(lines))
    assert load() == Settings.model_construct(**{n: f.get_default() for n, f in Settings.model_fields.items()})
