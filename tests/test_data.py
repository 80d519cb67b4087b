from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from gradclust_fast import data

REAL = Path(os.environ.get("GRADCLUST_DATA") or Path(__file__).parents[2] / "shared" / "data")


def need(name: str) -> Path:
    if not (REAL / name).exists():
        pytest.skip(f"{REAL / name} is not there; set GRADCLUST_DATA to a directory that has it")
    return REAL


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_mnist(folder: Path, split: str = "train", count: int = 7, zipped: bool = True) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "train" if split == "train" else "t10k"
    generator = np.random.default_rng(0)
    files = {
        f"{prefix}-images-idx3-ubyte": generator.integers(0, 256, (count, 28, 28)),
        f"{prefix}-labels-idx1-ubyte": np.arange(count) % 10,
    }
    paths = []
    for name, array in files.items():
        path = folder / (name + (".gz" if zipped else ""))
        path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
        paths.append(path)
    return paths[0], paths[1]


def test_digits_come_with_scikit_learn():
    images, labels = data.load("digits").tensors
    assert images.shape == (1500, 1, 8, 8) and images.dtype == torch.float32
    assert labels.dtype == torch.int64 and set(labels.tolist()) == set(range(10))
    assert abs(images.mean()) < 1e-3 and abs(images.std() - 1) < 1e-3
    test = data.load("digits", "test").tensors[0]
    assert test.shape == (297, 1, 8, 8)
    pixels = data.load("digits", normalize=False).tensors[0]
    assert pixels.min() == 0 and pixels.max() == 1


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("folder", [".", "MNIST/raw"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_mnist_is_read_from_every_layout(tmp_path, split, folder, zipped):
    path, _ = write_mnist(tmp_path / folder, split, zipped=zipped)
    images, labels = data.load("mnist", split, data=tmp_path, normalize=False).tensors
    raw = gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
    assert images.shape == (7, 1, 28, 28) and images.dtype == torch.float32
    assert torch.equal(
        (images * 255).round().to(torch.uint8).flatten(), torch.tensor(list(raw[16:]), dtype=torch.uint8)
    )
    assert labels.tolist() == list(range(7)) and labels.dtype == torch.int64
    standard = data.load("mnist", split, data=tmp_path).tensors[0]
    torch.testing.assert_close(standard, (images - 0.1307) / 0.3081)


def test_the_environment_names_the_directory(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    monkeypatch.setenv("GRADCLUST_DATA", str(tmp_path))
    assert len(data.load("mnist", limit=3)) == 3
    monkeypatch.delenv("GRADCLUST_DATA")
    with pytest.raises(FileNotFoundError, match=r"MNIST needs a directory.*--data DIR.*GRADCLUST_DATA"):
        data.load("mnist")
    monkeypatch.setenv("GRADCLUST_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"GRADCLUST_DATA: .*nowhere is not a directory"):
        data.load("mnist")


def test_a_missing_file_is_named_with_where_it_was_sought(tmp_path):
    images, _ = write_mnist(tmp_path)
    images.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"train-images-idx3-ubyte\[.gz\] was found neither in .*MNIST.raw.*downl"
    ):
        data.load("mnist", data=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"cifar-10-batches-py/ and .*cifar10-jpeg.zip, and neither"):
        data.load("cifar10", data=tmp_path)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda raw: gzip.compress(raw)[:-9], "train-images-idx3-ubyte.gz cannot be unpacked"),
        (lambda raw: gzip.compress(raw)[:40] + b"\0" * 40, "train-images-idx3-ubyte.gz cannot be unpacked"),
        (lambda raw: b"<html>not found</html>", "train-images-idx3-ubyte.gz cannot be unpacked"),
        (lambda raw: gzip.compress(raw[:-5]), r"promises 7×28×28 bytes and holds 5483; the file is damaged"),
        (lambda raw: gzip.compress(raw + b"x"), "holds 5489"),
        (lambda raw: gzip.compress(b"\0\0\x0d" + raw[3:]), r"begins 00 00 0d 03, expected 00 00 08 03"),
        (lambda raw: gzip.compress(b""), "begins with nothing"),
    ],
    ids=["cut", "overwritten", "html", "short", "long", "wrong-type", "empty"],
)
def test_a_damaged_file_is_named(tmp_path, damage, message):
    images, _ = write_mnist(tmp_path)
    images.write_bytes(damage(gzip.decompress(images.read_bytes())))
    with pytest.raises(ValueError, match=message):
        data.load("mnist", data=tmp_path)


def test_images_and_labels_must_fit(tmp_path):
    _, labels = write_mnist(tmp_path)
    labels.write_bytes(gzip.compress(idx(np.arange(6))))
    with pytest.raises(ValueError, match="6 labels for 7 images"):
        data.load("mnist", data=tmp_path)
    labels.write_bytes(gzip.compress(idx(np.arange(7) + 5)))
    with pytest.raises(ValueError, match=r"labels-idx1-ubyte.gz: label 10 is outside 0..9"):
        data.load("mnist", data=tmp_path)


def write_cifar(folder: Path, per_batch: int = 4) -> np.ndarray:
    root = folder / "cifar-10-batches-py"
    root.mkdir(parents=True)
    pixels = np.random.default_rng(1).integers(0, 256, (6, per_batch, 3072)).astype(np.uint8)
    for index, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        labels = [(index + j) % 10 for j in range(per_batch)]
        (root / name).write_bytes(pickle.dumps({"data": pixels[index], "labels": labels}))
    return pixels


def test_cifar_batches_are_read_as_torchvision_lays_them_out(tmp_path):
    pixels = write_cifar(tmp_path)
    images, labels = data.load("cifar10", data=tmp_path, normalize=False).tensors
    assert torch.equal((images * 255).round().byte(), torch.from_numpy(pixels[:5].reshape(20, 3, 32, 32)))
    assert labels[:6].tolist() == [0, 1, 2, 3, 1, 2]
    test = data.load("cifar10", "test", data=tmp_path, limit=2)
    assert len(test) == 2 and test.tensors[1].tolist() == [5, 6]


def test_cifar_damage_is_named_and_a_pickle_runs_nothing(tmp_path):
    write_cifar(tmp_path)
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_2"

    class Bomb:
        def __reduce__(self):
            return os.system, ("touch bomb",)

    batch.write_bytes(pickle.dumps({"data": Bomb(), "labels": []}))
    with pytest.raises(ValueError, match=r"data_batch_2 is no CIFAR-10 batch \(it refers to posix.system\)"):
        data.load("cifar10", data=tmp_path)
    assert not Path("bomb").exists()
    batch.unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_2 is missing"):
        data.load("cifar10", data=tmp_path)


def jpeg_zip(path: Path, size: int = 32, broken: str | None = None) -> None:
    from PIL import Image

    with zipfile.ZipFile(path, "w") as archive:
        for number in range(2):
            for label, name in enumerate(data.CIFAR10_CLASSES):
                picture = io.BytesIO()
                Image.new("RGB", (size, size), (20 * label, 100 * number, 7)).save(picture, "JPEG", quality=100)
                member = f"train/{name}/{number:04}.jpg"
                archive.writestr(member, b"\xff\xd8 no" if member == broken else picture.getvalue())
        archive.writestr("train/README.txt", "not a picture")


def test_cifar_jpegs_are_ordered_by_number_then_class(tmp_path):
    pytest.importorskip("PIL", reason="the JPEG archive needs Pillow")
    jpeg_zip(tmp_path / "cifar10-jpeg.zip")
    images, labels = data.load("cifar10", data=tmp_path, limit=13, normalize=False).tensors
    assert labels.tolist() == [*range(10), 0, 1, 2]
    assert abs(images[12, :, 5, 5] * 255 - torch.tensor([40.0, 100.0, 7.0])).max() <= 2
    with pytest.raises(ValueError, match=r"holds no test/<class>/<n>.jpg"):
        data.load("cifar10", "test", data=tmp_path)


def test_cifar_zip_damage_is_named(tmp_path):
    pytest.importorskip("PIL", reason="the JPEG archive needs Pillow")
    archive = tmp_path / "cifar10-jpeg.zip"
    jpeg_zip(archive, broken="train/cat/0001.jpg")
    with pytest.raises(ValueError, match=r"train/cat/0001.jpg cannot be decoded"):
        data.load("cifar10", data=tmp_path)
    jpeg_zip(archive, size=16)
    with pytest.raises(ValueError, match=r"train/airplane/0000.jpg is 16×16 pixels, expected 32×32"):
        data.load("cifar10", data=tmp_path)
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cifar10-jpeg.zip is no zip file"):
        data.load("cifar10", data=tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "mnits"}, "name must be 'digits', 'mnist' or 'cifar10', got 'mnits'"),
        ({"name": "digits", "split": "val"}, "split must be 'train' or 'test', got 'val'"),
        ({"name": "digits", "limit": 0}, "limit must be at least 1, or None for all examples, got 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.load(**arguments)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        data.load("digits")
    monkeypatch.setitem(sys.modules, "PIL", None)
    (tmp_path / "cifar10-jpeg.zip").write_bytes(b"")
    with pytest.raises(ModuleNotFoundError, match="pip install pillow"):
        data.load("cifar10", data=tmp_path)


def test_the_real_mnist():
    root = need("t10k-images-idx3-ubyte.gz")
    images, labels = data.load("mnist", "test", data=root).tensors
    assert images.shape == (10000, 1, 28, 28)
    assert torch.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_the_real_cifar_jpegs():
    pytest.importorskip("PIL", reason="the JPEG archive needs Pillow")
    images, labels = data.load("cifar10", data=need("cifar10-jpeg.zip"), limit=500).tensors
    assert images.shape == (500, 3, 32, 32) and torch.bincount(labels).tolist() == [50] * 10
    assert images.mean().abs() < 0.2 and abs(images.std() - 1) < 0.2
