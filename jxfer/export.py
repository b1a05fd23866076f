"""A finished run for the rest of the world: safetensors under the field's names, configs, a model card, StableHLO."""

import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jxfer import data, models, paths
from jxfer.config import PREPROCESSING, to_dict
from jxfer.partition import eval_graphdef
from jxfer.source import FinishedRun
from jxfer.step import from_input
from jxfer.typing import InputError
from jxfer.weights.names import OWN, namings_of
from jxfer.weights.naming import Naming
from jxfer.weights.save import export_tensors, write_safetensors

CONFIG, PREPROCESSOR, CARD, HLO = "config.json", "preprocessor_config.json", "README.md", "model.stablehlo"


def export(run: FinishedRun, directory: Path, *, names: str | None = None, stablehlo: bool = False) -> list[Path]:
    """Writes a finished run as others read it and returns the files, the weights first.

    Args:
      run: the finished run.
      directory: made if it is not there.
      names: whose names the weights get; None takes the first of those the architecture is published under.
      stablehlo: whether to write the whole function too, from examples as they are read from files to logits.

    Raises:
      InputError: the architecture is not published under `names`, the head has no name there, or the directory
        cannot be written.
    """
    size = models.size_of(run.model)
    naming = _naming(run, size, names)
    tensors = _tensors(run, size, naming)
    settings = _config(run, size, naming)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        written = write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
        _write_json(directory / CONFIG, settings)
        _write_json(directory / PREPROCESSOR, _preprocessor(run))
        files = [*written, directory / CONFIG, directory / PREPROCESSOR]
        if (tokenizer := run.directory / "tokenizer.json").exists():
            (directory / "tokenizer.json").write_bytes(tokenizer.read_bytes())
            files.append(directory / "tokenizer.json")
        if stablehlo:
            (directory / HLO).write_bytes(_serialised(run))
            files.append(directory / HLO)
        (directory / CARD).write_text(_card(run, naming, files))
    except OSError as error:
        raise InputError(f"cannot write to '{directory}': {error.strerror}; choose another folder") from error
    return [*files, directory / CARD]


def _naming(run: FinishedRun, size: Any, names: str | None) -> Naming | None:
    """Returns the naming to write in, None for our own."""
    known = {naming.name: naming for naming in namings_of(size) if naming.rules(size)}
    if names == OWN or (names is None and not known):
        return None
    if names is not None and names not in known:
        raise paths.unknown(f"names for `{run.model.name}`:", names, (*known, OWN))
    chosen = known[names] if names else next((each for each in known.values() if each.write_config), None)
    return chosen or next(iter(known.values()))


def _tensors(run: FinishedRun, size: Any, naming: Naming | None) -> dict[str, np.ndarray]:
    if naming is None:
        return {path.replace("/", "."): np.asarray(value) for path, value in run.weights.items()}
    try:
        tensors = export_tensors(run.weights, naming, size)
    except InputError as error:
        raise InputError(f"{error}; export it with `--names {OWN}`, under this library's own names") from error
    # PyTorch's batch norms count their batches, and refuse weights without that count when loading strictly.
    means = [name for name in tensors if name.endswith(".running_mean")]
    counters = {name.replace("running_mean", "num_batches_tracked"): np.zeros((), np.int64) for name in means}
    return tensors | counters


def _config(run: FinishedRun, size: Any, naming: Naming | None) -> dict[str, Any]:
    labels = {str(index): name for index, name in enumerate(run.classes)}
    own = {
        OWN: {
            "version": version("jxfer"),
            "names": naming.name if naming else OWN,
            "model": to_dict(run.model),
            "input": run.input,
            "input_shape": list(run.input_shape),
            "data": _preparation(run),
        }
    }
    if naming is not None and naming.write_config is not None:
        return naming.write_config(size, run.classes, run.input_shape) | own
    return {"architectures": [run.model.name], "num_classes": len(run.classes), "id2label": labels, **own}


def _preparation(run: FinishedRun) -> dict[str, Any]:
    """Returns how inputs are prepared in our own words, which `file:` reads back; nothing of where the data lie."""
    first, last = run.input_shape[0], run.input_shape[-1]
    seconds = first / run.data.sample_rate if run.input == "audio" and run.data.sample_rate else None
    shapes: dict[str, dict[str, Any]] = {
        "image": {"image_size": first if run.input_shape[:2] == (first, first) else None, "channels": last},
        "text": {"max_tokens": first},
        "audio": {"seconds": seconds},
    }
    said = {name: getattr(run.data, name) for name in PREPROCESSING if name != "tokenizer"} | shapes[run.input]
    return {name: value for name, value in to_dict(said).items() if value is not None}


def _preprocessor(run: FinishedRun) -> dict[str, Any]:
    """Returns how inputs are prepared, images in the words of transformers' image processors."""
    if run.input != "image":
        return {"input": run.input, "input_shape": list(run.input_shape), "sampling_rate": run.data.sample_rate}
    channels = run.input_shape[-1]
    mean, std = (_per_channel(values or data.NORMAL, channels) for values in (run.data.mean, run.data.std))
    return {
        "do_resize": run.data.image_size is not None,
        "size": {"height": run.input_shape[0], "width": run.input_shape[1]},
        "crop_pct": run.data.crop_fraction or 1.0,
        "resample": {"bilinear": 2, "bicubic": 3}[run.data.resample or "bilinear"],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
        "channel_order": run.data.channel_order or "rgb",
    }


def _per_channel(values: tuple[float, ...], channels: int) -> list[float]:
    return list(values if len(values) == channels else values * channels)


def _serialised(run: FinishedRun) -> bytes:
    """Returns `jax.export`'s serialisation of `(examples [B ...]) -> logits [B K]`, for any batch size, on any device.

    The weights are constants inside, and so is the preparation: it takes what an image file decodes to.
    """
    model = run.build()
    graphdef, state = eval_graphdef(model), nnx.state(model)
    prepare = data.Prepare(config=run.data, num_classes=len(run.classes), train=False)

    def logits(examples: jax.Array) -> jax.Array:
        return from_input(nnx.merge(graphdef, state), prepare(jax.random.key(0), {run.input: examples}))

    (batch,) = jax.export.symbolic_shape("batch")
    dtype = {"image": jnp.uint8, "text": jnp.int32, "audio": jnp.int16}[run.input]
    example = jax.ShapeDtypeStruct((batch, *run.input_shape), dtype)
    exported = jax.export.export(jax.jit(logits), platforms=("cpu", "cuda", "tpu"))(example)
    return bytes(exported.serialize())


def _card(run: FinishedRun, naming: Naming | None, files: list[Path]) -> str:
    """Returns the model card: what it is, what it was measured to do, what trained, and how to read the files."""
    row = _read_json(run.directory / "result.json")
    partition = run.directory / "partition.txt"
    num_params = sum(int(np.prod(value.shape)) for value in run.weights.values())
    lines = [
        f"# {run.model.name} for {len(run.classes)} classes",
        "",
        f"Written by jxfer {version('jxfer')}. Classes, in the order of the outputs: {', '.join(run.classes)}.",
        "",
        f"- network: `{run.model.name}`, {num_params:,} values, named as in {naming.name if naming else 'jxfer'}",
        f"- input: {run.input}, one example is {' × '.join(map(str, run.input_shape))}",
        *_facts(row),
        "",
        "## Measured",
        "",
        *_measured(row),
        "",
        "## Files",
        "",
        *(f"- `{file.name}`, {os.path.getsize(file):,} bytes" for file in files),
    ]
    if partition.exists():
        trained = partition.read_text().rstrip()
        lines += ["", "## What trained", "", "```", trained, "```"]
        if "/lora/" in trained:
            lines += ["", "The files have the updates under `lora/` merged into the kernels that they lay beside."]
    return "\n".join([*lines, ""])


def _facts(row: Mapping[str, Any]) -> list[str]:
    wanted = ("source", "target", "method", "variant", "shots", "seed", "steps", "params_trainable", "weights_hash")
    known = {name: row[name] for name in wanted if row.get(name) is not None}
    known |= {name: _without_folders(known[name]) for name in ("source", "target") if name in known}
    return [f"- {name.replace('_', ' ')}: {value}" for name, value in known.items()]


def _without_folders(origin: str) -> str:
    """Returns an origin without the folders of this machine, which are nobody else's concern."""
    kind, colon, place = origin.partition(":")
    local = kind in ("file", "folder", "table", "run") or place.startswith(("/", "~", "."))
    return f"{kind}{colon}{Path(place).name}" if local else origin


def _measured(row: Mapping[str, Any]) -> list[str]:
    if not row.get("metrics"):
        return ["Nothing is recorded of this run."]
    rows = [("test", row["metrics"]), ("validation", row.get("validation_metrics") or {})]
    table = ["| split | metric | value |", "|---|---|---|"]
    table += [f"| {split} | {name} | {value:.4f} |" for split, metrics in rows for name, value in metrics.items()]
    return [*table, "", "One run on one draw of examples: another seed would give another number."]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
