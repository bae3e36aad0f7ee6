"""``local-dir:PATH``: a folder whose config.json says of which library its network is."""

from kdcli.errors import UsageError
from kdcli.models.architectures import Architecture
from kdcli.models.grammar import TORCHVISION, ModelSpec
from kdcli.models.timm_models import TimmArchitecture, read_config
from kdcli.models.torchvision_models import TorchvisionArchitecture


def open_folder(spec: ModelSpec) -> Architecture:
    """The architecture in a folder that kd, or timm, wrote.

    Raises:
        NotFoundError: the folder, or the architecture that it names, is not there.
        BadDataError: its config.json cannot be used.
    """
    if spec.file is None:
        raise UsageError(f"'{spec}' names no folder", "Write local-dir:PATH.")
    config = read_config(spec.file)
    if str(config.get("architecture")).startswith(TORCHVISION):
        return TorchvisionArchitecture(spec, config)
    return TimmArchitecture(spec)
