"""Distillation methods, one file each: the loss, its settings, and its recipe.

A loss is (params, teacher_params, batch, key) -> (loss, metrics); a recipe says which losses train
which networks in which stages, and how the student is sampled.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxdistill.errors import choose
from jaxdistill.methods import (
    add,
    direct,
    dmd2,
    endpoint,
    imagine_flash,
    lcm,
    lightning,
    matched,
    step_distillation,
    tdm,
)
from jaxdistill.methods.recipe import Kit, Recipe, check_recipe, settings_from


class Method(NamedTuple):
    """Its settings, a dataclass, and (kit, settings) -> its recipe, which raises ValueError."""

    settings: Any
    recipe: Callable[[Kit, Any], Recipe]


METHODS: dict[str, Method] = {
    module.__name__.rpartition(".")[2]: Method(module.Settings, module.recipe)
    for module in (
        imagine_flash,
        matched,
        endpoint,
        direct,
        step_distillation,
        lcm,
        add,
        lightning,
        dmd2,
        tdm,
    )
}
"""By the names that configs use."""


def build(name: str, blocks: Mapping[str, Any]) -> Callable[[Kit], Recipe]:
    """Kit -> the recipe of a method.

    `blocks[name]` holds its settings, defaults where there is none. It may name another method as
    its "method": a variant of that one. Raises ValueError for a name or a key that is not known;
    the result raises it, with the block's name, for settings that do not go together.
    """
    block = dict(blocks.get(name, {}))
    kind = block.pop("method", name)
    method = choose(METHODS, kind, "config.method.name" if kind == name else f"{name}.method")
    where = f"config.methods.{name}"
    settings = settings_from(method.settings, block, where)

    def make(kit: Kit) -> Recipe:
        try:
            return check_recipe(method.recipe(kit, settings), kit.steps)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    return make
