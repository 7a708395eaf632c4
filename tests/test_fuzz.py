"""What `python tests/fuzz.py` does, for as long as a test may take."""

import pytest

fuzz = pytest.importorskip("fuzz", reason="needs pyarrow", exc_type=ImportError)


def test_two_thousand_cases():
    failed = fuzz.run(2000, seed=0)
    assert not failed, "\n".join(failed.values())


def test_what_is_not_on_the_list_is_a_failure(monkeypatch):
    """And can be run again: a case does not depend on those before it."""

    def broken(rng, folder):
        if rng.random() < 0.2:
            raise (KeyError, BaseException, ValueError)[rng.randrange(3)]

    for part in fuzz.PARTS:
        monkeypatch.setitem(fuzz.PARTS, part, broken)
    failed = fuzz.run(100, seed=0)
    assert 5 < len(failed) < 20
    text = "".join(failed.values())
    assert "\nKeyError" in text and "\nBaseException" in text
    number = max(failed)
    assert f"--seed 0 --first {number}\n" in failed[number]
    assert list(fuzz.run(1, seed=0, first=number)) == [number]
