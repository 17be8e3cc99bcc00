"""A good password is looked at once, and each guess costs the same, whoever it is for."""

import asyncio
import base64
from collections.abc import Mapping

import bcrypt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pgvigil import credentials
from pgvigil.credentials import Credentials, Verdict


def hash_of(password: str, cost: int = 4) -> str:
    hashed: bytes = bcrypt.hashpw(password.encode()[:72], bcrypt.gensalt(cost))
    return hashed.decode()


USERS = {"prometheus": hash_of("secret"), "ünïcode": hash_of("pä:ss"), "dear": hash_of("x", 6)}


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


class Counted(Credentials):
    """Notes the costs of the hashes that passwords are looked at with."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: list[int] = []

    def matches(self, password: bytes, hashed: bytes) -> bool:  # type: ignore[override]
        self.costs.append(int(hashed[4:6]))
        return Credentials.matches(password, hashed)


def judged(*headers: str, users: Mapping[str, str] = USERS) -> tuple[list[Verdict], list[int]]:
    """What is said to each header in turn, and the costs of all looks."""
    counted = Counted()

    async def each() -> list[Verdict]:
        return [await counted.judge(users, header) for header in headers]

    verdicts = asyncio.run(each())
    counted.close()
    return verdicts, counted.costs


def test_who_knows_a_password_may_come_in_and_is_looked_at_once() -> None:
    good = basic("prometheus", "secret")
    assert judged(good, good, good) == ([Verdict.GOOD] * 3, [4])


@pytest.mark.parametrize(
    ("user", "password"), [("ünïcode", "pä:ss"), ("dear", "x"), ("prometheus", "secret")]
)
def test_names_and_passwords_may_have_any_characters(user: str, password: str) -> None:
    assert judged(basic(user, password).replace("Basic", "bASIC "))[0] == [Verdict.GOOD]


def test_a_wrong_password_costs_one_look_each_time() -> None:
    wrong = basic("prometheus", "guess")
    assert judged(wrong, wrong) == ([Verdict.WRONG] * 2, [4, 4])


def test_a_user_that_there_is_not_costs_the_same_look_as_a_wrong_password() -> None:
    users = {"prometheus": hash_of("secret", 5)}
    known = judged(basic("prometheus", "guess"), users=users)
    unknown = judged(basic("nobody", "guess"), users=users)
    assert known == unknown == ([Verdict.WRONG], [5])


def test_of_users_with_several_costs_one_that_there_is_not_is_like_one_of_them() -> None:
    names = [f"nobody{number}" for number in range(40)]
    verdicts, costs = judged(*(basic(name, "x") for name in names for _ in range(2)))
    assert set(verdicts) == {Verdict.WRONG}
    assert costs[::2] == costs[1::2]  # and always the same one
    assert set(costs) == {4, 6}


@pytest.mark.parametrize("password", ["secret", "", "secret\0", "\0secret"])
def test_somebody_elses_password_is_wrong_for_a_user_that_there_is_not(password: str) -> None:
    assert judged(basic("nobody", password))[0] == [Verdict.WRONG]


@pytest.mark.parametrize(
    "header",
    [
        *("", "Basic", "Basic ", "Basic !", "Bearer abc", "basic\tabc", "Basic ü"),
        *("Basic cHJvbWV0aGV1cw==", "Basic /zpzZWNyZXQ=", "Negotiate " + "A" * 9000),
    ],
)
def test_what_is_no_user_and_password_is_wrong_without_a_look(header: str) -> None:
    assert judged(header) == ([Verdict.WRONG], [])


@given(st.text(max_size=80), st.text(max_size=80))
def test_no_name_and_no_password_breaks_it(user: str, password: str) -> None:
    assert judged(basic(user, password), users={"a": USERS["dear"]})[0] == [Verdict.WRONG]


def test_of_a_long_password_the_first_72_bytes_count_as_htpasswd_has_it() -> None:
    users = {"a": hash_of("x" * 72)}
    good = [basic("a", "x" * 72), basic("a", "x" * 72 + "more"), basic("a", "x" * 500)]
    assert judged(*good, users=users) == ([Verdict.GOOD] * 3, [4])
    assert judged(basic("a", "x" * 71), users=users)[0] == [Verdict.WRONG]


def test_those_who_come_at_once_with_one_password_share_a_look() -> None:
    counted = Counted()

    async def together() -> list[Verdict]:
        good = basic("prometheus", "secret")
        return await asyncio.gather(*(counted.judge(USERS, good) for _ in range(500)))

    assert set(asyncio.run(together())) == {Verdict.GOOD}
    assert counted.costs == [4]


def test_whoever_leaves_takes_nobody_elses_look_along() -> None:
    counted = Counted()

    async def one_leaves() -> Verdict:
        good = basic("dear", "x")
        first = asyncio.ensure_future(counted.judge(USERS, good))
        second = asyncio.ensure_future(counted.judge(USERS, good))
        await asyncio.sleep(0)
        first.cancel()
        return await second

    assert asyncio.run(one_leaves()) is Verdict.GOOD
    assert counted.costs == [6]


def test_looks_are_bounded_and_who_is_known_does_not_wait_for_them() -> None:
    counted = Counted()

    async def flooded() -> tuple[list[Verdict], Verdict, Verdict]:
        good = basic("prometheus", "secret")
        await counted.judge(USERS, good)
        guesses = [
            asyncio.ensure_future(counted.judge(USERS, basic("prometheus", str(number))))
            for number in range(3 * credentials.WAITING)
        ]
        await asyncio.sleep(0)
        known = await counted.judge(USERS, good)
        looking = len(counted._looking)
        assert looking <= credentials.WAITING
        verdicts = await asyncio.gather(*guesses)
        return verdicts, known, await counted.judge(USERS, basic("dear", "x"))

    verdicts, known, afterwards = asyncio.run(flooded())
    assert verdicts.count(Verdict.BUSY) == 2 * credentials.WAITING
    assert verdicts.count(Verdict.WRONG) == credentials.WAITING
    assert (known, afterwards) == (Verdict.GOOD, Verdict.GOOD)


def test_what_was_good_is_forgotten_when_the_users_change() -> None:
    counted = Counted()

    async def changed() -> list[Verdict]:
        header = basic("prometheus", "secret")
        every = [USERS, dict(USERS), {"prometheus": hash_of("new")}, {"other": USERS["dear"]}]
        return [await counted.judge(users, header) for users in every]

    good, wrong = Verdict.GOOD, Verdict.WRONG
    assert asyncio.run(changed()) == [good, good, wrong, wrong]
    assert len(counted.costs) == 4
