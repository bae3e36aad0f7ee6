"""The cases of side_by_side.py: shell commands, each case in a folder of its own name.

A command is what follows ``kd``; ``... > FILE`` keeps its standard output, ``... < FILE`` is its standard input, a
command that begins with ``!`` is no ``kd`` but one of :data:`side_by_side.ACTIONS`, ``?CODE`` before it is the
exit code to expect.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """Commands, in order, and folders that have to be equal to each other on one side (whole and resumed runs)."""

    name: str
    commands: tuple[str, ...]
    alike: tuple[tuple[str, str], ...] = ()


PLAIN = "--image-size 32 --batch-size 8 --workers 0 --device cpu --epochs 1"
TRAIN = f"train-student images --student test_efficientnet {PLAIN}"
START = f"train-student images --student local-dir:place/start/export {PLAIN}"
CACHE = "cache-teachers images --workers 0 --device cpu --recipe mild"
GEN, EXP = "--teacher gen=local-dir:place/gen/export", "--teacher exp=local-dir:place/exp/export"
C = "--cache place/c.kd"
PROBE = "eval-probe images --test held-out --draws 3 --workers 0 --device cpu --json"
MODEL = "--model start=local-dir:place/start/export"

PLACE = Case(
    "place",
    (
        f"train-student images --student test_efficientnet {PLAIN} --method labels-only --seed 1 --out place/gen",
        f"train-student images --student test_resnet {PLAIN} --method labels-only --seed 2 --out place/exp",
        f"train-student images --student test_efficientnet {PLAIN} --method labels-only --seed 3 --out place/start",
        f"train-student images --student test_resnet {PLAIN} --method labels-only --seed 4 --out place/r2",
        f"{CACHE} {C} {GEN} {EXP} --views eval+train:2",
        f"{CACHE} {C} --teacher exp=local-dir:place/exp/export --views eval+train:2 --keep maps:layer3,layer4",
        "cache-teachers held-out --cache place/test.kd --recipe mild --workers 0 --device cpu "
        + f"{GEN} {EXP}",
        f"rank-sources {C} --json > place/ranking.json",
    ),
)
"""What all other cases stand on: three models, two caches, a ranking."""

CACHES = (
    Case("cache-zarr", (f"{CACHE} --cache cache-zarr/c.kd {GEN} {EXP} --views eval+train:2",)),
    Case("cache-hdf5", (f"{CACHE} --cache cache-hdf5/c.kd {GEN} {EXP} --views eval+train:2 --backend hdf5",)),
    Case("cache-topk", (f"{CACHE} --cache cache-topk/c.kd {GEN} --keep topk:2 --dtype float32",)),
    Case(
        "cache-maps",
        (
            f"{CACHE} --cache cache-maps/c.kd {EXP} --keep features,maps:layer4,layer3@eval --views eval+train:1",
        ),
    ),
    *(
        Case(
            f"cache-{recipe}",
            (
                f"cache-teachers images --workers 0 --device cpu --cache cache-{recipe}/c.kd {GEN} --keep logits "
                f"--views eval+train:2 --recipe {recipe}",
            ),
        )
        for recipe in ("imagenet", "glyph-jitter", "jitter", "autoaugment", "fixmatch", "mixup", "cutmix")
    ),
    Case(
        "cache-pack",
        tuple(
            command
            for suffix in ("h5", "zarr", "zarr.zip")
            for command in (
                f"cache pack place/c.kd --to cache-pack/c.{suffix} --json > cache-pack/{suffix}.json",
                f"cache unpack cache-pack/c.{suffix} --to cache-pack/{suffix}.kd",
            )
        ),
    ),
    Case(
        "cache-merge",
        (
            f"cache-teachers many --workers 0 --device cpu --cache cache-merge/0.kd {GEN} --block-rows 32 --shard 0/2",
            f"cache-teachers many --workers 0 --device cpu --cache cache-merge/1.kd {GEN} --block-rows 32 --shard 1/2",
            "cache merge cache-merge/0.kd cache-merge/1.kd --to cache-merge/both.kd --json > cache-merge/merge.json",
            "?21 cache diff cache-merge/0.kd cache-merge/both.kd --json > cache-merge/diff.json",
            "cache info cache-merge/both.kd --json > cache-merge/info.json",
        ),
    ),
    Case(
        "cache-repair",
        (
            f"{CACHE} --cache cache-repair/c.kd {GEN} --views eval+train:1",
            f"{CACHE} --cache cache-repair/h.kd {GEN} --backend hdf5",
            "cache verify cache-repair/c.kd --json > cache-repair/whole.json",
            "!damage cache-repair/c.kd cache-repair/h.kd",
            "?22 cache verify cache-repair/c.kd --json > cache-repair/damaged.json",
            "?22 cache verify cache-repair/h.kd --json > cache-repair/damaged-hdf5.json",
            "cache repair cache-repair/c.kd --device cpu --workers 0 --json > cache-repair/repaired.json",
            "cache repair cache-repair/h.kd --device cpu --workers 0 --json > cache-repair/repaired-hdf5.json",
            "cache verify cache-repair/c.kd --json > cache-repair/again.json",
        ),
    ),
    Case(
        "cache-extend",
        (
            f"cache-teachers images --workers 0 --device cpu --cache cache-extend/c.kd {GEN}",
            "cache extend cache-extend/c.kd more --json > cache-extend/extend.json",
            "cache extend cache-extend/c.kd --views eval+train:2",
            f"cache-teachers --workers 0 --device cpu --cache cache-extend/c.kd {GEN} --views eval+train:2",
        ),
    ),
)


def train(name: str, options: str, base: str = TRAIN, out: str = "out") -> Case:
    """One training, tested on ``held-out``."""
    return Case(
        name, (f"{base} {options} --test held-out --out {name}/{out} --json > {name}/result-document.json",)
    )


P3 = f"{C} --teacher exp"
MAPS = "train-student images --student test_resnet"
SMALL = f"{MAPS} {PLAIN}"
TWO = f"train-student a=images b=digits --student test_efficientnet {PLAIN} --test a=held-out"
METHODS = (
    train("labels-only", "--method labels-only --ema 0.9 --validation 0.25 --select best --epochs 2"),
    train("distill-nearest", f"--method distill-nearest {C} --ranking place/ranking.json"),
    train("distill-weighted", f"--method distill-weighted {C} --ranking place/ranking.json"),
    train("distill-equal", f"--method distill-equal {C} --epochs 2 --accumulate 2 --clip-norm 1"),
    train(
        "fixmatch",
        "--method fixmatch --unlabelled-ratio 1 --threshold 0.3",
        f"train-student images@labelled=0.5 --student test_efficientnet {PLAIN}",
    ),
    *(
        train(name, f"--method {name} {C} --generalist gen" + (" --crd-negatives 8" if "crd" in name else ""))
        for name in ("consolidation", "consolidation-crd", "multi-head-kd", "multi-head-crd", "soft-label")
    ),
    *(
        Case(
            f"multi-task-{space}",
            (f"{TWO} --method multi-task --label-space {space} --out multi-task-{space}/out",),
        )
        for space in ("separate", "joint")
    ),
    Case(
        "replay-oracle",
        (
            f"train-student a=images b=digits --student test_efficientnet {PLAIN} --method replay-oracle {C} "
            "--generalist gen --out replay-oracle/out",
        ),
    ),
    *(
        train(name, f"--method {name} {P3}", START)
        for name in ("kl", "xe-kl", "kl-ls", "mcl", "dp", "dp-unsup", "cd", "soft-ce")
    ),
    train("crd", f"--method crd {P3} --crd-negatives 8", START),
    *(train(name, f"--method {name} {P3} --accumulate 2", START) for name in ("sp", "pkt", "rkd")),
    train("topk-kl", f"--method topk-kl {P3} --top-classes 2", START),
    train("dp-live-two", f"--method dp {C} --frozen live --kl-direction reverse", START),
    train(
        "mlfd",
        f"--method mlfd {P3} --teacher-tap layer4 --image-size 32 --batch-size 8 --workers 0 --device cpu --epochs 1",
        MAPS,
    ),
    train(
        "mlfd-two-levels",
        f"--method mlfd {P3} --teacher-tap layer3 --teacher-tap layer4 --student-tap layer2 --student-tap layer3 "
        f"--map-resize pool --loss-convention code {PLAIN}",
        MAPS,
    ),
    *(
        train(name, f"--method {name} {P3} --teacher-tap layer3 --student-tap layer3", SMALL)
        for name in ("hint", "at", "vid")
    ),
    train("srrl", f"--method srrl {P3}", START),
    *(
        # Judged by what is cached: held-out is not.
        Case(name, (f"{SMALL} {options} --validation 0.25 --out {name}/out",))
        for name, options in (
            ("feature", f"--method feature {P3} --levels all --teacher-tap layer4 --student-tap layer3"),
            ("agglomerate", f"--method agglomerate {C} --teacher-tap exp=layer4 --epochs 2"),
        )
    ),
)

RUNS = (
    Case(
        "sweep",
        (
            f"train-student images {PLAIN} {C} --student test_efficientnet --test held-out "
            "--sweep sweep.yaml --out sweep/out --json > sweep/document.json",
        ),
    ),
    train("sequential", f"--method distill-equal {C} --teacher exp --teacher gen --sequential ascending"),
    train("lr-grid", "--method labels-only --validation 0.25 --lr-grid 0.001,0.01"),
    train("freeze-backbone", "--method labels-only --freeze backbone", START),
    train(
        "train-from",
        f"--method labels-only --train-from layer3 {C}",
        f"train-student images --student local-dir:place/exp/export {PLAIN}",
    ),
    train(
        "init-nearest-source", f"--method labels-only --init nearest-source --ranking place/ranking.json {C}"
    ),
    Case(
        "resume",
        (
            f"{TRAIN} --method distill-equal {C} --epochs 30 --out resume/whole",
            f"!stop resume/cut {TRAIN} --method distill-equal {C} --epochs 30 --out resume/cut",
            f"!kill resume/killed {TRAIN} --method distill-equal {C} --epochs 30 --out resume/killed",
        ),
        alike=(("resume/whole", "resume/cut"), ("resume/whole", "resume/killed")),
    ),
    Case(
        "soup",
        (
            *(
                f"{START} --method distill-equal {C} --teacher {name} --out soup/{name}"
                for name in ("gen", "exp")
            ),
            "soup soup/gen soup/exp --out soup/mean --test held-out --device cpu --workers 0 --json > soup/mean.json",
            "soup soup/gen soup/exp --weights 2,1 --recalibrate-bn images --device cpu --workers 0 --out soup/bn",
        ),
    ),
)

FUSE = "fuse-teachers --cache fuse/c.kd --teacher r1 --teacher r2 --space 8 --batch-size 8 --epochs 2 --device cpu"
FUSING = (
    Case(
        "fuse",
        (
            "cache-teachers images --cache fuse/c.kd --workers 0 --device cpu --keep "
            "logits,features,maps:layer2,layer3,layer4 --teacher r1=local-dir:place/exp/export "
            "--teacher r2=local-dir:place/r2/export",
            f"{FUSE} --levels L1 --out fuse/L1 --json > fuse/L1.json",
            f"{FUSE} --levels L2 --map-channels 5 --validation 0.25 --select best --out fuse/L2 --write-back joint",
            f"{FUSE} --levels L3 --map-channels 5,4 --schedule cosine --out fuse/L3",
            f"{FUSE} --levels L4 --map-channels 5,4,3 --out fuse/L4",
            f"{FUSE} --levels L2 --heads per-data-set --map-channels 5 --out fuse/each",
            f"train-student images --student test_resnet --method mlfd {PLAIN} --cache fuse/c.kd --teacher joint "
            "--out fuse/student",
        ),
    ),
)

PROBES = (
    Case("probe-default", (f"{PROBE} {MODEL} > probe-default/a.json",)),
    Case(
        "probe-cached",
        (f"{PROBE} {C} --cache place/test.kd --teacher gen --teacher exp > probe-cached/a.json",),
    ),
    Case("probe-logistic", (f"{PROBE} {MODEL} --protocol logistic > probe-logistic/a.json",)),
    Case("probe-knn", (f"{PROBE} {MODEL} --protocol knn --neighbours 3 > probe-knn/a.json",)),
    Case(
        "probe-all-shots",
        (
            "eval-probe images --test held-out --workers 0 --device cpu --json --shots all "
            f"{MODEL} > probe-all-shots/a.json",
        ),
    ),
    Case(
        "probe-fine-tune",
        (
            "eval-probe images --test held-out --workers 0 --device cpu --json --protocol fine-tune --epochs 1 "
            f"--lr-grid 0.001,0.01 --shots 5 --draws 1 --batch-size 8 --out probe-fine-tune/runs {MODEL} "
            "> probe-fine-tune/a.json",
        ),
    ),
    Case(
        "probe-multi-label",
        (
            f"eval-probe several --test several-test --multi-label + --draws 2 --workers 0 --device cpu --json {MODEL} "
            "> probe-multi-label/a.json",
        ),
    ),
    Case(
        "probe-targets",
        (
            f"eval-probe a=images b=digits --test a=held-out --test b=digits-test --related a --unrelated b --draws 2 "
            f"--workers 0 --device cpu --json {MODEL} --model gen=place/gen > probe-targets/a.json",
        ),
    ),
    Case(
        "probe-head",
        (
            f"eval-probe --test held-out --head label {MODEL} --workers 0 --device cpu --json "
            "> probe-head/a.json",
        ),
    ),
    Case("probe-sklearn", (f"{PROBE} {MODEL} --solver sklearn > probe-sklearn/a.json",)),
)

AGAINST = (
    f"{CACHE} --cache rank-against/c.kd {GEN} {EXP} --teacher r2=local-dir:place/r2/export",
    *(
        f"{TRAIN} --method distill-equal --cache rank-against/c.kd --teacher {name} --test held-out "
        f"--out rank-against/runs/{name}"
        for name in ("gen", "exp", "r2")
    ),
    "rank-sources --cache rank-against/c.kd --against rank-against/runs --top 1 --json > rank-against/a.json",
    "cache plan images --cache rank-against/c.kd --teacher gen=local-dir:place/gen/export --recipe mild "
    "--workers 0 --device cpu --json > rank-against/plan.json",
    "cache rm rank-against/c.kd --teacher gen --yes",
)

READING = (
    Case("rank-against", AGAINST),
    Case(
        "rank",
        (
            f"rank-sources {C} --metric all --repeats 2 --probe-size 20 --json > rank/all.json",
            f"rank-sources {C} --metric all --on pseudo --json > rank/pseudo.json",
            f"rank-sources {C} --metric cka --scheme inverse --json > rank/inverse.json",
            f"rank-sources {C} --variant bolya --scheme random-weights --seed 3 --json > rank/random.json",
        ),
    ),
    Case(
        "compare",
        (
            "compare --cache place/test.kd --json > compare/cached.json",
            "compare gen exp start=place/start --cache place/test.kd --test held-out --device cpu --workers 0 "
            "--out compare/out --json > compare/all.json",
        ),
    ),
    Case(
        "audit",
        (
            "audit images held-out --workers 0 --json > audit/a.json",
            "audit images --workers 0 --distance 64 --json > audit/self.json",
        ),
    ),
    Case("report", ("report place --format csv --out report/tables",)),
    Case("methods", ("methods --json > methods/a.json",)),
)

CASES = (PLACE, *CACHES, *METHODS, *RUNS, *FUSING, *PROBES, *READING)
