"""What repeats is recorded, what does not is done anew; and the recorder of the tests holds what a CUDA graph holds."""

from collections.abc import Callable
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch

from tests.trainer.rank.step.tape import Tape
from trainer.rank.step.graphs import WARM_UP, CudaGraphs, RecordingError, Repeated, recorder_for

CPU = torch.device("cpu")


class Counted:
    """Work that counts how often the host does it."""

    def __init__(self) -> None:
        self.times = 0
        self.total = torch.zeros(())

    def __call__(self) -> torch.Tensor:
        self.times += 1
        self.total += 1
        return self.total * 2


def test_work_is_recorded_after_the_warm_up_and_then_done_without_the_host():
    tape, work = Tape(), Counted()
    repeated = Repeated[torch.Tensor](tape)
    results = [repeated(work, "same").item() for _ in range(WARM_UP + 4)]
    assert results == [2.0 * (step + 1) for step in range(WARM_UP + 4)]
    assert (work.times, tape.recorded, tape.replayed) == (WARM_UP + 1, 1, 3)


def test_other_numbers_end_a_recording_and_have_a_warm_up_of_their_own():
    tape, work = Tape(), Counted()
    repeated = Repeated[torch.Tensor](tape)
    for numbers in [1.0] * (WARM_UP + 2) + [2.0] * WARM_UP:
        repeated(work, numbers)
    assert (work.times, tape.recorded, tape.replayed) == (2 * WARM_UP + 1, 1, 1)
    for _ in range(2):
        repeated(work, 2.0)
    assert (tape.recorded, tape.replayed) == (2, 2)
    repeated(work, 1.0)  # the first recording is gone
    assert (work.times, tape.replayed) == (2 * WARM_UP + 3, 2)


def test_work_that_is_not_to_be_recorded_does_not_disturb_what_is():
    tape, work = Tape(), Counted()
    repeated = Repeated[torch.Tensor](tape)
    for step in range(3 * WARM_UP):
        repeated(work, None if step % 2 else "same")
    assert (tape.recorded, tape.replayed) == (1, 1)
    assert work.total.item() == 3 * WARM_UP


def test_a_tape_holds_numbers_and_memory_as_they_were_recorded():
    x, number = torch.ones(3), [2.0]
    recording = Tape().record(lambda: x * number[0] + 1)
    assert recording.result.tolist() == [3.0, 3.0, 3.0]
    number[0], memory = 5.0, recording.result.data_ptr()
    x.fill_(10.0)
    recording.replay()
    assert recording.result.tolist() == [21.0, 21.0, 21.0]
    assert recording.result.data_ptr() == memory
    x.data = torch.zeros(3)  # the same tensor with other memory is not followed
    recording.replay()
    assert recording.result.tolist() == [21.0, 21.0, 21.0]


def test_a_tape_replays_a_backward_pass_and_an_optimizer():
    def trained(steps: int, tape: Tape | None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        network, x = torch.nn.Linear(4, 4), torch.zeros(2, 4)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.1, fused=True)

        def work() -> torch.Tensor:
            loss = network(x).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        losses: list[torch.Tensor] = []
        repeated = Repeated[torch.Tensor](tape) if tape else None
        for step in range(steps):
            x.copy_(torch.arange(8.0).view(2, 4) * (step + 1))
            losses.append((repeated(work, "same") if repeated else work()).clone())
        return [*losses, *(p.detach() for p in network.parameters())]

    tape = Tape()
    assert all(map(torch.equal, trained(9, tape), trained(9, None)))
    assert tape.replayed == 9 - WARM_UP - 1


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: x * torch.tensor([1.0, 2.0]),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
    ],
    ids=["reads", "sends", "mask", "places", "selects"],
)
def test_a_tape_refuses_what_a_graph_cannot_hold(work: Callable[[torch.Tensor], Any]):
    with pytest.raises(RuntimeError, match=r"aten\."):
        Tape().record(lambda: work(torch.ones(2)))


def test_a_cpu_records_nothing_and_says_so(caplog):
    with caplog.at_level("INFO"):
        assert recorder_for(CPU, 1) is None
    assert "engine.cuda_graphs has no effect: it needs a GPU" in caplog.text


def test_several_ranks_record_nothing_and_are_told(caplog):
    with caplog.at_level("INFO"):
        assert recorder_for(torch.device("cuda", 0), 2) is None
    assert "it is for one rank, and there are 2" in caplog.text


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for torch's own functions, which need a GPU; each refuses arguments that torch's does not have."""
    mocks = {name: create_autospec(getattr(torch.cuda, name)) for name in ("Stream", "stream", "CUDAGraph", "graph")}
    mocks["current_stream"] = create_autospec(torch.cuda.current_stream)
    for name, mock in mocks.items():
        monkeypatch.setattr(torch.cuda, name, mock)
    for context in (mocks["stream"], mocks["graph"]):
        context.return_value.__exit__.return_value = None  # errors pass
    return mocks


def test_the_default_stream_waits_for_the_one_of_the_recordings_and_before_that_it_for_the_default(cuda):
    recorder = recorder_for(torch.device("cuda", 0), 1)
    assert isinstance(recorder, CudaGraphs)
    own, current = cuda["Stream"].return_value, cuda["current_stream"].return_value

    def work() -> int:
        own.wait_stream.assert_called_once_with(current)
        cuda["stream"].assert_called_once_with(own)
        current.wait_stream.assert_not_called()
        return 7

    assert recorder.run(work) == 7
    current.wait_stream.assert_called_once_with(own)


def test_what_is_captured_is_done_once_by_a_replay_and_errors_name_the_setting(cuda):
    recorder, graph = CudaGraphs(torch.device("cuda", 0)), cuda["CUDAGraph"].return_value
    recording = recorder.record(lambda: graph.replay.called)
    assert recording.result is False
    cuda["graph"].assert_called_once_with(graph, stream=cuda["Stream"].return_value, capture_error_mode="thread_local")
    assert graph.replay.call_count == 1
    recording.replay()
    assert graph.replay.call_count == 2

    def waits() -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nCompile with ...")

    with pytest.raises(RecordingError, match=r"^operation not permitted when stream is capturing: set engine\."):
        recorder.record(waits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_what_a_cuda_graph_cannot_hold_is_told_with_the_setting():
    recorder = recorder_for(torch.device("cuda", 0), 1)
    assert isinstance(recorder, CudaGraphs)
    x = torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError, match=r"set engine\.cuda_graphs to false"):
        recorder.record(lambda: x.sum().item())
