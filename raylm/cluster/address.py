"""Whether the cluster that a command uses can be reached, and its token."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from concurrent.futures import Future
from urllib.parse import urlsplit

from ray._private import services
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._raylet import AuthenticationTokenLoader, GcsClient  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError, RayError

from raylm.config.address import Address
from raylm.errors import ConfigError

ANSWER_SECONDS = 5.0
"""How long a cluster may take to answer; ray.init waits over ten minutes."""

LOOKUP_SECONDS = 3.0
"""How long the lookup of a host name may take; resolvers time out after ten to thirty."""

JOB = "raylm submit --address http://HOST:8265 VERB …"

HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""The first bytes of an HTTP/2, and so a gRPC, client: the preface and empty settings."""

SETTINGS = 4
"""The type of an HTTP/2 server's first frame, its fourth byte."""


# Whether it can be reached --------------------------------------------------------------------------------------------


def reachable_address(address: Address) -> str:
    """The cluster's HOST:PORT; also sets Ray up to send the user's token if the cluster requires one.

    ConfigError within ten seconds if this process cannot connect to it: no answer, a wrong token, or no node on this
    machine.
    """

    def refused(problem: str) -> ConfigError:
        return ConfigError(f"{address}: {problem}", address.setting)

    host, port = _host_and_port(address)
    problem = _unreachable(host, port)
    if problem is not None:
        raise refused(f"no Ray cluster can be reached there: {problem}")
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token" and not has_token():
        raise refused(no_token())  # GcsClient would end this process
    found = f"{host}:{port}"
    try:
        try:
            nodes = _nodes(found)
        except AuthenticationError:
            show_token()
            nodes = _nodes(found)
    except AuthenticationError as error:
        raise refused(no_token()) from error
    except RayError as error:
        raise refused("what answers there is not the head of a Ray cluster, whose port is 6379 by default") from error
    deadline = time.monotonic() + ANSWER_SECONDS  # a node that has just been started appears late
    while nodes.isdisjoint(services.find_node_ids()) and time.monotonic() < deadline:
        time.sleep(0.5)
        nodes = _nodes(found)
    if nodes.isdisjoint(services.find_node_ids()):
        raise refused(
            "no node of this cluster runs on this machine, and a command needs one beside it; run it on a node, or "
            f"send it there: {JOB}"
        )
    return found


def _nodes(address: str) -> set[str]:
    """Ids of a cluster's nodes."""
    return {node.hex() for node in GcsClient(address=address).get_all_node_info(timeout=ANSWER_SECONDS)}


def _host_and_port(address: Address) -> tuple[str, int]:
    """The addresses as Ray resolves them: auto is the cluster of this machine, localhost is this node's address."""
    way_out = "give the head's HOST:PORT, auto for the cluster that this machine is a node of, or local"
    if address.value.startswith("ray://"):
        problem = f"Ray Client (ray://) is not supported; on a node of the cluster {way_out}; from elsewhere: {JOB}"
        raise ConfigError(f"{address}: {problem}", address.setting)
    if "://" in address.value:
        problem = f"not an address that a command connects to; {way_out}; to a dashboard jobs are sent: {JOB}"
        raise ConfigError(f"{address}: {problem}", address.setting)
    value = address.value
    if value == "auto":
        try:
            value = services.get_ray_address_from_environment("auto", None)
        except ConnectionError:
            problem = "no Ray cluster runs on this machine: `ray start --head` starts one"
            raise ConfigError(f"{address}: {problem}", address.setting) from None
    try:
        parts = urlsplit(f"//{value}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise ConfigError(f"{address}: not an address; {way_out}", address.setting)
    return services.resolve_ip_for_localhost(host), port


def _unreachable(host: str, port: int) -> str | None:
    """Why no gRPC server answers there, which includes a slow name lookup; None if one answers."""
    found: Future[str | None] = Future()

    def look() -> None:
        found.set_result(_why_unreachable(host, port))

    threading.Thread(target=look, daemon=True).start()
    try:
        return found.result(LOOKUP_SECONDS + ANSWER_SECONDS)
    except TimeoutError:
        return f"{host} takes too long to look up and to answer"


def _why_unreachable(host: str, port: int) -> str | None:
    try:
        with socket.create_connection((host, port), ANSWER_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return None
            connection.sendall(HTTP2_HELLO)
            answer = connection.recv(4, socket.MSG_WAITALL)
    except socket.gaierror:
        return f"the host name {host} is not known"
    except ConnectionRefusedError:
        return f"{host} is there, and nothing listens on port {port}"
    except TimeoutError:
        return f"{host}:{port} does not answer within {ANSWER_SECONDS:g} s"
    except OSError as error:
        return f"{host}:{port}: {error.strerror or error}"
    return None if answer[3:] == bytes([SETTINGS]) else f"what listens on port {port} is no Ray head"


# Its token -----------------------------------------------------------------------------------------------------------


def token_source() -> str:
    """Where Ray looks for its token, as a user would name it."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return f"RAY_AUTH_TOKEN_PATH={path}" if path else "~/.ray/auth_token"


def has_token() -> bool:
    """Whether Ray finds a token."""
    try:
        return AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    except AuthenticationError:  # RAY_AUTH_TOKEN_PATH names no file, or an empty one
        return False


def show_token() -> None:
    """Let Ray send its token, if there is one, with each connection, unless RAY_AUTH_MODE is set.

    This process then also requires the token, so workers of a cluster without a token could not reach it. A dashboard
    without a token ignores it.
    """
    if has_token():
        logging.getLogger("ray").setLevel(logging.ERROR)  # which warns of it
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def no_token() -> str:
    """Why a cluster did not get the right token, and the way out."""
    source, mode = token_source(), os.environ.get("RAY_AUTH_MODE", "token")
    head = "`ray get-auth-token` on its head prints the one that it takes"
    if not has_token():
        return (
            f"it asks for a token, and there is none in {source}: {head}; put it into ~/.ray/auth_token (chmod 600) or "
            "RAY_AUTH_TOKEN"
        )
    if mode.lower() != "token":
        return f"it asks for a token, and RAY_AUTH_MODE={mode} holds that of {source} back: export RAY_AUTH_MODE=token"
    return f"it does not take the token of {source}: {head}"
