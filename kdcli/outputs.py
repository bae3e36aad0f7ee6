"""What a cache can keep of a teacher, as ``--keep`` writes it.

    logits                 raw, before softmax
    topk:K                 the K largest logits and their classes
    features               pooled: the input of the last linear layer
    maps:TAP[,TAP...]      feature maps, by the names of layers
    tokens                 the map of the last tap: what its features are pooled from
    pixels@eval            what it is shown of view 0, before its normalisation

Maps and tokens may be followed by ``@poolN``: averaged over an N x N grid before they are stored; those of clips
also by ``@poolTxN``: over T x N x N. Any of them may end
in ``@eval``: kept of view 0 only; pixels must. With logits or top-k come small exact statistics
(``stats``: fp32 logsumexp at each temperature, largest log-probability, log-probability of the label).
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final, Literal, final

from kdcli.errors import UsageError

STATS: Final = "stats"
"""Kind that is kept beside logits or top-k without being asked for."""
MAPS: Final = "maps."
"""What the name of a feature map begins with; its tap follows."""
PIXELS: Final = "pixels"
"""Kind, and array, that holds view 0 as a teacher is shown it: the same for all that share its render."""
TOKENS: Final = "tokens"
"""Word for the map of a teacher's last tap, which is called otherwise in each; see :func:`resolved`."""
POOL: Final = "@pool"
"""What stands between the tap of a pooled map and the side of its grid."""
_TAP = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_POOL = re.compile(r"pool(?:([1-9][0-9]{0,3})x)?([1-9][0-9]{0,3})")
_FORMS = (
    "Kinds are logits, topk:K, features, maps:TAP,TAP, tokens, each with @eval or without, and pixels@eval; "
    "maps and tokens also with @poolN, of clips @poolTxN."
)


@final
@dataclass(frozen=True, slots=True, order=True)
class Output:
    """One kind of output of a teacher.

    Attributes:
        kind: which.
        top_k: K of ``topk``, else 0.
        tap: name of the layer of ``maps``, else empty; also of ``tokens`` of a teacher that is not known yet.
        pool: side of the grid that a map is averaged over; 0: it is kept as it is.
        eval_only: kept of view 0 only.
        pool_time: of clips, over how many parts of the time a map that is pooled is averaged, too; 0: over none.
    """

    kind: Literal["logits", "topk", "features", "maps", "pixels", "stats"]
    top_k: int = 0
    tap: str = ""
    eval_only: bool = False
    pool: int = 0
    pool_time: int = 0

    @property
    def name(self) -> str:
        """What commits, claims and messages call it: ``logits``, ``maps.layer4``, ``maps.layer4@pool7``, ..."""
        return MAPS + self.place if self.kind == "maps" else self.kind

    @property
    def place(self) -> str:
        """What tells a map from all others of its teacher: its tap, and how it is pooled (``layer4@pool7``)."""
        return (self.tap or TOKENS) + self.grid

    @property
    def grid(self) -> str:
        """How a map is pooled: ``@pool7``, ``@pool1x7``; empty: it is not."""
        return f"{POOL}{f'{self.pool_time}x' * bool(self.pool_time)}{self.pool}" if self.pool else ""

    @property
    def payload(self) -> str:
        """Name of the array with its values."""
        return {"topk": "topk_values", "maps": f"maps/{self.place}"}.get(self.kind, self.kind)

    @property
    def raw(self) -> str:
        """What a forward must give for it: ``logits``, ``features``, ``maps.TAP`` or ``pixels``."""
        if self.kind == "maps":
            return MAPS + self.tap
        return self.kind if self.kind in ("features", PIXELS) else "logits"

    def __str__(self) -> str:
        maps = f"maps:{self.place}" if self.tap else self.place
        text = {"topk": f"topk:{self.top_k}", "maps": maps}.get(self.kind, self.kind)
        return f"{text}@eval" if self.eval_only else text


def parse_keep(items: Iterable[str]) -> tuple[Output, ...]:
    """Read the words of ``--keep``, already split at commas; words after ``maps:`` are more taps.

    Returns:
        The outputs in a fixed order, ``stats`` among them where logits or top-k are kept.

    Raises:
        UsageError: an unknown kind, K below 1, a tap without a name, a pooling of what is no map, or the same kind
            twice.
    """
    found: dict[str, Output] = {}
    in_maps = False
    for item in items:
        word, eval_only, grid = _modified(item)
        kind, colon, rest = word.partition(":")
        if kind == "maps" and colon:
            in_maps, output = True, _tap(rest, item, eval_only)
        elif in_maps and not colon and word not in ("logits", "features", TOKENS, PIXELS):
            output = _tap(word, item, eval_only)
        else:
            in_maps, output = False, _plain(kind, colon, rest, item, eval_only)
        output = replace(output, pool_time=grid[0], pool=grid[1])
        if grid[1] and output.kind != "maps":
            raise UsageError(
                f"--keep {item}: only maps have places to pool over",
                f"Leave {output.grid} out, or keep maps:TAP{output.grid} or {TOKENS}{output.grid}.",
            )
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
    return tuple(
        sorted(chosen.values(), key=lambda each: (rank.index(each.kind), each.tap, each.pool, each.pool_time))
    )


def raw_outputs(outputs: Iterable[Output]) -> tuple[str, ...]:
    """What a forward must give for these: names among ``logits``, ``features``, ``maps.TAP``, ``pixels``, each once."""
    return tuple(dict.fromkeys(output.raw for output in outputs))


def resolved(outputs: Iterable[Output], last_tap: Callable[[], str]) -> tuple[Output, ...]:
    """The outputs of one teacher, ``tokens`` by the name of the last tap.

    Args:
        outputs: as they were asked for.
        last_tap: its name; asked for only where there are tokens.

    Raises:
        UsageError: the same map was asked for by its name, too.
    """
    found: dict[str, Output] = {}
    for output in outputs:
        own = replace(output, tap=last_tap()) if output.kind == "maps" and not output.tap else output
        if own.name in found:
            raise UsageError(
                f"--keep names {own.name} twice: {TOKENS} are that map here", "Leave one of them out."
            )
        found[own.name] = own
    return tuple(found.values())


def _modified(item: str) -> tuple[str, bool, tuple[int, int]]:
    """A word without what follows its @s, whether it is kept of view 0 only, and its pooled grid: time and side."""
    word, *modifiers = item.strip().split("@")
    pools = [match for each in modifiers if (match := _POOL.fullmatch(each))]
    evals = modifiers.count("eval")
    if len(pools) + evals < len(modifiers) or len(pools) > 1 or evals > 1:
        raise UsageError(
            f"--keep {item}: behind an @ stands eval (view 0 only) or poolN (a grid of N x N places; of clips "
            "poolTxN), each once",
            _FORMS,
        )
    time, side = (int(number or 0) for number in pools[0].groups()) if pools else (0, 0)
    return word, evals == 1, (time, side)


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
    if kind == TOKENS and not colon:
        return Output("maps", eval_only=eval_only)
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
