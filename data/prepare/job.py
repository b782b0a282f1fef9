"""The task of a `python -m data.prepare` run, and whether it is done already."""

from dataclasses import dataclass, field
from pathlib import Path

import PIL

from data.prepare.encode import PreparedForm
from data.prepare.filters import Filters
from data.sets.work_folder import OutputError
from data.shards.index import FORMAT_VERSION, INDEX_NAME, ShardIndex, load_index, verify_present
from data.sources.source import Source, SourceError, shown_name
from data.storage.location import DataError

Option = int | float | str | bool | None


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Options of a preparation, defaults resolved."""

    form: PreparedForm
    """Form of each prepared image."""
    shard_samples: int | None
    """Samples per shard; None if shard_mb is used."""
    shard_mb: int | None
    """Size of a shard in 10^6 bytes; None if shard_samples is used."""
    seed: int
    """Determines the order of samples in the shards, and the draws of random sources."""
    max_images: int | None = None
    """Number of images of the source, None for all."""
    skip_images: int | None = None
    """Number of images at its start that are left out, None for none."""
    split: str | None = None
    """Requested part of the source, None if not given."""
    filters: Filters = field(default_factory=Filters)
    """Which of the source's images are taken."""
    max_bad_percent: float
    """Percentage of images that may be unusable."""
    workers: int
    """Processes that encode; 0 encodes in the main process."""

    def recorded(self) -> dict[str, Option]:
        """The options that determine the bytes, as index.json keeps them. The last ones only if given."""
        colour = None if self.form.colour == "srgb" else self.form.colour
        part: dict[str, Option] = {
            "max_images": self.max_images,
            "skip_images": self.skip_images,
            "split": self.split,
            "colour": colour,
            "condition_channels": self.form.condition_channels or None,
            "condition_half": self.form.condition_half,
        }
        return {
            "size": self.form.size,
            "channels": self.form.channels,
            "upscale": self.form.upscale,
            "shard_samples": self.shard_samples,
            "shard_mb": self.shard_mb,
            "seed": self.seed,
            **{name: value for name, value in part.items() if value is not None},
            **self.filters.recorded(),
        }


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """The task: source, its fingerprint, options, target."""

    source: Source
    """The images, those that filters leave out included."""
    fingerprint: str
    """Identifies the list of images, those that filters leave out included."""
    options: PrepareOptions
    """How they are prepared."""
    target: Path
    """Folder of the result, absolute; not looked at when the result goes to a URL."""

    def identity(self) -> dict[str, Option]:
        """Everything that determines the bytes of the result."""
        # Another version of the encoder may give other bytes for the same pixels.
        return {**self._stated(), "format_version": FORMAT_VERSION, "pillow": PIL.__version__}

    def difference_from(self, index: ShardIndex) -> str:
        """How a prepared data set differs from this task; empty if it does not."""
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
    """List the options that differ, for a message; empty if none."""
    names = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
    if names == ["source_fingerprint"]:
        return "the files of the source were not the same"
    # If an option explains the change of the files, do not mention them.
    names = [name for name in names if name != "source_fingerprint"]
    return ", ".join(f"{name} is {found.get(name)} there, {wanted.get(name)} here" for name in names)


def refuse_unwritable_names(source: Source) -> None:
    """Check the names for index.json; file names need not be UTF-8.

    Raises:
        SourceError: a name is not UTF-8.
    """
    for name in (source.description, *(source.class_names or ())):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise SourceError(
                f"source {shown_name(source.description)}: the name {shown_name(name)} is no UTF-8, which index.json "
                "needs; rename it"
            ) from None


def refuse_difference(job: Preparation, index: ShardIndex) -> None:
    """Refuse a prepared data set that is not the result of this task.

    Raises:
        OutputError: it differs.
    """
    if difference := job.difference_from(index):
        raise OutputError(
            f"--out {index.shown_location} holds another prepared data set ({difference}); choose another --out, or "
            "remove it yourself"
        )


def find_prepared(job: Preparation) -> ShardIndex | None:
    """The index of this data set if it exists already; None if the target is free.

    Raises:
        OutputError: the target holds something else, which stays untouched.
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
        refuse_difference(job, index)
        verify_present(index)
    except DataError as error:
        raise OutputError(f"--out {target} holds a damaged data set: {error}") from None
    return index
