"""Motion digits and the video readers."""

from __future__ import annotations

import io
import struct
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from dance_tvm.core.errors import DanceError
from dance_tvm.models import transnetv2
from dance_tvm.sparsity.data import load_data
from dance_tvm.sparsity.motion_digits import MOTIONS, MotionDigits
from dance_tvm.sparsity.video import FrameWindows, Preprocessing, VideoClips, read_video


def test_motion_digits_are_settled_by_their_seed() -> None:
    one, same, other = (MotionDigits(16, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one[5][0], same[5][0])
    assert not torch.equal(one[5][0], other[5][0])
    assert one[5][0].shape == one.shape == (1, 16, 32, 32)
    assert one[5][0].dtype == torch.float32
    assert 0 <= float(one[5][0].min()) < float(one[5][0].max()) <= 1


def test_every_motion_is_as_frequent_and_splits_share_no_digit() -> None:
    splits = load_data("motion-digits,train=64,test=32,size=24,frames=8", seed=1)
    labels = [splits.train[index][1] for index in range(64)]
    assert {labels.count(label) for label in range(len(MOTIONS))} == {8}
    scans = [{scan.tobytes() for scan in part._digits} for part in (splits.train, splits.held_out)]
    assert not scans[0] & scans[1]


def test_motions_move_and_pauses_rest() -> None:
    clips = MotionDigits(400, seed=2)
    calm = [index for index in range(400) if clips.difficulty(index) < 0.3]
    change: dict[str, list[float]] = {label: [] for label in MOTIONS}
    for index in calm:
        clip, label = clips[index]
        change[MOTIONS[label]].append(float((clip[:, 1:] - clip[:, :-1]).abs().mean()))
    assert np.mean(change["still"]) < 0.015
    assert all(np.mean(change[motion]) > 1.5 * np.mean(change["still"]) for motion in MOTIONS if motion != "still")


def test_clips_differ_in_difficulty() -> None:
    clips = MotionDigits(64, seed=0)
    hard = max(range(64), key=clips.difficulty)
    easy = min(range(64), key=clips.difficulty)
    dark = [float((clips[index][0] < 0.02).float().mean()) for index in (easy, hard)]
    assert dark[0] > dark[1] + 0.2, "an easy clip's background is black, a hard one's is noisy"


@pytest.mark.parametrize("options", ["size=8", "frames=2", "train=0"])
def test_digits_that_cannot_move_are_refused(options: str) -> None:
    with pytest.raises(DanceError, match="is at least"):
        load_data(f"motion-digits,{options}")


@pytest.fixture(scope="module")
def real_frames() -> np.ndarray:
    """48 real frames (48, 120, 160, 3), from TransNetV2's published clip."""
    try:
        path = transnetv2.clip_path()
    except DanceError as error:
        pytest.skip(str(error))
    with av.open(str(path)) as container:
        frames = (frame.reformat(160, 120, "rgb24").to_ndarray() for frame in container.decode(video=0))
        return np.stack([frame for frame, _ in zip(frames, range(48), strict=False)])


def write_video(path: Path, frames: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = *frames.shape[1:3], "yuv420p", 4_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def ucf(tmp_path: Path, real_frames: np.ndarray) -> Path:
    """UCF101's layout in small: two classes, a video to train on and one to test on in each."""
    root, lists = tmp_path / "UCF-101", tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 Archery\n2 Surfing\n")
    train, test = [], []
    for number, name in enumerate(("Archery", "Surfing")):
        for group, names in ((1, test), (8, train)):
            video = f"{name}/v_{name}_g{group:02}_c01.avi"
            write_video(root / video, np.roll(real_frames, 5 * group, axis=2))
            names.append(f"{video} {number + 1}" if group == 8 else video)
    (lists / "trainlist01.txt").write_text("\n".join(train) + "\n")
    (lists / "testlist01.txt").write_text("\n".join(test) + "\n")
    return root


def test_ucf101_is_read_as_the_supplement_says(ucf: Path) -> None:
    splits = load_data(f"ucf101:{ucf}", model="c3d", seed=0)
    assert splits.train.classes == ("Archery", "Surfing")
    clip, label = splits.held_out[1]
    assert (clip.shape, label) == ((3, 16, 112, 112), 1)
    assert clip.max() > 100, "C3D sees pixels of 0 to 255"
    assert torch.equal(clip, splits.held_out[1][0])

    frames = read_video(ucf / "Surfing" / "v_Surfing_g01_c01.avi", 128, 171)
    stride = (48 - 1) // 15
    start = (48 - 15 * stride) // 2
    expected = frames[start::stride][:16, 8:120, 29:141]
    assert torch.equal(clip, torch.from_numpy(expected).permute(3, 0, 1, 2).float())


def test_other_networks_get_imagenet_normalisation_and_augmented_training_clips(ucf: Path) -> None:
    splits = load_data(f"ucf101:{ucf}", model="r2plus1d-18", seed=0)
    clip, _ = splits.held_out[0]
    assert float(clip.min()) > -2.2
    assert float(clip.max()) < 2.7
    first, _ = splits.train[0]
    assert torch.equal(first, splits.train[0][0])
    splits.train.set_epoch(1)
    assert not torch.equal(first, splits.train[0][0])


def test_hmdb51_takes_its_three_way_split(tmp_path: Path, real_frames: np.ndarray) -> None:
    root, lists = tmp_path / "hmdb51", tmp_path / "hmdb51" / "testTrainMulti_7030_splits"
    lists.mkdir(parents=True)
    for name in ("run", "wave"):
        for number in range(3):
            write_video(root / name / f"{number}.avi", real_frames[:20])
        (lists / f"{name}_test_split1.txt").write_text("0.avi 1 \n1.avi 2 \n2.avi 0 \n")
    splits = load_data(f"hmdb51:{root}", model="c3d")
    assert (len(splits.train), len(splits.held_out)) == (2, 2)
    assert splits.train.classes == ("run", "wave")
    assert splits.held_out[1][0].shape == (3, 16, 112, 112)


def test_bad_videos_are_one_sentence(ucf: Path, real_frames: np.ndarray, tmp_path: Path) -> None:
    path = ucf / "Archery" / "v_Archery_g01_c01.avi"
    write_video(path, real_frames[:9])
    with pytest.raises(DanceError, match="has 9 frames and a clip needs 16"):
        load_data(f"ucf101:{ucf}").held_out[0]
    path.write_bytes(b"RIFF" + bytes(2000))
    with pytest.raises(DanceError, match="cannot be decoded"):
        load_data(f"ucf101:{ucf}").held_out[0]
    path.unlink()
    with pytest.raises(DanceError, match=r"1 listed videos are missing, the first is .*v_Archery_g01_c01\.avi"):
        load_data(f"ucf101:{ucf}")
    with pytest.raises(DanceError, match="has not the layout of HMDB51"):
        load_data(f"hmdb51:{ucf}")
    with pytest.raises(DanceError, match="is not a folder"):
        load_data(f"ucf101:{tmp_path / 'nothing'}")
    with pytest.raises(DanceError, match="lists no video"):
        VideoClips([], ("a",), Preprocessing())


def test_windows_share_no_frame_between_the_splits() -> None:
    frames = np.arange(40, dtype=np.uint8)[:, None, None, None] * np.ones((1, 27, 48, 3), np.uint8)
    train, held_out = FrameWindows([frames[:30]], 10, 5), FrameWindows([frames[30:]], 10, 10)
    assert [int(window[0, 0, 0, 0]) for window, _ in train] == [0, 5, 10, 15, 20]
    assert len(held_out) == 1
    assert int(held_out[0][0].min()) == 30
    with pytest.raises(DanceError, match="shorter than a window"):
        FrameWindows([frames[:5]], 10, 5)


def test_videos_in_a_folder_for_each_class(tmp_path: Path, real_frames: np.ndarray) -> None:
    for name in ("run", "wave"):
        for number in range(5):
            path = tmp_path / "side by side" / name / f"{number}.avi"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
    splits = load_data(f"folder:{tmp_path / 'side by side'}", model="c3d")
    assert (len(splits.train), len(splits.held_out)) == (8, 2)
    assert splits.train.classes == ("run", "wave")
    assert {label for _, label in splits.held_out._videos} == {0, 1}
    for part in ("train", "val"):
        write_video(tmp_path / "apart" / part / "run" / "a.avi", real_frames[:20])
    splits = load_data(f"folder:{tmp_path / 'apart'}", model="c3d")
    assert splits.train[0][0].shape == (3, 16, 112, 112)
    assert len(splits.held_out) == 1
    (tmp_path / "apart" / "val" / "jump").mkdir()
    with pytest.raises(DanceError, match="has the class 'jump', which train has not"):
        load_data(f"folder:{tmp_path / 'apart'}")
    with pytest.raises(DanceError, match="holds no folder"):
        load_data(f"folder:{tmp_path / 'apart' / 'val' / 'jump'}")
    with pytest.raises(DanceError, match="raise held_out"):
        load_data(f"folder:{tmp_path / 'side by side'},held_out=1")


def test_videos_in_a_list(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number}.mp4").write_bytes(b"x")
    (tmp_path / "all.csv").write_text("video,class\n" + "".join(f"{n}.mp4,{n % 11}\n" for n in range(12)))
    (tmp_path / "more.csv").write_text("11.mp4,10\n")
    splits = load_data(f"csv:{tmp_path / 'all.csv'},test=more.csv")
    assert splits.train.classes == tuple(str(n) for n in range(11))  # as numbers, not 0, 1, 10, 2
    assert splits.held_out._videos == [(tmp_path / "11.mp4", 10)]
    (tmp_path / "more.csv").write_text("11.mp4,12\n")
    with pytest.raises(DanceError, match="has the class '12'"):
        load_data(f"csv:{tmp_path / 'all.csv'},test=more.csv")
    (tmp_path / "bad.csv").write_text("a.mp4,1\nb.mp4\n")
    with pytest.raises(DanceError, match=r"video 2: 'b\.mp4' is not of the form"):
        load_data(f"csv:{tmp_path / 'bad.csv'}")
    with pytest.raises(DanceError, match="cannot be read"):
        load_data(f"csv:{tmp_path / 'none.csv'}")


def shard(path: Path, samples: dict[str, tuple[bytes, str] | None]) -> None:
    """A tar file with a video and its class for each name; None leaves the class out."""
    with tarfile.open(path, "w") as archive:
        for name, sample in samples.items():
            video, label = sample or (b"x", None)
            for suffix, data in ((".mp4", video), (".cls", label)):
                if data is not None:
                    member = tarfile.TarInfo(f"clips/{name}{suffix}")
                    content = data if isinstance(data, bytes) else data.encode()
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def test_videos_in_shards(tmp_path: Path, real_frames: np.ndarray) -> None:
    write_video(tmp_path / "real.mp4", real_frames[:20])
    real = (tmp_path / "real.mp4").read_bytes()
    shard(tmp_path / "part-08.tar", {"a-0": (b"x", "2\n"), "b": (real, "10")})
    shard(tmp_path / "part-09.tar", {"c": (b"x", "2")})
    shard(tmp_path / "part-10.tar", {"d": (real, "10")})
    splits = load_data(f"webdataset:{tmp_path}/part-{{08..09}}.tar,test=part-10.tar", model="c3d")
    assert (len(splits.train), len(splits.held_out)) == (3, 1)
    assert splits.train.classes == ("2", "10")
    assert splits.held_out[0][0].shape == splits.train[1][0].shape == (3, 16, 112, 112)
    assert splits.held_out[0][1] == 1
    with pytest.raises(DanceError, match=r"part-08\.tar:clips/a-0\.mp4 cannot be decoded"):
        splits.train[0]
    assert len(load_data(f"webdataset:{tmp_path},held_out=50").train) == 2
    shard(tmp_path / "lone.tar", {"e": None})
    with pytest.raises(DanceError, match=r"lone\.tar: the sample clips/e has no class \(\.cls or \.txt\)"):
        load_data(f"webdataset:{tmp_path / 'lone.tar'}")
    with pytest.raises(DanceError, match="cannot be read"):
        load_data(f"webdataset:{tmp_path / 'none.tar'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DanceError, match=r"holds no \.tar file"):
        load_data(f"webdataset:{tmp_path / 'empty'}")


@pytest.mark.parametrize(
    ("matrix", "bright"), [((0, 1, -1, 0), (0, 1)), ((-1, 0, 0, -1), (1, 1)), ((0, -1, 1, 0), (1, 0))]
)
def test_a_video_that_was_filmed_upright_is_turned(
    tmp_path: Path, matrix: tuple[int, ...], bright: tuple[int, int]
) -> None:
    path = tmp_path / "phone.mp4"
    picture = np.zeros((32, 48, 3), "uint8")
    picture[:16, :24] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44  # of its matrix, which says how a player turns the video (ISO/IEC 14496-12, 8.3.2)
    a, b, c, d = (value << 16 for value in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    (frame,) = read_video(path, 20, 24)
    assert frame.shape == (20, 24, 3)
    quarters = frame.reshape(2, 10, 2, 12, 3).mean((1, 3, 4))
    assert quarters[bright] > 200
    assert quarters.sum() - quarters[bright] < 60
