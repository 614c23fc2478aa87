"""What tests of layers share."""

import pytest


@pytest.fixture
def built_in_costs(monkeypatch):
    monkeypatch.setenv("IIRSNN_CALIBRATE", "0")
