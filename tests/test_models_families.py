"""The papers' networks, and small ones of many families, all the way: cache, train, export, open again."""

import gc
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import make_folder
from torchvision import models as torchvision_models

import kdcli.models.network as network_module
from kdcli.cache.cacheset import CacheSet
from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.models.classifiers import TimmClassifier, TorchvisionClassifier
from kdcli.models.export import export_model
from kdcli.models.network import Classifier
from kdcli.models.spec import Model, open_model, weights_sha256
from kdcli.models.student import Student
from kdcli.training.config import StudentConfig
from kdcli.training.train import train_student
from kdcli.types import Preprocess

P3_STUDENTS = (  # Tables 5 and 6
    "xcit_large_24_p16_224", "vit_base_patch16_224", "pit_b_224", "vit_relpos_medium_patch16_224", "pit_xs_224",
    "pit_xs_distilled_224", "resnext101_32x16d", "senet154", "wide_resnet50_2", "resnet101", "resnetv2_50", "resnet34",
    "resnetv2_50x1_bit", "mixer_l16_224", "mixer_b16_224", "resmlp_36_224", "resmlp_24_224", "resmlp_12_224",
    "convnext_small",
)  # fmt: skip
P3_TEACHERS = (
    "convnext_large", "volo_d4_224", "regnety_320", "vgg13", "regnetx_320", "twins_svt_large", "resnext101_32x8d",
    "swin_s3_base_224", "twins_pcpvt_large", "volo_d2_224", "dla102", "resnext50_32x4d", "vit_small_patch16_224",
    "gmlp_s16_224", "coat_lite_mini", "mixnet_l", "regnety_006", "mixnet_s", "xcit_nano_12_p8_224",
)  # fmt: skip
P2 = ("mobilenetv3_large_100", "torchvision/alexnet", "torchvision/googlenet", "resnet18", "resnet50")
P4 = (
    "resnet18", "efficientnet_b0", "seresnext26d_32x4d", "convnextv2_tiny", "swinv2_tiny_window8_256", "fastvit_sa24",
)  # fmt: skip
PAPERS = tuple(dict.fromkeys((*P3_STUDENTS, *P3_TEACHERS, *P2, *P4)))


def on_meta(name: str) -> tuple[Classifier, tuple[int, int]]:
    """A network without memory, so that a hundred million weights cost nothing, and the size of its input."""
    if name.startswith("torchvision/"):
        short = name.partition("/")[2]
        extra = {"aux_logits": False, "init_weights": False} if short == "googlenet" else {}
        return TorchvisionClassifier(torchvision_models.get_model(short, **extra), extra), (224, 224)
    plain: Any = timm.create_model(name)
    return TimmClassifier(plain), tuple(plain.pretrained_cfg["input_size"][1:])


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_networks_give_logits_and_features_and_take_further_heads(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their shapes; that the values are the network's own is tested on small ones of the same classes."""
    monkeypatch.setattr(network_module, "nearly_equal", lambda one, other: one.shape == other.shape)
    with torch.device("meta"):
        classifier, size = on_meta(name)
        width = classifier.check(size, name)
        assert width > 0, classifier.without
        assert classifier.num_classes == 1000
        preprocess = Preprocess(size, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 0.875, "center")
        model = Model(classifier, name, name, preprocess, 1000, width, None)
        student = Student(model, {"teacher": 7}).train()
        output = student(torch.empty(2, 3, *size))
    assert {head: tuple(logits.shape) for head, logits in output.logits.items()} == {
        "label": (2, 1000),
        "teacher": (2, 7),
    }
    assert output.features.shape == (2, width)


FAMILIES = [
    ("hiera_tiny_224", None), ("levit_128s", None), ("efficientformer_l1", None), ("efficientformerv2_s0", None),
    ("repvit_m0_9", 64), ("volo_d1_224", 64), ("xcit_nano_12_p16_224", 64), ("mambaout_femto", 64),
    ("vit_wee_patch16_reg1_gap_256", 64), ("dm_nfnet_f0", 64), ("nf_regnet_b0", 64), ("fastvit_t8", 64),
    ("repvgg_a0", 64), ("mobileone_s0", 64), ("crossvit_9_240", None), ("swiftformer_xs", None),
    ("sequencer2d_s", 64), ("dla46x_c", 64), ("resnetv2_18", 64), ("pit_ti_distilled_224", None),
    ("coat_lite_tiny", 64), ("convnext_atto", 64), ("edgenext_xx_small", 64), ("ghostnet_050", 64),
    ("tiny_vit_5m_224", 64), ("test_maxvit", None), ("test_coatnet", None), ("res2net50_14w_8s", 64),
    ("poolformer_s12", 64), ("caformer_s18", 64), ("mixnet_s", 64), ("regnety_002", 64),
    ("densenet121", 64), ("gmlp_ti16_224", None), ("resmlp_12_224", None), ("inception_next_atto", 64),
    ("shvit_s1", 64), ("starnet_s1", 64), ("deit_tiny_distilled_patch16_224", 64), ("twins_svt_small", 64),
    ("swinv2_cr_tiny_ns_224", None), ("mobilevit_xxs", 64), ("vovnet39a", 64), ("torchvision/alexnet", 64),
    ("torchvision/googlenet", 64), ("torchvision/squeezenet1_1", 64),
]  # fmt: skip


def settle(model: Model) -> None:
    """Fill the running statistics of BatchNorm: with those of a fresh network, logits of some reach 1e13."""
    for module in model.network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the mean of all batches, of which there is one
    model.network.train()
    with torch.no_grad():
        model.network(torch.randn(8, 3, *model.preprocess.size))
    model.network.eval()


@pytest.mark.parametrize(("name", "size"), FAMILIES)
def test_a_family_goes_from_cache_to_student_and_back(tmp_path: Path, name: str, size: int | None) -> None:
    make_folder(tmp_path / "images", per_class=4, size=28)
    torch.manual_seed(0)
    teacher = open_model(name, weights="random", num_classes=3, image_size=size)
    assert teacher.num_features, teacher.network.without
    settle(teacher)
    export_model(teacher, tmp_path / "teacher", ["class0", "class1", "class2"])
    spec = f"local-dir:{tmp_path / 'teacher'}"
    common: dict[str, Any] = {"data": str(tmp_path / "images"), "workers": 0, "device": "cpu"}
    cache = tmp_path / "c.kd"
    cache_teachers(
        CacheConfig(
            cache=cache,
            teacher=(f"t={spec}",),
            views="eval",
            batch_size=4,
            keep=("logits", "features"),
            **common,
        )
    )
    assert CacheSet.open([cache]).teacher("t").num_features == teacher.num_features
    del teacher
    gc.collect()
    train_student(
        StudentConfig(
            student=spec,
            method="cd",
            cache=(cache,),
            out=tmp_path / "run",
            epochs=1,
            batch_size=6,
            lr=1e-6,  # at the default rate random networks without skip connections end in logits that are no numbers
            **common,
        )
    )
    before, again = (open_model(text) for text in (spec, f"local-dir:{tmp_path / 'run' / 'export'}"))
    images = torch.randn(2, 3, *again.preprocess.size)
    old, new = before.network.plain.state_dict(), again.network.plain.state_dict()
    assert old.keys() == new.keys()
    assert any(not torch.equal(old[key], new[key]) for key in old)
    if name.startswith("torchvision/"):
        return  # plain torch opens it: test_models_heads
    with torch.inference_mode():
        network = timm.create_model(f"local-dir:{tmp_path / 'run' / 'export'}", pretrained=True).eval()
        # Not to the bit: of pit_ti_distilled_224 the last one differed here, with equal weights; the cause is open.
        torch.testing.assert_close(again.network(images), network(images), rtol=1e-5, atol=1e-6)
        assert weights_sha256(again.network.plain) == weights_sha256(network)
        assert again.network(images).isfinite().all()
