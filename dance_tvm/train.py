"""python -m dance_tvm.train: train a network so that work can be left out, by the method of one of the papers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from dance_tvm.core.cli import application, examples, start
from dance_tvm.core.errors import DanceError
from dance_tvm.core.files import require_folder
from dance_tvm.core.printing import print_table
from dance_tvm.core.progress import JsonLines, Progress
from dance_tvm.core.verbosity import level
from dance_tvm.models.network_files import require_weights
from dance_tvm.sparsity.data_names import require_data
from dance_tvm.sparsity.options import MethodOptions, method_options, require_model
from dance_tvm.sparsity.settings import Settings
from dance_tvm.sparsity.trained import continued, read_card
from dance_tvm.sparsity.units import read_units

app = application()


@app.command(
    epilog=examples(
        "dance-tvm train --method aap --target-macs 50% --epochs 20",
        "dance-tvm train --method kgs --model c3d --data ucf101:/data/ucf101 --init dense.safetensors --rate 2.6",
        "dance-tvm train --resume --out trained/c3d-mini-aap",
    )
)
def main(
    context: typer.Context,
    method: Annotated[
        Literal["dense", "ava", "aap", "kgs", "dstep"],
        typer.Option(help="what decides which work is left out; dense: nothing is"),
    ] = "aap",
    model: Annotated[str, typer.Option(help="a network of dance_tvm.models")] = "c3d-mini",
    data: Annotated[
        str,
        typer.Option(help="motion-digits, folder:FOLDER, csv:FILE, ucf101:FOLDER, hmdb51:FOLDER, transnet:VIDEO+VIDEO"),
    ] = "motion-digits",
    out: Annotated[
        Path | None,
        typer.Option(help="folder for checkpoint, curves, model and card", show_default="trained/MODEL-METHOD"),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    batch: Annotated[int, typer.Option(min=1, help="clips per step, in each process")] = 32,
    lr: Annotated[float, typer.Option(min=0)] = 1e-3,
    optimizer: Annotated[Literal["adam", "sgd"], typer.Option()] = "adam",
    init: Annotated[
        Path | None, typer.Option(help="weights to start from: an earlier run's model.safetensors, or a state dict")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="continue the run in --out with its own settings; more --epochs extend it")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run that --out holds")] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's")] = None,
    amp: Annotated[bool, typer.Option(help="mixed precision, in the type of --precision")] = True,
    precision: Annotated[
        Literal["float16", "bfloat16", "float32"], typer.Option(help="float16 only on a GPU; bfloat16 on any device")
    ] = "float16",
    accumulate: Annotated[int, typer.Option(min=1, help="batches whose gradients are summed for one step")] = 1,
    workers: Annotated[int, typer.Option(min=0, help="processes that decode clips; 0: this one")] = 0,
    target_macs: Annotated[
        str | None, typer.Option(help="aap: share of the dense MACs (0.5, 50%) or a count (120M)")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="aap: time:0.5, half of the time that `--set units=FILE` predicts; or macs:0.5")
    ] = None,
    algorithm: Annotated[str | None, typer.Option(help="kgs: heuristic, lasso or reweighted")] = None,
    scheme: Annotated[str | None, typer.Option(help="kgs: filter, vanilla, slices or kgs")] = None,
    rate: Annotated[float | None, typer.Option(help="kgs: how many times fewer MACs")] = None,
    target_flops: Annotated[float | None, typer.Option(help="dstep: share of the dense FLOPs, 0 to 1")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="a further option of the method, NAME=VALUE")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="print all settings as JSON, the method's defaults included, and end")
    ] = False,
    export: Annotated[bool, typer.Option(help="write model.pt2 for `dance-tvm build --model`")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print the card as JSON and nothing else")] = False,
    json_lines: JsonLines = False,
) -> None:
    """Train a network; write model.safetensors, card.json, curves.csv and a checkpoint to --out."""
    # All that can be refused before the seconds that loading PyTorch takes.
    out = out or Path("trained") / f"{model}-{method}"
    if not print_config:
        _require_place(out, resume, overwrite)
    if precision == "bfloat16" and not amp:
        raise DanceError("--precision bfloat16 is one of mixed precision: leave --no-amp out")
    chosen: dict[str, Any] = {
        "method": method, "model": model, "data": data, "epochs": epochs, "batch": batch, "lr": lr,
        "optimizer": optimizer, "init": str(init) if init else None, "seed": seed, "amp": amp, "precision": precision,
        "accumulate": accumulate, "workers": workers,
    }  # fmt: skip
    before = read_card(out / "checkpoint.safetensors")["settings"] if resume else {}
    if resume:
        chosen = {name: value for name, value in chosen.items() if _is_given(context, name)}
    trains_by = chosen.get("method", before.get("method", method))
    named = {
        "target_macs": target_macs, **_of_budget(budget, trains_by, target_macs), "algorithm": algorithm,
        "scheme": scheme, "rate": rate, "target_flops": target_flops,
    }  # fmt: skip
    chosen["options"] = {name: value for name, value in named.items() if value is not None} | _parsed(option or [])
    require_model(trains_by, chosen.get("model", before.get("model", model)))
    settings = continued(out / "checkpoint.safetensors", chosen) if resume else Settings(**chosen)
    found = method_options(settings.method, settings.options)
    found.require_epochs(settings.epochs)
    if print_config:
        typer.echo(settings.model_copy(update={"options": found.model_dump(mode="json")}).model_dump_json(indent=2))
        return
    _require_files(settings, found)
    progress = Progress(as_json, json_lines)
    result = run(
        **settings.model_dump(), out=out, resume=resume, threads=threads,
        console=None if as_json or json_lines or level() < 0 else Console(stderr=True),
        on_epoch=lambda row: progress.tell("epoch", "", **{str(name): value for name, value in row.items()}),
    )  # fmt: skip
    if export and int(os.environ.get("RANK", "0")) == 0:
        write_export(result, out / "model.pt2")
    progress.result(result.card)
    if as_json:
        typer.echo(json.dumps(result.card))
    elif not json_lines:
        rows = [[name, f"{value:.6g}"] for name, value in result.metrics.items() if name != "epoch"]
        best = f"epoch {result.metrics['epoch'] + 1:.0f} of {settings.epochs}"
        print_table(["figure", "value"], rows, title=f"best: {best}, written to {result.folder}")
        if export:
            typer.echo(f"next: dance-tvm build --model {quote(str(out / 'model.pt2'))}")


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether the command line gives a value to the option called ``name``."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _require_files(settings: Settings, options: MethodOptions) -> None:
    """Raise DanceError where clips, weights or units that a run is to read are not there."""
    require_data(settings.data)
    if settings.init is not None:
        require_weights(Path(settings.init))
    if (units := getattr(options, "units", None)) is not None:
        read_units(units)


def _of_budget(budget: str | None, method: str, target_macs: str | None) -> dict[str, str]:
    """The option that ``--budget KIND:AMOUNT`` stands for. Raises DanceError where it is none or not the only one."""
    if budget is None:
        return {}
    kind, _, amount = budget.partition(":")
    if kind not in ("time", "macs") or not amount:
        raise DanceError(f"--budget {budget} is not of the form time:0.5 or macs:0.5")
    if method != "aap":
        raise DanceError(f"--budget is aap's, and --method {method} has none: kgs takes --rate, dstep --target-flops")
    if target_macs is not None:
        raise DanceError("--budget and --target-macs both set what is left: give one of them")
    return {f"target_{kind}": amount}


def _require_place(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise DanceError where a run, finished or not, would be lost, where there is none to resume, and where none
    can be written."""
    if resume and overwrite:
        raise DanceError("--resume continues what --overwrite replaces: give one of them")
    require_folder(folder, "--out")
    if resume and not (folder / "checkpoint.safetensors").is_file():
        raise DanceError(f"{folder} holds no run to resume: name its --out, or train without --resume")
    if resume or overwrite:
        return
    for name, state in (("card.json", "a finished run"), ("checkpoint.safetensors", "a run that is not finished")):
        if (folder / name).exists():
            raise DanceError(
                f"{folder} holds {state}: --resume continues it, --overwrite replaces it, or choose another --out"
            )


def run(
    *,
    method: str,
    model: str,
    data: str,
    out: Path,
    options: dict[str, Any] | None = None,
    init: Path | str | None = None,
    resume: bool = False,
    threads: int | None = None,
    seed: int = 0,
    console: Console | None = None,
    on_epoch: Callable[[dict[str, float]], object] | None = None,
    **settings: Any,
) -> Any:
    """What the command does; returns `dance_tvm.sparsity.training.Result`. Raises DanceError for bad input."""
    import torch

    from dance_tvm import models
    from dance_tvm.sparsity.data import load_data
    from dance_tvm.sparsity.method import create_method
    from dance_tvm.sparsity.tasks import Classification, Distillation, Task
    from dance_tvm.sparsity.training import train

    if threads is not None:
        torch.set_num_threads(threads)
    chosen = Settings(
        method=method, model=model, data=data, options=options or {}, seed=seed,
        init=str(init) if init else None, **settings,
    )  # fmt: skip
    create_method(method, chosen.options)  # a wrong option is refused before the clips are read
    splits = load_data(data, model=model, seed=seed)
    if splits.task == "distillation":
        network, teacher = (_published_or_seeded(model, seed) for _ in range(2))
        task: Task = Distillation(teacher, varying=hasattr(splits.train, "set_epoch"))
    else:
        classes, channels = len(splits.train.classes), splits.train.shape[0]
        given = {} if channels == models.entry(model).input_shape[0] else {"in_channels": channels}
        network = models.create(model, num_classes=classes, seed=seed, **given)
        task = Classification()
    return train(chosen, network, splits, out, resume=resume, task=task, console=console, on_epoch=on_epoch)


def _published_or_seeded(model: str, seed: int) -> Any:
    """A network that gives logits, with its published weights where there are any."""
    from dance_tvm import models
    from dance_tvm.sparsity.tasks import Logits

    found = models.entry(model)
    return Logits(models.pretrained(model) if found.pretrained else models.create(model, seed=seed))


def write_export(result: Any, path: Path) -> None:
    """The trained network as a torch.export program for one clip, which `dance-tvm build --model` takes."""
    import io

    import torch

    from dance_tvm.sparsity.checkpoint import write_atomically

    clip = torch.zeros(1, *result.card["clip_shape"], dtype=getattr(torch, result.card["clip_dtype"]))
    program = torch.export.export(result.network.cpu().eval(), (clip,))
    content = io.BytesIO()
    torch.export.save(program, content)
    write_atomically(path, content.getvalue())


def _parsed(pairs: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise DanceError(f"--set {pair} is not of the form NAME=VALUE")
        if name in options:
            raise DanceError(f"--set {name} is given twice: give it once")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


if __name__ == "__main__":
    start(app, "python -m dance_tvm.train")
