from __future__ import annotations

from click.testing import CliRunner

from moeify.cli import main
from moeify.passes.catalog import describe


def test_every_pass_is_listed_with_before_and_after() -> None:
    result = CliRunner().invoke(main, ["passes"])
    assert result.exit_code == 0, result.output
    for entry in describe():
        assert f"{entry.name}  {entry.summary}" in result.stdout
        assert entry.before.splitlines()[0] in result.stdout
