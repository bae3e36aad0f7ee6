"""Class similarity from a text tower: the tower's own embeddings, by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcli.comparing.similarity import class_similarity
from kdcli.errors import BadDataError, KdError, MissingExtraError, NotFoundError, UsageError

transformers = pytest.importorskip("transformers", reason="kdcli[transformers] is not installed")

WORDS = ["a", "photo", "of", "cat", "dog", "red", "fox"]
CLASSES = ("cat", "dog", "red_fox")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP, and a tokenizer whose pieces are whole words."""
    folder = tmp_path_factory.mktemp("clip")
    pieces = [f"{word}</w>" for word in WORDS]
    letters = sorted(set("".join(WORDS)))
    pairs: list[str] = []
    for word in WORDS:  # byte pairs that join each word, letter by letter
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pairs.append(f"{parts[0]} {parts[1]}")
            parts[:2] = ["".join(parts[:2])]
    joined = [pair.replace(" ", "") for pair in pairs]
    vocabulary = dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters), *joined, *pieces])
    tokens = {token: number for number, token in enumerate([*vocabulary, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(tokens))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(pairs)]) + "\n")
    transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ids = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=tower | ids | {"vocab_size": len(tokens), "max_position_embeddings": 12},
        vision_config=tower | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


def test_the_matrix_is_the_cosines_of_the_towers_embeddings(clip: Path) -> None:
    found = class_similarity(f"transformers/{clip}", CLASSES)
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    rows = []
    for name in ("cat", "dog", "red fox"):  # one by one: nothing is padded
        tokens = tokenizer(f"a photo of a {name}", return_tensors="pt")
        assert tokens["input_ids"].shape[1] == 6 + name.count(" ") + 1
        with torch.inference_mode():
            hidden = model.text_model(input_ids=tokens["input_ids"]).pooler_output
            rows.append(model.text_projection(hidden)[0])
    wanted = torch.nn.functional.cosine_similarity(
        torch.stack(rows)[:, None], torch.stack(rows)[None], dim=-1
    )
    np.testing.assert_allclose(found.matrix, wanted.numpy(), atol=1e-5)
    assert not found.substitute
    assert np.ptp(found.matrix) > 1e-4


def refusal(error: type[KdError], given: str, classes: tuple[str, ...] = CLASSES) -> str:
    with pytest.raises(error) as caught:
        class_similarity(given, classes)
    assert caught.value.hint
    return caught.value.message


def test_what_cannot_be_embedded_is_refused(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "n01440764" in refusal(UsageError, f"transformers/{clip}", ("cat", "n01440764"))
    assert "'7'" in refusal(UsageError, f"transformers/{clip}", ("7", "8"))
    refusal(NotFoundError, f"transformers/{tmp_path}")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=8,
    )
    transformers.ViTModel(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((clip / name).read_bytes())
    assert "embeds no texts" in refusal(BadDataError, f"transformers/{tmp_path}")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    refusal(MissingExtraError, f"transformers/{clip}")


def test_a_file_is_read_as_before(tmp_path: Path) -> None:
    np.save(tmp_path / "s.npy", np.eye(3))
    assert class_similarity(str(tmp_path / "s.npy"), CLASSES).source == str(tmp_path / "s.npy")
    assert "is not there" in refusal(NotFoundError, str(tmp_path / "none.npy"))
