"""Fashion-MNIST as a webdataset tar for the training commands: 60,000 photographs of clothes, 28 x 28, ten classes, and
the 10,000 test pictures held out.

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb fashion
    python benchmarks/fashion.py fashion/usr/share/datasets/fashion-mnist runs/fashion.tar

Source: Xiao, Rasul and Vollgraf, 2017 (MIT licence).
"""

from __future__ import annotations

import gzip
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def read_idx(path: Path) -> np.ndarray:
    """The array of an idx file: a magic number whose last byte counts the dimensions, their sizes, then bytes."""
    data = gzip.decompress(path.read_bytes())
    dimensions = data[3]
    shape = np.frombuffer(data, ">i4", dimensions, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def main(source: Path, out: Path) -> None:
    with tarfile.open(out, "w") as tar:
        for file, split in (("train", "train"), ("t10k", "held-concept")):
            pictures = read_idx(source / f"{file}-images-idx3-ubyte.gz")
            labels = read_idx(source / f"{file}-labels-idx1-ubyte.gz")
            for i, (pixels, label) in enumerate(zip(tqdm(pictures, disable=None), labels, strict=True)):
                picture = io.BytesIO()
                Image.fromarray(pixels).save(picture, format="PNG")
                record = json.dumps({"class": CLASSES[label], "split": split}).encode()
                for extension, content in (("png", picture.getvalue()), ("json", record)):
                    member = tarfile.TarInfo(f"{file}-{i:05d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
