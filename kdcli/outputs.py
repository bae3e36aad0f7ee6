"""What a cache can keep of a teacher, as ``--keep`` writes it.

    logits                 raw, before softmax
    topk:K                 the K largest logits and their classes
    features               pooled: the input of the last linear layer
    maps:TAP[,TAP...]      feature maps, by timm's feature_info names
    pixels@eval            what it is shown of view 0, before its normalisation

Any of them may end in ``@eval``: kept of view 0 only; pixels must. With logits or top-k come small exact statistics
(``stats``: fp32 logsumexp at each temperature, largest log-probability, log-probability of the label).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, final

from kdcli.errors import UsageError

STATS: Final = "stats"
"""Kind that is kept beside logits or top-k without being asked for."""
MAPS: Final = "maps."
"""What the name of a feature map begins with; its tap follows."""
PIXELS: Final = "pixels"
"""Kind, and array, that holds view 0 as a teacher is shown it: the same for all that share its render."""
_TAP = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_FORMS = "Kinds are logits, topk:K, features, maps:TAP,TAP, each with @eval or without, and pixels@eval."


@final
@dataclass(frozen=True, slots=True, order=True)
class Output:
    """One kind of output of a teacher.

    Attributes:
        kind: which.
        top_k: K of ``topk``, else 0.
        tap: name of the layer of ``maps``, else empty.
        eval_only: kept of view 0 only.
    """

    kind: Literal["logits", "topk", "features", "maps", "pixels", "stats"]
    top_k: int = 0
    tap: str = ""
    eval_only: bool = False

    @property
    def name(self) -> str:
        """What commits, claims and messages call it: ``logits``, ``topk``, ``maps.layer4``, ..."""
        return MAPS + self.tap if self.kind == "maps" else self.kind

    def __str__(self) -> str:
        text = {"topk": f"topk:{self.top_k}", "maps": f"maps:{self.tap}"}.get(self.kind, self.kind)
        return f"{text}@eval" if self.eval_only else text


def parse_keep(items: Iterable[str]) -> tuple[Output, ...]:
    """Read the words of ``--keep``, already split at commas; words after ``maps:`` are more taps.

    Returns:
        The outputs in a fixed order, ``stats`` among them where logits or top-k are kept.

    Raises:
        UsageError: an unknown kind, K below 1, a tap without a name, or the same kind twice.
    """
    found: dict[str, Output] = {}
    in_maps = False
    for item in items:
        word, at, views = item.strip().partition("@")
        if at and views != "eval":
            raise UsageError(f"--keep {item}: views are @eval or left out (all views)", _FORMS)
        kind, colon, rest = word.partition(":")
        if kind == "maps" and colon:
            in_maps, output = True, _tap(rest, item, bool(at))
        elif in_maps and not colon and word not in ("logits", "features", PIXELS):
            output = _tap(word, item, bool(at))
        else:
            in_maps, output = False, _plain(kind, colon, rest, item, bool(at))
        if output.name in found:
            raise UsageError(f"--keep names {output.name} twice", "Name every output once.")
        found[output.name] = output
    return with_stats(found.values())


def with_stats(outputs: Iterable[Output]) -> tuple[Output, ...]:
    """The outputs in a fixed order, with the statistics that come with logits or top-k."""
    chosen = {output.name: output for output in outputs if output.kind != STATS}
    sources = [chosen[name] for name in ("logits", "topk") if name in chosen]
    if sources:
        chosen[STATS] = Output("stats", eval_only=all(source.eval_only for source in sources))
    rank = ("logits", "topk", "stats", "features", "maps", PIXELS)
    return tuple(sorted(chosen.values(), key=lambda output: (rank.index(output.kind), output.tap)))


def raw_outputs(outputs: Iterable[Output]) -> tuple[str, ...]:
    """What a forward must give for these: names among ``logits``, ``features``, ``maps.TAP``, ``pixels``, each once."""
    names = (output.name if output.kind in ("features", "maps", PIXELS) else "logits" for output in outputs)
    return tuple(dict.fromkeys(names))


def _tap(name: str, item: str, eval_only: bool) -> Output:
    if not _TAP.fullmatch(name):
        raise UsageError(f"--keep {item} names no tap", "For example --keep maps:layer3,layer4")
    return Output("maps", tap=name, eval_only=eval_only)


def _plain(kind: str, colon: str, rest: str, item: str, eval_only: bool) -> Output:
    if kind == "topk":
        if not rest.isdecimal() or int(rest) < 1:
            raise UsageError(f"--keep {item}: top-k needs K of at least 1", "For example --keep topk:32")
        return Output("topk", top_k=int(rest), eval_only=eval_only)
    if kind == "logits" and not colon:
        return Output("logits", eval_only=eval_only)
    if kind == "features" and not colon:
        return Output("features", eval_only=eval_only)
    if kind == PIXELS and not colon:
        if not eval_only:
            raise UsageError(f"--keep {item}: pixels are kept of view 0 only", "Write pixels@eval.")
        return Output("pixels", eval_only=True)
    raise UsageError(f"--keep {item} is no kind of output", _FORMS)


def keep_word(array: str) -> str:
    """What ``--keep`` calls the output that an array belongs to, where its name alone tells."""
    head, slash, tap = array.partition("/")
    if slash:
        return f"{head}:{tap}"
    if array == PIXELS:
        return f"{PIXELS}@eval"
    return "features" if array == "features" else "topk:32" if array.startswith("topk_") else "logits"
