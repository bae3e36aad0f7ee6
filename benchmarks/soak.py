"""Kill what writes, again and again, and count what is lost; give kd wrong input, and count what it does not withstand.

    python benchmarks/soak.py [--kills 200] [--writers 4] [--backend zarr|hdf5] [--quick] [--json]
    python benchmarks/soak.py --verbs 300 [--seed 0] [--json]
    python benchmarks/soak.py --stores 50 [--seed 0] [--json]
    python benchmarks/soak.py --fuzz 2000 [--seed 0] [--json]

--kills: writers with numpy teachers fill a cache of 19 blocks, each killed by SIGKILL at a random step on disk or at a
random instant. After each round every committed byte is checked against its record; a finished cache is
compared with that of an uninterrupted run, and the next one is begun.

--verbs: every command that writes, with its decode processes, killed in the same two ways once or twice and given
again; after each round of kills each is also given a disk that is full or read-only from a random step on.
What is there between the kills and in the end is compared with a quiet run's.

--stores: one or two writers or pushers of a cache in a bucket (moto on 127.0.0.1), one of them killed with a random
request, which is done or not. After each round what is there is pulled and checked; a finished cache is compared with
one that was made on this disk, and the next one is begun.

--fuzz: documents and options changed at random (tests/fuzzing.py).

Every figure should be 0, but what is computed twice; with --verbs, --stores and --fuzz another one is exit code 1.
"""

import argparse
import errno
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import cache_tools as tools
from crash_tools import Server, computed, records
from measuring import figure, machine, parser_of, tell

from kdcli.cache.commits import Commit
from kdcli.cache.garbage import collect_garbage
from kdcli.cache.reader import CacheReader
from kdcli.cache.verify import verify_part

NAMES, ROWS = ("t", "u"), 600


@dataclass
class Counts:
    """What went wrong so far."""

    kills: int = 0
    caches: int = 0
    rows_lost: int = 0
    bytes_differing: int = 0
    recomputed: int = 0
    decoded_again: int = 0
    litter: int = 0
    failed: list[int] = field(default_factory=list)


def look(root: Path, seen: dict[str, Commit], counts: Counts) -> dict[str, Commit]:
    """Compare a cache with the records seen before, and its bytes with its records."""
    if not (root / "manifest.json").exists():
        return seen
    reader = CacheReader(root)
    now = records(reader)
    rows = {unit: len(reader.manifest.rows_of(commit.block)) for unit, commit in seen.items()}
    counts.rows_lost += sum(rows[unit] for unit, commit in seen.items() if now.get(unit) != commit)
    for part in reader.store.parts():
        counts.rows_lost += sum(damage.rows[1] - damage.rows[0] + 1 for damage in verify_part(reader, part))
    return now


def kill_some(server: Server, job: dict[str, object], writers: int, draw: random.Random) -> list[int]:
    """Start writers and kill each: one half at a random step, the other at a random instant. Exit codes."""
    by_step = draw.random() < 0.5
    running = [
        server.fill(**job, kill_at=draw.randrange(1, 400) if by_step else None)  # type: ignore[arg-type]
        for _ in range(writers)
    ]
    if not by_step:
        for pid in running:
            time.sleep(draw.expovariate(1 / 0.04))
            os.kill(pid, signal.SIGKILL)
    return [server.wait(pid) for pid in running]


def fill_one(
    server: Server, root: Path, expected: dict[str, bytes], options: argparse.Namespace, counts: Counts
) -> None:
    """Fill one cache under fire until it is finished or enough were killed; then finish it and compare."""
    draw, log = random.Random(counts.caches), root.with_suffix(".log")
    job = {"root": root, "log": log, "names": NAMES, "rows": ROWS, "backend": options.backend}
    seen: dict[str, Commit] = {}
    codes: list[int] = []
    while counts.kills < options.kills and 0 not in codes:
        before = computed(log)
        codes = kill_some(server, job, options.writers, draw)
        counts.failed += [code for code in codes if code not in (0, -signal.SIGKILL)]
        counts.kills += codes.count(-signal.SIGKILL)
        counts.decoded_again += len((computed(log) - before).keys() & seen.keys())
        seen = look(root, seen, counts)
    code = server.wait(server.fill(**job))  # type: ignore[arg-type]
    counts.failed += [code] if code else []
    seen = look(root, seen, counts)
    found = tools.payload(root)
    counts.bytes_differing += sum(
        sum(a != b for a, b in zip(found.get(name, b""), content, strict=False))
        + abs(len(found.get(name, b"")) - len(content))
        for name, content in expected.items()
        if found.get(name) != content
    )
    counts.recomputed += sum(computed(log).values()) - len(seen)
    counts.litter += len(collect_garbage(root, dry_run=True).paths)
    counts.caches += 1


Figures = dict[str, tuple[float, float, str]]
"""Value, goal and unit by name."""


def kill_writers(root: Path, options: argparse.Namespace) -> tuple[Figures, str]:
    """Figures, and what was done."""
    counts = Counts()
    with Server("h5py", "kdcli.cache.backends.hdf5_index") as server:
        tools.fill(root / "whole.kd", NAMES, ROWS, backend=options.backend)
        expected = tools.payload(root / "whole.kd")
        while counts.kills < options.kills:
            fill_one(server, root / f"{counts.caches}.kd", expected, options, counts)
    figures: Figures = {
        "rows_lost": (counts.rows_lost, 0, "rows"),
        "bytes_differing": (counts.bytes_differing, 0, "bytes"),
        "units_recomputed_per_kill": (counts.recomputed / counts.kills, 1, "units"),
        "finished_units_computed_again": (counts.decoded_again, 0, "units"),
        "litter_left": (counts.litter, 0, "paths"),
        "runs_failed": (len(counts.failed), 0, "runs"),
    }
    return figures, (
        f"{options.backend}, {counts.kills} kills of {options.writers} writers, "
        f"{counts.caches} caches of {len(expected)} files"
    )


def kill_verbs(root: Path, options: argparse.Namespace) -> tuple[Figures, str]:
    """Figures, and what was done."""
    from verb_schedules import VERBS, site
    from verb_schedules import Counts as VerbCounts

    counts, draw, disks, told = VerbCounts(), random.Random(options.seed), 0, 0
    with site(root) as here:
        for number, verb in enumerate(itertools.cycle(VERBS)):
            if counts.kills >= options.verbs:
                break
            here.killed(verb, draw, counts)
            if number // len(VERBS) % 3 == 0:
                disks += 1
                error = draw.choice((errno.ENOSPC, errno.EROFS, errno.EACCES))
                here.short_of_disk(verb, draw.randrange(1, here.steps[verb] + 1), counts, error)
            for line in counts.failed[told:]:
                print(line, file=sys.stderr, flush=True)
            told = len(counts.failed)
    figures: Figures = {
        "rows_lost": (counts.rows_lost, 0, "rows"),
        "bytes_lost": (counts.bytes_lost, 0, "bytes"),
        "bytes_differing": (counts.bytes_differing, 0, "bytes"),
        "files_outside_touched": (counts.files_outside, 0, "files"),
        "litter_left": (counts.litter, 0, "paths"),
        "runs_failed": (len(counts.failed), 0, "runs"),
    }
    return figures, f"{counts.kills} kills of {len(VERBS)} commands that write, {disks} refusals of the disk"


def kill_stores(root: Path, options: argparse.Namespace) -> tuple[Figures, str]:
    """Figures, and what was done."""
    import boto3
    from store_servers import environment, s3
    from store_writing import Killer, bucket

    from kdcli.cache.admin.audit import audit
    from kdcli.cache.stores.marks import manifest_in
    from kdcli.cache.stores.pull import Choice, pull

    counts, draw, pushers = Counts(), random.Random(options.seed), 0
    tools.fill(root / "whole.kd", NAMES, rows=64)
    expected = tools.payload(root / "whole.kd")
    with s3() as proxy, Server("store_writing", "obstore") as server:
        os.environ.update(environment(proxy.url))
        boto3.client("s3", endpoint_url=proxy.url).create_bucket(Bucket="bucket")
        while counts.kills < options.stores:
            url, seen, codes = f"s3://bucket/{counts.caches}", set[str](), [1]
            job = {"push": root / "whole.kd"} if counts.caches % 3 == 2 else {"names": NAMES, "rows": 64}
            while any(codes):
                killer = Killer(proxy, draw.randrange(1, 120), draw.choice(("drop", "lost")))
                running = [
                    server.store(url, env=environment(proxy.url), **job)
                    for _ in range(draw.choice((1, 1, 2)))
                ]
                killer.aim(draw.choice(running))
                codes = [server.wait(pid) for pid in running]
                proxy.fault = lambda *_: None
                dead = codes.count(-signal.SIGKILL)
                counts.kills, pushers = counts.kills + dead, pushers + dead * ("push" in job)
                counts.failed += [code for code in codes if code not in (0, -signal.SIGKILL)]
                now = bucket(url).sizes("commits").keys()
                counts.rows_lost += 32 * len(seen - now)
                seen = set(now)
                if manifest_in(bucket(url)) is not None or not any(codes):
                    target = root / f"{counts.caches}-{counts.kills}.kd"
                    pull(url, target, Choice())
                    counts.rows_lost += 0 if audit(target).ok else 64
            found = tools.payload(target)
            counts.bytes_differing += sum(
                len(data) for name, data in expected.items() if found.get(name) != data
            )
            counts.litter += sum("/probe/" not in name for name in bucket(url).versions("claims"))
            counts.caches += 1
    figures: Figures = {
        "rows_lost": (counts.rows_lost, 0, "rows"),
        "bytes_differing": (counts.bytes_differing, 0, "bytes"),
        "leases_left": (counts.litter, 0, "objects"),
        "runs_failed": (len(counts.failed), 0, "runs"),
    }
    return (
        figures,
        f"{counts.kills} kills ({pushers} of pushers) of writers of a bucket, {counts.caches} caches",
    )


def fuzz(root: Path, options: argparse.Namespace) -> tuple[Figures, str]:
    """Figures, and what was done."""
    from fuzzing import Verdict, campaign

    def tell(verdict: Verdict) -> None:
        print(f"{verdict.problem}: {verdict.way}; kd {verdict.line}", file=sys.stderr, flush=True)

    found = campaign(root / "fuzz", options.fuzz, options.seed, tell)
    codes = ", ".join(f"{code}: {count}" for code, count in sorted(found.codes.items()))
    return {
        "not_withstood": (len(found.bad), 0, "inputs")
    }, f"{options.fuzz} wrong inputs, exit codes {codes}"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--writers", type=int, default=4)
    parser.add_argument("--backend", choices=["zarr", "hdf5"], default="zarr")
    parser.add_argument("--verbs", type=int, default=0, help="kills over all commands that write")
    parser.add_argument("--stores", type=int, default=0, help="kills of writers of a bucket, and of pushers")
    parser.add_argument("--fuzz", type=int, default=0, help="wrong inputs")
    parser.add_argument("--seed", type=int, default=0, help="of --verbs, --stores and --fuzz")
    options = parser.parse_args()
    if options.quick:
        options.kills = min(options.kills, 40)
    run, place = kill_writers, machine()
    for count, other in ((options.fuzz, fuzz), (options.verbs, kill_verbs), (options.stores, kill_stores)):
        run = other if count else run
    with tempfile.TemporaryDirectory() as folder:
        values, done = run(Path(folder), options)
    figures = {
        f"{run.__name__}_{name}": figure(value, goal, unit, done, higher=False)
        for name, (value, goal, unit) in values.items()
    }
    tell({"figures": figures, "machine": place}, options.json)
    if run is not kill_writers and any(value for value, _, _ in values.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
