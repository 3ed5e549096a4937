import pytest

from jaxdistill.errors import choose

TABLE = {"ddim": 1, "euler": None}


@pytest.mark.parametrize("name", TABLE)
def test_a_name_stands_for_its_value_whatever_that_is(name):
    assert choose(TABLE, name, "config.solver") is TABLE[name]


@pytest.mark.parametrize("name", ["DDIM", "", "ddim "])
def test_another_name_is_refused_with_the_key_the_value_and_what_is_allowed(name):
    with pytest.raises(ValueError) as refused:
        choose(TABLE, name, "config.solver")
    said = f"config.solver = {name!r} is not known; choose one of 'ddim', 'euler'"
    assert str(refused.value) == said
