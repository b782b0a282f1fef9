"""What `python -m data.prepare` is asked to do, and whether it is done already."""

from dataclasses import dataclass
from pathlib import Path

import PIL

from data.prepare.encode import ImageForm
from data.prepare.work_folder import OutputError
from data.shards.index import FORMAT_VERSION, INDEX_NAME, ShardIndex, load_index, verify_present
from data.sources.source import Source, SourceError, shown_name
from data.storage.location import DataError

Option = int | float | str | bool | None


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """One preparation, all defaults resolved."""

    form: ImageForm
    """What each image becomes."""
    shard_samples: int | None
    """Samples of a shard, None where shard_mb decides."""
    shard_mb: int | None
    """Size of a shard in 10^6 bytes, None where shard_samples decides."""
    seed: int
    """Decides on the order in which samples are put into shards, and on what random sources draw."""
    max_images: int | None = None
    """Images that were taken from the start of the source, None for all."""
    split: str | None = None
    """Part of the source that was asked for, None if none was."""
    max_bad_percent: float
    """Share of images that may be left out as unusable."""
    workers: int
    """Processes that encode; 0 encodes in the main process."""

    def recorded(self) -> dict[str, Option]:
        """What index.json keeps: the options that decide on the bytes. Those of a part are there if it is a part."""
        part: dict[str, Option] = {"max_images": self.max_images, "split": self.split}
        return {
            "size": self.form.size,
            "channels": self.form.channels,
            "upscale": self.form.upscale,
            "shard_samples": self.shard_samples,
            "shard_mb": self.shard_mb,
            "seed": self.seed,
            **{name: value for name, value in part.items() if value is not None},
        }


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What to do: a source, its fingerprint, how, and where."""

    source: Source
    """The images."""
    fingerprint: str
    """Stands for the list of images."""
    options: PrepareOptions
    """How they are prepared."""
    target: Path
    """Folder of the result, absolute."""

    def identity(self) -> dict[str, Option]:
        """Everything that decides on the bytes of the result."""
        # Another version of the encoder may give other bytes for the same pixels.
        return {**self._stated(), "format_version": FORMAT_VERSION, "pillow": PIL.__version__}

    def difference_from(self, index: ShardIndex) -> str:
        """How a prepared data set differs from what is asked for, empty if it does not."""
        return describe_difference(
            self._stated(),
            {"source": index.source, "source_fingerprint": index.source_fingerprint, **index.options},
        )

    def _stated(self) -> dict[str, Option]:
        return {
            "source": self.source.description,
            "source_fingerprint": self.fingerprint,
            **self.options.recorded(),
        }


def describe_difference(wanted: dict[str, Option], found: dict[str, Option]) -> str:
    """The options that differ, for a message; empty if none does."""
    names = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
    if names == ["source_fingerprint"]:
        return "the files of the source were not the same"
    # Of the files it says nothing where an option explains why they are others.
    names = [name for name in names if name != "source_fingerprint"]
    return ", ".join(f"{name} is {found.get(name)} there, {wanted.get(name)} here" for name in names)


def refuse_unwritable_names(source: Source) -> None:
    """Check the names that index.json will hold; names of files need not be text.

    Raises:
        SourceError: one is no text.
    """
    for name in (source.description, *(source.class_names or ())):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise SourceError(
                f"source {shown_name(source.description)}: the name {shown_name(name)} is no UTF-8, which index.json "
                "needs; rename it"
            ) from None


def find_prepared(job: Preparation) -> ShardIndex | None:
    """The index of this very data set, if it is there already; None if the target is free.

    Raises:
        OutputError: the target is something else, which is left alone.
    """
    target = job.target
    if not target.exists():
        return None
    advice = "choose another --out, or remove it yourself"
    if not target.is_dir():
        raise OutputError(f"--out {target} is a file; {advice}")
    if not any(target.iterdir()):
        if target.is_mount():
            raise OutputError(f"--out {target} is a mount point, which cannot be replaced; name a new folder inside it")
        return None
    if not (target / INDEX_NAME).is_file():
        raise OutputError(f"--out {target} holds other files; {advice}")
    try:
        index = load_index(target)
        if difference := job.difference_from(index):
            raise OutputError(f"--out {target} holds another prepared data set ({difference}); {advice}")
        verify_present(index)
    except DataError as error:
        raise OutputError(f"--out {target} holds a damaged data set: {error}") from None
    return index
