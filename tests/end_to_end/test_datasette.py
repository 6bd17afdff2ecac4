"""Datasette, for real: sync-only models enrich tables of a `datasette serve` on loopback."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import pytest

from llm_async_attachments.loopback import MediaHost

NEEDED = ("datasette", "datasette_llm", "datasette_enrichments", "datasette_enrichments_llm")

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED),
    reason="needs datasette and its plugins: pip install 'llm-async-attachments[datasette]'",
)

ROWS = 50
PATIENCE = 120  # seconds after which a job that is not finished has failed
CONFIG = {
    "permissions": {"enrichments": True},
    "plugins": {
        "datasette-llm": {
            "purposes": {
                "enrichments": {
                    "models": [
                        "local",
                        {"model": "with-options", "options": {"times": 3}},
                        "failing",
                        "slow",
                    ]
                }
            }
        }
    },
}


class Server:
    """A `datasette serve`, its database, and a client."""

    def __init__(self, path: Path) -> None:
        self.database = path / "data.db"
        sqlite3.connect(self.database).execute("pragma journal_mode=wal").connection.close()
        config = path / "datasette.json"
        config.write_text(json.dumps(CONFIG))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.log = path / "server.log"
        plugins = Path(__file__).parent / "datasette_plugins"
        command = [sys.executable, "-m", "datasette", "serve", str(self.database)]
        command += ["--port", str(port), "--config", str(config), "--plugins-dir", str(plugins)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, "LLM_USER_PATH": str(path / "llm")},
            )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if self.client.get("/-/versions.json").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        pytest.fail("datasette did not start: " + self.log.read_text())

    def stop(self) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait(timeout=30)

    def create(self, table: str, rows: list[dict[str, Any]]) -> None:
        connection = sqlite3.connect(self.database, timeout=30)
        with connection:
            connection.execute(f"create table [{table}] (id integer primary key, name, image_url)")
            connection.executemany(
                f"insert into [{table}] values (:id, :name, :image_url)",
                [{"image_url": None, **row} for row in rows],
            )
        connection.close()

    def rows(self, table: str, where: str = "1") -> list[dict[str, Any]]:
        connection = sqlite3.connect(self.database, timeout=30)
        connection.row_factory = sqlite3.Row
        found = [dict(row) for row in connection.execute(f"select * from [{table}] where {where}")]
        connection.close()
        return found

    def enrich(self, table: str, model: str, *, filters: str = "", **form: Any) -> int:
        """Start a job as the form of Datasette does; gives its id."""
        answer = self.client.post(
            f"/-/enrich/data/{table}/llm?{filters}",
            data={"model": model, "prompt": "{{ name }}", "output_column": "out", **form},
        )
        assert answer.status_code == 302, answer.text
        return int(answer.headers["location"].rpartition("_enrichment_job=")[2])

    def job(self, job_id: int) -> dict[str, Any]:
        return self.rows("_enrichment_jobs", f"id = {job_id}")[0]

    def finish(self, *job_ids: int) -> list[dict[str, Any]]:
        deadline = time.monotonic() + PATIENCE
        while any(self.job(job_id)["status"] in ("pending", "running") for job_id in job_ids):
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        return [self.job(job_id) for job_id in job_ids]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("datasette"))
    try:
        running.wait_until_up()
        # What is imported at the first prompt is no part of what is measured below.
        running.create("warm_up", [{"id": 1, "name": "x"}])
        for model in ("local", "with-options", "failing", "slow"):
            running.finish(running.enrich("warm_up", model))
        yield running
    finally:
        running.stop()


class Poller:
    """Another client, that asks the server for something small every 50 ms.

    `gaps` is how long it had to wait for each answer, without the waits in which this very process
    was stalled too: then it was the machine.
    """

    def __init__(self, server: Server) -> None:
        self._url = str(server.client.base_url.join("/-/versions.json"))
        self._done = threading.Event()
        self._beats: list[float] = []
        self._polls: list[tuple[float, float]] = []
        self._threads = [threading.Thread(target=f) for f in (self._poll, self._beat)]

    def __enter__(self) -> Poller:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()

    def _poll(self) -> None:
        with httpx.Client(timeout=60, trust_env=False) as client:
            client.get(self._url)
            while not self._done.wait(0.05):
                start = time.monotonic()
                assert client.get(self._url).status_code == 200
                self._polls.append((start, time.monotonic()))

    def _beat(self) -> None:
        while not self._done.wait(0.005):
            self._beats.append(time.monotonic())

    @property
    def gaps(self) -> list[float]:
        stalls = [(a, b) for a, b in itertools.pairwise(self._beats) if b - a > 0.05]
        return [
            end - start
            for start, end in self._polls
            if not any(a < end and start < b for a, b in stalls)
        ]


def numbered(count: int = ROWS) -> list[dict[str, Any]]:
    return [{"id": i, "name": f"row {i}"} for i in range(1, count + 1)]


def test_enriches_a_table_while_another_client_polls(server: Server, media_host: MediaHost):
    "50 rows, every fifth with media: each answered in full, one load of the weights, no gap."
    image = media_host.url("image.png")
    rows = [{**row, "image_url": image if row["id"] % 5 == 0 else None} for row in numbered()]
    server.create("photos", rows)
    size = len(httpx.get(image).content)
    with Poller(server) as poller:
        jobs = [
            server.enrich(
                "photos",
                "local",
                filters="image_url__notblank=1",
                use_media="y",
                media_url="{{ image_url }}",
            ),
            server.enrich("photos", "local", filters="image_url__isblank=1"),
        ]
        finished = server.finish(*jobs)
    assert [job["error_count"] for job in finished] == [0, 0]
    assert [job["done_count"] for job in finished] == [10, 40]
    for row in server.rows("photos"):
        media = f" image/png {size}" if row["image_url"] else ""
        assert row["out"].startswith(f"{row['name']}:{media}.")
        assert row["out"].endswith(" loads 1 most 1")
    assert len(poller.gaps) > 10
    assert max(poller.gaps) < 0.25


def test_four_jobs_at_once(server: Server):
    "Four jobs at once, two of them of one model, each finish with their own answers."
    models = ["local", "local", "with-options", "slow"]
    for i, _ in enumerate(models):
        server.create(f"four_{i}", numbered())
    with Poller(server) as poller:
        jobs = [server.enrich(f"four_{i}", model) for i, model in enumerate(models)]
        finished = server.finish(*jobs)
    assert {(job["status"], job["done_count"], job["error_count"]) for job in finished} == {
        ("finished", ROWS, 0)
    }
    for i in (0, 1):
        for row in server.rows(f"four_{i}"):
            assert row["out"].startswith(f"{row['name']}:.")
            assert row["out"].endswith(" loads 1 most 1")
    assert {row["out"] == row["name"] * 3 for row in server.rows("four_2")} == {True}
    assert {row["out"] == row["name"] for row in server.rows("four_3")} == {True}
    assert max(poller.gaps) < 0.25


def test_model_with_options(server: Server):
    "Options from Datasette's configuration reach the sync model."
    server.create("options", numbered(3))
    (job,) = server.finish(server.enrich("options", "with-options"))
    assert (job["status"], job["error_count"]) == ("finished", 0)
    assert [row["out"] for row in server.rows("options")] == [f"row {i}" * 3 for i in (1, 2, 3)]


def test_model_that_fails_on_some_rows(server: Server):
    "Rows on which the model fails, or exits, are reported failed, and none is stored truncated."
    bad = {10: "error 10", 20: "exit 20", 30: "error 30", 40: "exit 40"}
    server.create("some", [{**row, "name": bad.get(row["id"], row["name"])} for row in numbered()])
    (job,) = server.finish(server.enrich("some", "failing"))
    assert (job["status"], job["error_count"], job["done_count"]) == ("finished", 4, ROWS)
    for row in server.rows("some"):
        assert row["out"] == (None if row["id"] in bad else f"half of {row['name']}")
    errors = server.rows("_enrichment_errors", f"job_id = {job['id']}")
    assert [json.loads(error["row_pks"]) for error in errors] == [[10], [20], [30], [40]]
    for error, name in zip(errors, bad.values(), strict=True):
        assert name in error["error"]
    assert "SystemExit" in errors[1]["error"]


def test_job_that_is_cancelled(server: Server):
    "A cancelled job stops after the row at hand; the server and the model serve on."
    server.create("long", numbered())
    job_id = server.enrich("long", "slow")
    deadline = time.monotonic() + PATIENCE
    while server.job(job_id)["done_count"] < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    answer = server.client.post(f"/-/enrich/data/-/jobs/{job_id}/cancel")
    assert answer.status_code < 400, answer.text
    (job,) = server.finish(job_id)
    assert job["status"] == "cancelled"
    time.sleep(0.3)  # the row at hand
    answered = [row["id"] for row in server.rows("long") if row["out"]]
    assert 3 <= len(answered) < ROWS
    assert {row["out"] == row["name"] for row in server.rows("long", "out is not null")} == {True}
    (again,) = server.finish(server.enrich("long", "slow", filters="id__lt=4"))
    assert (again["status"], again["done_count"]) == ("finished", 3)
    assert [row["id"] for row in server.rows("long") if row["out"]] == answered
    assert server.process.poll() is None
