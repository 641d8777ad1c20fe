"""Weights & Biases, by its package wandb; WANDB_API_KEY and WANDB_MODE say how it is reached."""

from collections.abc import Mapping
from typing import Any


class Wandb:
    """A run of Weights & Biases with the run's own id: a resumed training continues it.

    Args:
        project: Its project. Default: the experiment.
        settings: Further arguments of wandb.init, such as entity, group, tags or mode.
    """

    def __init__(self, project: str | None = None, **settings: Any) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(f"{error.name} is not installed: pip install wandb") from None
        self._wandb, self.project, self.settings = wandb, project, settings
        self._run: Any = None

    def start(self, config: Mapping[str, Any]) -> None:
        """Begin the run, or continue it."""
        run = config["run"]
        known = {"project": self.project or run["experiment"], "name": run["name"], "id": run["id"]}
        told = {key: value for key, value in config.items() if key != "run"}
        settings = {"dir": run["folder"], "resume": "allow", **known, **self.settings}
        self._run = self._wandb.init(config=told, **settings)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of one step."""
        self._run.log(dict(figures), step=step)

    def picture(self, step: int, key: str, path: str) -> None:
        """One of the pictures of that name."""
        self._run.log({key: self._wandb.Image(path)}, step=step)

    def end(self, status: str) -> None:
        """Finish the run; one that failed is shown as failed."""
        self._run.finish(exit_code=0 if status == "FINISHED" else 1)
