"""Results for samples as a table."""

import dataclasses
from collections.abc import Sequence

from trainer.config.sections import JudgeKind
from trainer.evaluate.classifier import NUM_FEATURES, Evaluation
from trainer.evaluate.networks.features import JPEG_QUALITY, Codec
from trainer.evaluate.quality import Quality
from trainer.evaluate.reference import Measured

MAX_LISTED_CLASSES = 20
"""With more classes the table summarizes their shares; --json has all."""
CODEC_WORDS: dict[Codec, str] = {
    "none": "no file codec",
    "png": "PNG, lossless",
    "jpeg": f"JPEG of quality {JPEG_QUALITY}",
}
FIGURE_WORDS = {
    "fid": "Fréchet distance",
    "kid": "kernel distance",
    "inception_score": "class score, like Inception's",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
}
JUDGE_WORDS: dict[JudgeKind, dict[str, str]] = {
    "classifier": {},
    "lite0": {"fid": "FD-Lite0", "kid": "KD-Lite0 (kernel distance)"},
    "inception": {"fid": "FID", "kid": "KID", "inception_score": "Inception score"},
    "inception-clean": {"fid": "clean-FID", "kid": "clean-KID"},
    "dinov2": {"fid": "FD-DINOv2", "kid": "KD-DINOv2 (kernel distance)"},
    "file": {
        "fid": "Fréchet distance (FID)",
        "kid": "kernel distance (KID)",
        "inception_score": "Inception score",
    },
}
"""Names that depend on the network."""


def render(evaluation: Evaluation, *, source: str, class_names: Sequence[str] | None = None) -> str:
    """The results as a short table.

    Args:
        evaluation: the results.
        source: the samples' source and codec, in a phrase.
        class_names: names of the classes; numbers if omitted.
    """
    e = evaluation
    lines = [
        f"samples    {e.num_samples} images, {source}",
        f"reference  {e.num_reference} images, all of the data set",
        f"features   {NUM_FEATURES} of a classifier trained on the data set (seed {e.seed}),",
        f"           right on {e.classifier_accuracy:.2%} of {e.num_held_out} held-out images",
        "",
        f"{'Fréchet distance to the reference':<34}{'samples':>10}{'noise':>10}{'ratio':>10}",
        f"{'':<34}{e.frechet_samples:>10.4g}{e.frechet_noise:>10.4g}{e.ratio:>10.4f}",
        "",
        # The Fréchet distance is already shown above, with that of noise.
        *([*quality_lines(e.quality, "classifier", without=["fid"]), ""] if e.quality else []),
    ]
    if e.agreement is not None and e.class_agreement:
        least = min(e.class_agreement, key=e.class_agreement.__getitem__)
        of_least = f"{e.class_agreement[least]:.1%} of class {_name(least, class_names)}, the least"
        lines += [f"{'of the class that was asked for':<34}{e.agreement:>10.1%}, {of_least}", ""]
    shares, reference = e.class_shares, e.reference_class_shares
    if len(shares) > MAX_LISTED_CLASSES:
        seen, present = (sum(share > 0 for share in values) for values in (shares, reference))
        largest = max(range(len(shares)), key=shares.__getitem__)
        lines += [
            f"classes    {seen} of {present} seen among the samples",
            f"           largest share {shares[largest]:.2%} ({_name(largest, class_names)}), "
            f"in the reference {reference[largest]:.2%}",
        ]
    else:
        lines.append(f"{'share of class':<34}{'samples':>10}{'reference':>10}")
        lines += [f"{_name(i, class_names):<34}{share:>10.1%}{reference[i]:>10.1%}" for i, share in enumerate(shares)]
    return "\n".join(lines)


def quality_lines(quality: Quality, judge: JudgeKind, *, without: Sequence[str] = ()) -> list[str]:
    """The available figures, one per line, by the names that `judge` allows.

    Args:
        quality: the figures.
        judge: only a network from a file may be Inception, whose figures are called FID, KID and Inception score.
        without: figures to leave out, by their names in `Quality`.
    """
    words = FIGURE_WORDS | JUDGE_WORDS[judge]
    return [
        f"{words[name]:<34}{value:>10.4g}"
        for name, value in dataclasses.asdict(quality).items()
        if name not in without and value is not None
    ]


def render_measured(measured: Measured, *, source: str) -> str:
    """The results for a given network as a short table."""
    m = measured
    reference = f"{m.num_reference} images" if m.num_reference else "statistics of a number of images that is not said"
    lines = [
        f"samples    {m.num_samples} images, {source}, measured through {CODEC_WORDS[m.through]}",
        f"reference  {reference}",
    ]
    figures = quality_lines(m.quality, m.judge)
    if m.infinity is not None:
        words = FIGURE_WORDS | JUDGE_WORDS[m.judge]
        figures.insert(1, f"{words['fid'] + ' at infinity':<34}{m.infinity:>10.4g}")
    return "\n".join([*lines, f"features   {m.network}", "", *figures])


def render_checkpoints(rows: Sequence[tuple[int | None, int | None, Measured]], *, source: str) -> str:
    """A row for each checkpoint, in the order given, the one of the smallest Fréchet distance with an asterisk.

    Args:
        rows: step, training images up to there, and figures; at least one.
        source: the samples' source, in a phrase.
    """
    first = rows[0][2]
    words = FIGURE_WORDS | JUDGE_WORDS[first.judge]
    names = [name for name, value in dataclasses.asdict(first.quality).items() if value is not None]
    columns = [_COLUMNS.get(words[name], words[name]) for name in names]
    columns += [] if first.infinity is None else ["at infinity"]
    best = min(rows, key=lambda row: row[2].quality.fid)[0]
    table = [f"{'step':>10}{'images':>12}" + "".join(f"{column:>12}" for column in columns)]
    for step, images, measured in rows:
        values = "".join(f"{getattr(measured.quality, name):>12.4g}" for name in names)
        values += "" if measured.infinity is None else f"{measured.infinity:>12.4g}"
        table.append(f"{step or '':>10}{images or '':>12}{values}{' *' if step == best else ''}")
    lines = [
        f"samples    {first.num_samples} images of each checkpoint, {source}, "
        f"measured through {CODEC_WORDS[first.through]}",
        f"reference  {first.num_reference or 'unknown number of'} images",
        f"features   {first.network}",
        "",
    ]
    return "\n".join([*lines, *table])


_COLUMNS = {
    "Fréchet distance": "Fréchet",
    "kernel distance": "kernel",
    "class score, like Inception's": "classes",
    "KD-Lite0 (kernel distance)": "KD-Lite0",
    "KD-DINOv2 (kernel distance)": "KD-DINOv2",
    "Fréchet distance (FID)": "FID",
    "kernel distance (KID)": "KID",
    "Inception score": "IS",
}
"""Short forms of names for a table."""


def _name(label: int, class_names: Sequence[str] | None) -> str:
    return class_names[label] if class_names is not None else str(label)
