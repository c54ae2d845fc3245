"""Refuse every connection that leaves this machine.

Python imports a module of this name when it starts. ``tests/conftest.py`` puts this
folder on PYTHONPATH, so that the processes a test starts, notebook kernels among them,
are offline too; kernels talk to the test over loopback, which stays open.

An audit hook cannot be taken out again, so no other plugin can open what is closed here.
"""

import sys

_LOOPBACK = ("127.", "::1", "::ffff:127.", "localhost")


class NetworkRefused(OSError):
    """A test tried to reach a network."""


def _refuse(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        if not isinstance(address, tuple):
            return  # a socket of this machine, named by a file; or one connected before
        host = address[0]
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in (None, "", "0.0.0.0", "::") and not host.startswith(_LOOPBACK):
        raise NetworkRefused(f"tests are offline; refused to reach {host}")


if not getattr(sys, "refuses_network", False):
    sys.refuses_network = True
    sys.addaudithook(_refuse)
