"""NBD URIs: ``nbd+unix:///NAME?socket=PATH`` and ``nbd://HOST[:PORT]/NAME`` (doc/uri.md of NetworkBlockDevice/nbd)."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qs, quote, unquote, urlsplit

from common.errors import ConfigError

DEFAULT_PORT = 10809
"""IANA's port for NBD."""


@dataclass(frozen=True, slots=True)
class NbdUri:
    """An export and where its server listens: a Unix socket, else host and port."""

    name: str = ""
    socket: str | None = None
    host: str | None = None
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        if self.socket is not None:
            return f"nbd+unix:///{quote(self.name, safe='')}?socket={quote(self.socket, safe='/')}"
        host = self.host or "localhost"
        host = f"[{host}]" if ":" in host else host
        port = "" if self.port == DEFAULT_PORT else f":{self.port}"
        return f"nbd://{host}{port}/{quote(self.name, safe='')}"

    @classmethod
    def parse(cls, text: str) -> NbdUri:
        """The parts of ``text``. Raises ConfigError with a sentence that names what is wrong with it."""
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"{text!r} is not a URI: {error}.") from None
        name = unquote(parts.path.removeprefix("/"))
        if parts.scheme == "nbd+unix":
            sockets = parse_qs(parts.query.replace("+", "%2B")).get("socket", [])  # RFC 3986: a plus is no blank
            if len(sockets) != 1 or parts.netloc:
                raise ConfigError(f"{text!r} names no socket.", hint="The form is nbd+unix:///NAME?socket=PATH.")
            return cls(name=name, socket=sockets[0])
        if parts.scheme == "nbd":
            return cls(name=name, host=parts.hostname or "localhost", port=DEFAULT_PORT if port is None else port)
        raise ConfigError(
            f"{text!r} is not an NBD URI that this client speaks.",
            hint="The forms are nbd+unix:///NAME?socket=PATH and nbd://HOST:PORT/NAME.",
        )
