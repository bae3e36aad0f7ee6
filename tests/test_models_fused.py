"""The joint teacher's layers, against the formulas written out with torch's own functions."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from kdcli.documents import from_document
from kdcli.errors import UsageError
from kdcli.models.fused import FusionSpec, JointTeacher, Parent

L1 = FusionSpec("L1", (Parent("a", 6), Parent("b", 10)), {"digits": 10, "x.y": 3})
MAPS = (Parent("a", 6, (8, 8)), Parent("b", 10, (8, 8)), Parent("c", 4, (8, 8)))
L2 = FusionSpec("L2", MAPS, {"digits": 10}, space=12, map_channels=(5,))
L3 = replace(L2, levels="L3", map_channels=(5, 7))
L4 = replace(L2, levels="L4", map_channels=(5, 7, 9))


def embeddings(rows: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(rows, parent.channels) for parent in L1.parents]


def maps(rows: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(rows, parent.channels, *parent.size) for parent in MAPS if parent.size]


def test_l1_is_one_linear_layer_over_the_concatenated_embeddings() -> None:
    joint = JointTeacher(L1).eval()
    inputs = embeddings()
    found = joint(inputs, "x.y")
    together = torch.cat(inputs, 1)
    weights = joint.state_dict()
    assert set(weights) == {f"heads.{n}.{part}" for n in (0, 1) for part in ("weight", "bias")}
    assert torch.equal(found.features, together)
    torch.testing.assert_close(found.logits, together @ weights["heads.1.weight"].T + weights["heads.1.bias"])
    assert found.maps == {}


def test_dropout_is_on_the_head_s_input_and_only_in_training() -> None:
    joint = JointTeacher(L1)
    inputs = embeddings()
    torch.manual_seed(7)
    found = joint(inputs, "digits").logits
    torch.manual_seed(7)
    dropped = F.dropout(torch.cat(inputs, 1), 0.8)
    torch.testing.assert_close(found, joint.heads[0](dropped))
    assert torch.equal(joint.eval()(inputs, "digits").logits, joint(inputs, "digits").logits)


def test_l1_projects_only_embeddings_of_another_width() -> None:
    joint = JointTeacher(replace(L1, projection=10))
    assert [name for name in joint.state_dict() if "adaptors" in name] == [
        "adaptors.0.weight",
        "adaptors.0.bias",
    ]
    assert joint(embeddings(), "digits").features.shape == (4, 20)


def test_l2_is_the_released_code_s_order_of_layers() -> None:
    joint = JointTeacher(L2).train()
    joint.dropout.p = 0.0
    inputs = maps()
    found = joint(inputs, "digits")
    w = joint.state_dict()

    def bn(values: torch.Tensor) -> torch.Tensor:  # fresh: weight 1, bias 0, the batch's own statistics
        mean, var = values.mean((0, 2, 3), keepdim=True), values.var((0, 2, 3), unbiased=False, keepdim=True)
        return (values - mean) / (var + 1e-5).sqrt()

    def conv(values: torch.Tensor, name: str) -> torch.Tensor:
        flat = torch.einsum("bchw,dc->bdhw", values, w[f"{name}.weight"][:, :, 0, 0])
        return flat + w[f"{name}.bias"][:, None, None]

    together = torch.cat([conv(bn(each), f"adaptors.{n}.1") for n, each in enumerate(inputs)], 1)
    distilled = F.gelu(bn(conv(F.gelu(bn(together)), "blocks.0.2")))
    torch.testing.assert_close(found.maps["fused"], distilled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.features, distilled.flatten(2).mean(2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits, joint.heads[0](found.features))


@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        (L2, {"fused": (5, 8, 8)}),
        (L3, {"fused": (5, 4, 4), "fused2": (7, 8, 8)}),
        (L4, {"fused": (5, 2, 2), "fused2": (7, 4, 4), "fused3": (9, 8, 8)}),
    ],
)
def test_every_level_has_its_map_and_fused_is_the_last(spec: FusionSpec, shapes: dict[str, tuple]) -> None:
    found = JointTeacher(spec).eval()(maps(), "digits")
    assert {name: tuple(each.shape[1:]) for name, each in found.maps.items()} == shapes
    assert torch.equal(found.features, found.maps["fused"].mean((2, 3)))


@pytest.mark.parametrize("spec", [L1, L2, L3, L4, replace(L1, projection=10)])
def test_every_weight_learns(spec: FusionSpec) -> None:
    joint = JointTeacher(replace(spec, heads={"digits": 10}, dropout=0.0))
    inputs = embeddings() if spec.levels == "L1" else maps()
    F.cross_entropy(joint(inputs, "digits").logits, torch.tensor([0, 1, 2, 3])).backward()
    assert [name for name, each in joint.named_parameters() if each.grad is None] == []


def test_a_spec_survives_json() -> None:
    for spec in (L1, L2, L4, replace(L2, size=(4, 4))):
        again = from_document(FusionSpec, json.loads(json.dumps(spec.document())), "fused.json")
        assert again == spec
        JointTeacher(again).load_state_dict(JointTeacher(spec).state_dict())


def test_maps_of_unequal_size_meet_only_where_asked() -> None:
    unequal = replace(L2, parents=(*MAPS[:2], Parent("c", 4, (7, 7))))
    with pytest.raises(UsageError, match="a 8x8, b 8x8, c 7x7"):
        JointTeacher(unequal)
    inputs = [*maps()[:2], torch.ones(4, 4, 7, 7)]
    found = JointTeacher(replace(unequal, size=(7, 7))).eval()(inputs, "digits")
    assert found.maps["fused"].shape == (4, 5, 7, 7)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (replace(L1, parents=L1.parents[:1]), "at least two teachers, given: a"),
        (replace(L1, parents=(Parent("a", 6), Parent("a", 6))), "at least two"),
        (replace(L1, heads={}), "data set with labels"),
        (replace(L1, dropout=1.0), "not in"),
        (replace(L1, map_channels=(5,)), "L1 fuses embeddings"),
        (replace(L2, projection=5), "projection is for L1"),
        (replace(L3, map_channels=(5,)), "fused, fused2"),
        (replace(L2, parents=(*MAPS, Parent("d", 4))), "none is given of d"),
    ],
)
def test_what_cannot_be_built_is_refused(spec: FusionSpec, says: str) -> None:
    with pytest.raises(UsageError, match=says) as refused:
        JointTeacher(spec)
    assert refused.value.hint


def test_an_unknown_head_is_refused() -> None:
    with pytest.raises(UsageError, match="no head 'mnist'"):
        JointTeacher(L1)(embeddings(), "mnist")
