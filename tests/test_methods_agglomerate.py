"""agglomerate: standardisation, dropping, and its loss, against formulas written here and numpy."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kdcli.errors import BadDataError, ConfigError, UsageError
from kdcli.methods.agglomerate import Agglomeration, LevelPath
from kdcli.methods.agglomerate_options import AgglomerateOptions, teacher_weights
from kdcli.methods.base import Choice
from kdcli.methods.batch import Batch
from kdcli.methods.keyed import hashed, uniform
from kdcli.methods.levels import Level
from kdcli.methods.standardising import Standardisation, hadamard, mixing, moments_of
from kdcli.models.adaptors import CellRows
from kdcli.models.student import StudentOutput

WIDTHS = (192, 320, 384, 512, 640, 768, 1000, 1024, 1152, 1280, 1408, 1536, 2048, 2520)
STANDARDS = ("phi-s", "global", "channel", "none")


def correlated(count: int, width: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((count, width)) @ random.standard_normal((width, width))
    return mixed * 3 + 10 * random.standard_normal(width)


def standardised(x: np.ndarray, standard: str) -> Standardisation:
    module = Standardisation(x.shape[1], standard).double()  # type: ignore[arg-type]
    module.set(moments_of([x]), "x")
    return module


# --- statistics -------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(0, 99))
def test_moments_are_numpys_however_the_rows_come(sizes: list[int], seed: int) -> None:
    x = correlated(sum(sizes), 4, seed)
    found = moments_of(np.split(x, np.cumsum(sizes)[:-1]))
    np.testing.assert_allclose(found.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x.T), rtol=1e-9, atol=1e-9)
    assert found.count == len(x)


@pytest.mark.parametrize("width", [1, 2, 4, 12, 20, 28, 36, 44, *WIDTHS])
def test_a_hadamard_matrix_is_one(width: int) -> None:
    found = hadamard(width)
    assert found is not None
    assert set(np.unique(found)) <= {-1.0, 1.0}
    assert np.array_equal(found @ found.T, width * np.eye(width))


@pytest.mark.parametrize("width", [3, 6, 50, 92])
def test_without_one_the_matrix_is_orthogonal_and_the_same_again(width: int) -> None:
    assert hadamard(width) is None
    found = mixing(width)
    np.testing.assert_allclose(found @ found.T, np.eye(width), atol=1e-12)
    assert np.array_equal(found, mixing(width))


@pytest.mark.parametrize("width", [4, 8, 12, 64])
def test_after_phi_s_every_channel_has_variance_one(width: int) -> None:
    x = correlated(500, width)
    y = standardised(x, "phi-s")(torch.from_numpy(x)).double().numpy()
    np.testing.assert_allclose(y.var(axis=0, ddof=1), 1, rtol=2e-5)  # x is read as fp32
    np.testing.assert_allclose(y.mean(axis=0), 0, atol=2e-5)
    raw = np.square(x[1:] - x[:-1]).sum() / np.trace(np.cov(x.T)) * width
    assert np.square(np.diff(y, axis=0)).sum() == pytest.approx(raw, rel=1e-5)  # one scale in all directions


def test_channels_have_their_own_scale_and_global_has_one() -> None:
    x = correlated(300, 6)
    own = standardised(x, "channel")(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(own, (x - x.mean(0)) / x.std(0, ddof=1), rtol=1e-3, atol=1e-4)
    one = standardised(x, "global")(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(one, (x - x.mean(0)) / np.sqrt(x.var(0, ddof=1).mean()), rtol=1e-3, atol=1e-4)
    assert np.array_equal(standardised(x, "none")(torch.from_numpy(x)).numpy(), x.astype(np.float32))


@pytest.mark.parametrize("standard", STANDARDS)
@pytest.mark.parametrize("width", [6, 12])
def test_a_folded_layer_gives_what_undoing_the_standardisation_gives(standard: str, width: int) -> None:
    x = correlated(200, width)
    module = Standardisation(width, standard)  # type: ignore[arg-type]
    module.set(moments_of([x]), "x")
    layer, values = nn.Linear(5, width), torch.randn(7, 5)
    y = torch.from_numpy(x[:9]).float()
    torch.testing.assert_close(module.inverse(module(y)), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        module.folded(layer)(values), module.inverse(layer(values)), rtol=1e-4, atol=1e-4
    )
    # Lengths and angles are the teacher's.
    turned = module.turned(module(y)).double()
    np.testing.assert_allclose(
        (turned @ turned.T).numpy(), (x[:9] - x.mean(0)) @ (x[:9] - x.mean(0)).T, rtol=1e-3, atol=1e-2
    )


def test_what_is_constant_is_refused_and_a_constant_channel_is_told() -> None:
    x = np.tile(np.float16([1, 2000, -3]), (10, 1))
    with pytest.raises(BadDataError, match="the features of 'x' are the same for all images"):
        Standardisation(3, "phi-s").set(moments_of([x]), "the features of 'x'")
    x = correlated(50, 4)
    x[:, 2] = 7
    module = Standardisation(4, "channel")
    assert module.set(moments_of([x]), "x") == 1
    y = module(torch.from_numpy(x))
    assert torch.equal(y[:, 2], torch.zeros(50))
    torch.testing.assert_close(module.inverse(y), torch.from_numpy(x).float(), rtol=1e-4, atol=1e-4)
    assert Standardisation(4, "phi-s").set(moments_of([x]), "x") == 0


def test_statistics_are_no_parameters() -> None:
    path = LevelPath(Level("features", 1.0, (6,), None, (4,)), "phi-s", 3)
    assert {name.partition(".")[0] for name, _ in path.named_parameters()} == {"adaptor"}
    assert {f"standard.{name}" for name in ("mean", "scale", "rotation", "phi")} <= set(path.state_dict())


# --- cells ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "grid"), [((3, 4, 4), (2, 2)), ((2, 7, 5), (3, 2)), ((3, 16, 16), (7, 7)), ((2, 3, 3), (3, 3))]
)
def test_cells_are_those_of_adaptive_pooling(shape: tuple[int, int, int], grid: tuple[int, int]) -> None:
    maps = torch.randn(2, *shape)
    wanted = nn.functional.adaptive_avg_pool2d(maps, grid).flatten(2).transpose(1, 2)
    torch.testing.assert_close(CellRows(shape, grid)(maps), wanted, rtol=1e-5, atol=1e-6)


# --- dropping ---------------------------------------------------------------------------------


def splitmix(values: np.ndarray, seed: int, step: int) -> np.ndarray:
    """Steele et al. 2014, Fig. 17, in uint64."""

    def mixed(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        start = mixed(mixed(np.array([seed], np.uint64) + golden) + np.uint64(step) + golden)
        return mixed(values.astype(np.uint64) + start)


@given(st.integers(0, 2**62), st.integers(0, 10**6))
def test_draws_are_splitmix64s(seed: int, step: int) -> None:
    values = np.arange(50)
    wanted = splitmix(values, seed, step)
    assert np.array_equal(hashed(torch.from_numpy(values), seed, step).numpy().view(np.uint64), wanted)
    drawn = uniform(torch.from_numpy(values), seed, step).numpy()
    np.testing.assert_array_equal(drawn, (wanted >> np.uint64(40)) / np.float32(2**24))


def objective(weights: dict[str, float], **options: object) -> Agglomeration:
    paths = {name: [LevelPath(Level("features", 1.0, (4,), None, (4,)), "none", 0)] for name in weights}
    for (path,) in paths.values():
        path.adaptor = nn.Identity()  # type: ignore[assignment]
    torch.manual_seed(3)
    return Agglomeration(paths, weights, AgglomerateOptions(**options))  # type: ignore[arg-type]


def losses_of(found: Agglomeration, student: Tensor, teacher: dict[str, Tensor], index: Tensor) -> Tensor:
    batch = Batch(torch.full((len(index),), -1), index)
    outputs = {name: {"features": values} for name, values in teacher.items()}
    return found(StudentOutput(student, {}), outputs, batch)["loss"]


@pytest.mark.parametrize("drop", [0.0, 0.3, 1.0])
def test_the_loss_is_the_formula(drop: float) -> None:
    weights = {"a": 0.5, "b": 0.2, "c": 0.3}
    random = np.random.default_rng(0)
    student = random.standard_normal((40, 4)).astype(np.float32)
    teacher = {name: random.standard_normal((40, 4)).astype(np.float32) for name in weights}
    found = objective(weights, teacher_drop=drop, feature_loss="mse")
    index = torch.from_numpy(random.permutation(1000)[:40])
    table = np.stack([np.square(student - each).mean(1) for each in teacher.values()], axis=1)
    share = np.array(list(weights.values()))
    drawn = (splitmix(index.numpy()[:, None] * 3 + np.arange(3), found._seed, 0) >> np.uint64(40)) / 2**24
    counts = (drawn >= drop) | (np.arange(3) == (table * share).argmax(1)[:, None])
    wanted = ((table * share * counts).sum(1) / (share * counts).sum(1)).mean()
    given_teacher = {name: torch.from_numpy(each) for name, each in teacher.items()}
    loss = losses_of(found, torch.from_numpy(student), given_teacher, index)
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    assert counts.mean() == pytest.approx(1 - drop * 2 / 3, abs=0.1)


def test_an_image_has_the_same_draw_wherever_it_is_and_another_one_in_the_next_step() -> None:
    found, index = objective({"a": 0.5, "b": 0.5}), torch.arange(200)
    losses = torch.rand(200, 2)
    whole = found._kept(losses, index)
    order = torch.randperm(200)[:70]
    assert torch.equal(found._kept(losses[order], index[order]), whole[order])
    found._calls = 1
    assert not torch.equal(found._kept(losses, index), whole)
    found._pieces = 2  # two pieces of the first step
    assert torch.equal(found._kept(losses, index), whole)
    again = objective({"a": 0.5, "b": 0.5})
    again.load_state_dict(found.state_dict())
    again._pieces = 2
    assert torch.equal(again._kept(losses, index), whole)


def test_of_equal_losses_the_first_teacher_counts() -> None:
    found = objective({"a": 0.5, "b": 0.5}, teacher_drop=1.0)
    assert found._kept(torch.ones(5, 2), torch.arange(5)).tolist() == [[True, False]] * 5


@pytest.mark.parametrize("loss", ["unic", "radio", "mse"])
def test_the_teacher_itself_loses_nothing(loss: str) -> None:
    found = objective({"a": 0.5, "b": 0.5}, feature_loss=loss)
    x = torch.randn(6, 4)
    assert float(losses_of(found, x, {"a": x, "b": x}, torch.arange(6))) == pytest.approx(0, abs=1e-6)


def test_without_a_step_the_target_stays() -> None:
    """A frozen student's loss falls only by its adaptors: no gradient reaches what targets are made of."""
    path = LevelPath(Level("features", 1.0, (6,), None, (4,)), "phi-s", 8)
    path.standard.set(moments_of([correlated(40, 6)]), "x")
    target = torch.randn(5, 6, requires_grad=True)
    predicted, standard = path(StudentOutput(torch.randn(5, 4), {}), {"features": target})
    assert predicted.requires_grad
    assert not standard.requires_grad


# --- weights and options ----------------------------------------------------------------------


def weights_of(names: Sequence[str] = ("a", "b", "c"), **options: object) -> dict[str, float]:
    return teacher_weights(Choice(tuple(names), None, AgglomerateOptions(**options)))  # type: ignore[arg-type]


def test_weights_sum_to_one_and_a_pair_is_p1s() -> None:
    assert weights_of() == pytest.approx(dict.fromkeys("abc", 1 / 3))
    assert weights_of(teacher_weight=("b=2",)) == pytest.approx({"a": 0.25, "b": 0.5, "c": 0.25})
    assert weights_of(generalist="a") == pytest.approx({"a": 0.5, "b": 0.25, "c": 0.25})
    assert weights_of(generalist="a", old_new="1:3") == pytest.approx({"a": 0.25, "b": 0.375, "c": 0.375})
    told = weights_of(generalist="a", generalist_weight=1.5, teacher_weight=("b=3",))
    assert told == pytest.approx({"a": 0.75, "b": 0.25 * 3 / 4, "c": 0.25 / 4})
    assert weights_of(teacher_weight=("a=0",)) == pytest.approx({"a": 0, "b": 0.5, "c": 0.5})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_weight": ("d=2",)}, "--teacher-weight d: no teacher of that name"),
        ({"generalist": "aa"}, "--generalist aa: no teacher of that name is learnt from. Did you mean 'a'?"),
        ({"generalist_weight": 0.5}, "no --generalist is named"),
        ({"generalist": "a", "teacher_weight": ("a=2",)}, "both weigh it"),
    ],
)
def test_weights_that_mean_nothing_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        weights_of(**options)
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "options",
    [
        {"teacher_weight": ("a",)}, {"teacher_weight": ("a=x",)}, {"teacher_weight": ("a=-1",)},
        {"teacher_weight": ("a=1", "a=2")}, {"teacher_weight": ("a=inf",)}, {"teacher_drop": 1.5}, {"levels": "none"},
        {"student_tap": ("a", "b")}, {"adaptor_layers": 3}, {"old_new": "1:2", "generalist_weight": 1.0},
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises((ValueError, ConfigError)):
        AgglomerateOptions(**options)  # type: ignore[arg-type]
