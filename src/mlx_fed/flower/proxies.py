"""HTTP proxies of the environment (HTTPS_PROXY, NO_PROXY), and connections through them."""

from __future__ import annotations

import http.client
import ssl
from base64 import b64encode
from typing import NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from ..errors import FedError


class ProxyError(FedError):
    """A proxy of another kind than HTTP."""


class Proxy(NamedTuple):
    """An HTTP proxy, which forwards connections (CONNECT).

    Attributes:
        host (str): The proxy's.
        port (int): Its port.
        headers (dict): Its authorization, where the environment has it.
    """

    host: str
    port: int
    headers: dict[str, str]


def from_environment(host: str, port: int, scheme: str) -> Proxy | None:
    """The proxy for a server, by HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, if any.

    Args:
        host (str): The server's.
        port (int): Its port.
        scheme (str): ``"https"`` where the connection is encrypted, else ``"http"``.

    Raises:
        ProxyError: If it is no HTTP proxy.
    """
    proxies = getproxies()
    address = proxies.get(scheme) or proxies.get("all")
    if not address or proxy_bypass(f"{host}:{port}"):
        return None
    try:
        url = urlsplit(address if "://" in address else f"http://{address}")
        proxy_host, proxy_port = url.hostname, url.port or 80
    except ValueError:
        url, proxy_host, proxy_port = SplitResult("", "", "", "", ""), None, 0
    if url.scheme != "http" or proxy_host is None:
        raise ProxyError(
            f"The proxy in {scheme.upper()}_PROXY or ALL_PROXY is not http://HOST:PORT, and a node "
            f"goes through no other. Name {host} in NO_PROXY to reach it without."
        )
    headers: dict[str, str] = {}
    if url.username is not None:
        credentials = f"{unquote(url.username)}:{unquote(url.password or '')}"
        headers["proxy-authorization"] = f"Basic {b64encode(credentials.encode()).decode()}"
    return Proxy(proxy_host, proxy_port, headers)


def connection_to(
    host: str,
    port: int,
    proxy: Proxy | None = None,
    context: ssl.SSLContext | None = None,
    timeout: float | None = None,
) -> http.client.HTTPConnection:
    """An unopened connection to the server, through the proxy if there is one."""
    endpoint = (proxy.host, proxy.port) if proxy else (host, port)
    connection = (
        http.client.HTTPConnection(*endpoint, timeout=timeout)
        if context is None
        else http.client.HTTPSConnection(*endpoint, context=context, timeout=timeout)
    )
    if proxy:
        connection.set_tunnel(host, port, proxy.headers)
    return connection
