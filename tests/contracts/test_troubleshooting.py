"""Each reason that the program can tell has a remedy in the docs."""

import ast
import re
from pathlib import Path

import pgvigil
import pytest
from pgvigil import slow
from pgvigil.door import Why
from pgvigil.errors import Down
from pgvigil.plan import RAISES, Reason

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "troubleshooting.md").read_text("utf-8")
NO_ALERTS = {"AuroraReplicaLag", "PgBouncer"}
"""Words in capitals that are somebody else's."""
ROOMS = sorted(Path(pgvigil.__file__).parent.glob("*.py"))


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(title: str) -> set[str]:
    """What stands in the first cells of a section's table."""
    return {
        word
        for line in section(title).splitlines()
        if line.startswith("| `")
        for word in re.findall(r"`([^`]+)`", line.split("|")[1])
    }


def first_words(*functions: str) -> set[str]:
    """The literal reasons with which the rooms call a function."""
    found = set()
    for room in ROOMS:
        for node in ast.walk(ast.parse(room.read_text("utf-8"))):
            if isinstance(node, ast.Call) and node.args:
                name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
                name = node.func.id if isinstance(node.func, ast.Name) else name
                if name in functions and isinstance(node.args[0], ast.Constant):
                    found.add(str(node.args[0].value))
    return found


def test_each_way_to_be_down_has_a_remedy() -> None:
    assert rows("Down") == {str(reason) for reason in Down}


def test_each_reason_for_not_asking_has_a_remedy() -> None:
    assert rows("Not asked") == {str(reason) for reason in Reason}


def test_each_word_of_our_own_for_a_failure_has_a_remedy() -> None:
    words = first_words("QueryFailed") | {"shape"}
    assert {"wrong_columns", "unanswered", "size"} <= words
    assert words <= rows("No result")


def test_each_reason_for_a_sample_left_out_has_a_remedy() -> None:
    assert rows("Samples left out") == first_words("drop")


@pytest.mark.parametrize("why", Why)
def test_each_reason_for_putting_a_client_out_is_told(why: Why) -> None:
    assert f"`{why}`" in section("No answer")


def test_the_managed_services_that_are_known_are_told() -> None:
    managed = (DOCS / "managed.md").read_text("utf-8")
    assert [name for name in slow._PROVIDERS if f"`{name}`" not in managed] == []
    assert [name for name in RAISES if f"{name}_version()" not in managed] == []


@pytest.mark.parametrize("page", ["troubleshooting.md", "managed.md", "install.md"])
def test_what_a_page_leads_to_is_there(page: str) -> None:
    text = (DOCS / page).read_text("utf-8")
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    for target in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", text):
        assert not target or (DOCS / target).exists(), target
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in headings, anchor


@pytest.mark.parametrize("page", ["troubleshooting.md", "managed.md"])
def test_the_metrics_and_alerts_that_a_page_names_exist(page: str) -> None:
    text = (DOCS / page).read_text("utf-8")
    known = (DOCS / "metrics.md").read_text("utf-8")
    for name in set(re.findall(r"`((?:pg|pgvigil|process)_[a-z_]+_[a-z_]+)[`{]", text)):
        if name in {"pg_read_all_settings", "pg_read_all_stats", "pg_stat_scan_tables"}:
            continue
        if name != "pg_stat_statements":
            assert f"`{name}`" in known, name
    alerts = (Path(__file__).parents[2] / "rules").glob("*.yml")
    rules = "".join(path.read_text("utf-8") for path in alerts)
    named = set(re.findall(r"\b(?:[A-Z][a-z]+){2,}\b", text)) - NO_ALERTS
    assert [name for name in sorted(named) if f"alert: {name}" not in rules] == []
