"""docs/format.md says what is so: its reader runs as printed and agrees with kd; its names are those on disk."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cache_tools as tools
import numpy as np
import pytest
from random_cache import OUTPUTS, Form, make

from kdcli.cache.commits import Commit, read_commits
from kdcli.cache.layout import Layout, Manifest, load_manifest
from kdcli.cache.provenance import OutputRecord, TeacherRecord
from kdcli.cache.reader import CacheReader
from kdcli.cache.writer import CacheWriter

PAGE = (Path(__file__).parents[1] / "docs/format.md").read_text(encoding="utf-8")
(PROGRAM,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def logits() -> Callable[..., np.ndarray]:
    names: dict[str, Any] = {}
    exec(compile(PROGRAM, "docs/format.md", "exec"), names)
    read: Callable[..., np.ndarray] = names["logits"]
    return read


FORM = Form(segments=(45, 40), view_groups=(1, 2, 1), teachers=(("t", ("logits", "stats")),), seed=1)


def agree(logits: Callable[..., np.ndarray], root: Path) -> int:
    """Compare every row and view with the reader of kd; returns how many are missing or absent."""
    reader, without = CacheReader(root), 0
    absent = reader.absent("t/logits")
    for row in reader.manifest.sample_rows().tolist():
        for view in range(reader.manifest.views):
            key = reader.keys[row]
            if row in absent or not reader.present("t/logits", np.asarray([row]), [view])[0]:
                without += 1
                with pytest.raises(LookupError, match=r"is missing|is absent: truncated"):
                    logits(root, "t", key, view)
                continue
            found = logits(root, "t", key, view)
            expected = reader.gather("t", "logits", np.asarray([row]), view)[0]
            assert found.dtype == expected.dtype
            assert found.tobytes() == expected.tobytes()
    return without


def test_the_printed_reader_reads_what_kd_reads(tmp_path: Path, logits: Callable[..., np.ndarray]) -> None:
    make(tmp_path / "c.kd", FORM)
    assert agree(logits, tmp_path / "c.kd") == 5 * 4  # absent rows
    with pytest.raises(ValueError, match="not in list"):
        logits(tmp_path / "c.kd", "t", "nobody")


def test_the_printed_reader_tells_what_is_missing(tmp_path: Path, logits: Callable[..., np.ndarray]) -> None:
    root = tmp_path / "c.kd"
    make(root, Form(**{**vars(FORM), "missing": 0.4, "seed": 3}))
    assert 20 < agree(logits, root) < 85 * 4
    make(root, Form(**{**vars(FORM), "seed": 3}))  # the same job again fills the gaps
    with CacheWriter(root, load_manifest(root)) as writer:
        writer.withdraw(read_commits(Layout(root), "t/logits")[0, 1])
    agree(logits, root)


def test_the_printed_reader_reads_what_is_kept_of_view_0_only(
    tmp_path: Path, logits: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = {"logits": {"row_shape": [5], "dtype": "<f4"}}
    monkeypatch.setitem(OUTPUTS, "logits", OutputRecord(kind="logits", eval_only=True, arrays=arrays))
    make(tmp_path / "c.kd", Form(view_groups=(2, 1), teachers=(("t", ("logits",)),)))
    assert agree(logits, tmp_path / "c.kd") == 45 * 2


def test_the_printed_reader_refuses_a_changed_record(
    tmp_path: Path, logits: Callable[..., np.ndarray]
) -> None:
    tools.fill(tmp_path / "c.kd", ("t",))
    path = tmp_path / "c.kd/commits/t/logits.jsonl"
    path.write_text(path.read_text().replace('"group": 1', '"group": 0'))
    with pytest.raises(ValueError, match="changed"):
        logits(tmp_path / "c.kd", "t", "k00003", 1)


def test_the_printed_reader_needs_numpy_alone(tmp_path: Path) -> None:
    tools.fill(tmp_path / "c.kd", ("t",))
    tail = "import sys; print(logits('c.kd', 't', 'k00050', 1).tolist(), 'kdcli' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"{PROGRAM}\n{tail}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    expected = tools.logits_of("t", np.asarray([50]), 1)[0].tolist()
    assert done.stdout.strip() == f"{expected} False"
    assert len([line for line in PROGRAM.splitlines() if line]) < 50


@pytest.mark.parametrize(
    ("section", "fields"),
    [
        ("## Manifest", set(Manifest.model_fields)),
        ("## Commits", set(Commit.__dataclass_fields__)),
        ("## Teachers", {*TeacherRecord.model_fields, *OutputRecord.model_fields} - {"outputs"}),
    ],
)
def test_every_field_of_a_record_is_specified(section: str, fields: set[str]) -> None:
    text = PAGE.partition(f"\n{section}\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", text))
    assert fields <= named, fields - named


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_every_file_of_a_cache_is_specified(tmp_path: Path, backend: Any) -> None:
    form = Form(backend=backend, segments=(45, 40))
    make(tmp_path / "c.kd", form)
    tree = PAGE.partition("NAME.kd/\n")[2].partition("\nA kind kept")[0]
    part = r"(samples|t/(logits|topk|stats|features|maps\.layer\.4(@pool2)?|pixels))"
    chunk = r"c\.\d+(\.\d+)*" if backend == "zarr" else r"c\.\d+(\.\d+)?\.h5"
    array = r"(samples|views|teachers/t)(/(\w+|maps/layer\.4(@pool2)?|labels/class))"
    known = [
        "manifest.json", r"teachers/t/teacher\.json", r"teachers/t/(\w+|maps\.layer\.4(@pool2)?)\.json",
        rf"commits/{part}\.jsonl", rf"data\.{backend}/{array}/{chunk}", r"data\.zarr/(.*/)?zarr\.json", r"index\.h5",
    ]  # fmt: skip
    for path in (tmp_path / "c.kd").rglob("*"):
        name = str(path.relative_to(tmp_path / "c.kd"))
        if path.is_file():
            assert any(re.fullmatch(pattern, name) for pattern in known), name
    store = CacheReader(tmp_path / "c.kd").store
    for name in (name for part in store.parts() for name in store.specs(part)):
        assert name.partition("/")[0] in tree, name
