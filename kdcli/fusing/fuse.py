"""The step behind ``kd fuse-teachers``: configuration in, one result document a joint teacher out.

OUT/run.json                          identity of the run; marks the folder as kd's
OUT/metrics.jsonl                     one line per epoch
OUT/state/                            the last checkpoint, until the run is finished
OUT/fused.json, fused.safetensors     the joint teacher, which kd-fused:OUT opens
OUT/result.json                       the result; its presence marks the run as finished

With ``--heads per-data-set`` each joint teacher has such a folder, OUT/NAME.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import numpy as np
import torch

from kdcli.cache.cacheset import CacheSet
from kdcli.console import console
from kdcli.devices import device_errors
from kdcli.errors import UsageError
from kdcli.files import make_folder, occupied, storage_errors, write_json
from kdcli.fusing.config import FuseConfig
from kdcli.fusing.parents import Source, choose_parents
from kdcli.fusing.samples import Samples, choose_samples, data_set_names
from kdcli.fusing.training import Training, settings_of
from kdcli.fusing.writeback import require_name, write_back
from kdcli.geometry import Render
from kdcli.methods.cells import require_same_places, source_sizes
from kdcli.models.fused import FusionSpec, JointTeacher
from kdcli.models.fused_folder import DESCRIPTION, WEIGHTS, Ancestor, FusedFolder
from kdcli.models.fused_network import joint_spec
from kdcli.options.resolving import created_by
from kdcli.precision import Precision, require_repeatable, told
from kdcli.runtime import StopFlag, stop_signals, versions
from kdcli.training.out import require_folder
from kdcli.training.rundir import finished_result, forget_checkpoints, identity_of, require_same_identity
from kdcli.training.settings import resolve_device
from kdcli.training.student import draw_xavier

DEFAULT_CHANNELS = 512
"""Of every fused map: those of ResNet-18 before its pooling (P4 section 4.5)."""


def fuse_teachers(config: FuseConfig) -> dict[str, Any]:
    """Train one joint teacher, or one per data set, and write their outputs into the caches if asked to.

    A rerun resumes; of a finished run it returns the result.

    Returns:
        ``{"joint": {NAME: result}}``: one result, named after OUT, with shared heads; else one a data set.

    Raises:
        KdError: see :mod:`kdcli.errors`; StoppedEarly after a signal.
    """
    names = data_set_names(config.cache)
    repeated = [name for name, times in Counter(config.teacher).items() if times > 1]
    if repeated or len(config.teacher) < 2:
        given = f"'{repeated[0]}' twice" if repeated else f"only '{config.teacher[0]}'"
        raise UsageError(
            f"a joint teacher fuses at least two teachers, each once; given is {given}",
            "Give --teacher A --teacher B.",
        )
    parts = {config.out.absolute().name: config}
    if config.heads == "per-data-set":
        parts = {
            name: config.model_copy(
                update={"cache": (cache,), "test": config.test[i : i + 1], "out": config.out / name}
            )
            for i, (name, cache) in enumerate(zip(names, config.cache, strict=True))
        }
    if config.deterministic:
        require_repeatable(config.device)
    with stop_signals() as stop:
        # Every refusal comes before any training.
        prepared = {name: _prepare(part, config) for name, part in parts.items()}
        return {"joint": {name: _complete(part, stop) for name, part in prepared.items()}}


@final
@dataclass(frozen=True, slots=True)
class _Prepared:
    """One joint teacher, decided but not begun."""

    config: FuseConfig
    samples: Samples
    folder: FusedFolder
    identity: dict[str, Any]
    created: dict[str, Any]
    device: str
    precision: Precision


def _prepare(config: FuseConfig, typed: FuseConfig | None = None) -> _Prepared:
    """Decide on one joint teacher; ``typed`` is the whole command where this is one of several."""
    require_folder(config.out)
    caches = CacheSet.open((*config.cache, *config.test), config.verify)
    sources = choose_parents(caches, config.teacher, config.levels, config.taps)
    samples = choose_samples(config, caches, sources)
    channels = config.map_channels
    if not channels and config.levels != "L1":
        channels = (DEFAULT_CHANNELS,) * (int(config.levels[1]) - 1)
    spec = FusionSpec(
        levels=config.levels,
        parents=tuple(source.parent for source in sources),
        heads={name: len(classes) for name, classes in samples.classes.items()},
        dropout=config.dropout,
        projection=config.projection,
        space=config.space,
        map_channels=channels,
        size=None if config.map_size is None else _meeting(sources, config.map_size),
    )
    spec.require_valid()
    settings = settings_of(config)
    recorded = None if config.overwrite else identity_of(config.out).get("amp")
    device, amp = resolve_device(config.device, config.amp, recorded=recorded)
    typed, config = typed or config, config.model_copy(update={"amp": amp})
    _require_pieces(config, samples)
    if config.levels != "L1":
        shown = {f"'{source.record.name}'": Render.of(source.record.preprocess) for source in sources}
        rows = np.concatenate((samples.train, samples.validation, samples.test))
        cells = spec.size or spec.parents[0].size or (1, 1)
        require_same_places(shown, cells[-2:], source_sizes(caches, rows))
    folder = FusedFolder(
        spec,
        tuple(
            Ancestor(
                s.record.name, s.record.id, s.record.spec, s.record.architecture, s.record.weights,
                s.record.declared_preprocess, s.array,
            )
            for s in sources
        ),
        samples.classes,
    )  # fmt: skip
    identity = {
        "step": "fuse-teachers",
        **config.identity(),
        **asdict(settings),
        "caches": list(caches.cache_ids),
        "parents": {ancestor.name: [ancestor.id, ancestor.array] for ancestor in folder.ancestors},
        "spec": spec.document(),
    }
    if config.write_back is not None:
        require_name(config, caches, folder)
    if not config.overwrite:
        require_same_identity(config.out, identity)
    return _Prepared(
        config, samples, folder, identity, created_by(typed), device, Precision(amp, config.deterministic)
    )


def _meeting(sources: Sequence[Source], side: int) -> tuple[int, int] | tuple[int, int, int]:
    """At which maps meet: of clips, at the fewest frames of one of them."""
    sizes = [source.parent.size for source in sources if source.parent.size is not None]
    frames = [size[0] for size in sizes if len(size) == 3]
    return (min(frames), side, side) if frames else (side, side)


def _require_pieces(config: FuseConfig, samples: Samples) -> None:
    """Refuse pieces of fewer than two images, which BatchNorm has nothing to average over."""
    images = len(samples.train) // samples.steps(config.batch_size)
    least = 1 if config.levels == "L1" else 2
    if images // config.accumulate < least:
        larger = f"--batch-size {least * config.accumulate} or more, or "
        raise UsageError(
            f"a step has {images} images, too few for {config.accumulate} pieces"
            + (": BatchNorm needs two in each" if least == 2 else ""),
            f"Use {larger if len(samples.train) >= least * config.accumulate else ''}fewer pieces (--accumulate).",
        )


def _complete(prepared: _Prepared, stop: StopFlag) -> dict[str, Any]:
    config, out = prepared.config, prepared.config.out
    make_folder(out)
    with occupied(out):
        if config.overwrite and (out / "run.json").is_file():
            _remove(prepared)
        result = finished_result(out)
        if result is None:
            result = _train(prepared, stop)
        else:
            forget_checkpoints(out)
            console.note(f"{out} is finished: nothing to train")
    if config.write_back is not None:
        with Precision("off").applied(prepared.device), device_errors("writing back"):
            written = write_back(config, prepared.folder, prepared.samples, stop)
        result = {**result, "written_back": written}
    return result


def _train(prepared: _Prepared, stop: StopFlag) -> dict[str, Any]:
    config, samples, folder, out = prepared.config, prepared.samples, prepared.folder, prepared.config.out
    if not (out / "run.json").is_file():  # first of all files: it says whose folder this is
        write_json(out / "run.json", {"identity": prepared.identity, "versions": versions()})
    torch.manual_seed(config.seed)
    joint = JointTeacher(folder.spec)
    if config.init == "xavier":
        draw_xavier(joint)
    size = sum(parameter.numel() for parameter in joint.parameters())
    console.note(
        f"joint teacher {config.levels} of {', '.join(f'{a.name} {a.array}' for a in folder.ancestors)}: "
        f"{size / 1e6:.2f} M parameters, heads {dict(folder.spec.heads)}; {len(samples.train)} images, "
        f"{config.epochs} epochs of batches of {config.batch_size}, {config.optimizer} at {config.lr:g} "
        f"({config.schedule}), weight decay {config.weight_decay:g}, "
        f"dropout {config.dropout:g}; {told(prepared.device, prepared.precision.amp)}"
    )
    if config.select == "best-on-test":
        console.warn("the epoch is selected on the test set: its test accuracy is no estimate (P4 did so)")
    with prepared.precision.applied(prepared.device), device_errors("fusing"):
        chosen = Training(config, samples, joint, out, prepared.device).run(stop)
    folder.write(out, joint)
    result = {
        "out": str(out.absolute()),
        "teachers": _specs(prepared),
        "levels": config.levels,
        "heads": dict(folder.spec.heads),
        "parents": {ancestor.name: ancestor.id for ancestor in folder.ancestors},
        "images": {
            "train": len(samples.train), "validation": len(samples.validation), "test": len(samples.test),
        },
        "parameters": size,
        "select": {"by": config.select, "epoch": chosen["epoch"], "on_test": config.select == "best-on-test"},
        "metrics": chosen["metrics"],
        "tests": _tests(prepared),
        **prepared.precision.document(),
        "created": prepared.created,
    }  # fmt: skip
    write_json(out / "result.json", result)
    forget_checkpoints(out)
    return result


def _specs(prepared: _Prepared) -> dict[str, str]:
    """The teacher spec of each head; a joint teacher of one needs no name after it."""
    out, folder = prepared.config.out.absolute(), prepared.folder
    return {head: joint_spec(folder, out, head) for head in folder.spec.heads}


def _tests(prepared: _Prepared) -> dict[str, str]:
    """Digest of the keys of each data set's test images: other results on the same images are found by it."""
    heads = list(prepared.folder.spec.heads)
    members = prepared.samples.caches.members[len(heads) :]
    return {head: member.manifest.data.keys for head, member in zip(heads, members, strict=False)}


def _remove(prepared: _Prepared) -> None:
    """Remove what kd wrote, the marker last."""
    out = prepared.config.out
    forget_checkpoints(out)
    with storage_errors(out):
        for name in ("result.json", DESCRIPTION, WEIGHTS, "metrics.jsonl", "run.json"):
            (out / name).unlink(missing_ok=True)
