"""What a `--data` argument names.

A clip is a float32 tensor (C, T, H, W). `--data` takes a name and options, `NAME[:PATH][,KEY=VALUE…]`:

    motion-digits                      real handwritten digits that move in eight ways; the label is the motion
    motion-digits,train=2000,size=32   with another number of clips or edge length
    ucf101:/data/UCF-101,split=1       folders and split files of UCF101 (PyAV reads the videos)
    hmdb51:/data/hmdb51,split=1        the same for HMDB51
    folder:/data/mine                  a folder of videos for each class, below train/ and val/ or side by side
    csv:/data/train.csv,test=val.csv   lines of video,class; without test= a fifth of each class is held out
    webdataset:/data/clips-{000..009}.tar   shards of NAME.mp4 with NAME.cls; a folder or one .tar is taken too
    transnet:a.mp4,window=50           windows of one or more videos (joined by '+'), for label-free distillation

`load_data` returns `Splits`: training and held-out clips that share no clip, no handwritten digit and no frame.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from dance_tvm.sparsity.clips import Splits
from dance_tvm.sparsity.data_names import parse_data


def load_data(spec: str, *, model: str = "", seed: int = 0) -> Splits:
    """The clips that a `--data` argument names; `model` settles the normalisation of real videos.

    Raises DanceError for an unknown name or option, a missing folder, or a folder of another layout.
    """
    reader, path, options = parse_data(spec)
    module, _, function = reader.function.partition(":")
    read = getattr(import_module(module), function)
    splits: Splits = read(path if reader.path in ("none", "videos") else Path(path), model, seed, **options)
    return splits
