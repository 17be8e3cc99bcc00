"""Shards have each target exactly once, wherever it stands in the file."""

import itertools
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pgvigil import config, shard
from pgvigil.config import Told
from pgvigil.errors import Refused
from pgvigil.shard import Shard

NAMES = st.lists(st.text(min_size=1), unique=True, max_size=30)


@given(NAMES, st.integers(1, 12))
def test_all_shards_together_have_each_target_exactly_once(names: list[str], count: int) -> None:
    kept = [name for n in range(count) for name in names if Shard(n, count).keeps(name)]
    assert Counter(kept) == Counter(names)


@given(NAMES, st.integers(1, 12))
def test_a_shard_more_takes_targets_and_moves_no_others(names: list[str], count: int) -> None:
    for name in names:
        assert shard.home(name, count + 1) in (shard.home(name, count), count)


def test_where_a_target_belongs_is_the_same_on_every_machine() -> None:
    # A release that changed this would have each target twice, or not at all, while it rolls out.
    assert [shard.home(name, 3) for name in ("orders", "é", "db1", "db2")] == [1, 0, 2, 1]


def test_shards_are_of_about_the_same_size() -> None:
    sizes = Counter(shard.home(f"db{n}", 4) for n in range(2000))
    assert all(400 < size < 600 for size in sizes.values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0/1", (0, 1)), ("2/3", (2, 3)), ("pgvigil-2/3", (2, 3)), ("a-b-10/12", (10, 12))],
)
def test_a_shard_is_told_by_numbers_or_by_a_pods_name(text: str, expected: Shard) -> None:
    assert shard.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "1", "3/3", "-1/3", "0/0", "1/", "/3", "a/3", "a1/3", "0/1001", "1/3/4", " 0/3"),
        *("$(POD_NAME)/3", "pod-1-x/3", "0/3\n", "٠/3"),
    ],
)
def test_what_names_no_shard_is_refused(text: str) -> None:
    meant = "I/N or NAME-I/N with I from 0 to N - 1, such as 0/3 or pgvigil-2/3"
    with pytest.raises(Refused) as refused:
        config.settle(Told(shard=text), {"PGVIGIL_SHARD": "0/3"})
    assert [str(p) for p in refused.value.problems] == [
        f"--shard: must be {meant}, and N at most 1000"
    ]


def test_the_environment_may_tell_the_shard() -> None:
    assert config.settle(Told(), {"PGVIGIL_SHARD": "pod-1/3"}).shard == (1, 3)
    assert config.settle(Told(shard="2/3"), {"PGVIGIL_SHARD": "pod-1/3"}).shard == (2, 3)
    assert config.settle(Told(), {"PGVIGIL_SHARD": ""}).shard == shard.WHOLE
    with pytest.raises(Refused, match=r"^PGVIGIL_SHARD: must be I/N"):
        config.settle(Told(), {"PGVIGIL_SHARD": "3"})


def test_settings_are_shared_out_with_the_names_of_the_others(tmp_path: Path) -> None:
    path = tmp_path / "pgvigil.yml"
    path.write_text("targets:\n" + "".join(f"  db{n}: {{dsn: host=db{n}}}\n" for n in range(20)))
    parts = [config.settle(Told(path, shard=f"{n}/3"), {}).shared_out() for n in range(3)]
    names = [[target.name for target in part.targets] for part in parts]
    assert sorted(itertools.chain(*names)) == sorted(f"db{n}" for n in range(20))
    for own, part in zip(names, parts, strict=True):
        assert sorted([*own, *part.elsewhere]) == sorted(f"db{n}" for n in range(20))
