"""The tests themselves cannot reach a network."""

import socket
import subprocess
import sys

import pytest

ADDRESS = "192.0.2.1"  # reserved for documentation: never answers


def test_connections_are_refused_here():
    with socket.socket() as stream, pytest.raises(OSError, match="offline"):
        stream.connect((ADDRESS, 80))
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        pytest.raises(OSError, match="offline"),
    ):
        datagrams.sendto(b"", (ADDRESS, 53))
    with pytest.raises(OSError, match="offline"):
        socket.getaddrinfo("example.org", 443)


def test_connections_are_refused_in_processes_that_tests_start():
    program = f"import socket; socket.create_connection(({ADDRESS!r}, 80), timeout=1)"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.returncode != 0
    assert "offline" in finished.stderr


def test_loopback_stays_open():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as stream,
    ):
        assert stream.getpeername() == server.getsockname()
