"""On PYTHONPATH, it lets Python reach no machine but this one; $QTALE_TEST_NETWORK gets what was tried."""

import ipaddress
import os
import sys

LOCAL = ("localhost", "ip6-localhost", "", "0.0.0.0", "::")


def _forbid(event, arguments):
    if event in ("socket.connect", "socket.sendto"):
        address = arguments[1]
    elif event == "socket.getaddrinfo":
        address = arguments[:1]
    else:
        return
    if not isinstance(address, tuple) or _is_local(address[0]):  # a path is a socket of this machine
        return
    log = os.environ.get("QTALE_TEST_NETWORK")
    if log:
        with open(log, "a") as file:
            file.write(f"{event} {address} by {sys.argv}\n")
    raise OSError(101, "Network is unreachable")


def _is_local(host):
    host = host.decode() if isinstance(host, bytes) else host
    if host is None or host in LOCAL:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


sys.addaudithook(_forbid)
