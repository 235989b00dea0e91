"""The list of nodes: who is known, invited and revoked, in a file that processes share."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_fed.fleet.node_list import NodeList, NodeListError
from mlx_fed.fleet.tokens import TokenError
from mlx_fed.flower.allowlist import AccessDenied

SECRET = b"0123456789abcdef"


@pytest.fixture
def members(tmp_path) -> NodeList:
    return NodeList(tmp_path / "nodes.json")


def test_an_invitation_serves_once_and_its_node_is_known_from_then_on(members):
    members.invite("a", SECRET)
    assert members.enrol(f"a:{SECRET.hex()}", b"key of a") == "a"
    assert members.name_of(b"key of a") == "a"
    assert NodeList(members.path).name_of(b"key of a") == "a"
    # The same node may show it again: it does not know whether its first try came through.
    assert members.enrol(f"a:{SECRET.hex()}", b"key of a") == "a"
    with pytest.raises(AccessDenied, match="This token was used: a has enrolled with another key"):
        members.enrol(f"a:{SECRET.hex()}", b"another key")


def test_the_secret_is_not_in_the_file(members):
    members.invite("a", SECRET)
    text = members.path.read_text()
    assert SECRET.hex() not in text
    assert members.path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "shown", ["a:", "a", "", ":", f"b:{SECRET.hex()}", "a:" + "00" * 16, "a:x"]
)
def test_a_wrong_secret_is_refused(members, shown):
    members.invite("a", SECRET)
    with pytest.raises(AccessDenied, match="This token is not valid here"):
        members.enrol(shown, b"key")
    with pytest.raises(AccessDenied, match="does not know this node's key"):
        members.name_of(b"key")


def test_an_invitation_expires_and_can_be_taken_back(members):
    members.invite("late", SECRET, lasts=0)
    with pytest.raises(AccessDenied, match="This token has expired"):
        members.enrol(f"late:{SECRET.hex()}", b"key")
    members.invite("back", SECRET)
    members.revoke("back")
    with pytest.raises(AccessDenied, match="This token was revoked"):
        members.enrol(f"back:{SECRET.hex()}", b"key")


def test_a_revoked_key_stays_out_also_with_a_new_token(members):
    members.invite("a", SECRET)
    members.enrol(f"a:{SECRET.hex()}", b"key")
    members.revoke("a")
    with pytest.raises(AccessDenied, match="The key of a was revoked"):
        members.name_of(b"key")
    members.invite("a", b"another secret!!")
    with pytest.raises(AccessDenied, match="The key of a was revoked"):
        members.enrol(f"a:{b'another secret!!'.hex()}", b"key")
    assert members.enrol(f"a:{b'another secret!!'.hex()}", b"new key") == "a"
    with pytest.raises(AccessDenied, match="revoked"):
        members.name_of(b"key")


def test_one_key_is_one_node(members):
    members.invite("a", SECRET)
    members.invite("b", SECRET)
    members.enrol(f"a:{SECRET.hex()}", b"key")
    with pytest.raises(AccessDenied, match="has enrolled as a: one key is one node"):
        members.enrol(f"b:{SECRET.hex()}", b"key")
    with pytest.raises(NodeListError, match="This key is in use, by a"):
        members.add("c", b"key")


def test_names_and_numbers_are_given_once(members):
    members.add("a", b"key of a")
    with pytest.raises(NodeListError, match="There is a node named a already"):
        members.invite("a", SECRET)
    with pytest.raises(NodeListError, match="The number 0 is taken"):
        members.add("b", b"key of b", 0)
    assert members.add("b", b"key of b").number == 1
    members.revoke("a")
    assert members.invite("a", SECRET).number == 0
    with pytest.raises(NodeListError, match="There is no node named 'nobody'"):
        members.revoke("nobody")


@pytest.mark.parametrize("name", ["", "../a", "a/b", "a\nb", ".", "-a", "a" * 65, "ä"])
def test_names_that_no_folder_should_have(members, name):
    with pytest.raises(TokenError):
        members.invite(name, SECRET)


def test_a_change_of_another_process_is_seen_at_once(members):
    other = NodeList(members.path)
    for number in range(20):
        other.add(f"n{number}", f"key {number}".encode())
        assert members.name_of(f"key {number}".encode()) == f"n{number}"
        other.revoke(f"n{number}")
        with pytest.raises(AccessDenied):
            members.name_of(f"key {number}".encode())


def add_many(path: Path, who: int) -> None:
    for number in range(10):
        NodeList(path).add(f"p{who}-{number}", f"{who} {number}".encode())


def test_changes_at_the_same_time_are_all_kept(members):
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        list(pool.map(add_many, [members.path] * 3, range(3)))
    known = members.all()
    assert len(known) == 30
    assert len({member.number for member in known}) == 30


def test_a_file_that_was_broken_by_hand_locks_nobody_out(members):
    members.add("a", b"key")
    members.name_of(b"key")
    members.path.write_text("{")
    assert members.name_of(b"key") == "a"
    with pytest.raises(NodeListError, match="is not a list of nodes"):
        NodeList(members.path).all()
    with pytest.raises(NodeListError, match="is not a list of nodes"):
        members.revoke("a")
    assert members.path.read_text() == "{"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
records = st.fixed_dictionaries(
    {"name": st.text() | st.just("a") | json_values, "number": st.integers() | json_values},
    optional={
        "key": st.text() | json_values,
        "secret": st.text() | json_values,
        "expires": st.floats() | json_values,
        "revoked": st.booleans() | json_values,
    },
)


@given(
    st.binary()
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.lists(records).map(lambda value: json.dumps({"nodes": value}).encode()),
    st.binary(),
)
def test_any_file_is_a_list_or_refused(tmp_path_factory, content, key):
    path = tmp_path_factory.mktemp("members") / "nodes.json"
    path.write_bytes(content)
    members = NodeList(path)
    try:
        known = members.all()
    except NodeListError:
        return
    assert all(member.state in ("enrolled", "invited", "expired", "revoked") for member in known)
    accepted = {member.key.encode() for member in known if member.key and not member.revoked}
    try:
        members.name_of(key)
    except AccessDenied:
        return
    assert key in accepted
