"""The files of a run folder, and run.json."""

import threading
from pathlib import Path

from dtrain.tracking.run_folder import RunFolder, file_instead, read_run, update_run


def test_the_names_are_those_that_earlier_versions_wrote(tmp_path: Path) -> None:
    """A run folder of before is resumed, replayed, delivered and looked at by these names."""
    folder = RunFolder(tmp_path)
    names = {name: str(path.relative_to(tmp_path)) for name, path in vars(folder).items() if name != "path"}
    assert names == {
        "config": "config.yaml",
        "config_as_written": "config",
        "run": "run.json",
        "journal": "metrics.jsonl",
        "delivery": "mlflow.json",
        "checkpoints": "checkpoints",
        "pictures": "pictures",
        "predictions": "predictions",
        "failure": "failure.json",
        "failed_step": "failed-step",
        "hang": "hang.txt",
        "logs": "logs",
        "sender_log": "logs/sender.log",
        "sender_lock": ".sender.lock",
        "lock": ".training.lock",
        "tables": "tables",
        "trackers": "trackers",
        "weights": "weights",
        "bad_nodes": "bad-nodes",
        "mirror": "mirror.json",
        "mirror_lock": ".mirror.lock",
        "mirror_log": "logs/mirror.log",
    }
    assert folder.rank_log(3) == tmp_path / "logs" / "rank-3.log"
    assert [folder.code(attempt) for attempt in (1, 2)] == [tmp_path / "code", tmp_path / "code" / "resume_2"]


def test_run_facts_change_one_process_at_a_time(tmp_path: Path) -> None:
    def write(first: int) -> None:
        for number in range(first, first + 20):
            update_run(tmp_path, **{f"key_{number}": number})

    threads = [threading.Thread(target=write, args=(20 * index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert read_run(tmp_path) == {f"key_{number}": number for number in range(80)}


def test_run_facts_change_only_while_what_was_seen_holds(tmp_path: Path) -> None:
    assert read_run(tmp_path) == {}
    assert update_run(tmp_path, pid=1, state="RUNNING")
    assert not update_run(tmp_path, when={"pid": 2}, state="FAILED")
    assert read_run(tmp_path)["state"] == "RUNNING"
    assert update_run(tmp_path, when={"pid": 1, "state": "RUNNING"}, state="FAILED")
    assert read_run(tmp_path) == {"pid": 1, "state": "FAILED"}


def test_a_file_in_place_of_a_run_folder_or_above_it_is_found(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.touch()
    assert file_instead(file) == file_instead(file / "run" / "x") == file
    assert file_instead(tmp_path) is None and file_instead(tmp_path / "gone" / "run") is None
