"""README.md as the site's home page."""

import paths
import pytest


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs")
    return paths.module("docs/hooks.py")


@pytest.mark.parametrize(
    ("readme", "home"),
    [
        ("[a](docs/plans.md#b)", "[a](plans.md#b)"),
        ("![a](docs/pictures/b.png)", "![a](pictures/b.png)"),
        ("[![a](docs/b.png)](docs/c.md)", "[![a](b.png)](c.md)"),
        (
            '<img src="docs/b.png"> <source srcset="docs/c.png">',
            '<img src="b.png"> <source srcset="c.png">',
        ),
        (
            "[all](docs/results) [all](docs/results/)",
            "[all](results/README.md) [all](results/README.md)",
        ),
        ("[`LICENSE`](LICENSE), [how](CONTRIBUTING.md#tests), [p](docs)", "`LICENSE`, how, p"),
        ("[a](https://example.org/docs/b) [c](#d)", "[a](https://example.org/docs/b) [c](#d)"),
        ("--out=docs/results", "--out=docs/results"),
    ],
)
def test_a_link_leads_to_the_same_page(hooks, readme, home):
    assert hooks.at_home(readme) == home
