"""The command line: one thin function a verb. Each calls the room that does the work, and prints.

Everywhere: ``--json`` prints one JSON object on stdout and nothing else there; progress goes to stderr and only to a
terminal; exit codes are 0 done, 1 a check failed, 2 wrong use or bad input with one line that says what and where.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tinyvad.errors import InputError, TinyvadError
from tinyvad.version import __version__


def _verb(function: Callable[..., Any]) -> Callable[..., Any]:
    """Errors that a user can act on become one line on stderr and an exit code."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except TinyvadError as error:
            click.echo(f"tinyvad: {' '.join(str(error).split())}", err=True)
            sys.exit(error.exit_code)
        except BrokenPipeError:
            sys.stderr.close()  # the reader of our output has left: nothing more to say, to nobody
            sys.exit(1)
        except OSError as error:
            place = error.filename or "a temporary or output file"
            reason = f"{error.strerror}; check space and permissions (TMPDIR moves temporary files)"
            click.echo(f"tinyvad: {place}: {reason}", err=True)
            sys.exit(2)
        except MemoryError:
            click.echo("tinyvad: out of memory; use fewer or smaller images, or a smaller --image-size", err=True)
            sys.exit(2)

    return run


def _progress(quiet: bool) -> Callable[[str, int, int], None]:
    """A one-line bar a stage on stderr, with the time left; silent if that is no terminal."""
    import time

    state: dict[str, Any] = {"stage": None, "start": 0.0, "first": 0}
    show = sys.stderr.isatty() and not quiet

    def tell(stage: str, done: int, total: int) -> None:
        if not show:
            return
        if stage != state["stage"]:
            state.update(stage=stage, start=time.monotonic(), first=done)
        passed, did = time.monotonic() - state["start"], done - state["first"]  # a resumed stage does not begin at 0
        left = passed / did * (total - done) if did else 0.0
        filled = 24 * done // max(total, 1)
        end = "\n" if done >= total else ""
        bar = "#" * filled + "." * (24 - filled)
        sys.stderr.write(f"\r{stage:<16} [{bar}] {done}/{total}  {left:4.0f} s left{end}")
        sys.stderr.flush()

    return tell


def _emit(as_json: bool, value: dict[str, Any], text: str) -> None:
    click.echo(json.dumps(value, indent=1) if as_json else text)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
engine_option = click.option(
    "--engine", default="int8", show_default=True, type=click.Choice(["int8", "onnx", "litert", "tflm"]),
    help="int8 is what the device computes.",
)  # fmt: skip
on_error_option = click.option(
    "--on-error", type=click.Choice(["stop", "skip"]), help="What to do with an unreadable image. Default: stop."
)


class _OneLineErrors(click.Group):
    """Wrong use is told in one line, like every other error, with exit code 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.UsageError as error:
            verb = error.ctx.command_path if error.ctx is not None else "tinyvad"
            if error.ctx is not None and error.format_message() == error.ctx.get_help():
                click.echo(error.format_message(), err=True)  # no verb at all: the help is the answer
            else:
                message = " ".join(error.format_message().split()).rstrip(".")
                click.echo(f"tinyvad: {message}; see `{verb} --help`", err=True)
            sys.exit(2)
        except click.Abort:
            click.echo("tinyvad: interrupted", err=True)
            sys.exit(130)


@click.group(cls=_OneLineErrors, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Fit a visual anomaly detector on good images, and get a build that is proven to fit the chip it was built for."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path())
@json_option
@_verb
def init(folder: Path, as_json: bool) -> None:
    """Write a commented tinyvad.toml into FOLDER.

    Example: tinyvad init my-part
    """
    from tinyvad.files import write_text
    from tinyvad.project import FILE, TEMPLATE

    path = folder / FILE
    if path.exists():
        raise InputError(f"{path} exists; edit it, or remove it first")
    write_text(path, TEMPLATE)
    _emit(as_json, {"written": str(path)}, f"wrote {path}")


@main.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo-data"), show_default=True)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@json_option
@_verb
def demo(out: Path, seed: int, as_json: bool) -> None:
    """Render a small synthetic part with defects, in MVTec layout.

    Example: tinyvad demo && tinyvad build --data demo-data --target cortex-m7
    """
    from tinyvad.demo import render_demo

    folder = render_demo(out, seed=seed)
    _emit(as_json, {"written": str(folder)}, f"rendered a synthetic part into {folder}")


@main.command()
@click.option("--data", type=click.Path(path_type=Path), help="Folder of images (MVTec, VisA, plain folders, or all good).")
@click.option("--target", help="Chip, board, alias or .toml file; see `tinyvad targets`.")
@click.option("--out", type=click.Path(path_type=Path), help="Where the build goes.  [default: build]")
@click.option("--project", "project_file", type=click.Path(path_type=Path), help="Settings.  [default: ./tinyvad.toml]")
@click.option("--category", help="Which one, if --data holds several. Default: a build for each.")
@click.option("--backbone", help="Name (`tinyvad backbones`), .onnx or .tflite file.  [default: auto, the best that fits]")
@click.option("--weights", type=click.Path(path_type=Path), help="For a name: .npz, .onnx, .tflite, or `random` to try it.")
@click.option("--layers", help="Tapped tensors, comma separated.")
@click.option("--method", help="See `tinyvad methods`. Default: by rule.")
@click.option("--shared", help="paste: the last layer that teacher and student share. Default: by rule.")
@click.option("--epochs", type=int, help="Of methods that are trained. Default: the paper's.")
@click.option("--strategy", help="With --tasks: what keeps a trained network from forgetting, e.g. compressed-replay.")
@click.option("--replay", type=int, help="Items of all products that are trained on again.  [default: 100]")
@click.option("--replay-form", help="How compressed replay stores them: float32, int8, rotated-4, ...  [default: int8]")
@click.option("--image-size", type=int, help="Network input in pixels. Default: chosen on good images.")
@click.option("--grid", type=int, help="Cells a side of the score map.")
@click.option("--dimensions", type=int, help="Directions that padim-compact keeps.")
@click.option("--bank-bytes", help="Upper bound, e.g. 160K.")
@click.option("--tasks", type=int, help="Products that the bank must have room for; see `tinyvad learn`.  [default: 1]")
@click.option("--frame", help="Camera frame to keep in RAM, e.g. 320x240-rgb565.")
@click.option("--runtime", type=click.Choice(["tinyvad", "tflm"]), help="What runs the network.  [default: tinyvad]")
@click.option("--plan", type=click.Choice(["auto", "layerwise", "inplace-dw", "patch"]), help="Its memory plan.")
@click.option("--max-ms", type=int, help="Estimated time an image may take. Default: 1000, doubled until something fits.")
@click.option("--bit-depth", type=int, help="Bits that 16-bit files hold.")
@click.option("--threshold", type=click.Choice(["quantile", "f1"]), help="f1 needs labelled defects.  [default: quantile]")
@click.option("--quantile", type=float, help="Share of held-out good images below the threshold.  [default: 0.99]")
@click.option("--seed", type=int, help="[default: 0]")
@on_error_option
@json_option
@_verb
def build(project_file: Path | None, as_json: bool, layers: str | None, **flags: Any) -> None:
    """Fit, quantise, export, plan, check and report.

    Example: tinyvad build --data bottle --target cortex-m7 --backbone mcunet.onnx
    """
    from tinyvad.build import build as make
    from tinyvad.project import load_project

    chosen = {**flags, "layers": tuple(layers.split(",")) if layers else None}
    project = load_project(project_file, {k: str(v) if isinstance(v, Path) else v for k, v in chosen.items()})
    builds = make(project, _progress(as_json))
    reports = [{"build": str(b.folder), **_headline(b.report)} for b in builds]
    _emit(as_json, reports[0] if len(reports) == 1 else {"builds": reports}, "\n".join(_describe(r) for r in reports))


def _headline(report: dict[str, Any]) -> dict[str, Any]:
    keys = (
        "warnings", "method", "backbone", "preprocessing", "grid", "thresholds", "metrics", "budget", "latency",
        "verification",
    )  # fmt: skip
    return {key: report[key] for key in (*keys, "training") if key in report} | {"dataset": report["dataset"]}


def _describe(r: dict[str, Any]) -> str:
    size, method, threshold = r["preprocessing"]["height"], r["method"], r["thresholds"]
    grid = "x".join(str(cells) for cells in r["grid"])
    settings = ", ".join(f"{k} {v}" for k, v in method["settings"].items() if v is not None)
    lines = [
        f"{r['build']}: {method['name']} ({settings}) on {r['backbone']['name']} at {size} px, grid {grid}",
        f"  backbone   {r['backbone']['source']}; taps {', '.join(r['backbone']['layers'])}",
        *(f"  auto       {line}" for line in _tried(r["backbone"]["tried"])),
        *(f"  sizes      {line}" for line in _sizes_tried(r["backbone"]["sizes_tried"])),
        f"  good       {r['dataset']['n_train']} images; threshold {threshold['score']:.3f} ({threshold['rule']})",
    ]
    if r["budget"]:
        b = r["budget"]
        label = b["target"] if b["alias"] is None else f"{b['alias']} ({b['target']})"
        flash = f"{b['flash_used']:,} of {b['flash_available']:,} B" if b["flash_available"] else f"{b['flash_used']:,} B"
        lines.append(f"  fits       {label}: RAM {b['ram_used']:,} of {b['ram_available']:,} B, flash {flash}")
    if r["latency"]:
        lines.append(f"  latency    about {r['latency']['ms']:.0f} ms (estimated, {r['latency']['engine']})")
    if "training" in r:
        lines.append(f"  training   {_training_line(r['training'])}")
    if r["metrics"]:
        lines.append("  test       " + _metrics_line(r["metrics"]))
    lines += [f"  WARNING    {warning}" for warning in r["warnings"]]
    compared = [f"{name} {facts['status']}" for name, facts in r["verification"]["engines"].items() if name != "int8"]
    lines.append(f"  engines    {'; '.join(compared)}")
    lines.append(f"  report     {Path(r['build']) / 'report.html'}")
    return "\n".join(lines)


def _training_line(training: dict[str, Any]) -> str:
    """What a step of training would take, and whether the target could."""
    batch, name = training["batch"], training.get("target")
    words = [f"a step of {batch} images: {training['macs']['step'] * batch / 1e6:,.0f} M MAC"]
    words.append(f"{training['ram']['total']:,} B of RAM")
    if training["replay_bytes"]:
        words.append(f"replay {training['replay_bytes']:,} B")
    fits = {True: f"; fits {name}", False: f"; does not fit {name}", None: ""}[training["fits"]]
    return f"{', '.join(words)} ({training['kind']}){fits}"


def _tried(tried: list[dict[str, Any]]) -> list[str]:
    """A line a network that `--backbone auto` looked at."""
    lines = []
    for one in tried:
        size = "" if one["image_size"] is None else f", {one['image_size']} px"
        size += "" if one["arena_bytes"] is None else f", arena {one['arena_bytes']:,} B"
        size += "" if one["flash_bytes"] is None else f", flash {one['flash_bytes']:,} B"
        size += "" if one["ms"] is None else f", about {one['ms']:,.0f} ms"
        words = [word for word in ("chosen" if one["chosen"] else "", one["why_not"]) if word]
        lines.append(f"{one['name']}: quality {one['quality']:.3f}{size}: {', '.join(words)}")
    return lines


def _sizes_tried(tried: list[dict[str, Any]]) -> list[str]:
    """A line an input size that was tried on good images with made-up defects."""
    lines = []
    for one in tried:
        facts = f"made-up defects AUROC {one['probe_auroc']:.3f}"
        facts += "" if one["arena_bytes"] is None else f", arena {one['arena_bytes']:,} B"
        facts += "" if one["ms"] is None else f", about {one['ms']:,.0f} ms"
        lines.append(f"{one['image_size']} px: {facts}{': chosen' if one['chosen'] else ''}")
    return lines


def _warn(model: Any) -> list[str]:
    """Warnings about a loaded build, told on stderr too."""
    from tinyvad.backbones.source import warnings_about

    warnings = warnings_about(model.manifest["backbone"])
    for warning in warnings:
        click.echo(f"tinyvad: warning: {warning}", err=True)
    return warnings


def _metrics_line(metrics: dict[str, Any]) -> str:
    names = ("image_AUROC", "image_F1Max", "image_F1_floor", "pixel_AUROC", "pixel_F1Max", "pixel_AUPRO")
    shown = [f"{name} {metrics[name]:.3f}" for name in names if metrics.get(name) is not None]
    shown.append(f"{metrics['false_alarms']} of {metrics['n_normal']} good flagged")
    shown.append(f"{metrics['missed']} of {metrics['n_anomalous']} defects missed")
    return ", ".join(shown)


@main.command()
@click.option("--teacher", "teachers", multiple=True, required=True, help="Name or file; several are joined.")
@click.option("--layers", "layers", multiple=True, help="Its tapped tensors, comma separated; one --layers a teacher.")
@click.option("--student", required=True, help="Name of a backbone (`tinyvad backbones`).")
@click.option("--student-layers", help="Its tapped tensors, comma separated.  [default: the backbone's own]")
@click.option("--images", "folders", multiple=True, help="Folder of training images, with all folders below; repeatable.")
@click.option("--generated", default=0, show_default=True, help="Generated textures, fractals and parts beside them.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The weights, NAME.npz.")
@click.option("--image-size", default=112, show_default=True, help="Pixels of the views.")
@click.option("--steps", default=10000, show_default=True)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--learning-rate", default=0.03, show_default=True)
@click.option("--loss", default="cosine-half", show_default=True, help="Comparison-normalisation.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--note", "notes", multiple=True, help="For the card: licence of teacher and images; repeatable.")
@click.option("--export-quantised-check", "check", is_flag=True, help="Measure int8 features against float ones.")
@json_option
@_verb
def distill(
    teachers: tuple[str, ...],
    layers: tuple[str, ...],
    student_layers: str | None,
    folders: tuple[str, ...],
    out: Path,
    notes: tuple[str, ...],
    check: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train a small backbone on a larger network's features, without labels. A stopped training goes on where it was.

    Example: tinyvad distill --teacher teacher.onnx --student mcunet-in1 --images photos --out mcunet-in1.npz
    """
    from tinyvad.distill.command import distill as train

    card, skipped = train(
        teachers, layers, student_layers, folders, out, notes, check, _progress(as_json), **settings
    )
    for path, reason in skipped.items():
        click.echo(f"skipped {path}: {reason}", err=True)
    lines = [f"{out}: {card['architecture']}, {card['parameters']:,} parameters, quality {card['quality']:.3f}"]
    for layer in card["layers"]:
        snr = f", int8 {layer['int8_snr_db']:.1f} dB" if check else ""
        lines.append(f"  {layer['name']:<14} stride {layer['stride']:<3} explained {layer['explained']:.3f}{snr}")
    _emit(as_json, {"weights": str(out), **card}, "\n".join(lines))


@main.command(name="eval")
@click.argument("build_folder", metavar="BUILD", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--category", help="Which one, if --data holds several. Default: the build's own, of several tasks all.")
@click.option("--task", help="Score all images by this product's part of the bank. Default: the nearest of each image.")
@engine_option
@on_error_option
@json_option
@_verb
def evaluate(
    build_folder: Path, data: Path, category: str | None, task: str | None, engine: str, on_error: str | None, as_json: bool
) -> None:
    """Metrics on labelled images; of a build of several products on all of them that --data holds.

    Example: tinyvad eval build --data bottle --engine int8 --json
    """
    from tinyvad.evaluate import evaluate as measure
    from tinyvad.evaluate import evaluate_tasks
    from tinyvad.images import find_datasets
    from tinyvad.model import load

    model = load(build_folder, engine)
    datasets = {dataset.name: dataset for dataset in find_datasets(data, need_good=False)}
    tell = _progress(as_json)
    value: dict[str, Any]
    if category is None and len(datasets) > 1 and len(model.task_names) > 1:
        value, skipped = evaluate_tasks(model, list(datasets.values()), on_error or "stop", tell, task)
        lines = [f"{name}: {_metrics_line(metrics)}" for name, metrics in value["tasks"].items()]
        lines.append(_mean_line(value))
    else:
        wanted = category or (model.task_names[0] if len(datasets) > 1 else next(iter(datasets)))
        if wanted not in datasets:
            raise InputError(f"{data} has no category {wanted}; choose with --category among {', '.join(datasets)}")
        told = functools.partial(tell, "test images")
        result = measure(model, datasets[wanted], on_error or "stop", told, task)
        value, skipped, lines = result.metrics, result.skipped, [_metrics_line(result.metrics)]
    for path, reason in skipped:
        click.echo(f"skipped {path}: {reason}", err=True)
    value = {**value, "skipped": [str(path) for path, _ in skipped], "warnings": _warn(model)}
    _emit(as_json, value, "\n".join(lines))


def _mean_line(value: dict[str, Any]) -> str:
    names = ("image_AUROC", "image_F1Max", "pixel_AUROC", "pixel_F1Max", "pixel_AUPRO")
    shown = [f"{name} {value['mean'][name]:.3f}" for name in names if value["mean"].get(name) is not None]
    if value["routing_accuracy"] is not None:
        shown.append(f"{value['routing_accuracy']:.1%} of the images taken for their own product")
    if value["not_evaluated"]:
        shown.append(f"no images of {', '.join(value['not_evaluated'])}")
    return f"mean of {len(value['tasks'])}: " + ", ".join(shown)


@main.command()
@click.argument("build_folder", metavar="BUILD", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help="Folder of good images, in any layout that build takes.")
@click.option("--task", help="Name of the product: a new one, or one that the build knows.")
@click.option("--watch", is_flag=True, help="Keep running and learn images as they appear in --data; Ctrl-C ends it.")
@click.option("--batch", type=click.IntRange(1), help="For --watch: images of a generation.  [default: 8]")
@click.option("--forget", metavar="NAME", help="Remove a product instead.")
@click.option("--undo", is_flag=True, help="Go back one generation instead; once more brings it back.")
@on_error_option
@json_option
@_verb
def learn(
    build_folder: Path, data: Path | None, task: str | None, watch: bool, batch: int | None, forget: str | None,
    undo: bool, on_error: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Add a product to a build, or more images of one, without old images; safe against a power cut at any moment.

    Example: tinyvad learn build --data cable --task cable
    """
    from tinyvad.continual.learn import Learner
    from tinyvad.continual.watch import BATCH, images_to_learn
    from tinyvad.continual.watch import watch as run
    from tinyvad.relearning import is_trained
    from tinyvad.relearning import learn as train_on

    if (data is not None or task is not None) + (forget is not None) + undo != 1:
        raise InputError("give --data with --task, or --forget, or --undo; see `tinyvad learn --help`")
    if not undo and forget is None and (data is None or task is None):
        raise InputError(f"--{'task' if task is None else 'data'} is missing; see `tinyvad learn --help`")
    if not watch and batch is not None:
        raise InputError("--batch belongs to --watch; see `tinyvad learn --help`")
    if undo or forget is not None:
        if watch or on_error is not None:
            raise InputError("--watch and --on-error belong to --data; see `tinyvad learn --help`")
        learner = Learner(build_folder)
        done = learner.undo() if forget is None else learner.forget(forget)
        _emit(as_json, done.to_dict(), f"{build_folder}: generation {done.generation}; {_products(done)}")
        return
    assert data is not None and task is not None
    if watch:
        told: list[tuple[str, str]] = []

        def log(found: Any) -> None:
            for path, reason in found.skipped[len(told) :]:
                click.echo(f"skipped {path}: {reason}", err=True)
            told.extend(found.skipped[len(told) :])
            click.echo(_learnt_line(found), err=True)

        _end_like_ctrl_c()
        last = run(Learner(build_folder), data, task, batch or BATCH, on_error or "skip", log)
        value = {"task": task, "images": 0} if last is None else last.to_dict()
        _emit(as_json, value, "nothing was learnt" if last is None else f"learnt {last.images} images; {_products(last)}")
        return
    paths = images_to_learn(data, task)
    if is_trained(build_folder):
        done = train_on(build_folder, task, paths, on_error or "stop", _progress(as_json))
    else:
        done = Learner(build_folder).learn(task, paths, on_error or "stop", _progress(as_json), len(paths))
    for path, reason in done.skipped:
        click.echo(f"skipped {path}: {reason}", err=True)
    _emit(as_json, done.to_dict(), f"{_learnt_line(done)}\n{_products(done)}")


def _end_like_ctrl_c() -> None:
    """A service is ended by SIGTERM: it says what was learnt, as behind Ctrl-C."""
    import signal

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)


def _learnt_line(done: Any) -> str:
    if not done.images:
        why = f"{done.known} images were learnt before"
        why += f", {len(done.skipped)} can't be read" if done.skipped else ""
        return f"{done.task}: nothing new, {why}; generation {done.generation}"
    words = [f"{done.task}{' (new)' if done.new_task else ''}: {done.images} images learnt"]
    if done.known:
        words.append(f"{done.known} known ones left out")
    words += [f"threshold {done.threshold:.3f}", f"generation {done.generation}"]
    words.append(f"bank {done.bank_bytes:,} of {done.slot_bytes:,} B")
    return ", ".join(words) + (f"; {done.gives_way}" if done.gives_way else "")


def _products(done: Any) -> str:
    count = len(done.tasks)
    return f"{count} product{'s' * (count > 1)}: " + ", ".join(f"{task['name']} ({task['images']})" for task in done.tasks)


@main.command()
@click.argument("build_folder", metavar="BUILD", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--overlay", type=click.Path(path_type=Path), help="Folder for heat-map pictures.")
@engine_option
@on_error_option
@json_option
@_verb
def predict(
    build_folder: Path, images: tuple[Path, ...], overlay: Path | None, engine: str, on_error: str | None, as_json: bool
) -> None:
    """Score images (files or folders of files): `image_path pred_score pred_label threshold` a line, and the task if the
    build knows several products.

    Example: tinyvad predict build part1.png part2.png --overlay heat-maps
    """
    from tinyvad.images import list_images
    from tinyvad.model import load

    model = load(build_folder, engine)
    warnings = _warn(model)
    paths = [path for item in images for path in (list_images(item) if item.is_dir() else [item])]
    skipped: list[tuple[Path, str]] = []
    rows = []
    for prediction in model.stream(paths, on_error=on_error or "stop", skipped=skipped):
        row = {
            "image_path": str(prediction.image_path),
            "pred_score": prediction.pred_score,
            "pred_label": prediction.pred_label,
            "threshold": prediction.threshold,
            "task": prediction.task,
        }
        rows.append(row)
        if not as_json:
            words = f"{row['image_path']} {row['pred_score']:.6g} {row['pred_label']} {row['threshold']:.6g}"
            click.echo(f"{words} {row['task']}" if len(model.task_names) > 1 else words)
        if overlay is not None:
            _save_overlay(model, prediction, overlay, len(rows))
    for path, reason in skipped:
        click.echo(f"skipped {path}: {reason}", err=True)
    if as_json:
        value = {"predictions": rows, "skipped": [str(path) for path, _ in skipped], "warnings": warnings}
        click.echo(json.dumps(value, indent=1))


def _save_overlay(model: Any, prediction: Any, folder: Path, number: int) -> None:
    from tinyvad.report.pictures import save_overlay, scale_limit

    image = model.preprocessing.uint8_input(prediction.image_path)
    name = f"{number:05d}_{prediction.image_path.stem[:60]}.png"
    limit = scale_limit(prediction.threshold, [])
    save_overlay(folder / name, image, prediction.anomaly_map, prediction.threshold, limit, prediction.pred_mask)


@main.command()
@click.argument("arguments", metavar="[BUILD] [AXIS=VALUES]...", nargs=-1)
@click.option("--target", "targets", multiple=True, help="Repeatable; `all` for every preset.  [default: the build's own]")
@click.option(
    "--runtime", type=click.Choice(["tinyvad", "tflm", "both"]), default="tinyvad", show_default=True,
    help="Our C runtime, or TensorFlow Lite Micro for the network.",
)
@click.option("--frame", help="Camera frame to keep in RAM, e.g. 320x240-rgb565.")
@click.option(
    "--format", "form", type=click.Choice(["table", "json", "markdown", "junit"]), default="table", show_default=True
)
@click.option("--baseline", type=click.Path(path_type=Path), help="JSON of an earlier `profile --format json`.")
@click.option("--max-growth", default="3%", show_default=True, help="How much any figure may grow over the baseline.")
@click.option("--sweep", metavar="AXIS=VALUES", multiple=True, help="Plan variants: image-size=96..224 bank-bytes=32K,64K.")
@click.option("--backbone", help="For a sweep: name or file.  [default: the build's, or auto]")
@click.option("--data", type=click.Path(path_type=Path), help="For a sweep: images, to fit and evaluate every variant on.")
@click.option("--picture", type=click.Path(path_type=Path), help="For a sweep: an .svg of memory against quality.")
@click.option("--seconds", type=click.IntRange(1), default=600, show_default=True, help="For a sweep: time for --data.")
@json_option
@_verb
def profile(
    arguments: tuple[str, ...],
    targets: tuple[str, ...],
    runtime: str,
    frame: str | None,
    form: str,
    baseline: Path | None,
    max_growth: str,
    sweep: tuple[str, ...],
    as_json: bool,
    **of_sweep: Any,
) -> None:
    """RAM and flash by region and by owner, for people and for CI; with --sweep, of variants before they are built.

    Example: tinyvad profile build --target all --format json > base.json; tinyvad profile build --baseline base.json

    Example: tinyvad profile --target stm32f746 --backbone mcunet-in3 --sweep image-size=96..224 bank-bytes=32K,64K
    """
    form = "json" if as_json else form
    builds = [Path(word) for word in arguments if not sweep or "=" not in word]
    if sweep:
        from tinyvad.sweep import run_sweep

        axes = [*sweep, *(word for word in arguments if "=" in word)]
        click.echo(run_sweep(builds, axes, targets, runtime, frame, form, tell=_progress(as_json), **of_sweep), nl=False)
        return
    from tinyvad.profiling import profile as measure
    from tinyvad.profiling import render

    unused = [f"--{name}" for name in ("backbone", "data", "picture") if of_sweep[name] is not None]
    if len(builds) != 1 or unused:
        raise InputError(f"{unused[0]} belongs to --sweep" if unused else f"give one BUILD, not {len(builds)}; see --help")
    problems, value = measure(builds[0], targets, runtime, frame, baseline, max_growth)
    value["problems"] = problems
    click.echo(render(value, form), nl=False)
    for problem in problems:
        click.echo(f"tinyvad: {problem}", err=True)
    if problems:
        sys.exit(1)


@main.command()
@click.argument("build_folder", metavar="BUILD", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help="Folder of images. Default: those that the build keeps.")
@click.option("--images", "limit", type=click.IntRange(1), default=20, show_default=True, help="How many of --data.")
@click.option(
    "--engine", "engines", multiple=True, type=click.Choice(["litert", "tflm", "onnx", "host", "firmware", "all"]),
    help="Repeatable. host: the C code on this PC; firmware: on the emulated chip.  [default: litert, tflm, onnx]",
)
@click.option("--target", help="For the firmware: another target than the build's own.")
@json_option
@_verb
def verify(
    build_folder: Path, data: Path | None, limit: int, engines: tuple[str, ...], target: str | None, as_json: bool
) -> None:
    """Run the same images through several engines; one differing integer fails.

    Example: tinyvad verify build --data bottle --engine firmware
    """
    from tinyvad.firmware_sim.targets import load_target
    from tinyvad.verify import images_of, summary
    from tinyvad.verify import verify as compare

    tell = _progress(as_json)
    images = None if data is None else images_of(build_folder, data, limit)
    chip = None if target is None else load_target(target)
    result = compare(build_folder, images, lambda done, total: tell("compare engines", done, total), engines or None, chip)
    _emit(as_json, result, summary(result))
    if not result["ok"]:
        sys.exit(1)


@main.command()
@click.argument("build_folder", metavar="BUILD", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Good images of one or several products.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of facts and pictures.  [default: BUILD-analysis]")
@click.option("--layers", help="Of the tapped ones, comma separated.  [default: all]")
@click.option("--keep", type=float, default=10.0, show_default=True, help="Percent of a cell's channels that masks keep.")
@click.option("--limit", type=click.IntRange(2), help="Images of a product, evenly spaced.  [default: all]")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@on_error_option
@json_option
@_verb
def analyse(
    build_folder: Path, data: Path, layers: str | None, on_error: str | None, as_json: bool, **settings: Any
) -> None:
    """Which features of a build's network carry a product, and what products share: facts, pictures and a page.

    Example: tinyvad analyse build --data all-products --limit 100
    """
    from tinyvad.analysis.command import analyse as look
    from tinyvad.analysis.command import summary

    names = layers.split(",") if layers else None
    stop = on_error or "stop"
    value, skipped = look(build_folder, data, layers=names, on_error=stop, tell=_progress(as_json), **settings)
    for path, reason in skipped:
        click.echo(f"skipped {path}: {reason}", err=True)
    if len(value["products"]) > 1 and "left_out" in value["tsne"]:
        click.echo(f"tinyvad: left out: {value['tsne']['left_out']}", err=True)
    _emit(as_json, value, summary(value))


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@json_option
@_verb
def inspect(file: Path, as_json: bool) -> None:
    """Fields of a .tvb bank, a .tflite model or a build.

    Example: tinyvad inspect model.tflite --json
    """
    from tinyvad.inspection import inspect as look

    value, text = look(file)
    _emit(as_json, value, text)


@main.command()
@json_option
@_verb
def targets(as_json: bool) -> None:
    """Chips and boards with their memory, and aliases.

    Example: tinyvad targets --json
    """
    from tinyvad.inspection import targets_table

    value, text = targets_table()
    _emit(as_json, value, text)


@main.command()
@click.argument("network", metavar="[NAME|FILE]", required=False)
@json_option
@_verb
def backbones(network: str | None, as_json: bool) -> None:
    """Backbones by name, with what they take; with NAME or FILE (.onnx, .tflite) one network's layers and its card.

    Example: tinyvad backbones mcunet-in3
    """
    from tinyvad.backbone_tables import backbone_facts, backbones_table

    value, text = backbones_table() if network is None else backbone_facts(network)
    _emit(as_json, value, text)


@main.command()
@json_option
@_verb
def methods(as_json: bool) -> None:
    """Detectors.

    Example: tinyvad methods
    """
    from tinyvad.detectors import METHODS

    _emit(as_json, METHODS, "\n".join(f"{name:<16} {text}" for name, text in METHODS.items()))


@main.group()
def bench() -> None:
    """The papers' protocols and tables."""


@bench.command()
@click.argument("grid", metavar="GRID.toml", type=click.Path(path_type=Path))
@click.option("--init", is_flag=True, help="Write a commented GRID.toml and stop.")
@click.option("--workers", type=click.IntRange(1, 256), default=1, show_default=True, help="Processes on this machine.")
@click.option("--cluster", metavar="ADDRESS", help="Run on a Dask cluster instead, e.g. tcp://10.0.0.5:8786.")
@json_option
@_verb
def continual(grid: Path, init: bool, workers: int, cluster: str | None, as_json: bool) -> None:
    """Continual learning: streams x methods x backbones; cells, tables and plots. A stopped run goes on where it was.

    On a cluster the workers need tinyvad, and the data and cache folders at the same paths.

    Example: tinyvad bench continual grid.toml --init && tinyvad bench continual grid.toml --workers 4
    """
    from tinyvad.bench.command import bench_continual, write_template

    if init:
        write_template(grid)
        _emit(as_json, {"written": str(grid)}, f"wrote {grid}")
        return
    result = bench_continual(grid, workers, cluster, _progress(as_json))
    out = Path(result["out"])
    text = f"{result['cells']} cells in {out}\n  tables  {out / 'tables' / 'results.md'}\n  plots   {out / 'plots'}"
    _emit(as_json, result, text)


@bench.command()
@click.option("--dataset", type=click.Choice(["MVTec AD", "VisA"]), default="MVTec AD", show_default=True)
@click.option(
    "--format", "form", type=click.Choice(["table", "csv", "json", "markdown"]), default="table", show_default=True
)
@json_option
@_verb
def costs(dataset: str, form: str, as_json: bool) -> None:
    """Memory and GFLOPs of the published systems: as printed, by formula, and counted honestly.

    Example: tinyvad bench costs --format markdown
    """
    from tinyvad.bench.costs import bench_costs

    click.echo(bench_costs(dataset, "json" if as_json else form), nl=False)
