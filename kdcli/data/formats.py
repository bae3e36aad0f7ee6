"""Which files are images: by their names for all, by their first bytes where it matters which decoder they need.

What is a sample follows from names alone, by fixed lists: a data set has the same samples on every installation. Some
formats need packages of the extra ``formats``; without them their images are samples that cannot be read.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Final

IMAGE_BYTES: Final = 512 * 2**20
"""Most bytes of an encoded image."""

EXTRA: Final = "pip install 'kdcli[formats]'"
"""What installs the packages of :data:`PACKAGES`."""
JPEG_XL: Final = "JPEG XL"
PACKAGES: Final = {"HEIC": "pillow_heif", JPEG_XL: "pillow_jxl", "AVIF": "PIL._avif"}
"""Module that decodes a format which not every installation can; AVIF: that of a new enough Pillow."""
_EXTRA_NAMES: Final = {
    ".heic": "HEIC",
    ".heif": "HEIC",
    ".hif": "HEIC",
    ".jxl": JPEG_XL,
    ".avif": "AVIF",
}

EXTENSIONS: Final = frozenset(
    {
        *_EXTRA_NAMES,
        *(".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm"),
        *(".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
    }
)
"""Endings of samples."""
STRANGE: Final = frozenset(
    f".{name}"
    for name in (
        # animations, icons, scans, further spellings of what is read
        *("apng", "avifs", "heics", "heifs", "cur", "dib", "icns", "ico", "mng", "mpo", "jps", "pam", "pcx", "pfm"),
        *("j2c", "j2k", "jpc", "jpf", "jpm", "jpx", "mj2", "jxr", "hdp", "wdp", "ktx", "dds", "dcm", "dicom", "djvu"),
        *("exr", "fit", "fits", "hdr", "qoi", "sgi", "tga", "xbm", "xpm", "psb", "psd", "xcf", "svg", "eps"),
        # raw images of cameras
        *("3fr", "arw", "cr2", "cr3", "crw", "dng", "erf", "fff", "iiq", "kdc", "mef", "mos", "mrw", "nef", "nrw"),
        *("orf", "pef", "raf", "raw", "rw2", "rwl", "sr2", "srf", "srw", "x3f"),
    )
)  # fmt: skip
"""Endings of images that are no samples, which is said wherever there is one."""
ARCHIVES: Final = (
    ".tar",
    ".tar.gz",
    ".tgz",
    ".tar.zst",
    ".zip",
    ".7z",
    ".rar",
    ".parquet",
    ".arrow",
    ".tfrecord",
)
"""Endings of files that may hold images, and are not looked into."""
TABLES: Final = (".csv", ".tsv")
"""Endings of files that may name images."""
VIDEOS: Final = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
"""Endings of videos: samples of ``video/PATH``, nothing to all others."""
VIDEO_BYTES: Final = 4 * 2**30
"""Most bytes of an encoded clip."""
FRAMES: Final = (
    "As clips: video/FOLDER. As images, take its frames out first: ffmpeg -i {} -vf fps=1 FRAMES/%06d.jpg"
)

_BRANDS: Final = {
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIC"),
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
}
_STARTS: Final = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", JPEG_XL),
    (b"\xff\x0a", JPEG_XL),
)
HEAD_BYTES: Final = 64


def format_of(head: bytes) -> str | None:
    """The format of an image by its first :data:`HEAD_BYTES` bytes; None where they are no image's that is known."""
    if head[4:8] == b"ftyp":
        # Brands: the file's own, then those it is compatible with. mif1 and msf1 are of the container alone.
        brands = [head[8:12], *(head[place : place + 4] for place in range(16, len(head) - 3, 4))]
        known = [_BRANDS[brand] for brand in brands if brand in _BRANDS]
        return ("AVIF" if "AVIF" in known else known[0]) if known and head[8:12] in _BRANDS else None
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    return next((name for start, name in _STARTS if head.startswith(start)), None)


@cache
def lacks(kind: str) -> bool:
    """Whether a format needs a package that is not installed."""
    return kind in PACKAGES and find_spec(PACKAGES[kind]) is None


def lacking(ending: str) -> str | None:
    """The format of a name's ending, where this installation cannot read it; else None."""
    kind = _EXTRA_NAMES.get(ending)
    return kind if kind is not None and lacks(kind) else None


@cache
def make_known(kind: str) -> None:
    """Make the package that reads a format known to Pillow, where it is installed."""
    if kind not in PACKAGES or lacks(kind):
        return
    module = import_module(PACKAGES[kind])
    if kind == "HEIC":
        module.register_heif_opener()
    elif kind == JPEG_XL:  # importing it registers it
        module.JpegXLImagePlugin.DECODE_THREADS = 1  # as others: decode processes share the processors
