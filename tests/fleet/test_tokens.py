"""Tokens survive being written down, and nothing else passes for one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_fed.fleet import tokens
from mlx_fed.fleet.tokens import Token, TokenError

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
addresses = st.builds(
    "{}:{}".format,
    st.sampled_from(["192.168.1.20", "fed.example.org", "[2001:db8::1]"]),
    st.integers(1, 65535),
)
some_tokens = st.builds(
    Token,
    addresses,
    st.binary(min_size=32, max_size=32),
    names,
    st.integers(0, 2**31 - 1),
    st.binary(min_size=16, max_size=16),
)


@given(some_tokens)
def test_a_token_says_what_it_was_made_of(token):
    text = tokens.encode(token)
    assert tokens.decode(f"  {text}\n") == token
    assert text.isascii()
    assert not set(text) & set(" \t\n'\"$&|<>;()")  # for any shell, mail and chat


@given(some_tokens, st.data())
def test_a_token_that_was_changed_on_the_way_is_none(token, data):
    text = tokens.encode(token)
    place = data.draw(st.integers(7, len(text) - 2))  # the last character has spare bits
    other = data.draw(st.sampled_from("Aa0_-z9").filter(lambda char: char != text[place]))
    with pytest.raises(TokenError, match="is not a whole token"):
        tokens.decode(text[:place] + other + text[place + 1 :])
    with pytest.raises(TokenError, match="is not a whole token"):
        tokens.decode(text[:place])


@given(st.text() | st.text().map("mlxfed-".__add__))
def test_what_is_no_token_is_refused(text):
    with pytest.raises(TokenError):
        tokens.decode(text)


@given(st.text())
def test_a_name_is_a_plain_one(name):
    try:
        tokens.check_name(name)
    except TokenError:
        return
    assert "/" not in name
    assert name.isprintable()
    assert name not in (".", "..")
