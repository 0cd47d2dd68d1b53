"""Arrays by name in a file that is written."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dance_tvm.core.files import written_whole


def write_outputs(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name as ``.npz``, whole or not at all. Raises DanceError where that fails."""
    with written_whole(path, "--outputs") as beside, zipfile.ZipFile(beside, "w") as archive:
        for name, array in arrays.items():  # as np.savez does, which takes no output called "file"
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
