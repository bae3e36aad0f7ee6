"""examples/tour.ipynb runs from top to bottom."""

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ipykernel", reason="ipykernel is not installed")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")

ROOT = Path(__file__).parents[1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_tour_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / ".ipython"))
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path / ".jupyter"))
    notebook: Any = nbformat.read(ROOT / "examples/tour.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not kept"
    (tmp_path / "work").mkdir()
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path / "work")}}
    ).execute()
    kinds: dict[str, list[Any]] = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            for kind, value in output.get("data", {}).items():
                kinds.setdefault(kind, []).append(value)
    assert sum("<table" in text for text in kinds["text/html"]) == 4
    assert "<p>CheckResult: nothing to list</p>" in kinds["text/html"]
    assert len(kinds["image/png"]) == 2
    assert any("torch.Size([50, 3, 160, 160])" in text for text in kinds["text/plain"])
    assert (tmp_path / "work/report.html").is_file()
