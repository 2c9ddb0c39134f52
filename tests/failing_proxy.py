"""A TCP proxy in front of a real server, which can be told to fail as overloaded servers do."""

import contextlib
import socket
import threading
from typing import Literal

from ports import free_port

UNAVAILABLE = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: 0\r\n"
    b"Connection: close\r\n\r\n"
)


class FailingProxy:
    """Passes bytes on unchanged, so that signed requests stay valid.

    Args:
        port: of the server, on loopback.

    Attributes:
        url: the proxy's address.
        answered: number of connections that got a 503.
        mode: of new connections: `pass`; `503`, answered without asking the server; `silent`,
            never answered. A change hangs up on the connections that were passed on.
    """

    def __init__(self, port: int) -> None:
        self.port, self.mode, self.answered = port, "pass", 0
        self._passed: set[socket.socket] = set()
        own = free_port()
        self.url = f"http://127.0.0.1:{own}"
        self._listener = socket.create_server(("127.0.0.1", own), backlog=256)
        threading.Thread(target=self._accept, daemon=True).start()

    def fail(self, mode: Literal["pass", "503", "silent"]) -> None:
        """Change the mode."""
        self.mode = mode
        for connection in list(self._passed):
            _hang_up(connection)
        self._passed.clear()

    def close(self) -> None:
        """Stop listening."""
        _hang_up(self._listener)
        self.fail("silent")

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if self.mode == "503":
                client.recv(2**16)
                self.answered += 1
                client.sendall(UNAVAILABLE)
                client.shutdown(socket.SHUT_WR)
                while client.recv(2**16):  # a body that was on its way
                    pass
                client.close()
                return
            if self.mode == "silent":
                while client.recv(2**16):
                    pass
                return
            server = socket.create_connection(("127.0.0.1", self.port))
            self._passed |= {client, server}
            threading.Thread(target=_pump, args=(server, client), daemon=True).start()
            _pump(client, server)
            self._passed -= {client, server}
            return
        client.close()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while content := source.recv(2**16):
            target.sendall(content)
    _hang_up(target)


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
