"""How the ranks of a job find one another: a store on one address only, and a proof that each rank knows the secret.

torch's own rendezvous listens on all addresses, and whoever reaches it can take a rank's place. The secret is in
DDGAN_RANKS_SECRET; the driver sends a new one to each group of ranks over Ray's authenticated channel. Without it,
ranks of one host share a file that only their user can read.
"""

import hmac
import os
import secrets
import socket
import stat
import tempfile
from contextlib import suppress
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.storage.errors import OperationError, UserError

SECRET_VARIABLE = "DDGAN_RANKS_SECRET"
LOOPBACK = "127.0.0.1"
_BACKLOG = 4096
_NONCE_BYTES = 32

_reserved: dict[tuple[str, int], socket.socket] = {}


def reserve(address: str) -> int:
    """Listen at a free port of `address`; `open_store` of this process uses it. Returns the port."""
    listener = _listen(address, 0)
    port = int(listener.getsockname()[1])
    _reserved[address, port] = listener
    return port


def open_store(address: str, port: int, rank: int, world_size: int, timeout_s: float) -> dist.TCPStore:
    """The store of the group; rank 0 serves it at `address` and `port`, on no other address.

    Raises:
        OperationError: rank 0 cannot listen there.
    """
    listener = None
    if rank == 0:
        listener = _reserved.pop((address, port), None) or _listen(address, port)
    return dist.TCPStore(
        address,
        port,
        world_size,
        is_master=rank == 0,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach() if listener else None,
    )


def init_group(backend: str, world_size: int, timeout_s: float) -> None:
    """Initialize torch's process group from RANK, MASTER_ADDR and MASTER_PORT. A collective.

    The ranks of one host connect over its loopback interface, unless GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names
    another. Under torchrun its agent serves the store, and may serve the same one to the ranks that it starts again
    (--max-restarts); these must not find the addresses of the dead ones.
    """
    if is_one_host():
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, _loopback_name())
    timeout = timedelta(seconds=timeout_s)
    rank, address, port = int(os.environ["RANK"]), os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store: dist.Store = dist.TCPStore(address, port, world_size, is_master=False, timeout=timeout)
        if is_one_host():  # the agents of several hosts may count restarts differently
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    else:
        store = open_store(address, port, rank, world_size, timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def is_one_host() -> bool:
    """Whether all ranks are on this host, according to the launcher's environment."""
    if os.environ.get("LOCAL_WORLD_SIZE", "") == os.environ.get("WORLD_SIZE", "1"):
        return True
    try:
        return ip_address(socket.gethostbyname(os.environ.get("MASTER_ADDR", ""))).is_loopback
    except (OSError, ValueError):
        return False


def job_secret() -> bytes:
    """The secret that the ranks of this job share.

    Raises:
        UserError: there is none, or its folder is not private.
    """
    if given := os.environ.get(SECRET_VARIABLE):
        return given.encode()
    if is_one_host():
        return _secret_of_user(Path(tempfile.gettempdir()) / f"ddgan-{os.getuid()}")
    raise UserError(
        f"the ranks are on several hosts and {SECRET_VARIABLE} is not set: set it to the same random text on each "
        "host, for example the output of openssl rand -hex 32; without it anyone on the network could join as a rank"
    )


def prove_membership(secret: bytes, group: Any) -> None:
    """Check that every rank knows the secret, by challenge and response (HMAC-SHA256). A collective.

    Only tensors of a fixed size are exchanged. The secret itself is never sent.

    Args:
        secret: of this job.
        group: gloo group of all ranks.

    Raises:
        OperationError: a rank does not know the secret.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    nonces = _exchange(secrets.token_bytes(_NONCE_BYTES), group)
    proofs = _exchange(_proof(secret, rank, nonces), group)
    strangers = [
        number
        for number in range(world_size)
        if not hmac.compare_digest(proofs[number], _proof(secret, number, nonces))
    ]
    if strangers:
        raise OperationError(
            f"rank {strangers[0]} does not know this job's secret: a foreign process has joined in its place, or "
            f"{SECRET_VARIABLE} differs between the hosts. Set the same value on each host and start again"
        )


def _proof(secret: bytes, rank: int, nonces: list[bytes]) -> bytes:
    return hmac.digest(secret, b"ddgan rank %d of %d:" % (rank, len(nonces)) + b"".join(nonces), "sha256")


def _exchange(mine: bytes, group: Any) -> list[bytes]:
    received = [torch.empty(len(mine), dtype=torch.uint8) for _ in range(dist.get_world_size())]
    dist.all_gather(received, torch.frombuffer(bytearray(mine), dtype=torch.uint8), group=group)
    return [part.numpy().tobytes() for part in received]


def _listen(address: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise OperationError(
            f"rank 0 cannot listen at {address}:{port}: {error}. MASTER_ADDR must be an address of its host, and "
            "MASTER_PORT a free port"
        ) from error
    return listener


def _loopback_name() -> str:
    names = {name for _, name in socket.if_nameindex()}
    return "lo0" if "lo0" in names and "lo" not in names else "lo"


def _secret_of_user(folder: Path) -> bytes:
    """The secret in a folder of mode 700; made by the first rank that needs it."""
    folder.mkdir(mode=0o700, exist_ok=True)
    seen = folder.lstat()
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.getuid() or seen.st_mode & 0o077:
        raise UserError(
            f"{folder} is not a private folder of yours (mode 700): remove it, or set {SECRET_VARIABLE} to a random "
            "text"
        )
    file = folder / "ranks-secret"
    if not file.exists():
        with tempfile.NamedTemporaryFile("w", dir=folder) as made:  # mode 600
            made.write(secrets.token_hex(32))
            made.flush()
            with suppress(FileExistsError):  # the first rank wins
                os.link(made.name, file)
    return file.read_bytes()
