"""``--write-back NAME``: a joint teacher's outputs, computed from its parents' cached outputs; no parent runs."""

import shlex
import time
from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Int64

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.claims import Patience
from kdcli.cache.layout import Unit
from kdcli.cache.matching import class_numbers
from kdcli.cache.pixels import as_pixels
from kdcli.cache.provenance import OutputRecord, TeacherRecord
from kdcli.cache.reader import CacheReader
from kdcli.cache.writer import CacheWriter
from kdcli.console import console
from kdcli.data.drawing import fingerprint
from kdcli.errors import CacheMissingError, IdentityError, StoppedEarly
from kdcli.extract.outputs import STORAGE, OutputPlan, compression_error
from kdcli.fusing.config import FuseConfig
from kdcli.fusing.samples import Samples, data_set_names
from kdcli.geometry import Render
from kdcli.models.fused import JointTeacher
from kdcli.models.fused_folder import FusedFolder
from kdcli.models.fused_network import FUSED, joint_preprocess, joint_spec
from kdcli.outputs import MAPS, STATS, Output, with_stats
from kdcli.runtime import StopFlag, pick_device, versions
from kdcli.types import differences

TEMPERATURES = (1.0, 2.0, 4.0, 5.0)


def write_back(config: FuseConfig, folder: FusedFolder, samples: Samples, stop: StopFlag) -> dict[str, str]:
    """Add the joint teacher to every cache that it learnt from or was tested on, each with its own head.

    Every view is written that all parents are kept of; what is there already is left as it is.

    Returns:
        The joint teacher's id in each cache.

    Raises:
        IdentityError: a cache holds another teacher of that name.
        StoppedEarly: a signal arrived; the finished blocks are kept.
    """
    names = data_set_names(config.cache)
    joint = folder.joint(config.out).to(pick_device(config.device))
    ids = {}
    for number, member in enumerate(samples.caches.members):
        one = _Writing(config, folder, joint, names[number % len(names)], member)
        ids[str(member.layout.root)] = one.run(stop)
    return ids


def require_name(config: FuseConfig, caches: CacheSet, folder: FusedFolder) -> None:
    """Refuse ``--write-back NAME`` where a cache already has another teacher of that name: before any training.

    Whether a joint teacher of the same parents is the same one is known only when it is trained.

    Raises:
        IdentityError: that.
    """
    name = config.write_back or ""
    wanted = {
        "architecture": f"{FUSED}/{folder.spec.levels}",
        "dtype": config.dtype,
        "parents": made_of(folder),
    }
    for member in caches.members:
        known = member.teachers.get(name)
        if known is None:
            continue
        recorded = {
            "architecture": known.architecture,
            "dtype": known.dtype,
            "parents": known.compute.get("parents"),
        }
        _require_equal(member, name, recorded, wanted)


def _require_equal(
    member: CacheReader, name: str, recorded: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    found = differences(recorded, wanted)
    if not found:
        return
    hint = "Write back under another name: --write-back OTHER"
    if str(recorded["architecture"]).startswith(FUSED):
        hint += f"; or remove that one: kd cache rm {shlex.quote(str(member.layout.root))} --teacher {name}"
    raise IdentityError(f"{member.layout.root} holds another teacher '{name}'", hint, found)


def made_of(folder: FusedFolder) -> dict[str, str]:
    """The parents' ids by name."""
    return {ancestor.name: ancestor.id for ancestor in folder.ancestors}


@final
class _Writing:
    """One cache being filled with the outputs of one head of the joint teacher."""

    def __init__(
        self, config: FuseConfig, folder: FusedFolder, joint: JointTeacher, head: str, reader: CacheReader
    ) -> None:
        self._config, self._folder, self._joint, self._head = config, folder, joint, head
        self._reader = reader
        self._device = next(joint.parameters()).device
        self._parts = [reader.part_of(a.name, a.array) for a in folder.ancestors]
        self._plan = self._planned()
        self._labels = reader.labels
        self._absent = {row: why for part in self._parts for row, why in reader.absent(part).items()}

    def run(self, stop: StopFlag) -> str:
        """Fill what is missing; returns the joint teacher's id."""
        record, reader = self._record(), self._reader
        known = reader.teachers.get(record.name)
        if known is not None:
            _require_equal(reader, record.name, known.gate(), record.gate())
        with CacheWriter(reader.layout.root, reader.manifest) as writer:
            recorded = writer.add_teacher(record)
            parts = [f"{record.name}/{kind}" for kind in record.outputs]
            patience = Patience()
            while missing := self._by_place(writer, parts):
                if any([self._try(writer, place, units, stop) for place, units in missing.items()]):
                    patience = Patience()
                else:  # others are at the rest
                    patience.wait(writer.claims.holder(next(iter(missing.values()))[0]))
            for part in parts:
                writer.finish(part)
        console.note(f"{reader.layout.root}: '{record.name}' keeps {', '.join(recorded.keep)}")
        return recorded.id

    @staticmethod
    def _by_place(writer: CacheWriter, parts: list[str]) -> dict[tuple[int, int], list[Unit]]:
        found: dict[tuple[int, int], list[Unit]] = {}
        for part in parts:
            for unit in writer.missing(part):
                found.setdefault((unit.block, unit.group), []).append(unit)
        return found

    def _try(self, writer: CacheWriter, place: tuple[int, int], units: list[Unit], stop: StopFlag) -> bool:
        """Compute one block of one group of views, unless others are at it."""
        if stop:
            raise StoppedEarly(
                "stopped by a signal while writing back; all finished blocks are kept",
                "Run the same command again to go on.",
            )
        mine = [unit for unit in units if writer.claims.acquire(unit)]
        try:
            open_units = [unit for unit in mine if not writer.is_done(unit)]
            if open_units:
                self._compute(writer, place, open_units)
        finally:
            writer.claims.release(mine)
        return bool(mine)

    def _compute(self, writer: CacheWriter, place: tuple[int, int], units: list[Unit]) -> None:
        begun, (block, group) = time.monotonic(), place
        known = writer.recorded_content(block)
        if known is None:  # the parents are there, so this is a cache whose records were taken away
            raise CacheMissingError(
                f"{self._reader.layout.root}: block {block} has no record of its images",
                "Run the kd cache-teachers command that made the cache again; it fills what is missing.",
            )
        span = self._reader.manifest.rows_of(block)
        rows = np.arange(span.start, span.stop)
        kept = writer.store.views(units[0].part)
        found: dict[str, list[dict[str, np.ndarray]]] = {}
        error: dict[str, dict[str, float]] = {}
        for view in self._reader.manifest.views_of(group, kept):
            by_kind, cost = self._view(rows, view)
            error = error or cost
            for kind, kept_arrays in by_kind.items():
                found.setdefault(kind, []).append(kept_arrays)
        gone = [(row, why) for row, why in sorted(self._absent.items()) if row in span]
        for unit in units:
            specs = writer.specs(unit.part)
            arrays = {n: np.stack([v[n] for v in found[unit.kind]], axis=1) for n in found[unit.kind][0]}
            for name, values in arrays.items():
                values[[row - span.start for row, _ in gone]] = specs[name].fill
            made: dict[str, Any] = {"versions": versions(), "fused": made_of(self._folder)}
            if unit.kind in error:
                made["kl"] = error[unit.kind]
            writer.publish(unit, arrays, known[0], gone, made, time.monotonic() - begun)

    def _view(
        self, rows: Int64[np.ndarray, " r"], view: int
    ) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, dict[str, float]]]:
        """The rows of one block and view, batch by batch, and what rounding costs in the first batch."""
        pieces: list[dict[str, dict[str, np.ndarray]]] = []
        error: dict[str, dict[str, float]] = {}
        for start in range(0, len(rows), self._config.batch_size):
            some = rows[start : start + self._config.batch_size]
            raw = self._raw(some, view)
            pieces.append(self._plan.derive(raw, self._labels[some]))
            error = error or compression_error(raw["logits"], pieces[-1], TEMPERATURES)
        joined = {
            kind: {name: np.concatenate([piece[kind][name] for piece in pieces]) for name in arrays}
            for kind, arrays in pieces[0].items()
        }
        return joined, error

    def _raw(self, rows: Int64[np.ndarray, " b"], view: int) -> dict[str, torch.Tensor]:
        lost = [place for place, row in enumerate(rows.tolist()) if row in self._absent]
        inputs = []
        for ancestor in self._folder.ancestors:
            values = self._reader.gather(ancestor.name, ancestor.array, rows, view)
            values[lost] = 0  # dropped images are NaN in the cache, and become so again when they are written
            inputs.append(torch.from_numpy(values).to(self._device).float())
        with torch.inference_mode():
            output = self._joint(inputs, self._head)
        maps = {MAPS + name: values for name, values in output.maps.items()}
        return {"logits": output.logits, "features": output.features, **maps}

    # --- what it is --------------------------------------------------------------------------------

    def _planned(self) -> OutputPlan:
        """What is kept: logits, features and every fused map, of the views that all parents are kept of."""
        spec, reader = self._folder.spec, self._reader
        eval_only = any(reader.store.views(part) < reader.manifest.views for part in self._parts)
        taps = [Output("maps", tap=name, eval_only=eval_only) for name in spec.map_names]
        both = [Output("logits", eval_only=eval_only), Output("features", eval_only=eval_only)]
        outputs = with_stats([*both, *taps])
        with torch.inference_mode():
            dummy = [
                torch.zeros(1, parent.channels, *(parent.size or ()), device=self._device)
                for parent in spec.parents
            ]
            example = self._joint(dummy, self._head)
        storage = STORAGE[self._config.dtype]
        arrays: dict[str, dict[str, dict[str, Any]]] = {
            STATS: {
                "lse": {"row_shape": [len(TEMPERATURES)], "dtype": "<f4"},
                "logp_max": {"row_shape": [], "dtype": "<f4"},
                "logp_label": {"row_shape": [], "dtype": "<f4"},
            },
            "logits": {"logits": _array(example.logits, storage)},
            "features": {"features": _array(example.features, storage)},
        }
        for name, values in example.maps.items():
            arrays[MAPS + name] = {f"maps/{name}": _array(values, storage)}
        own = reader.manifest.data.class_names or ()
        columns = class_numbers(own, self._folder.classes[self._head])[:-1]
        name = self._config.write_back or ""
        return OutputPlan(name, outputs, self._config.dtype, TEMPERATURES, columns, arrays)

    def _record(self) -> TeacherRecord:
        """Who the joint teacher is: what ``kd cache-teachers --teacher NAME=kd-fused:DIR`` would record."""
        folder, plan = self._folder, self._plan
        preprocess = joint_preprocess(folder)
        return TeacherRecord(
            name=plan.name,
            spec=joint_spec(folder, self._config.out.absolute(), self._head),
            architecture=f"{FUSED}/{folder.spec.levels}",
            weights=folder.digest(self._joint, self._head),
            dtype=plan.dtype,
            amp="off",
            declared_preprocess=preprocess.document(),
            num_classes=folder.spec.heads[self._head],
            num_features=self._joint.num_features,
            class_names=folder.classes[self._head],
            temperatures=plan.temperatures,
            pixels=as_pixels(fingerprint(Render.of(preprocess))),
            compute={
                "batch_size": self._config.batch_size,
                "device": self._device.type,
                "threads": torch.get_num_threads(),
                "versions": versions(),
                "parents": made_of(folder),
            },
            outputs={
                output.name: OutputRecord(
                    kind=output.kind,
                    tap=output.tap,
                    eval_only=output.eval_only,
                    arrays=plan.arrays[output.name],
                )
                for output in plan.outputs
            },
        )


def _array(values: torch.Tensor, dtype: str) -> dict[str, Any]:
    return {"row_shape": list(values.shape[1:]), "dtype": dtype}
