"""What kd finds on this machine and in this job: versions, devices, folders, limits, scheduler, extras.

Looks and never changes anything; what is broken is described, not raised.
"""

import os
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, final

from kdcli._version import __version__
from kdcli.devices import Device, graphics, processor
from kdcli.documents import declared
from kdcli.errors import KdError
from kdcli.results import Result
from kdcli.runtime import parse_shard, processor_count, worker_count

PACKAGES = (
    "torch", "torchvision", "timm", "accelerate", "zarr", "h5py", "numpy", "scipy", "scikit-learn", "pillow",
    "safetensors", "huggingface-hub", "pydantic", "typer", "rich",
)  # fmt: skip
HUB_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HOME", "HF_HUB_CACHE")
SCHEDULER = {
    "array": (
        "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN",
        "SLURM_ARRAY_TASK_STEP",
    ),
    "srun": ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_NTASKS"),
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"),
}  # fmt: skip
"""What each value of ``--shard`` reads, and what else its scheduler sets."""

_FEW_FILES = 1024
_LITTLE_SHARED_GB = 1.0
_LITTLE_SPACE_GB = 1.0


@final
@dataclass(frozen=True, slots=True)
class Folder:
    """A place kd writes to; ``free_gb`` is that of its file system."""

    path: str
    exists: bool
    writable: bool
    free_gb: float | None


@final
@dataclass(frozen=True, slots=True)
class ShardReading:
    """What one value of ``--shard`` would mean here.

    Attributes:
        variables: those of its scheduler that are set.
        gives: ``i/n``; None where kd would refuse.
        reason: why it would.
    """

    variables: Mapping[str, str]
    gives: str | None
    reason: str | None


@final
@dataclass(frozen=True, slots=True)
class Extra:
    """An optional part of kd: its packages with the versions that are here (None: missing)."""

    installed: bool
    packages: Mapping[str, str | None]
    command: str


@final
@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong, and what to do."""

    message: str
    hint: str


@final
@dataclass(frozen=True, slots=True)
class Checkup(Result):
    """All that ``kd doctor`` shows.

    Attributes:
        versions: of kd, Python, the platform and the packages that do the work; None: not installed.
        cuda: version that torch was built for, whether it can use a device, and CUDA_VISIBLE_DEVICES.
        devices: what ``--device`` can name.
        processors: this job may use, the machine has, and decode processes kd would start.
        folders: ``cache`` (stamps of verified caches) and ``cwd``.
        codecs: versions of what decodes JPEG; ``libjpeg_turbo`` is null where Pillow was built with another libjpeg.
        hub: Hugging Face variables as they are set, and what follows from them.
        shards: by value of ``--shard``.
        limits: open files (soft, hard) and shared memory, which DataLoader workers need; None: unknown.
        extras: optional parts of kd.
        problems: in order of weight; none of them stops ``kd doctor``.
    """

    versions: Mapping[str, str | None]
    cuda: Mapping[str, Any]
    devices: tuple[Device, ...]
    processors: Mapping[str, int]
    folders: Mapping[str, Folder]
    codecs: Mapping[str, str | None]
    hub: Mapping[str, Any]
    shards: Mapping[str, ShardReading]
    limits: Mapping[str, Any]
    extras: Mapping[str, Extra]
    problems: tuple[Problem, ...]

    def document(self) -> dict[str, Any]:
        """As JSON."""
        document: dict[str, Any] = declared(self)
        return document


def examine() -> Checkup:
    """Look at everything."""
    problems: list[Problem] = []
    versions = _versions()
    cuda, devices = _devices(problems)
    folders = _folders(problems)
    return Checkup(
        versions=versions,
        cuda=cuda,
        devices=devices,
        processors={
            "available": processor_count(),
            "total": os.cpu_count() or 1,
            "workers": worker_count(None),
        },
        folders=folders,
        codecs=_codecs(problems),
        hub=_hub(),
        shards={name: _shard(name) for name in SCHEDULER},
        limits=_limits(problems),
        extras=_extras(),
        problems=tuple(problems),
    )


# --- versions and extras ----------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> dict[str, str | None]:
    import platform

    return {
        "kd": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{package: _version(package) for package in PACKAGES},
    }


def _extras() -> dict[str, Extra]:
    """Optional parts, as the installed kd declares them."""
    try:
        package = metadata.metadata("kdcli")
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return {}
    requirements = package.get_all("Requires-Dist") or []
    extras = {}
    for name in package.get_all("Provides-Extra") or []:
        mark = re.compile(rf"""\bextra\s*==\s*["']{re.escape(name)}["']""")
        wanted = [text for text in requirements if mark.search(text)]
        packages = {match[0]: _version(match[0]) for text in wanted if (match := re.match(r"[\w.-]+", text))}
        extras[name] = Extra(None not in packages.values(), packages, f"pip install 'kdcli[{name}]'")
    return extras


# --- devices ----------------------------------------------------------------------------------


def _devices(problems: list[Problem]) -> tuple[dict[str, Any], tuple[Device, ...]]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    cuda: dict[str, Any] = {"built": None, "usable": False, "visible": visible}
    try:
        import torch
    except (ImportError, OSError) as error:
        problems.append(Problem(f"torch cannot be imported: {error}", "Reinstall it: pip install kdcli"))
        return cuda, (processor(),)
    cuda |= {"built": torch.version.cuda or torch.version.hip, "usable": torch.cuda.is_available()}
    found = [processor()]
    if cuda["usable"]:
        found += [graphics(index) for index in range(torch.cuda.device_count())]
    elif Path("/proc/driver/nvidia/version").exists() or Path("/dev/kfd").exists():
        built = f"was built for {cuda['built']}" if cuda["built"] else "is a CPU-only build"
        problems.append(
            Problem(
                f"there is a GPU driver, but torch ({built}) cannot use a device",
                "Check nvidia-smi, CUDA_VISIBLE_DEVICES and the job's --gres; or install a torch that fits the driver.",
            )
        )
    return cuda, tuple(found)


# --- decoding ---------------------------------------------------------------------------------


def _codecs(problems: list[Problem]) -> dict[str, str | None]:
    from PIL import features

    found = {
        "pillow": _version("pillow"),
        **{name: features.version(name) for name in ("jpg", "libjpeg_turbo")},
    }
    if found["libjpeg_turbo"] is None:
        problems.append(
            Problem(
                "Pillow was built without libjpeg-turbo: it decodes JPEGs several times slower, maybe to other pixels",
                "Use the wheel from PyPI: pip install --force-reinstall --only-binary :all: pillow",
            )
        )
    return found


# --- folders and limits -----------------------------------------------------------------------


def _folders(problems: list[Problem]) -> dict[str, Folder]:
    from platformdirs import user_cache_path

    places = {
        "cache": (user_cache_path("kd"), "Set XDG_CACHE_HOME to a folder that can be written."),
        "cwd": (_here(), "Run kd where you may write, or give absolute paths to --cache and --out."),
    }
    found = {}
    for name, (path, hint) in places.items():
        folder = found[name] = _folder(path)
        if not folder.writable:
            problems.append(Problem(f"the {name} folder {path} cannot be written", hint))
        elif folder.free_gb is not None and folder.free_gb < _LITTLE_SPACE_GB:
            problems.append(
                Problem(
                    f"only {folder.free_gb} GB are free in {path} ({name})",
                    "Free some space, or go elsewhere.",
                )
            )
    return found


def _here() -> Path:
    try:
        return Path.cwd()
    except OSError:  # removed under our feet
        return Path(os.environ.get("PWD", "."))


def _folder(path: Path) -> Folder:
    """Tries to write, in the nearest parent that is there, a file without a name: modes alone tell lies."""
    import shutil

    nearest = path
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(b"kd")
        writable = True
    except OSError:
        writable = False
    try:
        free = round(shutil.disk_usage(nearest).free / 1e9, 1)
    except OSError:
        free = None
    return Folder(str(path), path.is_dir(), writable, free)


def _limits(problems: list[Problem]) -> dict[str, Any]:
    found: dict[str, Any] = {"open_files": None, "open_files_hard": None, "shared_memory_gb": None}
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        unlimited = resource.RLIM_INFINITY
        found |= {
            "open_files": None if soft == unlimited else soft,
            "open_files_hard": None if hard == unlimited else hard,
        }
        if soft != unlimited and soft < _FEW_FILES:
            problems.append(
                Problem(
                    f"only {soft} files may be open at once: a large cache is remapped often",
                    "ulimit -n 4096",
                )
            )
    shared = Path("/dev/shm")
    if shared.is_dir():
        import shutil

        found["shared_memory_gb"] = size = round(shutil.disk_usage(shared).total / 1e9, 2)
        if size < _LITTLE_SHARED_GB:
            problems.append(
                Problem(
                    f"/dev/shm holds {size} GB: decode processes hand their batches over through it",
                    "docker run --shm-size 8g, or --workers 0.",
                )
            )
    return found


# --- the job ----------------------------------------------------------------------------------


def _hub() -> dict[str, Any]:
    given = os.environ
    offline = _is_true(given.get("HF_HUB_OFFLINE") or given.get("TRANSFORMERS_OFFLINE"))
    home = given.get("HF_HOME") or str(Path(given.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    home = os.path.expandvars(Path(home).expanduser())
    return {
        "models_offline": offline,
        "datasets_offline": _is_true(given["HF_DATASETS_OFFLINE"])
        if "HF_DATASETS_OFFLINE" in given
        else offline,
        "home": home,
        "cache": given.get("HF_HUB_CACHE") or str(Path(home) / "hub"),
        "variables": {name: given[name] for name in HUB_VARIABLES if name in given},
    }


def _is_true(value: str | None) -> bool:
    return (value or "").upper() in {"1", "ON", "YES", "TRUE"}


def _shard(name: str) -> ShardReading:
    variables = {key: os.environ[key] for key in SCHEDULER[name] if key in os.environ}
    try:
        return ShardReading(variables, str(parse_shard(name)), None)
    except KdError as error:
        return ShardReading(variables, None, error.message)
    except ValueError as error:  # a variable that is no number
        return ShardReading(variables, None, f"--shard {name}: {error}")
