"""Image data sets for the demo and the studies: scikit-learn's digits, MNIST and CIFAR-10 in torchvision's layouts.

Nothing is ever downloaded: files come from ``data``, else from the directory that ``GRADCLUST_DATA`` names.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

SPLITS = ("train", "test")
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip

# Per-channel mean and standard deviation of the training pixels in [0, 1].
_PIXELS = {
    "digits": ((0.3051,), (0.3750,)),
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}


def load(
    name: str,
    split: str = "train",
    *,
    data: str | os.PathLike | None = None,
    limit: int | None = None,
    normalize: bool = True,
) -> TensorDataset:
    """One of the data sets below, by name.

    Args:
        name: ``"digits"``, ``"mnist"`` or ``"cifar10"``.
        split: ``"train"`` or ``"test"``.
        data: directory with the files; None takes ``GRADCLUST_DATA``. Not used by ``"digits"``.
        limit: keep only the first ``limit`` examples.
        normalize: pixels in [0, 1] minus the training mean, over the training standard deviation (per channel);
            False leaves them in [0, 1].

    Returns:
        TensorDataset of images [N, C, H, W] float32 and labels [N] int64.

    Raises:
        ValueError: unknown name or split, a limit below 1, or a damaged file (named).
        FileNotFoundError: a missing file, with the places that were searched and how to get it.
        ModuleNotFoundError: a data set that needs a package which is not installed.

    Example:
        >>> from gradclust_fast import data
        >>> images, labels = data.load("digits", limit=100).tensors
        >>> images.shape, labels.dtype
        (torch.Size([100, 1, 8, 8]), torch.int64)
    """
    if name == "digits":
        return digits(split, limit=limit, normalize=normalize)
    if name == "mnist":
        return mnist(split, data=data, limit=limit, normalize=normalize)
    if name == "cifar10":
        return cifar10(split, data=data, limit=limit, normalize=normalize)
    raise ValueError(f"name must be 'digits', 'mnist' or 'cifar10', got {name!r}")


def digits(split: str = "train", *, limit: int | None = None, normalize: bool = True) -> TensorDataset:
    """The 8×8 handwritten digits that scikit-learn brings: 1,500 to train on, 297 to test on. See :func:`load`."""
    _check(split, limit)
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    images, labels = load_digits(return_X_y=True)
    part = slice(0, 1500) if split == "train" else slice(1500, None)
    pixels = torch.from_numpy(images[part]).float().reshape(-1, 1, 8, 8) / 16
    return _dataset("digits", pixels, torch.from_numpy(labels[part]).long(), limit, normalize)


def mnist(
    split: str = "train",
    *,
    data: str | os.PathLike | None = None,
    limit: int | None = None,
    normalize: bool = True,
) -> TensorDataset:
    """MNIST from its IDX files, raw or gzipped, in ``data`` itself or in ``data/MNIST/raw``. See :func:`load`."""
    _check(split, limit)
    root = _root(data, "MNIST")
    prefix = "train" if split == "train" else "t10k"
    images = _read_idx(_find_idx(root, f"{prefix}-images-idx3-ubyte"), 3)
    labels_path = _find_idx(root, f"{prefix}-labels-idx1-ubyte")
    labels = _read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise ValueError(f"{labels_path}: {len(labels)} labels for {len(images)} images; get both files anew")
    _check_labels(labels_path, labels)
    images, labels = images[:limit], labels[:limit]
    pixels = torch.from_numpy(images.copy()).unsqueeze(1).float() / 255
    return _dataset("mnist", pixels, torch.from_numpy(labels.astype(np.int64)), limit, normalize)


def cifar10(
    split: str = "train",
    *,
    data: str | os.PathLike | None = None,
    limit: int | None = None,
    normalize: bool = True,
) -> TensorDataset:
    """CIFAR-10 from ``cifar-10-batches-py/``, or from ``cifar10-jpeg.zip`` (needs Pillow), in ``data``.

    The zip holds ``train/<class>/<n>.jpg`` and ``test/<class>/<n>.jpg``; its examples are ordered by n, then class, so
    that any ``limit`` is balanced. See :func:`load`.
    """
    _check(split, limit)
    root = _root(data, "CIFAR-10")
    batches, archive = root / "cifar-10-batches-py", root / "cifar10-jpeg.zip"
    if batches.is_dir():
        images, labels = _read_cifar_batches(batches, split, limit)
    elif archive.is_file():
        images, labels = _read_cifar_zip(archive, split, limit)
    else:
        raise FileNotFoundError(
            f"CIFAR-10 was sought as {batches}/ and {archive}, and neither is there; put torchvision's extracted "
            f"cifar-10-batches-py directory (torchvision.datasets.CIFAR10({str(root)!r}, download=True) makes it) "
            f"or cifar10-jpeg.zip there"
        )
    pixels = torch.from_numpy(images).float() / 255
    return _dataset("cifar10", pixels, torch.from_numpy(labels), limit, normalize)


def _check(split: str, limit: int | None) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, or None for all examples, got {limit}")


def _root(data: str | os.PathLike | None, what: str) -> Path:
    root = data if data is not None else os.environ.get("GRADCLUST_DATA")
    if not root:
        raise FileNotFoundError(
            f"{what} needs a directory with its files: pass data=DIR (--data DIR on the command line) or set "
            f"GRADCLUST_DATA"
        )
    path = Path(root).expanduser()
    if not path.is_dir():
        source = "data" if data is not None else "GRADCLUST_DATA"
        raise FileNotFoundError(f"{source}: {path} is not a directory; it must hold the files of {what}")
    return path


def _dataset(
    name: str, pixels: torch.Tensor, labels: torch.Tensor, limit: int | None, normalize: bool
) -> TensorDataset:
    pixels, labels = pixels[:limit], labels[:limit]
    if normalize:
        mean, std = (torch.tensor(value).view(1, -1, 1, 1) for value in _PIXELS[name])
        pixels = (pixels - mean) / std
    return TensorDataset(pixels, labels)


def _check_labels(path: Path, labels: np.ndarray) -> None:
    wrong = labels[(labels < 0) | (labels > 9)]
    if len(wrong):
        raise ValueError(f"{path}: label {wrong[0]} is outside 0..9; the file is damaged, get it anew")


def _find_idx(root: Path, name: str) -> Path:
    places = [root / f"{name}{suffix}" for root in (root, root / "MNIST" / "raw") for suffix in ("", ".gz")]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(
        f"MNIST: {name}[.gz] was found neither in {root} nor in {root / 'MNIST' / 'raw'}; "
        f"torchvision.datasets.MNIST({str(root)!r}, download=True) puts it there"
    )


def _read_idx(path: Path, dims: int) -> np.ndarray:
    """An IDX file of bytes: magic 0, 0, 8, number of dimensions; each extent as 4 big-endian bytes; the data."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}); the file is damaged, get it anew") from error
    header = 4 + 4 * dims
    if len(raw) < header or raw[:4] != bytes((0, 0, 8, dims)):
        raise ValueError(
            f"{path} is no IDX file of bytes with {dims} dimension{'s' if dims > 1 else ''} "
            f"(it begins {raw[:4].hex(' ') or 'with nothing'}, expected 00 00 08 {dims:02x}); get it anew"
        )
    shape = np.frombuffer(raw, ">u4", dims, 4).astype(int)
    if len(raw) - header != shape.prod():
        extents = "×".join(map(str, shape))
        raise ValueError(
            f"{path} promises {extents} bytes and holds {len(raw) - header}; the file is damaged, get it anew"
        )
    return np.frombuffer(raw, np.uint8, -1, header).reshape(shape)


class _ArraysOnly(pickle.Unpickler):
    """CIFAR-10's pickles hold dicts of NumPy arrays; anything else in one is refused, never run."""

    def find_class(self, module: str, name: str) -> Any:
        # by name alone: NumPy 2 moved numpy.core to numpy._core, and files of both kinds exist
        arrays = {"_reconstruct": np.zeros(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}
        if module.split(".")[0] == "numpy" and name in arrays:
            return arrays[name]
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _read_cifar_batches(root: Path, split: str, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    images: list[np.ndarray] = []
    labels: list[int] = []
    for name in [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]:
        path = root / name
        if not path.is_file():
            raise FileNotFoundError(f"CIFAR-10: {path} is missing; extract cifar-10-python.tar.gz anew")
        try:
            batch = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
            pixels = np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32)
            classes = np.asarray(batch["labels"], np.int64)
        except Exception as error:  # a damaged pickle can raise almost anything
            raise ValueError(
                f"{path} is no CIFAR-10 batch ({error}); the file is damaged, extract cifar-10-python.tar.gz anew"
            ) from error
        if len(pixels) != len(classes):
            raise ValueError(f"{path}: {len(classes)} labels for {len(pixels)} images; the file is damaged")
        _check_labels(path, classes)
        images.append(pixels)
        labels.extend(classes.tolist())
        if limit is not None and len(labels) >= limit:
            break
    return np.concatenate(images)[:limit], np.array(labels[:limit], np.int64)


def _jpeg_order(names: Iterable[str], split: str) -> list[tuple[int, int, str]]:
    """(n, class index, name) of every ``<split>/<class>/<n>.jpg``, sorted."""
    entries = []
    for name in names:
        parts = name.split("/")
        if len(parts) == 3 and parts[0] == split and parts[1] in CIFAR10_CLASSES and parts[2].endswith(".jpg"):
            number = parts[2].removesuffix(".jpg")
            if number.isdigit():
                entries.append((int(number), CIFAR10_CLASSES.index(parts[1]), name))
    return sorted(entries)


def _read_cifar_zip(path: Path, split: str, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path} holds JPEG files, which need Pillow: pip install pillow") from error
    try:
        with zipfile.ZipFile(path) as archive:
            entries = _jpeg_order(archive.namelist(), split)[:limit]
            if not entries:
                raise ValueError(f"{path} holds no {split}/<class>/<n>.jpg of CIFAR-10's ten classes; get it anew")
            images = np.empty((len(entries), 3, 32, 32), np.uint8)  # [N, C, H, W]
            for row, (_, _, name) in enumerate(entries):
                try:
                    picture = np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB"))
                except (OSError, zipfile.BadZipFile, zlib.error) as error:
                    raise ValueError(f"{path}: {name} cannot be decoded ({error}); get the file anew") from error
                if picture.shape != (32, 32, 3):
                    raise ValueError(f"{path}: {name} is {picture.shape[1]}×{picture.shape[0]} pixels, expected 32×32")
                images[row] = picture.transpose(2, 0, 1)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no zip file ({error}); the file is damaged, get it anew") from error
    return images, np.array([label for _, label, _ in entries], np.int64)
