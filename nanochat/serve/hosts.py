"""The names under which a server without keys answers: those that can only mean this machine.

A page of evil.example, open in a browser here, may let that name point to 127.0.0.1 once it is loaded (DNS rebinding).
For the browser, evil.example:8000 is then still the page's own site, so the page may send requests to our server and
read the answers. The `Host` header of such a request holds the page's name. Names that nobody else can point here are
safe:

    localhost, addresses such as 127.0.0.1 or [::1]       always
    --host and --allowed-host                             always
    this machine's name; names without a dot              if it listens on a network: a LAN, or between containers

A server with API keys accepts any name, because such a page has no key.
"""

import ipaddress
import re
import socket
from collections.abc import Sequence

# [::1]:8000, name:8000, name
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s:/\\@?#\[\]]+))(?::[0-9]*)?")


class Hosts:
    """The names to which a server answers that listens on the address `listen`. allowed: further ones; * = any.

    Raises ValueError for what is not a name and would let nobody in.
    """

    def __init__(self, listen: str, allowed: Sequence[str] = ()) -> None:
        given = {_given_name(each) for each in allowed}
        self.any = "*" in given
        self.names = {"localhost", listen.lower(), *given}
        loopback = listen == "localhost" or (_is_address(listen) and ipaddress.ip_address(listen).is_loopback)
        self.in_network = not loopback
        if self.in_network:
            own = socket.gethostname().lower()
            self.names |= {own, f"{own}.local"}

    def serve(self, header: str | None) -> bool:
        """Return whether a request with this `Host` header may be answered. A browser never leaves it out."""
        if header is None or self.any:
            return True
        match = HOST.fullmatch(header.lower())
        if match is None:
            return False
        name = (match[1] or match[2]).rstrip(".")
        has_no_dot = self.in_network and "." not in name
        return name in self.names or _is_address(name) or has_no_dot


def _given_name(given: str) -> str:
    match = HOST.fullmatch(given.strip().lower())
    name = match and (match[1] or match[2]).rstrip(".")  # any port will do
    if not name or "," in name or ("*" in name and name != "*"):
        raise ValueError(f"--allowed-host {given}: give one name, such as box.lan, or * for any; repeat it for more")
    return name


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
