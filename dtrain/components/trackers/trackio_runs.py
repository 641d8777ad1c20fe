"""trackio, Hugging Face's tracker with a local store, by its package."""

from collections.abc import Mapping
from typing import Any


class Trackio:
    """A run of trackio; a resumed training continues it.

    Args:
        project: Its project. Default: the experiment.
        settings: Further arguments of trackio.init, such as space_id.
    """

    def __init__(self, project: str | None = None, **settings: Any) -> None:
        try:
            import trackio
        except ImportError as error:
            raise ImportError(f"{error.name} is not installed: pip install trackio") from None
        self._trackio, self.project, self.settings = trackio, project, settings

    def start(self, config: Mapping[str, Any]) -> None:
        """Begin the run, or continue it; trackio knows it by its name, which therefore has a piece of the id."""
        run = config["run"]
        name = f"{run['name']}-{run['id'][:6]}"
        told = {key: value for key, value in config.items() if key != "run"}
        settings = {"project": self.project or run["experiment"], "name": name, "resume": "allow", **self.settings}
        self._trackio.init(config=told, **settings)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of one step."""
        self._trackio.log(dict(figures), step=step)

    def picture(self, step: int, key: str, path: str) -> None:
        """One of the pictures of that name."""
        self._trackio.log({key: self._trackio.Image(path)}, step=step)

    def end(self, status: str) -> None:
        """Finish the run."""
        self._trackio.finish()
