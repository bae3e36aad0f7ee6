"""The command lines of test_golden.py."""

METHODS = (
    "labels-only", "distill-nearest", "distill-weighted", "distill-equal", "fixmatch", "consolidation",
    "consolidation-crd", "multi-head-kd", "multi-head-crd", "soft-label", "multi-task", "replay-oracle", "kl", "xe-kl",
    "kl-ls", "mcl", "dp", "dp-unsup", "cd", "crd", "soft-ce", "topk-kl", "mlfd", "feature", "hint", "at", "vid",
    "srrl", "agglomerate",
)  # fmt: skip

ONE = "train-student images --student test_efficientnet --cache c.kd --out o"
TWO = "train-student a=images b=few --student test_efficientnet --out o"
ONLY_LABELS = ("labels-only", "fixmatch")
GENERALIST = (
    "consolidation",
    "consolidation-crd",
    "multi-head-kd",
    "multi-head-crd",
    "soft-label",
    "replay-oracle",
)


def line_of(method: str) -> str:
    """A valid call of ``method``."""
    base = TWO if method in ("multi-task", "replay-oracle") else ONE
    if method in ONLY_LABELS:
        base = base.replace("--cache c.kd ", "")
    more = " --cache c.kd" if method == "replay-oracle" else ""
    more += " --generalist gen" if method in GENERALIST else ""
    more += " --ranking ranking.json" if method in ("distill-nearest", "distill-weighted") else ""
    return f"{base} --method {method}{more}"


CONFIGS = (
    *map(line_of, METHODS),
    f"{line_of('labels-only')} --ema 0.9 --validation 0.2 --select best --schedule step --milestones 0.5,0.8 --seed 7",
    f"{line_of('labels-only')} --config run.yaml --set epochs=8 --lr 0.3 --tracker tensorboard",
    f"{line_of('labels-only')} --lr-grid 0.0001:0.1:4log --validation 0.25 --init xavier --bn frozen-affine",
    f"{line_of('distill-equal')} --teacher gen --teacher exp --sequential ascending --label-weight 0.5 --amp bf16",
    f"{line_of('distill-equal')} --unlabelled-ratio 2 --unlabelled-includes-labelled --stage s --prewarm",
    f"{line_of('fixmatch')} --threshold 0.8 --unlabelled-weight 2 --no-unlabelled-includes-labelled --recipe glyph",
    f"{line_of('consolidation')} --old-new 1:3",
    f"{line_of('consolidation-crd')} --crd-weight 0.5 --crd-negatives 8 --crd-dim 16 --crd-temperature 0.1",
    f"{line_of('mcl')} --mcl-share 0.4 --mcl-every 3",
    f"{line_of('dp')} --frozen cache --frozen-teacher gen --kl-direction reverse --temperature 2",
    f"{line_of('topk-kl')} --top-classes 3 --kl-weight 0.3",
    f"{line_of('mlfd')} --loss-convention code --teacher exp --teacher-tap layer4 --student-tap blocks.4 "
    "--level-weight 0.1 --adaptor teacher --map-resize pool",
    f"{line_of('multi-task')} --label-space joint --test a=held-out --backbone-lr-scale 1",
    f"train-student images --student test_resnet {'--sweep sweep.yaml'} --out o",
    "cache-teachers images --cache n.kd --teacher gen=local-dir:gen/export",
    "cache-teachers images@n=9,seed=2 --cache n.kd --teacher a=resnet50 --teacher b=test_resnet --views eval+train:3 "
    "--recipe mine.yaml --temperatures 1,3 --no-wait --keep topk:5,maps:layer4@eval --backend hdf5 --dtype float32",
    "rank-sources --cache c.kd",
    "rank-sources --cache c.kd --config run.yaml --power inf --exclude exp --data images@n=9,seed=2 --on pseudo",
    "rank-sources --cache c.kd --against gen exp --top 2 --plot figures --scheme inverse --sources 1",
    "rank-sources --features f --labels l.npy --metric all --repeats 3",
    "fuse-teachers --cache c.kd --teacher gen --teacher exp --out o",
    "fuse-teachers --cache c.kd --teacher gen --teacher exp --out o --levels L3 --map-channels 5,4 "
    "--heads per-data-set --tap exp=layer4 --write-back joint --validation 0.2 --select best --schedule cosine",
    "fuse-teachers --cache c.kd --teacher gen --teacher exp --out o --levels L1 --projection 16",
    "eval-probe images --test held-out --model local-dir:gen/export",
    "eval-probe images --test no --cache c.kd --teacher null --seed 4 --protocol knn --neighbours 3 --shots all",
    "eval-probe a=images b=few --test a=held-out --test b=few --model gen --related a --unrelated b "
    "--c-grid 0.1:1:2log",
    "eval-probe images --test held-out --model gen --protocol fine-tune --out o --lr-grid 0.1 --epochs 2",
    "eval-probe --test held-out --model gen --head label",
    "compare --cache test.kd",
    "compare big small new=runs/new --cache test.kd --test held-out --after dp,big,small=gen --bins 3 --out o",
    "audit images held-out",
    "data check images --test held-out --least 5 --write-exclude x.txt --workers 2",
    "audit images --distance 4 --hash-bits 64 --max-pairs 10 --write-exclude x.txt --fail --workers 2",
    "report gen exp",
    "report gen c.kd --format csv --out t --title T --separate --tsne --tsne-images 20 --perplexity 3",
)
"""Every command that has --print-config, some of them in several ways; train-student by every method."""

PROBE = "eval-probe images --test held-out --workers 0 --device cpu"
SHAPES = {
    "methods": "methods",
    "doctor": "doctor",
    "rank-sources": "rank-sources --cache c.kd",
    "rank-sources-all": "rank-sources --cache c.kd --metric all --repeats 2 --probe-size 12",
    "cache-teachers": "cache-teachers few --cache few.kd --teacher gen=local-dir:gen/export --workers 0 --device cpu",
    "cache-teachers-dry": "cache-teachers few --cache n.kd --teacher gen=local-dir:gen/export --dry-run --device cpu",
    "cache-ls": "cache ls c.kd test.kd",
    "cache-info": "cache info c.kd",
    "cache-plan": "cache plan few --cache n.kd --teacher gen=local-dir:gen/export --workers 0 --device cpu",
    "cache-verify": "cache verify c.kd",
    "cache-diff": "cache diff c.kd test.kd",
    "cache-pack": "cache pack c.kd --to c.zarr",
    "cache-unpack": "cache unpack c.zarr --to again.kd",
    "cache-merge": "cache merge c.kd again.kd --to merged.kd",
    "cache-extend": "cache extend again.kd more",
    "cache-gc": "cache gc again.kd",
    "cache-repair": "cache repair c.kd --workers 0 --device cpu",
    "cache-rm": "cache rm merged.kd --yes",
    "train-student": "train-student images --student test_efficientnet --image-size 32 --batch-size 8 --workers 0 "
    "--device cpu --epochs 1 --method labels-only --out shaped --test held-out --validation 0.25",
    "train-student-distil": "train-student images --student local-dir:gen/export --batch-size 8 --workers 0 "
    "--device cpu --epochs 1 --cache c.kd --teacher exp --method dp --out dp --test held-out",
    "train-student-sweep": "train-student images --student test_efficientnet --image-size 32 --batch-size 8 "
    "--workers 0 --device cpu --epochs 1 --sweep sweep.yaml --out swept",
    "train-student-labels": "train-student images --student local-dir:gen/export --batch-size 8 --workers 0 "
    "--device cpu --epochs 1 --method labels-only --out after",
    "soup": "soup dp after --out mean --workers 0 --device cpu --test held-out",
    "eval-probe": f"{PROBE} --model gen --draws 2",
    "eval-probe-several": f"{PROBE} --model gen --model exp --draws 2",
    "eval-probe-cached": f"{PROBE} --cache c.kd --cache test.kd --teacher gen --draws 2 --protocol knn --neighbours 2",
    "eval-probe-head": "eval-probe --test held-out --model gen --head label --workers 0 --device cpu",
    "compare": "compare --cache test.kd",
    "compare-runs": "compare gen exp new=dp --cache test.kd --test held-out --workers 0 --device cpu",
    "audit": "audit images held-out --workers 0",
    "data-check": "data check images --test held-out --workers 0",
    "audit-pairs": "audit images few --workers 0 --distance 64",
    "fuse-teachers": "fuse-teachers --cache c.kd --teacher gen --teacher exp --levels L1 --out joint --epochs 1 "
    "--batch-size 8 --device cpu --projection 8",
    "error": "rank-sources --cache nowhere.kd",
}
"""Commands that are run with --json, in this order."""

RANK, TRAIN = "rank-sources --cache c.kd", "train-student images --student test_efficientnet --out never"
CACHE = "cache-teachers images --workers 0 --device cpu"
LABELS = f"{TRAIN} --method labels-only"
GEN = "--teacher gen=local-dir:gen/export"
EXITS = (
    "--version", "--help", "train-student --help", "cache --help", "docter", "train-studnet", "cache inf", "methods",
    RANK, f"{RANK} --metric park", f"{RANK} --metrc parc", f"{RANK} --teacher genn", f"{RANK} --probe-size 1",
    f"{RANK} --power -1", f"{RANK} --seed 1.5", f"{RANK} --set powr=2", f"{RANK} --set power",
    f"{RANK} --config nowhere.yaml", f"{RANK} --data held-out", f"{RANK} --data images@labels=none",
    f"{RANK} --data images@shots=1", "rank-sources", "rank-sources --cache nowhere.kd", "rank-sources --cache images",
    "rank-sources --cache a-file", "rank-sources --cache a-file --json",
    f"{TRAIN} --method consolidaton", f"{TRAIN} --method distill-weighted --cache c.kd", f"{TRAIN} --method dp",
    f"{TRAIN} --method consolidation --cache c.kd", f"{TRAIN} --config bad.yaml", f"{LABELS} --batch-size 0",
    f"{LABELS} --batch-size 1", f"{LABELS} --lr fast", f"{LABELS} --device cuda:9", f"{LABELS} --init randm",
    f"{LABELS} --student resnet51", f"{LABELS} --student local-dir:nowhere", f"{LABELS} --student transformers/none",
    f"{LABELS} --test sklearn/digts", f"{LABELS} --recipe midl", f"{LABELS} --ranking images", f"{LABELS} --out images",
    f"{LABELS} --out a-file", f"{LABELS} --out gen", f"{LABELS} --test images@labels=none",
    "train-student empty --student test_efficientnet --method labels-only --out never",
    "train-student images@clases=c0 --student test_efficientnet --method labels-only --out never",
    "train-student images@classes=c0 --student test_efficientnet --method labels-only --out never",
    "train-student held-out --student test_efficientnet --cache c.kd --method distill-equal --out never",
    "train-student sklearn/digits@n=30 --student test_efficientnet --cache c.kd --method distill-equal --out never",
    f"{CACHE} --cache c.kd {GEN} --views eval+train:2 --recipe mild", f"{CACHE} --cache c.kd {GEN}",
    f"{CACHE} --cache c.kd {GEN} --views eval+train:2 --recipe mild --dtype float32", f"{CACHE} --cache . {GEN}",
    f"{CACHE} --cache n.kd --teacher resnet51", f"{CACHE} --cache n.kd --teacher google/vit",
    f"{CACHE} --cache n.kd {GEN} --keep logit", f"{CACHE} --cache n.kd {GEN} --views eval+trian:3",
    f"{CACHE} --cache n.kd {GEN} --shard 4/4", f"{CACHE} --cache n.kd {GEN} --shard array",
    f"{CACHE} --cache n.kd {GEN} --dry-run",
    PROBE, f"{PROBE} --model gen --protocol svn", f"{PROBE} --model gen --protocol fine-tune",
    f"{PROBE} --model gen --folds 6", f"{PROBE} --model gen --head label", f"{PROBE} --cache c.kd --teacher genn",
    f"{PROBE} --model gen --c-grid 0.1,-1", "eval-probe --test held-out --model gen --head nothing",
    "compare --cache test.kd", "compare nothing --cache test.kd", "audit images held-out --workers 0",
    "audit images images --workers 0 --fail", "audit images nowhere", "audit images --distance 90",
    "report nowhere --out r.html", "soup gen/export exp/export --out mixed --device cpu",
    "fuse-teachers --cache c.kd --teacher gen --out joint", "fuse-teachers --cache c.kd --teacher gen --teacher exp",
    "cache info c.kd", "cache info images", "cache verify c.kd", "cache diff c.kd c.kd", "cache diff c.kd test.kd",
    "cache ls nowhere", "cache pack c.kd --to c.tar", "cache unpack a-file --to n.kd", "cache merge c.kd --to n.kd",
    "cache push c.kd s3://name:word@bucket/c", "cache pull c.kd --to n.kd", "cache pull file:///nowhere/c --to n.kd",
    "cache rm images --yes", "cache gc nowhere.kd",
)  # fmt: skip
"""Right and wrong commands; nothing that they find is written over."""
