"""Which code runs: what trainings leave in a repository does not count as a change of it."""

import subprocess
from pathlib import Path

import pytest

from dtrain.tracking.git_state import capture_code


def test_what_trainings_leave_is_not_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "repository"

    def write(*names: str) -> None:
        for name in names:
            (repository / name).parent.mkdir(parents=True, exist_ok=True)
            (repository / name).write_text("lr = 1\n")

    write("model.py")
    monkeypatch.chdir(repository)
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=n", "-c", "user.email=e@x", "commit", "-qm", "x"]):
        subprocess.run(["git", *command], check=True)
    write("mlflow.db", ".mlflow.db.lock", "mlruns/1/models/m-1/artifacts/code/model.py", "__pycache__/model.pyc")
    write("runs/a/metrics.jsonl", "runs/a/config.yaml", "runs/a.jobs/1/job.sbatch", "runs/a.jobs/1/code/model.py")
    write("runs/s/sweep/trials.csv", "runs/s/lr=1/metrics.jsonl", "runs/a-reproduced/reproduction.json")
    tags = capture_code(tmp_path / "clean")
    assert tags["dtrain.code_changed"] == "False"
    assert (tmp_path / "clean" / "status.txt").read_text() == (tmp_path / "clean" / "diff.patch").read_text() == ""

    write("runs/notes.txt", "losses.py", "tools/metrics.py")  # a folder of which something else is unknown is named
    tags = capture_code(tmp_path / "changed")
    assert tags["dtrain.code_changed"] == "True"
    status = (tmp_path / "changed" / "status.txt").read_text()
    assert status.split() == ["??", "losses.py", "??", "runs/", "??", "tools/"]
    patch = (tmp_path / "changed" / "diff.patch").read_text()
    assert [line for line in patch.splitlines() if line.startswith("+++")] == [
        "+++ b/losses.py",
        "+++ b/tools/metrics.py",
    ]
