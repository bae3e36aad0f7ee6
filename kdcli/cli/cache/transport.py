"""``kd cache``: pack, unpack, push, pull, merge."""

from shlex import quote
from typing import TYPE_CHECKING, Any

from kdcli.console import console, size
from kdcli.results import say

if TYPE_CHECKING:
    from kdcli.cache.admin.config import MergeConfig, PackConfig, PullConfig, PushConfig, UnpackConfig
    from kdcli.cache.admin.moving import Moved
    from kdcli.options.common import Common


def pack(config: "PackConfig", common: "Common") -> None:
    """Write a cache into one file that other tools read.

    HDF5 (.h5), a Zarr group (.zarr), or that in one zip (.zarr.zip). Every byte is checked against its record
    on the way. What is not committed yet is not in the file. kd cache unpack makes the same cache of it again.

    \b
    Examples:
      kd cache pack food.kd --to food.h5
      kd cache pack food.kd --to food.zarr --compress zstd --teacher resnet50
    """
    from kdcli.verbs.caches import cache_pack

    _say(cache_pack(config), common.as_json, {"compress": config.compress})


def unpack(config: "UnpackConfig", common: "Common") -> None:
    """Make a cache of a packed one, bit by bit the same.

    With another --backend the values are the same and the files are others.

    \b
    Examples:
      kd cache unpack food.h5 --to food.kd
      kd cache unpack food.zarr.zip --to food.kd --backend hdf5
    """
    from kdcli.verbs.caches import cache_unpack

    _say(cache_unpack(config), common.as_json)


def push(config: "PushConfig", common: "Common") -> None:
    """Copy a cache to a bucket, a shared folder or the hub.

    Every byte is checked on the way. Blocks come first, then their records, the manifest last; a killed push is
    completed by the same command, and so is one of a cache that has grown since. Needs the extra 'stores', hf:// the
    extra 'hub', file:// none. Credentials, region and endpoint come from the environment; hf auth login logs in to the
    hub, where --licence says what others may do, and a card (README.md) what it is.

    \b
    Examples:
      kd cache push food.kd s3://team/food
      kd cache push food.kd file:///mnt/share/food
      kd cache push food.kd hf://datasets/team/food --licence cc-by-4.0
    """
    from kdcli.verbs.caches import cache_push

    done = cache_push(config)
    if common.as_json:
        console.document(done.document())
        return
    say(done.tables())
    console.finished(f"{done.to}: {size(done.bytes)} sent", f"kd cache pull {quote(done.to)} --to CACHE")


def pull(config: "PullConfig", common: "Common") -> None:
    """Make a cache of one in a store, or of a part of it.

    Every byte is checked before it is used. What is there after a kill is a smaller cache, which the same command
    completes. A part is one, too: pull again for more teachers, kinds or views of it.

    \b
    Examples:
      kd cache pull s3://team/food --to food.kd
      kd cache pull s3://team/food --to food.kd --teacher resnet50 --keep logits --views eval
      kd cache pull hf://datasets/team/food@v1 --to food.kd
    """
    from kdcli.verbs.caches import cache_pull

    _say(cache_pull(config), common.as_json)


def merge(config: "MergeConfig", common: "Common") -> None:
    """Make one cache of several of the same data.

    For shards that workers without a shared disk made (cache-teachers --shard i/n), and for caches of different
    teachers. Data, views, blocks and teachers of one name must be the same, and so must be the bytes of what
    several of them hold. The caches stay as they are; on the same disk the files are linked and take no space.

    \b
    Examples:
      kd cache merge shard0.kd shard1.kd --to food.kd
    """
    from kdcli.verbs.caches import cache_merge

    _say(cache_merge(config), common.as_json)


def _say(done: "Moved", json: bool, more: dict[str, Any] | None = None) -> None:
    document = {**done.document(), **(more or {})}
    if json:
        console.document(document)
        return
    say(done.tables())
    then = f"kd cache {'unpack' if more else 'info'} {quote(str(done.path))}{' --to CACHE' if more else ''}"
    console.finished(f"{done.path}: {size(document['bytes'])}", then)
    if not done.complete:
        console.note(
            "Not complete: kd cache-teachers with the cache's own options, or kd cache pull, fills what is missing."
        )
