"""A network of one's own, as docs/your_model.md shows it."""

import numpy as np
import snippets

PAGE = "docs/your_model.md"
NNX = "A Flax NNX network"


def test_the_page_distils_an_nnx_net():
    names = snippets.executed(snippets.blocks(PAGE, NNX))
    losses = [row["loss"] for row in names["student"].history["student"] if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]  # of the random net's own first step
    assert set(names["student"].params) == {1, 2}
    assert names["images"].shape == (32, 8, 8, 1)
    assert np.isfinite(names["images"]).all()


def test_an_nnx_net_needs_no_other_name_of_the_package():
    (block,) = snippets.blocks(PAGE, NNX)
    assert [line for line in block.splitlines() if "jaxdistill" in line] == [
        "import jaxdistill as jd"
    ]


def test_the_rest_of_the_page_runs():
    (nnx,) = snippets.blocks(PAGE, NNX)
    names = snippets.executed([block for block in snippets.blocks(PAGE) if block != nnx])
    assert names["losses"][-1] < names["losses"][0]
    assert np.mean(names["curve"][-10:]) < 0.5 * np.mean(names["curve"][:10])
    means, labels = names["means"], names["labels"](0)
    spread = 0.5 * names["noise"]  # the teacher's images: it moves a noise along its own ray
    assert np.abs(names["images"] - means[labels] - spread).mean() < 0.15
    assert set(names["one"].params) == {1}
    one = names["one"].sample(names["noise"], labels, 1)
    assert (
        np.abs(one - names["student"].sample(names["noise"], labels, 2)).mean()
        < np.abs(
            names["student"].sample(names["noise"], labels, 1)
            - names["student"].sample(names["noise"], labels, 2)
        ).mean()
    )
