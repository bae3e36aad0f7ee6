"""The place that test_golden.py runs its commands in: images whose bytes no encoder chose, and small models."""

from collections.abc import Iterable
from pathlib import Path

from kd_driver import Driver

SMALL = "--image-size 32 --batch-size 8 --workers 0 --device cpu --epochs 1"
SETUP = (
    f"train-student images --student test_efficientnet {SMALL} --method labels-only --seed 1 --out gen --test held-out",
    f"train-student images --student test_resnet {SMALL} --method labels-only --seed 2 --out exp",
    "cache-teachers images --cache c.kd --teacher gen=local-dir:gen/export --teacher exp=local-dir:exp/export "
    "--views eval+train:2 --recipe mild --keep logits,features --workers 0 --device cpu",
    "cache-teachers images --cache c.kd --teacher exp=local-dir:exp/export --keep maps:layer4 "
    "--views eval+train:2 --recipe mild --workers 0 --device cpu",
    "cache-teachers held-out --cache test.kd --teacher gen=local-dir:gen/export --teacher exp=local-dir:exp/export "
    "--recipe mild --workers 0 --device cpu",
)
RECIPE = """
scale: [0.35, 1.0]
flip: 0.5
jitter: {brightness: 0.4, contrast: 0.4, saturation: [0.8, 1.2], hue: 0.1}
randaugment: {n: 2, m: 9}
erase: {probability: 0.25, scale: [0.02, 0.33], ratio: 3.3}
cutmix: {alpha: 1.0}
"""


def pixels(width: int, height: int, salt: int) -> list[list[tuple[int, int, int]]]:
    """Rows of RGB, by arithmetic only."""
    return [
        [
            ((7 * x + salt * 31) % 256, (13 * y + salt * 17) % 256, (x * y * salt + 3 * x) % 256)
            for x in range(width)
        ]
        for y in range(height)
    ]


def ppm(rows: list[list[tuple[int, int, int]]]) -> bytes:
    body = bytes(value for row in rows for pixel in row for value in pixel)
    return f"P6\n{len(rows[0])} {len(rows)}\n255\n".encode() + body


def bmp(rows: list[list[tuple[int, int, int]]]) -> bytes:
    """24 bits, uncompressed, rows from the bottom, each padded to four bytes."""
    width, height = len(rows[0]), len(rows)
    body = b"".join(
        bytes(value for red, green, blue in row for value in (blue, green, red)).ljust(
            -(-3 * width // 4) * 4, b"\0"
        )
        for row in reversed(rows)
    )

    def numbers(size: int, *values: int) -> bytes:
        return b"".join(value.to_bytes(size, "little") for value in values)

    header = b"BM" + numbers(4, 54 + len(body), 0, 54, 40, width, height) + numbers(2, 1, 24)
    return header + numbers(4, 0, len(body), 2835, 2835, 0, 0) + body


SIZES = ((24, 26), (29, 33), (34, 26), (24, 33), (29, 26), (34, 33))
LONG = ((90, 7), (9, 120), (31, 31), (200, 180), (40, 300), (1, 64))
"""Also images of which no random crop of a usual ratio can be cut."""


def make_images(
    folder: Path,
    classes: Iterable[str],
    count: int,
    salt: int = 0,
    sizes: tuple[tuple[int, int], ...] = SIZES,
) -> None:
    """As many PPM as BMP files in each class, of several sizes."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            rows = pixels(*sizes[number % len(sizes)], 1 + salt + 11 * label + number)
            suffix, encode = (("ppm", ppm), ("bmp", bmp))[number % 2]
            (folder / name / f"{number:02d} ä.{suffix}").write_bytes(encode(rows))


def make_place(root: Path) -> None:
    """Images, files that are none, and settings; the models and caches come with :data:`SETUP`."""
    make_images(root / "images", ("c0", "c1", "c2"), 8)
    make_images(root / "held-out", ("c0", "c1", "c2"), 3, salt=100)
    make_images(root / "more", ("c0", "c1", "c2"), 10)
    make_images(root / "few", ("x", "y"), 6, salt=50, sizes=LONG)
    (root / "empty").mkdir()
    (root / "a-file").write_text("x")
    (root / "mine.yaml").write_text(RECIPE)
    (root / "run.yaml").write_text("train-student:\n  lr: 0.1\n  epochs: 7\nrank-sources:\n  metric: cka\n")
    (root / "bad.yaml").write_text("studnt: x\nepochs: zero\n")
    (root / "sweep.yaml").write_text("{common: {method: labels-only}, grid: {seed: [4, 5], lr: [0.1, 0.2]}}")


def set_up(driver: Driver) -> None:
    for command in SETUP:
        answer = driver.run(*command.split())
        assert answer.code == 0, answer.err
    ranking = driver.run("rank-sources", "--cache", "c.kd", "--json")
    (driver.place / "ranking.json").write_text(ranking.out)
