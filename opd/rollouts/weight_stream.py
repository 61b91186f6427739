"""A student's weights on their way from the process that trains to the workers of a server.

A plain TCP connection for each worker: no worker needs a file, a GPU, or a process group in common
with the training, and on neither side there is ever more than a layer beside the model itself. What
goes over it is a sequence of safetensors files of one tensor each, each after its length in eight
bytes; a length of 0 ends it.
"""

from __future__ import annotations

import hmac
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

LENGTH = struct.Struct("!Q")
LOOK_SECONDS = 0.5  # between looks at who has failed
KEY_BYTES = 32  # of hexadecimal digits, by which a worker shows that it was asked to connect


@contextmanager
def listening(host: str) -> Iterator[socket.socket]:
    """Wait for workers on a free port of an address of this machine."""
    with socket.create_server((host, 0)) as listener:
        yield listener


def accept(
    listener: socket.socket, workers: int, key: str, seconds: float, asked: Sequence[Future[Any]]
) -> list[socket.socket]:
    """Wait until so many workers have connected.

    Args:
        listener: Where they connect.
        workers: How many there are.
        key: What each says first.
        seconds: To wait for them, at most; and twice as long for each to take what it is sent.
        asked: Of whoever was asked to connect: done before all have connected, it has failed.

    Raises:
        OSError: They have not come.
    """
    connections: list[socket.socket] = []
    listener.settimeout(LOOK_SECONDS)
    deadline = time.monotonic() + seconds
    while len(connections) < workers:
        try:
            connection = listener.accept()[0]
        except TimeoutError:
            if time.monotonic() > deadline or any(one.done() for one in asked):
                raise
            continue
        connection.settimeout(2 * seconds)
        if hmac.compare_digest(bytes(_read(connection, KEY_BYTES)), key.encode()):
            connections.append(connection)
    return connections


def send(
    connections: Sequence[socket.socket], name: str, weight: Tensor, dtype: torch.dtype
) -> None:
    """Send a tensor to all workers, as another dtype if it is of floating point.

    Raises:
        OSError: A worker stops reading, or is gone.
    """
    sent_as = dtype if weight.is_floating_point() else None
    whole = weight.detach().to(device="cpu", dtype=sent_as).contiguous()
    content = safetensors.torch.save({name: whole})
    for connection in connections:
        connection.sendall(LENGTH.pack(len(content)))
        connection.sendall(content)


def end(connections: Sequence[socket.socket]) -> None:
    """Say that there are no more."""
    for connection in connections:
        connection.sendall(LENGTH.pack(0))


def receive(host: str, port: int, key: str, seconds: float) -> Iterator[tuple[str, Tensor]]:
    """Connect, and yield weights as they come.

    Raises:
        OSError: Nobody listens, or the connection breaks.
    """
    with socket.create_connection((host, port), timeout=seconds) as connection:
        connection.sendall(key.encode())
        while length := LENGTH.unpack(_read(connection, LENGTH.size))[0]:
            yield from safetensors.torch.load(bytes(_read(connection, length))).items()


def _read(connection: socket.socket, length: int) -> bytearray:
    content = bytearray(length)
    view = memoryview(content)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise ConnectionError("the connection ended in the middle of the weights")
        view = view[count:]
    return content
