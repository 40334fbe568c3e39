"""What an operator can watch: Prometheus metrics of every process. No label tells people apart.

Each process counts its own; `serve` shows them where the settings say.
"""

from prometheus_client import Counter, Gauge, Histogram, start_http_server

from bot.settings import Settings

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0)

# Adapters: labelled by platform ("discord", "telegram").
QUESTIONS = Counter(
    "guppy_questions",
    "What became of the questions that reached an adapter: answered, the key of the line that was said or would have "
    "been (asleep, busy, confused, too_fast, still_thinking, photo...), duplicate, stale (too old), loop (too many "
    "answers in one channel), undeliverable (the platform refused the reply)",
    ["platform", "outcome"],
)
REPLY_SECONDS = Histogram(
    "guppy_reply_seconds", "From a question's arrival at the adapter to its reply", ["platform"], buckets=_SECONDS
)
RATE_LIMITED = Counter("guppy_platform_rate_limited", "429s from the platform", ["platform"])

# The queue, as its workers see it.
QUEUE_DEPTH = Gauge("guppy_queue_depth", "Questions on the queue, those in work included")
QUEUE_AGE = Gauge("guppy_queue_age_seconds", "Age of the oldest question on the queue")
WORKERS = Gauge("guppy_workers", "Workers that showed progress in the last seconds")
QUEUE_WAIT = Histogram(
    "guppy_queue_wait_seconds", "From a question's arrival on the queue to a worker", buckets=_SECONDS
)

# Workers.
WORK = Counter(
    "guppy_work",
    "What became of the questions that a worker took: answered, expired (nobody waited any more), overtaken (another "
    "worker was first), failed (given up after the second try), unreadable, unknown_version",
    ["outcome"],
)
RETRIES = Counter("guppy_work_retries", "Questions taken over because their worker died, hung or failed")

# Wherever the engine is: workers, or the one process of the embedded fish.
FIRST_WORD = Histogram(
    "guppy_first_word_seconds", "From a question's start in the engine to its reply's first token", buckets=_SECONDS
)
INFER_SECONDS = Histogram("guppy_infer_seconds", "From a question's start in the engine to its reply", buckets=_SECONDS)
TOKENS = Counter("guppy_tokens", "Tokens written")
IN_HAND = Gauge("guppy_in_hand", "Questions that this process's engine has in work")

# Both ends.
REDIS_RECONNECTS = Counter("guppy_redis_reconnects", "Connections to Redis that had to be made anew")


def serve(settings: Settings) -> None:
    """Serve this process's metrics over HTTP in a thread of their own, if the settings name a port."""
    if settings.metrics_port is not None:
        start_http_server(settings.metrics_port, settings.metrics_host)
