"""The dashboard and the alerts ask for metrics that the processes really serve."""

import asyncio
import json
import re
import subprocess
from pathlib import Path

import promql_parser
import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from bot import metrics
from bot.queue import QueuedFish
from bot.settings import Settings
from tests.standins.processes import Process, awake, scrape, until
from tests.standins.redis_server import RedisServer, free_port

ROOT = Path(__file__).parents[2]
# What Prometheus itself adds to each target.
OWN = {"up": {"job", "instance"}}


def dashboard() -> dict[str, str]:
    board = json.loads((ROOT / "docker/grafana/guppy.json").read_text())
    return {
        f"{panel['title']}: {target['legendFormat']}": target["expr"]
        for panel in board["panels"]
        for target in panel.get("targets", [])
    }


def alerts() -> dict[str, str]:
    rules = yaml.safe_load((ROOT / "docker/prometheus/alerts.yml").read_text())
    return {rule["alert"]: rule["expr"] for group in rules["groups"] for rule in group["rules"]}


@pytest.fixture
async def served(redis_server: RedisServer, tmp_path: Path) -> dict[str, set[str]]:
    """Series -> labels: of a worker that has answered, over HTTP, and of an adapter's side."""
    port = free_port()
    settings = {"GUPPY_REDIS_URL": redis_server.url, "GUPPY_METRICS_PORT": str(port)}
    worker = Process(["-m", "tests.standins.engine"], tmp_path / "worker", settings)
    try:
        await awake(redis_server)
        async with QueuedFish(Settings.model_validate({"redis_url": redis_server.url})) as fish:
            await fish.ask("are you hungry")
        text = await asyncio.to_thread(scrape, port)
    finally:
        worker.process.terminate()
        await until(lambda: worker.process.poll() is not None)
    metrics.QUESTIONS.labels("discord", "answered").inc(0)
    metrics.REPLY_SECONDS.labels("discord").observe(0)
    metrics.RATE_LIMITED.labels("discord").inc(0)
    series: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text + generate_latest().decode()):
        for sample in family.samples:
            series.setdefault(sample.name, set()).update(sample.labels)
    return series


async def test_every_query_finds_what_it_asks_for(served: dict[str, set[str]]) -> None:
    queries = {**dashboard(), **alerts()}
    assert len(queries) > 15
    for title, query in queries.items():
        names = set(re.findall(r"\bguppy_\w+|\bup\b", query))
        assert names, title
        for name in names:
            labels = {**served, **OWN}.get(name)
            assert labels is not None, f"{title}: no process serves {name}"
            labels |= {"job", "instance"}
            grouped = re.findall(rf"by \(([^)]*)\) \((?:\w+\()?{name}\b", query)
            asked = {label.strip() for by in grouped for label in by.split(",")}
            asked |= set(re.findall(rf"{name}{{(\w+)", query))
            assert asked <= labels, f"{title}: {name} has no label {asked - labels}"


@pytest.mark.parametrize("query", {**dashboard(), **alerts()}.values(), ids={**dashboard(), **alerts()})
def test_every_query_is_promql(query: str) -> None:
    promql_parser.parse(query.replace("$__rate_interval", "1m"))


def test_every_alert_leads_to_its_page_of_the_manual() -> None:
    headings = re.findall(r"^#+ (.+)$", (ROOT / "docs/operating.md").read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    rules = yaml.safe_load((ROOT / "docker/prometheus/alerts.yml").read_text())
    for rule in rules["groups"][0]["rules"]:
        file, anchor = rule["annotations"]["runbook"].split("#")
        assert file == "docs/operating.md"
        assert anchor in anchors, rule["alert"]


def test_every_metric_is_on_the_dashboard() -> None:
    """One that nobody looks at should not be there."""
    everything = " ".join([*dashboard().values(), *alerts().values()])
    own = {family.name for family in text_string_to_metric_families(generate_latest().decode())}
    for name in (name for name in own if name.startswith("guppy_") and not name.endswith("_created")):
        assert name in everything


def test_promtool_reads_the_alerts() -> None:
    try:
        check = subprocess.run(
            ["promtool", "check", "config", ROOT / "docker/prometheus/prometheus.yml"], capture_output=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("needs promtool")
    assert check.returncode == 0, check.stdout
