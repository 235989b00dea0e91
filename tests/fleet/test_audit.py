"""Audit logs: what is written, and that any change is found."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx_fed as fed
import pytest

from mlx_fed.fleet import audit, tokens
from mlx_fed.fleet.audit import AuditError, AuditListener, AuditLog, entries, user_name
from mlx_fed.fleet.federation import Federation
from mlx_fed.fleet.policy import Policy
from mlx_fed.fleet.policy_gate import Gate

from ..conftest import command
from ..helpers.simulated import TASK


def write(path: Path, count: int) -> None:
    log = AuditLog(path)
    for number in range(count):
        log.append("sent", run="run-1", bytes=number, metrics=["loss"])


def test_lines_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "audit.jsonl"
    write(path, 2)
    write(path, 1)  # goes on after what is there
    assert [entry.number for entry in entries(path)] == [1, 2, 3]
    assert [entry.fields["bytes"] for entry in entries(path)] == [0, 1, 0]
    assert path.stat().st_mode & 0o077 == 0


def test_one_changed_byte_is_found_wherever_it_is(tmp_path):
    path = tmp_path / "audit.jsonl"
    write(path, 3)
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(AuditError, match="line"):
            list(entries(path))


@pytest.mark.parametrize("number", [1, 2])
def test_a_line_that_was_removed_or_repeated_is_found(tmp_path, number):
    path = tmp_path / "audit.jsonl"
    write(path, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    for changed in (lines[: number - 1] + lines[number:], lines[:number] + lines[number - 1 :]):
        path.write_bytes(b"".join(changed))
        with pytest.raises(AuditError, match=f"line {number}|line {number + 1}"):
            list(entries(path))


def test_a_line_from_another_log_is_found(tmp_path):
    write(tmp_path / "one.jsonl", 2)
    AuditLog(tmp_path / "other.jsonl").append("started")
    write(tmp_path / "other.jsonl", 1)
    first, _ = (tmp_path / "one.jsonl").read_bytes().splitlines(keepends=True)
    _, second = (tmp_path / "other.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "one.jsonl").write_bytes(first + second)
    with pytest.raises(AuditError, match="line 2"):
        list(entries(tmp_path / "one.jsonl"))


def test_a_changed_log_is_not_appended_to(tmp_path):
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append("sent", bytes=1)
    path.write_bytes(path.read_bytes().replace(b'"bytes": 1', b'"bytes": 2'))
    with pytest.raises(AuditError, match="line 1"):
        AuditLog(path)
    path.write_bytes(b"")
    with pytest.raises(AuditError, match="shorter"):
        log.append("sent", bytes=3)


def test_several_append_to_one_log(tmp_path):
    path = tmp_path / "audit.jsonl"
    with ThreadPoolExecutor(3) as pool:  # each opens the file for itself, as processes do
        list(pool.map(lambda _: write(path, 50), range(3)))
    assert [entry.number for entry in entries(path)] == [*range(1, 151)]


def test_a_line_that_a_crash_has_cut_off_is_kept_and_the_log_goes_on(tmp_path):
    path = tmp_path / "audit.jsonl"
    write(path, 3)
    content = path.read_bytes()
    for size in (len(content) - 1, len(content) - 40, len(content) - 150):
        path.write_bytes(content[:size])
        assert "ends in the middle of line 3" in command("audit", "verify", path).text
        write(path, 1)
        _, _, torn, last = entries(path)
        assert (torn.event, last.event) == ("torn", "sent")
        assert torn.fields["line"] == content[:size].splitlines()[-1].decode()


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path, little_room):
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append("sent", text="x" * 50_000)
    with pytest.raises(AuditError, match="Cannot write"):
        log.append("sent", text="x" * 20_000)
    count = len([*entries(path)])
    log.append("sent", text="it goes on")
    assert len([*entries(path)]) == count + 1


def test_a_line_is_bounded_and_never_refused(tmp_path):
    """A round of 10,000 nodes with long names, or settings of megabytes."""
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append("round", round=1, train=["\U0001f600" * 64 + str(n) for n in range(10_000)])
    (entry,) = entries(path)
    assert entry.fields["round"] == 1
    assert entry.fields["train"]["bytes"] > 10**6
    assert path.stat().st_size < 10_000


REWRITTEN = {
    "a time without a zone": {"time": "2026-01-01T00:00:00"},
    "a year that is none": {"time": "0001-01-01T00:00:00+00:00"},
    "fields that are none": {"fields": 5},
    "a time that is none": {"time": 5},
    "another number": {"number": 2},
    "a deep one": {"fields": {"a": eval("[" * 80 + "]" * 80)}},
}


@pytest.mark.parametrize("case", REWRITTEN)
def test_a_log_that_was_written_anew_with_its_hashes_ends_in_words(tmp_path, case):
    path = tmp_path / "audit.jsonl"
    content = {
        "number": 1,
        "time": "2026-01-01T00:00:00+00:00",
        "event": "sent",
        "fields": {"run": "a"},
        "before": "0" * 64,
    } | REWRITTEN[case]
    text = json.dumps(content)
    digest = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(f'{text[:-1]}, "hash": "{digest}"}}\n')
    shown = command("audit", "show", path)
    if case == "a deep one":
        assert shown.code == 0
    else:
        assert "line 1, is not as it was written" in shown.text
    with pytest.raises(AuditError):
        Gate(Policy(rounds_per_day=1), "server:1", AuditLog(path))


@pytest.mark.parametrize("content", [b"x" * 2**22, b"\0" * 2**22, b"\n" * 100, b"{}\n", b"\r\n"])
def test_what_is_no_log_is_refused(tmp_path, content):
    path = tmp_path / "audit.jsonl"
    path.write_bytes(content)
    assert command("audit", "verify", path).code == 1
    with pytest.raises(AuditError):
        AuditLog(path)


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AuditError, match="Cannot write"):
        AuditLog(tmp_path / "link").append("sent")
    assert not (tmp_path / "elsewhere").exists()


def test_a_user_without_a_name(monkeypatch):
    """As in a container."""

    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert user_name().startswith("user ")


def test_the_command_shows_and_verifies(tmp_path):
    path = tmp_path / "audit.jsonl"
    write(path, 3)
    AuditLog(path).append("refused", reason="local-epochs \x1b[31m")
    shown = command("audit", "show", path)
    assert "3 " in shown.text
    assert "bytes=2" in shown.text
    assert "\x1b" not in command("audit", "show", path, "--event", "refused").text
    assert "4 lines are as they were written" in command("audit", "verify", path).text
    path.write_bytes(path.read_bytes().replace(b'"bytes": 2', b'"bytes": 9'))
    found = command("audit", "verify", path)
    assert found.code == 1
    assert "line 3, is not as it was written" in found.text
    assert "no audit log" in command("audit", "show", tmp_path / "missing.jsonl").text


def test_a_federation_records_invitations_enrolment_and_revocation(tmp_path):
    federation = Federation(tmp_path / "federation", "127.0.0.1:1")
    token = tokens.decode(federation.invite("hospital"))
    federation.nodes.enrol(token.invitation, b"key of the node")
    federation.nodes.revoke("hospital")
    events = [(entry.event, entry.fields["node"]) for entry in entries(federation.audit_log)]
    assert events == [("invited", "hospital"), ("enrolled", "hospital"), ("revoked", "hospital")]


def test_an_enrolment_does_not_read_the_log_again(tmp_path, monkeypatch):
    federation = Federation(tmp_path / "federation", "127.0.0.1:1")
    federation.invite("first")
    write(federation.audit_log, 500)
    checked: list[int] = []
    check = audit._checked
    monkeypatch.setattr(
        audit, "_checked", lambda path, line, *rest: checked.append(1) or check(path, line, *rest)
    )
    for number in range(20):
        federation.invite(f"node-{number}")
    assert len(checked) <= 500 + 2 * 20, "what another process appended, and only once"
    assert len(list(entries(federation.audit_log))) == 521


def test_a_run_records_who_joined_what_was_refused_and_each_round(tmp_path):
    path = tmp_path / "audit.jsonl"
    fed.simulate(
        TASK,
        "FedAvg",
        3,
        num_rounds=2,
        workers=0,
        runs=tmp_path,
        listeners=(AuditListener(AuditLog(path)),),
    )
    started, *rounds, finished = entries(path)
    assert started.event == "started"
    assert started.fields["strategy"]
    assert [entry.fields["round"] for entry in rounds if entry.event == "round"] == [1, 2]
    assert finished.event == "finished"
    assert {entry.fields["run"] for entry in entries(path)} == {finished.fields["run"]}
