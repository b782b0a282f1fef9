"""Which files are images, and what becomes of the others."""

import io

import pytest
from PIL import Image

from data.sources.kinds import ARCHIVE, FURTHER, HIDDEN, NO_IMAGE, Skips, reason_to_skip
from data.sources.source import SourceError


def start_of(kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (32, 32)).save(stream, kind, **options)
    return stream.getvalue()[:262]


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
@pytest.mark.parametrize("name", ["photograph", "2019.12", "a.jpg_large", "a.JPG~"])
def test_image_without_a_known_suffix_is_known_by_its_start(kind: str, name: str) -> None:
    assert reason_to_skip(name, lambda: start_of(kind)) is None


@pytest.mark.parametrize("name", ["a.jfif", "a.JPE", "b/a.ppm", "a.tif"])
def test_known_suffix_needs_no_look_into_the_file(name: str) -> None:
    assert reason_to_skip(name, lambda: pytest.fail("it is opened")) is None
    assert reason_to_skip("a.txt", lambda: pytest.fail("it is opened")) == NO_IMAGE
    assert reason_to_skip("b/.a.jpg", lambda: pytest.fail("it is opened")) == HIDDEN


@pytest.mark.parametrize(
    ("name", "start", "text"),
    [
        ("a.HEIC", b"", "HEIC, which is not read"),
        ("a.avif", b"", "AVIF, which is not read"),
        ("a", start_of("AVIF"), "AVIF, which is not read"),
        ("a", b"\0\0\0\x18ftypheic", "HEIC, which is not read"),
        ("a", b"\0\0\0\x0cJXL \r\n", "JPEG XL, which is not read"),
        ("a.nef", b"", "camera raw, which is not read"),
        ("a.zip", b"", "archives"),
        ("a", b"PK\3\4", "archives"),
        ("a", bytes(257) + b"ustar", "archives"),
        ("a", b"text", "no images"),
        ("a", b"BM is a word", "no images"),
        ("a", b"P5", "no images"),
    ],
)
def test_other_files_are_told_by_what_they_are(name: str, start: bytes, text: str) -> None:
    reason = reason_to_skip(name, lambda: start)
    assert reason is not None
    assert reason.text.startswith(text)
    assert reason.is_loss == ("not read" in text)


def test_left_out_files_are_counted_by_suffix_and_reason_with_an_example() -> None:
    skips = Skips()
    for name, reason in [("a.TXT", NO_IMAGE), ("b.txt", NO_IMAGE), ("a\x1b.png", FURTHER), ("c", NO_IMAGE)]:
        skips.add(name, reason)
    assert [line.text for line in skips.listed()] == [
        "2 .txt (no images), such as a.TXT",
        "1 .png (further images of a sample, by the part of the name before its first dot), such as a\\x1b.png",
        "1 (no suffix) (no images), such as c",
    ]


def test_more_lost_than_kept_is_refused_and_as_many_is_not() -> None:
    skips = Skips()
    for number in range(3):
        skips.add(f"{number}.png", FURTHER)
        skips.add(f"{number}.txt", NO_IMAGE)
    skips.refuse_losses("source x", 3, 100)
    with pytest.raises(SourceError, match=r"source x: more would be lost than the 2 .*: 3 \.png \(further images of a"):
        skips.refuse_losses("source x", 2, 100)


def test_archive_next_to_images_is_refused_unless_they_may_come_from_it() -> None:
    skips = Skips()
    skips.add("train.zip", ARCHIVE, 200)
    skips.refuse_losses("source x", 1, 100)
    with pytest.raises(SourceError, match=r"1 \.zip \(archives, which are not opened\), such as train\.zip"):
        skips.refuse_losses("source x", 1, 99)
