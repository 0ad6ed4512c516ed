"""Optuna's dashboard shows the study of a search."""

from __future__ import annotations

import io
import json
from wsgiref.util import setup_testing_defaults

import pytest

optuna = pytest.importorskip("optuna")
dashboard = pytest.importorskip("optuna_dashboard")

from superlora.search import search  # noqa: E402
from tests.search.spaces import SMALL, separable  # noqa: E402


def answer(application, path):
    """Ask for a path as a browser would, and return the JSON values of the answer."""
    environment = {"PATH_INFO": path, "wsgi.errors": io.StringIO()}
    setup_testing_defaults(environment)
    statuses = []
    body = b"".join(application(environment, lambda status, *_: statuses.append(status)))
    assert statuses == ["200 OK"], environment["wsgi.errors"].getvalue()
    return json.loads(body)


def test_the_dashboard_opens_the_file(tmp_path):
    path = tmp_path / "study.db"
    found = search(separable, SMALL, storage=path, name="digits", trials=6, seed=1)
    application = dashboard.wsgi(f"sqlite:///{path}")
    (summary,) = answer(application, "/api/studies")["study_summaries"]
    assert summary["study_name"] == "digits"
    assert summary["directions"] == ["maximize"]
    shown = answer(application, f"/api/studies/{summary['study_id']}")["trials"]
    assert [trial["state"] for trial in shown] == ["Complete"] * 6
    assert [trial["values"] for trial in shown] == [[trial.value] for trial in found.trials]
