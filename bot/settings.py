"""Every knob of the service, typed, and checked before anything connects.

A setting comes from the environment (`GUPPY_...`), from `.env` in the working directory, or from a file named after it
in `/run/secrets` (`guppy_discord_token`), in this order. A `GUPPY_` name that is not a setting is an error: a typing
mistake should not become a default.
"""

import difflib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from bot.refusal import ExitCode, Refusal

PREFIX = "GUPPY_"
DOTENV = Path(".env")
SECRETS = Path("/run/secrets")


def _split(value: Any) -> Any:
    """`"123, 456"` as people write lists in an environment."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Ids = Annotated[frozenset[int], NoDecode, BeforeValidator(_split)]


class Settings(BaseSettings):
    """One frozen object for all roles; each role reads what concerns it."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=DOTENV,
        secrets_dir=SECRETS if SECRETS.is_dir() else None,
        env_ignore_empty=True,  # `GUPPY_DISCORD_TOKEN=` in a copied .env means "none"
        extra="ignore",  # .env belongs to compose too; `load` refuses unknown GUPPY_ names
        frozen=True,
        hide_input_in_errors=True,
    )

    # Discord
    discord_token: SecretStr | None = None
    """The bot's token. Without one, `all` leaves Discord out."""
    discord_channels: Ids = frozenset()
    """Ids of the channels, forums or categories where the fish may speak; empty: everywhere it can see."""
    discord_home_channels: Ids = frozenset()
    """Ids of channels where it answers every message, not only mentions. Needs the Message Content intent."""
    discord_dms: bool = True
    """Whether it answers direct messages."""
    discord_shards: int | None = Field(default=None, ge=1)
    """How many gateway connections in this process; none: as many as Discord recommends."""
    discord_api_base: str = "https://discord.com/api/v10"
    discord_gateway_url: str | None = None
    """Another gateway (ws:// or wss://) than the one that the API names."""

    # Telegram
    telegram_token: SecretStr | None = None
    """The bot's token, as BotFather gives it. Without one, `all` leaves Telegram out."""
    telegram_guest: bool = False
    """Answer where the bot is mentioned without being a member (guest mode; switch it on at BotFather first)."""
    telegram_inline: bool = False
    """Answer inline queries (switch them on at BotFather first)."""
    telegram_webhook_url: str | None = None
    """The public https:// address that Telegram shall call; none: long polling."""
    telegram_webhook_secret: SecretStr | None = None
    """What Telegram must send along with each call: 1-256 of A-Z a-z 0-9 _ -. Needed with a webhook."""
    telegram_webhook_listen: str = "127.0.0.1"
    telegram_webhook_port: int = Field(default=8080, ge=1, le=65535)
    """Where this process listens for the reverse proxy."""
    telegram_api_base: str = "https://api.telegram.org/bot"
    """A self-hosted Bot API server's address, with its `/bot` at the end."""

    # The queue
    redis_url: SecretStr | None = None
    """redis://, rediss:// (TLS) or unix://. Without one, `all` keeps the fish in its own process."""
    redis_password: SecretStr | None = None
    """The password, where it should not stand in the address."""
    queue_cap: int = Field(default=1000, ge=1)
    """Open questions on the queue; one more is refused."""
    deadline: float = Field(default=20.0, gt=0, le=300)
    """Seconds after which nobody waits for a reply any more."""

    # What one person may ask
    person_per_minute: float = Field(default=12.0, gt=0)
    """Questions a minute in the long run."""
    person_burst: int = Field(default=4, ge=1)
    """Questions at once after a pause."""

    # The model
    model: str = "guppy-9m"
    """A name that ships with the package, a folder, or `owner/name` on the hub."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    max_batch: int = Field(default=32, ge=1)
    """Replies that one worker writes at the same time."""

    # Watching it
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["auto", "console", "json"] = "auto"
    """auto: for people on a terminal, JSON elsewhere."""
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = Field(default=None, ge=1, le=65535)
    """Where to serve Prometheus metrics; none: nowhere."""

    @field_validator("discord_token", "telegram_token")
    @classmethod
    def _token(cls, token: SecretStr | None) -> SecretStr | None:
        if token is not None and any(c.isspace() or c in "\"'" for c in token.get_secret_value()):
            raise ValueError("contains a space, a line break or a quote; copy the bare token again")
        return token

    @field_validator("redis_url")
    @classmethod
    def _redis(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None and urlsplit(url.get_secret_value()).scheme not in ("redis", "rediss", "unix"):
            raise ValueError("should begin with redis://, rediss:// or unix://")
        return url

    @field_validator("telegram_api_base")
    @classmethod
    def _telegram_base(cls, base: str) -> str:
        if not base.endswith("/bot") or urlsplit(base).scheme not in ("http", "https"):
            raise ValueError("should be an http(s) address that ends in /bot, like https://api.telegram.org/bot")
        return base

    @field_validator("discord_api_base")
    @classmethod
    def _discord_base(cls, base: str) -> str:
        if urlsplit(base).scheme not in ("http", "https"):
            raise ValueError("should be an http(s) address, like https://discord.com/api/v10")
        return base.rstrip("/")

    @field_validator("discord_gateway_url")
    @classmethod
    def _gateway(cls, url: str | None) -> str | None:
        if url is not None and urlsplit(url).scheme not in ("ws", "wss"):
            raise ValueError("should begin with ws:// or wss://")
        return url

    @field_validator("telegram_webhook_secret")
    @classmethod
    def _secret(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is not None:
            text = secret.get_secret_value()
            if len(text) > 256 or not all(c.isascii() and (c.isalnum() or c in "_-") for c in text):
                raise ValueError("should be 1 to 256 of A-Z, a-z, 0-9, _ and -")
        return secret

    @model_validator(mode="after")
    def _webhook(self) -> "Settings":
        if self.telegram_webhook_url is not None:
            if urlsplit(self.telegram_webhook_url).scheme != "https":
                raise ValueError("GUPPY_TELEGRAM_WEBHOOK_URL should begin with https://, as Telegram demands")
            if self.telegram_webhook_secret is None:
                raise ValueError(
                    "GUPPY_TELEGRAM_WEBHOOK_URL needs GUPPY_TELEGRAM_WEBHOOK_SECRET, or anybody could speak as Telegram"
                )
        return self


def load() -> Settings:
    """The settings of this process. Raises `Refusal` with one sentence that names what is wrong, never a secret."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for name, where in _named():
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            raise Refusal(
                f"There is no setting {name.upper()} (found in {where}).{_nearest(name.upper(), known)}", _CODE
            )
    try:
        return Settings()
    except ValidationError as error:
        raise Refusal(" ".join(_sentence(e["loc"], e["msg"]) for e in error.errors()), _CODE) from None


_CODE = ExitCode.SETTINGS


def _named() -> Iterator[tuple[str, str]]:
    """Every name that could be meant as a setting, and where it stands."""
    yield from ((name, "the environment") for name in os.environ)
    yield from ((name, str(DOTENV)) for name in dotenv_values(DOTENV) if DOTENV.is_file())
    if SECRETS.is_dir():
        yield from ((path.name, str(SECRETS)) for path in SECRETS.iterdir())


def _nearest(name: str, known: set[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {nearest[0]}?" if nearest else ""


def _sentence(where: tuple[int | str, ...], message: str) -> str:
    what = message.removeprefix("Value error, ").rstrip(".")
    return f"{PREFIX}{str(where[0]).upper()}: {what}." if where else f"{what}."
