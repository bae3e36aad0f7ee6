"""``local-dir:PATH``: a folder whose config.json says of which library its network is."""

from typing import Final

from kdcli.errors import BadDataError, UsageError
from kdcli.models.architectures import Architecture
from kdcli.models.folder import CONFIG_FILE
from kdcli.models.frames import FramesArchitecture
from kdcli.models.grammar import TORCHVISION, ModelSpec
from kdcli.models.timm_models import TimmArchitecture, read_config
from kdcli.models.torchvision_models import TorchvisionArchitecture

_MOST_FRAMES: Final = 2**12


def open_folder(spec: ModelSpec) -> Architecture:
    """The architecture in a folder that kd, or timm, wrote.

    Raises:
        NotFoundError: the folder, or the architecture that it names, is not there.
        BadDataError: its config.json cannot be used.
    """
    if spec.file is None:
        raise UsageError(f"'{spec}' names no folder", "Write local-dir:PATH.")
    config = read_config(spec.file)
    own = str(config.get("architecture")).startswith(TORCHVISION)
    found: Architecture = TorchvisionArchitecture(spec, config) if own else TimmArchitecture(spec)
    frames = config.get("frames")
    if frames is None:
        return found
    if not isinstance(frames, int) or isinstance(frames, bool) or not 0 < frames <= _MOST_FRAMES:
        raise BadDataError(
            f"the {CONFIG_FILE} of '{spec}': frames is {frames!r}, not a number from 1 to {_MOST_FRAMES}",
            "Export the model anew.",
        )
    return FramesArchitecture(found, str(spec), frames)
