"""Quality figures of samples, from a network's features of the samples and of a reference.

Fréchet distance (FID), kernel distance (KID) and Inception score are computed by torchmetrics; precision, recall,
density and coverage, which it lacks, here. All depend on the number of samples: compare only figures of equal numbers.

Every rank already has all features, so torchmetrics must not sum over the ranks. It is imported only where it is
needed: with scipy and matplotlib it would take a third of the start time of every process of a run.
"""

import dataclasses
import statistics
import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trainer.config.sections import RENAMED_FIGURES, JudgeKind

# torchmetrics warns about this at each use of a metric, and the user cannot change it.
warnings.filterwarnings("ignore", "Metric .* will save all extracted features in buffer", UserWarning)

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
"""Number of images of a subset; fewer if the smaller set has fewer."""
SCORE_SPLITS = 10
PRECISION_NEIGHBOURS = 3
"""k of precision and recall, as in 1904.06991."""
DENSITY_NEIGHBOURS = 5
"""k of density and coverage, as in 2002.09797."""
INFINITY_POINTS = 15
"""Numbers of samples that the distance is extrapolated from, as in 1911.07023."""
ROWS_AT_ONCE = 1024
"""Rows of the distance matrix per chunk."""
Features = Float[Tensor, "n d"]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Statistics of images for the Fréchet distance."""

    mean: Float[Tensor, " d"]
    """Mean of the features, float64."""
    covariance: Float[Tensor, "d d"]
    """Covariance of the features, unbiased, float64."""
    num_images: int
    """Number of images; 0 if unknown."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Figures for one set of samples; None if the reference or the network does not provide what they need."""

    fid: float
    """Fréchet distance (1706.08500, Eq. 6); 0 is best."""
    kid: float | None = None
    """Squared maximum mean discrepancy with a cubic kernel (1801.01401), mean over random subsets; 0 is best."""
    inception_score: float | None = None
    """exp of the mean KL between a sample's classes and the overall ones (1606.03498); 1 to the number of classes."""
    precision: float | None = None
    """Share of samples within the reference's neighbourhoods (1904.06991)."""
    recall: float | None = None
    """Share of the reference within the samples' neighbourhoods (1904.06991)."""
    density: float | None = None
    """Mean number of reference neighbourhoods that contain a sample, over k (2002.09797); about 1 for the data."""
    coverage: float | None = None
    """Share of the reference's neighbourhoods that contain a sample (2002.09797)."""


def compare(
    samples: Features,
    reference: Features | Statistics,
    *,
    logits: Float[Tensor, "n k"] | None = None,
    seed: int = 0,
) -> Quality:
    """Compute all figures that are possible.

    Args:
        samples: features of the samples, N > 1.
        reference: features of the reference, or only its statistics, which allow only the Fréchet distance.
        logits: logits of the samples, for the Inception score.
        seed: seed of KID's subsets and of the sample order for the score's splits.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        score = None if logits is None else inception_score(logits)
        if isinstance(reference, Statistics):
            return Quality(fid=frechet_distance(statistics_of(samples), reference), inception_score=score)
        precision, recall = precision_and_recall(samples, reference)
        density, coverage = density_and_coverage(samples, reference)
        return Quality(
            fid=frechet_distance(statistics_of(samples), statistics_of(reference)),
            kid=kernel_distance(samples, reference),
            inception_score=score,
            precision=precision,
            recall=recall,
            density=density,
            coverage=coverage,
        )


def named(quality: Quality, judge: JudgeKind) -> dict[str, float | None]:
    """The figures by the names of their curves; `RENAMED_FIGURES` says whose are not called `fid` and the like."""
    names = RENAMED_FIGURES.get(judge, {})
    return {names.get(name, name): value for name, value in dataclasses.asdict(quality).items()}


def statistics_of(features: Features) -> Statistics:
    """Mean and unbiased covariance, in float64."""
    features = features.double()
    return Statistics(
        mean=features.mean(dim=0),
        covariance=torch.cov(features.T).view(2 * features.shape[1:]),
        num_images=len(features),
    )


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), computed by torchmetrics.

    If a set has no more images than features, its covariance is singular. Rounding then changes the result by about
    1e-7 of tr(C_a + C_b); negative results are returned as 0.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=GivenFeatures(len(a.mean)), sync_on_compute=False)
    for prefix, side in (("fake", a), ("real", b)):
        n = max(2, side.num_images)  # cancels out
        total = side.mean * n
        setattr(metric, f"{prefix}_features_sum", total)
        setattr(metric, f"{prefix}_features_cov_sum", side.covariance * (n - 1) + torch.outer(total, side.mean))
        setattr(metric, f"{prefix}_features_num_samples", torch.tensor(n))
    metric.orig_dtype = torch.float64
    metric._update_count = 1  # else it warns that update() was not called
    return max(0.0, metric.compute().item())


def min_samples_for_infinity(num_features: int) -> int:
    """Twice as many samples as the smallest subset, whose covariance must have full rank with room to spare."""
    return 4 * num_features


def frechet_distance_at_infinity(samples: Features, reference: Features | Statistics, *, seed: int = 0) -> float:
    """The Fréchet distance of infinitely many samples (Chong and Forsyth, 1911.07023).

    The distance of N samples is, to first order, linear in 1/N. It is measured for 15 numbers in even steps from a
    tenth of the samples, or twice the number of features if that is more, up to all, each time on a random subset, and
    a line in 1/N is fitted to it, whose value at 0 is returned. The reference stays as it is: only the bias of the
    samples goes. Close to 0 the result may be negative.

    Args:
        samples: features of the samples, at least `min_samples_for_infinity` of them.
        reference: features of the reference, or its statistics.
        seed: seed of the subsets.
    """
    N, d = samples.shape
    compared = reference if isinstance(reference, Statistics) else statistics_of(reference)
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.linspace(max(N // 10, 2 * d), N, INFINITY_POINTS, dtype=torch.float64).round().int().tolist()
    distances = [
        frechet_distance(statistics_of(samples[torch.randperm(N, generator=generator)[:n]]), compared) for n in numbers
    ]
    return statistics.linear_regression([1.0 / n for n in numbers], distances).intercept


def kernel_distance(samples: Features, reference: Features) -> float:
    """KID, unbiased, so it may be negative."""
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(KID_SUBSET_SIZE, len(samples), len(reference))
    subsets = KID_SUBSETS if size < max(len(samples), len(reference)) else 1
    metric = KernelInceptionDistance(
        feature=GivenFeatures(samples.shape[1]), subsets=subsets, subset_size=size, sync_on_compute=False
    )
    metric.update(reference.double(), real=True)
    metric.update(samples.double(), real=False)
    return metric.compute()[0].item()


def inception_score(logits: Float[Tensor, "n k"]) -> float:
    """Mean over ten splits; fewer if there are fewer than ten samples."""
    from torchmetrics.image.inception import InceptionScore

    metric = InceptionScore(
        feature=GivenFeatures(logits.shape[1]), splits=min(SCORE_SPLITS, len(logits)), sync_on_compute=False
    )
    metric.update(logits.double())
    return metric.compute()[0].item()


def precision_and_recall(samples: Features, reference: Features) -> tuple[float, float]:
    """Kynkäänniemi et al. (1904.06991), Eq. 1-3: shares that lie within a neighbourhood of the other set."""
    k = PRECISION_NEIGHBOURS
    precision = _inside(samples, reference, _radii(reference, k))[0]
    recall = _inside(reference, samples, _radii(samples, k))[0]
    return precision.double().mean().item(), recall.double().mean().item()


def density_and_coverage(samples: Features, reference: Features) -> tuple[float, float]:
    """Naeem et al. (2002.09797), Eq. 4-5."""
    k = DENSITY_NEIGHBOURS
    _, counts, covered = _inside(samples, reference, _radii(reference, k))
    return counts.double().mean().item() / min(k, len(reference) - 1), covered.double().mean().item()


def _radii(features: Features, k: int) -> Float[Tensor, " n"]:
    """Distance of each point to its k-th nearest neighbour in its own set."""
    k = min(k, len(features) - 1)  # the nearest point is the point itself
    rows = features.split(ROWS_AT_ONCE)
    return torch.cat([torch.cdist(chunk, features).kthvalue(k + 1, dim=1).values for chunk in rows])


def _inside(points: Features, centres: Features, radii: Float[Tensor, " m"]) -> tuple[Tensor, Tensor, Tensor]:
    """Whether each point lies in a ball, and in how many; and whether each ball contains a point."""
    counts, holds = [], torch.zeros(len(centres), dtype=torch.bool, device=centres.device)
    for chunk in points.split(ROWS_AT_ONCE):
        within = torch.cdist(chunk, centres) <= radii
        counts.append(within.sum(dim=1))
        holds |= within.any(dim=0)
    number = torch.cat(counts)
    return number > 0, number, holds


class GivenFeatures(nn.Module):
    """A feature extractor for a metric that receives features instead of images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """Unchanged."""
        return features
