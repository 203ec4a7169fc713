"""Image sources, resizing and compositing, against tarfile and slow obvious code."""

import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unmask.data.images import composite, load_rgba, open_images, tar_index, to_rgba, to_tensor


def picture(seed: int = 0, size: tuple[int, int] = (24, 24)) -> Image.Image:
    """Noise in all four channels, with clear and opaque pixels among them."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    pixels[: size[1] // 3, :, 3] = 255
    pixels[-size[1] // 3 :, :, 3] = 0
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes], **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample_tar(path: Path, count: int = 3) -> Path:
    members = {}
    for i in range(count):
        members[f"s{i}.json"] = json.dumps({"caption": f"picture {i}", "tags": ["é"]}).encode()
        members[f"s{i}.png"] = png(picture(i))
    return write_tar(path, members)


# --- tar ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_index_agrees_with_tarfile(tmp_path, form):
    long = "folder/" * 12 + "name"
    members = {"a.png": b"x" * 1000, "empty.txt": b"", f"{long}.png": b"y" * 512, "b.json": b"{}"}
    if form != tarfile.USTAR_FORMAT:
        members["z" * 300 + ".png"] = b"z" * 513
        members["ünï.png"] = b"u"
    path = write_tar(tmp_path / "a.tar", members, format=form)
    with open(path, "rb") as file:
        found = tar_index(file, str(path))
        read = {}
        for name, offset, size in found:
            file.seek(offset)
            read[name] = file.read(size)
    assert read == members
    with tarfile.open(path) as tar:
        assert found == [(m.name, m.offset_data, m.size) for m in tar.getmembers()]


def test_index_skips_folders_and_links(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind, name in ((tarfile.DIRTYPE, "folder"), (tarfile.SYMTYPE, "link.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png"
            tar.addfile(info)
        info = tarfile.TarInfo("./a.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    with open(tmp_path / "a.tar", "rb") as file:
        assert [(name, size) for name, _, size in tar_index(file, "a.tar")] == [("a.png", 3)]


def test_index_reads_large_sizes():
    info = tarfile.TarInfo("big.bin")
    info.size = 9 * 2**30
    file = io.BytesIO(info.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(ValueError, match=r"x\.tar: is truncated within member big\.bin"):
        tar_index(file, "x.tar")  # the size was understood: the data is not there


@pytest.mark.parametrize("packed", [False, True])
def test_tar_samples(tmp_path, packed):
    path = sample_tar(tmp_path / "a.tar")
    if packed:
        path = tmp_path / "a.tar.gz"
        path.write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    source = open_images(path)
    assert len(source) == 3
    for i in range(3):
        image, metadata = source[i]
        assert np.array_equal(np.asarray(image), np.asarray(picture(i)))
        assert metadata == {"caption": f"picture {i}", "tags": ["é"], "key": f"s{i}"} == source.metadata(i)
    assert source.metadata(-1)["key"] == "s2"
    assert [m["key"] for _, m in source] == ["s0", "s1", "s2"]
    copy = pickle.loads(pickle.dumps(source))
    assert copy.metadata(1) == source.metadata(1)
    with pytest.raises(IndexError):
        source[3]


def test_tar_text_and_label(tmp_path):
    members = {"d/x.y.jpg": b"", "d/x.txt": b" a caption\n", "d/x.cls": b"7"}
    source = open_images(write_tar(tmp_path / "a.tar", members))
    assert source.metadata(0) == {"caption": "a caption", "label": 7, "key": "d/x"}


def test_long_link_names_and_damaged_extended_header(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        link = tarfile.TarInfo("l" * 150)
        link.type, link.linkname = tarfile.SYMTYPE, "t" * 150
        tar.addfile(link)
        info = tarfile.TarInfo("n" * 150)
        tar.addfile(info)
    with open(path, "rb") as file:
        assert [name for name, _, _ in tar_index(file, "a.tar")] == ["n" * 150]
    write_tar(path, {"é" * 100: b"x"}, format=tarfile.PAX_FORMAT)
    for damage in (b"0 ", b"x ", b"99999 "):
        data = bytearray(path.read_bytes())
        data[512 : 512 + len(damage)] = damage
        with pytest.raises(ValueError, match=r"a\.tar: is damaged at its start \(extended header"):
            tar_index(io.BytesIO(data), "a.tar")


@pytest.mark.parametrize("cut", [100, 700, 1100, "last byte", "end mark"])
def test_truncated_tar(tmp_path, cut):
    path = sample_tar(tmp_path / "a.tar")
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    if cut == "last byte":
        cut = last.offset_data + last.size - 1
    elif cut == "end mark":  # every member is whole, but what came after them is unknown
        cut = last.offset_data + -(-last.size // 512) * 512
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"a\.tar: is truncated .*build the archive again"):
        open_images(path)


def test_damaged_tar(tmp_path):
    path = sample_tar(tmp_path / "a.tar")
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.tar: is not a tar or is damaged at its start"):
        open_images(path)


def test_damaged_gzip(tmp_path):
    path = tmp_path / "a.tar.gz"
    data = bytearray(gzip.compress(sample_tar(tmp_path / "a.tar").read_bytes()))
    path.write_bytes(data[:-20])
    with pytest.raises(ValueError, match=r"a\.tar\.gz: is truncated or damaged"):
        open_images(path)
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.tar\.gz: is truncated or damaged"):
        open_images(path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "holds no pictures"),
        ({"a.json": b"{}"}, "sample a holds 0 pictures"),
        ({"a.png": b"", "a.jpg": b""}, "sample a holds 2 pictures"),
        ({"a.png": b"", "a.json": b"{}", "b.png": b""}, r"sample b has no b\.json"),
    ],
)
def test_bad_samples(tmp_path, members, message):
    with pytest.raises(ValueError, match=rf"a\.tar: {message}"):
        open_images(write_tar(tmp_path / "a.tar", members))


@pytest.mark.parametrize("json_bytes", [b"{", b"[]", b"\xff"])
def test_bad_json_and_picture(tmp_path, json_bytes):
    source = open_images(write_tar(tmp_path / "a.tar", {"k.png": b"not a picture", "k.json": json_bytes}))
    with pytest.raises(ValueError, match=r"a\.tar: member k\.json"):
        source.metadata(0)
    with pytest.raises(ValueError, match=r"a\.tar: member k: cannot be decoded .*write the archive again"):
        source[0]


def test_truncated_picture(tmp_path):
    source = open_images(write_tar(tmp_path / "a.tar", {"k.png": png(picture())[:-300]}))
    with pytest.raises(ValueError, match="member k: cannot be decoded"):
        source[0]


def test_other_packing_is_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar.xz", "w:xz"):
        pass
    with pytest.raises(ValueError, match="is packed with xz; unpack it"):
        open_images(tmp_path / "a.tar.xz")


def test_missing_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing: no such image archive or folder"):
        open_images(tmp_path / "nothing")


# --- folder -------------------------------------------------------------------------------------------


def test_folder(tmp_path):
    for name in ("dog/b.png", "cat/deep/a.PNG", "cat/c.jpg", "top.webp", ".hidden/x.png", "cat/.x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture().convert("RGB").save(tmp_path / name)
    (tmp_path / "dog/b.txt").write_text("a dog, é\n", "utf-8")
    (tmp_path / "cat/notes.md").write_text("not a picture")
    source = open_images(tmp_path)
    assert source.classes == ["cat", "dog"]
    assert [source.metadata(i) for i in range(len(source))] == [
        {"key": "cat/c", "class": "cat", "label": 0},
        {"key": "cat/deep/a", "class": "cat", "label": 0},
        {"key": "dog/b", "class": "dog", "label": 1, "caption": "a dog, é"},
        {"key": "top"},
    ]
    image, metadata = source[2]
    assert image.size == (24, 24)
    assert metadata == source.metadata(2)


def test_folder_errors(tmp_path):
    (tmp_path / "notes.txt").write_text("no pictures here")
    with pytest.raises(ValueError, match=r"holds no images; expected files like class/name\.png"):
        open_images(tmp_path)
    (tmp_path / "a.png").write_bytes(b"nothing")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    source = open_images(tmp_path)
    with pytest.raises(ValueError, match=r"a\.png: cannot be decoded .*replace or delete the file"):
        source[0]
    with pytest.raises(ValueError, match=r"a\.txt: is not UTF-8"):
        source.metadata(0)


def test_camera_orientation(tmp_path):
    image = Image.new("RGB", (20, 10), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "a.jpg", exif=exif)
    assert open_images(tmp_path)[0][0].size == (10, 20)


# --- tensors ------------------------------------------------------------------------------------------


def slow_box(pixels: np.ndarray, size: int) -> np.ndarray:
    """Area average of (H, W, C) floats, one output pixel at a time."""
    step = pixels.shape[0] // size
    out = np.zeros((size, size, pixels.shape[2]))
    for y in range(size):
        for x in range(size):
            block = pixels[y * step : (y + 1) * step, x * step : (x + 1) * step]
            out[y, x] = block.reshape(-1, pixels.shape[2]).mean(0)
    return out


@pytest.mark.parametrize("size", [24, 12, 8])
@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (200, 30, 90)])
def test_to_tensor_is_average_of_composited_pixels(size, colour):
    pixels = np.asarray(picture()).astype(float)
    alpha = pixels[..., 3:] / 255
    expected = slow_box(pixels[..., :3] * alpha + np.array(colour) * (1 - alpha), size)
    got = to_tensor(picture(), size, colour)
    assert got.dtype == torch.uint8
    assert got.shape == (3, size, size)
    # Compositing and the two passes of the resize each round by half.
    assert np.abs(got.permute(1, 2, 0).numpy() - expected).max() <= 1.5


@pytest.mark.parametrize("size", [24, 12, 8])
def test_to_rgba_then_composite(size):
    pixels = np.asarray(picture()).astype(float)
    alpha = pixels[..., 3:] / 255
    small = slow_box(np.concatenate([pixels[..., :3] * alpha, alpha * 255], axis=2), size)
    rgba = to_rgba(picture(), size)
    assert rgba.shape == (4, size, size)
    assert np.abs(rgba[3].numpy() - small[..., 3]).max() <= 1
    colour = np.array([200, 30, 90])
    expected = small[..., :3] + colour * (1 - small[..., 3:] / 255)
    got = composite(rgba, colour.tolist()).permute(1, 2, 0).numpy()
    assert np.abs(got - expected).max() <= 2.5  # two roundings to 8 bits


def test_no_dark_fringe():
    """Clear black beside opaque red: resized, all that shows is red of less weight."""
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, :29] = (255, 0, 0, 255)
    for size in (16, 23):
        rgba = to_rgba(Image.fromarray(pixels), size)
        seen = rgba[3] > 8
        assert (rgba[0][seen] > 245).all()
        assert (rgba[1:3] == 0).all()
        red = to_tensor(Image.fromarray(pixels), size, (255, 0, 0))
        assert (red == torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]).all()


def test_antialiased():
    """A one-pixel chessboard shrinks to even grey, whatever the ratio."""
    board = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
    for size in (64, 48, 13):
        inside = to_tensor(Image.fromarray(board), size)[:, 2:-2, 2:-2].int()
        assert (inside - 127).abs().max() <= 4


def test_centre_crop():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = (0, 255, 0)
    assert (to_tensor(Image.fromarray(pixels), 10)[1] == 255).all()
    assert (to_tensor(Image.fromarray(pixels.swapaxes(0, 1)), 5)[1] == 255).all()


def test_modes():
    grey = to_tensor(Image.new("L", (4, 4), 100), 4)
    assert (grey == 100).all()
    deep = Image.fromarray(np.full((4, 4), 100 * 256 + 5, np.uint16))
    assert (to_tensor(deep, 4) == 100).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30])
    assert to_tensor(palette, 4)[:, 0, 0].tolist() == [10, 20, 30]


def test_composite_exact_and_per_picture():
    rgba = torch.randint(0, 256, (5, 4, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rgba[:, 3, 0] = 255
    rgba[:, 3, 1] = 0
    colours = torch.tensor([[i, 2 * i, 255 - i] for i in range(5)])
    got = composite(rgba, colours)
    assert got.dtype == torch.uint8
    assert got.shape == (5, 3, 3, 3)
    assert torch.equal(got[:, :, 0], rgba[:, :3, 0])
    assert torch.equal(got[:, :, 1].int(), colours.int()[..., None].expand(5, 3, 3))
    for i in range(5):
        assert torch.equal(got[i], composite(rgba[i], colours[i].tolist()))
    alpha = rgba[:, 3:].double() / 255
    exact = rgba[:, :3] * alpha + colours[..., None, None] * (1 - alpha)
    assert (got.double() - exact).abs().max() <= 0.5


def test_load_rgba(tmp_path):
    source = open_images(sample_tar(tmp_path / "a.tar"))
    seen = []
    pictures = load_rgba(source, 12, [2, 0], progress=lambda done, total: seen.append((done, total)))
    assert pictures.shape == (2, 4, 12, 12)
    assert pictures.dtype == torch.uint8
    assert torch.equal(pictures[0], to_rgba(picture(2), 12))
    assert torch.equal(pictures[1], to_rgba(picture(0), 12))
    assert seen == [(1, 2), (2, 2)]
    assert len(load_rgba(source, 12)) == 3
    assert load_rgba(source, 12, []).shape == (0, 4, 12, 12)
