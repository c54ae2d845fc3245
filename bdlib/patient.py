"""A kernel manager for papermill whose client does not sleep through a reply.

A cell with an ``Output`` widget makes the client send a message on the shell channel while it waits there
for the cell's reply. ZeroMQ announces what arrived once, and the sending can take that announcement
(ZeroMQ's FAQ on ``ZMQ_FD``; nbclient issue 312): then the kernel is idle, the client waits, and both do for
ever. So the client here looks again every second.
"""

from __future__ import annotations

from queue import Empty
from time import monotonic
from typing import Any

from jupyter_client import AsyncKernelClient, AsyncKernelManager
from jupyter_client.channels import AsyncZMQSocketChannel
from traitlets import Type

LOOK = 1.0  # seconds


class PatientChannel(AsyncZMQSocketChannel):
    """A channel that looks for a message every :data:`LOOK` seconds, announced or not."""

    async def get_msg(self, timeout: float | None = None) -> dict[str, Any]:
        """The next message; ``queue.Empty`` after ``timeout`` seconds without one."""
        deadline = None if timeout is None else monotonic() + timeout
        while True:
            left = LOOK if deadline is None else min(LOOK, max(0.0, deadline - monotonic()))
            try:
                return await super().get_msg(left)
            except Empty:
                if deadline is not None and monotonic() >= deadline:
                    raise


class PatientClient(AsyncKernelClient):
    """A client whose replies come by a :class:`PatientChannel`."""

    shell_channel_class = Type(PatientChannel)


class PatientManager(AsyncKernelManager):
    """A manager that hands out a :class:`PatientClient`."""

    client_factory = Type(PatientClient)
