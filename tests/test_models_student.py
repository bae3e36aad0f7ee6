"""Students: heads, frozen batch norms, optimiser groups."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from kdcli.errors import UsageError
from kdcli.models.spec import open_model
from kdcli.models.student import Student

IMAGES = torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def student(name: str = "test_resnet", **heads: int) -> Student:
    torch.manual_seed(5)
    return Student(open_model(name, weights="random", num_classes=4, image_size=48), heads)


def test_every_head_is_linear_on_the_shared_features() -> None:
    subject = student(a=2, b=7).eval()
    output = subject(IMAGES)
    assert {name: logits.shape[1] for name, logits in output.logits.items()} == {"label": 4, "a": 2, "b": 7}
    assert torch.equal(output.logits["label"], subject.network.plain(IMAGES))
    wanted = nn.functional.linear(output.features, subject.heads["b"].weight, subject.heads["b"].bias)
    assert torch.equal(output.logits["b"], wanted)


def test_only_the_heads_asked_for_are_computed() -> None:
    subject = student(a=2, b=7)
    assert list(subject(IMAGES, ["b"]).logits) == ["b"]
    subject(IMAGES, ["b"]).logits["b"].sum().backward()
    assert subject.heads["b"].weight.grad is not None
    assert subject.heads["a"].weight.grad is None
    assert subject.heads["label"].weight.grad is None


def test_names_of_heads_may_hold_what_module_names_may_not() -> None:
    names = {"resnet50.a1_in1k": 2, "keys": 3, "type": 4, "a/b": 5}
    subject = Student(open_model("test_resnet", weights="random", image_size=48), names)
    assert list(subject.heads) == ["label", *names]


def test_heads_follow_torchs_seed_and_its_own_linear_layers() -> None:
    first, second = student(a=3), student(a=3)
    assert torch.equal(first.heads["a"].weight, second.heads["a"].weight)
    torch.manual_seed(5)
    model = open_model("test_resnet", weights="random", num_classes=4, image_size=48)
    assert torch.equal(first.heads["a"].weight, nn.Linear(model.num_features, 3).weight)


def test_frozen_batch_norms_keep_their_statistics_through_train_but_scale_and_shift_learn() -> None:
    subject = student()
    subject.set_batchnorm(frozen=True)
    subject.train()
    assert subject.network.plain.training
    before = {name: buffer.clone() for name, buffer in subject.named_buffers()}
    subject(IMAGES).logits["label"].sum().backward()
    assert all(torch.equal(before[name], buffer) for name, buffer in subject.named_buffers())
    norms = [each for each in subject.modules() if isinstance(each, nn.BatchNorm2d)]
    assert norms
    assert all(norm.weight.grad is not None and not norm.training for norm in norms)


def test_thawed_batch_norms_learn_again() -> None:
    subject = student()
    subject.set_batchnorm(frozen=True)
    subject.set_batchnorm(frozen=False)
    subject.train()
    before = {name: buffer.clone() for name, buffer in subject.named_buffers()}
    subject(IMAGES)
    assert any(not torch.equal(before[name], buffer) for name, buffer in subject.named_buffers())


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_parameter_groups_hold_every_parameter_once_with_its_rate_and_decay(name: str) -> None:
    subject = student(name, a=2)
    groups = subject.parameter_groups(backbone_lr=0.001, head_lr=0.01, weight_decay=0.1)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(subject.parameters())) == len(found)
    for name_, parameter in subject.named_parameters():
        in_head = any(parameter is each for head in subject.heads.values() for each in head.parameters())
        decays = parameter.ndim > 1 and not any(
            word in name_ for word in ("pos_embed", "cls_token", "reg_token")
        )
        assert found[id(parameter)] == (0.01 if in_head else 0.001, 0.1 if decays else 0.0), name_
    torch.optim.SGD(groups, lr=1.0)


def test_a_copy_shares_nothing_and_a_state_dict_restores_all() -> None:
    subject = student(a=2)
    duplicate = copy.deepcopy(subject)
    assert duplicate.network is duplicate.model.network
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.zero_()
    assert subject.heads["a"].weight.any()
    duplicate.load_state_dict(subject.state_dict(), strict=True)
    subject.eval(), duplicate.eval()
    assert torch.equal(subject(IMAGES).logits["a"], duplicate(IMAGES).logits["a"])


def test_a_network_without_classes_has_no_label_head(tmp_path: Path) -> None:
    model = open_model("test_resnet", weights="random", num_classes=0, image_size=48)
    assert list(Student(model, {"a": 2})(IMAGES).logits) == ["a"]


def test_a_second_label_head_is_refused() -> None:
    with pytest.raises(UsageError, match="label"):
        student(label=3)


def test_heads_do_not_change_the_networks_own_names() -> None:
    assert set(student(a=2).network.plain.state_dict()) == set(timm.create_model("test_resnet").state_dict())
