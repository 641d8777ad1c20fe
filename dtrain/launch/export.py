"""`dtrain export`: a model with its weights as an ONNX or torch.export file, compared with the model on one batch.

Or its weights alone, as one safetensors file.
"""

import contextlib
import hashlib
import inspect
import io
import json
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ml_collections import ConfigDict
from torch.nn import Module
from torch.utils import _pytree as pytree

import dtrain
from dtrain.checkpoint.checkpoint_files import step_in
from dtrain.checkpoint.contents import CheckpointError
from dtrain.checkpoint.shards import stored_in
from dtrain.checkpoint.weights import write_weights
from dtrain.config.build import defaults, version_of
from dtrain.config.errors import ConfigError, first_few, one_line, to_plain
from dtrain.config.load import run_folder, to_yaml
from dtrain.config.schema import PHASES
from dtrain.data.batch import call_form
from dtrain.data.batch import inputs as inputs_of
from dtrain.dataloader import Loaders, first_batch, get_train_loaders
from dtrain.distributed.exit_status import DONE, FAILED
from dtrain.tracking.secrets import redacted_tree
from dtrain.tracking.whole_file import whole_file
from dtrain.training.saved_model import Saved, find_saved, importable, load_into, model_of

ENDINGS = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}
MOST_SAMPLES = 8  # of the batch on which the file is compared with the model
TOLERANCE = 1e-3  # the largest difference, as a share of the largest output, with which a file is written
ONNX_BYTES = 2**31 - 2**20  # what an ONNX file can hold, less what is not weights
INPUT_SHAPE = "what the data look like can also be said: --input-shape 3,224,224"


class ExportError(Exception):
    """The model cannot be exported, in one line."""


class Example(NamedTuple):
    """A batch as the model is called with it, in eval mode on the CPU."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    samples: int

    def cut(self, samples: int) -> "Example":
        """The same of the first so many samples, from the beginning again where there are not enough."""

        def one(value: Any) -> Any:
            return value[torch.arange(samples) % self.samples] if self.has_batch(value) else value

        return Example(pytree.tree_map(one, self.args), pytree.tree_map(one, self.kwargs), samples)

    def has_batch(self, value: Any) -> bool:
        """Whether it is a tensor whose first dimension is that of the samples."""
        return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == self.samples


def export(
    config: ConfigDict,
    checkpoint: str | None = None,
    form: str | None = None,
    output: str | None = None,
    input_shape: Sequence[int] | None = None,
) -> int:
    """Write the file and say how far it is from the model; returns the exit status.

    Raises:
        ConfigError: There are no weights, they do not fit, or a package is missing.
    """
    saved = find_saved(checkpoint or run_folder(config))
    form = form or next((form for form, ending in ENDINGS.items() if str(output or "").endswith(ending)), "onnx")
    path = Path(output) if output else run_folder(config) / f"model{ENDINGS[form]}"
    if path.suffix != ENDINGS[form]:
        raise ConfigError(f"--output {path}: a file of --format {form} ends in {ENDINGS[form]}")
    if not path.parent.is_dir():
        raise ConfigError(f"--output {path}: there is no folder {path.parent}")
    if form == "safetensors":
        return _export_weights(saved, path)
    lacking = [name for name in ("onnx", "onnxscript") if form == "onnx" and not version_of(name)]
    if lacking:
        cure = "pip install 'dtrain[export]', or take --format torch, which needs nothing"
        raise ConfigError(f"--format onnx needs {' and '.join(lacking)}: {cure}")
    model = model_of(config)
    with importable():
        example = _example(config, model, input_shape)
    load_into(model, saved)
    model.eval()
    facts = {
        "dtrain": dtrain.__version__,
        "torch": str(torch.__version__),
        "config_sha256": hashlib.sha256(to_yaml(redacted_tree(to_plain(config))).encode()).hexdigest(),
        "model": str(config.model.name),
        "weights": str(saved.weights),
        "step": step_in(saved.weights.resolve().name),
    }
    write = {"onnx": _write_onnx, "torch": _write_torch}[form]
    try:
        with whole_file(path) as temporary:
            run, names = write(model, example, temporary, facts)
            difference = _compared(model, example, run)
    except ExportError as error:
        asked = "" if input_shape else "; if a sample is not what the data give: --input-shape"
        print(one_line(f"{config.model.name} is not exported: {error}{asked}"), file=sys.stderr)
        return FAILED
    print(f"exported    {path}  ({path.stat().st_size / 1e3:,.0f} kB, weights of {saved.weights})")
    print(f"inputs      {', '.join(names)}; the batch size is free, all other sizes are fixed")
    print(f"difference  {difference}")
    return DONE


def _export_weights(saved: Saved, path: Path) -> int:
    """Write the weights alone as one file, however many shards they are in; neither model nor data are made."""
    try:
        with whole_file(path) as temporary:
            left = write_weights(saved.weights, temporary, is_verified=saved.is_verified)
            stored = stored_in(temporary)
    except (CheckpointError, OSError) as error:
        raise ConfigError(str(error)) from error
    numbers = sum({id(each): each.shape.numel() for each in stored.values()}.values())
    print(f"exported    {path}  ({path.stat().st_size / 1e3:,.0f} kB, weights of {saved.weights})")
    print(f"tensors     {len(stored):,}, with {numbers:,} numbers")
    if left:
        print(f"left out    {first_few(left, 10)}: such a file holds tensors only")
    return DONE


def _example(config: ConfigDict, model: Module, input_shape: Sequence[int] | None) -> Example:
    """A batch of the test data, else of another phase; of random numbers where their shape is given."""
    options = defaults(config, "trainer")
    if input_shape is not None:
        generator = torch.Generator().manual_seed(0)
        value: Any = torch.randn(4, *input_shape, generator=generator)
        return Example((value,), {}, 4)
    written = config.get("loaders") or {}
    phases = [phase for phase in ("test", "val", "predict", "train") if written.get(phase) is not None]
    if not phases:
        raise ConfigError(f"loaders: has none of {', '.join(PHASES)}, of which one batch is needed; {INPUT_SHAPE}")
    try:
        loaders = get_train_loaders(config, 0, 1, config.get("seed") or 0, phases=phases[:1])
    except ConfigError as error:
        raise ConfigError([*error.mistakes, *ConfigError(INPUT_SHAPE).mistakes]) from error
    inputs = inputs_of(_batch(loaders), options["input_key"], options["target_key"])
    form = call_form(model, inputs, loaders.sample_counts())
    named = (
        {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)} if form == "named" else {}
    )
    args = () if form == "named" else tuple(inputs) if form == "several" else (inputs,)
    tensors = [leaf for leaf in pytree.tree_leaves((args, named)) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    if not tensors:
        raise ConfigError(f"the model is called with a {type(inputs).__name__} without tensors, which no file can hold")
    example = Example(args, named, tensors[0].shape[0])
    return example.cut(min(MOST_SAMPLES, max(2, example.samples)))  # torch.export takes one sample for a constant


def _batch(loaders: Loaders) -> Any:
    """A whole batch, loaded in this process."""
    other: Any = next((loader for loader in loaders[1:] if loader is not None), None)
    if other is None:
        return first_batch(loaders)
    return other.dataset.batch(0, *range(min(other.batch_sampler.batch_size, len(other.dataset), MOST_SAMPLES)))


def _exported(model: Module, example: Example) -> Any:
    """The model as a graph, in which the batch size is free."""
    batch = torch.export.Dim("batch")

    def free(value: Any) -> Any:
        return {0: batch} if example.has_batch(value) else None

    names = _argument_names(model, example.args)
    free_args = tuple(pytree.tree_map(free, each) for each in example.args)
    shapes = dict(zip(names, free_args, strict=False)) | {key: free(value) for key, value in example.kwargs.items()}
    shapes_of: Any = shapes if len(names) >= len(example.args) else free_args  # forward(*inputs) has no names
    with torch.no_grad(), _quiet() as fixed:
        try:
            return torch.export.export(model, example.args, example.kwargs, dynamic_shapes=shapes_of)
        except Exception as error:
            raise ExportError(_why(error, fixed.where)) from error


def _argument_names(model: Module, args: Sequence[Any]) -> list[str]:
    """The names of the positional arguments of a model's forward, as many as are used."""
    items = inspect.signature(model.forward).parameters.values()
    return [item.name for item in items if item.kind in (item.POSITIONAL_ONLY, item.POSITIONAL_OR_KEYWORD)][: len(args)]


def _why(error: Exception, fixed: str = "") -> str:
    """What an error of torch.export means, with the line of the model's code that it comes from, or that fixed it."""
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if "specialized it to be a constant" in str(error) or "Constraints violated" in text:
        text = "its code fixes the batch size (len(x), int(...), a loop over samples): write x.shape[0] or -1"
        return f"{text} ({fixed})" if fixed else text
    elif "data-dependent" in text:
        text = (
            "its way depends on the values of tensors (if x.sum() > 0, .item(), .tolist()), which a graph cannot hold"
        )
    packages = ("site-packages", "dist-packages")
    own = [
        frame for frame in traceback.extract_tb(error.__traceback__)
        if not {*packages} & set(Path(frame.filename).parts) and not frame.filename.startswith("<")
        and Path(frame.filename) != Path(__file__) and "/lib/python" not in frame.filename
    ]  # fmt: skip
    where = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return f"{text}{where}"


Run = Callable[[Example], list[torch.Tensor]]


def _write_torch(model: Module, example: Example, path: Path, facts: Mapping[str, Any]) -> tuple[Run, list[str]]:
    """A file for torch.export.load; what it gives, and the inputs' names."""
    program = _exported(model, example)
    names = list(program.graph_signature.user_inputs)
    torch.export.save(program, path, extra_files={"dtrain.json": json.dumps({**facts, "inputs": names})})
    module = torch.export.load(path).module()
    return lambda given: _tensors(module(*given.args, **given.kwargs)), names


def _write_onnx(model: Module, example: Example, path: Path, facts: Mapping[str, Any]) -> tuple[Run, list[str]]:
    """A file for ONNX; what it gives, and the inputs' names."""
    size = sum(value.numel() * value.element_size() for value in (*model.parameters(), *model.buffers()))
    if size > ONNX_BYTES:
        raise ExportError(
            f"its weights have {size / 1e9:.1f} GB, and one ONNX file holds 2 GB; --format torch has no limit"
        )
    program = _exported(model, example)
    try:
        with _quiet():
            options: dict[str, Any] = {"kwargs": example.kwargs, "output_names": _output_names(model, example)}
            made: Any = torch.onnx.export(program, example.args, verbose=False, **options)
    except Exception as error:
        raise ExportError(f"ONNX has no equal of a part of it: {_why(error)}") from error
    _name_batch(made.model.graph)
    names = [str(value.name) for value in made.model.graph.inputs]
    values = {**facts, "inputs": ", ".join(names)}
    made.model.metadata_props.update({f"dtrain.{key}" if key != "dtrain" else key: str(values[key]) for key in values})
    made.save(str(path))
    run = _onnx_runner(path)

    def outputs(given: Example) -> list[torch.Tensor]:
        arrays = [leaf.numpy() for leaf in _tensors((given.args, given.kwargs))]
        return [torch.as_tensor(item) for item in run(None, dict(zip(names, arrays, strict=True)))]

    return outputs, names


def _output_names(model: Module, example: Example) -> list[str]:
    """The keys of what the model returns, else output, output_1, ..."""
    with torch.no_grad():
        output = model(*example.args, **example.kwargs)
    if isinstance(output, Mapping) and all(isinstance(value, torch.Tensor) for value in output.values()):
        return [str(key) for key in output]
    return ["output" if not index else f"output_{index}" for index in range(len(_tensors(output)))]


def _name_batch(graph: Any) -> None:
    """Call the free dimension `batch`, which torch numbers."""
    import onnx_ir

    dimensions = (item for value in graph.inputs for item in value.shape or () if not isinstance(item, int))
    free = next(dimensions, None)
    for value in (*graph.inputs, *(output for node in graph.all_nodes() for output in node.outputs)):
        if free is not None and value.shape is not None and free in tuple(value.shape):
            value.shape = onnx_ir.Shape(["batch" if item == free else item for item in value.shape])


def _onnx_runner(path: Path) -> Callable[..., Any]:
    """What runs an ONNX file: onnxruntime where it is installed, else ONNX's own reference."""
    if version_of("onnxruntime"):
        import onnxruntime

        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run
    import onnx.reference

    return onnx.reference.ReferenceEvaluator(str(path)).run


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _compared(model: Module, example: Example, run: Run) -> str:
    """How far the file is from the model, over two batches of different sizes; an ExportError where that is too far."""
    largest, value, sizes = 0.0, 0.0, [example.samples, 1]
    for batch in (example, example.cut(1)):
        with torch.no_grad(), _quiet():
            expected = _tensors(model(*batch.args, **batch.kwargs))
            try:
                given = run(batch)
            except Exception as error:
                text = f"the file does not run on a batch of {batch.samples}: {_why(error)}"
                raise ExportError(text) from error
        if [each.shape for each in expected] != [each.shape for each in given]:
            raise ExportError(f"for a batch of {batch.samples} the file gives other shapes than the model")
        for one, other in zip(expected, given, strict=True):
            if not one.numel():
                continue
            difference = (one.double() - other.double()).abs().max().item()
            if not difference <= TOLERANCE * max(1.0, one.double().abs().max().item()):
                raise ExportError(
                    f"for a batch of {batch.samples} the file's output differs from the model's by {difference:.3g}"
                )
            largest, value = max(largest, difference), max(value, one.abs().max().item())
    text = f"at most {largest:.2g} from the model, whose outputs come to {value:.3g}"
    return f"{text}, in batches of {' and '.join(map(str, sizes))} samples"


class _Fixed(logging.Handler):
    """Notes where the model's code made a number of the batch size, which torch says in its log alone."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.where = ""

    def emit(self, record: logging.LogRecord) -> None:
        found = re.search(r"eval Eq\(\w+, \d+\) \[guard added\] \((\S+:\d+) in ", record.getMessage())
        self.where = self.where or (found[1] if found else "")


@contextlib.contextmanager
def _quiet() -> Iterator[_Fixed]:
    """Keep back what torch prints while it exports: whole graphs, and packages that it does without."""
    loggers = [log for name, log in logging.root.manager.loggerDict.items()
               if name.partition(".")[0] == "torch" and isinstance(log, logging.Logger) and log.handlers]  # fmt: skip
    shapes, noted = logging.getLogger("torch.fx.experimental.symbolic_shapes"), _Fixed()
    before = [(log, log.handlers, log.level, log.propagate) for log in {*loggers, shapes}]
    for log in loggers:
        log.handlers = []
    shapes.handlers, shapes.propagate = [noted], False
    shapes.setLevel(logging.INFO)
    out, err = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    try:
        with warnings.catch_warnings(), out, err:
            warnings.simplefilter("ignore")
            yield noted
    finally:
        for log, log.handlers, level, log.propagate in before:
            log.setLevel(level)
