"""By which network interface the ranks of several nodes talk, where nobody chose and there is more than one."""

import os
import socket
from contextlib import suppress

import psutil

from dtrain.distributed.environment import Environment

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
_INNER = ("lo", "docker", "br-", "veth", "virbr", "cni", "flannel", "cali", "tun", "kube")  # lead to no other node


def usable_interfaces() -> dict[str, list[str]]:
    """The interfaces that are up and may lead to other nodes, with their addresses."""
    states, found = psutil.net_if_stats(), {}
    for name, addresses in psutil.net_if_addrs().items():
        own = [each.address.partition("%")[0] for each in addresses if each.family in (socket.AF_INET, socket.AF_INET6)]
        if own and not name.startswith(_INNER) and (name not in states or states[name].isup):
            found[name] = own
    return found


def address_towards(host: str, port: int) -> str:
    """The address under which this machine is seen from another one; '' where that is itself, or is not known."""
    with suppress(OSError):
        family, _, _, _, destination = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(destination)  # of UDP: nothing is sent
            address = str(probe.getsockname()[0]).partition("%")[0]
            return "" if address.startswith("127.") or address == "::1" else address
    return ""


def choose_interfaces(found: Environment, has_gpu: bool) -> list[str]:
    """Give gloo, and NCCL where there are several, the interface by which the ranks meet; a note where it was a choice.

    Gloo would take that of the machine's name, which is often the loopback (127.0.1.1 in /etc/hosts); NCCL takes
    InfiniBand's if there is one, and so does this.
    """
    if found.world_size == found.local_world_size:
        return []
    usable, port = usable_interfaces(), os.environ.get("MASTER_PORT", "")
    address = address_towards(os.environ.get("MASTER_ADDR", ""), int(port) if port.isdigit() else 1)
    towards = next((name for name, own in usable.items() if address in own), "")
    if not towards:
        return []
    os.environ.setdefault(GLOO, towards)
    if len(usable) == 1:
        return []
    text = f"between nodes gloo uses {os.environ[GLOO]}"
    if has_gpu:
        infiniband = ",".join(f"={name}" for name in usable if name.startswith("ib"))
        os.environ.setdefault(NCCL, infiniband or f"={towards}")
        text += f", NCCL {os.environ[NCCL].replace('=', '')}"
    which = f"{GLOO} and {NCCL} choose others" if has_gpu else f"{GLOO} chooses another"
    return [f"{text} (of {', '.join(usable)}); {which}"]
