"""A report as one HTML page: figures, curves, pictures, timing, environment and config of one or several runs.

Nothing is loaded from anywhere: styles, curves and pictures are in the page, which needs no script and no server.
"""

import base64
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from html import escape

from dtrain.reporting.curves import Curve, chart
from dtrain.reporting.number_text import count_text, duration_text, figure_text
from dtrain.tracking.run_record import RunRecord, best_of

PHASES = ("val", "train", "test")
COLOURS = 8
_MOST_CHARTS = 24  # that are shown at once; the rest is folded
_MOST_DIFF = 200_000  # characters of uncommitted changes
_TYPES = {".png": "image/png", ".webp": "image/webp", ".jpg": "image/jpeg"}


@dataclass(frozen=True)
class Page:
    """What a report is made of.

    Attributes:
        runs: The runs, the first one first.
        differences: Config keys that are not the same in all, each with a text for each run.
        environments: By name, a text for each run.
        progress: Of each run, how far it is.
        made_by: Program and version.
    """

    runs: Sequence[RunRecord]
    progress: Sequence[str]
    differences: Sequence[tuple[str, Sequence[str]]] = ()
    environments: Mapping[str, Sequence[str]] = field(default_factory=dict)
    made_by: str = "dtrain"

    def html(self) -> str:
        """The whole page."""
        experiments = dict.fromkeys(str(run.facts.get("experiment") or run.name) for run in self.runs)
        title = f"{', '.join(experiments)}: {len(self.runs)} runs" if len(self.runs) > 1 else next(iter(experiments))
        now = datetime.now().strftime("%Y-%m-%d %H:%M")
        body = "".join(self._body())
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
            f"<h1>{escape(title)}</h1>{body}"
            f"<footer>Made by {escape(self.made_by)} on {now}.</footer></main></body></html>\n"
        )

    def _body(self) -> Iterator[str]:
        yield from self._overview()
        if self.differences:
            yield "<h2>What differs in the config</h2>"
            yield self._table(dict(self.differences))
        yield from self._curves()
        yield from self._pictures()
        yield from self._timing()
        if self.environments:
            yield "<h2>Code, environment and data</h2>"
            yield self._table(self.environments)
        yield from self._texts()

    def _name(self, index: int) -> str:
        """A run's name, with its colour where there are several."""
        name = escape(self.runs[index].name)
        return name if len(self.runs) == 1 else f'<span class="swatch c{index % COLOURS}"></span>{name}'

    def _table(self, rows: Mapping[str, Sequence[str]]) -> str:
        """A row for each key, a column for each run."""
        head = "".join(f"<th>{self._name(index)}</th>" for index in range(len(self.runs)))
        lines = "".join(
            f"<tr><th>{escape(key)}</th>{''.join(f'<td>{escape(text)}</td>' for text in texts)}</tr>"
            for key, texts in rows.items()
        )
        top = f"<thead><tr><th></th>{head}</tr></thead>" if len(self.runs) > 1 else ""
        return f'<div class="wide"><table>{top}<tbody>{lines}</tbody></table></div>'

    def _overview(self) -> Iterator[str]:
        rows: dict[str, list[str]] = {"status": [], "started": [], "time": [], "progress": [], "best": []}
        for run, progress in zip(self.runs, self.progress, strict=True):
            reason = f" ({run.facts['reason']})" if run.facts.get("reason") else ""
            rows["status"].append(f"{run.facts.get('state') or 'unknown'}{reason}")
            started = run.facts.get("started")
            rows["started"].append(datetime.fromtimestamp(float(started)).strftime("%Y-%m-%d %H:%M") if started else "")
            rows["time"].append("" if run.seconds is None else duration_text(run.seconds))
            rows["progress"].append(progress)
            best = best_of(run.journal.figures.get(run.monitor, {}), run.mode)
            rows["best"].append(f"{run.monitor} {figure_text(best[1])} (step {best[0]:,})" if best else "")
        for phase, word in (("val", "last"), ("test", "")):
            for name in self._keys(phase):
                series = [run.journal.figures.get(name, {}) for run in self.runs]
                label = f"{word} {name}".strip()
                rows[label] = [figure_text(values[max(values)]) if values else "" for values in series]
        yield self._table(rows)

    def _keys(self, phase: str = "") -> list[str]:
        """The figures of all runs, in the order in which they were logged first."""
        keys = dict.fromkeys(key for run in self.runs for key in run.journal.figures)
        return [key for key in keys if key.startswith(f"{phase}/" if phase else "")]

    def _curves(self) -> Iterator[str]:
        groups: dict[str, list[str]] = {}
        for key in self._keys():
            phase, _, rest = key.partition("/")
            name = rest if phase in PHASES else _without_range(key)
            groups.setdefault(name, []).append(key)
        monitored = self.runs[0].monitor.partition("/")[2]
        order = sorted(groups, key=lambda name: (name != monitored, name != "loss", _rank(groups[name][0])))
        charts = [text for name in order if (text := self._chart(name, groups[name]))]
        if not charts:
            return
        yield "<h2>Curves</h2>"
        yield self._legend()
        yield f'<div class="charts">{"".join(charts[:_MOST_CHARTS])}</div>'
        if others := charts[_MOST_CHARTS:]:
            more = f"<summary>{len(others)} more</summary>"
            yield f'<details>{more}<div class="charts">{"".join(others)}</div></details>'

    def _chart(self, name: str, keys: Sequence[str]) -> str:
        curves = []
        for index, run in enumerate(self.runs):
            for key in keys:
                if values := run.journal.figures.get(key):
                    phase = key.partition("/")[0]
                    style = phase if phase in PHASES else "val"
                    colour = index if len(self.runs) > 1 else PHASES.index(style)
                    told = f"{run.name} {key}" if len(self.runs) > 1 else key
                    best = best_of(values, run.mode) if key == run.monitor else None
                    curves.append(Curve(told, colour % COLOURS, values, style, best[0] if best else None))
        drawn = chart(name, curves)
        return f"<figure><figcaption>{escape(name)}</figcaption>{drawn}</figure>" if drawn else ""

    def _legend(self) -> str:
        used = [phase for phase in PHASES if self._keys(phase)]
        items = []
        if len(self.runs) > 1:
            items = [f"<span>{self._name(index)}</span>" for index in range(len(self.runs))]
        for phase in used:
            colour = f"c{PHASES.index(phase)}" if len(self.runs) == 1 else "ink"
            mark = '<circle class="mark {0}" cx="14" cy="5" r="3"/>' if phase == "test" else (
                '<path class="curve {1} {0}" d="M1 5L27 5"/>'
            )  # fmt: skip
            items.append(f'<span><svg class="key" viewBox="0 0 28 10">{mark.format(colour, phase)}</svg>{phase}</span>')
        items.append("<span>ring: the best; steps to the right</span>")
        return f'<p class="legend">{"".join(items)}</p>'

    def _pictures(self) -> Iterator[str]:
        keys = dict.fromkeys(key for run in self.runs for key in run.journal.images)
        rows = []
        for key in keys:
            shown = "".join(self._picture(index, key) for index in range(len(self.runs)))
            if shown:
                rows.append(f'<h3>{escape(key)}</h3><div class="pictures">{shown}</div>')
        if rows:
            yield "<h2>Pictures of the validation</h2>" + "".join(rows)

    def _picture(self, index: int, key: str) -> str:
        """The picture of the best validation, else the last one that is there."""
        run = self.runs[index]
        best = best_of(run.journal.figures.get(run.monitor, {}), run.mode)
        there = {
            step: path
            for step, name in run.journal.images.get(key, {}).items()
            if (path := run.folder / name).is_file() and path.suffix in _TYPES
        }
        if not there:
            return ""
        step = best[0] if best and best[0] in there else max(there)
        word = "best" if best and step == best[0] else "last"
        told = f"{run.name if len(self.runs) > 1 else ''} step {step:,} ({word})".strip()
        data = f"data:{_TYPES[there[step].suffix]};base64,{base64.b64encode(there[step].read_bytes()).decode()}"
        return f'<figure><figcaption>{escape(told)}</figcaption><img alt="{escape(key)}" src="{data}"></figure>'

    def _timing(self) -> Iterator[str]:
        rows: dict[str, list[str]] = {}
        for run in self.runs:
            starts = run.journal.spans
            at_work = "" if run.seconds_at_work is None else duration_text(run.seconds_at_work)
            speed = list(run.journal.figures.get("samples_per_second", {}).values())
            rows.setdefault("starts", []).append(str(len(starts) or 1))
            rows.setdefault("time at work", []).append(at_work)
            rows.setdefault("samples per second (median)", []).append(
                count_text(statistics.median(speed)) if speed else ""
            )
        yield "<h2>Timing</h2>"
        yield self._table(rows)
        bars = [text for index in range(len(self.runs)) if (text := self._time_bar(index))]
        if bars:
            yield f"<h3>Where a step's time goes</h3>{''.join(bars)}"

    def _time_bar(self, index: int) -> str:
        """The mean of each time/<kind>, seconds per step, as shares of one bar."""
        figures = self.runs[index].journal.figures
        kinds = [key for key in figures if key.startswith("time/") and key == _without_range(key)]
        means = {key.partition("/")[2]: statistics.fmean(figures[key].values()) for key in kinds}
        total = sum(means.values())
        if not total:
            return ""
        parts = "".join(
            f'<span class="part c{number % COLOURS}" style="flex:{value / total:.4f}" '
            f'title="{escape(kind)}: {1000 * value:.3g} ms, {100 * value / total:.0f} %"></span>'
            for number, (kind, value) in enumerate(means.items())
        )
        words = "".join(
            f'<span><span class="swatch c{number % COLOURS}"></span>{escape(kind.replace("_", " "))} '
            f"{100 * value / total:.0f} %</span>"
            for number, (kind, value) in enumerate(means.items())
        )
        name = f"{escape(self.runs[index].name)}: " if len(self.runs) > 1 else ""
        head = f"<p>{name}{1000 * total:.3g} ms per step</p>"
        return f'{head}<div class="bar">{parts}</div><p class="legend">{words}</p>'

    def _texts(self) -> Iterator[str]:
        yield '<h2>Config</h2><div class="texts">'
        is_open = " open" if len(self.runs) == 1 else ""
        for index, run in enumerate(self.runs):
            text = ""
            with suppress(OSError):
                text = run.config_file.read_text(errors="replace")
            if text:
                yield f"<details{is_open}><summary>{self._name(index)}</summary><pre>{escape(text)}</pre></details>"
        yield "</div>"
        patches = [(index, run.code_text("diff.patch")) for index, run in enumerate(self.runs)]
        if any(text.strip() for _, text in patches):
            yield '<h2>Uncommitted changes</h2><div class="texts">'
            for index, text in patches:
                if text.strip():
                    yield (
                        f"<details><summary>{self._name(index)}</summary><pre>{escape(text[:_MOST_DIFF])}</pre></details>"
                    )
            yield "</div>"


def _without_range(key: str) -> str:
    """time/forward, of which time/forward_min and time/forward_max tell the range over the ranks."""
    return key.removesuffix("_min").removesuffix("_max") if key.startswith("time/") else key


def _rank(key: str) -> int:
    """Results come first, then what sets them (lr), then the machine."""
    if key.partition("/")[0] in PHASES:
        return 0
    return 2 if key.startswith(("samples_per_second", "gpu_memory", "time/")) else 1


_LIGHT = ("0072b2", "d55e00", "009e73", "b5569b", "a67c00", "3b9ad9", "6b4fbb", "555555")
_DARK = ("5ab4f0", "ff9550", "35cfa0", "ee9fd0", "e8c547", "9ad8ff", "b7a3ff", "c8c8c8")
_ON_PAPER = "--paper:#fff;--ink:#1c1e21;--faint:#626870;--line:#dfe2e6;--panel:#f6f7f9;"
_AT_NIGHT = "--paper:#15171a;--ink:#e8eaed;--faint:#9aa1a9;--line:#33383e;--panel:#1e2125;"


def _variables(colours: Sequence[str]) -> str:
    return "".join(f"--c{number}:#{colour};" for number, colour in enumerate(colours))


STYLE = (
    f":root{{color-scheme:light dark;{_ON_PAPER}{_variables(_LIGHT)}}}"
    f"@media (prefers-color-scheme:dark){{:root{{{_AT_NIGHT}{_variables(_DARK)}}}}}"
    f"@media print{{:root{{color-scheme:light;{_ON_PAPER}{_variables(_LIGHT)}}}"
    "figure,tr,h2,h3{break-inside:avoid}h2,h3{break-after:avoid}details::details-content{content-visibility:visible;"
    "display:block;height:auto}pre{max-height:none!important;white-space:pre-wrap}.wide{overflow:visible}}"
    + "".join(f".c{number}{{--c:var(--c{number})}}" for number in range(COLOURS))
    + ".ink{--c:var(--ink)}"
    """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,"Segoe UI",Roboto,sans-serif}
main{max-width:1280px;margin:0 auto;padding:1.2rem clamp(.8rem,3vw,2rem)}
h1{font-size:1.6rem;line-height:1.2;margin:.2rem 0 1rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2rem 0 .6rem;border-bottom:1px solid var(--line);padding-bottom:.25rem}
h3{font-size:1rem;margin:1rem 0 .4rem;font-weight:600}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:.25rem 1.2rem .25rem 0;border-bottom:1px solid var(--line)}
td{overflow-wrap:break-word;min-width:7rem;max-width:28rem}
thead th{overflow-wrap:break-word}
thead .swatch{margin-left:0}
tbody th{font-weight:400;color:var(--faint);white-space:nowrap}
.charts{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,23rem),1fr))}
.pictures,.texts{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,23rem),1fr))}
figure{margin:0;min-width:0}
figcaption{font-weight:600;overflow-wrap:anywhere}
.pictures figcaption{font-weight:400;color:var(--faint)}
img{display:block;max-width:100%;height:auto;background:#fff}
svg.chart{display:block;width:100%;height:auto}
.grid{stroke:var(--line)}.axis{stroke:var(--faint)}
.tick{fill:var(--faint);font-size:12px;font-variant-numeric:tabular-nums}
.curve{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
.curve.train{stroke-width:1.6;stroke-dasharray:5 3}
.mark{fill:var(--c)}.hint{fill:transparent}
.best{fill:none;stroke:var(--c);stroke-width:1.5}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;color:var(--faint);margin:.3rem 0 .8rem}
.key{width:28px;height:10px;margin-right:.35rem}
.swatch{display:inline-block;width:.75em;height:.75em;border-radius:2px;background:var(--c);margin-right:.4em}
.bar{display:flex;height:1.4rem;gap:1px;border-radius:3px;overflow:hidden}
.part{background:var(--c);min-width:1px}
pre{background:var(--panel);padding:.8rem;overflow:auto;max-height:32rem;margin:.4rem 0}
pre{font:13px/1.45 ui-monospace,monospace}
summary{cursor:pointer;overflow-wrap:anywhere}
details{min-width:0}
footer{margin-top:2.5rem;color:var(--faint);font-size:.85rem}
"""
)
