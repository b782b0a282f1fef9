import pytest
import torch

from models.minibatch_deviation import append_deviation, check_batch_size


@pytest.mark.parametrize(
    ("grouping", "groups"),
    [("contiguous", [[0, 1, 2, 3], [4, 5, 6, 7]]), ("strided", [[0, 2, 4, 6], [1, 3, 5, 7]])],
)
def test_samples_share_the_mean_deviation_of_their_group(grouping, groups: list[list[int]]) -> None:
    x = torch.randn(8, 3, 2, 2)
    y = append_deviation(x, 4, grouping)
    assert torch.equal(y[:, :3], x)
    for group in groups:
        expected = (x[group].double().var(dim=0, correction=0) + 1e-8).sqrt().mean().float()
        torch.testing.assert_close(y[group, 3], expected.expand(4, 2, 2))


def test_contiguous_groups_do_not_see_each_other() -> None:
    x = torch.randn(12, 5, 4, 4)
    together = append_deviation(x, 4, "contiguous")
    apart = torch.cat([append_deviation(part, 4, "contiguous") for part in x.split(4)])
    # the order of float32 sums may depend on the batch
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-6)


def test_small_batch_is_one_group() -> None:
    x = torch.randn(2, 3, 2, 2)
    assert torch.equal(append_deviation(x, 4, "contiguous"), append_deviation(x, 2, "strided"))


def test_equal_samples_deviate_by_the_root_of_the_epsilon() -> None:
    y = append_deviation(torch.ones(4, 3, 2, 2), 4, "contiguous")
    torch.testing.assert_close(y[:, 3], torch.full((4, 2, 2), 1e-4))


def test_deviation_is_float32_under_autocast() -> None:
    # Deviations of 1e-3 around 1 vanish in bfloat16.
    x = 1 + 1e-3 * torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = append_deviation(x, 4, "contiguous")
    assert inside.dtype == torch.float32
    assert torch.equal(inside, append_deviation(x, 4, "contiguous"))


def test_deviation_of_bfloat16_features_is_rounded_once() -> None:
    x = torch.randn(4, 3, 8, 8).bfloat16()
    y = append_deviation(x, 4, "contiguous")
    assert y.dtype == torch.bfloat16
    assert torch.equal(y[:, 3], append_deviation(x.float(), 4, "contiguous")[:, 3].bfloat16())


@pytest.mark.parametrize("grouping", ["contiguous", "strided"])
def test_is_differentiable_twice(grouping) -> None:
    x = torch.randn(4, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: append_deviation(x, 2, grouping), x)
    assert torch.autograd.gradgradcheck(lambda x: append_deviation(x, 2, grouping), x)


def test_indivisible_batch_is_refused() -> None:
    check_batch_size(3, 4)
    check_batch_size(8, 4)
    with pytest.raises(ValueError, match=r"batch of 6 images.*stddev_group_size 4.*multiple of 4.*Change the micro"):
        append_deviation(torch.zeros(6, 1, 1, 1), 4, "contiguous")
