"""Networks that lose, delay and part: each process in a network namespace of its own, on a switch made of TUN devices.

The kernel's own TCP runs over it, so that what is lost is really sent again; `tc netem`, which many kernels lack, is
not needed. Run as a script it is the launcher: unshares, makes the device, hands it to the switch, becomes the command.
"""

import ctypes
import fcntl
import heapq
import os
import random
import select
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
TUNSETIFF, SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK = 0x400454CA, 0x8914, 0x8916, 0x891C
IFF_UP, IFF_TUN, IFF_NO_PI = 0x0001, 0x0001, 0x1000
PACKET_BYTES_MAX = 65536


def get_host(number: int) -> str:
    """The address of the namespace with this number."""
    return f"10.9.0.{number}"


def find_why_not() -> str:
    """Why this machine cannot make such networks; empty when it can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    with Switch() as switch:
        done = subprocess.run([*switch.launch(1), "true"], capture_output=True, text=True, check=False)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


class Switch:
    """Carries packets between namespaces, in a thread of its own. What it does to them may be changed at any time."""

    def __init__(self) -> None:
        self.loss = 0.0
        """Share of packets that are lost, each way."""
        self.delay_s = 0.0
        """Each way."""
        self.island_of: dict[int, int] = {}
        """Numbers on different islands (0 when not named) do not hear each other; nobody is told."""
        self.num_carried = self.num_lost = self.num_cut = 0
        self._random = random.Random(5)
        self._devices: dict[int, int] = {}
        self._waiting: list[tuple[float, int, int, bytes]] = []
        self._is_over = False
        self._folder = tempfile.TemporaryDirectory(prefix="p2pfm-switch-")
        self._path = str(Path(self._folder.name) / "devices")
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._run, name="switch")

    def __enter__(self) -> Self:
        self._door.bind(self._path)
        self._door.listen()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over = True
        self._thread.join()
        self._door.close()
        for device in self._devices.values():
            os.close(device)
        self._folder.cleanup()

    def launch(self, number: int) -> list[str]:
        """What to put before a command that shall run in namespace `number`, at `get_host(number)`."""
        return [sys.executable, __file__, self._path, str(number)]

    def part(self, *islands: Iterable[int]) -> None:
        """Cut the network into islands; without any: heal it."""
        self.island_of = {number: island for island, numbers in enumerate(islands) for number in numbers}

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._door, select.POLLIN)
        while not self._is_over:
            wait_s = min(0.05, max(0.0, self._waiting[0][0] - time.monotonic())) if self._waiting else 0.05
            for ready, _ in poll.poll(wait_s * 1000):
                if ready == self._door.fileno():
                    number, device = self._take_device()
                    poll.register(device, select.POLLIN)
                    continue
                for number, device in self._devices.items():
                    if device == ready:
                        self._take_packets(number, device)
            now = time.monotonic()
            while self._waiting and self._waiting[0][0] <= now:
                _, _, target, packet = heapq.heappop(self._waiting)
                with suppress(OSError):  # its process is gone
                    os.write(self._devices[target], packet)

    def _take_device(self) -> tuple[int, int]:
        connection, _ = self._door.accept()
        with connection:
            data, (device,), _, _ = socket.recv_fds(connection, 16, 1)
            os.set_blocking(device, False)
            previous = self._devices.pop(int(data), None)
            if previous is not None:  # a process was started again in its place
                os.close(previous)
            self._devices[int(data)] = device
            connection.sendall(b"x")
            return int(data), device

    def _take_packets(self, number: int, device: int) -> None:
        for _ in range(64):
            try:
                packet = os.read(device, PACKET_BYTES_MAX)
            except OSError:
                return
            target = packet[19]  # last byte of the destination's IPv4 address
            if packet[0] >> 4 != 4 or target not in self._devices:
                continue
            if self.island_of.get(number, 0) != self.island_of.get(target, 0):
                self.num_cut += 1
            elif self._random.random() < self.loss:
                self.num_lost += 1
            else:
                self.num_carried += 1
                due = time.monotonic() + self.delay_s
                heapq.heappush(self._waiting, (due, self.num_carried, target, packet))


def _make_device(number: int) -> int:
    """A namespace for this process, with a device at its address; returns the device's end for the switch."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = CLONE_NEWNET if os.geteuid() == 0 else CLONE_NEWNET | CLONE_NEWUSER
    if libc.unshare(flags):
        code = ctypes.get_errno()
        raise OSError(code, f"unshare: {os.strerror(code)}")
    device = os.open("/dev/net/tun", os.O_RDWR)
    name = b"switch"
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH14x", name, IFF_TUN | IFF_NO_PI))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for request, address in ((SIOCSIFADDR, get_host(number)), (SIOCSIFNETMASK, "255.255.255.0")):
            packed = struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))
            fcntl.ioctl(control, request, struct.pack("16s16s", name, packed))
        for up in (name, b"lo"):
            fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH14x", up, IFF_UP))
    return device


def _launch(path: str, number: int, command: list[str]) -> None:
    try:
        device = _make_device(number)
    except OSError as error:
        sys.exit(f"no network namespace with a TUN device: {error}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
        door.connect(path)
        socket.send_fds(door, [str(number).encode()], [device])
        door.recv(1)
    os.close(device)
    os.execvp(command[0], command)


if __name__ == "__main__":
    _launch(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
