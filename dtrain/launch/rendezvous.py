"""Where the nodes of a job meet, which of them holds the rendezvous, and by which address the others reach this one."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from dtrain.config.errors import ConfigError
from dtrain.distributed.environment import expand_nodes, node_name

PROBE_SECONDS = 3.0
_UNUSED_ADDRESS = "192.0.2.1"  # RFC 5737


def endpoint_of(option: str | None, nodes: int) -> tuple[str, int]:
    """Host and port of `--rdzv-endpoint`. A node on its own meets nobody: any free port will do."""
    if nodes < 1:
        raise ConfigError(f"--nnodes {nodes}: expected 1 or more")
    if option is None:
        if nodes > 1:
            raise ConfigError(f"--nnodes {nodes} needs --rdzv-endpoint HOST:PORT, the same on each node")
        return "localhost", 0
    host, _, port = option.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--rdzv-endpoint {option}: expected HOST:PORT, such as node1:29500")
    return host.strip("[]"), int(port)


def is_held_here(host: str, port: int, nodes: int) -> bool:
    """Whether this process is to hold the rendezvous; a ConfigError where its port is taken or no such host exists."""
    try:
        addresses = {found[4][0] for found in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise ConfigError(f"--rdzv-endpoint {host}:{port}: {host} is unknown here: {error.strerror}") from None
    own = {address.address.partition("%")[0] for each in psutil.net_if_addrs().values() for address in each}
    is_loopback = any(str(address).startswith("127.") for address in addresses)
    if is_loopback and host in expand_nodes(os.environ.get("SLURM_JOB_NODELIST", "")) and host != node_name():
        return False  # several nodes of a batch system on one machine
    if not addresses & own and not is_loopback:
        if nodes == 1:
            raise ConfigError(f"--rdzv-endpoint {host}:{port} is on another machine; one node alone needs none")
        return False
    with suppress(OSError), socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("", port))
        return True
    if nodes > 1 and is_rendezvous(host, port):  # held by another node's launcher on this machine
        return False
    raise ConfigError(f"--rdzv-endpoint {host}:{port}: port {port} is in use{_owner_of(port)}; take another one")


def is_rendezvous(host: str, port: int) -> bool:
    """Whether one of torch's stores listens there; anything else may never answer, and torch would wait for it."""
    import torch.distributed as dist

    found = threading.Event()

    def connect() -> None:
        with suppress(Exception):
            dist.TCPStore(host, port, is_master=False, wait_for_workers=False)  # type: ignore[attr-defined]
            found.set()

    threading.Thread(target=connect, daemon=True).start()
    return found.wait(PROBE_SECONDS)


def _owner_of(port: int) -> str:
    with suppress(psutil.Error, OSError):
        for found in psutil.net_connections("tcp"):
            if found.laddr and found.laddr.port == port and found.status == psutil.CONN_LISTEN and found.pid:
                return f" by process {found.pid} ({psutil.Process(found.pid).name()})"
    return ""


def address_towards(host: str, port: int) -> str:
    """The address under which this machine is seen from the rendezvous; its name may mean something else there."""
    with suppress(OSError):
        family, _, _, _, destination = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(destination)  # of UDP: nothing is sent
            address = str(probe.getsockname()[0])
            if not address.startswith("127.") and address != "::1":
                return address
    return host


@contextmanager
def without_stacks_of_torch() -> Iterator[None]:
    """Within it torch is imported: of a node that is gone, which this process tells in a line, it shows no C++ stacks.

    Its ranks will, as `TORCH_CPP_LOG_LEVEL` says: NCCL's own errors are told in that way, too.
    """
    if is_ours := "TORCH_CPP_LOG_LEVEL" not in os.environ:
        os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
    try:
        yield
    finally:
        if is_ours:
            del os.environ["TORCH_CPP_LOG_LEVEL"]


def set_gloo_interface(address: str) -> None:
    """Gloo would take the interface of the machine's name, which is often the loopback (127.0.1.1 in /etc/hosts)."""
    if address.strip("0123456789.") and ":" not in address:  # a name: the interface that leads to other machines
        address = address_towards(_UNUSED_ADDRESS, 1)
    for name, found in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in found):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
