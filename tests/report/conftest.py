"""Figures of tests are small."""

import pytest


@pytest.fixture(autouse=True)
def _few_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of them: to draw and compress 150 dpi takes a fifth of what writing a report does."""
    monkeypatch.setattr("nerve.report.write.PNG_DPI", 48)
