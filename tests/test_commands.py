"""What every command owes its user: quick starts, early refusals, tables that cut nothing, progress that is heard."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from devices import CONSTANT, matmul_artifact, matmul_case, video_artifact
from typer.testing import CliRunner

from dance_tvm import build, build_network, cache, completion, logs, run, show, stream, train, tune
from dance_tvm.artifact.folder import load_artifact
from dance_tvm.artifact.preprocess import Preprocess, read_preprocess
from dance_tvm.artifact.video_windows import doubt_of_scale, windows_of
from dance_tvm.benchmarking.results import Results, write_results
from dance_tvm.compiler.requests import default_out, is_untrained, known_preprocess, require_buildable, require_program
from dance_tvm.core import cli, printing, verbosity
from dance_tvm.core.errors import DanceError, DanceWarning
from dance_tvm.core.progress import Progress
from dance_tvm.device import LoadedNetwork, why_no_emulator
from dance_tvm.machines import host
from dance_tvm.machines.target import load_target
from dance_tvm.models import names
from dance_tvm.models.network_inputs import require_shape
from dance_tvm.records.kernel_log import append, log_path, new_record, parse_loosely
from dance_tvm.sparsity.options import METHODS
from dance_tvm.tuning.requests import require_devices_of

HEAVY = re.compile(r"\| +(tvm|torch|scipy|onnx)$", re.MULTILINE)


def command(*words: str, **options) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-X", "importtime", "-m", "dance_tvm", *words]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, **options)
    done.heavy = HEAVY.findall(done.stderr)
    done.said = "".join(line for line in done.stderr.splitlines(True) if not line.startswith("import time:"))
    return done


# -- starts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["targets"], 0),
        (["targets", "snapdragon", "--json"], 0),
        (["logs", "check"], 0),
        (["logs", "best"], 0),
        (["device", "list", "--tracker", "127.0.0.1:1"], 2),
        (["cache", "list"], 0),
        (["completion", "bash"], 0),
        (["report", "RESULTS", "--format", "markdown", "--out", "OUT.md"], 0),
        (["train", "--method", "dstep", "--model", "resnet-mini", "--print-config"], 0),
    ],
)
def test_neither_tvm_nor_pytorch_is_loaded_without_need(words, code, tmp_path):
    write_results(tmp_path / "RESULTS", Results(created="today", command="", host={}, devices=[]))
    done = command(*words, cwd=tmp_path)
    assert done.returncode == code, done.said
    assert not done.heavy
    assert code == 0 or done.said.startswith("error: ") or "Usage" in done.said


def test_the_version_is_told_and_the_package_is_a_command():
    done = command("--version")
    assert (done.returncode, done.said) == (0, "")
    assert re.fullmatch(r"dance-tvm [\w.]+\n", done.stdout)


def test_another_system_is_told_at_once(monkeypatch, capsys):
    monkeypatch.setattr(cli.platform, "system", lambda: "Windows")
    with pytest.raises(SystemExit) as ended:
        cli.start(show.app, "show", ["artifacts/x"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: dance-tvm runs on Linux, not on Windows: use WSL 2\n"
    with pytest.raises(SystemExit) as ended:
        cli.start(show.app, "show", ["--help"])
    assert ended.value.code == 0


def test_the_processor_is_named_as_llvm_names_it():
    from tvm.target import codegen

    assert host._llvm_cpu() == codegen.llvm_get_system_cpu()
    for name in host.WITH_AVX512 | host.WITHOUT_AVX512:
        target = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": name}
        from tvm.target import Target

        assert bool(codegen.llvm_cpu_has_features("avx512f", Target(target))) == (name in host.WITH_AVX512), name


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_targets_that_contradict_themselves_are_refused():
    phone = load_target("snapdragon")
    for changes, said in [
        ({"tvm": {"kind": "vulkan"}}, "of kind 'vulkan'"),
        ({"link": phone.link.model_copy(update={"machine": "riscv64"})}, "is a riscv64 machine"),
        ({"tvm": {**phone.tvm, "mtriple": "x86_64-linux-gnu"}}, "its code is for x86_64-linux-gnu"),
    ]:
        with pytest.raises(DanceError, match=said):
            require_buildable(phone.model_copy(update=changes))
    require_buildable(load_target("snapdragon-gpu"), dtype="float16")
    with pytest.raises(DanceError, match="--static is for processors"):
        require_program(load_target("snapdragon-gpu"), "float32", prepared=False, static=True)


def test_random_weights_are_known_as_such():
    assert is_untrained("c3d", None)
    assert not is_untrained("c3d", Path("trained.safetensors"))
    assert not is_untrained("transnetv2", None)
    assert not is_untrained("dance-c3d-mini", None)
    assert not is_untrained("net.pt2", None)


def test_networks_of_several_trainings_go_to_places_of_their_own():
    target = load_target("snapdragon")
    places = [default_out(f"trained/{name}/model.pt2", target) for name in ("c3d-aap", "c3d-kgs")]
    assert [str(place) for place in places] == ["artifacts/c3d-aap-snapdragon", "artifacts/c3d-kgs-snapdragon"]
    assert str(default_out("c3d", target)) == "artifacts/c3d-snapdragon"


def test_a_device_that_is_not_the_target_is_not_measured_on():
    require_devices_of(load_target("host"), ["local", "emulator"][:1])
    require_devices_of(load_target("snapdragon"), ["rpc://127.0.0.1:9090", "emulator"])
    with pytest.raises(DanceError, match="this machine and not snapdragon"):
        require_devices_of(load_target("snapdragon"), ["local"])
    if load_target("host").link.machine != "aarch64":
        with pytest.raises(DanceError, match="aarch64 processor, which host is not"):
            require_devices_of(load_target("host"), ["emulator"])


def test_a_server_that_is_not_the_target_is_not_measured_on(tmp_path):
    from dance_tvm.device import processes
    from dance_tvm.tuning.farm import Farm
    from dance_tvm.tuning.libraries import require_processor

    server, port = processes.start_server(store=tmp_path / "store")
    try:
        with Farm([f"rpc://127.0.0.1:{port}"]) as farm:
            require_processor(farm, load_target("host"))
            here = load_target("host")
            link = here.link.model_copy(update={"machine": "riscv64"})
            with pytest.raises(DanceError, match="machine and host is riscv64: give a --device"):
                require_processor(farm, here.model_copy(update={"link": link}))
    finally:
        server.stop()


@pytest.mark.parametrize(("left", "said"), [("card.json", "a finished run"), ("checkpoint.safetensors", "not finish")])
def test_a_training_is_not_written_over(tmp_path, left, said):
    (tmp_path / left).write_text("{}")
    refused = CliRunner().invoke(train.app, ["--out", str(tmp_path)])
    assert isinstance(refused.exception, DanceError)
    assert said in str(refused.exception)
    assert "--overwrite" in str(refused.exception)
    train._require_place(tmp_path / "another", resume=False, overwrite=False)


def test_the_methods_of_training_are_all_offered():
    refused = CliRunner().invoke(train.app, ["--method", "none"]).exception
    assert all(f"'{method}'" in str(refused) for method in METHODS)


@pytest.mark.parametrize(
    ("amount", "said"),
    [("120%", "more than all"), ("1G", "MACs: give a share"), ("0.1%", "MACs: give a share"), ("some", "target_macs")],
)
def test_absurd_targets_of_training_are_refused(tmp_path, amount, said):
    words = ["--target-macs", amount, "--data", "motion-digits,train=8,test=8", "--out", str(tmp_path / "out")]
    refused = CliRunner().invoke(train.app, [*words, "--epochs", "1", "--batch", "4", "--threads", "1"])
    assert isinstance(refused.exception, DanceError), refused.exception
    assert said in str(refused.exception)


# -- tables -----------------------------------------------------------------------------------------------------------

HEADS = ["layer", "kernel", "ms"]
ROWS = [["backbone.stage.1.block.0.branch.conv", "conv3d_gather_io_f32_mr6_nr16", "12345.678"], ["b", "c", "1.5"]]


def test_a_table_for_programs_is_one_line_a_row_whatever_the_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    lines = printing.plain(HEADS, ROWS, "title").splitlines()
    assert lines[0] == "title"
    assert lines[1].split() == HEADS
    assert lines[2].split() == ROWS[0]
    assert lines[3].endswith(" 1.5")


def test_a_table_on_a_terminal_folds_texts_and_never_figures(monkeypatch):
    from rich.console import Console

    console = Console(width=60, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(printing.framed(HEADS, ROWS))
    shown = captured.get()
    assert "12345.678" in shown
    assert "…" not in shown
    assert "".join(re.findall(r"│ (\S+)", shown)).startswith("backbone")


def test_tables_of_one_command_have_one_form(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    short = printing.Table(["name", "ms"], [["conv1", "1.25"]])
    long = printing.Table(["figure"] * 6, [["123456789.5"] * 6])
    for width, framed in ((60, False), (200, True)):
        monkeypatch.setenv("COLUMNS", str(width))
        printing.print_tables([short, long])
        lines = capsys.readouterr().out.splitlines()
        assert any("conv1  1.25" in line for line in lines) != framed
        assert (max(map(len, lines)) > 60) == framed
        assert any(line.startswith(("┏", "+")) for line in lines) == framed


@pytest.mark.parametrize("words", [["targets", "--json"], ["--help"]])
def test_a_reader_that_leaves_is_no_error(words):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        line = [sys.executable, "-m", "dance_tvm", *words]
        done = subprocess.run(line, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_rows_go_on_in_further_lines_where_a_terminal_has_no_room_for_them(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    reason = "its masks leave out whole rows of the product, so that it goes along lists"
    layers = printing.Table(["layer", *["count"] * 4, "why"], [["stem", *["9,876.54"] * 4, reason]])
    facts = printing.Table(["", ""], [["processor", "x86_64, avx2 fma f16c sse4.2 and as many others again"]])
    printing.print_tables([layers, facts])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 40
    assert reason in " ".join(shown.split())
    assert " ".join(shown.split()).startswith("stem count 9,876.54 count 9,876.54")
    assert shown.rstrip().endswith("again")


def test_a_terminal_too_narrow_for_the_figures_gets_plain_lines(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    printing.print_table(HEADS, ROWS)
    assert "12345.678" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["targets"], ["logs", "best"]])
def test_piped_output_is_the_same_at_any_width(words):
    narrow, wide = (command(*words, env={**os.environ, "COLUMNS": width}).stdout for width in ("40", "400"))
    assert narrow == wide
    assert "…" not in narrow


# -- logs -------------------------------------------------------------------------------------------------------------


def record(seconds: float, times: list[float] | None = None, **rest):
    from dance_tvm.schedules.geometry import Window
    from dance_tvm.schedules.workload import Workload

    work = Workload(Window(1, (4, 4, 4), (4, 4, 4), (1, 1, 1)), rest.pop("channels", 8), 8, threads=1)
    about = {"status": "verified", "origin": "local", "trials": 3, "default_seconds": 0.5, **rest}
    return new_record(work, load_target("host"), {"mr": 1}, times or [seconds], **about)


def test_times_and_instructions_stand_in_tables_of_their_own(own_logs):
    path = log_path(load_target("host"))
    append(path, [record(0.25), record(2e6, channels=16, unit="emulated instructions", origin="emulator")])
    shown = CliRunner().invoke(logs.app, ["best"]).stdout
    times, instructions = shown.split("M instructions")
    assert " ms " in times
    assert "250.000" in times
    assert " ms " not in instructions
    assert "2.000" in instructions


def test_torn_lines_are_named_by_merge(tmp_path):
    torn, into = tmp_path / "torn.jsonl", tmp_path / "into.jsonl"
    torn.write_bytes(record(0.25).line() + record(0.125, channels=16).line()[:50] + b"\n")
    done = CliRunner().invoke(logs.app, ["merge", str(into), str(torn)])
    assert done.exit_code == 0
    assert "into.jsonl: 1 record, 1 line left out" in done.output
    assert "torn.jsonl, line 2: it is torn or not JSON; left out" in done.output


def test_merge_overwrites_no_file_that_is_no_log_and_broken_logs_are_named(tmp_path):
    notes, good = tmp_path / "notes.md", tmp_path / "host.conv3d_gather.jsonl"
    notes.write_text("# What I found\n")
    good.write_bytes(record(0.25).line())
    done = CliRunner().invoke(logs.app, ["merge", str(notes), str(good)])
    assert "has no record: name the log to write first" in str(done.exception)
    assert notes.read_text() == "# What I found\n"
    for command in ("show", "best"):
        assert f"{notes}: 1 of its lines are no records" in CliRunner().invoke(logs.app, [command, str(notes)]).output
        assert "250.000" in CliRunner().invoke(logs.app, [command, str(tmp_path)]).output
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "there are no tuning logs in" in str(CliRunner().invoke(logs.app, ["check", str(empty)]).exception)


def test_times_that_disagree_are_not_followed(own_logs):
    from dance_tvm.records.advice import tuned_tiles

    target = load_target("host")
    wild = record(0.3, times=[0.1, 0.2, 0.3, 1.4, 1.5])
    outlier = record(0.3, times=[0.29, 0.3, 0.3, 0.31, 3.0], channels=16)
    assert not wild.steady
    assert outlier.steady
    append(log_path(target), [wild, outlier])
    assert [found.seconds for _, found in tuned_tiles(target).records] == [0.3]
    assert tuned_tiles(target).records[0][0].channels_in == 16


def merge_again(into: Path, source: Path) -> None:
    for _ in range(20):
        CliRunner().invoke(logs.app, ["merge", str(into), str(source)])


def test_a_merge_loses_nothing_that_a_tuner_appends_meanwhile(tmp_path):
    import multiprocessing

    into, source = tmp_path / "into.jsonl", tmp_path / "source.jsonl"
    append(source, [record(0.25, channels=1000)])
    other = multiprocessing.get_context("fork").Process(target=merge_again, args=(into, source))
    other.start()
    for channels in range(1, 101):
        append(into, [record(0.25, channels=channels)])
    other.join()
    merge_again(into, source)
    kept = [parse_loosely(line) for line in into.read_bytes().splitlines()]
    assert sorted(found.shape.channels_in for found in kept) == [*range(1, 101), 1000]


def test_logs_lie_in_the_project_or_with_the_user(tmp_path, monkeypatch):
    from dance_tvm.records import places

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert places.own_logs() == tmp_path / "data/dance_tvm/tuning_logs"
    assert places.log_folders() == [tmp_path / "data/dance_tvm/tuning_logs", places.SHIPPED]
    (tmp_path / "tuning_logs").mkdir()
    assert places.own_logs() == tmp_path / "tuning_logs"
    assert places.log_folders(tmp_path / "mine") == [tmp_path / "mine"]
    append(log_path(load_target("host")), [record(0.25)])
    assert [path.parent for path in tmp_path.rglob("*.jsonl")] == [tmp_path / "tuning_logs"]


# -- what is said -----------------------------------------------------------------------------------------------------


@pytest.fixture
def usual():
    yield
    verbosity._level = 0


def test_quiet_verbose_and_lines(capsys, usual):
    with Progress() as progress:
        progress.phase("import")
    assert capsys.readouterr().err == "✓ import\n"
    verbosity.set_level(1, False)
    with Progress() as progress:
        progress.phase("import")
    assert re.fullmatch(r"✓ import \d+\.\d s\n", capsys.readouterr().err)
    verbosity.set_level(0, True)
    with Progress() as progress:
        progress.phase("import")
    assert capsys.readouterr() == ("", "")
    with Progress(lines=True) as progress:
        progress.phase("import")
        progress.tell("batch", "eight trials", trials=8)
        progress.result({"trials": 8})
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["phase", "batch", "result"]
    assert (events[0]["name"], events[1]["trials"], events[2]["result"]) == ("import", 8, {"trials": 8})


def test_a_warning_is_not_for_the_quiet_and_a_traceback_for_the_curious(capsys, usual):
    app = cli.application()

    @app.command()
    def fail() -> None:
        sys.stderr.write(warnings.formatwarning("the figures may mislead", DanceWarning, "here.py", 1))
        raise DanceError("do this")

    said = {}
    for words in ([], ["-q"], ["-vv"]):
        verbosity._level = 0
        with pytest.raises(SystemExit):
            cli.start(app, "fail", words)
        said["".join(words)] = capsys.readouterr().err
    assert "warning: the figures may mislead\n" in said[""]
    assert said["-q"] == "error: do this\n"
    assert "Traceback" in said["-vv"]
    assert "Traceback" not in said[""]


def test_training_into_a_pipe_is_heard_epoch_by_epoch(tmp_path):
    words = ["train", "--method", "dense", "--model", "resnet-mini", "--data", "motion-digits,train=8,test=8"]
    words += ["--out", str(tmp_path / "out"), "--epochs", "2", "--batch", "4", "--threads", "1", "--no-export"]
    line = [sys.executable, "-m", "dance_tvm", *words, "--json-lines"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        first = json.loads(process.stdout.readline())
        assert process.poll() is None, "the first epoch is told when the run is over"
        rest = [json.loads(each) for each in process.stdout]
    assert (first["event"], first["epoch"]) == ("epoch", 0)
    assert [event["event"] for event in rest] == ["epoch", "result"]
    assert "accuracy" in first


# -- completion, cache ------------------------------------------------------------------------------------------------


def test_bash_completes_commands_and_their_options(tmp_path):
    script = tmp_path / "dance-tvm.bash"
    script.write_text(CliRunner().invoke(completion.app, ["bash"]).stdout)

    def offered(*words: str) -> set[str]:
        line = f"source {script}; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _dance_tvm; "
        done = subprocess.run(["bash", "-c", line + 'printf "%s\\n" "${COMPREPLY[@]}"'], capture_output=True, text=True)
        assert not done.stderr
        return set(done.stdout.split())

    assert offered("dance-tvm", "b") == {"build", "bench"}
    assert "merge" in offered("dance-tvm", "logs", "m")
    assert {"--check", "--no-check"} <= offered("dance-tvm", "build", "--model", "c3d", "--")
    assert offered("dance-tvm", "logs", "merge", "--b") == {"--best"}


def test_what_is_kept_is_listed_and_cleared(tmp_path, monkeypatch):
    monkeypatch.setenv("DANCE_TVM_CACHE", str(tmp_path))
    (tmp_path / "emulator-12" / "root").mkdir(parents=True)
    (tmp_path / "emulator-12" / "root" / "libc").write_bytes(b"x" * 2**20)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "ab.o").write_bytes(b"x" * 10)
    (tmp_path / "networks-1.0").mkdir()
    (tmp_path / "emulator-12.lock").touch()
    found = json.loads(CliRunner().invoke(cache.app, ["list", "--json"]).stdout)
    assert [(entry["name"], entry["bytes"]) for entry in found["entries"]] == [
        ("emulator-12", 2**20), ("kernels", 10), ("networks-1.0", 0),
    ]  # fmt: skip
    assert [entry["kind"] for entry in found["entries"][:2]] == ["emulated device", "compiled kernels"]
    unknown = CliRunner().invoke(cache.app, ["clear", "emulator-13"])
    assert "holds no emulator-13" in str(unknown.exception)
    assert "1 removed, 1.0 MiB" in CliRunner().invoke(cache.app, ["clear", "emulator-12"]).stdout
    assert "1 removed, 0.0 MiB" in CliRunner().invoke(cache.app, ["clear", "kernels"]).stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emulator-12.lock", "networks-1.0"]
    CliRunner().invoke(cache.app, ["clear"])
    assert CliRunner().invoke(cache.app, ["list"]).stdout.startswith("nothing is kept in ")


def test_the_emulated_device_moves_with_the_cache(tmp_path, monkeypatch):
    from dance_tvm.device import emulator

    monkeypatch.setenv("DANCE_TVM_CACHE", str(tmp_path))
    assert emulator._folder().parent == tmp_path


# -- artifacts --------------------------------------------------------------------------------------------------------


def test_an_artifact_is_looked_at_without_tvm(host_artifact, tmp_path):
    shown = command("show", str(host_artifact.path))
    assert (shown.returncode, shown.heavy) == (0, [])
    foreign = matmul_artifact(tmp_path / "foreign", "aarch64-linux" if host.platform.machine() == "x86_64" else "cuda")
    refused = command("run", str(foreign.path))
    assert (refused.returncode, refused.heavy) == (2, [])
    assert "this device is" in refused.said


def test_an_artifact_is_shown(tmp_path):
    artifact = video_artifact(tmp_path / "video")
    shown = CliRunner().invoke(show.app, [str(artifact.path)]).stdout
    assert "1x3x8x16x16" in shown
    for layer in artifact.manifest.layers:
        assert layer.kernel in shown
    assert artifact.manifest.seal in shown
    facts = json.loads(CliRunner().invoke(show.app, [str(artifact.path), "--json"]).stdout)
    assert facts["macs"] == artifact.manifest.macs
    (artifact.path / "model.so").write_bytes(b"damaged")
    assert "is damaged" in str(CliRunner().invoke(show.app, [str(artifact.path)]).exception)


def test_the_highest_scores_are_named(host_artifact, tmp_path):
    inputs, expected = matmul_case(1)
    np.savez(tmp_path / "x.npz", x=inputs["x"])
    labels = tmp_path / "labels.txt"
    labels.write_text("run\njump\nsit\nfall\n")
    words = [str(host_artifact.path), "--inputs", str(tmp_path / "x.npz")]
    refused = CliRunner().invoke(run.app, [*words, "--labels", str(labels)])
    assert "--labels names 4 classes" in str(refused.exception)
    told = json.loads(CliRunner().invoke(run.app, [*words, "--json"]).stdout)
    assert told["top"] == []
    assert told["seconds"] > 0
    assert told["outputs"]["y"]["greatest"] == expected.max()
    scores = np.array([[1.0, 4.0, 2.0, 3.0]])
    tensor = host_artifact.manifest.outputs[0].model_copy(update={"shape": [1, 4]})
    manifest = host_artifact.manifest.model_copy(update={"outputs": [tensor]})
    best = run._top({"y": scores}, manifest, labels.read_text().split(), 2)
    assert [(each["class"], each["label"], each["score"]) for each in best] == [(1, "jump", 4.0), (3, "fall", 3.0)]
    assert CONSTANT.shape[1] == 4


def test_nan_is_counted_and_no_class_is_the_highest_of_it(host_artifact):
    scores = np.array([[1.0, np.nan]], "float32")
    with pytest.warns(DanceWarning, match="clip: 1 of the 2 values of y are NaN: look at the inputs"):
        run.warn_of_nan([("clip", {"y": scores, "at": np.zeros(3, "int64")}, 0.1)])
    tensor = host_artifact.manifest.outputs[0].model_copy(update={"shape": [1, 2]})
    manifest = host_artifact.manifest.model_copy(update={"outputs": [tensor]})
    shown = run._facts("local", [("clip", {"y": scores}, 0.1)], manifest, ["run", "jump"], 2)
    assert "NaN" not in json.dumps(shown)
    assert (shown["top"], shown["outputs"]["y"]["not_finite"], shown["outputs"]["y"]["greatest"]) == ([], 1, 1.0)


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    """20 frames of 32 x 32, the n-th of brightness 10 n."""
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("film") / "film.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("ffv1", rate=25)
        video.width = video.height = 32
        video.pix_fmt = "bgr0"
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * number, "uint8"), format="rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode())
    return path


def test_a_video_runs_window_by_window_as_it_is_to_be_prepared(film, tmp_path):
    artifact = video_artifact(tmp_path / "video", dynamic=False)
    prepare = tmp_path / "preprocess.toml"
    prepare.write_text("resize = [24, 24]\nmean = [0.5, 0.5, 0.5]\ndeviation = [0.25, 0.25, 0.25]\nevery = 2\n")
    windows = windows_of(film, artifact.manifest, 1, read_preprocess(prepare))
    assert [name for name, _ in windows] == ["film 0-8", "film 1-9", "film 2-10"]
    means = [arrays["clip"][0, 1].mean((1, 2)) for _, arrays in windows]
    loaded = LoadedNetwork.windows(SimpleNamespace(manifest=artifact.manifest), film, 1, read_preprocess(prepare))
    np.testing.assert_array_equal([each["clip"] for each in loaded], [arrays["clip"] for _, arrays in windows])
    for start, found in enumerate(means):
        expected = [(20 * (start + frame) / 255 - 0.5) / 0.25 for frame in range(8)]
        assert found == pytest.approx(expected, abs=0.05)
    done = CliRunner().invoke(
        run.app, [str(artifact.path), "--video", str(film), "--stride", "8", "--preprocess", str(prepare), "--json"]
    )
    assert json.loads(done.stdout)["name"] == "film 0-8", done.exception
    second = film.with_name("second.mkv")
    second.write_bytes(film.read_bytes())
    many = [str(artifact.path), "--video", str(film.parent), "--preprocess", str(prepare), "--json"]
    done = CliRunner().invoke(run.app, many)
    assert [each["name"] for each in json.loads(done.stdout)["runs"]] == ["film 0-8", "second 0-8"]
    second.unlink()
    done = CliRunner().invoke(run.app, [str(artifact.path), "--video", str(tmp_path)])
    assert "holds no video" in str(done.exception)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    image = pytest.importorskip("PIL.Image")
    for number in range(9):
        image.new("RGB", (16, 16), (number, number, number)).save(pictures / f"{number:03}.png")
    (window,) = windows_of(pictures, artifact.manifest, None, read_preprocess(prepare).model_copy(
        update={"resize": None, "every": 1, "divisor": 1.0, "mean": (0.0,), "deviation": (1.0,)}))  # fmt: skip
    assert window[1]["clip"][0, 0].mean((1, 2)).tolist() == list(range(8))
    prepare.write_text("resise = [24, 24]\n")
    with pytest.raises(DanceError, match="the fields are resize, divisor"):
        read_preprocess(prepare)
    for wrong, said in [
        ("mean = [0.4, 0.4]", "mean: 2 numbers for frames of three colours: give three, or one for all"),
        ("deviation = [0.2, 0.0, 0.2]", "deviation: is divided by: give numbers above zero"),
        ("mean = [nan]", "finite number"),
    ]:
        prepare.write_text(wrong)
        with pytest.raises(DanceError, match=said):
            read_preprocess(prepare)


def test_bytes_stay_bytes_for_an_input_of_whole_numbers(film, tmp_path):
    artifact = video_artifact(tmp_path / "video", dynamic=False)
    tensor = artifact.manifest.inputs[0]

    def taking(dtype, channels=3):
        changed = tensor.model_copy(update={"dtype": dtype, "shape": [1, channels, 8, 16, 16]})
        return artifact.manifest.model_copy(update={"inputs": [changed]})

    faster = Preprocess(every=2)
    for dtype in ("uint8", "int32"):
        for channels in (1, 3):
            (_, inputs), *_ = windows_of(film, taking(dtype, channels), 1, faster)
            assert inputs["clip"].dtype == dtype
            assert inputs["clip"][0, 0].mean((1, 2)) == pytest.approx([20 * frame for frame in range(8)], abs=1)
        with pytest.raises(DanceError, match="and the network scales them: leave divisor, mean and deviation out"):
            windows_of(film, taking(dtype), 1, Preprocess(mean=(0.5,)))
    with pytest.raises(DanceError, match="is int8, which cannot hold the bytes of a video's frames"):
        windows_of(film, taking("int8"), 1, faster)


def test_a_build_refuses_a_scale_for_bytes(tmp_path):
    class Scaled(torch.nn.Module):
        def forward(self, clip):
            return clip / 255

    clip = torch.zeros(1, 3, 2, 8, 8, dtype=torch.uint8)
    for preprocess, said in [
        (Preprocess(deviation=(0.5,)), "the network scales them"),
        (Preprocess(resize=(4, 9)), "are smaller than the input's"),
    ]:
        with pytest.raises(DanceError, match=said):
            build_network(Scaled(), tmp_path / "out", example_inputs=(clip,), check=False, preprocess=preprocess)
    flow = torch.zeros(1, 5, 2, 8, 8)
    with pytest.raises(DanceError, match="input clip has 5 channels, and frames of a video have 3, or 1 in grey"):
        build_network(Scaled(), tmp_path / "out", example_inputs=(flow,), check=False, preprocess=Preprocess())
    assert not (tmp_path / "out").exists()


def test_a_batch_is_the_first_dimension_where_it_is_open():
    declared = {"clip": ["N", 3, 8], "more": [2, 5], "flag": []}
    assert require_shape(declared, {}, 2) == {"clip": (2, 3, 8), "more": (2, 5), "flag": ()}
    assert require_shape(declared, {"clip": (7, 3, 8)}, 2)["clip"] == (7, 3, 8)
    with pytest.raises(DanceError, match="fixed to a batch of 2: export the network with an open batch"):
        require_shape(declared, {}, 4)


def test_an_artifact_says_how_its_videos_are_prepared(small_network, tmp_path):
    prepare, out = tmp_path / "preprocess.toml", tmp_path / "out"
    prepare.write_text("divisor = 1.0\nmean = [9.0]\nevery = 3\n")
    words = ["--model", str(small_network), "--out", str(out), "--threads", "1", "--no-check"]
    assert CliRunner().invoke(build.app, words).exit_code == 0
    assert load_artifact(out).manifest.preprocess is None
    assert CliRunner().invoke(build.app, [*words, "--preprocess", str(prepare)]).exit_code == 0
    manifest = load_artifact(out).manifest
    assert manifest.preprocess == read_preprocess(prepare)
    assert "every 3" in CliRunner().invoke(show.app, [str(out)]).stdout
    assert not doubt_of_scale("film.mkv", manifest)
    for name in names():
        found = known_preprocess(name)
        assert found is None or len(found.mean) in (1, 3)
    assert known_preprocess("c3d").divisor == 1
    assert known_preprocess("c3d.pt2") is None


def test_a_network_that_is_no_stream_is_refused_by_stream(host_artifact):
    refused = CliRunner().invoke(stream.app, [str(host_artifact.path), "--random", "2"])
    assert "is not a streaming network" in str(refused.exception)
    assert "give --frames FILE or --random COUNT" in str(
        CliRunner().invoke(stream.app, [str(host_artifact.path)]).exception
    )


def test_every_command_shows_examples():
    for name, (module, _) in cli.COMMANDS.items():
        import importlib

        import typer

        top = typer.main.get_command(importlib.import_module(module).app)
        for each in getattr(top, "commands", {name: top}).values():
            assert each.epilog, name
            assert each.epilog.startswith("Examples:")


@pytest.fixture(scope="module")
def small_network(tmp_path_factory) -> Path:
    """One convolution as a program."""
    import torch

    path = tmp_path_factory.mktemp("small") / "small.pt2"
    example = (torch.zeros(1, 3, 3, 6, 6),)
    torch.export.save(torch.export.export(torch.nn.Conv3d(3, 4, 3, padding=1).eval(), example), path)
    return path


def test_what_is_built_already_is_kept_until_something_changes(small_network, tmp_path, own_logs):
    out = tmp_path / "out"

    def built(*words: str) -> str:
        line = ["--model", str(small_network), "--out", str(out), "--threads", "1", "--no-check", *words]
        done = CliRunner().invoke(build.app, line)
        assert done.exit_code == 0, done.exception
        assert done.stdout.splitlines()[-1] == f"next: dance-tvm run {out} && dance-tvm bench {out}"
        return "kept" if "kept: nothing" in done.stdout else "built"

    lab = tmp_path / "lab"
    lab.mkdir()
    assert [built(), built(), built("--no-reuse"), built("--conv", "direct")] == ["built", "kept", "built", "built"]
    assert [built("--conv", "direct"), built("--conv", "direct", "--logs", str(lab))] == ["kept", "kept"]
    append(lab / log_path(load_target("host")).name, [record(0.25)])
    assert built("--conv", "direct", "--logs", str(lab)) == "built"
    lines = CliRunner().invoke(build.app, ["--model", str(small_network), "--out", str(out), "--json-lines"])
    events = [json.loads(line) for line in lines.stdout.splitlines()]
    assert {event["event"] for event in events[:-1]} == {"phase"}
    assert events[-1]["result"]["artifact"] == str(out)
    assert "there is no folder of tuning logs" in str(
        CliRunner().invoke(build.app, ["--logs", str(tmp_path / "none")]).exception
    )


def test_random_weights_and_threads_without_cores_are_told(tmp_path, monkeypatch, recwarn):
    from dance_tvm.compiler import build as compiler

    class BegunError(Exception):
        """The build begins, all warnings before it."""

    def begin(*_arguments, **_options):
        raise BegunError

    monkeypatch.setattr(compiler, "build_network", begin)
    words = ["--model", "c3d", "--out", str(tmp_path), "--target", "snapdragon", "--threads", "9"]
    with pytest.raises(BegunError):
        CliRunner().invoke(build.app, words, catch_exceptions=False)
    assert [str(one.message) for one in recwarn if one.category is DanceWarning] == [
        "--threads 9 is more than the 8 cores of snapdragon: they will wait for one another",
        "c3d is built with random weights: give trained ones with --weights, or train it first",
    ]
    old = load_target("host").model_copy(update={"tuning_log": "host-x86-64-sse"})
    with pytest.warns(DanceWarning, match="this processor has no AVX2: kernels for it use SSE"):
        build._warn(old, "dance-c3d-mini", None, None)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"after": 1.0}, ""),
        ({"trials": 0}, "no trial was made"),
        ({"best_decisions": {}, "failures": 1}, "1 trial failed, and none ran"),
        ({"unverified": "the times differ too much"}, "the times differ too much"),
        ({}, "the run ended before"),
    ],
)
def test_why_a_layer_is_not_verified_is_told(state, said):
    usual = {"after": 0.0, "trials": 3, "best_decisions": {"mr": 1}, "failures": 0, "unverified": ""}
    assert tune._why_unverified(SimpleNamespace(lost=""), SimpleNamespace(**{**usual, **state})) == said


@pytest.mark.parametrize(
    ("words", "begun"),
    [
        (["export", "c3d-mini", "--out", "net.pt2"], "load PyTorch"),
        (["groups", "--layers", "1", "--group", "16x4", "--logs", "logs"], "dense"),
        (["run", "net", "--device", "emulator", "--outputs", "out.npz"], "opening"),
    ],
)
def test_ctrl_c_ends_long_commands_with_130_and_nothing_written(words, begun, tmp_path, own_logs):
    if words[0] == "run":
        if reason := why_no_emulator():
            pytest.skip(reason)
        network, clip = torch.nn.Conv3d(16, 32, 3), torch.ones(1, 16, 16, 56, 56)  # seconds on the emulated device
        build_network(network, tmp_path / "net", target="aarch64-linux", example_inputs=(clip,), check=False)

    def files() -> list[Path]:
        return [each for each in sorted(tmp_path.rglob("*")) if each.is_file() and ".lock" not in each.name]

    before = files()
    line = [sys.executable, "-m", "dance_tvm", *words]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        while begun not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors.splitlines()[-1]) == (130, "", "error: interrupted")
    assert "Traceback" not in errors
    assert files() == before
