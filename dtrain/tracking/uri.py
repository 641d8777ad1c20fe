"""Addresses of MLflow stores, as people write them and as they hold from any folder; none is connected to."""

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain.tracking.secrets import redact

# Stores that MLflow itself knows; a driver may follow, as in mysql+pymysql.
_SERVERS = ("http", "https", "postgresql", "mysql", "mssql", "databricks", "databricks-uc", "uc")


def resolve_tracking_uri(uri: str | None) -> str:
    """Where MLflow's data are, as an address that is good from any folder.

    It is a server's or a database's, or a folder: a sqlite database and its artifacts are put in there. Default:
    MLFLOW_TRACKING_URI, else sqlite in the current folder, as MLflow does. Raises ValueError for `file:` (MLflow 3
    refuses it), an unknown scheme or a database in memory; the text holds the cure.
    """
    what = "tracking_uri" if uri else "MLFLOW_TRACKING_URI"
    text = str(uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db")
    if text in _SERVERS:  # MLflow takes a bare `databricks`
        return text
    match = re.match(r"([A-Za-z][\w.-]+)(\+\w+)?:", text)
    if match is None:
        folder = _absolute(text)
        if Path(folder).is_file():
            raise ValueError(f"{what} {text!r} is a file; a folder is needed, or sqlite:///{folder}")
        return f"sqlite:///{folder}/mlflow.db"
    scheme = match[1].lower()
    if scheme == "sqlite":
        head, _, rest = text.partition(":///")
        path, mark, query = rest.partition("?")
        if path in ("", ":memory:"):
            raise ValueError(f"{what} {text!r}: the sender is a process of its own, name a file: sqlite:///mlflow.db")
        return f"{head}:///{_absolute(path)}{mark}{query}"
    if scheme == "file":
        folder = _absolute(re.sub(r"^file:(//(localhost(?=/))?)?", "", text, flags=re.IGNORECASE))
        raise ValueError(
            f"{what} {text!r}: MLflow 3 no longer writes to `file:` stores; "
            f"give the folder itself, {folder} (a sqlite database is made in it), or a server's http address"
        )
    if scheme not in _SERVERS:
        known = ", ".join(("a folder", "sqlite", *_SERVERS))
        raise ValueError(f"{what} {redact(text)!r}: unknown kind {scheme!r}; possible are {known}")
    return text


def _absolute(path: str) -> str:
    return os.path.normpath(Path(path).expanduser().absolute())


def sqlite_file(uri: str) -> Path | None:
    """The database file of a resolved sqlite URI; None for anything else."""
    head, slashes, rest = uri.partition(":///")
    return Path(rest.partition("?")[0]) if slashes and head.partition("+")[0] == "sqlite" else None


def run_address(uri: str, facts: Mapping[str, Any]) -> str:
    """The page of a run on an http server, from its run.json; '' for other stores, or while MLflow has no such run."""
    known = facts.get("experiment_id"), facts.get("run_id")
    if not uri.startswith(("http:", "https:")) or not all(known):
        return ""
    # Without the last part, a browser that has not been there opens the pages for language models around it.
    return f"{redact(uri).rstrip('/')}/#/experiments/{known[0]}/runs/{known[1]}?workflowType=machine_learning"


def where_seen(uri: str, facts: Mapping[str, Any]) -> str:
    """Where a run can be seen: its own page, else what opens MLflow's pages."""
    return run_address(uri, facts) or ui_command(uri)


def ui_command(uri: str) -> str:
    """What opens MLflow's pages for a resolved tracking URI: a command, or the server's own address."""
    if uri.startswith(("http:", "https:")):
        return redact(uri)
    if "://" not in uri:
        return f"the MLflow pages of your {uri} workspace"
    return f"mlflow ui --backend-store-uri {shlex.quote(redact(uri))}"
