"""Who gets through the door of a server that encrypts and knows its nodes, over real sockets."""

from __future__ import annotations

import datetime
import http.client
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx_fed as fed

import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto import fleet_pb2
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from mlx_fed.errors import RunError
from mlx_fed.fleet import certificates
from mlx_fed.fleet.federation import Federation
from mlx_fed.fleet.identity import Identity, from_files, from_token, make_key
from mlx_fed.fleet.server import _serving, _socket
from mlx_fed.flower import keys, transport
from mlx_fed.flower.fleet_client import FleetClient
from mlx_fed.flower.transport import RequestRefused, Unreachable, UntrustedServer
from mlx_fed.flower.link_grid import LinkGrid
from mlx_fed.flower.link_state import Link
from mlx_fed.flower.error_replies import is_missing
from mlx_fed.rounds.roster import Roster

from ..conftest import free_port

HOST = "127.0.0.1"


class Server:
    """A federation that is served, and what it takes to join it."""

    def __init__(self, federation: Federation, link: Link, port: int, places: Path):
        self.federation, self.link, self.port, self.places = federation, link, port, places
        self.grid = LinkGrid(link)

    def identity(self, name: str = "node-0") -> Identity:
        return from_token(self.federation.invite(name), None, self.places / name)

    def post(self, path: str, headers: dict[str, str], body: bytes = b"") -> tuple[int, bytes]:
        context = certificates.client_context(self.federation.authority)
        connection = http.client.HTTPSConnection(HOST, self.port, timeout=20, context=context)
        connection.request("POST", path, body, {"content-type": PROTOBUF_MEDIA_TYPE} | headers)
        response = connection.getresponse()
        return response.status, response.read()


def node(who: Identity) -> FleetClient:
    return FleetClient(who.host, who.port, who.context, who.key, who.invitation)


def joined(who: Identity) -> FleetClient:
    joining = node(who)
    joining.register()
    return joining


@contextmanager
def serving(federation: Federation, places: Path) -> Iterator[Server]:
    port = int(federation.address.rpartition(":")[2])
    with _socket(HOST, port) as listening, _serving(listening, federation, HOST) as link:
        yield Server(federation, link, port, places)
        link.finish()


@pytest.fixture
def federation(tmp_path) -> Federation:
    return Federation(tmp_path / "federation", f"{HOST}:{free_port()}")


@pytest.fixture
def server(federation, tmp_path) -> Iterator[Server]:
    with serving(federation, tmp_path) as server:
        yield server


def ask(server: Server, asked: FleetClient) -> str:
    content = RecordDict({"config": ConfigRecord({"n": 1})})
    message = Message(content, asked.node_id, MessageType.TRAIN)
    (message_id,) = server.grid.push_messages([message])
    return message_id


# -- joining -----------------------------------------------------------------------------------


def test_a_node_enrols_with_its_token_and_works(server):
    one = joined(server.identity())
    assert list(server.grid.get_node_ids()) == [one.node_id]
    assert server.grid.name_of(one.node_id) == "node-0"
    message_id = ask(server, one)
    received = one.receive()
    one.send(Message(RecordDict(), reply_to=received), 0.0)
    (reply,) = server.grid.pull_messages([message_id])
    assert reply.metadata.src_node_id == one.node_id


def test_what_is_secret_is_its_owners_alone(server):
    server.identity()
    secrets = [
        *(server.federation.folder / "secret").iterdir(),
        server.federation.folder / "nodes.json",
        server.places / "node-0" / "node.key",
    ]
    assert {path.stat().st_mode & 0o777 for path in secrets} == {0o600}
    folders = (server.federation.folder, server.federation.folder / "secret")
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}
    key = server.places / "node-0" / "node.key"
    key.chmod(0o644)
    with pytest.raises(fed.FedError, match=f"others can read it: chmod 600 {key}"):
        make_key(key)


def test_a_token_serves_for_one_node(server, tmp_path):
    token = server.federation.invite("node-0")
    joined(from_token(token, None, tmp_path / "one")).leave()
    with pytest.raises(
        RequestRefused, match="This token was used: node-0 has enrolled with another key"
    ):
        joined(from_token(token, None, tmp_path / "two"))
    joined(from_token(token, None, tmp_path / "one"))  # the line that started it starts it again


@pytest.mark.parametrize("token", [True, False])
def test_a_key_that_nobody_invited_is_turned_away(server, tmp_path, token):
    stranger = from_files(server.federation.address, server.federation.authority, None)
    if token:
        told = server.federation.invite("node-0")
        server.federation.nodes.revoke("node-0")
        stranger = from_token(told, None, tmp_path / "stranger")
    why = "This token was revoked" if token else "does not know this node's key"
    with pytest.raises(RequestRefused, match=why) as refusal:
        joined(stranger)
    assert refusal.value.status == 401
    assert not server.link.state.nodes, "a stranger takes memory"


def test_keys_that_were_handed_over_otherwise(server, tmp_path):
    key = tmp_path / "own.key"
    make_key(key)
    public = keys.load_public(key.with_suffix(".pub").read_bytes())
    server.federation.nodes.add("hospital-a", public)
    brought = from_files(server.federation.address, server.federation.authority, key)
    one = joined(brought)
    assert server.grid.name_of(one.node_id) == "hospital-a"


def test_flowers_own_client_gets_in_with_a_known_key(server, tmp_path):
    from flwr.supernode.fleet_http_connection import http_request_response

    key = keys.load_private(make_key(tmp_path / "own.key"))
    public = keys.load_public((tmp_path / "own.pub").read_bytes())
    server.federation.nodes.add("stock", public)
    with http_request_response(
        server.federation.address,
        insecure=False,
        root_certificates=str(server.federation.authority),
        authentication_keys=(key, key.public_key()),
    ) as (node_id, *_):
        assert server.grid.name_of(node_id) == "stock"


def test_one_key_is_one_node_at_a_time(server):
    who = server.identity()
    first = joined(who)
    with pytest.raises(RequestRefused, match="A node with this key is online") as refusal:
        joined(who)
    assert refusal.value.status == 409
    first.leave()
    joined(who)


def test_a_node_that_was_started_again_is_asked_again(server):
    """What a process before it was asked, has answered, or was sent away for is not its own."""
    who = server.identity()
    told = []
    roster = Roster(server.grid, {}, {}, {}, lambda event: told.append(event.name))

    def started() -> tuple[FleetClient, Message]:
        one = joined(who)
        roster.update()
        question = one.receive()
        assert question.metadata.message_type == "query.roll_call"
        return one, question

    def answered() -> FleetClient:
        one, question = started()
        answer = {"name": "node-0", "partition-id": 0, "parameters": "{}", "statistics": "{}"}
        content = RecordDict({"config": ConfigRecord(answer)})
        one.send(Message(content, reply_to=question), 0.0)
        return one

    started()[0].leave()
    answered().leave()  # before the roster has heard it
    one = answered()
    roster.update()
    assert told == ["joined"]
    one.leave()
    one = answered()  # it may have another model now
    assert not roster.nodes
    roster.update()
    assert told == ["joined", "left", "joined"]
    roster.leave_out("node-0", "its replies were refused")
    one.leave()
    answered()
    roster.update()
    assert [node.name for node in roster.nodes.values()] == ["node-0"]


def test_a_node_that_was_started_again_at_work_is_not_waited_for(server):
    """Its message was confirmed: nobody will deliver it again, and nobody answer."""
    who = server.identity()
    one = joined(who)
    message_id = ask(server, one)
    one.receive()
    one.leave()
    again = joined(who)  # before the grid has looked
    (reply,) = server.grid.pull_messages([message_id])
    assert is_missing(reply)
    (reply,) = server.grid.pull_messages([ask(server, one)])  # its id is of nobody any more
    assert is_missing(reply)
    message_id = ask(server, again)
    again.send(Message(RecordDict(), reply_to=again.receive()), 0.0)
    assert len(server.grid.pull_messages([message_id])) == 1


def test_a_node_that_was_given_up_and_is_back_goes_on(server, monkeypatch):
    """Its connections were down for a while: it is the same process, and at work still."""
    monkeypatch.setattr(transport, "LONG_POLLS", {})
    one = joined(server.identity())
    message_id = ask(server, one)
    received = one.receive()
    server.link.state.deactivate_node(one.node_id)  # as when nothing is heard of it
    one.heartbeat()
    one.send(Message(RecordDict(), reply_to=received), 0.0)
    (reply,) = server.grid.pull_messages([message_id])
    assert reply.has_content()


def test_a_process_that_another_took_the_place_of_is_told_so(server):
    """It slept until it was given up, and its node was started a second time."""
    who = server.identity()
    one = joined(who)
    server.link.state.deactivate_node(one.node_id)
    joined(who)
    for request in (one.heartbeat, one.receive):
        with pytest.raises(RequestRefused) as refusal:
            request()
        assert refusal.value.status == 401
    with pytest.raises(RequestRefused, match="A node with this key is online"):
        one.register()


def test_a_node_that_is_back_while_replies_are_read_has_an_answer(server, monkeypatch):
    monkeypatch.setattr(transport, "LONG_POLLS", {})
    one, other = joined(server.identity("one")), joined(server.identity("other"))
    ids = [ask(server, one), ask(server, other)]
    other.send(Message(RecordDict(), reply_to=other.receive()), 0.0)
    one.receive()
    server.link.state.deactivate_node(one.node_id)
    read = server.grid._reply_to
    monkeypatch.setattr(
        server.grid, "_reply_to", lambda message_id: one.heartbeat() or read(message_id)
    )
    assert sorted(map(is_missing, server.grid.pull_messages(ids))) == [False, True]


def test_a_node_has_the_name_that_it_enrolled_with(server):
    one = joined(server.identity("honest"))
    told = []
    roster = Roster(server.grid, {}, {}, {}, told.append)
    roster.update()
    asked = one.receive()
    answer = {"name": "another", "partition-id": 0, "parameters": "{}", "statistics": "{}"}
    content = RecordDict({"config": ConfigRecord(answer)})
    one.send(Message(content, reply_to=asked), 0.0)
    with pytest.raises(RunError, match="its key is that of honest, whose name it has to have"):
        roster.wait_for(1, 1)


# -- being turned away -------------------------------------------------------------------------


def test_a_node_that_is_revoked_is_told_as_it_waits_and_does_not_come_back(server):
    who = server.identity()
    one = joined(who)
    refused = []

    def wait() -> None:
        try:
            one.receive()
        except RequestRefused as error:
            refused.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    while not server.link._open_polls[one.node_id]:
        time.sleep(0.01)
    Federation(server.federation.folder).nodes.revoke("node-0")
    assert list(server.grid.get_node_ids()) == []
    waiting.join(10)
    assert "The key of node-0 was revoked" in str(refused[0])
    for request in (one.register, one.receive, one.heartbeat, lambda: joined(who)):
        with pytest.raises(RequestRefused, match="The key of node-0 was revoked"):
            request()


def test_a_message_for_a_revoked_node_is_answered_for_it(server):
    one = joined(server.identity())
    message_id = ask(server, one)
    server.federation.nodes.revoke("node-0")
    (reply,) = server.grid.pull_messages([message_id])
    assert reply.has_error()


def test_a_node_is_known_after_the_server_was_started_again(federation, tmp_path):
    with serving(federation, tmp_path) as server:
        one = joined(server.identity())
    with serving(Federation(federation.folder), tmp_path) as again:
        with pytest.raises(RequestRefused) as refusal:
            one.receive()
        assert refusal.value.status == 401  # it has another id now
        one.register()
        assert again.grid.name_of(one.node_id) == "node-0"


def test_nothing_is_answered_but_fleet_routes_and_those_to_known_nodes(server):
    one = joined(server.identity())
    strangers_key = keys.generate_files()[0]
    stranger = FleetClient(HOST, server.port, None, strangers_key)
    own, theirs = one._transport._signed_headers(), stranger._transport._signed_headers()
    for _, path in PROTOBUF_REQUEST_TYPES:
        if path.startswith("/v1/fleet/"):
            assert server.post(path, {})[0] == 401, path
            assert server.post(path, theirs)[0] == 401, path
        else:
            assert server.post(path, own)[0] == 404, path
    for path in ("/", "/docs", "/openapi.json", "/health", "/v1/fleet", "/v1/fleet/"):
        assert server.post(path, own)[0] == 404, path


@pytest.mark.parametrize(("seconds", "where"), [(-3600, "behind"), (-306, "behind"), (10, "ahead")])
def test_a_request_of_another_time_is_refused(server, monkeypatch, seconds, where):
    one = joined(server.identity())
    then = transport.utc_now() + datetime.timedelta(seconds=seconds)
    monkeypatch.setattr(transport, "utc_now", lambda: then)
    one._transport._signed_at = 0.0
    with pytest.raises(Unreachable, match=rf"clock is {abs(seconds)} s {where}"):
        one.receive()


def test_a_recorded_request_serves_nobody_else(server):
    one, other = joined(server.identity("one")), joined(server.identity("other"))
    recorded, theirs = one._transport._signed_headers(), other._transport._signed_headers()
    path = "/v1/fleet/pull-messages"
    body = fleet_pb2.PullMessagesRequest(node=one._node).SerializeToString()
    assert server.post(path, recorded, body)[0] == 200
    for name in (TIMESTAMP_HEADER, FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER):
        assert server.post(path, {**recorded, name: theirs[name] + "0"}, body)[0] == 401
        assert server.post(path, {**recorded, name: ""}, body)[0] == 401
    assert server.post(path, theirs, body)[0] == 401  # their signature, for another node


# -- somebody else's server --------------------------------------------------------------------


def test_a_server_with_another_authority_is_not_trusted(server, tmp_path):
    elsewhere = Federation(tmp_path / "elsewhere", server.federation.address)
    token = elsewhere.invite("node-0")  # of a federation whose address somebody has taken
    with pytest.raises(certificates.CertificateError, match="another certificate than the token"):
        joined(from_token(token, None, tmp_path / "first"))
    known = from_token(token, None, tmp_path / "second")
    known.authority.write_bytes(elsewhere.authority.read_bytes())  # it has been there before
    with pytest.raises(UntrustedServer, match="certificate"):
        joined(known)
    assert not server.link.state.nodes, "something was sent"


def test_to_show_the_authoritys_certificate_is_not_to_have_its_key(tmp_path):
    honest = Federation(tmp_path / "honest", f"{HOST}:{free_port()}")
    token = honest.invite("node-0")
    between = Federation(tmp_path / "between", honest.address)
    between.context(HOST)
    stolen = between.certificate.read_bytes() + honest.authority.read_bytes()
    between.certificate.write_bytes(stolen)
    between.authority_key.unlink()  # it serves what lies there
    with serving(between, tmp_path), pytest.raises(UntrustedServer, match="certificate"):
        joined(from_token(token, None, tmp_path / "node"))


def test_a_certificate_for_another_host_is_not_trusted(server, tmp_path):
    token = server.federation.invite("node-0")
    where = f"127.0.0.2:{server.port}"
    with (
        _socket("127.0.0.2", server.port) as listening,
        _serving(listening, server.federation, HOST),
        pytest.raises(UntrustedServer, match="IP address mismatch"),
    ):
        joined(from_token(token, where, tmp_path / "node"))


def test_old_tls_is_refused_by_both_sides(server):
    outdated = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    outdated.check_hostname, outdated.verify_mode = False, ssl.CERT_NONE
    outdated.set_ciphers("ALL:@SECLEVEL=0")
    outdated.minimum_version = ssl.TLSVersion.TLSv1
    outdated.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(Unreachable):
        FleetClient(HOST, server.port, outdated).register()
    newest = certificates.client_context(server.federation.authority)
    assert newest.minimum_version == ssl.TLSVersion.TLSv1_2


def test_both_sides_say_which_of_them_does_not_encrypt(server, tmp_path):
    with pytest.raises(Unreachable):
        FleetClient(HOST, server.port).register()
    assert certificates.speaks_tls(HOST, server.port)
    with _socket(HOST, 0) as listening, _serving(listening) as link:
        port = listening.getsockname()[1]
        assert not certificates.speaks_tls(HOST, port)
        with pytest.raises(certificates.NoTLS, match="does not encrypt"):
            joined(from_token(server.federation.invite("a"), f"{HOST}:{port}", tmp_path / "a"))
        with pytest.raises(UntrustedServer, match="does not encrypt"):
            joined(from_files(f"{HOST}:{port}", server.federation.authority, None))
        link.finish()


# -- certificates of one's own -----------------------------------------------------------------


def test_certificates_that_were_issued_elsewhere(tmp_path):
    theirs = Federation(tmp_path / "theirs", f"{HOST}:1")
    theirs.context(HOST)
    ours = Federation(tmp_path / "ours", f"{HOST}:{free_port()}")
    ours.install_certificates(theirs.certificate, theirs.key, theirs.authority)
    assert not ours.authority_key.exists()
    served = ours.certificate.read_bytes()
    with serving(ours, tmp_path) as server:
        joined(server.identity())
    assert ours.certificate.read_bytes() == served
    another = tmp_path / "another.key"
    another.write_bytes(certificates.key_to_pem(certificates.new_key()))
    with pytest.raises(certificates.CertificateError, match="Cannot serve with"):
        ours.install_certificates(theirs.certificate, another, theirs.authority)
    with pytest.raises(fed.FedError, match="Cannot read"):
        ours.install_certificates(tmp_path / "missing", theirs.key, theirs.authority)


def test_a_key_that_others_can_read_is_not_served_with(federation):
    federation.authority_key.chmod(0o640)
    with pytest.raises(fed.FedError, match="others can read it: chmod 600"):
        federation.context(HOST)


def test_the_servers_certificate_follows_its_address(federation, tmp_path):
    federation.context(HOST)
    before = federation.authority.read_bytes()
    moved = Federation(federation.folder, f"localhost:{free_port()}")
    with serving(moved, tmp_path) as server:
        joined(server.identity())
    assert moved.authority.read_bytes() == before, "nodes would not know it any more"
