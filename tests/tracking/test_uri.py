"""Addresses of MLflow stores."""

from pathlib import Path

import pytest

from dtrain.tracking.uri import resolve_tracking_uri, sqlite_file, ui_command, where_seen


@pytest.fixture(autouse=True)
def no_address_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.parametrize(
    "uri",
    [
        "http://host:5000",
        "https://host/mlflow",
        "postgresql://host/db",
        "postgresql+psycopg2://user:pw@host/db",
        "mysql+pymysql://host/db",
        "databricks",
        "databricks://profile",
        "sqlite:////data/mlflow.db",
    ],
)
def test_addresses_are_taken_as_they_are(uri: str) -> None:
    assert resolve_tracking_uri(uri) == uri


def test_without_an_address_it_is_sqlite_in_the_current_folder_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_tracking_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"
    assert resolve_tracking_uri("sqlite:///sub/x.db?timeout=9") == f"sqlite:///{tmp_path}/sub/x.db?timeout=9"
    assert resolve_tracking_uri("../up") == f"sqlite:///{tmp_path.parent}/up/mlflow.db"
    assert resolve_tracking_uri("~/runs") == f"sqlite:///{Path.home()}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert resolve_tracking_uri(None) == "http://host:5000"
    assert resolve_tracking_uri("here") == f"sqlite:///{tmp_path}/here/mlflow.db"


@pytest.mark.parametrize(
    "uri", ["file:///data/mlruns", "file:/data/mlruns", "file://localhost/data/mlruns", "FILE:/data/mlruns"]
)
def test_a_file_address_is_refused_with_the_cure(uri: str) -> None:
    with pytest.raises(ValueError, match="no longer writes") as caught:
        resolve_tracking_uri(uri)
    assert "give the folder itself, /data/mlruns " in str(caught.value)


def test_a_file_address_in_the_environment_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///data/mlruns")
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI"):
        resolve_tracking_uri(None)


def test_other_wrong_addresses_say_what_is_possible(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^tracking_uri 'htp://host': unknown kind 'htp'.*a folder, sqlite, http"):
        resolve_tracking_uri("htp://host")
    with pytest.raises(ValueError, match="name a file"):
        resolve_tracking_uri("sqlite:///:memory:")
    with pytest.raises(ValueError, match="name a file"):
        resolve_tracking_uri("sqlite://")
    (tmp_path / "x.db").touch()
    with pytest.raises(ValueError, match=f"sqlite:///{tmp_path}/x.db"):
        resolve_tracking_uri(str(tmp_path / "x.db"))


def test_the_password_of_a_wrong_address_is_not_shown() -> None:
    with pytest.raises(ValueError, match="unknown kind") as caught:
        resolve_tracking_uri("htp://me:hunter2@host")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "command"),
    [
        ("sqlite:////data/mlflow.db", "mlflow ui --backend-store-uri sqlite:////data/mlflow.db"),
        ("sqlite:////my data/mlflow.db", "mlflow ui --backend-store-uri 'sqlite:////my data/mlflow.db'"),
        ("postgresql://me:hunter2@host/db", "mlflow ui --backend-store-uri 'postgresql://***@host/db'"),
        ("http://host:5000", "http://host:5000"),
        ("https://me:hunter2@host/", "https://***@host/"),
    ],
)
def test_ui_command(uri: str, command: str) -> None:
    assert ui_command(uri) == command


def test_sqlite_file() -> None:
    assert sqlite_file("sqlite:////data/mlflow.db?x=1") == Path("/data/mlflow.db")
    assert sqlite_file("http://host") is None
    assert sqlite_file("postgresql://host/db") is None


def test_a_server_shows_the_run_once_it_is_known() -> None:
    page = where_seen("https://me:hunter2@tracking/", {"run_id": "abc", "experiment_id": "7"})
    assert page == "https://***@tracking/#/experiments/7/runs/abc?workflowType=machine_learning"
    assert where_seen("http://tracking:5000", {"run_id": None}) == "http://tracking:5000"
