"""On which terms a model's weights may be used, where that is known."""

from contextlib import suppress
from importlib import import_module

from kdcli.errors import KdError
from kdcli.models.grammar import ModelSpec


def licence_of(spec: str) -> str | None:
    """What timm or the model's own configuration says of its licence; None: nothing.

    Args:
        spec: of a teacher.
    """
    try:
        parsed = ModelSpec.parse(spec)
    except KdError:  # a cache of another kd
        return None
    found = None
    if parsed.kind == "timm":
        from timm.models import get_pretrained_cfg

        found = getattr(get_pretrained_cfg(parsed.name), "license", None)
    elif parsed.kind == "hf-hub":
        from huggingface_hub import HfApi

        name, _, revision = parsed.name.partition("@")
        with suppress(
            import_module("huggingface_hub.errors").HTTPError, ValueError
        ):  # it is gone, private, or the hub does not answer
            card = HfApi().model_info(name, revision=revision or None, timeout=10).card_data
            found = card and (card.get("license_name") or card.get("license"))
    return str(found) if found else None
