"""What Ray Train's controller is given of this project: how ranks meet, and which of its own parts a run leaves out.

The controller is a process of its own that watches the ranks. It imports this file, and neither torch nor what ranks
run: that would take it longer than all else that it does before the ranks start.
"""

import importlib
import os
import secrets
from collections.abc import Mapping
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.result import Result

GROUP_VARIABLE = "DDGAN_GROUP"
"""Environment variable of a rank: the name of the group that it was started in."""


class Rendezvous(BackendConfig):
    """Tells each rank where to meet, and its group's name and secret; the ranks themselves make the process group.

    Ray's own rendezvous for torch would listen on all addresses of a node, and would let in whoever connects.
    """

    def __init__(self, *, loads: str) -> None:
        """Args:
        loads: module of what the ranks run; all load it at once before they meet, and the controller never does.
        """
        self.loads = loads

    @property
    def backend_cls(self) -> type[Backend]:
        """The part that Ray calls when a group of workers starts."""
        return _RendezvousBackend


class _RendezvousBackend(Backend):
    share_cuda_visible_devices = True  # each rank sees all GPUs that the run has on its host, and takes its own

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, Rendezvous)
        nodes = worker_group.execute(_ready_address, backend_config.loads)
        place = worker_group.execute_single(0, _meeting_place, nodes[0] if len(set(nodes)) > 1 else None)
        worker_group.execute(_set_environment, place)


def _ready_address(loads: str) -> str:
    """Run by each rank: load a module, and return the address of the rank's node."""
    importlib.import_module(loads)
    return ray.util.get_node_ip_address()


def _meeting_place(address: str | None) -> dict[str, str]:
    """Run by rank 0: listen at `address`, or, if all ranks are on its node, at its loopback.

    Returns:
        Environment variables that tell a rank where its group meets, what it is called, and its secret.
    """
    from trainer.engine.rendezvous import LOOPBACK, SECRET_VARIABLE, reserve

    address = address or LOOPBACK
    place = {"MASTER_ADDR": address, "MASTER_PORT": str(reserve(address))}
    return place | {GROUP_VARIABLE: secrets.token_hex(8), SECRET_VARIABLE: secrets.token_hex(32)}


def _set_environment(variables: Mapping[str, str]) -> None:
    os.environ.update(variables)


class FixedHere(FixedScalingPolicy):
    """A fixed number of ranks on a Ray that has no nodes to ask for: it starts no actor that coordinates requests."""

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """Ask for nothing."""

    def _maybe_send_resource_request(self) -> None:
        pass


class Trainer(DataParallelTrainer):
    """Ray Train's trainer, without actors that it starts by default and that a run has no use for.

    One shares Ray's own datasets out to the ranks: there are none. On a Ray that ends with the run, another one would
    free what a dead controller has reserved, and ask the dashboard, which is not there, whether the controller lives;
    a third would ask for more nodes.
    """

    def __init__(self, *arguments: Any, ends_with_run: bool, **options: Any) -> None:
        """Args:
        arguments, options: as of Ray's.
        ends_with_run: whether the Ray that is connected to was started by this process.
        """
        super().__init__(*arguments, **options)
        self._ends_with_run = ends_with_run

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback) if self._ends_with_run else (DatasetsCallback,)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

    def _initialize_and_run_controller(self, **parts: Any) -> Result:
        if self._ends_with_run and isinstance(parts["scaling_policy"], FixedScalingPolicy):
            parts["scaling_policy"] = FixedHere(self.scaling_config)
        return super()._initialize_and_run_controller(**parts)
