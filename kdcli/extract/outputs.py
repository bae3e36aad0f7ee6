"""From a teacher's raw outputs to the rows that the cache keeps."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np
from jaxtyping import Float, Float32, Int64

from kdcli.console import console
from kdcli.errors import BadDataError, UsageError
from kdcli.outputs import PIXELS, STATS, Output, raw_outputs, with_stats

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kdcli.models.spec import Model

STORAGE = {"float16": "<f2", "float32": "<f4"}
SMALL_IDS = 65535
"""Most classes whose numbers fit two bytes; the largest two-byte number is the fill value."""
ERROR_TEMPERATURES = (1.0, 4.0)
"""Where :func:`compression_error` looks: plain probabilities, and softened ones."""
_SMALLEST_TAIL = 1e-8
_HALF_MAX = float(np.finfo(np.float16).max)


@final
@dataclass(frozen=True, slots=True)
class Derived:
    """What is to be stored of a batch, on the device or copied to the host.

    Attributes:
        stored: per output its arrays, in (or, of unsigned numbers, as wide as) their storage types.
        largest: the largest absolute value of each raw output, NaN when there is one.
    """

    stored: "dict[str, dict[str, Tensor]]"
    largest: "dict[str, Tensor]"

    def mapped(self, change: "Callable[[Tensor], Tensor]") -> "Derived":
        """With every tensor changed."""
        stored = {
            name: {array: change(tensor) for array, tensor in arrays.items()}
            for name, arrays in self.stored.items()
        }
        return Derived(stored, {name: change(tensor) for name, tensor in self.largest.items()})


@final
@dataclass(frozen=True, slots=True)
class OutputPlan:
    """Which arrays of one teacher are kept, and how they are computed from its raw outputs.

    Attributes:
        name: the teacher's name, for messages.
        outputs: what is kept, in a fixed order.
        dtype: storage type of logits, features and maps.
        temperatures: temperatures of the kept logsumexp.
        label_columns: [classes of the data set] the teacher's class of each; None when it has others.
        arrays: row shape and storage type of every array, by name of the output it belongs to.
    """

    name: str
    outputs: tuple[Output, ...]
    dtype: str
    temperatures: tuple[float, ...]
    label_columns: Int64[np.ndarray, " c"] | None
    arrays: dict[str, dict[str, dict[str, Any]]]

    def derive(
        self,
        raw: Mapping[str, "Float32[Tensor, 'b ...']"],
        labels: Int64[np.ndarray, " b"],
        only: Collection[str] | None = None,
    ) -> dict[str, dict[str, np.ndarray]]:
        """The rows to store for one batch, on the host at once: :meth:`launch`, a copy, and :meth:`checked`.

        Args:
            raw: float32 ``logits``, ``features`` and ``maps.TAP``, uint8 ``pixels``, as a TeacherRunner gives them.
            labels: class numbers of the data set, -1 = unlabelled.
            only: names of the outputs wanted; default: all.

        Returns:
            Per output its arrays, as :attr:`arrays` declares them. The logsumexp at each temperature and the
            log-probabilities come from the fp32 logits, in double precision: half precision cannot give them.

        Raises:
            BadDataError: raw outputs are not finite, or too large for half precision.
        """
        import torch

        device = next((tensor.device for tensor in raw.values()), torch.device("cpu"))
        there = torch.as_tensor(labels, device=device)
        return self.checked(_on_host(self.launch(raw, there, self.columns_on(device), only)))

    def columns_on(self, device: "str | torch.device") -> "Int64[Tensor, ' c'] | None":
        """:attr:`label_columns` where the teacher runs; to be brought there once."""
        import torch

        return None if self.label_columns is None else torch.as_tensor(self.label_columns, device=device)

    def launch(
        self,
        raw: Mapping[str, "Float32[Tensor, 'b ...']"],
        labels: "Int64[Tensor, ' b']",
        columns: "Int64[Tensor, ' c'] | None",
        only: Collection[str] | None = None,
    ) -> "Derived":
        """What :meth:`derive` gives, where the raw outputs are; nothing waits for the device.

        Args:
            raw: see there.
            only: likewise.
            labels: class numbers on the device.
            columns: what :meth:`columns_on` gave.
        """
        import torch

        wanted = {output.name: output for output in self.outputs if only is None or output.name in only}
        with torch.inference_mode():
            values = {name: self._values(output, raw, labels, columns) for name, output in wanted.items()}
            checked = {name: values[name][each.payload] for name, each in wanted.items() if name != STATS}
            if "logits" in raw_outputs(wanted.values()):
                checked["logits"] = raw["logits"]  # also what top-k leaves out must be finite
            stored = {
                name: {array: self._as_stored(name, array, tensor) for array, tensor in arrays.items()}
                for name, arrays in values.items()
            }
            # Copied with the rest: to ask the device now would be to wait for it once more.
            return Derived(stored, {name: _largest(tensor) for name, tensor in checked.items()})

    def checked(self, derived: "Derived") -> dict[str, dict[str, np.ndarray]]:
        """What was launched, once it is on the host: the rows of each output's arrays.

        Raises:
            BadDataError: raw outputs are not finite, or too large for half precision.
        """
        for name, value in derived.largest.items():
            self._check(name, float(value), half=self.dtype == "float16" and name in derived.stored)
        return {
            name: {
                array: values.numpy().astype(self.arrays[name][array]["dtype"], copy=False)
                for array, values in arrays.items()
            }
            for name, arrays in derived.stored.items()
        }

    def _values(
        self, output: Output, raw: Mapping[str, "Tensor"], labels: "Tensor", columns: "Tensor | None"
    ) -> dict[str, "Tensor"]:
        """The arrays of one output, still in full precision."""
        if output.kind == STATS:
            return self._statistics(raw["logits"], labels, columns)
        if output.kind == "topk":
            values, ids = top_k(raw["logits"], output.top_k)
            return {"topk_ids": ids, "topk_values": values}
        return {output.payload: pooled(raw[output.raw], output.pool, output.pool_time)}

    def _statistics(
        self, logits: "Float32[Tensor, 'b c']", labels: "Tensor", columns: "Tensor | None"
    ) -> dict[str, "Tensor"]:
        import torch

        exact = logits.double()
        normaliser = exact.logsumexp(dim=1)
        arrays = {
            "lse": torch.stack([(exact / t).logsumexp(dim=1) for t in self.temperatures], dim=1),
            "logp_max": exact.amax(dim=1) - normaliser,
        }
        if columns is not None:
            picked = exact.gather(1, columns[labels.clamp(min=0)][:, None])[:, 0] - normaliser
            arrays["logp_label"] = picked.where(labels >= 0, float("nan"))
        return arrays

    def _as_stored(self, name: str, array: str, values: "Tensor") -> "Tensor":
        """The values in their storage type, still on the device (which need not know unsigned integers)."""
        import torch

        types = {"<f2": torch.float16, "<f4": torch.float32, "|u1": torch.uint8}
        return values.to(types.get(self.arrays[name][array]["dtype"], torch.int32)).contiguous()

    def _check(self, name: str, largest: float, half: bool) -> None:
        if not np.isfinite(largest):
            raise BadDataError(
                f"teacher '{self.name}' gives {name} that are not finite",
                "Check its weights, or try --amp off.",
            )
        if half and largest > _HALF_MAX:
            raise BadDataError(
                f"teacher '{self.name}' gives {name} up to {largest:.6g}, more than float16 holds (65504)",
                "Use --dtype float32.",
            )


def plan_outputs(
    name: str,
    model: "Model",
    outputs: Sequence[Output],
    dtype: str,
    temperatures: Sequence[float],
    class_names: tuple[str, ...] | None,
) -> OutputPlan:
    """Decide what is kept of a teacher; its maps are measured on one synthetic image.

    Args:
        name: the teacher's name.
        model: the teacher.
        outputs: what is to be kept; statistics come with logits and top-k.
        dtype: float16 or float32, for all but ids, statistics and pixels.
        temperatures: temperatures of the kept logsumexp.
        class_names: of the data set, in order; None when it has no labels.

    Raises:
        UsageError: the model does not give it: no classifier, fewer than K classes, no such tap.
    """
    from kdcli.models.taps import pooled_shape, require_outputs, tap_shapes, with_last_tap

    outputs = with_stats(with_last_tap(model, outputs))
    require_outputs(model, outputs)
    if model.preprocess.clips > 1 and any(output.kind == "maps" for output in outputs):
        raise UsageError(
            f"--keep maps: the maps of teacher '{name}' would be averaged over {model.preprocess.clips} clips, whose "
            "frames are other ones",
            "Leave maps, or clips:N of --eval-geometry, out.",
        )
    maps = tap_shapes(model, list(dict.fromkeys(output.tap for output in outputs if output.kind == "maps")))
    needs_columns = "logits" in raw_outputs(outputs)
    columns = label_columns(name, model, class_names) if needs_columns else None
    storage = STORAGE[dtype]
    arrays: dict[str, dict[str, dict[str, Any]]] = {}
    for output in outputs:
        if output.kind == STATS:
            arrays[output.name] = {"lse": _array([len(temperatures)], "<f4"), "logp_max": _array([], "<f4")}
            if columns is not None:
                arrays[output.name]["logp_label"] = _array([], "<f4")
            continue
        shape = {
            "logits": [model.num_classes],
            "topk": [output.top_k],
            "features": [model.num_features],
            "maps": pooled_shape(model, output, maps[output.tap]) if output.kind == "maps" else [],
            PIXELS: [*model.preprocess.shown, 3],
        }[output.kind]
        arrays[output.name] = {output.payload: _array(shape, "|u1" if output.kind == PIXELS else storage)}
        if output.kind == "topk":
            ids = "<u2" if model.num_classes <= SMALL_IDS else "<u4"
            arrays[output.name]["topk_ids"] = _array(shape, ids)
    return OutputPlan(name, outputs, dtype, tuple(temperatures), columns, arrays)


def top_k(logits: "Float32[Tensor, 'b c']", k: int) -> "tuple[Float32[Tensor, 'b k'], Int64[Tensor, 'b k']]":
    """The k largest logits, largest first, and their classes; of equal logits the lower class comes first.

    torch.topk leaves the order of equal values open, and a full stable sort takes five times as long at
    21,841 classes. So the largest are found among integers that are all different: the bits of the logit
    in an order-preserving form above, the class, counted from the end, below.
    """
    import torch

    bits = (logits + 0.0).view(torch.int32)  # + 0.0: -0.0 becomes 0.0, which it equals
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    last = logits.shape[1] - 1
    keys = (ordered << 32) | (last - torch.arange(last + 1, device=logits.device))
    ids = last - (keys.topk(k, dim=1).values & 0xFFFFFFFF)
    return logits.gather(1, ids), ids


def compression_error(
    raw_logits: "Float[Tensor, 'b c']",
    stored: Mapping[str, Mapping[str, np.ndarray]],
    temperatures: Sequence[float],
) -> dict[str, dict[str, float]]:
    """What storing costs: KL(softmax of the raw logits || softmax of what is stored), the mean over images.

    Of top-k, the probability that its classes leave over by the stored logsumexp is spread evenly over the
    other classes.

    Args:
        raw_logits: as the teacher gave them.
        stored: what :meth:`OutputPlan.derive` made of them.
        temperatures: of the columns of the stored ``lse``.

    Returns:
        In nats, for ``logits`` and ``topk`` as far as they are stored, at temperatures ``"1"`` and ``"4"`` (of
        top-k those that have a logsumexp).
    """
    import torch

    raw = raw_logits.detach().double().cpu()
    kinds = [kind for kind in ("logits", "topk") if kind in stored and (kind != "topk" or STATS in stored)]
    errors: dict[str, dict[str, float]] = {kind: {} for kind in kinds}
    for t in ERROR_TEMPERATURES:
        exact = (raw / t).log_softmax(dim=1)
        approximate = {}
        if "logits" in stored:
            rounded = torch.as_tensor(stored["logits"]["logits"].astype(np.float64))
            approximate["logits"] = (rounded / t).log_softmax(dim=1)
        if "topk" in errors and t in temperatures:
            lse = stored[STATS]["lse"][:, list(temperatures).index(t)]
            approximate["topk"] = _spread(stored["topk"], lse, t, raw.shape[1])
        for kind, found in approximate.items():
            divergence = torch.nn.functional.kl_div(found, exact, reduction="batchmean", log_target=True)
            errors[kind][f"{t:g}"] = float(divergence)
    return errors


def _spread(
    topk: Mapping[str, np.ndarray], lse: Float32[np.ndarray, " b"], temperature: float, classes: int
) -> "Float[Tensor, 'b c']":
    """Log-probabilities of all classes, from the largest logits and the logsumexp of all."""
    import torch

    ids = torch.as_tensor(topk["topk_ids"].astype(np.int64))
    values = torch.as_tensor(topk["topk_values"].astype(np.float64))
    kept = values / temperature - torch.as_tensor(lse.astype(np.float64))[:, None]
    # Rounding of the values may leave nothing, or less: log 0 would make the error infinite.
    tail = (1 - kept.exp().sum(dim=1, keepdim=True)).clamp_min(_SMALLEST_TAIL)
    others = (tail / max(classes - ids.shape[1], 1)).log().expand(-1, classes)
    return others.scatter(1, ids, kept).log_softmax(dim=1)


def pooled(values: "Float[Tensor, 'b ...']", side: int, time: int = 0) -> "Float[Tensor, 'b ...']":
    """A map [b, C, H, W] averaged over a grid of ``side`` x ``side`` places, as adaptive average pooling cuts it; 0:
    as it is. Of clips, [b, C, T, H, W], each frame's is, or ``time`` x ``side`` x ``side`` places."""
    import torch

    if not side:
        return values
    if time:
        return torch.nn.functional.adaptive_avg_pool3d(values, (time, side, side))
    flat = torch.nn.functional.adaptive_avg_pool2d(values.flatten(1, -3), side)
    return flat.reshape(*values.shape[:-2], side, side)


def _array(row_shape: list[int], dtype: str) -> dict[str, Any]:
    return {"row_shape": row_shape, "dtype": dtype}


def _largest(values: "Tensor") -> "Tensor":
    """The largest absolute value, as a tensor; NaN when there is one. Makes no copy of the values."""
    import torch

    low, high = values.aminmax()
    return torch.maximum(-low, high)


def _on_host(derived: Derived) -> Derived:
    """A copy on the CPU, all of it under way before one wait (torch makes its memory pinned)."""
    import torch

    device = next((tensor.device for tensor in derived.largest.values()), torch.device("cpu"))
    module = torch.get_device_module(device)
    copy, done = derived.mapped(lambda tensor: tensor.to("cpu", non_blocking=True)), module.Event()
    done.record(module.current_stream(device))
    done.synchronize()
    return copy


def label_columns(
    name: str, model: "Model", class_names: tuple[str, ...] | None
) -> Int64[np.ndarray, " c"] | None:
    """The teacher's class number of each class of the data set; None when it knows other classes."""
    if class_names is None:
        return None
    if model.class_names is not None:
        position = {label: number for number, label in enumerate(model.class_names)}
        if not set(class_names) <= set(position):
            return None
        return np.asarray([position[label] for label in class_names], np.int64)
    if model.num_classes == len(class_names):
        console.warn(
            f"teacher '{name}' has no class names but as many classes as the data set; "
            "taking its classes to be the data set's, in sorted order"
        )
        return np.arange(len(class_names))
    return None
