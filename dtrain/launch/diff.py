"""dtrain diff: in what two runs differ: config, code, environment, data and figures."""

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dtrain.config.difference import NOT_SET, changes
from dtrain.config.errors import ConfigError, dotted, is_mapping, one_line, shown, to_plain
from dtrain.config.load import load_config
from dtrain.distributed.exit_status import DONE
from dtrain.launch.compare_figures import compare_figures, is_result
from dtrain.launch.runs import progress_text, records_of
from dtrain.reporting.number_text import duration_text, figure_text
from dtrain.tracking.run_folder import ranks_known
from dtrain.tracking.run_record import RunRecord, best_of
from dtrain.tracking.secrets import leaves

_MOST_FILES = 12  # of a commit's changes that are listed
_LONGEST = 60  # letters of a value on the screen


class Difference(NamedTuple):
    """One thing that is not the same: what it is called, and how each of the two has it, '' where it has it not."""

    key: str
    one: str
    other: str
    note: str = ""


Sections = dict[str, list[Difference]]


def differences(one: RunRecord, other: RunRecord) -> Sections:
    """By section, what differs; a section without differences is there and empty."""
    return {
        "config": list(_of_config(one, other)),
        "code": list(_of_code(one, other)),
        "environment": list(_of_environment(one, other)),
        "data": list(_of_data(one, other)),
        "figures": list(_of_figures(one, other)),
    }


def diff(run_a: str, run_b: str, uri: str | None, as_json: bool) -> int:
    """Print in what two runs differ: run folders, or runs in MLflow.

    Raises:
        ConfigError: One of them is neither.
    """
    with tempfile.TemporaryDirectory(prefix="dtrain-") as fetched:
        one, other = records_of([run_a, run_b], uri, "diff", Path(fetched), images=False)
        _show(one, other, as_json)
    return DONE


def _show(one: RunRecord, other: RunRecord, as_json: bool) -> None:
    found = differences(one, other)
    compared = compare_figures(one.journal.figures, other.journal.figures)
    if as_json:
        sections = {name: [each._asdict() for each in rows] for name, rows in found.items()}
        first = None if compared.first is None else {"step": compared.first[0], "figure": compared.first[1]}
        print(json.dumps({"a": one.name, "b": other.name, **sections, "first_difference": first}, indent=1))
        return
    for letter, record in (("A", one), ("B", other)):
        print(f"{letter}  {one_line(record.name)}: {_in_a_line(record)}")
    for name, rows in found.items():
        if not rows:
            print(f"\n{name}: {_the_same(name, one, compared.points)}")
            continue
        told = f", first at step {compared.first[0]:,} ({compared.first[1]})" if compared.first else ""
        print(f"\n{name}{told if name == 'figures' else ''}")
        print("\n".join(_lines(rows)))


def _in_a_line(record: RunRecord) -> str:
    steps = [step for series in record.journal.figures.values() for step in series]
    taken = "" if record.seconds is None else f", {duration_text(record.seconds)}"
    state = str(record.facts.get("state") or "unknown")
    return f"{state}, {progress_text(record.facts, max(steps, default=None))}{taken}"


def _the_same(section: str, record: RunRecord, points: int) -> str:
    if section == "figures":
        return f"equal, all {points:,} of them" if points else "none"
    if section == "code":
        changed = "with the same uncommitted changes" if record.code_text("diff.patch").strip() else "no changes"
        return f"the same ({record.commit[:10]}, {changed})" if record.commit else "unknown: no commit was recorded"
    known = {"environment": record.environment, "data": record.data}.get(section, True)
    return "the same" if known else "not recorded"


def _lines(rows: Sequence[Difference]) -> Iterator[str]:
    cells = [("", "A", "B", ""), *((row.key, row.one or "-", row.other or "-", row.note) for row in rows)]
    cut = [tuple(_cut(one_line(text)) for text in line) for line in cells]
    widths = [max(len(line[column]) for line in cut) for column in range(3)]
    if sum(widths) > shutil.get_terminal_size((120, 24)).columns - 10:  # one value under the other
        for row in rows:
            yield f"  {row.key}{f'  ({row.note})' if row.note else ''}"
            yield from (
                f"    {mark}  {_cut(one_line(text or '-'), 200)}" for mark, text in zip("AB", row[1:3], strict=True)
            )
        return
    for line in cut:
        texts = "  ".join(text.ljust(size) for text, size in zip(line, (*widths, 0), strict=True))
        yield f"  {texts}".rstrip()


def _cut(text: str, longest: int = _LONGEST) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _of_config(one: RunRecord, other: RunRecord) -> Iterator[Difference]:
    """Key by key; those that change what is computed come first."""
    try:
        before, after = load_config(one.config_file), load_config(other.config_file)
    except ConfigError as error:
        there = ["there" if each.config_file.is_file() else "" for each in (one, other)]
        yield Difference("config.yaml", there[0], there[1], str(error))
        return
    ranks = [ranks_known(each.facts) or 1 for each in (one, other)]
    try:
        found = changes(before, after, ranks[0], ranks[1])
    except ConfigError:  # of another dtrain, or of modules that are not here: compared as texts
        texts = [dict(leaves(to_plain(config))) for config in (before, after)]
        for key in dict.fromkeys((*texts[0], *texts[1])):
            if texts[0].get(key, NOT_SET) != texts[1].get(key, NOT_SET):
                yield Difference(key, _value(texts[0].get(key, NOT_SET)), _value(texts[1].get(key, NOT_SET)))
        return
    for change in sorted(found, key=lambda each: each.is_free):
        note = "computes the same" if change.is_free else ""
        yield Difference(dotted(change.path), _value(change.before), _value(change.after), note)


def _value(value: Any) -> str:
    if value is NOT_SET:
        return ""
    return json.dumps(to_plain(value), default=str) if is_mapping(value) or isinstance(value, list) else shown(value)


def _of_code(one: RunRecord, other: RunRecord) -> Iterator[Difference]:
    if one.commit != other.commit:
        apart = commits_apart(one.commit, other.commit)
        yield Difference("commit", one.commit[:10] or "unknown", other.commit[:10] or "unknown", apart)
        for line in _git("diff", "--numstat", one.commit, other.commit).splitlines()[:_MOST_FILES] if apart else ():
            added, removed, file = line.split("\t", 2)
            yield Difference(file, "", f"+{added} -{removed}", "committed")
    patches = [files_of_patch(each.code_text("diff.patch")) for each in (one, other)]
    for file in dict.fromkeys((*patches[0], *patches[1])):
        texts = [patch.get(file, "") for patch in patches]
        if texts[0] != texts[1]:
            yield Difference(file, _size_of_patch(texts[0]), _size_of_patch(texts[1]), "uncommitted changes")
    unknown = [untracked(each) for each in (one, other)]
    for file in sorted(unknown[0] ^ unknown[1]):
        one_has = file in unknown[0]
        yield Difference(file, "untracked" if one_has else "", "" if one_has else "untracked")


def commits_apart(one: str, other: str) -> str:
    """'3 commits apart', as far as the repository here knows both; else ''."""
    count = _git("rev-list", "--count", f"{one}...{other}").strip() if one and other else ""
    return f"{count} commit(s) apart" if count else ""


def files_of_patch(patch: str) -> dict[str, str]:
    """Of a git diff, by file, what it changes."""
    parts = re.split(r"^diff --git (?:a/)?(.*?) (?:b/)?\1\n", patch, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _size_of_patch(text: str) -> str:
    """'+3 -1', of a file that is not changed ''."""
    body = text.partition("\n@@")[2].splitlines()
    added, removed = (sum(line.startswith(sign) for line in body) for sign in "+-")
    return f"+{added} -{removed}" if text else ""


def untracked(record: RunRecord) -> set[str]:
    """The files that git did not know when the run started."""
    return {line[3:] for line in record.code_text("status.txt").splitlines() if line.startswith("?? ")}


def _git(*arguments: str) -> str:
    """What git says of the repository here; '' where it cannot."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _of_environment(one: RunRecord, other: RunRecord) -> Iterator[Difference]:
    found = [environment_of(each) for each in (one, other)]
    yield from differing(found[0], found[1])


def environment_of(record: RunRecord) -> dict[str, str]:
    """What a run ran with, in texts: where it ran, on how many ranks, and versions of all packages."""
    facts = {
        key: record.facts.get(name) for key, name in (("host", "host"), ("ranks", "world_size"), ("device", "device"))
    }
    return {key: str(value) for key, value in facts.items() if value is not None} | flat_environment(record.environment)


def flat_environment(environment: Mapping[str, Any]) -> dict[str, str]:
    """environment.json as texts by name; of packages the versions."""
    packages = environment.get("packages") or {}
    rest = {key: value for key, value in environment.items() if key not in ("packages", "torch")}
    gpus = rest.pop("gpus", None) or []
    texts = {key: str(value) for key, value in leaves(rest) if value not in (None, "", [], {})}
    for number, gpu in enumerate(gpus):
        texts[f"gpu {number}"] = ", ".join(map(str, gpu.values())) if is_mapping(gpu) else str(gpu)
    return texts | {str(name): str(version) for name, version in packages.items()}


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> Iterator[Difference]:
    """What two mappings of texts do not have in common."""
    for key in dict.fromkeys((*one, *other)):
        if one.get(key) != other.get(key):
            yield Difference(key, one.get(key, ""), other.get(key, ""))


def _of_data(one: RunRecord, other: RunRecord) -> Iterator[Difference]:
    texts = [{key: shown(value).strip("'") for key, value in leaves(each.data) if key} for each in (one, other)]
    yield from differing(texts[0], texts[1])


def _of_figures(one: RunRecord, other: RunRecord) -> Iterator[Difference]:
    """The best of what is monitored, and the last one of each."""
    both = one.journal.figures, other.journal.figures
    if one.monitor == other.monitor:
        best = [best_of(each.get(one.monitor, {}), one.mode) for each in both]
        if best[0] != best[1]:
            texts = [f"{figure_text(pair[1])} (step {pair[0]:,})" if pair else "" for pair in best]
            values = [pair[1] if pair else None for pair in best]
            yield Difference(f"best {one.monitor}", texts[0], texts[1], _change(values))
    for key in dict.fromkeys((*both[0], *both[1])):
        series = [each.get(key, {}) for each in both]
        last = [values[max(values)] if values else None for values in series]
        if is_result(key) and series[0] != series[1] and not _both_nan(series):
            texts = ["" if value is None else _precise(value, last) for value in last]
            yield Difference(key, texts[0], texts[1], _change(last))


def _precise(value: float, both: Sequence[float | None]) -> str:
    texts = {figure_text(each) for each in both if each is not None}
    return figure_text(value) if len(texts) > 1 or both[0] == both[1] or None in both else repr(value)


def _both_nan(series: Sequence[Mapping[int, float]]) -> bool:
    return repr(sorted(series[0].items())) == repr(sorted(series[1].items()))


def _change(both: Sequence[float | None]) -> str:
    one, other = both
    if one is None or other is None:
        return ""
    return "the same at the end" if one == other else f"{other - one:+.3g}"
