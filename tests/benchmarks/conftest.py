"""Contenders are forked, where they are the python that tests."""

import sys

import pytest

from tests.forking import python


@pytest.fixture
def forked_contenders(monkeypatch):
    monkeypatch.setattr(sys, "executable", python())
