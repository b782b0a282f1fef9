"""The uploader's loop against a server in memory that fails where it is told to."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.trainer.tracking.helpers.waits import Clock
from trainer.tracking.sink import Point, RefusedError, RunGoneError
from trainer.tracking.spool import Record, Spool, load_progress
from trainer.tracking.uploader import Uploader, upload_lock


class Killed(BaseException):
    """As SIGKILL: nothing catches it."""


@dataclass
class Server:
    """What a tracking server would hold."""

    runs: list[str] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    images: set[tuple[str, int]] = field(default_factory=set)
    artifacts: set[str] = field(default_factory=set)
    models: set[str] = field(default_factory=set)
    statuses: list[str] = field(default_factory=list)


class Sink:
    """Calls on a `Server`; the hooks run before and after each of them and may raise."""

    is_buffered = False

    def __init__(
        self, server: Server, before: Callable[[str], None] | None = None, after: Callable[[str], None] | None = None
    ):
        self.server = server
        self.limits: list[float] = []
        self._before = before or (lambda call: None)
        self._after = after or (lambda call: None)

    def _call(self, name: str, effect: Callable[[], object]) -> None:
        self._before(name)
        effect()
        self._after(name)

    def limit_requests(self, timeout_s: float) -> None:
        self.limits.append(timeout_s)

    def attach(self, opening: Record, run_id: str | None) -> tuple[str, bool]:
        uid = opening.payload["uid"]
        created = uid not in self.server.runs
        self._call("attach", lambda: self.server.runs.append(uid) if created else None)
        return uid, created

    def describe(self, opening: Record) -> None:
        self._call("describe", lambda: None)

    def set_status(self, status: str, at: int | None) -> None:
        self._call("set_status", lambda: self.server.statuses.append(status))

    def known_steps(self, key: str) -> set[int]:
        self._call("known_steps", lambda: None)
        return {point.step for point in self.server.points if point.key == key}

    def send_points(self, points: Sequence[Point]) -> None:
        self._call("send_points", lambda: self.server.points.extend(points))

    def send_image(self, key: str, step: int, at: int, file: Path) -> None:
        self._call("send_image", lambda: self.server.images.add((key, step)))

    def send_artifact(self, file: Path, folder: str | None) -> None:
        self._call("send_artifact", lambda: self.server.artifacts.add(file.name))

    def register_model(self, snapshot: Path, name: str) -> None:
        self._call("register_model", lambda: self.server.models.add(name))


def uploader(
    run: Path,
    sink: Sink,
    *,
    target: str = "there",
    lives: Callable[[], bool] = lambda: False,
    clock: Clock | None = None,
) -> Uploader:
    clock = clock or Clock()
    return Uploader(
        run, "mlflow", sink, target=target, timeout_s=30, trainer_lives=lives, clock=clock, sleep=clock.sleep
    )


def spool_of_a_run(run: Path, *, close: bool = True) -> None:
    """Points at 10..60 with an image and an artifact between them, so that there are several groups."""
    spool = Spool(run)
    spool.open(step=None, params={}, tags={})
    file = run / "file"
    file.write_text("x")
    for step in range(10, 61, 10):
        spool.metrics(step, {"loss": step, "rate": 1})
        if step == 20:
            spool.image(step, "samples", file)
        if step == 40:
            spool.artifact(file, None, "digits")
    if close:
        spool.close("FINISHED")


def assert_complete(server: Server) -> None:
    assert len(server.runs) == 1
    expected = [(key, step) for step in range(10, 61, 10) for key in ("loss", "rate")]
    assert sorted((point.key, point.step) for point in server.points) == sorted(expected)
    assert server.images == {("samples", 20)}
    assert server.artifacts == {"file"}
    assert server.models == {"digits"}
    assert server.statuses[-1] == "FINISHED"


def at_call(number: int, error: BaseException) -> Callable[[str], None]:
    """A hook that raises at one call and never again."""
    calls = iter(range(10_000))

    def hook(name: str) -> None:
        if next(calls) == number:
            raise error

    return hook


def test_all_records_reach_the_server(tmp_path: Path) -> None:
    server = Server()
    spool_of_a_run(tmp_path)
    assert uploader(tmp_path, Sink(server)).run() == 0
    assert_complete(server)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_every_point_arrives_once_whatever_call_the_process_is_killed_in(tmp_path: Path, moment: str) -> None:
    killed = 0
    for number in range(40):
        run, server = tmp_path / str(number), Server()
        run.mkdir()
        spool_of_a_run(run)
        try:
            uploader(run, Sink(server, **{moment: at_call(number, Killed())})).run()
        except Killed:
            killed += 1
            # The next process is killed as well, in its second call.
            with suppress(Killed):
                uploader(run, Sink(server, **{moment: at_call(1, Killed())})).run()
        assert uploader(run, Sink(server)).run() == 0
        assert_complete(server)
    assert killed >= 8


def test_every_point_arrives_once_if_an_answer_is_lost(tmp_path: Path) -> None:
    for number in range(40):
        run, server = tmp_path / str(number), Server()
        run.mkdir()
        spool_of_a_run(run)
        assert uploader(run, Sink(server, after=at_call(number, TimeoutError("no answer")))).run() == 0
        assert_complete(server)


def test_server_is_not_asked_for_its_steps_while_nothing_goes_wrong(tmp_path: Path) -> None:
    calls: list[str] = []
    spool_of_a_run(tmp_path)
    uploader(tmp_path, Sink(Server(), before=calls.append)).run()
    assert "known_steps" not in calls


def test_invalid_record_is_passed_over_and_its_neighbours_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Picky(Sink):
        def send_points(self, points: Sequence[Point]) -> None:
            if any(point.step == 50 for point in points):
                raise RefusedError("no such step")
            super().send_points(points)

    server = Server()
    spool_of_a_run(tmp_path)
    assert uploader(tmp_path, Picky(server)).run() == 0
    assert sorted(point.step for point in server.points if point.key == "loss") == [10, 20, 30, 40, 60]
    assert load_progress(tmp_path, "mlflow", "there").refused == 1
    assert "passed over metrics of step 50: no such step" in caplog.text


def test_file_that_is_gone_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    spool_of_a_run(tmp_path)
    (tmp_path / "file").unlink()
    assert uploader(tmp_path, Sink(server)).run() == 0
    assert len(server.points) == 12 and not server.images
    assert load_progress(tmp_path, "mlflow", "there").refused == 2
    assert "file is gone" in caplog.text


class NoFiles(Sink):
    """A server whose artifact store refuses this client, until it is allowed."""

    allowed = False

    def _check(self) -> None:
        if not self.allowed:
            raise PermissionError("http://user:secret@host: no rights")

    def send_image(self, key: str, step: int, at: int, file: Path) -> None:
        self._check()
        super().send_image(key, step, at, file)

    def send_artifact(self, file: Path, folder: str | None) -> None:
        self._check()
        super().send_artifact(file, folder)


def test_files_that_the_server_cannot_store_let_the_rest_pass_and_arrive_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server, clock = Server(), Clock()
    spool_of_a_run(tmp_path)
    assert uploader(tmp_path, NoFiles(server), clock=clock).run() == 2
    assert clock.now < 10
    assert len(server.points) == 12 and server.statuses[-1] == "FINISHED"
    noted = load_progress(tmp_path, "mlflow", "there")
    assert len(noted.waiting) == 2 and noted.trouble is None
    assert noted.problem == "it takes curves, but no files: PermissionError: http://***@host: no rights"
    assert caplog.text.count("files wait, and curves go first") == 1
    assert uploader(tmp_path, Sink(server)).run() == 0
    assert_complete(server)
    assert load_progress(tmp_path, "mlflow", "there").problem is None


def test_files_are_tried_again_while_training_continues(tmp_path: Path) -> None:
    server, clock = Server(), Clock()
    spool_of_a_run(tmp_path, close=False)
    sink = NoFiles(server)

    def lives() -> bool:
        sink.allowed = clock.now > 1000
        return clock.now < 2000

    upload = uploader(tmp_path, sink, lives=lives, clock=clock)
    assert upload.run() == 0
    assert server.artifacts == {"file"} and server.images == {("samples", 20)}
    assert load_progress(tmp_path, "mlflow", "there").waiting == ()


def test_file_that_waits_and_is_gone_is_passed_over(tmp_path: Path) -> None:
    server = Server()
    spool_of_a_run(tmp_path)
    uploader(tmp_path, NoFiles(server)).run()
    (tmp_path / "file").unlink()
    assert uploader(tmp_path, Sink(server)).run() == 0
    assert load_progress(tmp_path, "mlflow", "there").refused == 2


@pytest.mark.parametrize(("close", "status"), [(False, "FAILED"), (True, "FINISHED")])
def test_uploader_of_a_former_run_stops_where_the_next_begins(tmp_path: Path, close: bool, status: str) -> None:
    server = Server()
    spool_of_a_run(tmp_path, close=close)
    former = uploader(tmp_path, Sink(server))
    spool = Spool(tmp_path)
    spool.begin_new_run()
    spool.open(step=None, params={}, tags={})
    spool.metrics(10, {"loss": 7})
    spool.close("FINISHED")
    assert former.run() == 0
    assert server.statuses == ["RUNNING", status] and len(server.points) == 12
    assert uploader(tmp_path, Sink(server)).run() == 0
    assert len(server.runs) == 2 and server.statuses[2:] == ["RUNNING", "FINISHED"]
    assert [point.value for point in server.points[12:]] == [7]


def dead(name: str) -> None:
    raise ConnectionRefusedError(f"{name}: http://user:secret@host refused")


def test_dead_server_is_tried_as_long_as_the_trainer_lives_and_the_timeout_longer(tmp_path: Path) -> None:
    clock = Clock()
    spool_of_a_run(tmp_path, close=False)
    left = uploader(tmp_path, Sink(Server(), before=dead), lives=lambda: clock.now < 1000, clock=clock).run()
    assert left == 9
    assert 1030 <= clock.now < 1032
    trouble = load_progress(tmp_path, "mlflow", "there").trouble or ""
    assert "ConnectionRefusedError" in trouble and "secret" not in trouble


def test_server_that_comes_back_gets_everything(tmp_path: Path) -> None:
    clock, server = Clock(), Server()

    def away(name: str) -> None:
        if clock.now < 600:
            raise ConnectionRefusedError

    spool_of_a_run(tmp_path)
    # Closed, but alive until 700 as the trainer's end waits for it: here the close alone would end it after 30 s.
    Spool(tmp_path).open(step=60, params={}, tags={})
    assert uploader(tmp_path, Sink(server, before=away), lives=lambda: clock.now < 700, clock=clock).run() == 0
    assert 600 <= clock.now < 720
    assert len(server.points) == 12
    assert load_progress(tmp_path, "mlflow", "there").trouble is None


def test_request_limit_grows_for_a_server_that_is_slow(tmp_path: Path) -> None:
    clock = Clock()

    class Slow(Sink):
        def attach(self, opening: Record, run_id: str | None) -> tuple[str, bool]:
            if self.limits[-1] < 45:
                clock.sleep(self.limits[-1])
                raise TimeoutError
            clock.sleep(45)
            return super().attach(opening, run_id)

    sink = Slow(Server())
    spool_of_a_run(tmp_path, close=False)
    assert uploader(tmp_path, sink, lives=lambda: clock.now < 300, clock=clock).run() == 0
    assert list(dict.fromkeys(sink.limits))[:4] == [10, 20, 40, 80]


def test_dead_trainers_run_is_marked_failed_after_all_its_points(tmp_path: Path) -> None:
    server = Server()
    spool_of_a_run(tmp_path, close=False)
    assert uploader(tmp_path, Sink(server)).run() == 0
    assert len(server.points) == 12
    assert server.statuses == ["RUNNING", "FAILED"]


def test_resumed_run_is_running_again_and_stays_one_run(tmp_path: Path) -> None:
    server = Server()
    spool_of_a_run(tmp_path)
    uploader(tmp_path, Sink(server)).run()
    spool = Spool(tmp_path, last_step=60)
    spool.open(step=60, params={}, tags={})
    spool.metrics(70, {"loss": 70})
    spool.close("KILLED")
    uploader(tmp_path, Sink(server)).run()
    assert server.statuses == ["RUNNING", "FINISHED", "RUNNING", "KILLED"]
    assert len(server.runs) == 1
    assert [point.step for point in server.points if point.key == "loss"] == list(range(10, 71, 10))


def test_replaced_database_gets_the_whole_spool(tmp_path: Path) -> None:
    spool_of_a_run(tmp_path)
    uploader(tmp_path, Sink(Server())).run()
    spool = Spool(tmp_path, last_step=60)
    spool.open(step=60, params={}, tags={})
    spool.close("FINISHED")
    server = Server()

    class Emptied(Sink):
        gone = True

        def describe(self, opening: Record) -> None:
            if self.gone:
                self.gone = False
                raise RunGoneError("no such run")

    assert uploader(tmp_path, Emptied(server)).run() == 0
    assert_complete(server)


def test_other_target_gets_the_whole_spool(tmp_path: Path) -> None:
    spool_of_a_run(tmp_path)
    uploader(tmp_path, Sink(Server())).run()
    server = Server()
    assert uploader(tmp_path, Sink(server), target="elsewhere").run() == 0
    assert_complete(server)


def test_one_process_uploads_at_a_time_and_the_other_names_it(tmp_path: Path) -> None:
    (tmp_path / "tracking").mkdir()
    with (
        upload_lock(tmp_path, "mlflow", lambda: False),
        pytest.raises(BlockingIOError, match=r"process \d+ is uploading .* to mlflow already"),
        upload_lock(tmp_path, "mlflow", lambda: False),
    ):
        pass
    with upload_lock(tmp_path, "mlflow", lambda: False):
        pass
