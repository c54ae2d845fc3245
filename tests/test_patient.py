"""A reply whose announcement was lost is found all the same."""

import asyncio
from queue import Empty
from time import monotonic

import pytest
import zmq
import zmq.asyncio
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.session import Session

from bdlib import patient
from bdlib.patient import PatientChannel, PatientManager


async def sleep_through(channel_class, seconds):
    """Wait for a reply that arrives just before the same socket sends something."""
    context = zmq.asyncio.Context()
    ours, theirs = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
    try:
        theirs.connect(f"tcp://127.0.0.1:{ours.bind_to_random_port('tcp://127.0.0.1')}")
        session = Session(key=b"key")
        channel = channel_class(ours, session)
        session.send(ours, "hello")  # both ends are up when it has come
        session.recv(theirs, mode=0)
        waiting = asyncio.ensure_future(channel.get_msg())
        await asyncio.sleep(0.1)
        session.send(theirs, "execute_reply")
        deadline = monotonic() + 5
        while not zmq.Socket.shadow(ours.underlying).poll(10) and monotonic() < deadline:
            pass  # asking, as sending does, takes the announcement; the loop has not run meanwhile
        return await asyncio.wait_for(waiting, seconds)
    finally:
        context.destroy(linger=0)


def test_a_lost_announcement_does_not_stop_a_run(monkeypatch):
    monkeypatch.setattr(patient, "LOOK", 0.2)
    reply = asyncio.run(sleep_through(PatientChannel, 20))
    assert reply["header"]["msg_type"] == "execute_reply"
    with pytest.raises(asyncio.TimeoutError):  # else this module is not needed any more
        asyncio.run(sleep_through(AsyncZMQSocketChannel, 2))


def test_no_message_is_an_error_after_the_time_given():
    async def ask(timeout):
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.DEALER)
        try:
            await PatientChannel(socket, Session(key=b"key")).get_msg(timeout)
        finally:
            context.destroy(linger=0)

    begin = monotonic()
    with pytest.raises(Empty):
        asyncio.run(ask(1.3))
    assert 1.25 <= monotonic() - begin < 10


def test_papermill_gets_this_client():
    manager = PatientManager(kernel_name="python3")
    assert issubclass(manager.client_factory, patient.PatientClient)
    assert manager.client_factory().shell_channel_class is PatientChannel
