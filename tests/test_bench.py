"""Bench: right before fast, in turns, by clip, by layer, with a verdict that noise does not sway."""

from __future__ import annotations

import json
import shutil
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
import tvm
from counting import counted_alike
from devices import video_artifact
from typer.testing import CliRunner

from dance_tvm import bench, models
from dance_tvm.artifact.folder import REFERENCE, _describe, _write_manifest, load_artifact
from dance_tvm.artifact.layers import KernelInfo, LayerInfo
from dance_tvm.artifact.video_windows import AS_TRAINED, UP_TO_ONE, doubt_of_scale
from dance_tvm.benchmarking import peers, sensing, statistics
from dance_tvm.benchmarking.accuracy import accuracy, read_classes
from dance_tvm.benchmarking.campaign import Plan, run
from dance_tvm.benchmarking.clips import frames_of, load_clips
from dance_tvm.benchmarking.layers import OTHER, PLANNING, profile
from dance_tvm.benchmarking.loading import measure_loading
from dance_tvm.benchmarking.measure import Contender, in_turns, single_stream
from dance_tvm.benchmarking.peers import require_peers
from dance_tvm.benchmarking.results import read_results, write_results
from dance_tvm.benchmarking.validation import validate
from dance_tvm.core.errors import DanceError, DanceWarning
from dance_tvm.core.random_inputs import random_inputs
from dance_tvm.device import KernelTime, open_device, serve
from dance_tvm.machines.target import Energy, load_target
from dance_tvm.schedules.cpu.conv3d_line import LineConv
from dance_tvm.schedules.cpu.row_tiles import RowTile
from dance_tvm.schedules.geometry import Window


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    return with_reference(video_artifact(tmp_path_factory.mktemp("bench") / "sparse"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return with_reference(video_artifact(tmp_path_factory.mktemp("bench") / "dense", dynamic=False))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Clips whose first 2, 4, 6 frames are bright and the others dark."""
    path = tmp_path_factory.mktemp("clips") / "clips.npz"
    values = np.abs(np.random.default_rng(0).integers(1, 4, (3, 3, 8, 16, 16))).astype("float32")
    for index, alive in enumerate((2, 4, 6)):
        values[index, :, alive:] *= -1
    np.savez(path, bright=values)
    return path


def with_reference(artifact):
    """The artifact as `build` leaves it: with the outputs to compare with, from a NumPy-exact run."""
    inputs = random_inputs(artifact.manifest.inputs)
    with open_device("local") as device:
        network = device.load(artifact)
        calls = network.kernels(inputs, repeats=0)
        outputs = network.run(inputs)
    return store_reference(artifact, outputs["y"], np.array([[call.mean or 0, call.mean_size or 0] for call in calls]))


def store_reference(artifact, output, kernels):
    from safetensors.numpy import save_file

    save_file({"output:y": output, "kernels": kernels}, artifact.path / REFERENCE)
    files = {**artifact.manifest.files, REFERENCE: _describe(artifact.path / REFERENCE)}
    _write_manifest(artifact.path, artifact.manifest.model_copy(update={"files": files}))
    return load_artifact(artifact.path)


def test_everything_of_a_dynamic_network(sparse, dense, clips, tmp_path):
    plan = Plan([sparse.path], dense.path, runs=20, seconds=0.1, clips=str(clips))
    results = run(plan)
    ours, theirs = results.devices[0].measured
    assert (ours.role, theirs.role) == ("sparse", "dense")
    assert ours.validation.status == "passed"
    assert ours.latency.runs >= 20
    assert ours.latency.p50 <= ours.latency.p90 <= ours.latency.p99
    assert [clip.name for clip in ours.clips] == ["bright[0]", "bright[1]", "bright[2]"]
    assert [clip.kept for clip in ours.clips] == sorted(clip.kept for clip in ours.clips)
    # Two of eight frames live: the first layer computes them alone, from frames 0 to 2, without padded taps.
    first, second = ours.profile.layers[:2]
    rows = (3 * 16 - 2) ** 2
    assert first.executed_macs == (2 + 3) * rows * 3 * 8
    assert second.executed_macs == 2 * rows * 8 * 8
    assert (first.kept_frames, first.kept_positions, second.kept_frames) == (0.25, 0.25, 1.0)
    assert theirs.profile.layers[0].executed_macs == 22 * rows * 3 * 8
    (pair,) = results.pairs
    assert pair.mac_reduction == pytest.approx((22 * 24 + 8 * 64) / (5 * 24 + 2 * 64))
    assert pair.low <= pair.speed_up <= pair.high
    assert pair.speed_up > 1
    gains = [his.p50 / our.p50 for our, his in zip(ours.clips, theirs.clips, strict=True)]
    assert (pair.over_clips.count, pair.over_clips.least, pair.over_clips.most) == (3, min(gains), max(gains))
    assert 1 < pair.over_clips.mac_reduction < pair.mac_reduction  # the first clip keeps the least
    assert ours.energy.kind == "estimate" or "RAPL" in ours.energy.source
    assert ours.frames == 8
    write_results(tmp_path / "r.json", results)
    assert read_results(tmp_path / "r.json") == results


def test_every_frame_of_a_winograd_tile_counts_as_computed():
    """Two tiles of four frames at 16 places, the second one's at the first place left out: frames 4 to 7 lack it."""
    rows = np.array([row for row in range(32) if row != 16] + [-1], "int32")
    lists = {
        "tap_entries": np.zeros((1, 2), "int32"),
        "columns": np.arange(16, dtype="int32")[None],
        "rows_out": rows.reshape(1, 4, 8),
        "runs": np.array([[[0, 1, 0, 4, 0]]], "int32"),
        "counts": np.array([[32, 4, 1], [1, 0, 0]], "int32"),
    }
    tensors = {name: tvm.runtime.tensor(array) for name, array in lists.items()}
    kernel = {"tile": [4, 4, 4], "by_frame": False}
    by_tap, alive = serve._winograd_rows(tensors, kernel, [1, 8, 16, 16, 8])
    assert by_tap.tolist() == [[31]]
    assert alive[0, :4].all()
    assert alive[0, 4:].sum() == 4 * (16 * 16 - 4 * 4)
    assert not alive[0, 4:, :4, :4].any()


def test_frames_are_clips_of_winograds_lists_where_the_kernel_says_so():
    """Two frames of one place each; the chunk has room for more columns than both have."""
    kept = {
        False: {"columns": [[0] * 8], "rows_out": [0, 8, -1, -1]},  # one column, its second frame a row further
        True: {"columns": [[0, 1, *[0] * 6]], "rows_out": [0, 1, -1, -1]},  # a column each
    }
    for by_frame, lists in kept.items():
        arrays = {
            "tap_entries": np.zeros((1, 2), "int32"),
            "columns": np.array(lists["columns"], "int32"),
            "rows_out": np.array(lists["rows_out"], "int32").reshape(1, 1, 4),
            "runs": np.array([[[0, 1, 0, 1, 0]]], "int32"),
            "counts": np.array([[2, 1, 1], [1, 0, 0]], "int32"),
        }
        tensors = {name: tvm.runtime.tensor(array) for name, array in arrays.items()}
        kernel = {"tile": [1, 4, 4], "by_frame": by_frame}
        by_tap, alive = serve._winograd_rows(tensors, kernel, [1, 2, 4, 4, 8])
        assert by_tap.tolist() == [[2]]
        assert alive.all()


def test_clips_with_channels_of_their_own_are_counted_though_nothing_of_the_last_one_is_alive():
    lists = {
        "tap_entries": np.zeros((1, 2), "int32"),
        "columns": np.array([[0, 1, 0]], "int32"),
        "rows_out": np.array([[[0, -1], [1, -1]]], "int32"),
        "runs": np.array([[[0, 1, 0, 1, 0], [0, 1, 1, 2, 1], [0, 0, 0, 0, 0]]], "int32"),
        "counts": np.array([[2, 2, 2], [1, 0, 0]], "int32"),
        "in_channels": np.array([[8, *range(8)], [4, *range(8)], [8, *range(8)]], "int32"),
    }
    named = {name: tvm.runtime.tensor(array) for name, array in lists.items()}
    for name, shape in {"x": (3, 1, 4, 4, 8), "y": (3, 1, 4, 4, 4), "weights": (36, 1, 1, 8, 4)}.items():
        named[name] = tvm.runtime.tensor(np.zeros(shape, "float32"))
    work, alive, _ = serve.executed({"tile": [1, 4, 4], "by_frame": False}, named)
    assert work["share"] == pytest.approx((8 + 4) / (3 * 8))
    assert alive.any((1, 2, 3)).tolist() == [True, True, False]


def test_what_masks_leave_of_a_convolution_without_lists_is_counted():
    window = Window(2, (5, 7, 9), (3, 7, 5), (3, 3, 5), stride=(2, 1, 2), padding=(1, 1, 2))
    conv = LineConv(window, 3, 6, RowTile(4, 1, 8, 1), out_frames=True, positions=(1, 3))
    seed = np.random.default_rng(4)
    masks = {
        "out_frames": np.array([[1, 0, 1], [0, 0, 0.5]], "float32"),
        "positions": (seed.random((1, 3, *window.out[1:])) < 0.4).astype("float32"),
    }
    shapes = {each.name: each.shape for each in conv.operands()}
    named = {name: tvm.runtime.tensor(masks.get(name, np.zeros(shape, "float32"))) for name, shape in shapes.items()}
    work, alive, channels = serve.executed(conv.describe(), named)
    wanted = (masks["out_frames"][:, :, None, None] != 0) & (masks["positions"] != 0)
    pairs = torch.conv3d(torch.ones(2, 1, 5, 7, 9), torch.ones(1, 1, 3, 3, 5), stride=(2, 1, 2), padding=(1, 1, 2))[
        :, 0
    ]
    assert np.array_equal(alive, wanted)
    assert channels is None
    assert work["macs"] == int(pairs.numpy()[wanted].sum()) * 3 * 6
    assert work["frames"] == 0.5
    assert work["share"] == pytest.approx(work["macs"] / (wanted.size * 45 * 18))


def test_winograd_and_kernel_groups_are_counted(tmp_path):
    """Frames 0 and 1 live: 2 + 3 of 8 x 3 pairs of frame and tap in the first layer, 2 of 8 frames in the second."""
    clip = np.ones((1, 3, 8, 16, 16), "float32")
    clip[:, :, 2:] = -1
    shares = {}
    for name, artifact in {
        "winograd": video_artifact(tmp_path / "winograd", conv="winograd"),
        "groups": video_artifact(tmp_path / "groups", groups=5),
    }.items():
        with open_device("local") as device:
            calls = [call for call in device.load(artifact).kernels({"clip": clip}, repeats=0) if call.work]
        assert len(counted_alike(artifact, {"clip": clip})) == 2
        shares[name] = [(call.symbol, call.work) for call in calls]
    (first, work), (second, last) = shares["winograd"]
    assert "winograd" in first
    assert "winograd" in second
    assert (work["share"], last["share"]) == (pytest.approx(5 / 24), pytest.approx(2 / 8))
    assert (work["positions"], work["frames"]) == (0.25, 0.25)
    symbol, work = shares["groups"][1]
    assert "kgs" in symbol
    per_tap = (np.arange(72) % 5 == 0).astype(int).reshape(8, 3, 3)
    rows = np.array([[15 * 15, 15 * 16, 15 * 15], [16 * 15, 16 * 16, 16 * 15], [15 * 15, 15 * 16, 15 * 15]])
    assert work["macs"] == 2 * int((per_tap.sum(0) * rows).sum()) * 8


@pytest.mark.device
def test_the_emulated_device(emulator, tmp_path, clips):
    artifact = video_artifact(tmp_path / "arm", "aarch64-linux")
    results = run(Plan([artifact.path], devices=[emulator.tracker], runs=2, seconds=0.0, clips=str(clips)))
    (measured,) = results.devices[0].measured
    assert results.devices[0].facts["machine"] == "aarch64"
    assert measured.profile.layers[0].executed_macs == 5 * (3 * 16 - 2) ** 2 * 24
    assert measured.validation.status == "not stored"
    assert any("no outputs to compare" in note for note in measured.notes)


def test_a_wrong_result_gives_no_latency_and_names_the_layer(sparse, tmp_path):
    shutil.copytree(sparse.path, tmp_path / "wrong")
    reference = sparse.reference()
    kernels = reference["kernels"].copy()
    convolutions = [index for index, value in enumerate(kernels[:, 1]) if value > 3]
    kernels[convolutions[0] :, :] += 1
    artifact = store_reference(load_artifact(tmp_path / "wrong"), reference["output:y"] + 0.5, kernels)
    with open_device("local") as device, pytest.raises(DanceError) as raised:
        validate(artifact, device.load(artifact), "local")
    message = str(raised.value)
    share = 0.5 / np.abs(reference["output:y"] + 0.5).max()
    assert f"output y differs by {share:.3g} of its largest value" in message
    assert "first in layer " in message
    assert artifact.manifest.layers[0].name in message
    result = CliRunner().invoke(bench.app, [str(artifact.path), "--json"])
    assert isinstance(result.exception, DanceError)
    assert "p50" not in result.stdout


def test_against_a_baseline(sparse, dense, tmp_path):
    baseline, now = tmp_path / "old.json", tmp_path / "now.json"
    quick = ["--runs", "40", "--seconds", "0.2", "--no-layers", "--json"]
    runner = CliRunner()
    assert runner.invoke(bench.app, [str(sparse.path), *quick, "--out", str(baseline)]).exit_code == 0
    results = read_results(baseline)
    seconds = results.devices[0].measured[0].latency.seconds
    assert "masks may keep more or less of real clips" in " ".join(results.devices[0].measured[0].notes)

    def with_times(factor: float, **changes):
        latency = results.devices[0].measured[0].latency.model_copy(update={"seconds": [s * factor for s in seconds]})
        measured = results.devices[0].measured[0].model_copy(update={"latency": latency, **changes})
        device = results.devices[0].model_copy(update={"measured": [measured]})
        write_results(baseline, results.model_copy(update={"devices": [device]}))

    with_times(0.02)
    same = runner.invoke(bench.app, [str(sparse.path), *quick, "--against", str(baseline), "--out", str(now)])
    assert same.exit_code == 0
    verdict = read_results(now).verdicts[0]
    assert (verdict.verdict, verdict.identical) == ("same", True)
    assert verdict.ratio > 10
    gone = {"library_sha256": "0" * 64}
    with_times(0.02, **gone)
    slower = runner.invoke(bench.app, [str(sparse.path), *quick, "--against", str(baseline), "--out", str(now)])
    assert slower.exit_code == 3
    assert read_results(now).verdicts[0].verdict == "slower"
    with_times(50.0, **gone)
    faster = runner.invoke(bench.app, [str(sparse.path), *quick, "--against", str(baseline), "--out", str(now)])
    assert faster.exit_code == 0
    assert read_results(now).verdicts[0].verdict == "faster"
    other = runner.invoke(bench.app, [str(dense.path), *quick, "--against", str(baseline)])
    assert "nothing of these networks" in str(other.exception)
    for changes, said in [
        ({**gone, "threads": 4}, "threads 1 now, 4 then"),
        ({**gone, "target": "snapdragon"}, "target host now, snapdragon then"),
        ({**gone, "input": "film 0-8", "input_sha256": "1" * 64}, "on random input now, on film 0-8 then"),
        ({**gone, "name": "another"}, "network video now, another then"),
    ]:
        with_times(1.0, **changes)
        refused = runner.invoke(bench.app, [str(sparse.path), *quick, "--against", str(baseline)])
        assert said in str(refused.exception)


def test_only_a_twin_is_taken_for_the_dense_form(sparse, tmp_path):
    larger = video_artifact(tmp_path / "larger", dynamic=False, size=20)
    with pytest.raises(DanceError, match=r"not a dense form of .*: its inputs are float32 1x3x8x20x20 and not .*16x16"):
        run(Plan([sparse.path], larger.path))


def test_a_trace_tells_each_kernel_in_turn(sparse, tmp_path):
    path = tmp_path / "trace.json"
    done = CliRunner().invoke(bench.app, [str(sparse.path), "--runs=2", "--seconds=0", "--json", "--trace", str(path)])
    assert done.exit_code == 0, done.exception
    (name, *events) = json.loads(path.read_text())["traceEvents"]
    assert "random input" in name["args"]["name"]
    layers = [event for event in events if event["cat"] == "conv3d"]
    assert [event["name"] for event in layers] == [layer.name for layer in sparse.manifest.layers]
    assert all(event["args"]["macs"] for event in layers)
    for event, following in pairwise(events):
        assert following["ts"] == pytest.approx(event["ts"] + event["dur"])
    (layer,) = [each for each in json.loads(done.stdout)["devices"][0]["measured"][0]["profile"]["layers"]
                if each["name"] == layers[0]["name"]]  # fmt: skip
    assert layers[0]["dur"] == pytest.approx(1e6 * layer["seconds"])
    wrong = CliRunner().invoke(bench.app, [str(sparse.path), "--trace", str(tmp_path / "trace.html")])
    assert "--trace" in str(wrong.exception)
    assert ".json" in str(wrong.exception)


def test_an_old_artifact_that_is_still_there_is_measured_in_turns(sparse, dense, tmp_path):
    old = run(Plan([dense.path], runs=10, seconds=0.0, layers=False))
    renamed = old.devices[0].measured[0].model_copy(update={"name": sparse.manifest.name})
    old = old.model_copy(update={"devices": [old.devices[0].model_copy(update={"measured": [renamed]})]})
    (verdict,) = run(Plan([sparse.path], runs=50, seconds=0.2, layers=False, against=old)).verdicts
    assert verdict.interleaved
    assert verdict.low <= verdict.ratio <= verdict.high


def test_verdicts_follow_the_interval():
    def told(low, high):
        return statistics.judge("d", "a", ((low + high) / 2, low, high), 0.05, True).verdict

    assert [told(1.06, 1.2), told(0.8, 0.94), told(0.97, 1.04), told(0.9, 1.3)] == [
        "slower", "faster", "same", "undecided",
    ]  # fmt: skip


def test_pairs_see_through_noise_that_hits_both():
    random = np.random.default_rng(1)
    load = np.repeat(random.uniform(1, 3, 20), 10)  # another process comes and goes
    ours = load * random.normal(1.00, 0.02, 200)
    theirs = load * random.normal(1.10, 0.02, 200)
    middle, low, high = statistics.paired_ratio(theirs.tolist(), ours.tolist())
    assert 1.08 < low <= middle <= high < 1.12
    assert statistics.paired_ratio([2.0, 2.0], [1.0, 1.0]) == (2.0, 2.0, 2.0)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(2)
    covered = 0
    for _ in range(60):
        low, high = statistics.unpaired_ratio(random.normal(1.2, 0.1, 30), random.normal(1.0, 0.1, 30))[1:]
        covered += low <= 1.2 <= high
    assert covered >= 52  # 95% of 60 is 57; below 52 is under one in a hundred


def test_kernels_do_not_check_what_the_compiler_gives_them(host_artifact):
    assert b"type on argument" not in (host_artifact.path / "model.so").read_bytes()


def test_own_overhead_is_under_one_percent(host_artifact):
    """Timing adds two readings of the clock to a run: a network of nearly nothing takes under 1% of a 1 ms one."""
    with open_device("local") as device:
        network = device.load(host_artifact)
        inputs = random_inputs(host_artifact.manifest.inputs)
        network.time(inputs, 3)
        per_run = float(np.median(network.time(inputs, 1000)))
    assert per_run < 0.01 * 1e-3


def test_turns_and_streams_count_what_they_promise(sparse):
    with open_device("local") as device:
        inputs = random_inputs(sparse.manifest.inputs)
        contenders = [Contender(device.load(sparse), inputs) for _ in range(2)]
        rounds = []
        in_turns(contenders, 30, 0.05, lambda: rounds.append(1))
        for contender in contenders:
            assert len(contender.seconds) >= 30
            assert len(contender.rounds) == len(rounds)
        stream = single_stream(contenders[0].network, [inputs], queries=50, seconds=0.2)
    assert stream["queries"] >= 50
    assert stream["seconds"] >= 0.2
    assert stream["p50"] <= stream["p90"] <= stream["p99"]


def test_a_single_stream_is_told(sparse, monkeypatch):
    def short(network, clips):
        return single_stream(network, clips, queries=20, seconds=0.1)

    monkeypatch.setattr("dance_tvm.benchmarking.campaign.single_stream", short)
    done = CliRunner().invoke(bench.app, [str(sparse.path), "--runs", "3", "--seconds", "0", "--single-stream"])
    assert done.exit_code == 0
    assert "single stream: 90th percentile" in done.stdout
    assert "queries a second" in done.stdout


def test_clips_of_every_kind(sparse, tmp_path, clips):
    assert len(load_clips(str(clips), sparse.manifest, most=2)) == 2
    assert frames_of(sparse.manifest) == 8
    np.savez(tmp_path / "wrong.npz", x=np.zeros((5, 5)))
    with pytest.raises(DanceError, match=r"x has shape \(5, 5\)"):
        load_clips(str(tmp_path / "wrong.npz"), sparse.manifest)
    with pytest.raises(DanceError, match="there is no input file"):
        load_clips(str(tmp_path / "none.npz"), sparse.manifest)
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(DanceError, match=r"bad\.npz is not an \.npz"):
        load_clips(str(tmp_path / "bad.npz"), sparse.manifest)
    with pytest.raises(DanceError, match="holds no video"):
        load_clips(str(tmp_path), sparse.manifest)
    with pytest.raises(DanceError, match="has clips of shape"):
        load_clips("motion-digits,test=4", sparse.manifest)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder with one video of 20 frames (32, 32), each brighter than the one before."""
    av = pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("videos")
    with av.open(str(folder / "grey.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for value in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * value, "uint8"), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(folder)


def taking(manifest, meaning, name="video"):
    """The manifest of a network called `name` that says `meaning` of its input."""
    return manifest.model_copy(
        update={"name": name, "inputs": [manifest.inputs[0].model_copy(update={"meaning": meaning})]}
    )


def test_videos_become_clips(sparse, videos):
    found = load_clips(videos, taking(sparse.manifest, f"clips, {AS_TRAINED}"))
    assert [name for name, _ in found] == ["grey 0-8", "grey 8-16"]
    frames = found[0][1]["clip"].mean(axis=(0, 1, 3, 4))
    assert (np.diff(frames) > 0).all()
    assert frames[0] < -1.5, "ImageNet's mean is 0, and its deviation 1"


@pytest.mark.parametrize(
    ("name", "meaning", "brightest"),
    [("mine", f"clips, {UP_TO_ONE}", 7 / 25.5), ("c3d-mine", f"clips, {UP_TO_ONE}", 7 / 25.5), ("c3d", AS_TRAINED, 70)],
)
def test_videos_are_scaled_as_the_input_says_without_a_word(sparse, videos, recwarn, name, meaning, brightest):
    ((_, inputs),) = load_clips(videos, taking(sparse.manifest, meaning, name), most=1)
    assert inputs["clip"][:, :, 7].mean() == pytest.approx(brightest, rel=0.1)
    assert not recwarn.list


def test_the_networks_of_the_zoo_say_their_scale(sparse, videos):
    for name in models.names():
        if models.entry(name).dtype != torch.uint8:  # bytes stay bytes
            assert not doubt_of_scale(videos, taking(sparse.manifest, models.entry(name).input_meaning, name)), name


def test_a_guessed_scale_is_told(sparse, videos, clips, recwarn):
    done = CliRunner().invoke(
        bench.app, [str(sparse.path), "--runs=2", "--seconds=0", "--no-layers", "--clips", videos, "--json"]
    )
    (note,) = json.loads(done.stdout)["devices"][0]["measured"][0]["notes"]
    assert note.startswith("video does not say in which scale it takes videos, and ImageNet's scale is a guess")
    assert "give --clips an .npz" in note
    assert [str(warning.message) for warning in recwarn.list if warning.category is DanceWarning] == [note]
    assert "0 to 255 is a guess" in doubt_of_scale(videos, taking(sparse.manifest, "clips", "c3d-mine"))
    for data_set in ("ucf101:/data/UCF-101", "hmdb51:/data/hmdb51,split=2"):
        assert "0 to 255 is a guess" in doubt_of_scale(data_set, taking(sparse.manifest, "clips", "c3d-mine"))
    assert not doubt_of_scale("motion-digits,test=8", taking(sparse.manifest, "clips", "c3d-mine"))
    assert not doubt_of_scale(str(clips), sparse.manifest)


def test_energy_is_labelled_and_right(tmp_path):
    before = {"microjoules": {"package-0": 1_000_000, "core": 5}, "milliwatts": {}}
    after = {"microjoules": {"package-0": 3_000_000, "core": 9}, "milliwatts": {}}
    measured = sensing.energy(before, after, [], 1.0, 10)
    assert (measured.kind, measured.joules) == ("measured", pytest.approx(0.2))
    for name, text in {"name": "ina3221", "in1_label": "VDD_IN", "in1_input": "5000", "curr1_input": "1000",
                       "in2_label": "VDD_CPU", "in2_input": "1000", "curr2_input": "1000"}.items():  # fmt: skip
        (tmp_path / "hwmon0").mkdir(exist_ok=True)
        (tmp_path / "hwmon0" / name).write_text(text + "\n")
    board = {"milliwatts": serve._rails(tmp_path)}
    assert board["milliwatts"] == {"VDD_IN": 5000.0, "VDD_CPU": 1000.0}
    assert sensing.watts_of(board) == pytest.approx(5.0)
    assert sensing.energy({}, {}, [5.0, 7.0], 2.0, 4).joules == pytest.approx(3.0)
    assert sensing.energy({}, {}, [], 1.0, 1) is None
    estimated = sensing.estimate(Energy(pj_per_mac=10, pj_per_byte=100), 10**9, 10**6)
    assert (estimated.kind, estimated.joules) == ("estimate", pytest.approx(0.0101))


def test_an_energy_counter_begins_again_where_its_processor_says(tmp_path):
    """As the kernel shows two packages and a part of one: each counts up to its own most."""

    def reading(*counted: int) -> dict:
        for folder, name, energy in zip(("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"),
                                        ("package-0", "package-1", "core"), counted, strict=True):  # fmt: skip
            (tmp_path / folder).mkdir(exist_ok=True)
            for file, text in {"name": name, "energy_uj": energy, "max_energy_range_uj": 65_532_610_987}.items():
                (tmp_path / folder / file).write_text(f"{text}\n")
        return serve._energy_counters(tmp_path)

    before, after = reading(65_530_610_987, 5_000_000, 7), reading(1_000_000, 6_000_000, 9)
    assert sensing.energy(before, after, [], 1.0, 2).joules == pytest.approx(2.0)
    unknown = [{"microjoules": state["microjoules"]} for state in (before, after)]
    assert sensing.energy(*unknown, [], 1.0, 2) is None
    assert sensing.energy(*unknown, [3.0], 2.0, 2).kind == "measured"


def test_throttling_is_told():
    steady = statistics.latency([1.0] * 100, 5, True)
    slowing = statistics.latency(list(np.linspace(1.0, 1.3, 100)), 5, True)
    before = {"khz": {"cpu0": 3_000_000}, "governor": {"cpu0": "performance"}}
    after = {"khz": {"cpu0": 2_000_000}, "governor": {"cpu0": "schedutil"}}
    assert sensing.warnings(before, before, {"a": steady}) == []
    said = " ".join(sensing.warnings(before, after, {"a": slowing}))
    for words in ("a became 2", "clock governor is schedutil", "clock of cpu0 fell"):
        assert words in said
    disturbed = statistics.latency([1.0] * 80 + [5.0] * 20, 5, True)
    assert "b in ten took 5.0 times the median" in " ".join(sensing.warnings(before, before, {"b": disturbed}))


def test_cooling_down_waits_for_the_heat_to_go():
    readings = iter([60_000, 55_000, 41_000])
    start = {"millidegrees": {"cpu": 40_000}}
    begin = time.monotonic()
    sensing.cool_down(lambda: {"millidegrees": {"cpu": next(readings)}}, start, 0.01)
    assert next(readings, None) is None
    assert time.monotonic() - begin < 1


def test_clusters_become_cpus():
    phone = load_target("snapdragon")
    clocks = {f"cpu{cpu}": 1_785_600 if cpu < 4 else 2_496_000 if cpu < 7 else 2_995_200 for cpu in range(8)}
    big = max(phone.clusters, key=lambda cluster: cluster.max_ghz)
    assert sensing.cpus_of_cluster(phone, big.name, {"max_khz": clocks}) == [7]
    with pytest.raises(DanceError, match="has no cluster 'huge'"):
        sensing.cpus_of_cluster(phone, "huge", {"max_khz": clocks})
    with pytest.raises(DanceError, match="give --cpus"):
        sensing.cpus_of_cluster(phone, big.name, {})
    assert bench.parse_cpus("0,2-4") == [0, 2, 3, 4]
    with pytest.raises(DanceError, match="--cpus must be"):
        bench.parse_cpus("big")


def test_calls_find_their_layers_by_the_table_of_kernels(dense):
    """Two kernels of one name, one of which runs among joined ones, and a layer whose name begins another's."""
    layers = [("a", "conv"), ("b", "pool"), ("c", "conv_k4"), ("d", "pool")]
    kernels = {
        "conv": {"name": "conv", "kind": "convolution"},
        "joined": {"kind": "planner", "parts": ["plan_rows", "pool"]},
        "conv_k4": {"name": "conv_k4", "kind": "convolution"},
        "pool7": {"name": "pool", "kind": "pool"},
        "add": {},
    }
    manifest = dense.manifest.model_copy(
        update={
            "layers": [LayerInfo(name=name, kind="", kernel=kernel, macs=1) for name, kernel in layers],
            "kernels": {symbol: KernelInfo(**kernel) for symbol, kernel in kernels.items()},
        }
    )
    calls = [KernelTime(symbol, 1.0, 8) for symbol in ["conv", "joined", "add", "conv_k4", "pool7"]]
    found = profile(manifest, calls, 5.0)
    assert [layer.name for layer in found.layers] == ["a", "c", "d", PLANNING, OTHER]
    assert [layer.bytes for layer in found.layers[3:]] == [8, 8]
    assert found.explained == 1.0


def test_bad_results_files(tmp_path):
    path = tmp_path / "r.json"
    for text, message in [("", "no results"), ("{}", "no results"), (json.dumps({"schema_version": 9}), "version 9")]:
        path.write_text(text)
        with pytest.raises(DanceError, match=message):
            read_results(path)
    with pytest.raises(DanceError, match="cannot be read"):
        read_results(tmp_path / "none.json")


def onnx_twin(path, *, wrong=False):
    """The network of ``video_artifact(dynamic=False)`` as an ONNX file."""
    from onnx import TensorProto, checker, helper, numpy_helper, save

    random = np.random.default_rng(0)
    first = random.integers(-2, 3, (8, 3, 3, 3, 3)).astype("float32")
    second = random.integers(1, 3, (8, 8, 1, 3, 3)).astype("float32") * (2 if wrong else 1)
    nodes = [
        helper.make_node("Conv", ["clip", "a"], ["b"], pads=[1] * 6),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Conv", ["c", "d"], ["y"], pads=[0, 1, 1, 0, 1, 1]),
    ]
    shapes = [[1, 3, 8, 16, 16], [1, 8, 8, 16, 16]]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in zip(("clip", "y"), shapes, strict=True)]
    graph = helper.make_graph(
        nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(first, "a"), numpy_helper.from_array(second, "d")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model)
    save(model, path)
    return path


def test_another_engine_is_measured_in_turns(dense, tmp_path):
    twin = onnx_twin(tmp_path / "net.onnx")
    words = [str(dense.path), "--peer", "onnxruntime", "--peer-model", str(twin), "--seconds", "0.05", "--no-layers"]
    done = CliRunner().invoke(bench.app, [*words, "--out", str(tmp_path / "r.json")])
    assert done.exit_code == 0, done.output
    assert "x as fast as onnxruntime" in done.output
    assert "random input" not in done.output  # what does not depend on its clip
    (peer,) = read_results(tmp_path / "r.json").peers
    assert peer.difference < 1e-6
    assert peer.low <= peer.speed_up <= peer.high
    assert peer.latency.runs >= 20
    onnx_twin(twin, wrong=True)
    with pytest.raises(DanceError, match="computes something else from"):
        run(Plan([dense.path], runs=2, seconds=0.01, layers=False, peers=["onnxruntime"], peer_model=twin))


@pytest.mark.parametrize(
    ("engines", "model", "devices", "said"),
    [
        (["onnxruntime"], None, [], "needs --peer-model"),
        (["tensorrt"], None, [], "choose of onnxruntime, openvino"),
        (["onnxruntime"], "missing.onnx", [], "is not an .onnx file"),
        (["onnxruntime"], "net.onnx", ["emulator"], "leave --device out"),
    ],
)
def test_engines_that_cannot_be_compared_are_refused(tmp_path, engines, model, devices, said):
    (tmp_path / "net.onnx").touch()
    with pytest.raises(DanceError, match=said):
        require_peers(engines, tmp_path / model if model else None, devices)


def test_an_engine_that_is_not_installed_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    with pytest.raises(DanceError, match="pip install openvino"):
        require_peers(["openvino"], tmp_path / "x.onnx", [])


def test_loading_is_timed_cold_and_warm(sparse):
    cold, warm = measure_loading(sparse.path)
    assert (cold.cold, warm.cold) == (True, False)
    assert all(value > 0 for each in (cold, warm) for value in (each.verify, each.load, each.first_run))
    with pytest.raises(DanceError, match="process of its own"):
        measure_loading(sparse.path.parent)


class Answering:
    """A network that answers with the scores it is given."""

    def run(self, inputs):
        return {"scores": inputs["clip"]}


def test_accuracy_of_labelled_clips(sparse, tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text("name,class\nvideos/film.mp4,2\nstill,0\n")
    scores = np.eye(7, dtype="float32")
    clips = [("film 0-8", scores[2]), ("film 8-16", 0.5 * scores[3]), ("still[0]", scores[6]), ("other", scores[0])]
    named = [(name, {"clip": row[None]}) for name, row in clips]
    output = sparse.manifest.outputs[0].model_copy(update={"name": "scores", "shape": [1, 7]})
    manifest = sparse.manifest.model_copy(update={"outputs": [output]})
    found = accuracy(Answering(), manifest, named, read_classes(labels), "labels.csv")
    assert (found.clips, found.videos) == (3, 2)
    assert found.top1 == pytest.approx(1 / 3)
    assert found.top5 == 1
    assert found.video_top1 == 0.5  # the first window of the film says more than the second
    with pytest.raises(DanceError, match="names none of the clips: they are called 'a'"):
        accuracy(Answering(), manifest, [("a", {"clip": scores[:1]})], {"b": 0}, "labels.csv")
    with pytest.raises(DanceError, match="knows 7"):
        accuracy(Answering(), manifest, named, {"film": 9}, "labels.csv")
    labels.write_text("film,2\nstill,zero\n")
    with pytest.raises(DanceError, match="line 2"):
        read_classes(labels)
    with pytest.raises(DanceError, match="cannot be read"):
        read_classes(tmp_path / "none.csv")
