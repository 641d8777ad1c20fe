"""What a shell offers on Tab: commands, options, files, and the keys and values of the config typed already."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dtrain.config.errors import ConfigError, KeyPath, is_mapping, shown, to_plain
from dtrain.config.json_schema import call_keys, component_names, inside
from dtrain.config.load import from_mapping, load_config
from dtrain.config.rules import TOP_LEVEL
from dtrain.config.schema import OWN_SETTINGS, PHASES, SAMPLERS, SLOTS, Call, read

CONFIGS = (".yaml", ".yml")
SCRIPTS = {
    # bash splits words at '=', too, and replaces only what stands behind it.
    "bash": """\
_dtrain() {
    local line="${COMP_LINE:0:COMP_POINT}" word
    local -a words
    read -ra words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    local current="${words[-1]}"
    mapfile -t COMPREPLY < <(dtrain completion bash -- "${words[@]:1}" 2>/dev/null)
    if [[ $current == *=* && $COMP_WORDBREAKS == *=* ]]; then
        for word in "${!COMPREPLY[@]}"; do COMPREPLY[word]="${COMPREPLY[word]#"${current%%=*}="}"; done
    fi
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=./] ]] && compopt -o nospace
    return 0
}
complete -o nosort -F _dtrain dtrain
""",
    "zsh": """\
#compdef dtrain
_dtrain() {
    local -a found open
    found=("${(@f)$(dtrain completion zsh -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    open=(${(M)found:#*[=./]})
    found=(${found:#*[=./]})
    compadd -Q -S '' -- $open
    compadd -Q -- $found
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -u }
compdef _dtrain dtrain
""",
    "fish": """\
complete -c dtrain -f -a '(dtrain completion fish -- (commandline -opc)[2..] (commandline -ct) 2>/dev/null)'
""",
}


def complete(words: Sequence[str], commands: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """What the last word may become; `commands` has the arguments of each as `add_argument` takes them."""
    *before, current = words or [""]
    if before and before[0].endswith(CONFIGS):
        before = ["train", *before]
    if not before:
        return _beginning(current, [*commands, "--help", "--version"]) + _paths(current, CONFIGS)
    arguments = commands.get(before[0], {})
    option = arguments.get(before[-1], {}) if before[-1].startswith("-") else {}
    if option and option.get("action", "append") == "append":  # it takes a value
        return _beginning(current, map(str, option.get("choices", ()))) or _paths(current)
    if current.startswith("-"):
        return _beginning(current, [*(name for name in arguments if name.startswith("-")), "--help"])
    positional = {name: item for name, item in arguments.items() if not name.startswith("-")}
    first = next((name for name in positional), "")
    if "choices" in positional.get(first, {}) and len(before) == 1:
        return _beginning(current, positional[first]["choices"])
    config = next((word for word in before[1:] if word.endswith(CONFIGS)), None)
    if config is None or "overrides" not in positional:
        return _paths(current, CONFIGS if first == "config" else None) if positional else []
    overrides = [word for word in before[1:] if "=" in word and not word.startswith("-")]
    try:
        return _keys(load_config(config, overrides), current)
    except ConfigError:  # it will be said when the command is run
        return []


def _beginning(current: str, possible: Iterable[str]) -> list[str]:
    return [item for item in possible if item.startswith(current)]


def _paths(current: str, endings: tuple[str, ...] | None = None) -> list[str]:
    """Folders, and files with these endings (None: all); hidden ones where a dot is typed."""
    folder, _, beginning = current.rpartition("/")
    above = f"{folder}/" if "/" in current else ""
    try:
        entries = sorted(Path(above or ".").expanduser().iterdir())
    except OSError:
        return []
    shown = [item for item in entries if item.name.startswith(beginning) and (beginning or item.name[0] != ".")]
    folders = [f"{above}{item.name}/" for item in shown if item.is_dir()]
    return [*folders, *(f"{above}{item.name}" for item in shown if item.is_file() and _ends(item.name, endings))]


def _ends(name: str, endings: tuple[str, ...] | None) -> bool:
    return endings is None or name.endswith(endings)


def _keys(config: ConfigDict, current: str) -> list[str]:
    """`optimizer.l` -> `optimizer.lr=`; `trainer.mode=m` -> `trainer.mode=min`, ..."""
    key, equals, value = current.partition("=")
    *above, last = key.split(".")
    path: KeyPath = tuple(int(part) if part.isdecimal() else part for part in above)
    found = dict(_possible(_part(config, path or (last,)), path))
    if equals:
        return [f"{key}={item}" for item in _beginning(value, _values(config, path, last, found.get(last, {})))]
    begun = "".join(f"{part}." for part in above)
    return [f"{begun}{name}{'.' if item is None else '='}" for name, item in found.items() if name.startswith(last)]


def _part(config: ConfigDict, path: KeyPath) -> ConfigDict:
    """The section in question alone, so that nothing of the others is read."""
    kept = ("modules", "optional_modules", path[0])
    return from_mapping({key: to_plain(config[key]) for key in config if key in kept and config[key] is not None})


def _possible(config: ConfigDict, path: KeyPath) -> Iterator[tuple[str, Any]]:
    """The keys at a path, each with its schema; None for one that holds keys itself."""
    if not path:
        yield from ((key, None if key in SLOTS or key in OWN_SETTINGS else {}) for key in TOP_LEVEL)
        return
    written = _at(config, path)
    if isinstance(written, list):
        yield from ((str(index), None if is_mapping(item) else {}) for index, item in enumerate(written))
        return
    found: dict[str, Any] = {
        key: item for call in _calls_at(config, path) for key, item in call_keys(call, texts=False).properties.items()
    }
    if path[0] == "loaders" and len(path) == 1:
        found |= dict.fromkeys((*PHASES, "folds"))
    if path == ("metrics",):
        found |= {key.partition(".")[2]: None for key in read(config).calls if key.startswith("metrics.")}
    if path[0] in SLOTS and path != ("mlflow",):
        found.setdefault("name", {})
    own = {"ddp", "fsdp", "pictures", "swa"} if path == ("trainer",) else set()
    holds = own | {key for key in written if is_mapping(written[key])} | set(SAMPLERS) if is_mapping(written) else own
    if is_mapping(written):
        found |= {key: None if key in holds else {} for key in written if key not in found}
    for key, item in found.items():
        is_section = item is None and (path in (("metrics",), ("loaders",)) or key in holds)
        yield key, None if is_section or key in holds else item or {}


def _calls_at(config: ConfigDict, path: KeyPath) -> Iterator[Call]:
    """The calls whose arguments stand at a path; those of all phases or metrics may stand beside them."""
    calls = read(config).calls
    shared = path[0] in ("loaders", "metrics") and len(path) == 1
    for key, call in calls.items():
        is_named = path[0] == "metrics" and len(path) == 2 and key in (f"metrics.{path[1]}", f"metric.{path[1]}")
        if call.path == path or is_named or (shared and call.path[0] == path[0]):
            yield call
        yield from (inner for inner in inside(call) if inner.path == path)


def _at(values: Any, path: KeyPath) -> Any:
    """What the config has at a path; None where it has nothing."""
    try:
        for key in path:
            values = values[key]
    except (LookupError, TypeError):
        return None
    return values


def _values(config: ConfigDict, path: KeyPath, key: str, schema: Any) -> Iterator[str]:
    """The values that are one of a few, and the names of components."""
    if key == "name" and path and path[0] in SLOTS:
        yield from component_names(config, str(path[0]), is_nested=len(path) > 1 and path[1] not in PHASES)
    for item in [schema or {}, *(schema or {}).get("anyOf", ())]:
        types = item.get("type", ())
        yield from (_yaml(value) for value in item.get("enum", ()))
        if "boolean" in types:
            yield from ("true", "false")
    if any("null" in item.get("type", ()) for item in [schema or {}, *(schema or {}).get("anyOf", ())]):
        yield "null"


def _yaml(value: Any) -> str:
    return shown(value) if value is None or isinstance(value, bool) else str(value)
